"""Figures about one head, from its cell's tables. Figures that compare models are in `ovqk.figures`.

    from ovqk.figures import comparisons, portraits
    from ovqk.records import results
    tables = {name: results.load_table(folder, name) for name in portraits.TABLES}
    portraits.sheet(tables, layer=3, head=4).savefig("head.png")

Every function takes the tables by name, the layer and the head. If the analysis did not make a table, or a metric has
no value, the panel says unavailable, and `reasons` (a record's `unavailable`) say why.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ovqk import wording
from ovqk.figures import drawing, word_panels
from ovqk.figures.drawing import INK, MUTED, legible, styled
from ovqk.figures.shown import ShownFigure
from ovqk.figures.verdict_marks import mark
from ovqk.metrics import HEAD_METRICS, METRICS, ratios
from ovqk.records.on_prompts import head_values, pictures

HeadTables = Mapping[str, pd.DataFrame | None]
TABLES = (
    "heads", "spectra", "directions", "offsets", "composition", "tests", "nulls", "verdicts", "activations", "roles",
    "relations",
)  # fmt: skip
SHOWN_PARTNERS = 6
PAIRS_HEIGHT = 3.4  # of a relation's pairs, in inches


@styled
def eigenvalues(tables: HeadTables, layer: int, head: int, circuit: str = "ov", space: str | None = None) -> Figure:
    """Draw a circuit's eigenvalues in the complex plane, by angle and logarithm of the modulus (Elhage et al. 2021).

    Below them is sum lambda / sum |lambda|. If the head's role predicts that ratio, the null `spectrum` (random heads
    with the same singular values) is shown beside it by its median and its range from 5 to 95 %.

    Args:
        tables: spectra and heads; tests and nulls for the null's range.
        layer, head: the head.
        circuit: `ov` or `qk`.
        space: `vocab` (the full circuit, between tokens) or `residual`; the first that is there, unless given.
    """
    figure = ShownFigure(figsize=(5, 6.2), layout="constrained")
    plane, gauge = figure.subplots(2, 1, height_ratios=(6, 1))
    _eigenvalues(plane, gauge, tables, layer, head, circuit, space, {})
    return figure


@styled
def singular_values(tables: HeadTables, layer: int, head: int, circuit: str = "ov") -> Figure:
    """Draw W_OV's or W_QK's sigma_k / sigma_1 against k, with the middle 90 % and the median over the model's heads."""
    figure = ShownFigure(figsize=(5.6, 4.4), layout="constrained")
    _singular_values(figure.subplots(), tables, layer, head, circuit)
    return figure


@styled
def position_or_content(tables: HeadTables, layer: int, head: int, reasons: Mapping[str, str] | None = None) -> Figure:
    """Draw QK symmetry beside the measured positional shares, and the mean score by offset."""
    figure = ShownFigure(figsize=(15, 4.6), layout="constrained")
    _positions(figure.subplots(1, 3), tables, layer, head, reasons or {})
    return figure


@styled
def partners(tables: HeadTables, layer: int, head: int) -> Figure:
    """Draw the head's strongest compositions: heads that it reads, and heads that read it (Elhage et al. 2021)."""
    figure = ShownFigure(figsize=(11, 6.2), layout="constrained")
    _partners(figure.subplots(1, 2), tables, layer, head)
    return figure


@styled
def null_strips(tables: HeadTables, layer: int | None, head: int | None, role: str | None = None) -> Figure:
    """Draw every test of a head, or of roles if layer and head are None, on its null: range, 5 to 95 %, median, value.

    A dot is filled if the test counts for the verdict, and blue if q < 0.05. The null `depth` compares standardised
    values, so there the head is drawn at its percentile.
    """
    groups = _strips(tables, layer, head, role)
    heights = [0.42 * len(rows) + 0.75 for _, _, rows in groups] or [1]
    figure = ShownFigure(
        figsize=(11, sum(heights) + 0.3 + 0.12 * len(heights)), layout=ConstrainedLayoutEngine(h_pad=0.1)
    )
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_strips(panels, tables, groups)
    return figure


