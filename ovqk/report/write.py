"""One page that shows a results folder, and its figures as files.

    python -m ovqk.report RESULTS_DIR [--out FILE] [--figures | --no-figures]

RESULTS_DIR is the folder that cells were written to. If it is a model's, a task's or a cell's folder inside, the page
shows these cells alone. It writes RESULTS_DIR/report.html, which needs no network and no other file, and
RESULTS_DIR/figures/ with the same figures as SVG and PNG. Figures from an earlier report are removed if this report
does not make them; other files in that folder stay. Only records and tables are read, and the same records give the
same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from ovqk.config.command_line import program, quoted
from ovqk.errors import UserError, told
from ovqk.figures import comparisons
from ovqk.figures.choice import cell_figures, sweep_figures
from ovqk.records.cells import Cell, Failure, read_cells
from ovqk.records.results import folders_of_part
from ovqk.report.page import BYTES, CELLS, embedded, make_page, page_data
from ovqk.report.pictures import draw_depth
from ovqk.report.thinning import DETAILS
from ovqk.whole_files import write_text
from ovqk.wording import counted

Made = TypeVar("Made")
PAGE = "report.html"
FIGURES = "figures"
WRITTEN = ".written"
"""A file in the figures folder that lists the figures a report wrote, one name per line."""


def write_report(
    results_dir: Path, out: Path | None = None, with_figures: bool = True, tell: Callable[[str], object] | None = None
) -> list[str]:
    """Write the page and its figures beside it, and return lines that say what was written.

    Args:
        results_dir: the folder that cells were written to, or a model's, a task's or a cell's folder inside it.
        out: the page; RESULTS_DIR/report.html if None.
        with_figures: whether to write the figures too.
        tell: a function to call with each line as soon as it is true.

    Raises:
        UserError: there is no such folder, no finished cell in it, or a file cannot be written.
    """
    if results_dir.is_file():
        raise UserError(f"{results_dir}: a file, not a results folder.")
    if not results_dir.is_dir():
        raise UserError(f"{results_dir}: no such results folder.")
    cells, failures = read_cells(results_dir)
    if not cells:
        raise UserError(f"{results_dir} holds no finished cell{_failed(failures)}. {_remedy(results_dir)}")
    path = results_dir / PAGE if out is None else out
    if path.name == "" or (path.exists() and not path.is_file()):  # a device would be replaced instead of written to
        raise UserError(f"--out {path}: no file; allowed: a path of a page that is made, or made anew.")
    said = []
    try:
        for line in _write(cells, failures, path, with_figures):
            said.append(line)
            if tell:
                tell(line)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written ({error.strerror}).") from error
    return said


def _write(cells: Sequence[Cell], failures: Sequence[Failure], path: Path, with_figures: bool) -> Iterator[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = FIGURES if with_figures else None
    page, cells, unsound = without_unsound(
        lambda shown, others: make_page(shown, [*failures, *others], path.parent, figures), cells, path.parent
    )
    failures = [*failures, *unsound]
    write_text(path, page.html)
    models = len({cell.record["model"] for cell in cells})
    yield f"wrote {path} ({page.size / 1e6:.1f} MB, {counted(len(cells), 'cell')} of {counted(models, 'model')})"
    if page.size > BYTES * max(1, len(cells) / CELLS):
        yield "the page is larger than planned even with the least detail of unclaimed heads"
    yield from (f"without results: {f.model} / {f.task} / {f.analysis}: {f.error}" for f in failures)
    if with_figures:
        folder = path.parent / FIGURES
        n, _, unsound = without_unsound(lambda shown, _: write_figures(shown, folder), cells, path.parent)
        yield from (f"without figures: {f.model} / {f.task} / {f.analysis}: {f.error}" for f in unsound)
        yield f"wrote {counted(n, 'figure')}, as SVG and as PNG, to {path.parent / FIGURES}"


def without_unsound(
    make: Callable[[Sequence[Cell], Sequence[Failure]], Made], cells: Sequence[Cell], beside: Path
) -> tuple[Made, Sequence[Cell], list[Failure]]:
    """Make something from cells. If a cell holds a value that readers do not expect, it alone is left out.

    Args:
        make: makes it from cells, and is told the cells left out.
        cells: the cells.
        beside: the page's folder.

    Returns:
        The thing made, the cells that it shows, and the cells left out with reasons.

    Raises:
        UserError: no cell is left.
    """
    try:
        return make(cells, []), cells, []
    except (UserError, OSError):
        raise
    except Exception:
        errors = {place: error for place, cell in enumerate(cells) if (error := _error_of(cell, beside)) is not None}
        if not errors:
            raise  # a defect of ovqk
    unsound = [
        Failure(*cells[place].place, cells[place].record["analysis"], f"it cannot be shown ({told(error)})")
        for place, error in errors.items()
    ]
    kept = [cell for place, cell in enumerate(cells) if place not in errors]
    if not kept:
        raise UserError(f"none of the {counted(len(cells), 'finished cell')} can be shown: {unsound[0].error}.")
    return make(kept, unsound), kept, unsound


def _error_of(cell: Cell, beside: Path) -> Exception | None:
    """Return the error that showing this cell alone raises, if it does."""
    try:
        embedded(page_data([cell], [], beside, DETAILS[-1], draw_depth([cell])))
        for _ in chain(sweep_figures([cell]), cell_figures([cell])):
            pass
    except Exception as error:
        return error
    return None


def write_figures(cells: Sequence[Cell], folder: Path) -> int:
    """Write these cells' figures, remove an earlier report's other figures, and return how many were written."""
    folder.mkdir(parents=True, exist_ok=True)
    before, made = _written(folder), set()
    try:
        for name, figure in chain(sweep_figures(cells), cell_figures(cells)):
            made |= {path.name for path in comparisons.save(figure, folder / name)}
        for name in before - made:
            (folder / name).unlink(missing_ok=True)
        before = set()
    finally:
        write_text(folder / WRITTEN, "".join(f"{name}\n" for name in sorted(before | made)))
    return len(made) // 2


def _written(folder: Path) -> set[str]:
    """Name the figures in a folder that an earlier report wrote."""
    try:
        names = (folder / WRITTEN).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    return {name for name in names if Path(name).name == name and Path(name).suffix in (".svg", ".png")}


# --- the command ---------------------------------------------------------------------------------------------


def _failed(failures: Sequence[Failure]) -> str:
    return f" ({counted(len(failures), 'cell')} without results)" if failures else ""


def _remedy(results_dir: Path) -> str:
    failed = next(iter(folders_of_part(results_dir)), None)
    whole = results_dir if failed is None else failed.resolve().parents[2]
    return f"Compute one first: {program()} {quoted('results_dir', str(whole))}"
