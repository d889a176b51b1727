"""One cell's claimed heads as a graph, by role and layer; arrows show which later heads read what earlier heads write.

`layout` decides where everything stands, both for the figure and for the report's page.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from ovqk import wording
from ovqk.figures import colours, drawing
from ovqk.figures.colours import VERDICT_COLOURS
from ovqk.figures.drawing import HALO, MUTED, legible, styled
from ovqk.figures.shown import ShownFigure
from ovqk.figures.verdict_marks import HOLLOW, mark, verdict_legend

STEP = 1.5  # distance between two layers
INCHES = (0.95, 0.76)  # a unit's size, across and upwards
CLEARANCE = 0.26  # inches between an arrow and the middle of a head that it passes
MOST_EDGES = 80
"""How many arrows are drawn at most; the strongest are kept."""
WAYS: dict[str, tuple[Any, float]] = {"q": ("-", -0.12), "k": ((0, (5, 2.5)), 0.0), "v": ((0, (1.2, 1.6)), 0.12)}
"""Composition kind -> its arrow's dash and bend."""
Spot = tuple[float, float]
Place = tuple[int, int]
"""Layer and head."""


@dataclass(frozen=True)
class Node:
    """A claimed head: its place in the graph, its smallest role (under which it stands), and its other roles."""

    place: Place
    spot: Spot
    role: str
    verdict: str
    also: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """A composition above random between two claimed heads.

    Attributes:
        sender, receiver: the heads.
        mode: `q`, `k` or `v`.
        score, above, percentile: as in composition.parquet; `above` is the score above random.
        named: whether the claims name the pair.
        bend: how far the arrow's middle lies beside the straight line, as a share of its length.
    """

    sender: Place
    receiver: Place
    mode: str
    score: float
    above: float
    percentile: float
    named: bool
    bend: float


@dataclass(frozen=True)
class Layout:
    """Where roles, layers, heads and arrows stand; x runs from 0 to `width`, and a layer is `STEP` above the last.

    Attributes:
        roles: role -> the middle of its column, in the order of the roles' mean layers.
        letters: role -> a few letters, for roles that are named beside a head.
        layers: the layers that hold a claimed head.
        more: how many further compositions are above random and not among `edges`.
    """

    roles: dict[str, float]
    letters: dict[str, str]
    layers: tuple[int, ...]
    width: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    more: int

    def title(self, role: str) -> str:
        """Return a role's name, with its letters if they stand beside a head."""
        return wording.role(role) + (f" ({self.letters[role]})" if role in self.letters else "")

    def beside(self, node: Node) -> str:
        """Return the text beside a head with several roles; empty for other heads."""
        return "also " + ", ".join(self.letters[role] for role in node.also) if node.also else ""


def layout(verdicts: pd.DataFrame, composition: pd.DataFrame | None = None) -> Layout:
    """Place a cell's claimed heads, and the arrows between them.

    Args:
        verdicts: the cell's verdicts.parquet.
        composition: the cell's composition.parquet, with a column `named` if only some pairs are named by claims.
    """
    heads = verdicts[verdicts["kind"] == "head"].astype({"layer": int, "head": int})
    names = list(dict.fromkeys(verdicts["role"]))
    names.sort(key=lambda role: heads[heads["role"] == role]["layer"].mean())
    layers = sorted(heads["layer"].unique().tolist())
    size = heads["role"].value_counts()
    home = heads.assign(size=heads["role"].map(size)).sort_values("size", kind="stable")
    home = home.drop_duplicates(["layer", "head"]).sort_index()  # a head with two roles stands under the smaller
    spots, centres, width = _spots(home, names, layers)
    nodes = []
    for row in home.to_dict("records"):
        mine = heads[(heads["layer"] == row["layer"]) & (heads["head"] == row["head"]) & (heads["role"] != row["role"])]
        place = (row["layer"], row["head"])
        nodes.append(Node(place, spots[place], row["role"], row["verdict"], tuple(mine["role"])))
    beside = {role for node in nodes for role in node.also}
    letters = {role: short for role, short in wording.short_roles(names).items() if role in beside}
    edges = _edges(spots, composition)
    shown = tuple(_bent(edges[:MOST_EDGES], spots))
    roles = dict(zip(names, centres, strict=True))
    return Layout(roles, letters, tuple(layers), width, tuple(nodes), shown, len(edges) - len(shown))


