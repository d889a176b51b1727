"""One prediction tested against one null, and the tables that hold these tests (definitions: section 6)."""

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
        head: the head; None if the test is about the role as a whole.
        metric: the metric; for a head, the one that the prediction names for its layer.
        prediction: `high` or `low`.
        primary: whether the role's verdict rests on the prediction.
        exploratory: whether the prediction is exploratory, so that no verdict uses it.
        null: the null's name.
        counts: whether the null decides about the prediction; if not, the row is only reported.
        value: the head's metric; for a role, the mean over its heads, or the permutations' statistic.
        null_mean, null_sd: the null's mean and standard deviation; nan for a head under `depth`, whose scale differs.
        percentile: the share of the null below the value, in [0, 1].
        effect: that share in the predicted direction, ties half; under `layer` the AUC within layers; in [0, 1].
        ci_low, ci_high: the effect's 95 % interval; nan if the metric was not resampled.
        p: how often the null is at least as extreme in the predicted direction, in (0, 1].
        p_opposite: how often it is at least as extreme in the other direction, in (0, 1].
        min_p: the smallest p that this null can give.
        n_null: how many labelings, KV groups or draws p was counted on.
        exact: whether p was counted on all labelings or groups, and not on a sample.
        n_heads: how many heads are claimed.
        n_others: how many heads or draws they are compared with.
        quantiles: the null at QUANTILES.
        n_groups: how many KV groups hold the role's heads; 0 unless the row is about a role under `layer`.
        group_effect: the AUC within layers for these groups against those without a head that the role claims, in
            [0, 1]; a group's value is the mean over its heads; nan for other rows, and if every group has such a head.
        q, q_opposite, min_q: p, p_opposite and min_p after correction (`nulls.correct`); nan if it leaves the row out.
        variable: the task's causal variable, by name.
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
    n_groups: int = 0
    group_effect: float = math.nan
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
        """Whether p under this null can reach 0.05 at all."""
        return self.min_p <= ALPHA


COLUMNS = (
    "role", "layer", "head", "metric", "prediction", "primary", "exploratory", "null", "counts", "null_mean", "null_sd",
    "ci_low", "ci_high", "effect", "value", "percentile", "p", "p_opposite", "min_p", "n_null", "exact", "n_heads",
    "n_others", "n_groups", "group_effect", "q", "q_opposite", "min_q", "testable", "variable",
)  # fmt: skip
"""Columns of tests.parquet, in order."""


def tests_table(tests: Sequence[NullTest]) -> pd.DataFrame:
    """Return tests.parquet, with one row for each test; it has no columns if there are no tests."""
    rows = [vars(test) | _place(test) | {"testable": test.testable} for test in tests]
    return pd.DataFrame([{name: row[name] for name in COLUMNS} for row in rows])


def nulls_table(tests: Sequence[NullTest]) -> pd.DataFrame:
    """Return nulls.parquet, with one row for each test and each quantile of its null."""
    return pd.DataFrame(
        [
            {"role": test.role, **_place(test), "metric": test.metric, "null": test.null, "quantile": q, "value": value}
            for test in tests
            for q, value in zip(QUANTILES, test.quantiles, strict=True)
        ]
    )


def _place(test: NullTest) -> dict[str, Any]:
    return dict(zip(("layer", "head"), test.head or (None, None), strict=True))
