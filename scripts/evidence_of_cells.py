"""Which weight metric finds which role, from finished cells: what weights say against what heads do on prompts.

    python scripts/evidence_of_cells.py RESULTS_DIR [RESULTS_DIR ...] [--kv-heads MODEL=N ...]

Reads the cells of `analysis=full` or `analysis=activations` and runs no model. For each role that has heads in a model,
one row for each metric that is or was primary for it:

    AUC        the probability that a head of the role exceeds another head of its layer in the metric, in the
               direction that the role predicts; 0.5 by chance; p by permutation within layers, KV groups first
    top 3      how many of the three heads that the metric puts first, of the whole model, have the role
    rho        Spearman's correlation, over all heads, of the metric with the attention that defines the role, on the
               half of the prompts that did not choose the role's heads
    ceiling    the same of that attention on one half of the prompts with that on the other

A head has a role if it is measured: chosen on one half of the prompts, and every deciding quantity holds on the other,
with either replacement. Whether it stands out of other heads does not matter here: the metric is compared with all.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ovqk import wording
from ovqk.metrics import METRICS
from ovqk.verdicts.statistics import Stratum, stratified_permutation, within_layer_auc

ASKED: dict[str, tuple[int, tuple[str, ...]]] = {
    "name_mover": (1, ("ov_task_margin", "ov_task_auc", "ov_task_copy")),
    "backup_name_mover": (1, ("ov_task_margin", "ov_task_auc", "ov_task_copy")),
    "negative_name_mover": (-1, ("ov_task_margin", "ov_task_auc")),
    "copy_suppression": (-1, ("ov_task_margin", "ov_task_auc")),
    "duplicate_token": (1, ("qk_simulated_duplicate", "qk_task_margin", "qk_task_auc", "qk_matching_block0")),
    "induction": (1, ("qk_composed_margin", "ov_copying", "ov_copying_block0")),
    "previous_token": (1, ("qk_simulated_previous", "qk_prev_auc")),
}
"""Role -> the direction that it predicts, and the metrics: the primary by rule first, the one before it after it."""
HEADER = ("model", "task", "role", "heads", "metric", "AUC", "p", "top 3", "rho", "ceiling")


def cells(folder: Path) -> Iterator[tuple[dict, dict[str, pd.DataFrame]]]:
    """Yield (record, tables) for each finished cell that ran prompts."""
    for path in sorted(folder.glob("*/*/*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        names = ("heads", "roles", "activations")
        if record["status"] == "done" and all((path.parent / f"{name}.parquet").is_file() for name in names):
            yield record, {name: pd.read_parquet(path.parent / f"{name}.parquet") for name in names}


def spearman(a: pd.Series, b: pd.Series) -> float:
    """Return the rank correlation over heads that have both; nan if there are fewer than 3."""
    both = pd.concat([a, b], axis=1).dropna()
    return float(np.corrcoef(both.rank().to_numpy().T)[0, 1]) if len(both) > 2 else math.nan


def rows(record: dict, tables: dict[str, pd.DataFrame], kv: int | None) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one cell; `kv` is the number of KV heads of a layer, None for as many as heads."""
    heads = tables["heads"].set_index(["layer", "head"])
    n_heads = int(heads.index.get_level_values("head").max()) + 1
    groups = np.arange(n_heads) // (n_heads // kv) if kv else np.arange(n_heads)
    found = tables["roles"]
    real = found[found["head"].notna() & found["measured"].astype(bool) & (found["verdict"] != "sensitive")]
    for role, (sign, metrics) in ASKED.items():
        own = [(int(a), int(b)) for a, b in real[real["role"] == role][["layer", "head"]].to_numpy()]
        quantity = tables["activations"].query("role == @role").pivot_table(
            index=["layer", "head"], columns="half", values="attention"
        )  # fmt: skip
        if not own or quantity.shape[1] < 2:
            continue
        choosing, other = quantity["choosing"], quantity[next(half for half in quantity if half != "choosing")]
        for metric in (name for name in metrics if name in heads and heads[name].notna().any()):
            values = (sign * heads[metric]).dropna()
            strata = []
            for layer in sorted({layer for layer, _ in own}):
                if layer not in values.index.get_level_values(0):
                    continue
                mine = values.loc[layer]
                claimed = np.array([(layer, head) in own for head in mine.index])
                if claimed.any() and not claimed.all():
                    strata.append(Stratum(mine.to_numpy(), claimed, groups[mine.index]))
            top = sum(head in own for head in values.sort_values(ascending=False).index[:3])
            auc, p = (within_layer_auc(strata), stratified_permutation(strata, 0).p) if strata else (math.nan,) * 2
            yield (
                record["model"], record["task"], wording.role(role), ", ".join(f"{a}.{b}" for a, b in own),
                f"`{metric}`{' ↓' if sign < 0 else ''}", shown(auc), f"{p:.2g}", f"{top} of {min(3, len(own))}",
                shown(spearman(values, other)), shown(spearman(choosing, other)),
            )  # fmt: skip


def shown(value: float) -> str:
    """Return a number with two digits; nothing for nan."""
    return "" if math.isnan(value) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--kv-heads", nargs="*", default=[], metavar="MODEL=N", help="of models with grouped queries")
    arguments = parser.parse_args()
    assert all(name in METRICS for _, names in ASKED.values() for name in names)
    grouped = {name: int(n) for name, n in (given.split("=") for given in arguments.kv_heads)}
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for folder in arguments.folders:
        for record, tables in cells(folder):
            for row in rows(record, tables, grouped.get(record["model"])):
                print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