@styled
def components(tables: HeadTables, layer: int, head: int, circuit: str = "ov") -> Figure:
    """Draw the tokens that a circuit's leading singular components read and write, at both ends of each."""
    figure = ShownFigure(figsize=(12, 3.4), layout="constrained")
    word_panels.component_tokens(figure.subplots(), _of(tables.get("directions"), layer, head), circuit)
    return figure


@styled
def relation_pairs(tables: HeadTables, layer: int, head: int) -> Figure:
    """Write which of the task's word pairs the head raises and which it lowers, if the task is about a relation."""
    figure = ShownFigure(figsize=(17, PAIRS_HEIGHT), layout="constrained")
    rows = _of(tables.get("relations"), layer, head)
    if len(rows):
        word_panels.relation_pairs(figure.subplots(), rows)
    else:
        drawing.unavailable(figure.subplots(), "OV: pairs of the task's words", "the task is about no relation")
    return figure


@styled
def on_prompts(tables: HeadTables, layer: int, head: int, record: Mapping[str, Any]) -> Figure:
    """Draw a head's behaviour on prompts: attention by token, write by source, effect under both replacements.

    There is a row for each role that the head was claimed or chosen for. Lines are standard errors over prompt
    clusters, if there are any; a quantity is blue if it decides about the role.

    Args:
        tables: activations and roles.
        layer, head: the head.
        record: the cell's record, whose task names the tokens.
    """
    rows = _prompt_rows(tables, layer, head, record)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = ShownFigure(figsize=(17, 0.4 + PROMPT_HEIGHT * max(1, len(rows))), layout=layout)
    _draw_prompts(figure, rows)
    return figure


