"""Figures from records' tables. Each function takes DataFrames and returns a Matplotlib figure, and computes nothing.

    from ovqk import load_results
    from ovqk.figures import comparisons
    tables = load_results("results")
    comparisons.effects(tables["verdicts"]).savefig("effects.svg")

Tables that hold several cells, as `load_results` returns them, need the columns `model` and `task`; tables for one cell
(`ovqk.load_table`) do not. Figures of one head are in `ovqk.portraits`. A missing value is shown as unavailable, never
as zero.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from ovqk import wording
from ovqk.figures import colours, drawing
from ovqk.figures.colours import CATEGORIES, VERDICT_COLOURS, Scale
from ovqk.figures.drawing import HALO, INK, LINE, MUTED, STYLE, legible, styled
from ovqk.metrics import METRICS, shown_in
from ovqk.records.comparison import could_be_corroborated, relative_depth

COLUMNS = 3  # panels beside each other
HOLLOW = ("untestable", "out_of_scope")  # verdicts without a finding are drawn as outlines
STEP = 1.5  # distance between two layers of a circuit
INCHES = (0.95, 0.76)  # size of a circuit's unit, across and upwards
CLEARANCE = 0.26  # inches between an arrow and the middle of a head that it passes
WAYS: dict[str, tuple[Any, float]] = {"q": ("-", -0.12), "k": ((0, (5, 2.5)), 0.0), "v": ((0, (1.2, 1.6)), 0.12)}
"""Kind of composition -> its arrow's dash and bend."""


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
    """Draw models x tasks: the claimed heads that could be corroborated, by verdict, as a bar of shares with counts.

    How many could not, whatever their weights, stands below the bar.
    """
    _one_cell_each(verdicts, ["model", "task"])
    heads = verdicts[verdicts["kind"] == "head"]
    models, tasks = _names(verdicts, "model"), _names(verdicts, "task")
    figure = Figure(figsize=(2.6 + 2.9 * len(tasks), 1.2 + 0.62 * len(models)), layout="constrained")
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
    _verdict_legend(figure, heads[could_be_corroborated(heads)]["verdict"])
    return figure


