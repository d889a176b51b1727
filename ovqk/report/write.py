"""One page that shows a folder of results, and its figures as files.

    python -m ovqk.report RESULTS_DIR [--out FILE] [--figures | --no-figures]

Writes RESULTS_DIR/report.html, which needs no network and no other file, and RESULTS_DIR/figures/ with the same figures
as SVG and PNG; figures of an earlier report that this one does not make are removed, and no other file of that folder.
Reads records and tables, nothing else; the same records give the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ovqk.figures import models, portraits
from ovqk.records.record import RECORD, write_text
from ovqk.report.page import BYTES, CELLS, Cell, Failure, labels, make_page, read_cells, weights_labels

PAGE = "report.html"
FIGURES = "figures"
WRITTEN = ".written"
"""In the folder of figures: the names of those that a report wrote, a line each."""
STRUCTURE = ("ov_copying", "qk_matching", "qk_symmetry", "qk_positional_share", "ov_copying_residual")
"""Metrics that an atlas of all models is drawn of, beside what each task's roles predict first."""


def write_report(
    results_dir: Path, out: Path | None = None, with_figures: bool = True, tell: Callable[[str], object] | None = None
) -> list[str]:
    """Write the page, and unless told otherwise its figures beside it; returns what to say about them.

    Args:
        results_dir: the folder that run.py wrote.
        out: the page; RESULTS_DIR/report.html unless given.
        with_figures: whether to write the figures too.
        tell: called with each line as soon as it is true.

    Raises:
        SystemExit: there is no such folder, no finished cell in it, or a file cannot be written.
    """
    if not results_dir.is_dir():
        raise SystemExit(f"ovqk: {results_dir}: no such results folder.")
    cells, failures = read_cells(results_dir)
    if not cells and (above := _above(results_dir)):
        raise SystemExit(f"ovqk: {results_dir} is a part of a results folder: give the whole, {above}.")
    if not cells:
        raise SystemExit(f"ovqk: {results_dir} holds no finished cell{_failed(failures)}. {_remedy(results_dir)}")
    path = out or results_dir / PAGE
    said = []
    try:
        for line in _write(cells, failures, path, with_figures):
            said.append(line)
            if tell:
                tell(line)
    except OSError as error:
        raise SystemExit(f"ovqk: {error.filename or path}: cannot be written ({error.strerror}).") from error
    return said


