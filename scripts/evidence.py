"""Which weight metric finds which role: heads' roles measured from activations against metrics of their weights.

    python scripts/evidence.py DIR [DIR ...]

Each directory is a model with its tokenizer, for instance training seeds of one recipe. For every task of the
synthetic language the roles are measured (`measure_roles.py`: activations only), the weights are analysed (weights
only), and for each role and metric the two are compared:

    AUC     the probability that a head of the role exceeds another head of its layer in the metric, in the direction
            the role predicts (`high` where it predicts nothing of the metric); 0.5 by chance
    pooled  the same over all models, and the exact p of a permutation of the role's heads within their layers
"""

import argparse
import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import measure_roles
import numpy as np
import pandas as pd
import yaml
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from ovqk.analyses import analyse
from ovqk.checkpoints import open_checkpoint
from ovqk.config import Direction, RoleConfig, register
from ovqk.identity import resolve
from ovqk.sources import open_weights
from ovqk.statistics import Stratum, stratified_permutation, within_layer_auc
from ovqk.tasks import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("ioi", "sva", "induction")
ALWAYS = (
    "ov_copying", "ov_copying_block0", "ov_task_auc", "ov_task_transfer", "ov_task_read", "qk_matching",
    "qk_matching_block0", "qk_task_auc", "qk_key_alignment", "qk_positional_share", "qk_prev_auc",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One model on one task: its heads' metrics, and role -> (layer, head) as measured."""

    name: str
    heads: pd.DataFrame
    roles: dict[str, list[tuple[int, int]]]
    predictions: dict[str, RoleConfig]
    kv_groups: NDArray[np.int64]


def measured(directory: Path, task: str, count: int) -> Measured:
    """Measure the roles on prompts, and analyse the weights."""
    file = ROOT / "conf" / "task" / f"{task}.yaml"
    with contextlib.redirect_stderr(io.StringIO()):
        model = TransformerBridge.boot_transformers(str(directory), device="cpu")
        found = measure_roles.measure(measure_roles.prepare(model, yaml.safe_load(file.read_text()), count, 0), task)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cell = resolve(compose("config", overrides=[f"task={task}", "model=local", f"model.path={directory}"]))
    checkpoint = open_checkpoint(cell.model)
    source, tokenizer = open_weights(checkpoint, cell.model), load_tokenizer(checkpoint)
    rows = source.embeddings().W_E
    n_tokens = None if tokenizer is None or rows is None else min(tokenizer.get_vocab_size(), len(rows))
    result = analyse(source, tokenizer, n_tokens, directory.name, cell)
    roles = {role: [evidence.head for evidence in entries] for role, entries in found.items()}
    groups = source.architecture.kv_of_head.numpy().astype(np.int64)
    return Measured(directory.name, result.tables["heads"], roles, cell.task.roles, groups)


def strata(model: Measured, role: str, metric: str, sign: int) -> list[Stratum]:
    """The layers that hold a head of the role, where the metric has a value."""
    found = []
    for layer, rows in model.heads.groupby("layer"):
        values = sign * rows[metric].to_numpy(dtype=float)
        claimed = np.array([(layer, head) in model.roles.get(role, []) for head in rows["head"]])
        if claimed.any() and not claimed.all() and np.isfinite(values).all():
            found.append(Stratum(values, claimed, model.kv_groups))
    return found


def table(models: list[Measured], role: str) -> str:
    """Markdown: one row per metric, one column per model, and the pooled AUC and p."""
    predictions = models[0].predictions[role].predictions if role in models[0].predictions else []
    signs = {p.metric: (1 if p.direction is Direction.high else -1) for p in predictions}
    lines = [
        f"| metric | {' | '.join(model.name for model in models)} | pooled | p |",
        "|---|" + "---|" * (len(models) + 2),
    ]
    predicted = [name for name in signs if name in models[0].heads]
    for metric in [*predicted, *(name for name in ALWAYS if name not in signs and name in models[0].heads)]:
        sign = signs.get(metric, 1)
        each = [strata(model, role, metric, sign) for model in models]
        pooled = [stratum for found in each for stratum in found]
        if not pooled:
            continue
        arrow = {1: " ↑", -1: " ↓"}[sign] if metric in signs else ""
        name = f"**`{metric}`**{arrow}" if predicted and metric == predicted[0] else f"`{metric}`{arrow}"
        aucs = [within_layer_auc(found) for found in each]
        shown = " | ".join("" if math.isnan(auc) else f"{auc:.2f}" for auc in aucs)
        p = stratified_permutation(pooled, seed=0).p
        lines.append(f"| {name} | {shown} | {within_layer_auc(pooled):.2f} | {p:.2g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=800, help="prompts a task")
    arguments = parser.parse_args()
    register()
    for task in TASKS:
        models = [measured(directory.resolve(), task, arguments.count) for directory in arguments.directories]
        for role in models[0].roles:
            heads = [
                f"{model.name}: {', '.join(measure_roles.name_of(head) for head in model.roles[role]) or 'none'}"
                for model in models
            ]
            print(f"### {task}: {role.replace('_', ' ')}\n\n{'; '.join(heads)}\n")
            if any(model.roles[role] for model in models):
                print(f"{table(models, role)}\n")


if __name__ == "__main__":
    main()
