"""Which weight metric finds which role: heads' roles measured from activations against metrics of their weights.

    python scripts/evidence.py DIR [DIR ...]

Each directory is a model with its tokenizer, for instance training seeds of one recipe. For every task of the
synthetic language the roles are measured on prompts (`model.claims=measured`: docs/method.md), the weights are analysed
(weights only), and for each role and metric the two are compared:

    AUC     the probability that a head of the role exceeds another head of its layer in the metric, in the direction
            the role predicts (`high` where it predicts nothing of the metric); 0.5 by chance
    pooled  the same over all models, with a 95 % interval (heads resampled within their layers), and p of a
            permutation of the role's heads within their layers

Compositions are with the measured heads of the partner role, as they would be with claimed ones.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray

from ovqk import wording
from ovqk.analyse import analyse
from ovqk.cell import runner_of
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.resolve import resolve
from ovqk.config.schema import Direction, PredictionConfig, register
from ovqk.metrics import COMPOSITION_METRICS, METRICS
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.tasks.claims import Claims
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.verdicts.claim_tests import ClaimTests
from ovqk.verdicts.nulls import Predicted, layer_strata, predicted_values
from ovqk.verdicts.statistics import Stratum, stratified_permutation, within_layer_auc
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_weights
from ovqk.weights.types import Architecture, OpenedModel

RESAMPLES = 2000
ROOT = Path(__file__).resolve().parents[1]
TASKS = ("ioi", "sva", "induction")
ALWAYS = (
    "ov_copying", "ov_copying_block0", "ov_task_auc", "ov_task_margin", "ov_task_transfer", "ov_task_read",
    "qk_matching", "qk_matching_block0", "qk_task_auc", "qk_task_margin", "qk_key_alignment", "qk_positional_share",
    "qk_prev_auc", "qk_simulated_previous", "qk_simulated_duplicate", "qk_composed_margin",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One model on one task: its heads' metrics [layer, head], and their roles as measured."""

    name: str
    values: dict[str, NDArray[np.float64]]
    claims: Claims
    architecture: Architecture


def measured(directory: Path, task: str, count: int) -> Measured:
    """Measure the roles on prompts, and analyse the weights."""
    overrides = [f"task={task}", "model=local", f"model.path={directory}", "model.claims=measured"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cell = resolve(
            compose("config", overrides=[*overrides, "analysis=activations", f"activations.prompts={count}"])
        )
    checkpoint = open_checkpoint(cell.model, reads=tensors_read)
    tokenizer = load_tokenizer(checkpoint)
    opened = OpenedModel(open_weights(checkpoint, cell.model), directory.name, tokenizer)
    analysis = analyse(opened, cell, runner=runner_of(checkpoint, cell, tokenizer))
    if why := (analysis.activations or {})["untestable"]:
        raise SystemExit(f"{directory.name} / {task}: {why}")
    heads, found = analysis.tables["heads"], analysis.tables.get("roles", pd.DataFrame(columns=["role", "measured"]))
    facts = opened.source.architecture
    values = {name: heads[name].to_numpy(float).reshape(facts.n_layers, facts.n_heads) for name in metrics_of(heads)}
    rows = found[found["measured"].astype(bool)]
    roles = {
        role: [(int(row["layer"]), int(row["head"])) for row in rows[rows["role"] == role].to_dict("records")]
        for role, config in cell.task.roles.items()
        if config.activations is not None
    }
    predictions = {role: list(cell.task.roles[role].predictions) for role in roles}
    claims = Claims("measured", "measured", None, roles, predictions)
    tests = ClaimTests(TaskReadout.read(Model.read(opened, cell)), claims)
    for layer in range(facts.n_layers):
        tests.visit(Layer(tests.model, layer))
    for predicted in tests.predicted(values).values():
        values |= {p.config.metric: p.values for p in predicted if p.config.metric in COMPOSITION_METRICS}
    return Measured(directory.name, values, claims, facts)


def metrics_of(heads: pd.DataFrame) -> list[str]:
    """The metrics that have a value."""
    return [name for name in METRICS if name in heads and heads[name].notna().any()]


def strata(model: Measured, role: str, config: PredictionConfig) -> list[Stratum]:
    """The layers that hold a head of the role and another, where the metric has a value."""
    values = predicted_values(config, model.values, model.architecture)
    predicted = Predicted(role, config, primary=False, values=values)
    found = layer_strata(predicted, model.claims, model.architecture, exclude_claimed=False)
    return [stratum for stratum in found if not stratum.claimed.all()]


def table(models: list[Measured], role: str) -> str:
    """Markdown: one row per metric, one column per model, and the pooled AUC and p; empty where no metric has a row."""
    predictions = models[0].claims.predictions[role]
    named = {prediction.metric for prediction in predictions}
    lines = [
        f"| metric | {' | '.join(model.name for model in models)} | pooled | p |",
        "|---|" + "---|" * (len(models) + 2),
    ]
    for config in [*predictions, *(PredictionConfig(name) for name in ALWAYS if name not in named)]:
        each = [strata(model, role, config) for model in models]
        pooled = [stratum for found in each for stratum in found]
        if not pooled:
            continue
        arrow = {Direction.high: " ↑", Direction.low: " ↓"}[config.direction] if config.metric in named else ""
        name = f"**`{config.metric}`**" if config in predictions[:1] else f"`{config.metric}`"
        aucs = [within_layer_auc(found) for found in each]
        shown = " | ".join("" if math.isnan(auc) else f"{auc:.2f}" for auc in aucs)
        p = stratified_permutation(pooled, seed=0).p
        low, high = interval(pooled)
        auc = f"{within_layer_auc(pooled):.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {name}{arrow} | {shown} | {auc} | {p:.2g} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def interval(strata: list[Stratum]) -> tuple[float, float]:
    """95 % interval of the AUC within layers: the role's heads and the others resampled within each layer."""
    generator = np.random.default_rng(0)

    def again(stratum: Stratum) -> Stratum:
        picked = [
            generator.choice(places, len(places)) for places in map(np.flatnonzero, (stratum.claimed, ~stratum.claimed))
        ]
        rows = np.concatenate(picked)
        return Stratum(stratum.values[rows], stratum.claimed[rows], stratum.groups[rows])

    drawn = [within_layer_auc([again(stratum) for stratum in strata]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=1024, help="prompts a task")
    arguments = parser.parse_args()
    register()
    for task in TASKS:
        models = [measured(directory.resolve(), task, arguments.count) for directory in arguments.directories]
        for role in models[0].claims.roles:
            heads = [
                f"{model.name}: {', '.join(f'{a}.{b}' for a, b in model.claims.roles[role]) or 'none'}"
                for model in models
            ]
            print(f"### {task}: {wording.role(role)}\n\n{'; '.join(heads)}\n")
            if shown := table(models, role):
                print(f"{shown}\n")


if __name__ == "__main__":
    main()
