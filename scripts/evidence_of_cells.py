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
from ovqk.testing.metric_ranks import rank

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


def rows(record: dict, tables: dict[str, pd.DataFrame], kv: int | None) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one cell; `kv` is the number of KV heads of a layer, None for as many as heads."""
    heads = tables["heads"].sort_values(["layer", "head"])
    shape = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    groups = np.arange(shape[1]) // (shape[1] // kv) if kv else np.arange(shape[1])
    found = tables["roles"]
    real = found[found["head"].notna() & found["measured"].astype(bool) & (found["verdict"] != "sensitive")]
    for role, (sign, metrics) in ASKED.items():
        own = {(int(a), int(b)) for a, b in real[real["role"] == role][["layer", "head"]].to_numpy()}
        measured = tables["activations"].query("role == @role").sort_values(["layer", "head"])
        halves = {str(half): rows["attention"].to_numpy(float) for half, rows in measured.groupby("half")}
        if not own or len(halves) < 2:
            continue
        quantity = {half: values.reshape(shape) for half, values in halves.items()}
        for metric in (name for name in metrics if name in heads and heads[name].notna().any()):
            ranks = rank(sign * heads[metric].to_numpy(float).reshape(shape), own, groups, quantity)
            yield (
                record["model"], record["task"], wording.role(role), ", ".join(f"{a}.{b}" for a, b in sorted(own)),
                f"`{metric}`{' ↓' if sign < 0 else ''}", shown(ranks.auc), f"{ranks.p:.2g}",
                f"{ranks.top} of {min(3, len(own))}", shown(ranks.rho), shown(ranks.ceiling),
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
