"""Heads that have a role on prompts beside heads that have none: what is compared, with whom, and how often it errs."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.activations.effects import Effects, Patch
from ovqk.activations.joint import role_verdict
from ovqk.activations.judge import Judged, judge_activations
from ovqk.activations.peers import compared, grids, head_peers, role_peers, standing
from ovqk.activations.quantities import Observed, RoleValues
from ovqk.activations.roles import Measured
from ovqk.config.schema import AttentionConfig, EffectConfig, RoleActivationsConfig, WriteConfig

MOVING = RoleActivationsConfig(
    AttentionConfig("END", "IO", "OTHER"), WriteConfig(sign=-1), EffectConfig(), ["attention", "write", "effect"]
)


# --- what is compared ----------------------------------------------------------------------------------------


def test_attention_is_compared_less_its_control_and_a_write_by_its_sign_and_effects_are_not() -> None:
    assert compared(MOVING) == ["attention", "write"]
    rows = pd.DataFrame(
        {"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "attention": [0.5, 0.4, 0.9, 0.1],
         "attention_control": [0.1, 0.3, 0.9, 0.0], "write": [1.0, -2.0, math.nan, 4.0]}
    )  # fmt: skip
    np.testing.assert_allclose(standing(MOVING, "attention", rows), [0.4, 0.1, 0.0, 0.1])
    found = grids(MOVING, rows)
    assert list(found) == ["attention", "write"]
    np.testing.assert_allclose(found["write"], [[-1.0, 2.0], [math.nan, -4.0]])
    assert list(grids(MOVING, rows.drop(columns="write"))) == ["attention"]


# --- a head --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), shared=st.sampled_from([1, 2, 4]))
def test_a_head_counts_kv_groups_and_not_heads(seed: int, shared: int) -> None:
    """Two layers of 8 groups, the head far above all others: p is one of as many as there are free groups."""
    values = np.random.default_rng(seed).normal(size=(2, 8 * shared))
    values[1, 0] = 100.0
    groups = np.arange(8 * shared) // shared
    barred = {(1, 0), (0, 3)}
    found = head_peers({"attention": values}, (1, 0), barred, groups)["attention"]
    free = {(layer, int(groups[head])) for layer in (0, 1) for head in range(8 * shared) if (layer, head) not in barred}
    assert found.p == found.min_p == pytest.approx(1 / (1 + len(free)))
    assert found.effect == 1


def test_a_head_without_a_value_or_without_others_is_not_compared() -> None:
    values = np.array([[math.nan, 1.0, 2.0]])
    assert head_peers({"write": values}, (0, 0), set(), np.arange(3)) == {}
    assert head_peers({"write": values}, (0, 1), {(0, 2)}, np.arange(3)) == {}


# --- a role --------------------------------------------------------------------------------------------------


def labelings(groups: np.ndarray, has: np.ndarray) -> set[tuple[int, ...]]:
    """Every labeling of one layer: groups of a size trade their numbers of heads, and heads trade within a group."""
    names = np.unique(groups)
    sizes, counts = ([int(f(groups == name)) for name in names] for f in (np.sum, lambda own: has[own].sum()))
    found = set()
    for order in itertools.permutations(range(len(names))):
        if any(sizes[i] != sizes[j] for i, j in enumerate(order)):
            continue
        chosen = [
            itertools.combinations(np.flatnonzero(groups == name).tolist(), counts[j])
            for name, j in zip(names, order, strict=True)
        ]
        found |= {tuple(sorted(itertools.chain(*some))) for some in itertools.product(*chosen)}
    return found


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_a_roles_p_is_the_share_of_labelings_that_keep_kv_groups_together(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    values = rng.integers(0, 4, (1, 8)).astype(float) if ties else rng.normal(size=(1, 8))
    has = np.zeros(8, bool)
    has[rng.choice(8, 3, replace=False)] = True
    found = role_peers({"write": values}, [(0, int(head)) for head in np.flatnonzero(has)], set(), groups, 0)
    ranks = pd.Series(values[0]).rank().to_numpy()
    sums = [ranks[list(some)].sum() for some in labelings(groups, has)]
    if found.null == "layer":
        assert found.p == pytest.approx(np.mean([each >= ranks[has].sum() - 1e-9 for each in sums]))
        assert found.min_p == pytest.approx(np.mean([each >= max(sums) - 1e-9 for each in sums]))
    else:  # too few labelings for the level: the window is the same layer, and can do no more
        assert found.min_p > 0.05


def test_a_role_is_compared_with_nearby_layers_where_its_own_are_too_few() -> None:
    values = np.random.default_rng(0).normal(size=(20, 3))
    values[10, 1] = 9.0
    found = role_peers({"attention": values}, [(10, 1)], set(), np.arange(3), 0)
    assert found.null == "depth" and found.p == found.min_p < 0.05 and not found.outdone
    values[10, 1] = -9.0
    assert role_peers({"attention": values}, [(10, 1)], set(), np.arange(3), 0).outdone
    assert math.isnan(role_peers({"attention": values}, [], set(), np.arange(3), 0).p)
    few = role_peers({"attention": values[:1]}, [(0, 0)], set(), np.arange(3), 0)
    assert few.min_p > 0.05 and not few.outdone


def test_a_role_of_one_head_stands_out_as_its_head_does() -> None:
    """In layers of 24 heads its labels alone could decide, and might say otherwise."""
    rng, groups = np.random.default_rng(4), np.arange(24)
    values = {"attention": rng.normal(size=(6, 24)), "write": rng.normal(size=(6, 24))}
    for head in ((3, 1), (0, 5), (5, 23)):
        found = role_peers(values, [head], {(3, 2)}, groups, 0)
        beside = head_peers(values, head, {(3, 2), head}, groups).values()
        assert len(beside) == 2 and (found.null, found.p) == ("depth", max(test.p for test in beside))


def test_the_quantity_in_which_a_role_stands_out_least_decides() -> None:
    rng = np.random.default_rng(1)
    high, middle = rng.normal(size=(2, 16)), rng.normal(size=(2, 16))
    high[1, :3] = 9.0
    found = {"attention": high, "write": middle}
    p = {
        name: role_peers({name: grid}, [(1, 0), (1, 1), (1, 2)], set(), np.arange(16), 0).p
        for name, grid in found.items()
    }
    both = role_peers(found, [(1, 0), (1, 1), (1, 2)], set(), np.arange(16), 0)
    assert both.p == max(p.values()) > min(p.values())


# --- level and power -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [16, 4])
def test_claims_at_random_stand_out_as_seldom_as_the_level_says_and_planted_heads_do(kv_heads: int) -> None:
    """Heads that share keys and values are alike, layers differ; planted heads are 4 sd higher."""
    rng, groups = np.random.default_rng(0), np.arange(16) // (16 // kv_heads)
    p = {"head": [], "role": [], "planted head": [], "planted role": []}
    for _ in range(200):
        layers = np.cumsum(rng.normal(size=(6, 1)), 0)
        shared, own = rng.normal(size=(6, kv_heads)), rng.normal(size=(6, 16))
        grid = layers + np.sqrt(0.7) * shared[:, groups] + np.sqrt(0.3) * own
        drawn = rng.choice(16, 3, replace=False)
        heads = [(4, int(head)) for head in drawn]
        for name, values in (("", grid), ("planted ", grid.copy())):
            if name:
                values[4, drawn] += 4.0
            p[f"{name}head"].append(head_peers({"write": values}, heads[0], set(heads), groups)["write"].p)
            p[f"{name}role"].append(role_peers({"write": values}, heads, set(), groups, 0).p)
    shares = {name: float((np.array(found) <= 0.05).mean()) for name, found in p.items()}
    assert shares["head"] < 0.096 and shares["role"] < 0.096  # 0.05 and three standard errors
    assert shares["planted head"] > 0.7 and shares["planted role"] > 0.7


# --- verdicts ------------------------------------------------------------------------------------------------

N, LAYERS = 24, 2


def judged(stronger: float, claimed: bool, heads: int = 24) -> Judged:
    """A model in which 1.0 moves, and 1.1 to 1.3 move `stronger` times as much; their effects are measured alike."""
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> torch.Tensor:
        return scale * torch.rand((N, LAYERS, heads), generator=generator)

    attention, write = drawn(0.02), -drawn(0.02)
    attention[:, 1, 0], write[:, 1, 0] = 0.3, -1.0
    more = stronger * torch.tensor([1.0, 1.01, 1.02])
    attention[:, 1, 1:4], write[:, 1, 1:4] = 0.3 * more, -more
    zero = torch.zeros((N, LAYERS, heads))
    observed = Observed(
        clusters=torch.arange(12).repeat_interleave(2), testing=torch.arange(N) >= N // 2,
        difference=torch.full((N,), 4.0), counterfactual_difference=torch.zeros(N), templates=["t"] * N,
        roles={"mover": RoleValues(attention, zero, zero, zero, write, zero, zero)}, looks={}, outputs=[],
    )  # fmt: skip
    less = torch.full((N,), 3.0)
    effects = {Patch((1, head), "END"): Effects(less, less, torch.ones(N), {}, {}) for head in range(4)}
    measured = Measured(observed, {"mover": MOVING}, effects, {}, 0, np.arange(heads))
    return judge_activations(measured, {"mover": [(1, 0)]} if claimed else {}, None)


def test_unclaimed_heads_that_do_more_count_against_a_claim_and_not_against_heads_chosen_with_them() -> None:
    found = judged(2.0, claimed=True)
    verdicts = found.roles.set_index("head")["verdict"].to_dict()
    assert verdicts == {0: "partial", 1: "realised", 2: "realised", 3: "realised"}
    assert found.roles.set_index("head").at[0, "reason"] == "other heads show as much attention and write"
    assert found.peers["mover"].outdone and role_verdict(["realised"], found.peers["mover"].outdone) == "partial"
    assert set(judged(2.0, claimed=False).roles["verdict"]) == {"realised"}
    assert set(judged(0.5, claimed=True).roles["verdict"]) == {"realised"}
    assert not judged(0.5, claimed=True).peers["mover"].outdone


def test_a_head_with_too_few_others_beside_it_says_so() -> None:
    found = judged(2.0, claimed=True, heads=6)
    assert found.roles.set_index("head").at[0, "verdict"] == "realised"
    assert found.roles.set_index("head").at[0, "reason"] == "too few heads beside it to compare it with"
    assert found.roles["attention_peers_min_p"].min() > 0.05 and not found.peers["mover"].outdone
    assert set(judged(0.5, claimed=True).roles["reason"]) == {""}
