"""Which weight metric finds which role on random repeats, in complete real models (docs/method.md has the rule).

    python scripts/evidence_on_repeats.py smollm2-135m-instruct PATH [PATH ...] [--patterns GPT2_FOLDER PATTERNS_FOLDER]

Each model is a choice of `model=` or a path. `--patterns` adds a model that cannot be run, by its own attention on a
few texts: a folder with its weights, and one with prompt*.safetensors of `pattern` [layer, head, query, key].
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from safetensors.torch import load_file

from ovqk import wording
from ovqk.activations.forward import RunningModel
from ovqk.activations.repeats import LENGTH, SEQUENCES, draw_repeats, run_repeats
from ovqk.analyse import analyse
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.resolve import resolve
from ovqk.config.schema import Config, Repeats, register
from ovqk.figures.colours import CATEGORIES
from ovqk.tasks.tokenizer import load_tokenizer, start_tokens
from ovqk.testing.metric_ranks import Values, pooled, rank, strata_of
from ovqk.verdicts.statistics import Stratum
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_weights
from ovqk.weights.types import Head, OpenedModel

ROOT = Path(__file__).resolve().parents[1]
ASKED: dict[str, tuple[Repeats, tuple[str, ...]]] = {
    "previous_token": (Repeats.previous, ("qk_simulated_previous", "qk_prev_auc")),
    "duplicate_token": (Repeats.same, ("qk_simulated_duplicate", "qk_matching_block0", "qk_matching")),
    "induction": (Repeats.next, ("qk_composed_margin", "ov_copying", "ov_copying_block0")),
}
"""Role -> its place on repeats, and its metrics: the primary by the rule first."""
SHARE = 0.2
HALVES = ("choosing", "testing")
HEADER = ("role", "metric", "model", "heads", "AUC", "p", "top 3", "rho", "ceiling")
MARKS = ("o", "s", "D", "^", "v", "P", "X")


@dataclass(frozen=True)
class Behaviour:
    """Attention of one model's heads, as a share of what does not go to the first token.

    Attributes:
        attention: place -> half -> [layer, head].
        others: the same for places that are no role's, with which a role's is compared.
    """

    attention: dict[Repeats, dict[str, Values]]
    others: dict[str, dict[str, Values]]

    def role(self, place: Repeats) -> set[Head]:
        """Return the heads that have the role of a place, by the rule."""
        has = np.ones_like(self.attention[place]["choosing"], dtype=bool)
        for half in HALVES:
            here = self.attention[place][half]
            has &= here >= SHARE
            for name, found in [*self.attention.items(), *self.others.items()]:
                has &= (name == place) | (here > found[half])
        return {(int(layer), int(head)) for layer, head in np.argwhere(has)}


def cell_of(name: str) -> Config:
    """The cell of a model that is named or a path, with the circuits' metrics and no task."""
    choice = [f"model={name}"] if not Path(name).exists() else ["model=local", f"model.path={Path(name).resolve()}"]
    more = ["model.causal=true"] if name.endswith(".safetensors") else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve(
            compose("config", overrides=[*choice, *more, "task=none", "analysis=b03", "analysis.components=0"])
        )


def metrics(cell: Config) -> tuple[dict[str, Values], NDArray[np.int64]]:
    """Return metric -> [layer, head] for the metrics that have values, and each head's KV group."""
    checkpoint = open_checkpoint(cell.model, reads=tensors_read)
    opened = OpenedModel(open_weights(checkpoint, cell.model), checkpoint.label, load_tokenizer(checkpoint))
    heads, facts = analyse(opened, cell).tables["heads"], opened.source.architecture
    names = {name for _, names in ASKED.values() for name in names if name in heads and heads[name].notna().any()}
    values = {name: heads[name].to_numpy(float).reshape(facts.n_layers, facts.n_heads) for name in names}
    return values, facts.kv_of_head.numpy()


def on_repeats(cell: Config) -> Behaviour:
    """Run a model on random repeats."""
    checkpoint = open_checkpoint(cell.model)
    running, tokenizer = RunningModel.load(checkpoint, cell.model, torch.device("cpu")), load_tokenizer(checkpoint)
    source = open_weights(checkpoint, cell.model)
    facts = source.architecture
    if tokenizer is None:
        W_E = source.embeddings().W_E
        assert W_E is not None, "the model has no token embedding"
        start, tokens = [], without_tokenizer(W_E.shape[0], facts.n_ctx)
    else:
        start = start_tokens(tokenizer, checkpoint)
        drawn = draw_repeats(tokenizer, start, facts.n_ctx, seed=0)
        assert drawn is not None, "the context or the vocabulary is too small"
        tokens = drawn
    found = run_repeats(running, tokens, len(start), lambda total, what: iter(range(total)))
    kept = {"choosing": ~found.testing, "testing": found.testing}

    def share(values: torch.Tensor) -> dict[str, Values]:
        whole = {half: (values[rows].mean(0), 1 - found.sink[rows].mean(0)) for half, rows in kept.items()}
        return {half: (mine / rest).double().numpy() for half, (mine, rest) in whole.items()}

    return Behaviour({place: share(values) for place, values in found.attention.items()}, {})


