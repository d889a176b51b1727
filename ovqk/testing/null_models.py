"""Random and planted models, the tests' results on them, and counts of the errors.

    null_run      random initialisation, heads claimed at random: their p-values and false verdicts
    strained_run  the same if a null has little to draw from
    power_run     heads with every role planted by hand, and noise mixed into the planted matrices: their verdicts

The models are small transformers in memory (`ovqk/testing/planted.py`).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ovqk.config.schema import PredictionConfig
from ovqk.tasks.claims import Claims
from ovqk.testing.planted import (
    LAYOUT,
    SHAPES,
    RandomModel,
    architecture,
    judged,
    p_values,
    planted,
    random_claims,
    random_model,
)
from ovqk.verdicts.nulls import Predicted, head_rows

TASKS = tuple(LAYOUT)
POWER_SHAPES = ("learned positions", "rotary, grouped queries")
FALSE = ("corroborated", "contradicted")
"""Verdicts that are wrong if nothing is planted."""
SURPRISE = 1e-4
"""A test fails to keep its level if so many small p-values would be less probable than this in a test that keeps it."""


# --- counting ------------------------------------------------------------------------------------------------


def tail(count: int, n: int, a: float) -> float:
    """Return P(X >= count) for a binomial X with n trials and probability a."""
    if count <= 0 or a >= 1:
        return 1.0
    if count > n or a <= 0:
        return 0.0
    k = np.arange(count, n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    return float(min(1.0, np.exp(ways + k * math.log(a) + (n - k) * math.log1p(-a)).sum()))


def interval(count: int, n: int, coverage: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval for the share count / n."""
    half = (1 - coverage) / 2

    def crossing(below: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if below(middle) else (low, middle)
        return low

    least = crossing(lambda a: tail(count, n, a) < half) if count else 0.0
    most = crossing(lambda a: 1 - tail(count + 1, n, a) > half) if count < n else 1.0
    return least, most


def least_likely(p: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the attained a at which the number of p <= a is least probable, their share, and that probability."""
    found = [(tail(int((p <= a).sum()), len(p), float(a)), float(a), float((p <= a).mean())) for a in np.unique(p)]
    probability, a, share = min(found)
    return a, share, probability


def multiplicity(rows: int, n: int = 1000, levels: int = 100, draws: int = 12_000) -> dict[str, float]:
    """Simulate `least_likely` for a test that keeps its level exactly, with n p-values on `levels` levels.

    Returns:
        The share of rows below SURPRISE; for whole pages, the smallest probability's median, and the share of pages
        below SURPRISE.
    """
    generator = np.random.default_rng(0)
    k = np.arange(n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    exact = (np.exp(ways + k * math.log(a) + (n - k) * math.log1p(-a)) for a in np.arange(1, levels) / levels)
    tails = [probability[::-1].cumsum()[::-1] for probability in exact]
    found = np.ones(draws)
    for draw in range(draws):
        counts = generator.multinomial(n, np.full(levels, 1 / levels)).cumsum()
        found[draw] = min(values[count] for values, count in zip(tails, counts, strict=False))
    pages = found[: draws // rows * rows].reshape(-1, rows).min(1)
    below = {"row_below": float((found < SURPRISE).mean()), "page_below": float((pages < SURPRISE).mean())}
    return below | {"page_median": float(np.median(pages))}


# --- models --------------------------------------------------------------------------------------------------


def null_run(cell: tuple[str, str, int], draws: int = 99) -> pd.DataFrame:
    """Return p-values for heads claimed at random in one random model, and count its FALSE verdicts."""
    shape, task, seed = cell
    torch.set_num_threads(1)
    model = random_model(shape, task, seed)
    tables = judged(model, random_claims(model), draws).tables
    verdicts = tables["verdicts"]
    counts = {
        f"{verdict}_{kind}": int(((verdicts["verdict"] == verdict) & (verdicts["kind"] == kind)).sum())
        for verdict, kind in itertools.product(FALSE, ("role", "head"))
    }
    return p_values(tables["tests"]).assign(shape=shape, task=task, seed=seed, **counts)


def null_cells(seeds: Sequence[int], shapes: Sequence[str] = tuple(SHAPES)) -> list[tuple[str, str, int]]:
    """Return every shape and task with seeds; no two cells share a seed."""
    pairs = [(shape, task) for shape in SHAPES for task in TASKS]
    cells = [(*pair, seed * len(pairs) + place) for seed in seeds for place, pair in enumerate(pairs)]
    return [cell for cell in cells if cell[0] in shapes]


STRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "uneven layers": ("depth", "head", {}),
    "group mates claimed, depth": ("depth", "head", {"task": "sva", "kv_heads": 2}),
    "group mates claimed, spectrum": ("spectrum", "role", {"task": "sva", "kv_heads": 2}),
    "few matched words": ("token", "role", {"task": "ioi", "lookalikes": 2}),
}
"""Name -> null, level, and the model: 3 layers with 8 heads, or (the first) only numbers for 4 layers with 12 heads."""
STRAINED_CLAIMS: dict[str, dict[str, list[tuple[int, int]]]] = {
    "sva": {"agreement_reader": [(1, 0), (1, 1), (1, 2)]},
    "ioi": {"name_mover": [(1, 0), (1, 1)]},
}


def strained_run(cell: tuple[str, int], draws: int = 99) -> float:
    """Return the p-value for one case in STRAINED."""
    name, seed = cell
    null, level, case = STRAINED[name]
    if not case:
        values = np.random.default_rng(seed).uniform(size=(4, 12))
        predicted = Predicted("mover", PredictionConfig("ov_task_auc"), primary=True, values=values)
        claims = Claims("", "measured", None, {"mover": [(1, head) for head in range(8)]}, {})
        return next(row.p for row in head_rows(predicted, (1, 0), claims, architecture(4, 12)) if row.null == null)
    torch.set_num_threads(1)
    model = RandomModel(architecture(3, 8, case.get("kv_heads")), case["task"], seed, lookalikes=case.get("lookalikes"))
    rows = p_values(judged(model, STRAINED_CLAIMS[case["task"]], draws).tables["tests"])
    return float(rows[(rows["null"] == null) & (rows["level"] == level) & rows["primary"]]["p"].iloc[0])


def power_run(cell: tuple[str, str, int, float, int], draws: int = 99) -> pd.DataFrame:
    """Return verdicts on planted heads at one noise level, in layers with `per_layer` heads.

    The column `least_p` is the smallest p that `depth` could have given a head's primary prediction.
    """
    shape, task, seed, noise, per_layer = cell
    torch.set_num_threads(1)
    tables = judged(planted(shape, task, seed, noise, per_layer), LAYOUT[task], draws).tables
    tests, keys = tables["tests"], ["role", "layer", "head"]
    least = tests[(tests["null"] == "depth") & tests["primary"]].rename(columns={"min_p": "least_p"})
    verdicts = tables["verdicts"].merge(least[[*keys, "least_p"]], on=keys, how="left")
    cell_of: dict[str, Any] = {"shape": shape, "task": task, "seed": seed, "noise": noise, "per_layer": per_layer}
    return verdicts[["kind", "role", "verdict", "least_p"]].assign(**cell_of)
