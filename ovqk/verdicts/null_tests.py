"""One prediction of a role or head tested against one null, and the tables that hold these tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ovqk.verdicts.statistics import ALPHA, QUANTILES
from ovqk.weights.types import Head


@dataclass(frozen=True)
class NullTest:
    """A row of tests.parquet; its `quantiles` are rows of nulls.parquet.

    Attributes:
        role: the role.
        head: the head; None for the role as a whole.
        metric: the metric; for a head the one that the prediction is about in its layer.
        prediction: `high` or `low`.
        primary, exploratory: what the prediction is to the role.
        null: the name of the null.
        counts: whether the null decides about the prediction; if not, the row is only reported.
        value: the head's metric; for a role the mean over its heads, or the statistic that permutations are ranked by.
        null_mean, null_sd: the null's mean and standard deviation; nan under `depth`, which is on another scale.
        percentile: the share of the null below the value, in [0, 1].
        effect: the same in the predicted direction, ties half; under `layer` the AUC within layers.
        ci_low, ci_high: the effect's 95 % interval; nan if the metric was not resampled.
        p: how often the null is at least as extreme in the predicted direction.
        p_opposite: how often it is in the other direction.
        min_p: the smallest p that this null can give.
        n_null: how many labelings, KV groups or draws p was counted on.
        exact: whether they are all there are, and not a sample.
        n_heads, n_others: how many heads are claimed, and how many heads or draws they are compared with.
        quantiles: the null at QUANTILES.
        q, q_opposite, min_q: p, p_opposite and min_p after correction; nan if the row is in no family (`correct`).
        variable: the name of the task's causal variable.
    """

    role: str
    head: Head | None
    metric: str
    prediction: str
    primary: bool
    exploratory: bool
    null: str
    counts: bool
    value: float
    percentile: float
    effect: float
    p: float
    p_opposite: float
    min_p: float
    n_null: int
    exact: bool
    n_heads: int
    n_others: int
    quantiles: Sequence[float]
    null_mean: float = math.nan
    null_sd: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    q: float = math.nan
    q_opposite: float = math.nan
    min_q: float = math.nan
    variable: str | None = None

    @property
    def testable(self) -> bool:
        """Whether this null can reach significance at all."""
        return self.min_p <= ALPHA


COLUMNS = (
    "role", "layer", "head", "metric", "prediction", "primary", "exploratory", "null", "counts", "null_mean", "null_sd",
    "ci_low", "ci_high", "effect", "value", "percentile", "p", "p_opposite", "min_p", "n_null", "exact", "n_heads",
    "n_others", "q", "q_opposite", "min_q", "testable", "variable",
)  # fmt: skip
"""Columns of tests.parquet, in order."""


def tests_table(tests: Sequence[NullTest]) -> pd.DataFrame:
    """Return tests.parquet: one row for each test; no columns if there are none."""
    rows = [vars(test) | _place(test) | {"testable": test.testable} for test in tests]
    return pd.DataFrame([{name: row[name] for name in COLUMNS} for row in rows])


def nulls_table(tests: Sequence[NullTest]) -> pd.DataFrame:
    """Return nulls.parquet: for each test, one row for each quantile of its null."""
    return pd.DataFrame(
        [
            {"role": test.role, **_place(test), "metric": test.metric, "null": test.null, "quantile": q, "value": value}
            for test in tests
            for q, value in zip(QUANTILES, test.quantiles, strict=True)
        ]
    )


def _place(test: NullTest) -> dict[str, Any]:
    return dict(zip(("layer", "head"), test.head or (None, None), strict=True))
