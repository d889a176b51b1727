"""Metrics along models' depth: for each model a line through its layers' means, and a dot for every head.

`depth_curves` draws all metrics in one figure; the report's page holds the same panels one by one (`panels`, `alone`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ovqk import wording
from ovqk.figures.colours import CATEGORIES, DASHES, Scale
from ovqk.figures.drawing import LINE, legible, styled
from ovqk.figures.shown import ShownFigure
from ovqk.metrics import METRICS, shown_in
from ovqk.records.comparison import relative_depth

COLUMNS = 3  # panels beside each other
MOST_TOLD_APART = 12
"""How many lines a reader can tell apart; with more, single heads are left out, and the page names no line."""
ALONE = (340, 230)  # a panel's size on the page, in points


@dataclass(frozen=True)
class Line:
    """One model in a panel.

    Attributes:
        place: its place among all models, which decides its colour and dash.
        depth, means: for each layer with a value, its relative depth and the mean over its heads.
        dots: each head's relative depth and value.
    """

    place: int
    depth: Float[np.ndarray, " layer"]
    means: Float[np.ndarray, " layer"]
    dots: Float[np.ndarray, "head 2"]


@dataclass(frozen=True)
class Panel:
    """One metric on several models.

    Attributes:
        name, title: the metric's name (`summed-METRIC` if it is about a layer's summed W_QK), and its title.
        limits: the axis's ends, from `Scale`.
        signed: whether a line marks zero.
        of_layers: whether layers have its values, and heads have none.
        lines: a line for each model that has the metric.
    """

    name: str
    title: str
    limits: tuple[float, float]
    signed: bool
    of_layers: bool
    lines: tuple[Line, ...]


def look(place: int) -> tuple[int, str]:
    """Return a line's place in `CATEGORIES` and its dash, which changes each time the colours run out."""
    return place % len(CATEGORIES), DASHES[place // len(CATEGORIES) % len(DASHES)]


@styled
def depth_curves(
    heads: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    d_heads: Mapping[str, int] | None = None,
    layers: pd.DataFrame | None = None,
) -> Figure:
    """Draw metrics against relative depth: for each model a line through its layers' means, and a dot for every head.

    If the models' heads have different dimensions, and these are known, effective ranks are drawn as shares of d_head.
    With more than 12 models, single heads are left out.

    Args:
        heads: heads.parquet for any models, with a column `model`.
        metrics: columns of `heads`; if None, those that the registry shows along the depth.
        d_heads: model -> its heads' dimension.
        layers: layers.parquet for the same models; their summed W_QK is drawn too (Saponati et al. 2025).
    """
    made = panels(heads, metrics, d_heads, layers)
    models = list(dict.fromkeys(heads["model"]))
    n_rows = max(1, math.ceil(len(made) / COLUMNS))
    figure = ShownFigure(figsize=(13, 3.4 * n_rows + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1))
    spots = list(figure.subplots(n_rows, COLUMNS, squeeze=False).flat)
    for axes in spots[len(made) :]:
        axes.set_axis_off()
    for k, (axes, panel) in enumerate(zip(spots, made, strict=False)):
        _draw(axes, panel, len(models) <= MOST_TOLD_APART and not panel.of_layers)
        axes.set_title(panel.title)
        if k + COLUMNS >= len(made):  # the lowest in its column
            axes.set_xlabel("relative depth")
    handles = [Line2D([], [], **_line(place), lw=2.4, marker="o") for place in range(len(models))]
    names = [legible(model) for model in models]
    figure.legend(handles, names, loc="outside upper center", ncols=min(6, max(1, len(models))))
    return figure


@styled
def alone(panel: Panel, dots: bool) -> Figure:
    """Draw one panel without title or names; lines have the id `line-PLACE`, heads `dots-PLACE`."""
    figure = ShownFigure(figsize=(ALONE[0] / 72, ALONE[1] / 72))
    axes = figure.add_axes((0.13, 0.175, 0.84, 0.79))
    _draw(axes, panel, dots)
    axes.tick_params(labelsize=11.5, length=0)
    axes.set_xlabel("relative depth", fontsize=12)
    return figure


def panels(
    heads: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    d_heads: Mapping[str, int] | None = None,
    layers: pd.DataFrame | None = None,
) -> list[Panel]:
    """Return a panel for each metric that a model has; for the arguments see `depth_curves`."""
    known, models = d_heads or {}, list(dict.fromkeys(heads["model"]))
    differ = len(set(known.values())) > 1 and set(models) <= known.keys()
    found = []
    for name in shown_in("depth") if metrics is None else metrics:
        shares = differ and METRICS[name].counts_dimensions
        lines = [
            _line_of(models.index(model), cell, name, float(known[model]) if shares else 1.0)
            for model, cell in _cells_with(heads, name)
        ]
        if lines:
            title = METRICS[name].title + (" / d_head" if shares else "")
            found.append(Panel(name, title, _limits(name, lines, shares), METRICS[name].low == -1, False, tuple(lines)))
    for name, title in wording.SUMMED.items():
        there = () if layers is None else _cells_with(layers, name)
        lines = [_line_of(models.index(model), cell, name, 1.0) for model, cell in there]
        if lines:
            found.append(Panel(f"summed-{name}", title, _limits("qk_symmetry", lines, False), True, True, tuple(lines)))
    return found


def _cells_with(table: pd.DataFrame, metric: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each model with the rows from its first cell that has the metric."""
    if metric not in table:
        return
    keys = ["model", "cell_id"] if "cell_id" in table else ["model"]
    done: set[str] = set()
    for key, rows in table[["layer", metric, *keys]].groupby(keys, sort=False):
        model = str(key[0])  # type: ignore[index]
        if model not in done and rows[metric].notna().any():
            done.add(model)
            yield model, rows


def _line_of(place: int, cell: pd.DataFrame, metric: str, unit: float) -> Line:
    layers, values = cell["layer"].to_numpy(), cell[metric].to_numpy(float) / unit
    depth = relative_depth(cell["layer"], int(layers.max()) + 1).to_numpy(float)
    there = ~np.isnan(values)
    places, which = np.unique(depth[there], return_inverse=True)
    means = np.bincount(which, values[there]) / np.bincount(which)
    return Line(place, places, means, np.stack([depth[there], values[there]], axis=1))


def _limits(metric: str, lines: Sequence[Line], shares: bool) -> tuple[float, float]:
    if shares:
        return 0.0, 1.0
    scale = Scale.of(metric, (float(value) for line in lines for value in line.dots[:, 1]))
    return (scale.low, scale.high) if scale.kind != "ratio" else (0.0, scale.high)


def _line(place: int) -> dict[str, Any]:
    colour, dash = look(place)
    parts = [float(part) / 2 for part in dash.split()]  # in line widths; the line is two points wide
    return {"color": CATEGORIES[colour], "ls": (0, parts) if parts else "-"}


def _draw(axes: Axes, panel: Panel, dots: bool) -> None:
    axes.grid(axis="y")
    if panel.signed:
        axes.axhline(0, color=LINE, lw=1, zorder=1)
    for line in panel.lines:
        colour = CATEGORIES[look(line.place)[0]]
        if dots:
            axes.scatter(
                line.dots[:, 0],
                line.dots[:, 1],
                s=13,
                color=colour,
                alpha=0.35,
                lw=0,
                clip_on=False,
                gid=f"dots-{line.place}",
            )
    for line in panel.lines:
        axes.plot(
            line.depth, line.means, marker="o", lw=2.2, ms=5, clip_on=False, gid=f"line-{line.place}",
            **_line(line.place),
        )  # fmt: skip
    axes.set(xlim=(-0.03, 1.03), ylim=panel.limits)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
