"""Figures from records' tables. Each function takes DataFrames and returns a Matplotlib figure, and computes nothing.

    from ovqk import load_results
    from ovqk.figures import comparisons
    tables = load_results("results")
    comparisons.effects(tables["verdicts"]).savefig("effects.svg")

Tables that hold several cells, as `load_results` returns them, need the columns `model` and `task`; tables for one cell
(`ovqk.load_table`) do not. Figures about one head are in `ovqk.portraits`. A missing value is shown as unavailable,
never as zero.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from ovqk import wording
from ovqk.figures import colours, drawing
from ovqk.figures.colours import VERDICT_COLOURS, Scale
from ovqk.figures.drawing import HALO, INK, MUTED, STYLE, legible, styled
from ovqk.figures.shown import ShownFigure
from ovqk.figures.verdict_marks import HOLLOW, mark, verdict_legend
from ovqk.metrics import METRICS
from ovqk.records.comparison import could_be_corroborated


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as SVG and as PNG; the same figure gives the same bytes."""
    written = [stem.with_name(f"{stem.name}{ending}") for ending in (".svg", ".png")]
    engine = figure.get_layout_engine()
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out and measured once, for both files
        box = figure.get_tightbbox().padded(0.15)
        figure.savefig(written[0], metadata={"Date": None}, bbox_inches=box)
        figure.savefig(written[1], dpi=160, metadata={"Software": None}, bbox_inches=box)
    figure.set_layout_engine(engine)
    return written


# --- models beside each other --------------------------------------------------------------------------------


