"""Verdicts from weights beside verdicts from prompts, and how well weights rank heads (definitions: section 7)."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk.activations.judge import LINKED, Judged
from ovqk.activations.peers import RolePeers, standing
from ovqk.config.schema import Circuit, RoleActivationsConfig, TaskConfig
from ovqk.metrics import METRICS
from ovqk.verdicts.statistics import Stratum, stratified_permutation, within_layer_auc

BOOTSTRAPS = 1000
LINKS = ("write_link", "write_link_slope", "score_link", "score_key_partner", "score_query_partner")
"""The columns that say how much of a head's behaviour its weights account for."""
QUANTITIES = "attention", "attention_control", "write", "write_se", "effect", "effect_se", "effect_mean_replacement"
"""The columns about a head's behaviour, each followed by the numbers that it should be read with."""
TOGETHER = "effect_together", "effect_together_se", "effect_together_mean_replacement"
"""The columns about the effect when all of a role's heads are replaced in one run."""


def joint_table(
    judged: Judged,
    verdicts: pd.DataFrame | None,
    heads: pd.DataFrame,
    task: TaskConfig,
    seed: int,
    kv_of_head: NDArray[np.int64],
) -> pd.DataFrame:
    """Return joint.parquet: a row for each claimed or measured head, and one for each role over all heads.

    Args:
        judged: the heads' behaviour on prompts.
        verdicts: verdicts.parquet, if heads were claimed.
        heads: heads.parquet, which holds the weights' metrics.
        task: the task.
        seed: the seed for the bootstrap and for drawn permutations.
        kv_of_head: each head's KV group, the same in every layer.
    """
    rows = []
    for subject in judged.roles.to_dict("records"):
        role, place = subject["role"], (int(subject["layer"]), int(subject["head"]))
        weights = _weights(verdicts, role, place)
        link = _link(weights.get("primary"), subject)
        rows.append(
            {
                "kind": "head", "role": role, "layer": place[0], "head": place[1],
                "claimed": subject["claimed"], "measured": subject["measured"],
                "weights": weights.get("verdict"), "primary": weights.get("primary"), "value": weights.get("value"),
                "percentile": weights.get("percentile"), "activations": subject["verdict"],
                **{name: subject.get(name, math.nan) for name in QUANTITIES},
                **{name: subject.get(name, math.nan) for name in LINKS}, "link": link,
                "reading": reading(weights.get("verdict"), subject["verdict"], link),
            }
        )  # fmt: skip
    of_heads, of_roles = pd.DataFrame(rows), _role_rows(judged, heads, task, seed, kv_of_head)
    for row in of_roles:
        row |= _together(of_heads, verdicts, row["role"], judged)
    return pd.DataFrame([*rows, *of_roles])


def role_verdict(verdicts: Sequence[str], outdone: bool = False) -> str | None:
    """Derive a role's verdict on prompts from its heads' verdicts; None if it has no heads.

    `realised` if at least half of the heads that could be tested are realised, none is `opposite`, and together they
    stand out among other heads; `opposite` if some heads are and none is realised; `not_realised` if all are;
    `untestable` if no head could be tested; else `partial`.

    Args:
        verdicts: the heads' verdicts.
        outdone: whether the heads together could stand out among other heads, and do not.
    """
    tested = [verdict for verdict in verdicts if verdict != "untestable"]
    if not tested:
        return "untestable" if verdicts else None
    opposed, realised = tested.count("opposite"), tested.count("realised")
    if opposed:
        return "partial" if realised else "opposite"
    if 2 * realised >= len(tested):
        return "partial" if outdone else "realised"
    return "not_realised" if tested.count("not_realised") == len(tested) else "partial"


def _together(heads: pd.DataFrame, verdicts: pd.DataFrame | None, role: str, judged: Judged) -> dict[str, Any]:
    """Return a role's two verdicts, its heads' median link, and how the verdicts read together."""
    own = heads[heads["role"] == role] if len(heads) else heads
    if len(own) and own["claimed"].any():
        own = own[own["claimed"]]
    found = None if verdicts is None else verdicts[(verdicts["kind"] == "role") & (verdicts["role"] == role)]
    weights = None if found is None or not len(found) else str(found["verdict"].iloc[0])
    outdone = judged.peers.get(role, RolePeers()).outdone
    of_own = own["activations"].tolist() if len(own) else []
    activations = "untestable" if judged.gate else role_verdict(of_own, outdone)
    link = float(own["link"].median()) if len(own) else math.nan
    together = "undecided" if activations is None else reading(weights, activations, link)
    return {"weights": weights, "activations": activations, "link": link, "reading": together}


