"""The marks of verdicts in figures: their shapes say the same as their colours."""

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from ovqk import wording
from ovqk.figures.colours import VERDICT_COLOURS

HOLLOW = ("untestable", "out_of_scope")  # verdicts without a finding are drawn as outlines
MARKERS = dict.fromkeys(VERDICT_COLOURS, "o") | {
    "consistent": "D",
    "contradicted": "X",
    "untestable": "_",
    "out_of_scope": ".",
}


def mark(axes: Axes, x: float, y: float, verdict: str, size: int = 9, shift: tuple[float, float] = (0.0, 0.0)) -> None:
    """Draw a verdict's mark, shifted from its place by some points; its shape says the same as its colour."""
    moved = ScaledTranslation(shift[0] / 72, shift[1] / 72, axes.get_figure().dpi_scale_trans)  # type: ignore[union-attr]
    colour = VERDICT_COLOURS[verdict][0]
    filled = verdict in ("corroborated", "contradicted", "out_of_scope")
    axes.plot(
        x, y, MARKERS[verdict], ms=size, color=colour, mew=1.8, clip_on=False, zorder=5,
        fillstyle="left" if verdict == "partial" else "full",
        markerfacecolor=colour if filled or verdict == "partial" else "white", markerfacecoloralt="white",
        transform=axes.transData + moved,
    )  # fmt: skip


def verdict_legend(figure: Figure, there: Iterable[str]) -> None:
    """Name the marks of the verdicts that a figure shows, below it."""
    shown = set(there)
    names = [name for name in VERDICT_COLOURS if name in shown]
    handles = [
        Line2D([], [], ls="", marker=MARKERS[name], ms=9, mew=1.8, color=VERDICT_COLOURS[name][0],
               fillstyle="left" if name == "partial" else "full", markerfacecoloralt="white",
               markerfacecolor="white" if name in ("consistent", "unsupported") else VERDICT_COLOURS[name][0])
        for name in names
    ]  # fmt: skip
    if handles:
        figure.legend(handles, [wording.verdict(name) for name in names], loc="outside lower center", ncols=len(names))