def _count_bar(axes: Axes, y: int, counts: pd.Series, others: int) -> None:
    told: Any = {"color": MUTED, "style": "italic", "va": "center"}
    if not len(counts):
        none = f"none of {others} can be corroborated alone" if others else "no verdicts"
        axes.text(0, y, none, fontsize=12 if not others else 9, **told)
    elif others:
        axes.text(0, y + 0.4, f"{others} more cannot be corroborated", fontsize=8, **told)
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
    figure = Figure(figsize=(10.5, 1.6 + 0.42 * len(rows)), layout="constrained")
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
            drawing.mark(axes, row["effect"], float(y), row["verdict"], size=10)
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
def depth_curves(
    heads: pd.DataFrame, metrics: Sequence[str] | None = None, d_heads: Mapping[str, int] | None = None
) -> Figure:
    """Draw metrics against relative depth: for each model a line through its layers' means, and a dot for every head.

    Effective ranks of models whose heads have different dimensions are drawn as shares of these, if they are known.

    Args:
        heads: heads.parquet of any models, with a column `model`.
        metrics: columns of `heads`; unless given, those that the registry shows along the depth.
        d_heads: model -> the dimension of its heads.
    """
    known = d_heads or {}
    differ = len(set(known.values())) > 1 and {model for model, _ in _parts(heads, "model")} <= known.keys()
    wanted = shown_in("depth") if metrics is None else metrics
    there = [name for name in wanted if name in heads and heads[name].notna().any()]
    lines = [(model, _first_with(part, there)) for model, part in _parts(heads, "model")]
    n_rows = max(1, math.ceil(len(there) / COLUMNS))
    figure = Figure(figsize=(13, 3.4 * n_rows + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1))
    panels = list(figure.subplots(n_rows, COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for k, (axes, name) in enumerate(zip(panels, there, strict=False)):
        axes.set_axis_on()
        facts = METRICS[name]
        shares, drawn = differ and facts.counts_dimensions, list[pd.Series]()
        for place, (model, tables) in enumerate(lines):
            part = tables.get(name)
            if part is None:
                continue
            colour = CATEGORIES[place % len(CATEGORIES)]
            depth = relative_depth(part["layer"], int(part["layer"].max()) + 1)
            values = part[name] / (known[model] if shares else 1)
            drawn.append(values)
            mean = values.groupby(depth).mean()
            axes.scatter(depth, values, s=9, color=colour, alpha=0.25, lw=0)
            axes.plot(mean.index, mean, "o-", color=colour, lw=2.2, ms=5)
        signed, every = facts.low == -1, pd.concat(drawn)
        bottom, top = facts.low if signed else min(0.0, float(every.min())), 1.0 if shares else facts.high
        axes.set(xlim=(-0.03, 1.03), xticks=[0, 0.5, 1], title=f"{facts.title}{' / d_head' if shares else ''}")
        axes.set_ylim(bottom, top if top is not None else 1.05 * float(every.max()))
        axes.grid(axis="y")
        if signed:
            axes.axhline(0, color=LINE, lw=1, zorder=1)
        if k + COLUMNS >= len(there):  # the lowest of its column
            axes.set_xlabel("relative depth")
    handles = [Line2D([], [], color=CATEGORIES[k % len(CATEGORIES)], lw=2.4, marker="o") for k in range(len(lines))]
    figure.legend(handles, [legible(model) for model, _ in lines], loc="outside upper center", ncols=min(6, len(lines)))
    return figure


@styled
def atlas(heads: pd.DataFrame, metric: str, verdicts: pd.DataFrame | None = None) -> Figure:
    """Draw a grid of layers x heads per model, coloured by one metric on one scale, with claimed heads ringed.

    Args:
        heads: heads.parquet for one task, with one cell per model.
        metric: a column of `heads`.
        verdicts: verdicts.parquet of the same cells, whose heads are marked.

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
    figure = Figure(figsize=(4.0 * columns, (3.6 * tallest + 0.9) * n_rows + 1.3), layout="constrained")
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
    """Join parts to lines with at most this many letters."""
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


# --- circuits ------------------------------------------------------------------------------------------------


@styled
def circuit(verdicts: pd.DataFrame, composition: pd.DataFrame | None = None) -> Figure:
    """Draw one cell's claimed heads by role and layer, with arrows between heads that compose above random.

    Args:
        verdicts: the cell's verdicts.parquet.
        composition: the cell's composition.parquet. The higher a pair's score above random, the wider its arrow.
    """
    heads = verdicts[verdicts["kind"] == "head"].astype({"layer": int, "head": int})
    roles = sorted(_names(verdicts, "role"), key=lambda role: heads[heads["role"] == role]["layer"].mean())
    layers = sorted(heads["layer"].unique().tolist())
    size = heads["role"].value_counts()
    home = heads.assign(size=heads["role"].map(size)).sort_values("size", kind="stable")
    home = home.drop_duplicates(["layer", "head"]).sort_index()  # a head of two roles stands under the smaller
    spots, centres, width = _spots(home, roles, layers)
    top = (len(layers) - 1) * STEP
    figure = Figure(figsize=(max(6.5, 0.95 * width + 1.5), 2.2 + 1.14 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for place, layer in enumerate(layers):
        axes.plot([0, width], [place * STEP] * 2, color=drawing.FAINT, lw=1, zorder=0)
        axes.text(-0.25, place * STEP, f"layer {layer}", ha="right", va="center", color=MUTED, fontsize=12)
    together = verdicts[verdicts["kind"] == "role"].set_index("role")["verdict"]
    for role, x in zip(roles, centres, strict=True):
        axes.text(x, top + 1.05, legible(wording.role(role)), ha="center", va="bottom", fontweight="bold")
        axes.text(
            x, top + 0.97, wording.verdict(together.get(role, "")), ha="center", va="top", color=MUTED, fontsize=11
        )
    _edges(axes, spots, composition)
    for row in home.to_dict("records"):
        x, y = spots[row["layer"], row["head"]]
        _node(axes, x, y, f"{row['layer']}.{row['head']}", row["verdict"])
        mine = heads[(heads["layer"] == row["layer"]) & (heads["head"] == row["head"]) & (heads["role"] != row["role"])]
        if len(mine):
            also = legible("also " + ", ".join(map(wording.role, mine["role"])), 60)
            above = row["layer"] == layers[-1]  # no arrow leaves there, and below there is none that arrives
            where: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 10, "bbox": HALO}
            where |= {"va": "bottom" if above else "top", "color": MUTED, "zorder": 4}
            axes.annotate(also, (x, y), (0, 21 if above else -20), **where)
    axes.set(xlim=(-0.4, width), ylim=(-0.8, top + 1.6))
    axes.set_axis_off()
    _verdict_legend(figure, heads["verdict"])
    return figure


Spot = tuple[float, float]
Spots = dict[tuple[int, int], Spot]
"""(layer, head) -> its place in the figure."""


def _spots(home: pd.DataFrame, roles: Sequence[str], layers: Sequence[int]) -> tuple[Spots, list[float], float]:
    """Return each head's place, the middle of each role's column, and the width of all columns."""
    spots: Spots = {}
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


def _node(axes: Axes, x: float, y: float, label: str, verdict: str) -> None:
    hollow = verdict in HOLLOW
    colour = VERDICT_COLOURS[verdict][0]
    axes.plot(x, y, "o", ms=31, mfc="white", mec=colour, mew=1.2 if hollow else 3, ls="", zorder=4)
    size = 11 if len(label) < 5 else 9
    axes.text(x, y, label, ha="center", va="center", fontsize=size, fontweight="bold", zorder=5)
    if not hollow:
        drawing.mark(axes, x, y, verdict, size=7, shift=(14.5, 14.5))


def _edges(axes: Axes, spots: Spots, composition: pd.DataFrame | None) -> None:
    """Draw arrows between the heads if their composition is above random."""
    if composition is None:
        return
    ends = [f"{end}_{part}" for end in ("sender", "receiver") for part in ("layer", "head")]
    rows = composition[composition["score_above_random"] > 0].drop_duplicates(["mode", *ends])
    found = []
    for row in rows.sort_values("score_above_random", ascending=False, kind="stable").to_dict("records"):
        layers_and_heads = [int(row[end]) for end in ends]
        sender, receiver = (spots.get((layers_and_heads[k], layers_and_heads[k + 1])) for k in (0, 2))
        if sender and receiver:
            found.append((sender, receiver, row["mode"], row["score_above_random"]))
    taken: dict[tuple[Spot, Spot], list[float]] = defaultdict(list)
    for sender, receiver, mode, above in found:
        dash, bend = WAYS[mode]
        others = [spot for spot in spots.values() if spot not in (sender, receiver)]
        bend = clear_bend(sender, receiver, bend, others, taken[sender, receiver])
        taken[sender, receiver].append(bend)
        width = 0.8 + 4 * above / found[0][-1]
        arrow = FancyArrowPatch(
            sender, receiver, arrowstyle="-|>", mutation_scale=12, shrinkA=17, shrinkB=17, lw=width, ls=dash,
            alpha=0.8, zorder=2 + above / found[0][-1], color=colours.MODES[mode][0],
            connectionstyle=f"arc3,rad={bend}",
        )  # fmt: skip
        axes.add_patch(arrow)
    if found:
        modes = [mode for mode in WAYS if any(mode == other for _, _, other, _ in found)]
        handles = [Line2D([], [], color=colours.MODES[mode][0], ls=WAYS[mode][0], lw=2.4) for mode in modes]
        names = [wording.MODES[mode] for mode in modes]
        axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3)


def clear_bend(start: Spot, end: Spot, bend: float, others: Sequence[Spot], taken: Sequence[float]) -> float:
    """Return the bend nearest to the wanted one with which an arrow passes no other head, or the best bend there is.

    Bends that arrows of other kinds between the same heads have are not used again.
    """
    turns = (0, 0.12, -0.12, 0.24, -0.24, 0.36, -0.36)
    bends = [bend + turn for turn in turns if all(abs(bend + turn - other) > 0.06 for other in taken)]
    if not others:
        return bends[0]
    (x, y), (dx, dy) = (start[k] * INCHES[k] for k in (0, 1)), ((end[k] - start[k]) * INCHES[k] for k in (0, 1))
    along = np.linspace(0.08, 0.92, 24)
    heads = np.array([complex(a * INCHES[0], b * INCHES[1]) for a, b in others])
    clear = []
    for one in bends:
        middle = complex(x + dx / 2 + one * dy, y + dy / 2 - one * dx)  # of Matplotlib's arc3
        curve = (1 - along) ** 2 * complex(x, y) + 2 * along * (1 - along) * middle + along**2 * complex(x + dx, y + dy)
        clear.append(float(np.abs(np.subtract.outer(curve, heads)).min()))
    free = [one for one, gap in zip(bends, clear, strict=True) if gap >= CLEARANCE]
    return free[0] if free else bends[int(np.argmax(clear))]


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


def _first_with(part: pd.DataFrame, metrics: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return metric -> the rows of the model's first cell that has it."""
    cells = [cell for _, cell in _parts(part, "cell_id")]
    found = {
        name: next((cell for cell in cells if name in cell and cell[name].notna().any()), None) for name in metrics
    }
    return {name: cell for name, cell in found.items() if cell is not None}


def _verdict_legend(figure: Figure, there: pd.Series) -> None:
    names = [name for name in VERDICT_COLOURS if name in set(there)]
    handles = [
        Line2D([], [], ls="", marker=drawing.MARKERS[name], ms=9, mew=1.8, color=VERDICT_COLOURS[name][0],
               fillstyle="left" if name == "partial" else "full", markerfacecoloralt="white",
               markerfacecolor="white" if name == "unsupported" else VERDICT_COLOURS[name][0])
        for name in names
    ]  # fmt: skip
    if handles:
        figure.legend(handles, [wording.verdict(name) for name in names], loc="outside lower center", ncols=len(names))
