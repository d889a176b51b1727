"""Tests by flipping clusters' signs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.activations.clusters import DRAWS, flip_signs


def test_every_flip_is_tried_where_they_are_few() -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.normal((0.0, 0.5, -1.0), size=(30, 3)), np.repeat(np.arange(6), 5)
    test = flip_signs(values, clusters, seed=0)
    means = np.array([values[clusters == c].mean(0) for c in range(6)])

    def studentised(x: np.ndarray) -> np.ndarray:
        return x.mean(0) / (x.std(0, ddof=1) / np.sqrt(6))

    flips = [studentised(means * np.array(signs)[:, None]) for signs in itertools.product((1, -1), repeat=6)]
    expected = (np.array(flips) >= studentised(means) - 1e-9).mean(0)
    np.testing.assert_allclose(test.p, expected)
    np.testing.assert_allclose(test.mean, means.mean(0))
    np.testing.assert_allclose(test.se, means.std(0, ddof=1) / np.sqrt(6))
    assert test.min_p == 1 / 64


def test_clusters_and_not_prompts_are_counted() -> None:
    """A thousand prompts of two templates are two observations."""
    values = np.ones((1000, 1)) + np.random.default_rng(0).normal(size=(1000, 1)) / 100
    assert flip_signs(values, np.repeat([0, 1], 500), seed=0).p[0] == 0.25


def test_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(12), 4)
    shared = rng.normal(size=(12, 4000))  # clusters differ, and mean nothing
    values = np.repeat(shared, 4, axis=0) + rng.normal(size=(48, 4000))
    p = flip_signs(values, clusters, seed=0).p
    for level in (0.01, 0.05, 0.2):
        assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 4000) + 1 / 4096


def test_many_clusters_are_drawn_and_the_observed_flip_is_among_them() -> None:
    values = np.ones((40, 1))
    test = flip_signs(values, np.arange(40), seed=3)
    assert test.p[0] == test.min_p == 1 / DRAWS


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_scale_order_and_sign(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    values, clusters = rng.normal(size=(4 * n, 2)), np.repeat(np.arange(n), 4)
    test = flip_signs(values, clusters, 0)
    order = rng.permutation(4 * n)
    again = flip_signs(3 * values[order], clusters[order] + 7, 0)
    np.testing.assert_allclose(again.p, test.p)
    np.testing.assert_allclose(again.mean, 3 * test.mean)
    opposite = flip_signs(-values, clusters, 0)
    np.testing.assert_allclose(opposite.p, test.p_opposite)
    assert (test.p >= test.min_p).all() and (test.p + test.p_opposite >= 1).all()


def test_what_is_missing_is_left_out() -> None:
    values = np.array([[1.0, np.nan, 2.0], [1.0, np.nan, np.nan], [1.0, np.nan, 2.0]])
    test = flip_signs(values, np.array([0, 1, 2]), 0)
    assert np.isnan(test.mean[1]) and np.isnan(test.p[1]) and np.isnan(test.quartiles[:, 1]).all()
    assert test.mean[2] == 2 and test.min_p == 0.25  # two clusters are left


@pytest.mark.parametrize("n", [0, 1])
def test_one_cluster_tests_nothing(n: int) -> None:
    test = flip_signs(np.ones((n, 2)), np.zeros(n, dtype=np.int64), 0)
    assert np.isnan(test.p).all() and test.min_p == 1
