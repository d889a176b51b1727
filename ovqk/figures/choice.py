"""The figures in a report on a results folder: for all models together, and for each cell."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ovqk.figures import circuits, comparisons, cycles, depth, portraits, prompts
from ovqk.metrics import shown_in
from ovqk.records.cells import Cell, labels, weights_labels
from ovqk.records.on_prompts import rankings


def sweep_figures(cells: Sequence[Cell]) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for all models together: verdicts, effects, depth, and atlases for each task.

    Figures are made one at a time, so a caller that saves each of them holds only one.
    """
    verdicts = _joined(cells, "verdicts", labels(cells))
    of_weights = weights_labels(cells)
    named = dict(zip((id(cell) for cell in cells), of_weights, strict=True))
    if len(verdicts):
        yield "verdicts", comparisons.verdict_counts(verdicts)
        yield "effects", comparisons.effects(verdicts)
    heads, layers, sizes = depth_tables(cells)
    yield "depth", depth.depth_curves(heads, d_heads=sizes, layers=layers)
    for task in dict.fromkeys(cell.record["task"] for cell in cells):
        first: dict[str, Cell] = {}
        for cell in cells:
            if cell.record["task"] == task:
                first.setdefault(named[id(cell)], cell)
        shown = list(first.values())
        own_heads, own_verdicts = _joined(shown, "heads", list(first)), _joined(shown, "verdicts", list(first))
        for metric in _atlas_metrics(own_heads, own_verdicts):
            marked = own_verdicts if len(own_verdicts) else None
            yield file_name("atlas", task, metric), comparisons.atlas(own_heads, metric, marked)


def depth_tables(cells: Sequence[Cell]) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, int]]:
    """Return the tables for the curves along the depth: heads, layers if there are any, and model -> d_head."""
    names = weights_labels(cells)
    sizes = {label: cell.d_head for cell, label in zip(cells, names, strict=True) if cell.d_head}
    layers = _joined(cells, "layers", names)
    return _joined(cells, "heads", names), layers if len(layers) else None, sizes


def cell_figures(cells: Sequence[Cell]) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for each cell: prompts, frequencies, the circuit, and the leading head for each role.

    A role's leading head is the claimed head that stands out most; if no head is claimed, it is the measured head with
    the largest effect on prompts.
    """
    for cell, label in zip(cells, labels(cells), strict=True):
        if ranked := rankings(cell.record, cell.tables):
            title = f"{label} / {cell.record['task']}"
            yield file_name("prompts", *_title(cell, cells, "joint")), prompts.rankings(ranked, title)
        if (drawn := cycle_figure(cell, label)) is not None:
            yield file_name("frequencies", *_title(cell, cells, "frequencies")), drawn
        verdicts, places = cell.tables.get("verdicts"), _measured(cell.tables.get("roles"))
        joined = compositions(cell, cells)
        if verdicts is not None:
            yield file_name("circuit", *_title(cell, cells)), circuits.circuit(verdicts, joined)
            places = _leading(verdicts)
        for layer, head in places:
            tables = dict(cell.tables) | ({} if joined is None else {"composition": joined.drop_duplicates(PAIR)})
            sheet = portraits.sheet(
                tables, layer, head, f"{label} / {cell.record['task']}", cell.record.get("unavailable", {}), cell.record
            )
            table = "verdicts" if verdicts is not None else "roles"
            yield file_name("head", *_title(cell, cells, table), f"{layer}.{head}"), sheet


def compositions(cell: Cell, cells: Sequence[Cell]) -> pd.DataFrame | None:
    """Return a cell's compositions, and those from cells that computed all pairs on the same weights.

    The column `named` marks the cell's own rows, about pairs that its claims name.
    """
    own = [cell] if cell.record["analysis"] != "composition" else []
    whole = [other for other in cells if other.weights == cell.weights and other.record["analysis"] == "composition"]
    pairs = [c.tables["composition"].assign(named=c in own) for c in (*own, *whole) if "composition" in c.tables]
    return pd.concat(pairs, ignore_index=True) if pairs else None


def cycle_figure(cell: Cell, label: str) -> Figure | None:
    """Draw a cell's frequencies; None if its task has no cycle. `label` names the model."""
    if not {"frequencies", "cycles"} <= set(cell.tables):
        return None
    tables = cell.tables
    return cycles.frequencies(tables["frequencies"], tables["cycles"], f"{label} / {cell.record['task']}")


PAIR = ["mode", "sender_layer", "sender_head", "receiver_layer", "receiver_head"]


def _leading(verdicts: pd.DataFrame) -> list[tuple[int, int]]:
    """Return, for each role, the head that stands out most in its layer; the first head if none can be compared."""
    heads = verdicts[verdicts["kind"] == "head"]
    heads = (
        heads.sort_values("effect", ascending=False, kind="stable", na_position="last")
        .groupby("role", sort=False)
        .head(1)
    )
    return sorted({(int(layer), int(head)) for layer, head in heads[["layer", "head"]].to_numpy()})


def _measured(roles: pd.DataFrame | None) -> list[tuple[int, int]]:
    """Return, for each role, the measured head with the largest effect on prompts; the first if none has an effect."""
    if roles is None or not len(roles) or "effect" not in roles:
        return []
    heads = roles[roles["measured"].astype(bool)].sort_values(
        "effect", key=np.abs, ascending=False, kind="stable", na_position="last"
    )
    heads = heads.groupby("role", sort=False).head(1)
    return sorted({(int(layer), int(head)) for layer, head in heads[["layer", "head"]].to_numpy()})


def _atlas_metrics(heads: pd.DataFrame, verdicts: pd.DataFrame) -> list[str]:
    """Return the metrics that get an atlas: the ones marked in the registry, and the roles' primary metrics."""
    primary: list[str] = verdicts["primary"].dropna().to_list() if len(verdicts) else []
    names = dict.fromkeys([*shown_in("atlas"), *primary])
    return [name for name in names if name in heads and heads[name].notna().any()]


def _joined(cells: Sequence[Cell], name: str, models: Sequence[str]) -> pd.DataFrame:
    """Join one table over cells, with columns for model label, task and id; empty if no cell has it."""
    parts = [
        cell.tables[name].assign(model=model, task=cell.record["task"], cell_id=cell.record["cell_id"])
        for cell, model in zip(cells, models, strict=True)
        if name in cell.tables
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _title(cell: Cell, cells: Sequence[Cell], table: str = "verdicts") -> list[str]:
    """Return the parts for a cell's file names: model and task, and the id if another cell shares both."""
    alone = sum(other.place == cell.place and table in other.tables for other in cells) == 1
    return [*cell.place] if alone else [*cell.place, cell.record["cell_id"]]


def file_name(*parts: str) -> str:
    """Join parts into a file name with letters that any system allows."""
    return "_".join(
        "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in part) for part in parts
    )
