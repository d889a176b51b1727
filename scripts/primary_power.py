"""What it cost on planted heads that another metric became the primary of previous-token heads: tables.

    python scripts/primary_power.py     # eight minutes on one core

The planted models of docs/calibration.md, judged twice: with today's predictions, and with those of BEFORE. The
table counts the verdicts on what is planted that are corroborated. `looking nowhere` judges models whose previous-token
heads keep their random queries, keys and biases, so that they look nowhere in particular.
"""

import argparse
import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pandas as pd
import torch

from ovqk import wording
from ovqk.config.schema import PredictionConfig
from ovqk.testing.null_models import POWER_SHAPES
from ovqk.testing.planted import LAYOUT, MANY, PlantedModel, base_config, judged, planted

ROLE, TASK = "previous_token", "ioi"
BEFORE = (
    PredictionConfig("k_composition", partners=["induction"]),
    PredictionConfig("qk_prev_auc", direct_only=True),
)
"""The role's predictions before `qk_simulated_previous` became its primary."""
NOISES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
NOWHERE = (0.0, 0.9)
"""The noises at which heads that look nowhere are judged."""


def looking_nowhere(model: PlantedModel) -> PlantedModel:
    """Give the previous-token heads back the queries, keys and biases that they were drawn with."""
    for layer, head in LAYOUT[TASK][ROLE]:
        now, drawn, group = model.layers[layer], model.drawn[layer], int(model.architecture.kv_of_head[head])
        for name, index in (("W_Q", head), ("b_Q", head), ("W_K", group), ("b_K", group)):
            getattr(now, name)[index] = getattr(drawn, name)[index]
    return model


def verdicts(which: str, model: PlantedModel, **cell: Any) -> pd.DataFrame:
    """Judge what is planted, by the predictions in force, and name the cell."""
    found = judged(model, LAYOUT[TASK]).tables["verdicts"]
    return found[["kind", "role", "verdict"]].assign(which=which, **cell)


def runs(seeds: int) -> Iterator[pd.DataFrame]:
    """Yield the verdicts on every model by both sets of predictions."""
    role = base_config(TASK).task.roles[ROLE]
    now = copy.copy(role.predictions)
    for shape, seed, noise in product(POWER_SHAPES, range(seeds), NOISES):
        cell = {"shape": shape, "seed": seed, "noise": noise}
        for which, predictions in (("before", list(BEFORE)), ("now", now)):
            role.predictions = predictions
            yield verdicts(which, planted(shape, TASK, seed, noise, MANY), **cell)
            if noise in NOWHERE:
                blind = looking_nowhere(planted(shape, TASK, seed, noise, MANY))
                yield verdicts(f"{which}, looking nowhere", blind, **cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="models of each shape and noise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = pd.concat(runs(options.seeds), ignore_index=True)
    print("| planted | verdicts | predictions | " + " | ".join(f"{noise:g}" for noise in NOISES) + " |")
    print("|" + "---|" * (3 + len(NOISES)))
    for (kind, role), rows in found.groupby(["kind", "role"], sort=False):
        for which, some in rows.groupby("which", sort=False):
            if "nowhere" in str(which) and role != ROLE:
                continue
            counts = [(some[some["noise"] == noise]["verdict"] == "corroborated") for noise in NOISES]
            cells = " | ".join(f"{int(count.sum())} of {len(count)}" if len(count) else "" for count in counts)
            print(f"| {wording.role(str(role))} | {kind}s | {which} | {cells} |")


if __name__ == "__main__":
    main()
