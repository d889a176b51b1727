"""The four patterns of a head, each with planted values, and what a spread of energies is compared with."""

import dataclasses
import math

import numpy as np
import pytest

from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.patterns import head_patterns, iid_effective_rank

HEAD = (1, 2)
SHAPE = (48, 16)
"""d_model and d_head of the planted head."""


def row(metric: str, null: str = "depth", q: float = 0.01, testable: bool = True, **changes) -> NullTest:
    counts = null in ("depth", "spectrum", "token")
    plain = NullTest(
        "mover", HEAD, metric, "high", True, False, null, counts, value=0.7, percentile=0.9, effect=0.9, p=q,
        p_opposite=1.0, min_p=0.001 if testable else 0.125, n_null=7, exact=True, n_heads=1, n_others=7, quantiles=(),
        q=q,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def exploratory(metric: str, null: str, p: float, **changes) -> NullTest:
    return row(metric, null, math.nan, p=p, counts=False, exploratory=True, **changes)


def patterns(rows=(), rank90: float = 9, spread: float = 8, second: float = 0.5) -> dict:
    values = {name: np.full((3, 4), math.nan) for name in ("qk_rank90", "ov_effective_rank_energy")}
    values["qk_rank90"][HEAD], values["ov_effective_rank_energy"][HEAD] = rank90, spread
    return head_patterns(values, HEAD, SHAPE, second, list(rows))


@pytest.mark.parametrize(("rows", "aligned"), [
    ([row("ov_task_auc"), row("ov_task_auc", "spectrum")], True),
    ([row("ov_task_auc"), row("ov_task_auc", "spectrum", 0.2)], False),  # not under every null that counts
    ([row("ov_task_auc", q=0.05)], False),
    ([row("ov_task_auc", q=0.3), row("ov_task_copy")], True),  # a secondary one is enough
    ([row("ov_task_auc"), row("ov_task_auc", "token", 0.5, counts=False)], True),  # reported only
    ([row("ov_task_auc", "layer", counts=False)], False),  # nothing that decides
    ([row("ov_task_auc", testable=False, q=math.nan), row("ov_task_auc", "spectrum")], False),  # any trained head may
    ([row("ov_task_auc", testable=False, q=math.nan), row("ov_task_auc", "token")], True),
    ([row("ov_task_auc", testable=False, q=math.nan)], False),
    ([row("qk_task_auc")], False),
    ([exploratory("ov_copying_block0", "depth", 0.01), exploratory("ov_copying_block0", "spectrum", 0.01)], False),
    ([row("k_composition", "layer", counts=True)], False),  # a composition is of neither circuit
])  # fmt: skip
def test_ov_aligned_is_an_ov_prediction_that_holds_under_all_its_nulls(rows, aligned) -> None:
    assert patterns(rows)["ov_aligned"] is aligned


def test_what_holds_against_random_frames_alone_is_named_and_decides_no_pattern() -> None:
    found = patterns([row("ov_task_copy", "spectrum"), row("qk_task_auc")])
    assert (found["ov_aligned"], found["both_align"]) == (False, False)
    assert found["evidence"].startswith("holds: ov_task_copy (against spectrum alone), qk_task_auc;")


KEYS = "qk_key_alignment"


def keys(depth: float, frame: float) -> list[NullTest]:
    return [exploratory(KEYS, "depth", depth), exploratory(KEYS, "spectrum", frame)]


@pytest.mark.parametrize(("rows", "both"), [
    ([row("ov_task_auc"), row("qk_task_auc")], True),
    ([row("ov_task_auc"), row("qk_task_auc", q=0.06)], False),
    ([row("ov_task_auc")], False),
    ([row("qk_task_auc")], False),
    ([row("ov_task_auc"), *keys(0.04, 0.001)], False),  # exploratory: never decides
    ([row("ov_task_auc"), *keys(0.06, 0.001)], False),
    ([row("ov_task_auc"), *keys(0.04, 0.001), row("qk_task_auc")], True),
    ([row("ov_task_auc", q=0.2), row("ov_task_copy", q=0.2), row("qk_task_auc")], False),
])  # fmt: skip
def test_both_align_is_an_ov_and_a_qk_prediction_that_hold_and_exploratory_ones_are_only_named(rows, both) -> None:
    found = patterns(rows)
    assert found["both_align"] is both
    uncorrected = any(r.exploratory for r in rows) and all(r.p < 0.05 for r in rows if r.exploratory)
    assert ("qk_key_alignment (exploratory, uncorrected)" in found["evidence"]) == uncorrected
    assert "ov_task_auc (exploratory" not in found["evidence"]


@pytest.mark.parametrize(("rank90", "second", "simple"), [
    (4, 0.9, True), (4, 0.91, False), (5, 0.5, False), (1, 0.0, True), (4, math.nan, False), (0, math.nan, False),
])  # fmt: skip
def test_qk_simple_is_few_components_and_a_first_one_that_stands_alone(rank90, second, simple) -> None:
    """Of d_head 16: four at most; and the second at least 10 % below the first."""
    assert patterns(rank90=rank90, second=second)["qk_simple"] is simple


def test_ov_flat_is_a_spread_that_random_weights_of_the_shape_have() -> None:
    least = iid_effective_rank(*SHAPE)
    assert patterns(spread=least)["ov_flat"] is True
    assert patterns(spread=least - 1e-6)["ov_flat"] is False
    assert f"OV: effective rank of energies 8.0, random weights {least:.1f} or more" in patterns()["evidence"]


def test_a_random_head_is_flat_in_19_of_20_cases_and_one_of_few_components_never() -> None:
    rng = np.random.default_rng(5)
    energies = [np.linalg.svd(rng.normal(size=(48, 16)) @ rng.normal(size=(16, 48)), compute_uv=False)[:16] ** 2
                for _ in range(400)]  # fmt: skip
    flat = np.mean([patterns(spread=spread(energy))["ov_flat"] for energy in energies])
    assert abs(flat - 0.95) < 0.04
    assert patterns(spread=spread(np.array([1.0] * 4 + [1e-9] * 12)))["ov_flat"] is False


def test_patterns_of_what_was_not_taken_apart_are_unknown_and_not_false() -> None:
    held = [row("ov_task_auc"), row("qk_task_auc")]
    assert {patterns([])[name] for name in ("ov_aligned", "both_align")} == {None}
    without_qk = patterns([row("ov_task_auc")], rank90=math.nan, second=math.nan)
    assert (without_qk["ov_aligned"], without_qk["qk_simple"], without_qk["both_align"]) == (True, None, None)
    assert "QK:" not in without_qk["evidence"]
    without_ov = patterns([row("qk_task_auc")], spread=math.nan)
    assert (without_ov["ov_aligned"], without_ov["ov_flat"], without_ov["both_align"]) == (None, None, None)
    assert "OV:" not in without_ov["evidence"]
    nothing = patterns([], rank90=math.nan, spread=math.nan)
    assert nothing == {**dict.fromkeys(("ov_aligned", "qk_simple", "ov_flat", "both_align")), "evidence": ""}
    everything = patterns(held, rank90=2, spread=15)
    assert [everything[name] for name in ("ov_aligned", "qk_simple", "ov_flat", "both_align")] == [True] * 4


def spread(energy: np.ndarray) -> float:
    share = energy / energy.sum()
    return math.exp(-(share * np.log(share)).sum())


@pytest.mark.parametrize(("d_model", "d_head"), [(48, 16), (24, 4), (16, 16), (6, 10), (40, 1)])
def test_the_effective_rank_of_random_weights_is_that_of_gaussian_products(d_model, d_head) -> None:
    """Its 5th percentile, against products drawn whole: within what 400 draws on its side and 2,000 on ours allow."""
    rng = np.random.default_rng(1)
    k = min(d_model, d_head)
    drawn = []
    for _ in range(2000):
        M = rng.normal(size=(d_model, d_head)) @ rng.normal(size=(d_head, d_model))
        drawn.append(spread(np.linalg.svd(M, compute_uv=False)[:k] ** 2))
    found = iid_effective_rank(d_model, d_head)
    if d_head == 1:
        assert found == pytest.approx(1)
        return
    low, high = np.quantile(drawn, [0.02, 0.09])  # 4 standard errors of a 5th percentile of 400
    assert low < found < high
    assert found == iid_effective_rank(d_model, d_head)
