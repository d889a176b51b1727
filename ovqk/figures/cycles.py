"""A model on words that form a cycle, by frequency: its embeddings and neurons, and below them each head's OV and keys.

Bars and rows share one axis. If a model adds with a few frequencies, as in Nanda et al. 2023 (arXiv:2301.05217), bars
and rows stand in the same few places.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ovqk import wording
from ovqk.figures.drawing import BLUE, INK, MUTED, legible, number, styled
from ovqk.figures.shown import ShownFigure
from ovqk.figures.verdict_marks import mark

MOST_HEADS = 16
"""How many heads are drawn; if there are more, those whose keys or OV hold most at one frequency."""
BARS = {
    "embedding": "Embedding W_E",
    "unembedding": "Unembedding W_U",
    "neurons": "Neurons to logits W_out W_U",
}
"""Part that is drawn as bars, if the tables have it -> its title."""
NAMED = 8
"""How many bars have their frequency above them at most; they are the bars that hold 95 % of the power."""


@styled
def frequencies(powers: pd.DataFrame, cycles: pd.DataFrame, title: str = "") -> Figure:
    """Draw the power of `BARS` by frequency, and below it the power in each head's OV blocks and keys.

    Args:
        powers: `frequencies.parquet`.
        cycles: `cycles.parquet`; a part's verdict is drawn beside it, if the table has one.
        title: above all panels, such as the model and the task.
    """
    heads = _heads(cycles)
    bars = [part for part in BARS if (powers["part"] == part).any()]
    rows = [(*head, part) for head in heads for part in ("ov", "key") if len(_of(cycles, part, head))]
    height = 1.9 * len(bars) + 0.36 * len(rows) + 1.6
    figure = ShownFigure(figsize=(11, height), layout=ConstrainedLayoutEngine(h_pad=0.08))
    panels = figure.subplots(
        len(bars) + 1, 1, sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [1.9] * len(bars) + [max(0.4, 0.36 * len(rows))]},
    )[:, 0]  # fmt: skip
    for axes, part in zip(panels, bars, strict=False):
        _bars(axes, powers[powers["part"] == part], _of(cycles, part, None), part)
    _rows(panels[-1], powers, cycles, rows)
    panels[-1].set_xlabel("frequency")
    if title:
        figure.suptitle(legible(title, 90), x=0.01, ha="left", fontsize=13, color=MUTED)
    return figure


def _heads(cycles: pd.DataFrame) -> list[tuple[int, int]]:
    """Return the heads to draw, in order; if there are too many, those with the largest share at one frequency."""
    of_heads = cycles[cycles["layer"].notna()]
    most = of_heads.groupby(["layer", "head"], sort=True)["share"].max().fillna(0.0)
    kept = most.nlargest(MOST_HEADS, keep="all").index[:MOST_HEADS]
    return sorted((int(layer), int(head)) for layer, head in kept)


def _of(table: pd.DataFrame, part: str, head: tuple[int, int] | None) -> pd.DataFrame:
    rows = table[table["part"] == part]
    return rows if head is None else rows[(rows["layer"] == head[0]) & (rows["head"] == head[1])]


def _bars(axes: Axes, powers: pd.DataFrame, cycle: pd.DataFrame, part: str) -> None:
    shares = powers["power"].to_numpy(dtype=np.float64)
    at = powers["frequency"].to_numpy(dtype=np.int64)
    axes.bar(at, np.nan_to_num(shares), color=BLUE, width=0.7)
    axes.set_ylim(0, 1.25 * max(0.01, float(np.nan_to_num(shares).max(initial=0.0))))
    axes.set_title(BARS[part])
    axes.set_ylabel("share of power")
    needed = cycle["n_frequencies"].iloc[0] if len(cycle) else None
    count = 0 if pd.isna(needed) else min(NAMED, int(needed))
    for place in np.argsort(-np.nan_to_num(shares))[:count]:
        axes.annotate(str(at[place]), (at[place], shares[place]), (0, 3), textcoords="offset points", ha="center",
                      fontsize=11, color=INK)  # fmt: skip
    if len(cycle) and not pd.isna(needed):
        said = f"{int(needed)} of {len(at)} hold 95 %, Gini {number(float(cycle['gini'].iloc[0]))}"
        axes.set_title(said + _judged(cycle), loc="right", fontsize=11, fontweight="normal", color=MUTED)


def _judged(cycle: pd.DataFrame) -> str:
    """Return the verdict on a part, after a comma; empty if the table has none."""
    verdict = cycle["verdict"].iloc[0] if "verdict" in cycle and len(cycle) else None
    return f", {wording.VERDICTS[verdict]}" if verdict in wording.VERDICTS else ""


def _rows(axes: Axes, powers: pd.DataFrame, cycles: pd.DataFrame, rows: list[tuple[int, int, str]]) -> None:
    """Draw a row for each head's OV and keys, in which darker cells have more power; on the right the verdict."""
    n = int(powers["frequency"].max())
    grid = np.full((len(rows), n), math.nan)
    for place, (layer, head, part) in enumerate(rows):
        of_head = _of(powers, part, (layer, head))
        grid[place, of_head["frequency"].to_numpy(dtype=np.int64) - 1] = of_head["power"].to_numpy(dtype=np.float64)
    colours = LinearSegmentedColormap.from_list("power", ["#ffffff", BLUE, "#0a2540"]).with_extremes(bad="#f3f3f3")
    axes.set_title("Heads: OV from a frequency to itself, and keys")
    axes.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=1, extent=(0.5, n + 0.5, len(rows) - 0.5, -0.5))
    axes.set_yticks(
        range(len(rows)), [f"{layer}.{head} {wording.CYCLE_PARTS[part]}" for layer, head, part in rows], fontsize=11
    )
    axes.tick_params(length=0)
    for place, (layer, head, part) in enumerate(rows):
        cycle = _of(cycles, part, (layer, head))
        verdict = cycle["verdict"].iloc[0] if "verdict" in cycle else None
        frequency, share = cycle["frequency"].iloc[0], float(cycle["share"].iloc[0])
        said = "no power" if pd.isna(frequency) else f"{int(frequency)}: {number(share)}"
        axes.annotate(said, (1.035, place), xycoords=("axes fraction", "data"), va="center", fontsize=11, color=MUTED)
        if verdict in wording.VERDICTS:
            mark(axes, n + 0.5 + 0.018 * n, float(place), str(verdict), size=8)
    for edge in np.arange(1.5, len(rows) - 1, 2):
        axes.axhline(edge, color="white", lw=2)
