"""Fitted tails: right for known tails, never zero, counted if draws suffice, and refused if they do not fit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.verdicts.tails import ENOUGH, LEAST, TAIL, tail_p

N = 999


def normal(seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


@pytest.mark.parametrize(
    ("draw", "quantile"),
    [
        (lambda g: g.exponential(size=N), lambda p: -math.log(p)),
        (lambda g: g.pareto(4, size=N), lambda p: p**-0.25 - 1),  # shape 1/4
    ],
    ids=["exponential", "pareto"],
)
def test_a_tail_that_is_generalised_pareto_gives_its_own_p(draw, quantile) -> None:
    """Oracle: the distribution's own quantile at p = 1e-5, a hundred times below what 999 draws can count."""
    found = [tail_p(quantile(1e-5), draw(np.random.default_rng(seed))) for seed in range(100)]
    fitted = [tail.p for tail in found if not math.isnan(tail.p)]
    assert len(fitted) > 85
    assert 0.2e-5 < np.exp(np.median(np.log(fitted))) < 5e-5


def test_p_errs_to_the_safe_side_for_tails_that_fall_faster() -> None:
    """Normal draws: 5.2 has 1e-7; an exponential tail or a heavier one can only say more."""
    found = [tail_p(5.2, normal(seed)).p for seed in range(60)]
    assert np.nanmin(found) > 1e-7 and np.nanmedian(found) < 1e-3


def test_the_level_is_kept_beyond_what_the_draws_can_count() -> None:
    """Values drawn like the null: P(p <= 0.001) is 0.001, of 20,000 values against fitted tails."""
    hits = total = 0
    for seed in range(40):
        draws, values = normal(seed), normal(1000 + seed, 500)
        for value in values[values > np.quantile(draws, 0.98)]:
            hits += tail_p(value, draws).p <= 0.001
        total += len(values)
    assert hits / total < 0.002


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_and_place_change_nothing_and_p_falls_with_the_value(seed: int, scale: float, shift: float) -> None:
    draws, values = normal(seed), np.array([0.5, 1.5, 2.5, 4.0, 6.0, 20.0])
    found = [tail_p(value, draws) for value in values]
    for value, tail in zip(values, found, strict=True):
        moved = tail_p(scale * value + shift, scale * draws + shift)
        assert moved.p == pytest.approx(tail.p, rel=1e-6, nan_ok=True)
    ps = [tail.p for tail in found if not math.isnan(tail.p)]
    assert ps == sorted(ps, reverse=True) and min(ps) > 0 and max(ps) <= 1


def test_a_value_that_draws_exceed_often_enough_is_counted() -> None:
    draws = np.arange(N, dtype=float)
    tail = tail_p(float(N - ENOUGH), draws)
    assert tail.p == (1 + ENOUGH) / (1 + N) and tail.n == 0 and math.isnan(tail.fit)


def test_a_tail_in_two_pieces_is_refused() -> None:
    """A gap in the tail: nothing is said about what lies beyond it."""
    draws = np.concatenate([normal(0, 890), np.full(108, 50.0) + 0.01 * normal(1, 108)])
    tail = tail_p(200.0, draws)
    assert math.isnan(tail.p) and tail.fit <= 0.05


def test_few_draws_have_no_tail() -> None:
    n = int(LEAST / TAIL) - 10
    assert math.isnan(tail_p(9.0, normal(0, n)).p)
    assert math.isnan(tail_p(9.0, np.zeros(N)).p)
