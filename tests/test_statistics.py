"""Permutation p-values against enumeration, corrections against their definition, calibration under exchangeability."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.verdicts.statistics import (
    EXCEEDANCES,
    Stratum,
    benjamini_hochberg,
    group_auc,
    midranks,
    monte_carlo,
    percentile,
    stratified_permutation,
    within_layer_auc,
    within_layer_auc_interval,
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


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=8))
def test_without_grouped_queries_groups_are_heads(heads) -> None:
    one = stratum([value for value, _ in heads], [claimed for _, claimed in heads])
    assert group_auc([one]) == pytest.approx(within_layer_auc([one]), nan_ok=True)


def test_groups_are_compared_by_their_means_and_one_claimed_head_claims_its_group() -> None:
    two = stratum([1, 9, 4, 4, 0, 2], [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])  # means 5, 4, 1
    assert group_auc([two]) == 1.0 and within_layer_auc([two]) == 1.0
    low = stratum([9, 0, 5, 5, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])  # means 4.5, 5, 1
    assert group_auc([low]) == 0.5 and within_layer_auc([low]) == 1.0
    assert group_auc([two, low]) == 0.75
    assert math.isnan(group_auc([stratum([1, 2], [1, 0], [0, 0])]))


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


# --- random draws ----------------------------------------------------------------------------------------------------


def one_by_one(observed: float, draws) -> tuple[float, int, bool]:
    """p, the draws it was counted on, and whether it stopped: as a person would do it."""
    exceeding = n = 0
    for draw in draws:
        n += 1
        exceeding += draw >= observed
        if exceeding == 20:
            return 21 / (n + 1), n, True
    return (1 + exceeding) / (1 + n), n, False


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=90))
def test_monte_carlo_counts_one_by_one_up_to_the_20th_exceedance(observed, draws) -> None:
    found = monte_carlo(float(observed), np.array(draws, dtype=float))
    p, n, stopped = one_by_one(observed, draws)
    opposite, _, stopped_opposite = one_by_one(-observed, [-draw for draw in draws])
    assert (found.p, found.n, found.p_opposite) == (p, n, opposite)
    assert found.stopped == (stopped and stopped_opposite)


def test_a_test_stops_at_the_20th_exceedance_and_not_at_the_19th_or_21st() -> None:
    draws = np.zeros(100)
    draws[10:29] = 1  # 19 of them
    found = monte_carlo(1.0, draws)
    assert (found.p, found.n) == (pytest.approx(20 / 101), 100)
    draws[40] = 1  # the 20th, as draw 41
    draws[60] = 1
    found = monte_carlo(1.0, draws)
    assert (found.p, found.n, EXCEEDANCES) == (pytest.approx(21 / 42), 41, 20)
    assert found.p_opposite == pytest.approx(21 / 21) and found.stopped


def test_more_draws_change_nothing_once_a_test_has_stopped() -> None:
    draws = np.random.default_rng(0).normal(size=999)
    first = monte_carlo(0.1, draws[:100])
    assert first.stopped and first == monte_carlo(0.1, draws)


def test_ties_count_against_the_claim_rounding_included() -> None:
    assert monte_carlo(0.5, np.full(9, 0.5)).p == monte_carlo(0.5, np.full(9, 0.5)).p_opposite == 1
    assert monte_carlo(0.1 + 0.2, np.full(9, 0.3)).p == monte_carlo(0.3, np.full(9, 0.1 + 0.2)).p == 1
    assert monte_carlo(0.5, np.full(9, 0.5 - 1e-9)).p == pytest.approx(1 / 10)


@pytest.mark.parametrize(("draw", "p", "opposite"), [(1.0, 1, 0.5), (-1.0, 0.5, 1), (0.0, 1, 1)])
def test_one_draw_is_half_a_test(draw, p, opposite) -> None:
    found = monte_carlo(0.0, np.array([draw]))
    assert (found.p, found.p_opposite, found.n, found.stopped) == (p, opposite, 1, False)


def test_sequential_p_values_are_valid_where_the_observed_is_one_of_the_draws() -> None:
    """P(p <= a) <= a for every attainable a, within its binomial interval, in either direction."""
    rng = np.random.default_rng(3)
    n = 1500
    tests = [monte_carlo(values[0], values[1:]) for values in rng.normal(size=(n, 60))]
    for found in (np.array([test.p for test in tests]), np.array([test.p_opposite for test in tests])):
        for a in np.unique(found):
            assert (found <= a).mean() <= a + 3.5 * math.sqrt(a * (1 - a) / n) + 1e-12
        assert (found <= 0.2).mean() > 0.15  # and no more careful than that


# --- values that differ by rounding ----------------------------------------------------------------------------------

THIRD = 0.1 + 0.2, 0.3
"""One number, summed in two orders."""


def test_numbers_that_differ_by_rounding_are_equal() -> None:
    assert THIRD[0] != THIRD[1]
    assert midranks(np.array([*THIRD, 0.0])).tolist() == [5, 5, 2]
    assert percentile(THIRD[0], np.array([THIRD[1]])) == percentile(THIRD[1], np.array([THIRD[0]])) == 0.5
    assert within_layer_auc([stratum(THIRD, [1, 0])]) == within_layer_auc([stratum(THIRD, [0, 1])]) == 0.5


def test_the_interval_of_an_effect_is_of_the_effect_in_every_resample() -> None:
    rng = np.random.default_rng(0)
    strata = [stratum([3, 1, 2, 0], [1, 0, 0, 0]), stratum([1, 5, 2], [0, 1, 1])]
    drawn = [rng.integers(0, 4, size=(300, 4)) / 3, rng.integers(0, 4, size=(300, 3)) / 3]
    effects = [
        within_layer_auc([Stratum(values[i], s.claimed, s.groups) for s, values in zip(strata, drawn, strict=True)])
        for i in range(300)
    ]
    assert within_layer_auc_interval(strata, drawn) == pytest.approx(tuple(np.quantile(effects, (0.025, 0.975))))
    noisy = [values + 1e-15 * rng.normal(size=values.shape) for values in drawn]
    assert within_layer_auc_interval(strata, noisy) == pytest.approx(within_layer_auc_interval(strata, drawn))
    alone = [stratum([1.0, 2.0], [1, 1])]
    assert all(math.isnan(end) for end in within_layer_auc_interval(alone, [np.ones((3, 2))]))