@styled
def circuit(verdicts: pd.DataFrame, composition: pd.DataFrame | None = None) -> Figure:
    """Draw one cell's claimed heads by role and layer, with arrows between heads that compose above random.

    Args:
        verdicts: the cell's verdicts.parquet.
        composition: the cell's composition.parquet. A pair's arrow is wider if its score lies farther above random. If
            there is a column `named`, pairs that the claims do not name are pale.
    """
    made = layout(verdicts, composition)
    top = (len(made.layers) - 1) * STEP
    figure = ShownFigure(
        figsize=(max(6.5, 0.95 * made.width + 1.5), 2.2 + 1.14 * len(made.layers)), layout="constrained"
    )
    axes = figure.subplots()
    for place, layer in enumerate(made.layers):
        axes.plot([0, made.width], [place * STEP] * 2, color=drawing.FAINT, lw=1, zorder=0)
        axes.text(-0.25, place * STEP, f"layer {layer}", ha="right", va="center", color=MUTED, fontsize=12)
    together = verdicts[verdicts["kind"] == "role"].set_index("role")["verdict"]
    for role, x in made.roles.items():
        axes.text(x, top + 1.05, legible(made.title(role)), ha="center", va="bottom", fontweight="bold")
        said = wording.verdict(together.get(role, ""))
        axes.text(x, top + 0.97, said, ha="center", va="top", color=MUTED, fontsize=11)
    _draw_edges(axes, made)
    for node in made.nodes:
        _draw_node(axes, node)
        if node.also:
            above = node.place[0] == made.layers[-1]  # no arrow leaves the top layer, and none arrives below it
            where: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 10, "bbox": HALO}
            where |= {"va": "bottom" if above else "top", "color": MUTED, "zorder": 4}
            axes.annotate(legible(made.beside(node), 60), node.spot, (0, 21 if above else -20), **where)
    axes.set(xlim=(-0.4, made.width), ylim=(-0.8, top + 1.6))
    axes.set_axis_off()
    verdict_legend(figure, [node.verdict for node in made.nodes])
    return figure


# --- places --------------------------------------------------------------------------------------------------


def _spots(
    home: pd.DataFrame, roles: Sequence[str], layers: Sequence[int]
) -> tuple[dict[Place, Spot], list[float], float]:
    """Return each head's place, the middle of each role's column, and the columns' total width."""
    spots: dict[Place, Spot] = {}
    centres = []
    left = 0.0
    for role in roles:
        by_layer = home[home["role"] == role].groupby("layer")["head"].agg(list).to_dict()
        width = max([2.4, *(0.85 * len(heads) + 0.6 for heads in by_layer.values())])
        centres.append(left + width / 2)
        for layer in layers:
            heads = by_layer.get(layer, [])
            for place, head in enumerate(heads):
                x = centres[-1] + 0.85 * (place - (len(heads) - 1) / 2)
                spots[layer, head] = (x, layers.index(layer) * STEP)
        left += width
    return spots, centres, left


def _edges(spots: Mapping[Place, Spot], composition: pd.DataFrame | None) -> list[Edge]:
    """Return the compositions above random between the heads, the strongest first, without their bends."""
    if composition is None:
        return []
    ends = [f"{end}_{part}" for end in ("sender", "receiver") for part in ("layer", "head")]
    rows = composition[composition["score_above_random"] > 0].drop_duplicates(["mode", *ends])
    found = []
    for row in rows.sort_values("score_above_random", ascending=False, kind="stable").to_dict("records"):
        a, b, c, d = (int(row[end]) for end in ends)
        if (a, b) in spots and (c, d) in spots:
            numbers = (row["score"], row["score_above_random"], row["percentile"])
            found.append(Edge((a, b), (c, d), row["mode"], *numbers, bool(row.get("named", True)), 0.0))
    return found


