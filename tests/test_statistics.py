"""Permutation p-values against enumeration, corrections against their definition, calibration under exchangeability."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.statistics import (
    Stratum,
    benjamini_hochberg,
    midranks,
    percentile,
    robust_z,
    stratified_permutation,
    within_layer_auc,
)


def stratum(values, claimed, groups=None) -> Stratum:
    groups = np.arange(len(values)) if groups is None else np.array(groups)
    return Stratum(np.array(values, dtype=float), np.array(claimed, dtype=bool), groups)


def enumerated(strata: list[Stratum]) -> list[float]:
    """The statistic under every relabelling of layers: all permutations of groups of a size, and within groups."""
    per_layer = []
    for s in strata:
        ranks = (midranks(s.values) - 1) / (2 * len(s.values))
        groups = [np.flatnonzero(s.groups == g) for g in np.unique(s.groups)]
        labelings = set()
        sizes = [len(g) for g in groups]
        for order in itertools.permutations(range(len(groups))):
            if [sizes[i] for i in order] != sizes:
                continue
            choices = []
            for target, origin in zip(groups, order, strict=True):
                k = int(s.claimed[groups[origin]].sum())
                choices.append(list(itertools.combinations(target.tolist(), k)))
            labelings |= {frozenset(itertools.chain(*pick)) for pick in itertools.product(*choices)}
        per_layer.append([sum(ranks[i] for i in labels) for labels in labelings])
    n = sum(int(s.claimed.sum()) for s in strata)
    return [sum(parts) / n for parts in itertools.product(*per_layer)]


@st.composite
def layers(draw) -> list[Stratum]:
    strata = []
    for _ in range(draw(st.integers(1, 2))):
        group_sizes = draw(st.lists(st.integers(1, 2), min_size=2, max_size=3))
        groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
        values = draw(st.lists(st.integers(0, 4), min_size=len(groups), max_size=len(groups)))
        claimed = draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))
        strata.append(stratum(values, claimed, groups))
    if not any(s.claimed.any() for s in strata):
        strata[0].claimed[0] = True
    return strata


@settings(max_examples=60, deadline=None)
@given(layers())
def test_the_exact_permutation_equals_enumeration_with_and_without_grouped_queries(strata) -> None:
    strata = [s for s in strata if s.claimed.any()]
    found = stratified_permutation(strata, seed=0)
    null = np.array(enumerated(strata))
    assert found.exact and found.labelings == len(null)
    assert found.p == pytest.approx((null >= found.statistic - 1e-12).mean())
    assert found.p_opposite == pytest.approx((null <= found.statistic + 1e-12).mean())
    assert found.min_p == pytest.approx((null >= null.max() - 1e-12).mean())
    assert found.null_mean == pytest.approx(null.mean()) and found.null_sd == pytest.approx(null.std())


def test_many_labelings_are_drawn_and_agree_with_the_exact_answer() -> None:
    rng = np.random.default_rng(0)
    strata = [stratum(rng.normal(size=12), np.arange(12) < 3) for _ in range(3)]
    drawn = stratified_permutation(strata, seed=1)
    assert not drawn.exact and drawn.labelings == 10_001
    assert drawn == stratified_permutation(strata, seed=1)
    other = stratified_permutation(strata, seed=2)
    assert drawn.p == pytest.approx(other.p, abs=0.03)
    assert drawn.null_mean == pytest.approx(0.5, abs=0.01)


def test_the_smallest_p_of_three_heads_in_one_layer_of_eight() -> None:
    best = stratified_permutation([stratum(range(8), [False] * 5 + [True] * 3)], seed=0)
    assert best.p == best.min_p == pytest.approx(1 / math.comb(8, 3))
    assert best.p_opposite == 1


def test_p_values_are_uniform_where_labels_are_exchangeable() -> None:
    """P(p <= a) <= a within its binomial interval for every attainable a."""
    rng = np.random.default_rng(0)
    n = 2000
    found = []
    for _ in range(n):
        labels = rng.permutation(8) < 3
        found.append(stratified_permutation([stratum(rng.normal(size=8), labels)], seed=0).p)
    found = np.array(found)
    for a in np.unique(found):
        assert (found <= a).mean() <= a + 3.5 * math.sqrt(a * (1 - a) / n) + 1e-12


def test_midranks_share_ties() -> None:
    assert midranks(np.array([5.0, 1.0, 5.0])).tolist() == [5, 2, 5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_benjamini_hochberg_is_its_definition(p) -> None:
    q = benjamini_hochberg(p)
    for value, found in zip(p, q, strict=True):
        wanted = min(1.0, min(x * len(p) / sum(y <= x for y in p) for x in p if x >= value))
        assert found == pytest.approx(wanted)


def test_effects_and_percentiles() -> None:
    assert within_layer_auc([stratum([1, 2, 3], [0, 0, 1]), stratum([3, 2], [0, 1])]) == pytest.approx(2 / 3)
    assert math.isnan(within_layer_auc([stratum([1.0], [1])]))
    assert percentile(2.0, np.array([1.0, 2.0, 3.0])) == 0.5
    assert robust_z(3.0, np.array([0.0, 1.0, 2.0])) == 2
    assert robust_z(2.0, np.ones(3)) is None
