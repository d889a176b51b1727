"""What heads' weights say beside what they do on prompts, and how well the one ranks the other."""

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk.activations.judge import LINKED, Judged
from ovqk.config.schema import Circuit, RoleActivationsConfig, TaskConfig
from ovqk.metrics import METRICS
from ovqk.verdicts.statistics import Stratum, stratified_permutation, within_layer_auc

BOOTSTRAPS = 1000
MOST_CHOICES = 100_000
TIE = 1e-12
LINKS = ("write_link", "score_link", "score_key_partner", "score_query_partner")
"""What ties weights to prompts."""
QUANTITIES = (
    *("attention", "attention_control", "write", "write_se", "effect", "effect_se", "effect_mean_replacement"),
)
"""What a head does, with what each number has to be read beside."""


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
        judged: what heads do.
        verdicts: of the weights, if heads were claimed.
        heads: the weights' metrics.
        task: the task.
        seed: of bootstraps.
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
    rows += _role_rows(judged, heads, task, seed, kv_of_head)
    return pd.DataFrame(rows)


def on_prompts(candidates: pd.DataFrame, judged: Judged, roles: Collection[str]) -> pd.DataFrame:
    """Return candidates.parquet with the column `on_prompts`.

    It is a candidate's verdict on prompts if it was chosen there, else `not_chosen`: it does not show all deciding
    quantities on the choosing half; `untestable` if nothing is; None for a role that says nothing of activations.
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
    """Return how a verdict of the weights and one of activations read together: a key of `wording.READINGS`."""
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
    """Return the link of what the weights' verdict was about, nan if there is none.

    OV: `write_link`, 0 if the write falls where the weights say that it rises. QK: `score_link`. A receiver's input by
    composition: the part of its scores that comes through the partners.
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
    """Return for each role how its weight metric ranks all heads, against what they do on prompts.

    The metric is the first that the role predicts of heads: a composition ranks pairs.
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
        groups = kv_of_head[heads["head"].to_numpy(dtype=np.int64)]
        in_layers, in_layers_p = auc_in_layers(metric, has, layers, groups, seed)
        rows.append(
            {
                "kind": "role", "role": role, "layer": None, "head": None, "claimed": None, "measured": None,
                "metric": first.metric, "quantity": quantity, "n_measured": int(has.sum()), "n_heads": len(heads),
                "auc": _auc(metric, has), "auc_low": low, "auc_high": high,
                "auc_in_layers": in_layers, "auc_in_layers_p": in_layers_p,
                "spearman": _spearman(metric, done), "split_half": _spearman(done, other),
                "peers_p": peers_p(done, has, layers, seed),
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
    """Return P(a head with the role has more of the metric than another of its layer), and its p by permutation.

    Heads of a role lie at its depth, so that a metric that only grows with depth would rank them high in the whole
    model. Labels are permuted within layers, KV groups first. nan if no layer has heads with and without the role.

    Args:
        metric: of all heads, larger in the predicted direction.
        has: which heads have the role.
        layers, groups: of all heads.
        seed: of draws.
    """
    strata = []
    for layer in np.unique(layers[has]):
        own = (layers == layer) & np.isfinite(metric)
        if has[own].any() and not has[own].all():
            strata.append(Stratum(metric[own], has[own], groups[own]))
    return (within_layer_auc(strata), stratified_permutation(strata, seed).p) if strata else (math.nan, math.nan)


def peers_p(values: NDArray[np.float64], has: NDArray[np.bool_], layers: NDArray[np.int64], seed: int) -> float:
    """Return how often as many heads of the same layers have as large a mean, the role's own among the choices.

    All choices are tried up to 100,000, else as many draws. nan without heads of the role, or if they are all heads of
    their layers.

    Args:
        values: of all heads; the role's heads must not have been chosen for them.
        has: which heads have the role.
        layers: of all heads.
        seed: of draws.
    """
    whole = np.isfinite(values)
    groups = [values[whole & (layers == layer)] for layer in np.unique(layers[has & whole])]
    counts = [int((has & whole & (layers == layer)).sum()) for layer in np.unique(layers[has & whole])]
    choices = math.prod(math.comb(len(group), count) for group, count in zip(groups, counts, strict=True))
    if choices <= 1:
        return math.nan
    own = float(values[has & whole].sum())
    slack = TIE * float(np.abs(np.concatenate(groups)).max())
    if choices <= MOST_CHOICES:
        sums = np.zeros(1)
        for group, count in zip(groups, counts, strict=True):
            of_layer = np.array([sum(some) for some in itertools.combinations(group.tolist(), count)])
            sums = (sums[:, None] + of_layer[None, :]).ravel()
        return float((sums >= own - slack).mean())
    generator = np.random.default_rng([seed, len(values)])
    drawn = np.zeros(MOST_CHOICES - 1)
    for group, count in zip(groups, counts, strict=True):
        order = generator.random((MOST_CHOICES - 1, len(group))).argsort(1)[:, :count]
        drawn += group[order].sum(1)
    return float((1 + (drawn >= own - slack).sum()) / MOST_CHOICES)


def ranked_quantity(config: RoleActivationsConfig) -> str:
    """Return what heads are ranked by, which all heads have: `write`, else `attention`, else `effect_first_order`."""
    if "write" in config.decides:
        return "write"
    return "effect_first_order" if config.attention is None else "attention"


def _continuous(judged: Judged, role: str, half: str, config: RoleActivationsConfig) -> NDArray[np.float64]:
    """Return the quantity that heads are ranked by: writes in their sign, attention less its control."""
    rows = judged.activations[(judged.activations["role"] == role) & (judged.activations["half"] == half)]
    name = ranked_quantity(config)
    values = rows[name].to_numpy(dtype=np.float64)
    if name == "attention":
        return values - rows["attention_control"].to_numpy(dtype=np.float64)
    return values if config.write is None or name != "write" else config.write.sign * values


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    whole = np.isfinite(a) & np.isfinite(b)
    if whole.sum() < 3:
        return math.nan
    ranks = [pd.Series(values[whole]).rank() for values in (a, b)]
    return float(ranks[0].corr(ranks[1]))


def _auc(metric: NDArray[np.float64], has: NDArray[np.bool_]) -> float:
    """Return P(a head with the role has more of the metric than one without), ties half; nan without either."""
    whole = np.isfinite(metric)
    inside, outside = metric[has & whole], metric[~has & whole]
    if not len(inside) or not len(outside):
        return math.nan
    difference = inside[:, None] - outside[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _interval(metric: NDArray[np.float64], has: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the AUC over resampled heads, with and without the role apart."""
    inside, outside = np.flatnonzero(has), np.flatnonzero(~has)
    if len(inside) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(BOOTSTRAPS):
        rows = np.concatenate([generator.choice(group, len(group)) for group in (inside, outside)])
        found.append(_auc(metric[rows], has[rows]))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
