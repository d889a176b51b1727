"""Panels on Matplotlib axes, from which figures are built. Each function draws its data and returns nothing.

pyplot's state is not touched. Texts from records are drawn as plain text without mathematics, and letters that the font
lacks are escaped.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Circle, Rectangle, Wedge
from matplotlib.ticker import MaxNLocator

from ovqk import wording
from ovqk.figures import colours
from ovqk.figures.colours import CATEGORIES, DIVERGING, VERDICT_COLOURS, Scale, colour_at
from ovqk.metrics import shares

INK, MUTED, LINE, FAINT, WARN = "#1d2025", "#5c626c", "#c6cad0", "#e8e9eb", "#a8470a"
BLUE = CATEGORIES[0]
BAND = "#c9ccd2"
HALO: Any = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
"""The box behind a text that lines or dots would cross."""
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 13, "text.color": INK, "axes.titlesize": 14, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelcolor": MUTED, "axes.edgecolor": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "legend.frameon": False, "legend.fontsize": 12, "grid.color": FAINT, "axes.axisbelow": True,
    "svg.fonttype": "none", "svg.hashsalt": "ovqk", "axes.unicode_minus": True,
}  # fmt: skip
STRETCHED_ABOVE = 130
"""An axis with more offsets than this is stretched at its start."""
OFFSET_MARKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
"""The marks on a stretched axis."""
DECADES = 3  # decades of the modulus between the plane's rim and its centre
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def styled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a function under the figures' style, and leave Matplotlib's settings as they were."""

    @wraps(function)
    def run(*args: Parameters.args, **keys: Parameters.kwargs) -> Result:
        with matplotlib.rc_context(STYLE):
            return function(*args, **keys)

    return run


# --- texts ---------------------------------------------------------------------------------------------------


@cache
def _drawable() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def legible(text: str, most: int = 40) -> str:
    """Return a record's text for a figure: cut, without mathematics, with letters that the font lacks escaped."""

    def letter(one: str) -> str:
        if one == "$":
            return r"\$"
        if unicodedata.category(one)[0] == "C" or ord(one) not in _drawable():
            return f"\\u{{{ord(one):x}}}"
        return one

    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(map(letter, cut))


def spaces_marked(token: str) -> str:
    """Return a token with the spaces at its ends as marks, as on the page: " Paris" and "Paris" are two tokens."""
    inner = token.strip(" ")
    before = len(token) - len(token.lstrip(" "))
    return "␣" * before + inner + "␣" * (len(token) - before - len(inner))


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as figures show it; `unavailable` if it is missing."""
    if value is None or not math.isfinite(value):
        return "unavailable"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def unavailable(axes: Axes, title: str, reason: str = "") -> None:
    """Draw a panel with the word unavailable."""
    empty(axes, title, "unavailable" + (f": {reason}" if reason else ""))


def empty(axes: Axes, title: str, text: str) -> None:
    """Draw a panel that holds a sentence."""
    axes.set_axis_off()
    axes.set_title(title)
    axes.text(0, 0.92, legible(text, 90), transform=axes.transAxes, style="italic", color=MUTED, va="top")


# --- spectra -------------------------------------------------------------------------------------------------


def eigenvalue_plane(
    axes: Axes, eigenvalues: Sequence[complex] | np.ndarray, ends: tuple[str, str], title: str
) -> None:
    """Draw eigenvalues by their angle and the logarithm of their modulus, as in Elhage et al. 2021.

    Args:
        axes: the panel.
        eigenvalues: one head's eigenvalues.
        ends: what the left and the right side mean.
        title: the panel's title.
    """
    values = np.asarray(eigenvalues, dtype=complex)
    size = np.abs(values)
    rim = math.ceil(2 * math.log10(size.max() if size.max() > 0 else 1) - 1e-9) / 2
    radius = np.clip(np.log10(np.clip(size, 1e-30, None)) - (rim - DECADES), 0, None) / DECADES
    direction = np.divide(values, size, out=np.zeros_like(values), where=size > 0)
    for side, (start, stop) in {0.9: (-90, 90), 0.1: (90, 270)}.items():
        axes.add_patch(Wedge((0, 0), 1, start, stop, color=colour_at(side, DIVERGING), alpha=0.08, lw=0))
    axes.add_patch(Circle((0, 0), 1, fill=False, ec=LINE, lw=1))
    spots = radius * direction
    powers = range(math.floor(rim), math.ceil(rim - DECADES + 0.2) - 1, -1)
    rings = {power: (power - rim + DECADES) / DECADES for power in powers}
    way = clear_way(spots, [ring for ring in rings.values() if ring > 0.12])
    for power, ring in rings.items():
        if 0.05 < ring < 0.999:
            axes.add_patch(Circle((0, 0), ring, fill=False, ec=FAINT, lw=1))
        if ring > 0.12:
            at: Any = {"color": MUTED, "fontsize": 10, "ha": "center", "va": "center", "zorder": 4}
            axes.text(ring * way.real, ring * way.imag, f"{10.0**power:g}", **at)
    axes.plot([-1, 1], [0, 0], color=FAINT, lw=1, zorder=1)
    axes.plot([0, 0], [-1, 1], color=FAINT, lw=1, zorder=1)
    shades = [colour_at(0.12 * (1 + x) if x < 0 else 0.88 + 0.12 * x, DIVERGING) for x in direction.real]
    axes.scatter(spots.real, spots.imag, s=46, c=shades, alpha=0.85, edgecolors="white", linewidths=0.6, zorder=3)
    axes.text(-1, -1.14, f"← {ends[0]}", color=MUTED, fontsize=12, ha="left", va="center")
    axes.text(1, -1.14, f"{ends[1]} →", color=MUTED, fontsize=12, ha="right", va="center")
    axes.text(1.04, 0, "Re", color=MUTED, fontsize=11, va="center")
    axes.text(0, 1.04, "Im", color=MUTED, fontsize=11, ha="center", va="bottom")
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.24, 1.18), aspect="equal", title=title)
    axes.set_axis_off()


def clear_way(spots: np.ndarray, rings: Sequence[float]) -> complex:
    """Return the direction in which the rings' labels lie farthest from the drawn eigenvalues."""
    ways = np.exp(1j * np.deg2rad([45, 60, 30, 75, 120, 135, 105, 150]))
    labels = np.multiply.outer(ways, rings)
    nearest = np.abs(labels[..., None] - spots).min(axis=-1).min(axis=-1) if len(rings) and len(spots) else ways.real
    return complex(ways[int(np.argmax(nearest))])


