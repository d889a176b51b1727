"""Verdicts on heads' behaviour on prompts, in tables of quantities and roles (definitions: section 7).

A deciding quantity holds if it is significant, has the predicted sign and is large enough. The verdict is the first of
these that holds:

    out_of_scope   the role has no `activations`
    untestable     the model does not do the task, or a deciding quantity has no value or too few clusters
    sensitive      all hold, but with the mean replacement the effect has another sign or significance
    realised       all hold, and the head stands out among heads without a role (`ovqk/activations/peers.py`)
    partial        some hold
    opposite       none holds, and one is significant in the other direction
    not_realised   none of the above
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ovqk import wording
from ovqk.activations.links import WriteLinks
from ovqk.activations.measure import chosen_heads
from ovqk.activations.peers import RolePeers, compared, grids, head_peers, role_peers
from ovqk.activations.roles import Measured
from ovqk.verdicts.statistics import ALPHA, Significance, benjamini_hochberg
from ovqk.weights.types import Head

LEAST_ACCURACY = 0.8
"""The least share of the testing half's prompts in which the answer must beat the foil."""
LINKED = 0.5
"""Weights account for a head's write or scores if they explain at least this share of the variance or contrast."""


@dataclass(frozen=True)
class Judged:
    """A model's roles on prompts.

    Attributes:
        activations: a row for each role, half and head.
        roles: a row for each role and head that is claimed or measured.
        measured: role -> the heads that were chosen on one half and confirmed on the other.
        gate: why nothing can be tested; empty if tests are possible.
        peers: role -> its heads (claimed, or chosen if none is claimed) compared with heads without a role.
        together: role -> the effect when all these heads are replaced in one run, as joint.parquet holds it.
    """

    activations: pd.DataFrame
    roles: pd.DataFrame
    measured: dict[str, list[Head]]
    gate: str
    peers: dict[str, RolePeers]
    together: dict[str, dict[str, float]]


def gate(measured: Measured) -> str:
    """Return a sentence that says why activations are not tested; it is empty if the model does the task."""
    accuracy, difference = measured.accuracy("testing")
    if accuracy >= LEAST_ACCURACY and difference > 0:
        return ""
    return f"the model does not do the task (accuracy {accuracy:.0%}, mean logit difference {difference:.2f})"


def judge_activations(measured: Measured, claimed: Mapping[str, Sequence[Head]], links: WriteLinks | None) -> Judged:
    """Test claimed and chosen heads on the testing half.

    Args:
        measured: all heads' quantities.
        claimed: role -> claimed heads, for roles without `activations` too.
        links: the writes' links, if there are any.
    """
    why_not = gate(measured)
    tables: list[pd.DataFrame] = []
    tested: dict[str, pd.DataFrame] = {}
    subjects: list[dict[str, Any]] = []
    for role in measured.roles:
        choosing, testing = measured.rows(role, "choosing"), measured.rows(role, "testing")
        if links is not None and role in links.shares:
            testing["write_link"] = links.shares[role].double().flatten().numpy()
            testing["write_link_slope"] = links.slopes[role].double().flatten().numpy()
        tables += [choosing, testing]
        tested[role] = testing
        chosen = chosen_heads(measured, role) if not why_not else ()
        for head in dict.fromkeys((*claimed.get(role, ()), *chosen)):
            row = testing[(testing["layer"] == head[0]) & (testing["head"] == head[1])].iloc[0]
            subjects.append(
                {str(name): value for name, value in row.items()}
                | _score(measured, role, head)
                | {"claimed": head in claimed.get(role, ()), "chosen": head in chosen}
            )
    _correct(measured, subjects)
    own = {role: tuple(claimed.get(role, ())) or _chosen(subjects, role) for role in measured.roles}
    taken = {head for heads in (*claimed.values(), *own.values()) for head in heads}
    found: dict[str, list[Head]] = {}
    peers: dict[str, RolePeers] = {}
    for role in measured.roles:
        of_role = [subject for subject in subjects if subject["role"] == role]
        values, groups = grids(measured.roles[role], tested[role]), measured.kv_of_head
        if not why_not:
            peers[role] = role_peers(values, own[role], taken - set(own[role]), groups, measured.seed)
        for subject in of_role:
            barred = taken | (set() if _place(subject) in own[role] else set(_chosen(subjects, role)))
            beside = head_peers(values, _place(subject), barred, groups)
            subject |= _verdict(measured, role, subject, beside, why_not)
            subject["measured"] = subject["chosen"] and subject["confirmed"]
        found[role] = [_place(subject) for subject in of_role if subject["measured"]]
    for role in claimed:
        if role not in measured.roles:
            why = "the role says nothing of activations"
            nothing: dict[str, Any] = {"verdict": "out_of_scope", "reason": why, "claimed": True}
            nothing |= dict.fromkeys(("chosen", "confirmed", "measured"), False)
            subjects += [{"role": role, "layer": layer, "head": head} | nothing for layer, head in claimed[role]]
    roles = pd.DataFrame(subjects).drop(columns=["half"], errors="ignore")
    front = ["role", "layer", "head", "claimed", "measured", "verdict", "reason", "held", "against"]
    if len(roles):
        roles = roles.reindex(columns=[*front, *(name for name in roles if name not in front)])
    together = {} if why_not else {role: measured.together(role) for role in measured.roles}
    return Judged(pd.concat(tables, ignore_index=True), roles, found if not why_not else {}, why_not, peers, together)