def without_tokenizer(n_vocab: int, n_ctx: int | None) -> torch.Tensor:
    """Draw repeats from all ids."""
    length = LENGTH if n_ctx is None else min(LENGTH, n_ctx // 2)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(n_vocab, generator=generator)[:length] for _ in range(SEQUENCES)])
    return torch.cat([drawn, drawn], 1)


def on_texts(folder: Path) -> Behaviour:
    """Read a model's own attention on a few texts: to the token before, and to the one before that."""
    files = sorted(folder.glob("prompt*.safetensors"))
    halves = {"choosing": files[:3], "testing": files[3:]}

    def share(back: int) -> dict[str, Values]:
        found = {}
        for half, some in halves.items():
            rows = []
            for file in some:
                pattern = load_file(file)["pattern"].double()
                queries = torch.arange(back + 1 if back > 1 else 3, pattern.shape[-1])
                rows.append(pattern[:, :, queries, queries - back] / (1 - pattern[:, :, queries, 0]))
            found[half] = torch.cat(rows, -1).mean(-1).numpy()
        return found

    return Behaviour({Repeats.previous: share(1)}, {"two before": share(2)})


@dataclass(frozen=True)
class Model:
    """One model's behaviour and its metrics, metric -> [layer, head], with each head's KV group."""

    label: str
    behaviour: Behaviour
    values: dict[str, Values]
    groups: NDArray[np.int64]


def table(models: list[Model]) -> Iterator[str]:
    """Yield Markdown: a row for each model, role and metric, and one for the metric over all models."""
    yield "| " + " | ".join(HEADER) + " |"
    yield "|" + "---|" * len(HEADER)
    for role, (place, names) in ASKED.items():
        there = [model for model in models if place in model.behaviour.attention]
        for name in names:
            strata: list[Stratum] = []
            for model in (model for model in there if name in model.values):
                own = model.behaviour.role(place)
                strata += strata_of(model.values[name], own, model.groups)
                found = rank(model.values[name], own, model.groups, model.behaviour.attention[place])
                top = f"{found.top} of {min(3, len(own))}" if own else ""
                shown = (number(found.auc), small(found.p), top, number(found.rho), number(found.ceiling))
                yield row(wording.role(role), name, model.label, str(len(own)), *shown)
            auc, p = pooled(strata)
            heads = sum(int(stratum.claimed.sum()) for stratum in strata)
            yield row(wording.role(role), name, "all", str(heads), number(auc), small(p), "", "", "")


def row(role: str, metric: str, *cells: str) -> str:
    """Return a row of the table."""
    return f"| {role} | `{metric}` | {' | '.join(cells)} |"


def number(value: float) -> str:
    """Return a number with two digits; nothing for nan."""
    return "" if math.isnan(value) else f"{value:.2f}"


def small(p: float) -> str:
    """Return a p with two digits that count; nothing for nan."""
    return "" if math.isnan(p) else f"{p:.2g}"


def draw(models: list[Model], path: Path) -> None:
    """Draw each metric's AUC, a mark for each model whose size grows with the number of heads: PNG and SVG."""
    styles = [(MARKS[i % len(MARKS)], CATEGORIES[i % len(CATEGORIES)]) for i in range(len(models))]
    figure, axes = plt.subplots(1, len(ASKED), figsize=(10, 2.8), sharex=True, layout="constrained")
    for axis, (role, (place, names)) in zip(axes, ASKED.items(), strict=True):
        for (at, name), (index, model) in product(enumerate(names), enumerate(models)):
            if place not in model.behaviour.attention or name not in model.values:
                continue
            strata = strata_of(model.values[name], model.behaviour.role(place), model.groups)
            heads, (mark, colour) = sum(int(stratum.claimed.sum()) for stratum in strata), styles[index]
            height = at + (index - (len(models) - 1) / 2) * 0.11
            axis.scatter(pooled(strata)[0], height, s=16 + 4 * min(heads, 40), marker=mark, color=colour, linewidths=0)
        axis.axvline(0.5, color="0.6", lw=1, ls="--")
        axis.set(title=wording.role(role), xlim=(-0.05, 1.05), ylim=(len(names) - 0.4, -0.6))
        axis.set(xlabel="AUC within layers")
        axis.set_yticks(range(len(names)), names, fontsize=8)
    named = zip(models, styles, strict=True)
    keys = [plt.Line2D([], [], ls="", marker=mark, color=colour, label=model.label) for model, (mark, colour) in named]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--patterns", nargs=2, type=Path, metavar=("WEIGHTS", "PATTERNS"))
    parser.add_argument("--figure", type=Path, help="where the figure is written, as PNG and SVG")
    arguments = parser.parse_args()
    register()
    models = []
    for name in arguments.models:
        cell = cell_of(name)
        label = Path(name).parent.name if name.endswith(".safetensors") else Path(name).name
        models.append(Model(label, on_repeats(cell), *metrics(cell)))
    if arguments.patterns:
        weights, patterns = arguments.patterns
        models.append(Model(weights.name, on_texts(patterns), *metrics(cell_of(str(weights)))))
    for model in models:
        for role, (place, _) in ASKED.items():
            if place in model.behaviour.attention:
                heads = ", ".join(f"{layer}.{head}" for layer, head in sorted(model.behaviour.role(place))) or "none"
                print(f"- {model.label}, {wording.role(role)}: {heads}")
    print("\n" + "\n".join(table(models)))
    if arguments.figure:
        draw(models, arguments.figure)


if __name__ == "__main__":
    main()
