"""Comparing a metric with heads' roles: known answers, and the correlation by its definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovqk.activations.joint import spearman
from ovqk.testing.metric_ranks import pooled, rank, strata_of
from ovqk.verdicts.statistics import midranks

NAN = math.nan
QUANTITY = np.arange(8.0).reshape(2, 4)
HALVES = {"choosing": QUANTITY, "testing": QUANTITY[::-1]}


def by_ranks(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(midranks(a.ravel()), midranks(b.ravel()))[0, 1])


def test_a_metric_that_puts_the_roles_heads_first_in_their_layers_has_all_of_it() -> None:
    values = np.array([[0.0, 3.0, 1.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
    found = rank(values, {(0, 1), (1, 0)}, np.arange(4), HALVES)
    assert (found.auc, found.p, found.top) == (1.0, 1 / 16, 1)
    assert found.ceiling == pytest.approx(by_ranks(QUANTITY, QUANTITY[::-1]))
    worst = rank(-values, {(0, 1), (1, 0)}, np.arange(4), HALVES)
    assert (worst.auc, worst.p, worst.top) == (0.0, 1.0, 0)


def test_heads_without_a_value_are_compared_with_nothing() -> None:
    values = np.array([[NAN, 3.0, NAN, 2.0], [1.0, NAN, NAN, NAN]])
    (stratum,) = strata_of(values, {(0, 1), (0, 0), (1, 0)}, np.arange(4))
    assert stratum.values.tolist() == [3.0, 2.0] and stratum.claimed.tolist() == [True, False]
    assert all(math.isnan(x) for x in pooled(strata_of(np.full((2, 4), NAN), {(0, 1)}, np.arange(4))))
    found = rank(np.full((2, 4), NAN), {(0, 1)}, np.arange(4), HALVES)
    assert math.isnan(found.auc) and math.isnan(found.rho)


def test_kv_groups_are_permuted_before_heads() -> None:
    values = np.array([[4.0, 3.0, 2.0, 1.0]])
    both = {(0, 0), (0, 1)}
    quantity = dict.fromkeys(HALVES, values)
    assert rank(values, both, np.array([0, 0, 1, 1]), quantity).p == 1 / 2
    assert rank(values, both, np.arange(4), quantity).p == 1 / 6


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12))
def test_the_correlation_is_that_of_the_ranks(pairs) -> None:
    a, b = (np.array([float(x) for x in side]) for side in zip(*pairs, strict=True))
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(by_ranks(a, b))
