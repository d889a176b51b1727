"""The Python part of the page's pictures: one is drawn here whole; for the others, places and limits are chosen here.

If a picture does not depend on a reader's choice, Matplotlib draws it, with the functions that draw the saved figures.
If it answers to a pointer or to the chosen head, the page's script draws it, at the places and on the axes given here.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ovqk import wording
from ovqk.figures import circuits, depth, drawing, embedded, portraits
from ovqk.figures.choice import compositions, depth_tables
from ovqk.metrics import METRICS, SENDERS_READ, SHOWN_CANDIDATES, shown_in
from ovqk.records.cells import Cell, Json, weights_labels
from ovqk.report.thinning import Pool, short

TOKENS = 8
"""How many tokens the page shows at most at one end of a component."""


EFFECT_COLUMNS = [
    {"key": "task", "title": "task"},
    {"key": "role", "title": "role"},
    {"key": "model", "title": "model"},
    {"key": "heads", "title": "heads", "number": True},
    {"key": "primary", "title": "primary metric"},
    {"key": "effect", "title": "AUC within layer", "number": True},
    {"key": "q", "title": "q", "number": True},
    {"key": "verdict", "title": "verdict"},
]
"""The columns of the page's table of roles, in order; `number` columns stand on the right."""
Drawn = Sequence[tuple[depth.Panel, str]]
"""Panels along the depth, each with its SVG."""


def draw_depth(cells: Sequence[Cell]) -> Drawn:
    """Return a panel for each metric along the depth, drawn once for all models.

    The page hides the lines for models that are not chosen. If there are more than 12 models, single heads are left
    out.
    """
    heads, layers, sizes = depth_tables(cells)
    dots = heads["model"].nunique() <= depth.MOST_TOLD_APART
    found = []
    for panel in depth.panels(heads, None, sizes, layers):
        figure = depth.alone(panel, dots and not panel.of_layers)
        found.append((panel, embedded.element(figure, panel.title)))
    return found


def depth_data(cells: Sequence[Cell], drawn: Drawn, pool: Pool) -> Json:
    """Return the panels as SVG and as numbers, and each line's name and look."""
    lines = {label: cell.record["model"] for label, cell in zip(weights_labels(cells), cells, strict=True)}
    looks = [depth.look(place) for place in range(len(lines))]
    there = {panel.name for panel, _ in drawn}
    return {
        "most": depth.MOST_TOLD_APART,
        "lines": [
            {"label": label, "model": model, "colour": colour, "dash": dash}
            for (label, model), (colour, dash) in zip(lines.items(), looks, strict=True)
        ],
        "panels": [
            {
                "name": panel.name,
                "title": panel.title,
                "caption": "Raw weights; Saponati et al. 2025." if panel.of_layers else "",
                "svg": svg,
                "lines": {
                    line.place: [pool.add(_short(line.depth)), pool.add(_short(line.means))] for line in panel.lines
                },
            }
            for panel, svg in drawn
        ],
        "absent": [METRICS[name].title for name in shown_in("depth") if name not in there],
    }


def line_places(cells: Sequence[Cell]) -> list[int]:
    """Return each cell's line in `depth_data`."""
    labels = weights_labels(cells)
    order = list(dict.fromkeys(labels))
    return [order.index(label) for label in labels]


def graph(cell: Cell, cells: Sequence[Cell]) -> Json | None:
    """Return the places in a cell's circuit, in pixels; None if it claims nothing."""
    verdicts = cell.tables.get("verdicts")
    if verdicts is None or not len(verdicts):
        return None
    made = circuits.layout(verdicts, compositions(cell, cells))
    spots = {node.place: node.spot for node in made.nodes}
    edges = []
    for edge in made.edges:
        found: Json = {"sender": _name(edge.sender), "receiver": _name(edge.receiver), "mode": edge.mode}
        found |= {"score": short(edge.score), "above": short(edge.above), "percentile": short(edge.percentile)}
        x, y = circuits.middle(spots[edge.sender], spots[edge.receiver], edge.bend)
        edges.append(found | {"named": edge.named, "middle": [round(72 * x), round(72 * y)]})
    return {
        "roles": [[role, _across(x), made.title(role)] for role, x in made.roles.items()],
        "layers": [[layer, _upwards(place * circuits.STEP)] for place, layer in enumerate(made.layers)],
        "width": _across(made.width),
        "heads": [
            [_name(node.place), _across(node.spot[0]), _upwards(node.spot[1]), node.role, made.beside(node)]
            for node in made.nodes
        ],
        "edges": edges,
        "more": made.more,
    }


def _name(place: circuits.Place) -> str:
    return f"{place[0]}.{place[1]}"


def _across(x: float) -> int:
    return round(72 * circuits.INCHES[0] * x)


def _upwards(y: float) -> int:
    return round(72 * circuits.INCHES[1] * y)


def with_bounds(tests: pd.DataFrame) -> pd.DataFrame:
    """Return the tests with their strip's unit and its axis's ends, as in the figure about nulls.

    Args:
        tests: tests.parquet with each null's quantiles, from `thinning.with_quantiles`.
    """
    tests = tests.assign(unit=portraits.units(tests), low=0.0, high=1.0)
    groups = tests.groupby(["metric", "unit", "role", "layer", "head"], dropna=False, sort=False)
    for key, rows in groups:
        metric, unit = map(str, key[:2])  # type: ignore[index]
        drawn = (float(value) for line in rows.get("quantile_values", ()) for value in line if value is not None)
        values = [*map(float, rows["value"]), *drawn]
        tests.loc[rows.index, "low"], tests.loc[rows.index, "high"] = portraits.bounds(metric, unit, values)
    return tests


def spans(heads: pd.DataFrame) -> Json:
    """Return metric -> the ends of its line in a head's profile: its own range, or the range over the model's heads."""
    found: Json = {}
    for name in shown_in("profile"):
        values = heads[name].to_numpy(float) if name in heads else np.array([])
        if np.isfinite(values).any():
            low, high = METRICS[name].low, METRICS[name].high
            top = float(np.nanmax(values))
            ends = (float(np.nanmin(values)) if low is None else low, 1.03 * top if high is None else high)
            found[name] = [short(end) for end in ends]
    return found


def panel_words() -> Json:
    """Return the words in the panels about one head, which figures and page share."""
    return {
        "spaces": wording.SPACES,
        "ends": {
            circuit: {space: wording.ENDS[circuit].get(space, wording.NO_ENDS) for space in wording.SPACES}
            for circuit in wording.ENDS
        },
        "sides": wording.SIDES,
        "verbs": wording.VERBS,
        "cluster": wording.CLUSTER,
        "cluster_note": wording.CLUSTER_NOTE,
        "panels": wording.PANELS,
        "axes": wording.AXES,
        "units": {"value": "", "rank": wording.RANKS, "percentile": "percentile"},
        "cannot": wording.CANNOT,
        "reported": wording.REPORTED,
        "effect_columns": EFFECT_COLUMNS,
    }


def limits() -> dict[str, Any]:
    """Return numbers that figures and page share, such as how much of a list is shown."""
    return {
        "decades": drawing.DECADES,
        "partners": portraits.SHOWN_PARTNERS,
        "tokens": TOKENS,
        "stretched": drawing.STRETCHED_ABOVE,
        "offsets": drawing.OFFSET_MARKS,
        "senders": SENDERS_READ,
        "candidates": SHOWN_CANDIDATES,
    }


def _short(values: np.ndarray) -> list[float | int | None]:
    return [short(float(value)) if math.isfinite(value) else None for value in values]
