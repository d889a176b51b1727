"""Weights against prompts, a panel for each role: every head's weight metric against its behaviour on prompts.

The functions draw `ovqk.records.on_prompts.Ranking` and compute nothing; claimed and measured heads are named.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from ovqk import wording
from ovqk.figures.colours import FOUND, FOUND_MARKERS
from ovqk.figures.drawing import LINE, MUTED, legible, styled
from ovqk.figures.shown import ShownFigure
from ovqk.records.on_prompts import Ranking

COLUMNS = 3
PANEL = (4.6, 4.4)  # inches
MARGIN = 0.35  # inches beside a panel that a name may use
LETTER = (0.105, 0.19)  # a letter's size in a name, in inches across and upwards
AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Sides on which a name may stand beside its dot, the best first."""
FARTHER = tuple((side, up) for up in (1, -1, 2, -2, 3, -3) for side in (1, -1))
"""Places farther off, at the end of a joining line: side, and distance upwards in text lines."""


@styled
def rankings(ranked: Sequence[Ranking], title: str = "") -> Figure:
    """Draw a panel for each role with a dot for each head: its weight metric across, its quantity on prompts upwards.

    Args:
        ranked: one cell's rankings, from `ovqk.records.on_prompts.rankings`.
        title: above all panels, such as the model and the task.
    """
    columns = min(COLUMNS, max(1, len(ranked)))
    n_rows = max(1, math.ceil(len(ranked) / columns))
    size = (max(6.0, PANEL[0] * columns), PANEL[1] * n_rows + 1.0)
    figure = ShownFigure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.14))
    panels = list(figure.subplots(n_rows, columns, squeeze=False).flat)
    for axes in panels[len(ranked) :]:
        axes.set_axis_off()
    for axes, ranking in zip(panels, ranked, strict=False):
        _panel(axes, ranking)
    there = {found for ranking in ranked for found in ranking.points["found"]}
    shown = [found for found in wording.FOUND if found in there]
    handles = [Line2D([], [], **_look(found)) for found in shown]
    figure.legend(
        handles, [wording.FOUND[found] for found in shown], loc="outside lower center", ncols=4 if columns > 2 else 2
    )
    if title:
        figure.suptitle(legible(title, 90), x=0.01, ha="left", fontsize=13, color=MUTED)
    return figure


def _look(found: str) -> dict[str, Any]:
    """Return a head's mark: its shape says the same as its colour."""
    colour, other = FOUND[found][0], found == "neither"
    face = "white" if found == "claimed" else colour
    size = 5 if other else 8.5
    return {
        "ls": "", "marker": FOUND_MARKERS[found], "ms": size, "mec": "none" if other else colour, "mfc": face,
        "mew": 1.8, "alpha": 0.5 if other else 1.0,
    }  # fmt: skip


def _panel(axes: Axes, ranking: Ranking) -> None:
    points = ranking.points.dropna(subset=["weights", "prompts"])
    axes.set_title(legible(wording.role(ranking.role)), fontsize=13, pad=38)
    said = axes.annotate(
        "\n".join(ranking.says), (0, 1), (0, 7), xycoords="axes fraction",
        textcoords="offset points", fontsize=10.5, color=MUTED, linespacing=1.25,
    )  # fmt: skip
    said.set_in_layout(False)  # it stands in the title's room
    axes.set_xlabel("\n".join(ranking.titles), fontsize=11)
    axes.set_ylabel(_broken(legible(ranking.quantity, 90)), fontsize=11)
    if not len(points):
        axes.text(0.5, 0.5, "unavailable", transform=axes.transAxes, ha="center", style="italic", color=MUTED)
        axes.set(xticks=[], yticks=[])
        return
    axes.axhline(0, color=LINE, lw=1, zorder=1)
    for place, found in enumerate(reversed(wording.FOUND), start=2):
        own = points[points["found"] == found]
        axes.plot(own["weights"], own["prompts"], zorder=place, **_look(found))
    left_right, low_high = limits(points)
    axes.set(xlim=left_right, ylim=low_high)
    axes.grid()
    room = (PANEL[0] - 1.2, PANEL[1] - 1.4)
    for row, (across, up, far) in names_beside(points, room, LETTER):
        line: Any = {"arrowstyle": "-", "color": MUTED, "lw": 0.7, "shrinkA": 0, "shrinkB": 4} if far else None
        axes.annotate(
            _name(row), (row["weights"], row["prompts"]), (72 * across, 72 * up), textcoords="offset points",
            ha="center", va="center", fontsize=10.5, fontweight="bold", zorder=8, arrowprops=line,
        )  # fmt: skip