def on_prompts(candidates: pd.DataFrame, judged: Judged, roles: Collection[str]) -> pd.DataFrame:
    """Return candidates.parquet with the column `on_prompts`.

    The column holds a candidate's verdict on prompts if the candidate was chosen there. It is `not_chosen` if the
    candidate lacks a deciding quantity on the choosing half. It is `untestable` if nothing can be tested, and None if
    the role has no `activations`.

    Args:
        candidates: candidates.parquet.
        judged: the heads' behaviour on prompts.
        roles: the roles that have `activations`.
    """
    verdicts = {
        (row["role"], int(row["layer"]), int(row["head"])): row["verdict"] for row in judged.roles.to_dict("records")
    }

    def verdict(role: str, layer: int, head: int) -> Any:
        if role not in roles:
            return None
        return "untestable" if judged.gate else verdicts.get((role, layer, head), "not_chosen")

    places = zip(candidates["role"], candidates["layer"], candidates["head"], strict=True)
    return candidates.assign(on_prompts=[verdict(str(role), int(layer), int(head)) for role, layer, head in places])


def reading(weights: str | None, activations: str, link: float) -> str:
    """Read a verdict from weights and one from activations together, and return a key of `wording.READINGS`.

    Args:
        weights: the verdict from weights; None if there is none.
        activations: the verdict from activations.
        link: the share of the head's behaviour that its weights account for; nan if it is not known.
    """
    does, could, linked = activations == "realised", weights == "corroborated", link >= LINKED
    if does and could:
        return "linked" if linked else "unlinked"
    if could and activations in ("not_realised", "opposite"):
        return "could"
    if does and weights in ("unsupported", "contradicted"):
        return "unranked" if linked else "indirect"
    if weights in ("unsupported", "contradicted") and activations in ("not_realised", "opposite"):
        return "neither"
    return "undecided"


def _link(primary: str | None, subject: Mapping[Any, Any]) -> float:
    """Return the link that belongs to the primary metric; nan if there is none.

    For an OV metric it is `write_link`, or 0 if the write falls when the weights say that it rises. For a QK metric it
    is `score_link`. For a composition that ranks receivers it is the share of the scores that partners wrote.
    """
    metric = METRICS.get(primary) if isinstance(primary, str) else None
    if metric is None:
        return math.nan
    if metric.circuit is Circuit.ov:
        falls = subject.get("write_link_slope", math.nan) < 0
        return 0.0 if falls else float(subject.get("write_link", math.nan))
    name = "score_link" if metric.circuit is Circuit.qk else f"score_{metric.composes}_partner"
    return float(subject.get(name, math.nan)) if metric.circuit or metric.ranks == "receiver" else math.nan


def _weights(verdicts: pd.DataFrame | None, role: str, place: tuple[int, int]) -> Mapping[Any, Any]:
    if verdicts is None:
        return {}
    found = verdicts[(verdicts["role"] == role) & (verdicts["layer"] == place[0]) & (verdicts["head"] == place[1])]
    return found.iloc[0].to_dict() if len(found) else {}