def ratio_gauge(axes: Axes, value: float, quantiles: Mapping[float, float] | None, title: str) -> None:
    """Draw a ratio on [-1, 1], and the range from 5 to 95 % under `spectrum` (quantile -> value) if it was drawn."""
    axes.plot([-1, 1], [0, 0], color=LINE, lw=1, zorder=1)
    if quantiles:
        axes.add_patch(Rectangle((quantiles[0.05], -0.3), quantiles[0.95] - quantiles[0.05], 0.6, color=BAND, lw=0))
        axes.plot([quantiles[0.5]] * 2, [-0.3, 0.3], color=MUTED, lw=1.5)
    axes.plot(value, 0, "o", ms=11, color=colour_at((value + 1) / 2, DIVERGING), mec=INK, mew=1.2, clip_on=False)
    axes.text(value, 0.55, number(value), ha="center", fontweight="bold", fontsize=12)
    axes.set(xlim=(-1.2, 1.2), ylim=(-0.6, 1.4), yticks=[])
    axes.set_xticks([-1, 0, 1], ["\N{MINUS SIGN}1", "0", "1"])
    axes.set_xlabel(title, fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def singular_curve(axes: Axes, own: Sequence[float], every: np.ndarray, title: str) -> None:
    """Draw a head's sigma_k / sigma_1 against k, with the middle 90 % and the median over all heads [head, k]."""
    sigma = np.asarray(own, dtype=float)
    k = np.arange(1, len(sigma) + 1)
    first = every[:, :1]
    scaled = every[first[:, 0] > 0] / first[first[:, 0] > 0]
    if len(scaled):
        low, middle, high = np.quantile(scaled, (0.05, 0.5, 0.95), axis=0)
        axes.fill_between(k, low, high, color=LINE, alpha=0.5, lw=0, label="middle 90 % of the model's heads")
        axes.plot(k, middle, color=MUTED, lw=1.2, ls="--", label="their median")
    axes.plot(k, sigma / sigma[0] if sigma[0] > 0 else sigma, "o-", color=BLUE, ms=4.5 if len(k) < 40 else 2.5, lw=2)
    energy = np.cumsum(sigma**2) / max(float((sigma**2).sum()), 1e-300)
    rank90 = int(np.searchsorted(energy, 0.9 - 1e-12)) + 1
    if sigma[0] > 0:
        axes.axvline(rank90, color=MUTED, lw=1, ls=":")
        late = rank90 > len(k) / 2
        place: dict[str, Any] = {"ha": "right" if late else "left", "va": "top", "fontsize": 11, "color": MUTED}
        axes.annotate(
            wording.AXES["energy"], (rank90, 1.0), (-5 if late else 5, 2), textcoords="offset points", **place
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(
        ylim=(0, 1.03),
        xlim=(1, max(2, len(k))),
        xlabel=wording.AXES["component"],
        ylabel=wording.AXES["singular"],
        title=title,
    )
    axes.grid(axis="y")


# --- positions -----------------------------------------------------------------------------------------------


def symmetry_scatter(
    axes: Axes, heads: pd.DataFrame, layer: int, head: int, claimed: Sequence[tuple[int, int]]
) -> None:
    """Draw QK symmetry against the measured positional share, with a dot for each head."""
    x, y = heads["qk_symmetry"], heads["qk_positional_share"]
    places = list(zip(heads["layer"], heads["head"], strict=True))
    shades = [BLUE if place in set(claimed) else MUTED for place in places]
    axes.axvline(0, color=MUTED, lw=1, ls=":")
    axes.scatter(x, y, s=30, c=shades, alpha=0.5, linewidths=0)
    own = heads[(heads["layer"] == layer) & (heads["head"] == head)].iloc[0]
    if math.isfinite(own["qk_symmetry"]) and math.isfinite(own["qk_positional_share"]):
        spot = (own["qk_symmetry"], own["qk_positional_share"])
        axes.plot(*spot, "o", ms=11, color=BLUE, mec="white", mew=1.5)
        right = spot[0] > 0.5
        place: dict[str, Any] = {"ha": "right" if right else "left", "va": "center", "fontweight": "bold"}
        place |= {"bbox": HALO, "zorder": 6}
        axes.annotate(f"{layer}.{head}", spot, (-10 if right else 10, 0), textcoords="offset points", **place)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.set(
        xlim=(-1, 1),
        ylim=(0, 1.02),
        xlabel=wording.AXES["symmetry"],
        ylabel=wording.AXES["share"],
        title=wording.PANELS["symmetry"],
    )
    axes.grid(axis="y")


def share_bars(axes: Axes, row: Mapping[Any, Any]) -> None:
    """Draw the shares of the QK score's variance over keys, as grouped bars."""
    known = {name for name, value in row.items() if isinstance(value, float) and math.isfinite(value)}
    parts = next((kind for kind in shares().values() if known & set(chain(*kind.values()))), None)
    title = wording.PANELS["shares"]
    if parts is None:
        unavailable(axes, title)
        return
    shades = {"position": (0.98, 0.84, 0.72), "content": (0.05, 0.17, 0.28), "both": (0.5,)}
    labels, y = [], 0.0
    for group, names in parts.items():
        axes.text(
            0,
            y,
            f"{wording.PARTS[group]}  {sum(row[name] for name in names):.0%}".replace("%", " %"),
            va="center",
            fontweight="bold",
            fontsize=12,
        )
        y += 0.95
        for place, (name, label) in enumerate(names.items()):
            fill = MUTED if group == "both" else colour_at(shades[group][place], DIVERGING)
            axes.barh(y, 1, height=0.62, color=FAINT, lw=0)
            axes.barh(y, row[name], height=0.62, color=fill, lw=0)
            axes.text(1.03, y, f"{row[name]:.0%}".replace("%", " %"), va="center", color=MUTED, fontsize=12)
            labels.append((y, label))
            y += 0.9
        y += 0.35
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
    axes.set(xlim=(0, 1.2), ylim=(y - 0.4, -0.7), xticks=[], title=title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def offset_line(axes: Axes, offsets: Sequence[int], scores: Sequence[float]) -> None:
    """Draw the mean score's positional part by offset, with a mark at the previous token."""
    axes.plot(offsets, scores, "o-" if len(offsets) <= STRETCHED_ABOVE else "-", color=BLUE, ms=3.5, lw=1.8)
    if len(offsets) > STRETCHED_ABOVE:
        axes.set_xscale("symlog", linthresh=4)
        marks = [at for at in OFFSET_MARKS if at <= max(offsets)]
        axes.set_xticks(marks, [f"{at:,}" for at in marks])
        axes.minorticks_off()
    at = list(offsets)
    if 1 in at:
        own = at.index(1)
        falls = all(score <= scores[own] for score in scores[own : own + 6])
        spot = (1, float(scores[own]))
        axes.plot(*spot, "o", ms=9, mfc="none", mec=WARN, mew=2)
        place: dict[str, Any] = {"va": "bottom" if falls else "top", "color": WARN, "fontsize": 12}
        axes.annotate("previous token", spot, (10, 4 if falls else -6), textcoords="offset points", **place)
    axes.margins(y=0.16)
    axes.set(xlabel=wording.AXES["offset"], ylabel=wording.AXES["score"], title=wording.PANELS["offsets"])
    axes.grid(axis="y")


# --- nulls and compositions ----------------------------------------------------------------------------------


def null_strip(
    axes: Axes,
    tests: pd.DataFrame,
    quantiles: Mapping[int, Mapping[float, float]],
    unit: str,
    bounds: tuple[float, float],
) -> None:
    """Draw nulls as strips (range, 5 to 95 %, median) with the value on each, and p and q beside it.

    Args:
        axes: the panel.
        tests: rows from tests.parquet about one metric for one head or role, in one unit.
        quantiles: a row's index -> quantile -> value.
        unit: `value`, `rank` or `percentile` (if the value itself is not in the null's unit).
        bounds: the axis's limits.
    """
    low, high = bounds
    for y, (index, row) in enumerate(tests.iterrows()):
        band = quantiles.get(index, {}) if unit != "percentile" else {}  # type: ignore[call-overload]
        if band:
            inside = {q: min(high, max(low, value)) for q, value in band.items()}
            axes.plot([inside[0.0], inside[1.0]], [y, y], color=LINE, lw=1.6, zorder=1)
            axes.add_patch(
                Rectangle((inside[0.05], y - 0.22), inside[0.95] - inside[0.05], 0.44, color=BAND, lw=0, zorder=2)
            )
            axes.plot([inside[0.5]] * 2, [y - 0.22, y + 0.22], color=MUTED, lw=1.6, zorder=3)
        else:
            axes.plot([low, high], [y, y], color=LINE, lw=1.2, zorder=1)
        value = row["percentile"] if unit == "percentile" else row["value"]
        decides = bool(row["counts"] and row["testable"])
        colour = VERDICT_COLOURS["corroborated"][0] if row["q"] < 0.05 else INK
        if math.isfinite(value):
            axes.plot(
                min(high, max(low, value)),
                y,
                "o",
                ms=10,
                mec=colour,
                mew=1.8,
                mfc=colour if decides else "white",
                clip_on=False,
                zorder=4,
            )
        text = f"p {row['p']:.2g}" + (f"   q {row['q']:.2g}" if math.isfinite(row["q"]) else "")
        text += "" if row["testable"] else f"   {wording.CANNOT}"
        text += "" if row["counts"] or not row["testable"] else f"   {wording.REPORTED}"
        axes.annotate(
            text,
            (1, y),
            (14, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=11.5,
            color=INK if decides else MUTED,
        )
    axes.set_yticks(range(len(tests)), [wording.null(name) for name in tests["null"]])
    axes.set(xlim=bounds, ylim=(len(tests) - 0.5, -0.5))
    if unit == "percentile":
        axes.set_xticks([0, 0.5, 1], ["0 %", "percentile", "100 %"])
    axes.set_xlabel(wording.RANKS if unit == "rank" else "", fontsize=11)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", pad=9)  # a dot may lie on the edge
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def partner_bars(axes: Axes, found: pd.DataFrame, side: str, title: str) -> None:
    """Draw compositions with heads on one side (`sender`, `receiver`), by mode; the line marks random weights."""
    labels, y = [], 0.0
    for mode, name in wording.MODES.items():
        rows = found[found["mode"] == mode].sort_values("score", ascending=False, kind="stable")
        if not len(rows):
            continue
        axes.text(0, y, name, color=colours.MODES[mode][0], fontweight="bold", fontsize=12, va="center")
        y += 0.95
        for row in rows.to_dict("records"):
            axes.barh(y, row["score"], height=0.66, color=colours.MODES[mode][0], alpha=0.75, lw=0)
            place: dict[str, Any] = {"va": "center_baseline", "fontsize": 11, "bbox": HALO}
            axes.annotate(f"{row['score']:.3f}", (row["score"], y), (5, 0), textcoords="offset points", **place)
            labels.append((y, f"{int(row[f'{side}_layer'])}.{int(row[f'{side}_head'])}"))
            y += 0.9
        y += 0.3
    random = float((found["score"] - found["score_above_random"]).iloc[0])
    axes.axvline(random, color=MUTED, lw=1, ls="--")
    said: dict[str, Any] = {"color": MUTED, "fontsize": 11, "ha": "center", "va": "center", "bbox": HALO}
    axes.text(random, y - 0.15, f"random {random:.3f}", **said)
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
    axes.set(ylim=(y + 0.3, -0.7), xlim=(0, 1.22 * max(float(found["score"].max()), random)), xticks=[], title=title)
    axes.tick_params(length=0)
    axes.spines[["bottom", "left"]].set_visible(False)


def quantity_bars(axes: Axes, title: str, bars: Sequence[tuple[str, float, float]], decides: bool) -> None:
    """Draw a head's quantities on prompts, (label, value, standard error); blue if they decide about its role."""
    shown = [(label, value, error if error > 0 else 0.0) for label, value, error in bars if math.isfinite(value)]
    if not shown:
        unavailable(axes, title, "not measured")
        return
    ends = [end for _, value, error in shown for end in (value - error, value + error)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    for y, (_, value, error) in enumerate(shown):
        first = y == 0
        axes.barh(y, value, height=0.62, color=(BLUE if decides else MUTED) if first else BAND, lw=0)
        if error:
            axes.plot([value - error, value + error], [y, y], color=INK, lw=1.2)
        axes.annotate(
            number(value), (max(0.0, value + error), y), (5, 0), textcoords="offset points", va="center_baseline",
            fontsize=11, bbox=HALO,
        )  # fmt: skip
    axes.axvline(0, color=LINE, lw=1)
    axes.set_yticks(range(len(shown)), [legible(label, 30) for label, _, _ in shown])
    axes.set(ylim=(max(3, len(shown)) - 0.4, -0.6), xlim=(low - 0.02, low + 1.25 * (high - low or 1)), xticks=[])
    axes.set_title(legible(title, 48), fontsize=12)
    axes.tick_params(length=0)
    axes.spines[["bottom", "left"]].set_visible(False)


ATLAS_WIDTH = 240  # an atlas's width in its figure, in points


def _fitting(lines: Sequence[str], width: float) -> float:
    """Return the font size, at most 10, at which bold capitals fit into a square this wide, in points."""
    longest = max((len(line) for line in lines), default=1)
    return min(10.0, width / (0.78 * longest), width / (1.15 * max(1, len(lines))))


def atlas_grid(axes: Axes, values: np.ndarray, scale: Scale, marks: Mapping[tuple[int, int], str], title: str) -> None:
    """Draw heads [layer, head] as squares on a colour scale; marked ones are ringed and named, nan is crossed out."""
    n_layers, n_heads = values.shape
    stops = colours.stops(scale.kind)
    for (layer, head), value in np.ndenumerate(values):
        there = math.isfinite(value)
        fill = colour_at(scale.position(float(value)), stops) if there else colours.MISSING
        axes.add_patch(Rectangle((head - 0.47, layer - 0.47), 0.94, 0.94, color=fill, lw=0))
        ink = "white" if colours.is_dark(fill) else INK
        if not there:
            axes.plot([head - 0.3, head + 0.3], [layer + 0.3, layer - 0.3], color="#b9b9b9", lw=1)
        if (layer, head) in marks:
            axes.add_patch(Rectangle((head - 0.39, layer - 0.39), 0.78, 0.78, fill=False, ec=ink, lw=1.6))
            names = [legible(name, 8) for name in marks[layer, head].split()]
            size = _fitting(names, 0.64 * ATLAS_WIDTH / n_heads)
            if size >= 4:
                place: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "linespacing": 1.05}
                axes.text(head, layer, "\n".join(names), color=ink, fontsize=size, **place)
    axes.set(xlim=(-0.5, n_heads - 0.5), ylim=(n_layers - 0.5, -0.5), aspect="equal", xlabel="head", ylabel="layer")
    axes.set_title(title)
    steps = [max(1, math.ceil(n / 16)) for n in (n_heads, n_layers)]
    axes.set_xticks(range(0, n_heads, steps[0]))
    axes.set_yticks(range(0, n_layers, steps[1]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
