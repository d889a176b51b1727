"""One page that shows a folder of results, and its figures as files.

    python -m ovqk.report RESULTS_DIR [--out FILE] [--figures | --no-figures]

Writes RESULTS_DIR/report.html, which needs no network and no other file, and RESULTS_DIR/figures/ with the same figures
as SVG and PNG. Reads records and tables, nothing else; the same records give the same bytes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ovqk import figures, portraits
from ovqk.page import BYTES, CELLS, Cell, Failure, make_page, read_cells
from ovqk.record import write_text

PAGE = "report.html"
FIGURES = "figures"
STRUCTURE = ("ov_copying", "qk_matching", "qk_symmetry", "qk_positional_share", "ov_copying_residual")
"""Metrics that an atlas of all models is drawn of, beside what each task's roles predict first."""


def write_report(results_dir: Path, out: Path | None = None, with_figures: bool = True) -> list[str]:
    """Write the page, and unless told otherwise its figures beside it; returns what to say about them.

    Raises:
        SystemExit: there is no such folder, no finished cell in it, or a file cannot be written.
    """
    if not results_dir.is_dir():
        raise SystemExit(f"ovqk: {results_dir}: no such results folder.")
    cells, failures = read_cells(results_dir)
    if not cells:
        raise SystemExit(f"ovqk: {results_dir} holds no finished cell{_failed(failures)}. {_remedy(results_dir)}")
    path = out or results_dir / PAGE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page = make_page(cells, failures, path.parent, FIGURES if with_figures else None)
        write_text(path, page.html)
        models = len({cell.record["model"] for cell in cells})
        said = [f"wrote {path} ({page.size / 1e6:.1f} MB, {_count(len(cells), 'cell')} of {_count(models, 'model')})"]
        if page.size > BYTES * max(1, len(cells) / CELLS):
            said.append("the page is larger than planned even with the least detail of unclaimed heads")
        if with_figures:
            n = len([figures.save(figure, stem) for figure, stem in _placed(cells, path.parent / FIGURES)])
            said.append(f"wrote {_count(n, 'figure')}, as SVG and as PNG, to {path.parent / FIGURES}")
    except OSError as error:
        raise SystemExit(f"ovqk: {error.filename or path}: cannot be written ({error.strerror}).") from error
    return [*said, *(f"without results: {f.model} / {f.task} / {f.analysis}: {f.error}" for f in failures)]


def _placed(cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Figure, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (*sweep_figures(cells), *cell_figures(cells)):
        yield figure, folder / name


# --- which figures -------------------------------------------------------------------------------------------


def sweep_figures(cells: Sequence[Cell]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what shows all models together: verdicts, effects, depth, and atlases of each task.

    Made one at a time, so that a caller who saves each holds no more than one.
    """
    verdicts, heads = _joined(cells, "verdicts"), _joined(cells, "heads")
    if len(verdicts):
        yield "verdicts", figures.verdict_counts(verdicts)
        yield "effects", figures.effects(verdicts)
    yield "depth", figures.depth_curves(heads)
    for task in dict.fromkeys(cell.record["task"] for cell in cells):
        shown = list(
            {
                (cell.record["model"], cell.weights): cell for cell in reversed(cells) if cell.record["task"] == task
            }.values()
        )[::-1]
        own_heads, own_verdicts = _joined(shown, "heads"), _joined(shown, "verdicts")
        for metric in _atlas_metrics(own_heads, own_verdicts):
            marked = own_verdicts if len(own_verdicts) else None
            yield file_name("atlas", task, metric), figures.atlas(own_heads, metric, marked)


def cell_figures(cells: Sequence[Cell]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what shows one cell: its circuit, and a sheet of the first head of each claimed role."""
    for cell in cells:
        verdicts = cell.tables.get("verdicts")
        if verdicts is None:
            continue
        model, task = cell.record["model"], cell.record["task"]
        whole = [
            other for other in cells if other.weights == cell.weights and other.record["analysis"] == "composition"
        ]
        pairs = [c.tables["composition"] for c in (cell, *whole) if "composition" in c.tables]
        joined = pd.concat(pairs, ignore_index=True) if pairs else None
        yield file_name("circuit", *_title(cell, cells)), figures.circuit(verdicts, joined)
        for layer, head in _leading(verdicts):
            tables = dict(cell.tables) | ({} if joined is None else {"composition": joined.drop_duplicates(PAIR)})
            sheet = portraits.sheet(tables, layer, head, f"{model} / {task}", cell.record.get("unavailable", {}))
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


def _joined(cells: Sequence[Cell], name: str) -> pd.DataFrame:
    """One table of several cells with their coordinates, as `load_results` has it; empty where none has it."""
    parts = [
        cell.tables[name].assign(model=cell.record["model"], task=cell.record["task"], cell_id=cell.record["cell_id"])
        for cell in cells
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


def _remedy(results_dir: Path) -> str:
    return f"Run python run.py results_dir={results_dir} first."


def main() -> None:
    """Write the report of a results folder."""
    parser = argparse.ArgumentParser(
        prog="python -m ovqk.report", description="One page that shows a folder of results."
    )
    parser.add_argument("results_dir", type=Path, help="the folder that run.py wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; RESULTS_DIR/report.html unless given")
    parser.add_argument(
        "--figures", action=argparse.BooleanOptionalAction, default=True,
        help="also write the figures, as SVG and PNG, to `figures` beside the page",
    )  # fmt: skip
    arguments = parser.parse_args()
    for line in write_report(arguments.results_dir, arguments.out, arguments.figures):
        print(line, file=sys.stderr if line.startswith("without results") else sys.stdout)


if __name__ == "__main__":
    main()