def _role_rows(
    judged: Judged, heads: pd.DataFrame, task: TaskConfig, seed: int, kv_of_head: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Return a row for each role: how well its weight metric ranks all heads by their behaviour on prompts.

    The metric is the role's first prediction about single heads, because a composition ranks pairs.
    """
    rows: list[dict[str, Any]] = []
    for role, config in task.roles.items():
        first = next((p for p in config.predictions if METRICS[p.metric].of != "pair"), None)
        if config.activations is None or first is None:
            continue
        names = [first.first_layer if layer == 0 and first.first_layer else first.metric for layer in heads["layer"]]
        if not set(names) <= set(heads):
            continue
        sign = 1 if first.direction.value == "high" else -1
        metric = sign * np.array([heads[name].iloc[row] for row, name in enumerate(names)], dtype=np.float64)
        quantity = ranked_quantity(config.activations)
        done, other = (_continuous(judged, role, half, config.activations) for half in ("testing", "choosing"))
        has = np.array(
            [
                (layer, head) in judged.measured.get(role, [])
                for layer, head in zip(heads["layer"], heads["head"], strict=True)
            ]
        )
        low, high = _interval(metric, has, seed)
        layers = heads["layer"].to_numpy(dtype=np.int64)
        groups, peers = kv_of_head[heads["head"].to_numpy(dtype=np.int64)], judged.peers.get(role, RolePeers())
        in_layers, in_layers_p = auc_in_layers(metric, has, layers, groups, seed)
        rows.append(
            {
                "kind": "role", "role": role, "layer": None, "head": None, "claimed": None, "measured": None,
                "metric": first.metric, "quantity": quantity, "n_measured": int(has.sum()), "n_heads": len(heads),
                "auc": auc(metric, has), "auc_low": low, "auc_high": high,
                "auc_in_layers": in_layers, "auc_in_layers_p": in_layers_p,
                "spearman": spearman(metric, done), "split_half": spearman(done, other),
                "peers_p": peers.p, "peers_min_p": peers.min_p, "peers_null": peers.null,
                **{name: judged.together.get(role, {}).get(name, math.nan) for name in TOGETHER},
            }
        )  # fmt: skip
    return rows


def auc_in_layers(
    metric: NDArray[np.float64],
    has: NDArray[np.bool_],
    layers: NDArray[np.int64],
    groups: NDArray[np.int64],
    seed: int,
) -> tuple[float, float]:
    """Return P(a head with the role has a larger metric than one without in its layer), and its p by permutation.

    A role's heads lie at similar depths, so a metric that merely grows with depth could rank them high in the whole
    model. Labels are therefore permuted within layers, KV groups first. Both numbers are nan if no layer has heads with
    the role and heads without it.

    Args:
        metric: each head's metric, larger in the predicted direction.
        has: which heads have the role.
        layers, groups: each head's layer and KV group.
        seed: the seed for drawn permutations.
    """
    strata = []
    for layer in np.unique(layers[has]):
        own = (layers == layer) & np.isfinite(metric)
        if has[own].any() and not has[own].all():
            strata.append(Stratum(metric[own], has[own], groups[own]))
    return (within_layer_auc(strata), stratified_permutation(strata, seed).p) if strata else (math.nan, math.nan)


def ranked_quantity(config: RoleActivationsConfig) -> str:
    """Return the quantity that ranks all heads: `write` if it decides, else `attention`, else `effect_first_order`."""
    if "write" in config.decides:
        return "write"
    return "effect_first_order" if config.attention is None else "attention"


def _continuous(judged: Judged, role: str, half: str, config: RoleActivationsConfig) -> NDArray[np.float64]:
    """Return the ranking quantity [head]: a write times the predicted sign, or attention minus its control."""
    rows = judged.activations[(judged.activations["role"] == role) & (judged.activations["half"] == half)]
    name = ranked_quantity(config)
    return standing(config, name, rows)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the rank correlation over heads that have both, in [-1, 1]; nan if there are fewer than 3.

    Args:
        a, b: one value for each head, in arrays of one shape.
    """
    whole = np.isfinite(a) & np.isfinite(b)
    if whole.sum() < 3:
        return math.nan
    ranks = [pd.Series(values[whole]).rank() for values in (a, b)]
    return float(ranks[0].corr(ranks[1]))


def auc(metric: NDArray[np.float64], has: NDArray[np.bool_]) -> float:
    """Return P(a head with the role exceeds one without it), ties half; nan if all heads have it or none has."""
    whole = np.isfinite(metric)
    inside, outside = metric[has & whole], metric[~has & whole]
    if not len(inside) or not len(outside):
        return math.nan
    difference = inside[:, None] - outside[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _interval(metric: NDArray[np.float64], has: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """Return the AUC's 95 % interval over resampled heads; heads with and without the role are resampled apart."""
    inside, outside = np.flatnonzero(has), np.flatnonzero(~has)
    if len(inside) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(BOOTSTRAPS):
        rows = np.concatenate([generator.choice(group, len(group)) for group in (inside, outside)])
        found.append(auc(metric[rows], has[rows]))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
