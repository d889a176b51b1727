"""What counts as an effect: on the logit difference, into receivers, and given that others are replaced."""

import math

import pytest
import torch

from ovqk.activations.effects import Effects, Patch
from ovqk.activations.joint import reading
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
    return Measured(observed, roles, patches, {"mover": ((1, 0),), "server": (), "backup": ()}, seed=0)


def row(table, head: tuple[int, int]):
    return table[(table["layer"] == head[0]) & (table["head"] == head[1])].iloc[0]


def test_an_effect_is_a_share_of_what_the_counterfactual_takes_away() -> None:
    found = row(measured().rows("mover", "testing"), (1, 0))
    assert (found["effect"], found["effect_share"], found["effect_restored"]) == (0.5, 0.5, 0.25)
    assert found["write_share"] == 0.5 and found["attention_nonsink"] == pytest.approx(0.6 / 0.95)
    assert math.isnan(row(measured().rows("mover", "testing"), (0, 0))["effect"])  # not replaced


def test_an_effect_into_receivers_is_on_their_attention() -> None:
    found = row(measured().rows("server", "testing"), (0, 1))
    assert found["effect"] == pytest.approx(0.6)  # 0.3 of the 0.5 that the counterfactual takes


def test_a_backup_matters_once_the_others_are_replaced() -> None:
    found = row(measured().rows("backup", "testing"), (1, 1))
    assert found["effect"] == pytest.approx(0.25)  # 1 of 4 logits beside what it takes with them in place, which is 0


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
    outdone = measured()
    for part in ("attention", "write"):
        getattr(outdone.observed.roles["mover"], part)[:, 1, 2] = 9.0
    outdone.add({Patch((1, 2), "END"): effects(3.0)})
    assert verdict_of(outdone, (1, 0)) == "realised"  # 1.2 is chosen too: it has the role, and is no peer
    assert judge_activations(outdone, {}, None).measured["mover"] == [(1, 0), (1, 2)]
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
