"""Figures from tables of records: each function takes DataFrames and returns a Matplotlib figure; none computes.

    from ovqk import figures, load_results
    tables = load_results("results")
    figures.effects(tables["verdicts"]).savefig("effects.svg")

Tables of several cells, as of `load_results`, are told apart by their columns `model` and `task`; those of one cell
(`ovqk.results.load_table`) need neither. Figures of one head are in `ovqk.portraits`. What has no value is said to be
unavailable, never drawn as zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from ovqk import colours, drawing
from ovqk.colours import CATEGORIES, VERDICT_COLOURS, Scale, spoken
from ovqk.comparison import DEPTH_METRICS, relative_depth
from ovqk.drawing import INK, LINE, MUTED, STYLE, legible, styled
from ovqk.metrics import METRICS

Tables = Mapping[str, pd.DataFrame]
COLUMNS = 3  # panels beside each other
HOLLOW = ("untestable", "out_of_scope")  # verdicts that say nothing are drawn as outlines
STEP = 1.5  # from layer to layer of a circuit
WAYS: dict[str, tuple[Any, float]] = {"q": ("-", -0.12), "k": ((0, (5, 2.5)), 0.0), "v": ((0, (1.2, 1.6)), 0.12)}
"""Of a composition's arrow: its dash and how much it bends."""


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as SVG and as PNG; the same figure gives the same bytes."""
    written = [stem.with_name(f"{stem.name}{ending}") for ending in (".svg", ".png")]
    engine = figure.get_layout_engine()
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for both files
        figure.savefig(written[0], metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
        figure.savefig(written[1], dpi=160, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.15)
    figure.set_layout_engine(engine)
    return written


# --- models beside each other --------------------------------------------------------------------------------


@styled
def verdict_counts(verdicts: pd.DataFrame) -> Figure:
    """Models x tasks: the claimed heads by verdict, a bar of parts as wide as their shares, each with its count."""
    heads = verdicts[verdicts["kind"] == "head"]
    models, tasks = _names(verdicts, "model"), _names(verdicts, "task")
    figure = Figure(figsize=(2.6 + 2.9 * len(tasks), 1.2 + 0.62 * len(models)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        mine = heads[_column(heads, "task") == task]
        for y, model in enumerate(models):
            _count_bar(axes, y, mine[_column(mine, "model") == model]["verdict"].value_counts())
        axes.set(title=legible(task), xlim=(0, 1.06), ylim=(len(models) - 0.4, -0.6), xticks=[])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_yticks(range(len(models)), [legible(model) for model in models], color=INK)
    _verdict_legend(figure, heads["verdict"])
    return figure


def _count_bar(axes: Axes, y: int, counts: pd.Series) -> None:
    if not len(counts):
        axes.text(0, y, "no verdicts", va="center", color=MUTED, style="italic", fontsize=12)
    left = 0.0
    for verdict in filter(counts.__contains__, VERDICT_COLOURS):
        colour, share = VERDICT_COLOURS[verdict][0], counts[verdict] / counts.sum()
        hollow = verdict in HOLLOW
        look: Any = {"fc": "white", "ec": colour, "ls": ":"} if hollow else {"fc": colour, "ec": "white"}
        axes.barh(y, share, left=left, height=0.6, lw=1.2, **look)
        ink = MUTED if hollow else "white" if colours.is_dark(colour) else INK
        axes.text(left + share / 2, y, str(counts[verdict]), ha="center", va="center", color=ink, fontweight="bold")
        left += share


@styled
def effects(verdicts: pd.DataFrame) -> Figure:
    """A row per claimed role: AUC within layers with its 95 % interval, chance at 0.5, the mark of the verdict, q."""
    rows = verdicts[verdicts["kind"] == "role"].reset_index(drop=True)
    rows = rows.sort_values("task", kind="stable", ignore_index=True) if "task" in rows else rows
    several = {key: len(_names(rows, key)) > 1 for key in ("task", "model")}
    figure = Figure(figsize=(10.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.5, color=MUTED, lw=1, ls="--")
    labels = []
    for y, row in enumerate(rows.to_dict("records")):
        place = [row[key] for key in ("task", "model") if several[key]]
        labels.append(legible(" · ".join([*place, spoken(row["role"])]), 60))
        if _is_number(row["effect"]):
            if _is_number(row["ci_low"]) and _is_number(row["ci_high"]):
                colour = VERDICT_COLOURS[row["verdict"]][0]
                axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=colour, lw=2.4, solid_capstyle="round")
            drawing.mark(axes, row["effect"], float(y), row["verdict"], size=10)
        else:
            axes.text(0, y, "unavailable", va="center", color=MUTED, style="italic", fontsize=12)
        said = spoken(row["verdict"]) + (f" ({row['flags']})" if row.get("flags") else "")
        said += f", q {row['q']:.2g}" if _is_number(row["q"]) else ""
        axes.annotate(
            said, (1, y), (16, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(rows)), labels, color=INK)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6), xlabel="AUC within layer (0.5 is chance)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


@styled
def depth_curves(heads: pd.DataFrame, metrics: Sequence[str] = DEPTH_METRICS) -> Figure:
    """Metrics against relative depth: a line per model through the means of its layers, a dot for every head."""
    there = [name for name in metrics if name in heads and heads[name].notna().any()]
    lines = [(model, _first_with(part, there)) for model, part in _parts(heads, "model")]
    n_rows = max(1, math.ceil(len(there) / COLUMNS))
    figure = Figure(figsize=(13, 3.5 * n_rows + 0.4), layout="constrained")
    panels = list(figure.subplots(n_rows, COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, name in zip(panels, there, strict=False):
        axes.set_axis_on()
        for place, (_, tables) in enumerate(lines):
            part = tables.get(name)
            if part is None:
                continue
            colour = CATEGORIES[place % len(CATEGORIES)]
            depth = relative_depth(part["layer"], int(part["layer"].max()) + 1)
            mean = part.groupby(depth)[name].mean()
            axes.scatter(depth, part[name], s=9, color=colour, alpha=0.25, lw=0)
            axes.plot(mean.index, mean, "o-", color=colour, lw=2.2, ms=5)
        facts = METRICS[name]
        signed = facts.low == -1
        bottom, top = facts.low if signed else min(0.0, float(heads[name].min())), facts.high
        axes.set(xlim=(-0.03, 1.03), xticks=[0, 0.5, 1], title=facts.title)
        axes.set_ylim(bottom, top if top is not None else 1.05 * float(heads[name].max()))
        axes.grid(axis="y")
        if signed:
            axes.axhline(0, color=LINE, lw=1)
        axes.set_xlabel("relative depth")
    handles = [Line2D([], [], color=CATEGORIES[k % len(CATEGORIES)], lw=2.4, marker="o") for k in range(len(lines))]
    figure.legend(handles, [legible(model) for model, _ in lines], loc="outside upper center", ncols=min(6, len(lines)))
    return figure


@styled
def atlas(heads: pd.DataFrame, metric: str, verdicts: pd.DataFrame | None = None) -> Figure:
    """A grid of layers x heads per model, coloured by one metric on one scale; claimed heads are ringed and lettered.

    Args:
        heads: of one task, one cell per model.
        metric: a column of it.
        verdicts: of the same cells; whose heads are marked.

    Raises:
        KeyError: there is no such metric.
    """
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
    shorts = colours.short_names(verdicts["role"]) if verdicts is not None else {}
    for axes, (model, part) in zip(panels, parts, strict=False):
        grid = part.pivot(index="layer", columns="head", values=metric).to_numpy(float)
        drawing.atlas_grid(axes, grid, scale, _marks(verdicts, model, shorts), legible(model, 24))
    if parts:
        _colour_bar(figure, panels, scale, METRICS[metric].title)
    lines = ["    ".join(f"{short}  {spoken(role)}" for role, short in shorts.items())] if shorts else []
    lines += [f"unavailable: {', '.join(absent)}"] if absent else []
    figure.supxlabel("\n".join(legible(line, 200) for line in lines), fontsize=12, color=MUTED)
    return figure


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
    """Claimed heads of one cell by role and layer, joined where a later one reads more of an earlier one than random.

    Args:
        verdicts: of one cell.
        composition: pairs of its heads; those above random between claimed heads are drawn, wider the further above.
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
        axes.text(x, top + 1.05, legible(spoken(role)), ha="center", va="bottom", fontweight="bold")
        axes.text(x, top + 0.97, spoken(together.get(role, "")), ha="center", va="top", color=MUTED, fontsize=11)
    _edges(axes, spots, composition)
    for row in home.to_dict("records"):
        _node(axes, *spots[row["layer"], row["head"]], f"{row['layer']}.{row['head']}", row["verdict"])
    axes.set(xlim=(-0.4, width), ylim=(-0.8, top + 1.6))
    axes.set_axis_off()
    _verdict_legend(figure, heads["verdict"])
    return figure