def _write(cells: Sequence[Cell], failures: Sequence[Failure], path: Path, with_figures: bool) -> Iterator[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    page = make_page(cells, failures, path.parent, FIGURES if with_figures else None)
    write_text(path, page.html)
    models = len({cell.record["model"] for cell in cells})
    yield f"wrote {path} ({page.size / 1e6:.1f} MB, {_count(len(cells), 'cell')} of {_count(models, 'model')})"
    if page.size > BYTES * max(1, len(cells) / CELLS):
        yield "the page is larger than planned even with the least detail of unclaimed heads"
    yield from (f"without results: {f.model} / {f.task} / {f.analysis}: {f.error}" for f in failures)
    if with_figures:
        n = write_figures(cells, path.parent / FIGURES)
        yield f"wrote {_count(n, 'figure')}, as SVG and as PNG, to {path.parent / FIGURES}"


def write_figures(cells: Sequence[Cell], folder: Path) -> int:
    """Write the figures of these cells, and remove an earlier report's that are not among them; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    before, made = _written(folder), set()
    try:
        for name, figure in chain(sweep_figures(cells), cell_figures(cells)):
            made |= {path.name for path in models.save(figure, folder / name)}
        for name in before - made:
            (folder / name).unlink(missing_ok=True)
        before = set()
    finally:
        write_text(folder / WRITTEN, "".join(f"{name}\n" for name in sorted(before | made)))
    return len(made) // 2


def _written(folder: Path) -> set[str]:
    """Names of the figures in a folder that an earlier report wrote."""
    try:
        names = (folder / WRITTEN).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    return {name for name in names if Path(name).name == name and Path(name).suffix in (".svg", ".png")}


# --- which figures -------------------------------------------------------------------------------------------


def sweep_figures(cells: Sequence[Cell]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what shows all models together: verdicts, effects, depth, and atlases of each task.

    Made one at a time, so that a caller who saves each holds no more than one.
    """
    verdicts = _joined(cells, "verdicts", labels(cells))
    of_weights = weights_labels(cells)
    named = dict(zip((id(cell) for cell in cells), of_weights, strict=True))
    if len(verdicts):
        yield "verdicts", models.verdict_counts(verdicts)
        yield "effects", models.effects(verdicts)
    yield "depth", models.depth_curves(_joined(cells, "heads", of_weights))
    for task in dict.fromkeys(cell.record["task"] for cell in cells):
        first: dict[str, Cell] = {}
        for cell in cells:
            if cell.record["task"] == task:
                first.setdefault(named[id(cell)], cell)
        shown = list(first.values())
        own_heads, own_verdicts = _joined(shown, "heads", list(first)), _joined(shown, "verdicts", list(first))
        for metric in _atlas_metrics(own_heads, own_verdicts):
            marked = own_verdicts if len(own_verdicts) else None
            yield file_name("atlas", task, metric), models.atlas(own_heads, metric, marked)


def cell_figures(cells: Sequence[Cell]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what shows one cell: its circuit, and a sheet of the first head of each claimed role."""
    for cell, label in zip(cells, labels(cells), strict=True):
        verdicts = cell.tables.get("verdicts")
        if verdicts is None:
            continue
        whole = [
            other for other in cells if other.weights == cell.weights and other.record["analysis"] == "composition"
        ]
        pairs = [c.tables["composition"] for c in (cell, *whole) if "composition" in c.tables]
        joined = pd.concat(pairs, ignore_index=True) if pairs else None
        yield file_name("circuit", *_title(cell, cells)), models.circuit(verdicts, joined)
        for layer, head in _leading(verdicts):
            tables = dict(cell.tables) | ({} if joined is None else {"composition": joined.drop_duplicates(PAIR)})
            sheet = portraits.sheet(
                tables, layer, head, f"{label} / {cell.record['task']}", cell.record.get("unavailable", {})
            )
            yield file_name("head", *_title(cell, cells), f"{layer}.{head}"), sheet


PAIR = ["mode", "sender_layer", "sender_head", "receiver_layer", "receiver_head"]


def _leading(verdicts: pd.DataFrame) -> list[tuple[int, int]]:
    """Of each role the head that stands out most of its layer; the first of them where none can be compared."""
    heads = verdicts[verdicts["kind"] == "head"]
    heads = (
        heads.sort_values("effect", ascending=False, kind="stable", na_position="last")
        .groupby("role", sort=False)
        .head(1)
    )
    return sorted({(int(layer), int(head)) for layer, head in heads[["layer", "head"]].to_numpy()})


def _atlas_metrics(heads: pd.DataFrame, verdicts: pd.DataFrame) -> list[str]:
    primary: list[str] = verdicts["primary"].dropna().to_list() if len(verdicts) else []
    names = dict.fromkeys([*STRUCTURE, *primary])
    return [name for name in names if name in heads and heads[name].notna().any()]


def _joined(cells: Sequence[Cell], name: str, models: Sequence[str]) -> pd.DataFrame:
    """One table of several cells, with what their models are called, task and id; empty where none has it."""
    parts = [
        cell.tables[name].assign(model=model, task=cell.record["task"], cell_id=cell.record["cell_id"])
        for cell, model in zip(cells, models, strict=True)
        if name in cell.tables
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _title(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """What a cell's files are called by: model and task, and the id where another cell has both."""
    alone = sum(other.place == cell.place and "verdicts" in other.tables for other in cells) == 1
    return [*cell.place] if alone else [*cell.place, cell.record["cell_id"]]


def file_name(*parts: str) -> str:
    """A file's name of these parts, of letters that any system takes."""
    return "_".join(
        "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in part) for part in parts
    )


# --- the command ---------------------------------------------------------------------------------------------


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _failed(failures: Sequence[Failure]) -> str:
    return f" ({_count(len(failures), 'cell')} without results)" if failures else ""


def _above(folder: Path) -> Path | None:
    """The results folder that a model's, a task's or a cell's folder lies in."""
    depth = next((k for k in range(3) if next(folder.glob("*/" * k + RECORD), None)), None)
    return None if depth is None else folder.resolve().parents[2 - depth]


def _remedy(results_dir: Path) -> str:
    return f"Run python run.py results_dir={results_dir} first."