def _name(row: Mapping[Any, Any]) -> str:
    return f"{int(row['layer'])}.{int(row['head'])}"


def _broken(title: str) -> str:
    """Return a title on two lines if it is long."""
    middle = title.find(" minus", len(title) // 3)
    return f"{title[:middle]}\n{title[middle + 1 :]}" if len(title) > 36 and middle > 0 else title


def limits(points: pd.DataFrame) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return both axes' ends: the values' range, widened by a tenth on either side."""
    found = []
    for name in ("weights", "prompts"):
        low, high = float(points[name].min()), float(points[name].max())
        room = 0.1 * ((high - low) or abs(high) or 1.0)
        found.append((low - room, high + room))
    return found[0], found[1]


def names_beside(
    points: pd.DataFrame, room: tuple[float, float], letter: tuple[float, float]
) -> Iterator[tuple[dict[Any, Any], tuple[float, float, bool]]]:
    """Yield each named head's row, the way from its dot to its name, in inches, and whether a line must join them.

    The name stands at the place around the dot where it covers the fewest names and dots.

    Args:
        points: all heads that are drawn.
        room: the panel's size inside its axes, in inches.
        letter: a letter's size.
    """
    named = points[points["found"] != "neither"]
    (left, right), (low, high) = limits(points)
    scale = (room[0] / (right - left), room[1] / (high - low))
    dots = points[["weights", "prompts"]].to_numpy(float) * scale
    sizes = np.where(points["found"] == "neither", 0.01, 0.05)
    taken: list[Box] = []
    for index, row in zip(named.index, named.to_dict("records"), strict=True):
        own = points.index.get_loc(index)
        half, tall = letter[0] * len(_name(row)) / 2, letter[1]
        ways = [(side * (half + 0.09), up * (tall / 2 + 0.08), False) for side, up in AROUND]
        ways += [(side * (half + 0.25), up * tall, True) for side, up in FARTHER]
        x, y = map(float, dots[own])
        boxes = [(x + a - half, x + a + half, y + b - tall / 2, y + b + tall / 2) for a, b, _ in ways]
        crowds = []
        for box, (across, up, far) in zip(boxes, ways, strict=True):
            covered = _covered(box, np.delete(dots, own, 0), np.delete(sizes, own))
            crossed = sum(box[0] < b and a < box[1] and box[2] < d and c < box[3] for a, b, c, d in taken)
            line = [(x + part * across, y + part * up) for part in np.linspace(0.1, 0.9, 9)] if far else []
            struck = sum(any(a < at < b and c < height < d for at, height in line) for a, b, c, d in taken)
            outside = box[0] < left * scale[0] or box[1] > right * scale[0] + MARGIN
            outside = outside or box[2] < low * scale[1] or box[3] > high * scale[1] + letter[1]
            crowds.append(covered + 9 * crossed + 5 * struck + 9 * outside)
        best = int(np.argmin(crowds))
        taken.append(boxes[best])
        yield row, ways[best]


Box = tuple[float, float, float, float]
"""A name's left, right, bottom and top, in inches."""


def _covered(box: Box, dots: np.ndarray, sizes: np.ndarray) -> int:
    """Return how many dots (x, y and size) a name would cover."""
    x, y = dots[:, 0], dots[:, 1]
    across = (box[0] - sizes < x) & (x < box[1] + sizes)
    return int((across & (box[2] - sizes < y) & (y < box[3] + sizes)).sum())
