"""The null `depth`: its window, its trend, planted heads under grouped queries, and labels permuted over a pool."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.testing.null_models import SURPRISE, least_likely
from ovqk.verdicts.depth import WINDOW, depth_pool, depth_reference, depth_references, over_depth
from ovqk.verdicts.statistics import Stratum, pooled_permutation, stratified_permutation

SHAPES = [(30, 1, 4), (30, 2, 4), (30, 3, 3), (12, 8, 2), (6, 24, 1)]
"""Layers, KV groups of a layer, heads of a group."""


def grouped(n_groups: int, each: int) -> np.ndarray:
    return np.arange(n_groups * each) // each


def grid(rng: np.random.Generator, layers: int, n_groups: int, each: int, shared: float = 0.9) -> np.ndarray:
    """Values of heads, most of whose variance is their group's."""
    of_group = rng.normal(size=(layers, n_groups, 1)) * shared**0.5
    return (of_group + (1 - shared) ** 0.5 * rng.normal(size=(layers, n_groups, each))).reshape(layers, -1)


# --- the window ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [0, 3, -1])
def test_the_window_is_the_smallest_that_holds_forty_groups_of_unclaimed_heads(shape, layer) -> None:
    layers, n_groups, each = shape
    values, at = grid(np.random.default_rng(0), *shape), range(layers)[layer]
    barred = {(at, head) for head in range(each)}  # the first group of the layer is claimed
    found = depth_reference(values, (at, 0), barred, grouped(n_groups, each))
    assert found is not None
    for radius in range(layers):  # by hand
        window = [other for other in range(layers) if abs(other - at) <= radius]
        n = len(window) * n_groups - 1
        if n >= WINDOW or len(window) == layers:
            break
    assert sorted(set(found.layers.tolist())) == [x for x in window if n_groups > 1 or x != at]
    assert found.counts().n_null == n and found.counts().min_p == 1 / (1 + n)


def test_a_model_with_forty_groups_can_always_decide() -> None:
    for layers, n_groups, each in SHAPES:
        if layers * n_groups > WINDOW:
            values = grid(np.random.default_rng(0), layers, n_groups, each)
            found = depth_reference(values, (layers - 1, 0), set(), grouped(n_groups, each))
            assert found is not None and found.counts().min_p <= 1 / (1 + WINDOW)


# --- the trend -----------------------------------------------------------------------------------------------


