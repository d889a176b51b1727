"""What counts as an effect: on the logit difference, into receivers, and given that others are replaced."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovqk.activations import joint
from ovqk.activations.effects import Effects, Patch
from ovqk.activations.joint import auc_in_layers, reading, role_verdict
from ovqk.activations.judge import judge_activations
from ovqk.activations.quantities import Observed, RoleValues
from ovqk.activations.roles import Measured
from ovqk.config.schema import AttentionConfig, EffectConfig, RoleActivationsConfig, WriteConfig
from ovqk.wording import ON_PROMPTS, READINGS

N, LAYERS, HEADS = 24, 2, 3
LOOK = ("END", "IO", "OTHER")


def values(per_head: float = 0.0) -> torch.Tensor:
    return torch.full((N, LAYERS, HEADS), per_head)


def effects(lost: float, mean: float | None = None, look: float = 0.0, restored: float = 0.0) -> Effects:
    """A replacement that takes away `lost` logits of 4, and receivers' attention down to `look`."""
    seen = {LOOK: values(look)}
    return Effects(
        torch.full((N,), 4 - lost), torch.full((N,), 4 - (lost if mean is None else mean)), torch.full((N,), restored),
        seen, seen,
    )  # fmt: skip


def measured(**found: object) -> Measured:
    """A model of six heads: 1.0 moves, 0.1 serves it, 1.1 stands by."""
    attention = values(0.1)
    attention[:, 1, 0], attention[:, 1, 1] = 0.6, 0.5
    write = values(0.0)
    write[:, 1, 0] = 2.0
    moving = RoleActivationsConfig(
        AttentionConfig("END", "IO", "OTHER"), WriteConfig(), EffectConfig(), ["attention", "write", "effect"]
    )
    serving = RoleActivationsConfig(AttentionConfig("END", "S2", "OTHER"), None, EffectConfig(into="mover"), ["effect"])
    backing = RoleActivationsConfig(
        AttentionConfig("END", "IO", "OTHER"), None, EffectConfig(given="mover"), ["effect"]
    )
    seen = RoleValues(attention, values(0.1), values(0.2), values(0.05), write, values(), values())
    observed = Observed(
        clusters=torch.arange(12).repeat_interleave(2),
        testing=torch.arange(N) >= N // 2,
        difference=torch.full((N,), 4.0),
        counterfactual_difference=torch.zeros(N),
        templates=["t"] * N,
        roles=dict.fromkeys(("mover", "server", "backup"), seen),
        looks={LOOK: (values(0.5), values(0.0))},
        outputs=[],
    )
    patches = {
        Patch((1, 0), "END"): effects(2.0, restored=1.0),
        Patch((0, 1), "END"): effects(0.4, look=0.2),
        Patch((1, 1), "END"): effects(0.0),
        Patch(None, "END", ((1, 0),)): effects(2.0),
        Patch((1, 1), "END", ((1, 0),)): effects(3.0),
    }
    patches |= found.get("patches", {})
    roles = {"mover": moving, "server": serving, "backup": backing}
    return Measured(observed, roles, patches, {"mover": ((1, 0),), "server": (), "backup": ()}, 0, np.arange(HEADS))


def row(table, head: tuple[int, int]):
    return table[(table["layer"] == head[0]) & (table["head"] == head[1])].iloc[0]


def test_an_effect_is_a_share_of_what_the_counterfactual_takes_away() -> None:
    found = row(measured().rows("mover", "testing"), (1, 0))
    assert (found["effect"], found["effect_share"], found["effect_restored"]) == (0.5, 0.5, 0.25)
    assert found["write_share"] == 0.5 and found["attention_nonsink"] == pytest.approx(0.6 / 0.95)
    assert math.isnan(row(measured().rows("mover", "testing"), (0, 0))["effect"])  # not replaced


@pytest.mark.parametrize(
    ("beyond", "significant"),
    [(["control"], False), (["counterfactual"], True), (["control", "counterfactual"], False)],
)
def test_attention_is_compared_with_what_the_role_says(beyond, significant) -> None:
    found = measured()
    found.observed.roles["mover"].control[:, 1, 0] = 0.6  # as much as to the source
    attention = replace(found.roles["mover"].attention, beyond=beyond)
    found.roles["mover"] = replace(found.roles["mover"], attention=attention)
    assert (row(found.rows("mover", "testing"), (1, 0))["attention_p"] < 0.05) == significant


def test_an_effect_into_receivers_is_on_their_attention() -> None:
    found = row(measured().rows("server", "testing"), (0, 1))
    assert found["effect"] == pytest.approx(0.6)  # 0.3 of the 0.5 that the counterfactual takes


def test_a_backup_matters_once_the_others_are_replaced() -> None:
    found = row(measured().rows("backup", "testing"), (1, 1))
    assert found["effect"] == pytest.approx(0.25)  # 1 of 4 logits beside what it takes with them in place, which is 0


@pytest.mark.parametrize(("lost", "p"), [(1e-7, 1.0), (-1e-7, 1.0), (1e-4, 1.0), (1e-2, 1 / 2**6)])
def test_rounding_gives_a_head_without_effect_no_p(lost: float, p: float) -> None:
    """One sign on all prompts would be the smallest p that six clusters allow."""
    for role in ("mover", "backup"):
        after = {Patch((1, 1), "END"): effects(lost if role == "mover" else 0.0)}
        after |= {Patch((1, 1), "END", ((1, 0),)): effects(2.0 + lost)}
        found = row(measured(patches=after).rows(role, "testing"), (1, 1))
        assert found["effect_p"] == p and found["effect"] == pytest.approx(lost / 4 if p < 1 else 0.0, abs=1e-6)