Spots = dict[tuple[int, int], tuple[float, float]]
"""(layer, head) -> where it is drawn."""


def _spots(home: pd.DataFrame, roles: Sequence[str], layers: Sequence[int]) -> tuple[Spots, list[float], float]:
    """Where each head is drawn, the middle of each role's column, and how wide all columns are."""
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
        drawing.mark(axes, x + 0.3, y + 0.36, verdict, size=7)


def _edges(axes: Axes, spots: Spots, composition: pd.DataFrame | None) -> None:
    """Arrows between heads that are drawn, where the composition is above random."""
    if composition is None:
        return
    ends = [f"{end}_{part}" for end in ("sender", "receiver") for part in ("layer", "head")]
    rows = composition[composition["score_above_random"] > 0].drop_duplicates(["mode", *ends])
    found = []
    for row in rows.sort_values("score_above_random", kind="stable").to_dict("records"):
        layers_and_heads = [int(row[end]) for end in ends]
        sender, receiver = (spots.get((layers_and_heads[k], layers_and_heads[k + 1])) for k in (0, 2))
        if sender and receiver:
            found.append((sender, receiver, row["mode"], row["score_above_random"]))
    for sender, receiver, mode, above in found:
        dash, bend = WAYS[mode]
        width = 0.8 + 4 * above / found[-1][-1]
        arrow = FancyArrowPatch(
            sender, receiver, arrowstyle="-|>", mutation_scale=12, shrinkA=17, shrinkB=17, lw=width, ls=dash,
            alpha=0.8, zorder=2, color=colours.MODES[mode][0], connectionstyle=f"arc3,rad={bend}",
        )  # fmt: skip
        axes.add_patch(arrow)
    if found:
        handles = [Line2D([], [], color=colours.MODES[mode][0], ls=WAYS[mode][0], lw=2.4) for mode in WAYS]
        names = [drawing.MODE_NAMES[mode] for mode in WAYS]
        axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3)


# --- small helpers -------------------------------------------------------------------------------------------


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
    """Metric -> the rows of the first of a model's cells that has it."""
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
        figure.legend(handles, [spoken(name) for name in names], loc="outside lower center", ncols=len(names))
