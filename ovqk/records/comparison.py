"""Models side by side, from their records: by role, and by relative depth.

Layers in different models are compared by their relative depth: 0 is the first layer, 1 the last.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ovqk.metrics import shown_in
from ovqk.records.on_prompts import verdict_counts
from ovqk.records.record import done_records
from ovqk.records.results import load_table
from ovqk.verdicts.statistics import ALPHA

RANKS, OF_D_HEAD = ("ov_effective_rank", "qk_effective_rank"), " / d_head"
SHOWN_LETTERS = 24  # the longest value that is shown to tell cells apart
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


def relative_depth(layers: pd.Series, n_layers: int) -> pd.Series:
    """Return layer / (n_layers - 1), in [0, 1]; 0 if the model has one layer."""
    return layers / max(1, n_layers - 1)


def roles(folders: Iterable[Path]) -> pd.DataFrame:
    """Return one row per cell and claimed role, ordered by task, analysis, role, then model.

    A cell without claims has one row, with an empty role and the verdict `no claims`.

    Columns:
        model, task, analysis: the cell's choice.
        cell: text that tells the cell from others with the same choice (`differences`).
        role, heads, depth: the role, how many heads it has, and their mean relative depth.
        primary, effect, p, verdict: the primary metric, its AUC within layers, p, and the role's verdict.
        of_its_heads: verdict -> number of heads.
        on_prompts: verdict on prompts -> number of heads; only if a cell ran its model.
    """
    rows: list[dict[str, Any]] = []
    done = done_records(folders)
    told_apart = differences([record for _, record in done])
    for (folder, record), difference in zip(done, told_apart, strict=True):
        verdicts, on_prompts = load_table(folder, "verdicts"), load_table(folder, "roles")
        place = {key: record[key] for key in ("model", "task", "analysis")} | {"cell": difference}
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
                | ({} if on_prompts is None else {"on_prompts": verdict_counts(on_prompts, own)})
            )
    first = {key: list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "analysis", "role", "model")}
    rows.sort(key=lambda row: [order.index(row[key]) for key, order in first.items()])
    if any("on_prompts" in row for row in rows):
        rows = [row | {"on_prompts": row.get("on_prompts", {})} for row in rows]
    return pd.DataFrame(rows)


def differences(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return text, such as `seed=1`, that tells each cell from others with its model, task and analysis.

    It is empty if there are no others. Everything that a cell's numbers depend on is compared. A long value is shown by
    eight digits from its hash. Some keys are not in the identity of a cell that has their default: if one cell has such
    a key and another has not, it is named for the one that has it.
    """
    places = [tuple(record[key] for key in ("model", "task", "analysis")) for record in records]
    choices = [_flat(record["provenance"].get("identity", {})) for record in records]
    together: dict[tuple[Any, ...], list[dict[str, str]]] = defaultdict(list)
    for place, choice in zip(places, choices, strict=True):
        together[place].append(choice)
    return [
        " ".join(
            f"{key.split('.')[-1]}={_brief(value)}"
            for key, value in choice.items()
            if any(other.get(key) != value for other in together[place])
        )
        for place, choice in zip(places, choices, strict=True)
    ]


def _flat(choice: dict[str, Any], at: str = "") -> dict[str, str]:
    """Return dotted keys and their values as JSON."""
    flat: dict[str, str] = {}
    for key, value in choice.items():
        flat |= _flat(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: json.dumps(value)}
    return flat


def _brief(value: str) -> str:
    plain = value.strip('"')
    return plain if len(plain) <= SHOWN_LETTERS else hashlib.sha256(plain.encode()).hexdigest()[:8]


def depths(folders: Iterable[Path]) -> pd.DataFrame:
    """Return each model's mean metrics over heads, by quarter of its depth.

    An effective rank is divided by d_head, its largest possible value, because models differ in d_head. A layer belongs
    to the quarter into which its relative depth falls. The same weights with the same processing are taken once, from
    the first cell that has the metric.

    Columns: metric, model, processing, weights (digest), then QUARTERS.
    """
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    for folder, record in done_records(folders):
        heads = load_table(folder, "heads")
        if heads is None:
            continue
        place = {"model": record["model"], "processing": record["processing"]["applied"]}
        place["weights"] = record["provenance"]["weights_digest"][:8]
        means = quarter_means(heads, record["summary"]["n_layers"])
        ranks = [name for name in RANKS if name in means]
        means[ranks] /= _d_head(folder)
        means = means.rename(columns={name: f"{name}{OF_D_HEAD}" for name in ranks})
        for metric in map(str, means.columns):
            row = {"metric": metric} | place | {name: means.at[name, metric] for name in QUARTERS}
            seen.setdefault((metric, *place.values()), row)
    order = {name: place for place, name in enumerate(shown_in("depth"))}
    rows = sorted(seen.values(), key=lambda row: order[row["metric"].removesuffix(OF_D_HEAD)])
    return pd.DataFrame(rows)


def _d_head(folder: Path) -> float:
    """Return the largest number of singular values that a head has in this cell; nan if it keeps no spectra."""
    spectra = load_table(folder, "spectra")
    if spectra is None:
        return math.nan
    return float(1 + spectra.loc[(spectra["space"] == "residual") & (spectra["kind"] == "singular"), "index"].max())


def quarter_means(heads: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Average each metric that is shown along the depth, over the heads in each quarter of the depth.

    Returns:
        One row for each of the QUARTERS (nan for a quarter without layers), one column for each metric with values.
    """
    there = [name for name in shown_in("depth") if name in heads and heads[name].notna().any()]
    depth = relative_depth(heads["layer"], n_layers)
    quarter = np.minimum((4 * depth).astype(int), 3)
    means = heads[there].groupby(quarter).mean().reindex(range(4))
    return means.set_axis(list(QUARTERS), axis="index")


def could_be_corroborated(verdicts: pd.DataFrame) -> pd.Series:
    """Say, for each row of verdicts.parquet, whether other weights could have corroborated its claim.

    They could not if no null decides about it, if none but `spectrum` does, or if a null that does not hold could not
    have held for it alone, whatever the value.
    """
    decided = ~verdicts["verdict"].isin(["untestable", "out_of_scope"])
    powerless = verdicts["min_q"].ge(ALPHA) if "min_q" in verdicts else pd.Series(False, verdicts.index)
    if "nulls" in verdicts:
        powerless |= verdicts["nulls"].eq("spectrum")
    return decided & ((verdicts["verdict"] == "corroborated") | ~powerless)