def test_what_replacing_a_head_by_itself_changes_is_rounding_too() -> None:
    after = {Patch((1, 1), "END"): effects(4 * 3e-4)}
    found = [replace(measured(patches=after), change=change).rows("mover", "testing") for change in (1e-6, 9e-4)]
    assert [row(rows, (1, 1))["effect_p"] for rows in found] == [1 / 2**6, 1.0]


@pytest.mark.parametrize(("left", "p"), [(0.5, 1.0), (0.5 - 2e-5, 1.0), (0.5 - 2e-4, 1 / 2**6)])
def test_rounding_of_the_receivers_attention_gives_a_server_no_p(left: float, p: float) -> None:
    found = measured(patches={Patch((0, 1), "END"): effects(0.0, look=left)})
    assert row(found.rows("server", "testing"), (0, 1))["effect_p"] == p


def verdict_of(found: Measured, head: tuple[int, int], role: str = "mover") -> str:
    roles = judge_activations(found, {role: [head]}, None).roles
    return str(
        roles[(roles["role"] == role) & (roles["layer"] == head[0]) & (roles["head"] == head[1])].iloc[0]["verdict"]
    )


def test_verdicts() -> None:
    assert verdict_of(measured(), (1, 0)) == "realised"
    assert verdict_of(measured(), (0, 0)) == "untestable"  # its effect was not measured
    assert verdict_of(measured(), (1, 1)) == "partial"  # it looks there, and no more
    sensitive = measured(patches={Patch((1, 0), "END"): effects(2.0, mean=-1.0)})
    assert verdict_of(sensitive, (1, 0)) == "sensitive"
    weak = measured()
    weak.observed.difference[:] = -1.0
    assert verdict_of(weak, (1, 0)) == "untestable"


@pytest.mark.parametrize(
    ("weights", "activations", "link", "expected"),
    [
        ("corroborated", "realised", 0.9, "linked"),
        ("corroborated", "realised", math.nan, "unlinked"),
        ("corroborated", "realised", 0.1, "unlinked"),
        ("corroborated", "not_realised", 0.9, "could"),
        ("unsupported", "realised", 0.0, "indirect"),
        ("unsupported", "realised", 0.9, "unranked"),
        ("contradicted", "opposite", 0.0, "neither"),
        ("partial", "realised", 0.9, "undecided"),
        ("corroborated", "partial", 0.9, "undecided"),
        (None, "realised", 0.9, "undecided"),
    ],
)
def test_readings(weights, activations, link, expected) -> None:
    assert reading(weights, activations, link) == expected
    assert expected in READINGS and activations in ON_PROMPTS


def test_a_metric_that_only_grows_with_depth_finds_no_heads_in_their_layers() -> None:
    layers, groups = np.repeat(np.arange(4), 6), np.tile(np.arange(6), 4)
    has = (layers == 3) & (groups < 2)
    assert joint.auc(layers.astype(float), has) > 0.9
    assert auc_in_layers(layers.astype(float), has, layers, groups, 0) == (0.5, 1.0)
    first = np.where(has, 1.0, -groups.astype(float))
    assert auc_in_layers(first, has, layers, groups, 0) == (1.0, pytest.approx(1 / math.comb(6, 2)))
    shared = groups // 2  # both heads of one KV group, of three
    assert auc_in_layers(first, has, layers, shared, 0) == (1.0, pytest.approx(1 / 3))
    assert all(map(math.isnan, auc_in_layers(first, layers == 3, layers, groups, 0)))
    assert all(map(math.isnan, auc_in_layers(first, np.zeros(24, bool), layers, groups, 0)))


def test_a_row_that_could_not_be_significant_alone_says_so() -> None:
    """Five clusters: the least p of sign flips is 1/32, times ten rows, four of them of chosen heads of other roles."""
    found = measured()
    few = replace(found, observed=replace(found.observed, clusters=torch.arange(N) // 2 % 5))
    rows = judge_activations(few, {"mover": [(1, 0), (1, 1)]}, None).roles
    own = rows[rows["head"].eq(0) & rows["layer"].eq(1)].iloc[0]
    assert own["attention_min_q"] == pytest.approx(10 / 32)
    other = rows[rows["head"].eq(1)].iloc[0]
    assert "no write (alone it could not be significant: q at least 0.31)" in other["reason"]


@given(st.lists(st.sampled_from(["realised", "partial", "not_realised", "sensitive", "opposite", "untestable"])))
def test_a_roles_verdict_on_prompts_is_that_of_its_heads_together(verdicts) -> None:
    found = role_verdict(verdicts)
    assert found == role_verdict(verdicts[::-1]) and role_verdict([*verdicts, "untestable"]) == (found or "untestable")
    if verdicts and set(verdicts) <= {found}:
        assert found in ("realised", "partial", "not_realised", "opposite", "untestable")
    if "opposite" in verdicts:
        assert found == ("partial" if "realised" in verdicts else "opposite")
    elif found == "realised":
        assert 2 * verdicts.count("realised") >= len([each for each in verdicts if each != "untestable"]) > 0
    assert role_verdict(verdicts, outdone=True) == ("partial" if found == "realised" else found)
    assert role_verdict(["realised", "partial"]) == "realised" and role_verdict(["partial", "partial"]) == "partial"
    assert role_verdict([]) is None and role_verdict(["not_realised"] * 3) == "not_realised"