def _score(measured: Measured, role: str, head: Head) -> dict[str, float]:
    found = measured.scores.get((role, head))
    return {} if found is None else {f"score_{name}": value for name, value in found._asdict().items()}


def _chosen(subjects: Sequence[Mapping[str, Any]], role: str) -> tuple[Head, ...]:
    return tuple(_place(subject) for subject in subjects if subject["role"] == role and subject["chosen"])


def _place(subject: Mapping[str, Any]) -> Head:
    return int(subject["layer"]), int(subject["head"])


def _correct(measured: Measured, subjects: list[dict[str, Any]]) -> None:
    """Add q, corrected over the deciding quantities for all claimed and chosen heads, and min_q, the least q alone."""
    for opposite in ("", "_opposite"):
        family = [
            (subject, quantity)
            for subject in subjects
            for quantity in measured.roles[subject["role"]].decides
            if not math.isnan(subject.get(f"{quantity}_p{opposite}", math.nan))
        ]
        corrected = benjamini_hochberg([s[f"{quantity}_p{opposite}"] for s, quantity in family]) if family else []
        for (subject, quantity), q in zip(family, corrected, strict=True):
            subject[f"{quantity}_q{opposite}"] = q
            subject[f"{quantity}_min_q"] = min(1.0, subject[f"{quantity}_min_p"] * len(family))


def _verdict(
    measured: Measured,
    role: str,
    subject: Mapping[str, Any],
    peers: Mapping[str, Significance],
    why_not: str,
) -> dict[str, Any]:
    """Return a head's verdict, the quantities that decided it, and the reason."""
    config = measured.roles[role]
    told: dict[str, Any] = {"confirmed": False}
    for name, beside in peers.items():
        told |= {f"{name}_peers": beside.effect, f"{name}_peers_p": beside.p, f"{name}_peers_min_p": beside.min_p}
    if why_not:
        return told | {"verdict": "untestable", "reason": why_not, "held": "", "against": ""}
    valued = [name for name in config.decides if not math.isnan(subject.get(f"{name}_p", math.nan))]
    if len(valued) < len(config.decides):
        missing = ", ".join(wording.PROMPT_DECIDES[name] for name in config.decides if name not in valued)
        return told | {"verdict": "untestable", "reason": f"no value for {missing}", "held": "", "against": ""}
    if max(subject[f"{name}_min_p"] for name in valued) > ALPHA:
        return told | {"verdict": "untestable", "reason": "too few clusters of prompts", "held": "", "against": ""}
    row = pd.DataFrame([subject])
    shown = {name: bool(ok[0]) for name, ok in measured.passes(role, row, "q").items()}
    held = [name for name, ok in shown.items() if ok]
    against = [name for name in valued if subject[f"{name}_q_opposite"] <= ALPHA]
    told |= {"held": ", ".join(held), "against": ", ".join(against), "reason": "", "confirmed": len(held) == len(shown)}
    if "effect" in shown and math.isfinite(subject["effect_mean_replacement"]):
        other = bool(subject["effect_mean_p"] <= ALPHA)
        if len(held) == len(shown) and (
            other != shown["effect"] or subject["effect_mean_replacement"] * subject["effect"] < 0
        ):
            return told | {"verdict": "sensitive", "reason": "with the counterfactuals' mean the effect is another"}
    could = [name for name, beside in peers.items() if beside.min_p <= ALPHA]
    outdone = [name for name in could if peers[name].p > ALPHA]
    if len(held) == len(shown) and not outdone:
        alone = "" if len(could) == len(compared(config)) else "too few heads beside it to compare it with"
        return told | {"verdict": "realised", "reason": alone}
    small = [name for name in shown if name not in held and subject[f"{name}_q"] <= ALPHA]
    lacking = [_lacking(subject, name, small) for name in shown if name not in held]
    if held:
        named = " and ".join(wording.PROMPT_DECIDES[name] for name in outdone)
        lacking = lacking or [f"other heads show as much {named}"]
        return told | {"verdict": "partial", "reason": "; ".join(lacking)}
    return told | {"verdict": "opposite" if against else "not_realised", "reason": "; ".join(lacking) if small else ""}


def _lacking(subject: Mapping[str, Any], quantity: str, small: Collection[str]) -> str:
    name = wording.PROMPT_DECIDES[quantity]
    if quantity in small:
        return f"{name} too small"
    least = subject[f"{quantity}_min_q"]
    return f"no {name}" + (f" (alone it could not be significant: q at least {least:.2f})" if least > ALPHA else "")
