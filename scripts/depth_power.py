"""Level and power of the null `depth` under grouped queries, before and after its window grew: a table and a figure.

    python scripts/depth_power.py     # two minutes on one core
    python scripts/depth_power.py --heads CELL/heads.parquet --kv-heads 3     # a trained model, labels shuffled

Models are grids of numbers: layers of KV groups of heads, values normal with nine tenths of their variance shared in a
group, and a place that rises by four standard deviations from the first to the last layer. One head is moved by an
effect in standard deviations; power is how often p <= 0.05. `before` is the rule that the tests had: heads of layers
within two, each standardised by the median and the MAD of its own layer.

With `--heads`, the model is a trained one, and what is claimed of it is nothing: four heads drawn at random, again and
again. The table says how often the first of them, and the four together, have p <= 0.05 and p <= 0.1, metric by metric.
"""

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk.verdicts.depth import depth_pool, depth_reference
from ovqk.verdicts.statistics import pooled_permutation, reference_counts

mpl.use("Agg")
import matplotlib.pyplot as plt

SHAPES = {1: (26, 1, 4), 2: (28, 2, 6), 3: (30, 3, 3), 8: (32, 8, 4)}
"""KV groups of a layer -> layers, groups, heads of a group: about those of Gemma 3 1B, Qwen2.5, SmolLM2 and Llama 3."""
EFFECTS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
SHARED, RISE, LEVEL, NEAR = 0.9, 4.0, 0.05, 2
METRICS = (
    "ov_task_auc", "ov_task_margin", "qk_task_auc", "ov_copying", "ov_copying_block0", "qk_matching_block0",
    "qk_simulated_previous", "qk_simulated_duplicate", "qk_composed_margin",
)  # fmt: skip
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"


def grid(generator: np.random.Generator, layers: int, n_groups: int, each: int) -> NDArray[np.float64]:
    """Values [layer, head] of a model in which no head is planted."""
    of_group = SHARED**0.5 * generator.normal(size=(layers, n_groups, 1))
    values = of_group + (1 - SHARED) ** 0.5 * generator.normal(size=(layers, n_groups, each))
    return values.reshape(layers, -1) + np.linspace(0, RISE, layers)[:, None]


def before(values: NDArray[np.float64], head: tuple[int, int], groups: NDArray[np.int64]) -> float:
    """Return p as it was: within two layers, each head standardised within its own."""
    near = np.arange(max(0, head[0] - NEAR), min(len(values), head[0] + NEAR + 1))
    distance = values[near] - np.median(values[near], 1, keepdims=True)
    z = distance / np.median(np.abs(distance), 1, keepdims=True)
    ids = near[:, None] * len(groups) + groups
    others = (near[:, None] != head[0]) | (np.arange(values.shape[1]) != head[1])
    return reference_counts(float(z[near == head[0], head[1]][0]), z[others], ids[others]).p


def after(values: NDArray[np.float64], head: tuple[int, int], groups: NDArray[np.int64]) -> float:
    """Return p as it is."""
    found = depth_reference(values, head, {head}, groups)
    return math.nan if found is None else found.counts().p


def power(n_groups: int, effect: float, place: float, n: int) -> tuple[float, float]:
    """Return how often p <= LEVEL before and after, of n models; `place` is the head's relative depth."""
    layers, _, each = SHAPES[n_groups]
    groups, generator = np.arange(n_groups * each) // each, np.random.default_rng([n_groups, int(10 * effect)])
    head, hits = (round(place * (layers - 1)), 0), np.zeros(2)
    for _ in range(n):
        values = grid(generator, *SHAPES[n_groups])
        values[head] += effect
        hits += [before(values, head, groups) <= LEVEL, after(values, head, groups) <= LEVEL]
    return float(hits[0]) / n, float(hits[1]) / n


def shuffled(path: Path, n_kv: int, n: int) -> None:
    """Print how often heads drawn at random are significant, of a trained model's metrics."""
    table = pd.read_parquet(path)
    shape = int(table["layer"].max()) + 1, int(table["head"].max()) + 1
    groups = np.arange(shape[1]) // (shape[1] // n_kv)
    print("| metric | heads, p <= 0.05 | p <= 0.1 | roles, p <= 0.05 | p <= 0.1 | in the first or last two layers |")
    print("|---|---|---|---|---|---|")
    for metric in METRICS:
        values, generator = table[metric].to_numpy().reshape(shape), np.random.default_rng(0)
        known = [(int(a), int(b)) for a, b in np.argwhere(~np.isnan(values))]
        heads, roles, ends = [], [], []
        for _ in range(n):
            role = [known[i] for i in generator.choice(len(known), 4, replace=False)]
            one, pool = depth_reference(values, role[0], role, groups), depth_pool(values, role, set(), groups)
            if one is not None and pool is not None:
                heads.append(one.counts().p)
                roles.append(pooled_permutation(pool, 0).p)
                ends += [heads[-1]] if role[0][0] < 2 or role[0][0] >= shape[0] - 2 else []
        cells = [np.mean(np.array(p) <= a) for p in (heads, roles) for a in (LEVEL, 0.1)]
        at_ends = f"{np.mean(np.array(ends) <= LEVEL):.3f} of {len(ends)}"
        print(f"| `{metric}` | {' | '.join(f'{cell:.3f}' for cell in cells)} | {at_ends} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=400, help="of each point")
    parser.add_argument("--heads", type=Path, help="heads.parquet of a trained model")
    parser.add_argument("--kv-heads", type=int, default=1, help="KV heads of its layers")
    options = parser.parse_args()
    n = options.models
    if options.heads is not None:
        shuffled(options.heads, options.kv_heads, n)
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    print(f"| KV groups a layer | at depth | rule | {' | '.join(f'{effect:g} sd' for effect in EFFECTS)} |")
    print("|" + "---|" * (3 + len(EFFECTS)))
    for axis, (place, title) in zip(
        axes, ((0.75, "three quarters of the depth"), (1.0, "the last layer")), strict=True
    ):
        for color, n_groups in zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7"), SHAPES, strict=True):
            found = np.array([power(n_groups, effect, place, n) for effect in EFFECTS])
            for column, (rule, style) in enumerate((("before", ":"), ("after", "-"))):
                print(f"| {n_groups} | {place:g} | {rule} | {' | '.join(f'{v:.2f}' for v in found[:, column])} |")
                label = f"{n_groups} group{'s' * (n_groups > 1)}" if rule == "after" else None
                axis.plot(EFFECTS, found[:, column], color=color, ls=style, marker="o", ms=3, lw=1.4, label=label)
        axis.axhline(LEVEL, color="0.45", lw=1, ls="--")
        axis.set(title=f"A head at {title}", xlabel="effect, in standard deviations of heads", ylim=(-0.03, 1.05))
    axes[0].set_ylabel("share of models with p <= 0.05")
    axes[0].legend(frameon=False, fontsize=8, title="solid: now; dotted: before", title_fontsize=8)
    figure.savefig(FIGURES / "depth_power.png", dpi=150)
    figure.savefig(FIGURES / "depth_power.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