def _bent(edges: Sequence[Edge], spots: Mapping[Place, Spot]) -> list[Edge]:
    """Return the edges, each bent so that it passes no other head, if any bend does."""
    taken: dict[tuple[Place, Place], list[float]] = defaultdict(list)
    made = []
    for edge in edges:
        others = [spot for place, spot in spots.items() if place not in (edge.sender, edge.receiver)]
        used = taken[edge.sender, edge.receiver]
        bend = clear_bend(spots[edge.sender], spots[edge.receiver], WAYS[edge.mode][1], others, used)
        used.append(bend)
        made.append(Edge(**vars(edge) | {"bend": bend}))
    return made


def middle(start: Spot, end: Spot, bend: float) -> Spot:
    """Return the control point, in inches, of an arrow between two spots, as Matplotlib's arc3 places it."""
    (x, y), (dx, dy) = (start[k] * INCHES[k] for k in (0, 1)), ((end[k] - start[k]) * INCHES[k] for k in (0, 1))
    return x + dx / 2 + bend * dy, y + dy / 2 - bend * dx


def clear_bend(start: Spot, end: Spot, bend: float, others: Sequence[Spot], taken: Sequence[float]) -> float:
    """Return the bend nearest to the wanted one at which an arrow passes no other head, or else the best bend.

    If arrows of other kinds join the same heads, their bends are not used again.
    """
    turns = (0, 0.12, -0.12, 0.24, -0.24, 0.36, -0.36)
    bends = [bend + turn for turn in turns if all(abs(bend + turn - other) > 0.06 for other in taken)]
    if not others:
        return bends[0]
    a, b = (complex(spot[0] * INCHES[0], spot[1] * INCHES[1]) for spot in (start, end))
    along = np.linspace(0.08, 0.92, 24)
    heads = np.array([complex(x * INCHES[0], y * INCHES[1]) for x, y in others])
    clear = []
    for one in bends:
        curve = (1 - along) ** 2 * a + 2 * along * (1 - along) * complex(*middle(start, end, one)) + along**2 * b
        clear.append(float(np.abs(np.subtract.outer(curve, heads)).min()))
    free = [one for one, gap in zip(bends, clear, strict=True) if gap >= CLEARANCE]
    return free[0] if free else bends[int(np.argmax(clear))]


# --- drawing -------------------------------------------------------------------------------------------------


def _draw_node(axes: Axes, node: Node) -> None:
    hollow = node.verdict in HOLLOW
    colour = VERDICT_COLOURS[node.verdict][0]
    x, y = node.spot
    label = f"{node.place[0]}.{node.place[1]}"
    axes.plot(x, y, "o", ms=31, mfc="white", mec=colour, mew=1.2 if hollow else 3, ls="", zorder=4)
    size = 11 if len(label) < 5 else 9
    axes.text(x, y, label, ha="center", va="center", fontsize=size, fontweight="bold", zorder=5)
    if not hollow:
        mark(axes, x, y, node.verdict, size=7, shift=(14.5, 14.5))


def _draw_edges(axes: Axes, made: Layout) -> None:
    spots = {node.place: node.spot for node in made.nodes}
    for edge in made.edges:
        share = edge.above / made.edges[0].above
        arrow = FancyArrowPatch(
            spots[edge.sender], spots[edge.receiver], arrowstyle="-|>", mutation_scale=12, shrinkA=17, shrinkB=17,
            lw=0.8 + 4 * share, ls=WAYS[edge.mode][0], alpha=0.8 if edge.named else 0.3, zorder=2 + share,
            color=colours.MODES[edge.mode][0], connectionstyle=f"arc3,rad={edge.bend}",
        )  # fmt: skip
        axes.add_patch(arrow)
    modes = [mode for mode in WAYS if any(edge.mode == mode for edge in made.edges)]
    if modes:
        handles = [Line2D([], [], color=colours.MODES[mode][0], ls=WAYS[mode][0], lw=2.4) for mode in modes]
        names = [wording.MODES[mode] for mode in modes]
        axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3)
