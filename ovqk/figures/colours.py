"""Colours, marks and scales that figures and the page share; safe for colour-blind readers.

Blue and orange are the two ends of a diverging scale, and grey is its centre. Everything that a colour says is repeated
by a shape, a dash or a label. Categories follow Okabe & Ito (2008); those that would be faint on white are darker.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ovqk.metrics import METRICS, Metric

# fmt: off
SEQUENTIAL = (
    "#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725",
)
"""Viridis: dark is little, light is much."""
DIVERGING = (
    "#8c3f04", "#c46a1c", "#e79d57", "#f6cfa3", "#f2f1ee", "#b9d3ea", "#74a9d4", "#3577b5", "#0b4682",
)
"""Orange below the centre, blue above it."""
DIVERGING_DARK = (
    "#ffbf80", "#e8944a", "#ad642b", "#64422b", "#33363b", "#2b4a6b", "#3670a8", "#5e9fda", "#a9d4fa",
)
"""The same on a dark ground, with a dark centre."""
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#b0578d", "#2e97d0", "#b87d00", "#5b5b5b", "#44338f")
CATEGORIES_DARK = ("#4aa8e8", "#ff8b47", "#2fc99b", "#e08fc0", "#9ad7ff", "#f2b84b", "#a8a8a8", "#a79bf0")
DASHES = ("", "6 3", "2 2", "8 3 2 3")
"""Dashes that tell lines apart if there are more lines than categories, in SVG's notation."""
BAND, CROSSED = ("#b8bcc3", "#5a6069"), ("#b9b9b9", "#5c6067")
"""The page's band of a null, and its stroke through a head without a value; each on a light and on a dark ground."""
MISSING, MISSING_DARK = "#e3e3e3", "#3f4247"
VERDICT_COLOURS = {
    "corroborated": ("#0b5394", "#6db3f2"),
    "partial": ("#4f93c9", "#4b83b5"),
    "consistent": ("#7d8fb3", "#8f9fc4"),
    "unsupported": ("#8a8a8a", "#a3a3a3"),
    "contradicted": ("#c2570c", "#ff9d57"),
    "untestable": ("#a5a5a5", "#7d7d7d"),
    "out_of_scope": ("#bcbcbc", "#6b6b6b"),
}
"""Verdict -> its colour on a light and on a dark ground; the verdicts that say most come first."""
MODES = {"q": ("#0072b2", "#4aa8e8"), "k": ("#d55e00", "#ff8b47"), "v": ("#009e73", "#2fc99b")}
"""Composition into queries, keys and values -> its colour on a light and on a dark ground."""
ON_PROMPTS = {
    "realised": "corroborated",
    "partial": "partial",
    "not_realised": "unsupported",
    "opposite": "contradicted",
    "sensitive": "partial",
    "untestable": "untestable",
    "out_of_scope": "out_of_scope",
    "not_chosen": "unsupported",
}
"""Verdict on prompts -> the verdict from weights that has the same mark and colour."""
FOUND = {
    "both": ("#0072b2", "#4aa8e8"),
    "measured": ("#d55e00", "#ff8b47"),
    "claimed": ("#0072b2", "#4aa8e8"),
    "neither": ("#5c626c", "#a5abb5"),
}
"""Whether a head is claimed and measured -> its colour on a light and on a dark ground."""
FOUND_MARKERS = {"both": "o", "measured": "D", "claimed": "o", "neither": "o"}
"""The same -> its shape; heads that are only claimed are hollow."""
# fmt: on

RATIO_DOUBLINGS = 4  # a ratio's colours end at 2^4 times its chance level, and at 1 / 2^4
NARROW = 0.4  # if the values fill less than this part of their range, a narrower range is drawn
NICE = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A map from a metric's values to colours.

    Attributes:
        kind: `sequential` from low to high, `diverging` about the centre, or `ratio`: diverging in doublings.
        low, centre, high: the values at the ends and in the middle. Values beyond the ends get the ends' colours.
    """

    kind: Literal["sequential", "diverging", "ratio"]
    low: float
    centre: float
    high: float

    @classmethod
    def of(cls, name: str, values: Iterable[float]) -> "Scale":
        """Choose a metric's scale for these values (nan and infinite ones are ignored).

        A bounded metric keeps its whole range, so that pages and figures can be compared, unless its values fill only a
        small part. The scale diverges about the chance level, or about 0 if the metric may have either sign.
        """
        metric = METRICS[name]
        finite = [value for value in values if math.isfinite(value)]
        centre = _centre(metric)
        if centre is None:
            top = max(finite, default=1.0)
            low = metric.low if metric.low is not None else min(0.0, *finite, 0.0)
            high = metric.high if metric.high is not None and top > NARROW * metric.high else nice_above(top)
            return cls("sequential", low, (low + high) / 2, high)
        if metric.high is None and centre > 0:
            doublings = [abs(math.log2(value / centre)) for value in finite if value > 0]
            reach = 2 ** min(RATIO_DOUBLINGS, max(1, math.ceil(max(doublings, default=1))))
            return cls("ratio", centre / reach, centre, centre * reach)
        most = max((abs(value - centre) for value in finite), default=1.0)
        whole = (metric.high - centre) if metric.high is not None else most
        reach = whole if most > NARROW * whole else nice_above(most)
        return cls("diverging", centre - reach, centre, centre + reach)

    def position(self, value: float) -> float:
        """Return a value's place on the scale, in [0, 1]; nan for nan."""
        if math.isnan(value):
            return math.nan
        if self.kind == "ratio":
            if value <= 0:
                return 0.0
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))


def _centre(metric: Metric) -> float | None:
    if metric.chance is not None:
        return metric.chance
    return 0.0 if metric.low is not None and metric.low == -(metric.high or 0) and metric.low < 0 else None


def nice_above(value: float) -> float:
    """Return the smallest round number >= a positive value; 1 for other values."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(nice * unit for nice in NICE if nice * unit >= value * (1 - 1e-9))


def stops(kind: str, dark: bool = False) -> tuple[str, ...]:
    """Return the colours for a kind of scale, evenly spaced from low to high."""
    if kind == "sequential":
        return SEQUENTIAL
    return DIVERGING_DARK if dark else DIVERGING


def colour_at(place: float, colours: Sequence[str]) -> str:
    """Return the colour at a place in [0, 1], linear between evenly spaced stops."""
    at = place * (len(colours) - 1)
    left = min(int(at), len(colours) - 2)
    pairs = zip(_rgb(colours[left]), _rgb(colours[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - left)):02x}" for a, b in pairs)


def is_dark(colour: str) -> bool:
    """Say whether white text is easier to read on a colour than black (relative luminance, WCAG 2)."""

    def linear(channel: int) -> float:
        share = channel / 255
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(channel) for channel in _rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