@styled
def verdict_counts(verdicts: pd.DataFrame) -> Figure:
    """Draw models x tasks: the claimed heads that could be corroborated, by verdict, as a bar with shares and counts.

    Below the bar stands how many heads could not be corroborated alone, whatever their weights.
    """
    _one_cell_each(verdicts, ["model", "task"])
    heads = verdicts[verdicts["kind"] == "head"]
    models, tasks = _names(verdicts, "model"), _names(verdicts, "task")
    figure = ShownFigure(figsize=(2.6 + 2.9 * len(tasks), 1.2 + 0.62 * len(models)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        mine = heads[_column(heads, "task") == task]
        for y, model in enumerate(models):
            own = mine[_column(mine, "model") == model]
            could = could_be_corroborated(own)
            _count_bar(axes, y, own[could]["verdict"].value_counts(), int((~could).sum()))
        axes.set(title=legible(task), xlim=(0, 1.06), ylim=(len(models) - 0.4, -0.6), xticks=[])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_yticks(range(len(models)), [legible(model) for model in models], color=INK)
    verdict_legend(figure, heads[could_be_corroborated(heads)]["verdict"])
    return figure


def _count_bar(axes: Axes, y: int, counts: pd.Series, others: int) -> None:
    told: Any = {"color": MUTED, "style": "italic", "va": "center"}
    if not len(counts):
        none = f"none of {others} can be corroborated alone" if others else "no verdicts"
        axes.text(0, y, none, fontsize=12 if not others else 9, **told)
    elif others:
        axes.text(0, y + 0.4, f"{others} more cannot be corroborated alone", fontsize=8, **told)
    left = 0.0
    for verdict in filter(counts.__contains__, VERDICT_COLOURS):
        colour, share = VERDICT_COLOURS[verdict][0], counts[verdict] / counts.sum()
        hollow = verdict in HOLLOW
        look: Any = {"fc": "white", "ec": colour, "ls": ":"} if hollow else {"fc": colour, "ec": "white"}
        axes.barh(y, share, left=left, height=0.6, lw=1.2, **look)
        ink = MUTED if hollow else "white" if colours.is_dark(colour) else INK
        where: Any = {"ha": "center", "va": "center_baseline", "fontweight": "bold"}
        axes.text(left + share / 2, y, str(counts[verdict]), color=ink, **where)
        left += share


@styled
def effects(verdicts: pd.DataFrame) -> Figure:
    """Draw a row per claimed role: AUC within layers with its 95 % interval, chance at 0.5, the verdict's mark, q."""
    rows = verdicts[verdicts["kind"] == "role"].reset_index(drop=True)
    rows = rows.sort_values("task", kind="stable", ignore_index=True) if "task" in rows else rows
    several = {key: len(_names(rows, key)) > 1 for key in ("task", "model")}
    figure = ShownFigure(figsize=(10.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.5, color=MUTED, lw=1, ls="--")
    labels = []
    for y, row in enumerate(rows.to_dict("records")):
        place = [row[key] for key in ("task", "model") if several[key]]
        labels.append(legible(" · ".join([*place, wording.role(row["role"])]), 60))
        if _is_number(row["effect"]):
            if _is_number(row["ci_low"]) and _is_number(row["ci_high"]):
                colour = VERDICT_COLOURS[row["verdict"]][0]
                axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=colour, lw=2.4, solid_capstyle="round")
            mark(axes, row["effect"], float(y), row["verdict"], size=10)
        else:
            axes.text(0, y, " unavailable", va="center_baseline", color=MUTED, style="italic", fontsize=12, bbox=HALO)
        said = wording.verdict(row["verdict"], row.get("flags"))
        said += f", q {row['q']:.2g}" if _is_number(row["q"]) else ""
        where: Any = {"textcoords": "offset points", "va": "center_baseline", "fontsize": 12}
        axes.annotate(said, (1, y), (16, 0), xycoords=("axes fraction", "data"), **where)
    axes.set_yticks(range(len(rows)), labels, color=INK)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6), xlabel="AUC within layer (0.5 is chance)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


@styled
def atlas(heads: pd.DataFrame, metric: str, verdicts: pd.DataFrame | None = None) -> Figure:
    """Draw a grid of layers x heads per model, coloured by one metric on one scale, with claimed heads ringed.

    Args:
        heads: heads.parquet for one task, with one cell per model.
        metric: a column of `heads`.
        verdicts: verdicts.parquet for the same cells; its heads are marked.

    Raises:
        KeyError: there is no such metric.
        ValueError: a model has several cells.
    """
    _one_cell_each(heads, ["model"])
    scale = Scale.of(metric, heads.get(metric, []))
    every = list(_parts(heads, "model"))
    parts = [(model, part) for model, part in every if metric in part and part[metric].notna().any()]
    absent = [model for model, _ in every if all(model != other for other, _ in parts)]
    columns = min(4, max(1, len(parts)))
    n_rows = max(1, math.ceil(len(parts) / columns))
    tallest = max((_aspect(part) for _, part in parts), default=0.5)
    figure = ShownFigure(figsize=(4.0 * columns, (3.6 * tallest + 0.9) * n_rows + 1.3), layout="constrained")
    panels = list(figure.subplots(n_rows, columns, squeeze=False).flat)
    for axes in panels[len(parts) :]:
        axes.set_axis_off()
    shorts = wording.short_roles(verdicts["role"]) if verdicts is not None else {}
    for axes, (model, part) in zip(panels, parts, strict=False):
        grid = part.pivot(index="layer", columns="head", values=metric).to_numpy(float)
        drawing.atlas_grid(axes, grid, scale, _marks(verdicts, model, shorts), legible(model, 24))
    if parts:
        _colour_bar(figure, panels, scale, METRICS[metric].title)
    lines = wrapped_lines([f"{short}  {wording.role(role)}" for role, short in shorts.items()], 48 * columns)
    lines += [f"unavailable: {', '.join(absent)}"] if absent else []
    figure.supxlabel("\n".join(legible(line, 200) for line in lines), fontsize=12, color=MUTED)
    return figure


def wrapped_lines(parts: Iterable[str], most: int) -> list[str]:
    """Join parts into lines with at most this many letters."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 4 + len(part) <= most:
            lines[-1] += f"    {part}"
        else:
            lines.append(part)
    return lines


def _marks(verdicts: pd.DataFrame | None, model: str, shorts: Mapping[str, str]) -> dict[tuple[int, int], str]:
    if verdicts is None:
        return {}
    own = verdicts[(verdicts["kind"] == "head") & (_column(verdicts, "model") == model)]
    found: dict[tuple[int, int], str] = {}
    for row in own.to_dict("records"):
        place = (int(row["layer"]), int(row["head"]))
        found[place] = f"{found[place]} {shorts[row['role']]}" if place in found else shorts[row["role"]]
    return found


def _aspect(part: pd.DataFrame) -> float:
    return (part["layer"].max() + 1) / (part["head"].max() + 1)


def _colour_bar(figure: Figure, panels: Any, scale: Scale, title: str) -> None:
    colour_map = LinearSegmentedColormap.from_list("scale", colours.stops(scale.kind))
    source = matplotlib.cm.ScalarMappable(Normalize(0, 1), colour_map)
    bar = figure.colorbar(source, ax=panels, location="bottom", fraction=0.05, aspect=30, pad=0.02, shrink=0.6)
    values = [scale.low, scale.centre, scale.high]
    texts = [f"{value:g}".replace("-", "\N{MINUS SIGN}") for value in values]
    if scale.kind == "ratio":
        texts = [f"≤ 1/{scale.centre / scale.low:g} of chance", f"{scale.centre:g}: chance", f"≥ {scale.high:g}"]
    bar.set_ticks([scale.position(value) for value in values], labels=texts)
    bar.set_label(title)
    bar.outline.set_visible(False)  # type: ignore[operator]


# --- small helpers -------------------------------------------------------------------------------------------


def _one_cell_each(table: pd.DataFrame, keys: list[str]) -> None:
    """Refuse several cells with one model, such as cells with different seeds, because they would be drawn as one."""
    if not {"cell_id", *keys} <= set(table):
        return
    n_cells = table.groupby(keys, sort=False)["cell_id"].nunique()
    for place in n_cells.index[n_cells > 1]:
        name = " / ".join([place] if isinstance(place, str) else place)
        raise ValueError(f"{name}: of {n_cells[place]} cells; choose one, or tell them apart by `model`")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _column(table: pd.DataFrame, key: str) -> pd.Series:
    return table[key] if key in table else pd.Series("", index=table.index)


def _names(table: pd.DataFrame, key: str) -> list[str]:
    return list(dict.fromkeys(_column(table, key)))


def _parts(table: pd.DataFrame, key: str) -> Iterator[tuple[str, pd.DataFrame]]:
    for name in _names(table, key):
        yield name, table[_column(table, key) == name]