def test_a_line_over_depth_and_a_spread_that_grows_are_taken_off() -> None:
    """The z of a model whose layers follow a line, with a spread of their own, is that of the model without both."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(24, 12))
    layers, groups = np.repeat(np.arange(24), 12), np.arange(24 * 12)
    plain = over_depth(noise.flatten(), layers, groups)
    lined = over_depth((5 * np.arange(24)[:, None] + noise).flatten(), layers, groups)
    assert plain is not None and lined is not None
    assert np.corrcoef(plain, lined)[0, 1] > 0.99
    grown = over_depth((np.geomspace(1, 100, 24)[:, None] * noise).flatten(), layers, groups)
    assert grown is not None
    spread = [np.median(np.abs(grown[layers == at])) for at in (0, 12, 23)]
    assert max(spread) / min(spread) < 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_place_and_the_numbering_of_groups_change_nothing(seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    values, groups = grid(rng, 20, 3, 3), grouped(3, 3)
    head = (int(rng.integers(20)), int(rng.integers(9)))
    found = depth_reference(values, head, set(), groups)
    moved = depth_reference(scale * values + shift, head, set(), groups)
    order = rng.permutation(3)
    columns = np.concatenate([np.flatnonzero(groups == group) for group in order])
    renumbered = depth_reference(
        values[:, columns], (head[0], int(np.flatnonzero(columns == head[1])[0])), set(), groups
    )
    assert found is not None and moved is not None and renumbered is not None
    assert moved.z == pytest.approx(found.z, rel=1e-6, abs=1e-9)
    assert renumbered.counts().p == pytest.approx(found.counts().p)


def test_without_spread_there_is_no_reference() -> None:
    assert depth_reference(np.ones((4, 8)), (0, 0), set(), np.arange(8)) is None
    assert depth_reference(np.full((1, 2), np.nan), (0, 0), set(), np.arange(2)) is None
    assert depth_pool(np.ones((4, 8)), [(0, 0)], set(), np.arange(8)) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.floats(0, 1))
def test_all_heads_at_once_are_compared_as_each_alone(seed: int, shape: tuple[int, int, int], there: float) -> None:
    rng, groups = np.random.default_rng(seed), grouped(*shape[1:])
    values = grid(rng, *shape)
    values[rng.random(values.shape) > there] = np.nan
    found = depth_references(values, groups)
    for layer, index in np.argwhere(~np.isnan(values)).tolist():
        alone = depth_reference(values, (layer, index), set(), groups)
        assert (alone is None) == ((layer, index) not in found)
        if alone is None:
            continue
        together = found[layer, index]
        assert together.z == pytest.approx(alone.z, rel=1e-9, abs=1e-9) and together.counts().p == alone.counts().p
        assert together.reference == pytest.approx(alone.reference, rel=1e-9, abs=1e-9)
        assert (together.layers == alone.layers).all() and (together.groups == alone.groups).all()


# --- level and power under grouped queries --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [0, -1])
def test_the_level_is_kept_at_the_ends_of_the_model_with_a_trend(shape, layer) -> None:
    layers, n_groups, each = shape
    rng, at = np.random.default_rng(1), range(layers)[layer]
    ps = []
    for _ in range(250):
        values = grid(rng, *shape) + np.linspace(0, 4, layers)[:, None]
        found = depth_reference(values, (at, 0), {(at, head) for head in range(each)}, grouped(n_groups, each))
        assert found is not None
        ps.append(found.counts())
    for p in ([one.p for one in ps], [one.p_opposite for one in ps]):
        a, share, probability = least_likely(np.array(p))
        assert probability > SURPRISE, f"P(p <= {a:.3g}) = {share:.3g}, {probability:.1e}"


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] > WINDOW], ids=str)
def test_a_head_planted_far_out_is_significant_under_any_number_of_groups(shape) -> None:
    layers, n_groups, each = shape
    rng, hits = np.random.default_rng(2), 0
    for _ in range(20):
        values = grid(rng, *shape)
        values[layers // 2, 0] += 8
        found = depth_reference(values, (layers // 2, 0), {(layers // 2, 0)}, grouped(n_groups, each))
        hits += found is not None and found.counts().p <= 0.05
    assert hits >= 19


# --- a role's labels over the pool -----------------------------------------------------------------------------


def test_five_of_nine_heads_of_one_layer_can_be_significant() -> None:
    """What `layer` cannot reach: five of nine heads in three groups, all on top, have p = 1/10 there at best."""
    rng, groups = np.random.default_rng(3), grouped(3, 3)
    values = grid(rng, 30, 3, 3, shared=0.3)
    role = [(23, 0), (23, 1), (23, 2), (23, 3), (23, 4)]
    for head in role:
        values[head] += 4
    alone = Stratum(values[23], np.array([h < 5 for h in range(9)]), groups)
    assert stratified_permutation([alone], 0).min_p > 0.05
    pool = depth_pool(values, role, set(), groups)
    assert pool is not None and pooled_permutation(pool, 0).p < 0.01
    assert int(pool.claimed.sum()) == 5 and len(np.unique(pool.groups)) >= WINDOW


def test_small_pools_are_counted_and_large_ones_drawn_and_they_agree() -> None:
    rng = np.random.default_rng(4)
    small = Stratum(rng.normal(size=8), np.arange(8) < 3, grouped(4, 2))
    exact = pooled_permutation(small, 0)
    scores, sums = np.argsort(np.argsort(small.values)), []
    for both, one in itertools.permutations(range(4), 2):  # group 0 gives two labels, group 1 one
        for single in range(2):
            sums.append(scores[2 * both : 2 * both + 2].sum() + scores[2 * one + single])
    assert exact.exact and exact.p == pytest.approx(np.mean(np.array(sums) >= scores[:3].sum()))
    large = Stratum(rng.normal(size=120), np.isin(np.arange(120), (0, 1, 5, 9, 11)), grouped(40, 3))
    drawn, counted = pooled_permutation(large, 0), stratified_permutation([large], 1)
    assert not drawn.exact and drawn.p == pytest.approx(counted.p, abs=0.02)
    assert drawn.null_mean == pytest.approx(counted.null_mean, abs=0.005)
    assert drawn.null_sd == pytest.approx(counted.null_sd, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("each", [1, 3])
def test_labels_at_random_keep_the_level(each: int) -> None:
    rng, ps = np.random.default_rng(5), []
    for _ in range(200):
        values = grid(rng, 20, 3, each) + np.linspace(0, 3, 20)[:, None]
        role = [(int(layer), int(rng.integers(3 * each))) for layer in rng.choice(20, 4, replace=False)]
        pool = depth_pool(values, role, set(), grouped(3, each))
        assert pool is not None
        ps.append(pooled_permutation(pool, 0).p)
    assert least_likely(np.array(ps))[2] > SURPRISE
