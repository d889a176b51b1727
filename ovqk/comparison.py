"""Models side by side, from their records: by role, and by relative depth.

Layers of different models are compared by where they lie between the first (0) and the last (1).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ovqk.record import read_record
from ovqk.results import load_table

QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
DEPTH_METRICS = (
    "ov_copying",
    "ov_copying_block0",
    "qk_matching",
    "qk_matching_block0",
    "ov_symmetry",
    "qk_symmetry",
    "qk_positional_share",
    "ov_effective_rank",
    "qk_effective_rank",
)
"""Metrics that no task enters: a model has them once, whatever was asked of it."""


def relative_depth(layers: pd.Series, n_layers: int) -> pd.Series:
    """layer / (n_layers - 1), in [0, 1]; 0 in a model of one layer."""
    return layers / max(1, n_layers - 1)


def roles(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per cell and claimed role, models beside each other: task, analysis, role, then model.

    Columns: model, task, analysis, role, heads (how many), depth (their mean relative depth), primary (its metric),
    effect (AUC within layers), p, verdict, of_its_heads (verdict -> count). A cell without claims has one row, with an
    empty role and `no claims` for a verdict.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        record, verdicts = read_record(folder), load_table(folder, "verdicts")
        if record is None or record.get("status") != "done":
            continue
        place = {key: record[key] for key in ("model", "task", "analysis")}
        if verdicts is None:
            rows.append(place | {"role": "", "heads": 0, "verdict": "no claims", "of_its_heads": {}})
            continue
        for row in verdicts[verdicts["kind"] == "role"].to_dict("records"):
            own = verdicts[(verdicts["kind"] == "head") & (verdicts["role"] == row["role"])]
            depth = relative_depth(own["layer"].astype(float), record["summary"]["n_layers"])
            rows.append(
                place
                | {"role": row["role"], "heads": len(own), "depth": float(depth.mean())}
                | {key: row.get(key) for key in ("primary", "effect", "p", "verdict")}
                | {"of_its_heads": own["verdict"].value_counts().to_dict()}
            )
    first = {key: list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "analysis", "role", "model")}
    rows.sort(key=lambda row: [order.index(row[key]) for key, order in first.items()])
    return pd.DataFrame(rows)


def depths(folders: Iterable[Path]) -> pd.DataFrame:
    """Mean over heads of each model's metrics, by quarter of its depth: metric, model, processing, then QUARTERS.

    A layer belongs to the quarter its relative depth falls into (the last layer to the last). A model is taken once
    for each processing, from the first of its cells that has the metric.
    """
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    for folder in folders:
        record, heads = read_record(folder), load_table(folder, "heads")
        if record is None or heads is None:
            continue
        place = {"model": record["model"], "processing": record["processing"]["applied"]}
        means = quarter_means(heads, record["summary"]["n_layers"])
        for metric in map(str, means.columns):
            row = {"metric": metric} | place | {name: means.at[name, metric] for name in QUARTERS}
            seen.setdefault((metric, place["model"], place["processing"]), row)
    order = {name: place for place, name in enumerate(DEPTH_METRICS)}
    rows = sorted(seen.values(), key=lambda row: order[row["metric"]])
    return pd.DataFrame(rows)


def quarter_means(heads: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Mean over heads of DEPTH_METRICS by quarter of the depth: index QUARTERS, one column per metric there is."""
    there = [name for name in DEPTH_METRICS if name in heads and heads[name].notna().any()]
    depth = relative_depth(heads["layer"], n_layers)
    quarter = np.minimum((4 * depth).astype(int), 3)
    means = heads[there].groupby(quarter).mean().reindex(range(4))
    return means.set_axis(list(QUARTERS), axis="index")