@styled
def sheet(
    tables: HeadTables,
    layer: int,
    head: int,
    title: str = "",
    reasons: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw all panels about a head on one sheet: verdict, prompts, spectra, tokens, pairs, positions, partners, nulls.

    Args:
        tables: the cell's tables.
        layer, head: the head.
        title: the sheet's title, such as the model's name.
        reasons: metric -> why it has no value, as in a record's `unavailable`.
        record: the cell's record, if the head's behaviour on prompts is to be shown.
    """
    prompted = [] if record is None else _prompt_rows(tables, layer, head, record)
    strips = _strips(tables, layer, head, None)
    tall = sum(0.42 * len(rows) + 0.75 for _, _, rows in strips)
    verdicts = _claims(tables, layer, head)
    parts = {
        "head": 0.7 + 0.36 * max(1, len(verdicts)),
        **({"prompts": 0.2 + PROMPT_HEIGHT * len(prompted)} if prompted else {}),
        "spectra": 5.2,
        "tokens": 6.2 if len(_of(tables.get("directions"), layer, head)) else 1.8,
        **({"pairs": PAIRS_HEIGHT} if len(_of(tables.get("relations"), layer, head)) else {}),
        "positions": 4.6,
        "partners": 1.3 + 0.32 * max(len(found) for found in _partners_of(tables, layer, head)),
    }
    parts |= {"nulls": tall + 0.5} if strips else {}
    figure = ShownFigure(figsize=(17, sum(parts.values())), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.2))
    made = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=list(parts.values()))[:, 0]
    bands = dict(zip(parts, made, strict=True))
    _heading(bands["head"], f"Head {layer}.{head}" + (f"   {title}" if title else ""), verdicts)
    if prompted:
        _draw_prompts(bands["prompts"], prompted)
    spectra = bands["spectra"].subplots(2, 4, height_ratios=(6, 1))
    for place, circuit in enumerate(("ov", "qk")):
        _eigenvalues(spectra[0, 2 * place], spectra[1, 2 * place], tables, layer, head, circuit, None, reasons or {})
        spectra[1, 2 * place + 1].set_axis_off()
        _singular_values(spectra[0, 2 * place + 1], tables, layer, head, circuit)
    for axes, circuit in zip(bands["tokens"].subplots(2, 1), ("ov", "qk"), strict=True):
        word_panels.component_tokens(axes, _of(tables.get("directions"), layer, head), circuit)
    if "pairs" in bands:
        word_panels.relation_pairs(bands["pairs"].subplots(), _of(tables.get("relations"), layer, head))
    _positions(bands["positions"].subplots(1, 3), tables, layer, head, reasons or {})
    _partners(bands["partners"].subplots(1, 2), tables, layer, head)
    if strips:
        heights = [0.42 * len(rows) + 0.75 for _, _, rows in strips]
        panels = bands["nulls"].subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_strips(panels, tables, strips)
    return figure


# --- parts ---------------------------------------------------------------------------------------------------


def _of(table: pd.DataFrame | None, layer: int | None, head: int | None) -> pd.DataFrame:
    """Return the rows about a head, or about roles if layer and head are None; none if there is no table."""
    if table is None:
        return pd.DataFrame()
    if layer is None or head is None:
        return table[table["head"].isna()]
    return table[(table["layer"] == layer) & (table["head"] == head)]


def _claims(tables: HeadTables, layer: int, head: int) -> list[dict[str, Any]]:
    rows = _of(tables.get("verdicts"), layer, head)
    return rows.to_dict("records") if len(rows) else []  # type: ignore[return-value]


def _heading(band: SubFigure, title: str, verdicts: list[dict[str, Any]]) -> None:
    axes = band.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(-0.5 - max(1, len(verdicts)), 0.6))
    axes.text(0, 0, legible(title, 80), fontsize=22, fontweight="bold", va="center")
    for y, row in enumerate(verdicts, start=1):
        mark(axes, 0.006, -float(y), row["verdict"], size=10)
        said = f"{wording.role(row['role'])}: {wording.verdict(row['verdict'], row['flags'])}"
        axes.text(0.02, -y, legible(said, 100), va="center", fontsize=14)
    if not verdicts:
        axes.text(0, -1, "nothing is claimed about it here", va="center", color=MUTED, fontsize=14)


def _eigenvalues(
    plane: Axes,
    gauge: Axes,
    tables: HeadTables,
    layer: int,
    head: int,
    circuit: str,
    space: str | None,
    reasons: Mapping[str, str],
) -> None:
    rows = _of(tables.get("spectra"), layer, head)
    title = f"{circuit.upper()} {wording.PANELS['eigenvalues']}"
    if len(rows):
        rows = rows[(rows["circuit"] == circuit) & (rows["kind"] == "eigen") & (rows["offset"] == rows["offset"].min())]
    there = [name for name in ("vocab", "residual") if len(rows) and (rows["space"] == name).any()]
    chosen = space or next(iter(there), "vocab")
    metric = ratios()[circuit, chosen]
    if chosen not in there:
        drawing.unavailable(plane, title, reasons.get(metric, ""))
        gauge.set_axis_off()
        return
    own = rows[rows["space"] == chosen]
    values = (own["re"] + 1j * own["im"]).to_numpy()
    drawing.eigenvalue_plane(
        plane, values, wording.ENDS[circuit].get(chosen, wording.NO_ENDS), f"{title}\n{wording.SPACES[chosen]}"
    )
    value = _value(tables, layer, head, metric)
    if math.isfinite(value):
        drawing.ratio_gauge(gauge, value, spectrum_band(tables, layer, head, metric), METRICS[metric].title)
    else:
        gauge.set_axis_off()


def spectrum_band(tables: HeadTables, layer: int, head: int, metric: str) -> dict[float, float] | None:
    """Return quantile -> value for a head's metric under the null `spectrum`; None if it was not drawn."""
    rows = _of(tables.get("nulls"), layer, head)
    if not len(rows):
        return None
    rows = rows[(rows["null"] == "spectrum") & (rows["metric"] == metric)].drop_duplicates("quantile")
    return dict(zip(rows["quantile"], rows["value"], strict=True)) if len(rows) else None


def _value(tables: HeadTables, layer: int, head: int, metric: str) -> float:
    rows = _of(tables.get("heads"), layer, head)
    return float(rows.iloc[0][metric]) if len(rows) and metric in rows else math.nan


def _singular_values(axes: Axes, tables: HeadTables, layer: int, head: int, circuit: str) -> None:
    title, table = f"{circuit.upper()} {wording.PANELS['singular']}", tables.get("spectra")
    if table is not None:
        kind = (table["circuit"] == circuit) & (table["kind"] == "singular") & (table["space"] == "residual")
        table = table[kind & (table["offset"] == table["offset"].min())]
    if table is None or not len(table):
        drawing.unavailable(axes, title)
        return
    every = table.pivot(index=["layer", "head"], columns="index", values="re")
    drawing.singular_curve(axes, every.loc[(layer, head)].to_list(), every.to_numpy(float), title)


def _positions(panels: Any, tables: HeadTables, layer: int, head: int, reasons: Mapping[str, str]) -> None:
    heads, offsets = tables.get("heads"), _of(tables.get("offsets"), layer, head)
    wanted = ("qk_symmetry", "qk_positional_share")
    missing = [name for name in wanted if heads is None or name not in heads or heads[name].isna().all()]
    if missing or heads is None:
        drawing.unavailable(panels[0], wording.PANELS["symmetry"], reasons.get(missing[-1], ""))
        drawing.unavailable(panels[1], wording.PANELS["shares"], reasons.get("qk_positional_share", ""))
    else:
        verdicts = tables.get("verdicts")
        claimed = pd.DataFrame() if verdicts is None else verdicts[verdicts["kind"] == "head"]
        marked = (
            list(zip(claimed["layer"].astype(int), claimed["head"].astype(int), strict=True)) if len(claimed) else []
        )
        drawing.symmetry_scatter(panels[0], heads, layer, head, marked)
        drawing.share_bars(panels[1], _of(heads, layer, head).iloc[0].to_dict())
    if len(offsets):
        drawing.offset_line(panels[2], offsets["offset"].to_list(), offsets["mean_score"].to_list())
    else:
        drawing.unavailable(panels[2], wording.PANELS["offsets"], reasons.get("qk_prev_auc", ""))


def _partners_of(tables: HeadTables, layer: int, head: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the strongest compositions that the head reads, and those that read it."""
    table = tables.get("composition")
    if table is None:
        return pd.DataFrame(), pd.DataFrame()
    mine = [(table[f"{own}_layer"] == layer) & (table[f"{own}_head"] == head) for own in ("receiver", "sender")]
    reads, is_read = (table[own].nlargest(len(table), "score").groupby("mode").head(SHOWN_PARTNERS) for own in mine)
    return reads, is_read


def _partners(panels: Any, tables: HeadTables, layer: int, head: int) -> None:
    for axes, (side, title), found in zip(
        panels, wording.SIDES.items(), _partners_of(tables, layer, head), strict=True
    ):
        if len(found):
            drawing.partner_bars(axes, found, side, title)
        else:
            why = "no composition was computed" if tables.get("composition") is None else "none of the pairs kept"
            drawing.empty(axes, title, "no head comes before it" if (side, layer) == ("sender", 0) else why)


# --- prompts -------------------------------------------------------------------------------------------------

PROMPT_HEIGHT = 2.9  # height of a role's row, in inches
PromptRow = tuple[str, list[tuple[str, list[tuple[str, float, float]], bool]]]
"""A role with its verdict, and its pictures: title, bars (label, value, standard error), whether it decides."""


def _prompt_rows(tables: HeadTables, layer: int, head: int, record: Mapping[str, Any]) -> list[PromptRow]:
    """Return a row for each role that the head was claimed or chosen for, and measured."""
    activations, found = tables.get("activations"), list[PromptRow]()
    if activations is None:
        return found
    values = _of(head_values(activations), layer, head)
    for subject in _of(tables.get("roles"), layer, head).to_dict("records"):
        own = values[values["role"] == subject["role"]].to_dict("records")
        if not own:
            continue
        parts = [
            (
                picture["title"],
                [(label, _number(own[0], name), _number(own[0], f"{name}_se")) for name, label in picture["bars"]],
                picture["decides"],
            )
            for picture in pictures(dict(record), subject["role"])
        ]
        said = wording.ON_PROMPTS[subject["verdict"]]
        found.append((f"{wording.role(subject['role'])}, on prompts: {said}", parts))
    return found


def _number(row: Mapping[Any, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)


def _draw_prompts(band: Figure | SubFigure, rows: list[PromptRow]) -> None:
    if not rows:
        drawing.empty(band.subplots(), "On prompts", "the head was neither claimed nor chosen for a role on prompts")
        return
    lines = band.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for line, (said, parts) in zip(lines, rows, strict=True):
        line.suptitle(legible(said, 100), x=0.005, ha="left", fontsize=14, fontweight="bold")
        panels = line.subplots(1, max(3, len(parts)), squeeze=False)[0]
        for axes in panels[len(parts) :]:
            axes.set_axis_off()
        for axes, (title, bars, decides) in zip(panels, parts, strict=False):
            drawing.quantity_bars(axes, title, bars, decides)


# --- nulls ---------------------------------------------------------------------------------------------------

Strip = tuple[str, str, pd.DataFrame]
"""A metric, its null's unit, and rows from tests.parquet."""


def _strips(tables: HeadTables, layer: int | None, head: int | None, role: str | None) -> list[Strip]:
    """Group a head's or role's tests by metric and by the null's unit, one group for each axis."""
    tests = _of(tables.get("tests"), layer, head)
    if not len(tests):
        return []
    tests = tests if role is None else tests[tests["role"] == role]
    groups = tests.assign(unit=units(tests)).groupby(["role", "metric", "unit"], sort=False)
    return [(str(metric), str(kind), rows) for (_, metric, kind), rows in groups]


def units(tests: pd.DataFrame) -> np.ndarray:
    """Return each test's unit: `percentile`, `rank` (a role's mean rank within layers) or `value`."""
    ranks = tests["null"].isin(["layer", "layer_all"]) & tests["head"].isna()
    return np.where(tests["null"] == "depth", "percentile", np.where(ranks, "rank", "value"))


def _draw_strips(panels: Any, tables: HeadTables, groups: list[Strip]) -> None:
    if not groups:
        drawing.empty(panels[0], "Against the nulls", "nothing is claimed of it here")
    said: set[tuple[str, str]] = set()
    for axes, (metric, unit, rows) in zip(panels, groups, strict=False):
        quantiles = _quantiles(tables.get("nulls"), rows)
        first = rows.iloc[0]
        values = [*map(float, rows["value"]), *(float(q) for line in quantiles.values() for q in line.values())]
        drawing.null_strip(axes, rows, quantiles, unit, bounds(metric, unit, values))
        if (first["role"], metric) not in said:
            kind = "primary" if first["primary"] else "exploratory" if first["exploratory"] else "secondary"
            title = f"{wording.predicted(metric, first['prediction'])}  ({wording.role(first['role'])}, {kind})"
            axes.set_title(title, color=INK, fontsize=13)
        said.add((first["role"], metric))


def _quantiles(nulls: pd.DataFrame | None, rows: pd.DataFrame) -> dict[int, dict[float, float]]:
    """Return row in tests.parquet -> quantile -> its null's value."""
    found: dict[int, dict[float, float]] = {}
    for index, row in rows.iterrows():
        if nulls is not None:
            layer, head = (None, None) if pd.isna(row["head"]) else (int(row["layer"]), int(row["head"]))
            mine = _of(nulls, layer, head)
            mine = mine[
                (mine["role"] == row["role"]) & (mine["metric"] == row["metric"]) & (mine["null"] == row["null"])
            ]
            if len(mine):
                found[index] = dict(zip(mine["quantile"], mine["value"], strict=True))  # type: ignore[index]
    return found


def bounds(metric: str, unit: str, values: Iterable[float]) -> tuple[float, float]:
    """Return the ends of a strip's axis: the metric's range if it has one, or else the drawn values' range."""
    facts = HEAD_METRICS.get(metric)
    if unit != "value":
        return 0.0, 1.0
    if facts is not None and facts.low is not None and facts.high is not None:
        return facts.low, facts.high
    finite = [value for value in values if math.isfinite(value)]
    return min(0.0, *finite, 0.0), 1.05 * max(*finite, 1e-9, 1e-9)
