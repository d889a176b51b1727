"""The page's first words: its title and one paragraph that says what was found."""

from collections import Counter
from collections.abc import Sequence

from ovqk import wording
from ovqk.records.cells import Cell, Failure

CLAIMS, CANDIDATES = "Do the weights bear out the claims?", "Which heads are strongest for each role?"
FREQUENCIES, STRUCTURE = "Which frequencies do the heads work with?", "What do the heads do, by their weights?"
ATLAS = "Every head is in the atlas."
BY_FREQUENCY = (
    "The words of the task are a cycle. Bars: the power of the embeddings at each frequency, with the number of the "
    "strongest above. Rows: the share of a head's OV that goes from a frequency to itself, and of its keys; the "
    "darker, the more. Beside each row: its verdict, its strongest frequency, and that one's share. The claims: "
    "embeddings are sparse in Fourier space (a quarter of the frequencies or fewer hold 95 % of the power); keys are "
    "of one frequency; OV moves that same one."
)
"""The words above figures by frequency."""


def opening(cells: Sequence[Cell], failures: Sequence[Failure]) -> dict[str, str]:
    """Return the page's `title` and `lead`: how many cells there are, and what they came to."""
    size = _size(cells, failures)
    roles = [row for cell in cells if "verdicts" in cell.tables for row in _roles(cell)]
    if roles:
        return {
            "title": CLAIMS,
            "lead": f"{size} {wording.counted(len(roles), 'role')} with claimed heads: {_counts(roles)}.",
        }
    parts = [row for cell in cells if "cycles" in cell.tables for row in cell.tables["cycles"]["verdict"]]
    ranked = any("candidates" in cell.tables and len(cell.tables["candidates"]) for cell in cells)
    nothing = "No circuit is claimed for any of them, so there is nothing to judge."
    if ranked:
        more = f" By frequency, of {len(parts)} claims on parts of the model: {_counts(parts)}." if parts else ""
        lead = f"{nothing} The strongest heads for each role are candidates: places to look first, and no findings."
        return {"title": CANDIDATES, "lead": f"{size} {lead}{more} {ATLAS}"}
    if parts:
        said = f"By frequency, of {len(parts)} claims on parts of the model: {_counts(parts)}."
        return {"title": FREQUENCIES, "lead": f"{size} {said} {ATLAS}"}
    return {"title": STRUCTURE, "lead": f"{size} {nothing} {ATLAS}"}


def _roles(cell: Cell) -> list[str]:
    verdicts = cell.tables["verdicts"]
    return list(verdicts.loc[verdicts["kind"] == "role", "verdict"])


def _size(cells: Sequence[Cell], failures: Sequence[Failure]) -> str:
    models = {cell.record["model"] for cell in cells}
    tasks = {cell.record["task"] for cell in cells} - {"none"}
    about = f" and {wording.counted(len(tasks), 'task')}" if tasks else ""
    lost = f", and {wording.counted(len(failures), 'cell')} without results" if failures else ""
    return f"{wording.counted(len(cells), 'cell')} of {wording.counted(len(models), 'model')}{about}{lost}."


def _counts(verdicts: Sequence[str]) -> str:
    """Return how often there is each verdict, as "2 corroborated, 1 partial and 1 unsupported"."""
    counts = Counter(verdicts)
    told = [f"{counts[name]} {said}" for name, said in wording.VERDICTS.items() if counts[name]]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
