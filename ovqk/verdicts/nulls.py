"""The nulls a claim is tested against, and the rows of tests.parquet (definitions: section 6).

    layer        the role's heads against the other heads in their layers; labels are permuted within layers
    layer_all    the same, with heads that other roles claim among the others; reported, never counted
    depth        a head, or a role whose labels are permuted, against the unclaimed heads in nearby layers; all are
                 standardised by a smooth trend over depth (`verdicts/depth.py`)
    spectrum     random heads with the same singular values; a claim must beat them, but this alone is never enough
    token        other words, alike in spelling and frequency (for a contrast: random halves of its own words)
    token_pairs  random pairs of other words (only for a contrast)

`counting` says which of them decide about a metric.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovqk.config.schema import Direction, PredictionConfig
from ovqk.metrics import METRICS
from ovqk.tasks.claims import Claims
from ovqk.verdicts.depth import depth_pool, depth_reference
from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.statistics import (
    QUANTILES,
    MonteCarlo,
    Significance,
    Stratum,
    benjamini_hochberg,
    group_auc,
    grouped,
    percentile,
    pooled_permutation,
    reference_counts,
    stratified_permutation,
    within_layer_auc,
    within_layer_auc_interval,
)
from ovqk.weights.types import Architecture, Head

Values = Mapping[str, NDArray[np.float64]]
"""Metric -> [layer, head], nan if a head has no value."""
Resamples = Mapping[str, NDArray[np.float64]]
"""Metric -> [draw, layer, head] under resampled words, nan if it was not resampled."""


def counting(metric: str, is_role: bool) -> tuple[str, ...]:
    """Name the nulls that decide about a metric (docs/definitions.md, section 6).

    Copying, suppressing and matching are compared with other heads (`layer` for a role, `depth` for a head) and with
    `spectrum`. Such a claim does not say that the head is special to the task's words. Alignment, transfer and reading
    do say it, so `token` and `token_pairs` decide as well. For a composition only `layer` decides, about the role as a
    whole; no null decides about a single head. If `layer` cannot be significant for a role, `depth` counts in its place
    (`role_rows`).

    Args:
        metric: the metric's name.
        is_role: whether the subject is a role; if not, it is one head.
    """
    peers = "layer" if is_role else "depth"
    row = METRICS[metric]
    if row.of == "pair":
        return (peers,) if is_role else ()
    words = ("token", "token_pairs") if row.other_words == "counts" else ()
    return (peers, *(("spectrum",) if row.has_surrogates else ()), *words)


@dataclass(frozen=True)
class Predicted:
    """One prediction of a role, with the metric's value for every head.

    Attributes:
        role: the role that predicts it.
        config: the metric and the direction.
        primary: whether the verdict rests on it.
        values: [layer, head], in the metric's own direction; nan if the prediction says nothing about a head.
    """

    role: str
    config: PredictionConfig
    primary: bool
    values: NDArray[np.float64]

    @property
    def sign(self) -> float:
        """-1 if the prediction is `low`, else 1."""
        return -1.0 if self.config.direction is Direction.low else 1.0

    def metric_of(self, layer: int) -> str:
        """Return the metric that the prediction is about in this layer."""
        return self.config.first_layer if layer == 0 and self.config.first_layer is not None else self.config.metric


def predicted_values(config: PredictionConfig, values: Values, architecture: Architecture) -> NDArray[np.float64]:
    """Return the predicted metric's value for every head [layer, head]; nan if nothing is predicted about a head.

    In layer 0 the metric is `first_layer`, if that is given. `direct_only` keeps layer 0 alone, unless positions are
    rotary.

    Args:
        config: the prediction.
        values: metric -> [layer, head].
        architecture: gives the numbers of layers and heads, and the kind of positions.
    """
    empty = np.full((architecture.n_layers, architecture.n_heads), math.nan)
    found = values.get(config.metric, empty).copy()
    if config.first_layer is not None:
        found[0] = values.get(config.first_layer, empty)[0]
    if config.direct_only and architecture.positions != "rotary":
        found[1:] = math.nan
    return found


def only_head(predicted: Predicted, claims: Claims) -> Head | None:
    """Return the one head that a role's prediction is about, which is then tested in place of the role.

    It is None if the prediction has a value for several of the role's heads or for none, or if it is about a
    composition, of which the role alone is tested.
    """
    if METRICS[predicted.config.metric].of == "pair":
        return None
    valued = [head for head in claims.roles[predicted.role] if not math.isnan(predicted.values[head])]
    return valued[0] if len(valued) == 1 else None


def layer_strata(
    predicted: Predicted, claims: Claims, architecture: Architecture, exclude_claimed: bool
) -> list[Stratum]:
    """Collect, layer by layer, the role's heads and the heads that they are compared with.

    Heads without a value are left out. `exclude_claimed` leaves out the heads of other roles too, unless the claims are
    marked `unreliable`.
    """
    return _strata(predicted, _peers(predicted, claims, architecture, exclude_claimed), architecture)


Peers = list[tuple[int, list[int], NDArray[np.bool_]]]
"""(layer, heads, which of them are claimed)."""


def _strata(predicted: Predicted, peers: Peers, architecture: Architecture) -> list[Stratum]:
    groups = architecture.kv_of_head.numpy()
    return [
        Stratum(predicted.sign * predicted.values[layer, heads], claimed, groups[heads])
        for layer, heads, claimed in peers
    ]


def _peers(
    predicted: Predicted, claims: Claims, architecture: Architecture, exclude_claimed: bool, of: Head | None = None
) -> Peers:
    """Return (layer, heads, which are claimed) for each layer that holds a head of the role, or the head `of`."""
    role = set(claims.roles[predicted.role]) if of is None else {of}
    others = claims.heads - role if exclude_claimed and claims.reliability != "unreliable" else set()
    found = []
    for layer in sorted({layer for layer, _ in role}):
        heads = [
            head
            for head in range(architecture.n_heads)
            if (layer, head) not in others and not math.isnan(predicted.values[layer, head])
        ]
        claimed = np.array([(layer, head) in role for head in heads], dtype=bool)
        if claimed.any():
            found.append((layer, heads, claimed))
    return found


class Effect(NamedTuple):
    """The AUC within layers, in [0, 1], and its 95 % interval, which is nan if the metric was not resampled."""

    auc: float
    low: float
    high: float


def _effect(
    predicted: Predicted,
    claims: Claims,
    architecture: Architecture,
    resamples: Resamples,
    exclude_claimed: bool,
    of: Head | None = None,
) -> Effect:
    """Measure how far a role, or the head `of` if one is given, stands out within its layers."""
    peers = _peers(predicted, claims, architecture, exclude_claimed, of)
    strata = _strata(predicted, peers, architecture)
    low, high = math.nan, math.nan
    drawn = [resamples.get(predicted.metric_of(layer)) for layer, _, _ in peers]
    if peers and all(values is not None for values in drawn):
        kept = [
            predicted.sign * v[:, layer, heads]
            for v, (layer, heads, _) in zip(drawn, peers, strict=True)
            if v is not None
        ]
        low, high = within_layer_auc_interval(strata, kept)
    return Effect(within_layer_auc(strata), low, high)


def role_rows(
    predicted: Predicted, claims: Claims, architecture: Architecture, seed: int, resamples: Resamples | None = None
) -> list[NullTest]:
    """Test a role under `layer`, `layer_all` and `depth` (docs/definitions.md, section 6).

    `depth` counts if `layer` cannot be significant, and is only reported if it can. There are no rows if none of the
    role's heads has a value, or if one alone is tested in place of the role (`only_head`).

    Args:
        predicted: the prediction.
        claims: the claimed heads of all roles.
        architecture: gives the number of heads and their KV groups.
        seed: of the random labelings.
        resamples: metric -> [draw, layer, head] under resampled words, for the effect's interval.
    """
    if only_head(predicted, claims) is not None:
        return []
    rows = []
    for null, exclude in (("layer", True), ("layer_all", False)):
        strata = layer_strata(predicted, claims, architecture, exclude)
        if not strata:
            continue
        test = stratified_permutation(strata, seed)
        effect = _effect(predicted, claims, architecture, resamples or {}, exclude)
        n_others = sum(int((~stratum.claimed).sum()) for stratum in strata)
        significance = Significance(
            test.p, test.p_opposite, test.min_p, effect.auc, test.labelings, test.exact, n_others
        )
        row = _null_test(predicted, None, null, test.statistic, test.percentile, significance, test.quantiles)
        row = replace(row, n_heads=sum(int(stratum.claimed.sum()) for stratum in strata))
        row = replace(row, null_mean=test.null_mean, null_sd=test.null_sd, ci_low=effect.low, ci_high=effect.high)
        in_groups = sum(int(grouped(stratum).claimed.sum()) for stratum in strata)
        rows.append(replace(row, n_groups=in_groups, group_effect=group_auc(strata)))
    decided = any(row.null == "layer" and row.testable for row in rows)
    nearby = _depth_of_role(predicted, claims, architecture, seed)
    return [*rows, *(replace(row, counts=not (decided or row.exploratory)) for row in nearby)]


def _depth_of_role(predicted: Predicted, claims: Claims, architecture: Architecture, seed: int) -> list[NullTest]:
    """Test a role under `depth`: subtract the trend, and permute labels among the KV groups of nearby layers.

    There is no row for a composition, because its values depend on the partners' layers.
    """
    signed, role = predicted.sign * predicted.values, claims.roles[predicted.role]
    role = [head for head in role if not math.isnan(signed[head])]
    if not role or METRICS[predicted.config.metric].of == "pair":
        return []
    barred = claims.heads - set(role) if claims.reliability != "unreliable" else set[Head]()
    pool = depth_pool(signed, role, barred, architecture.kv_of_head.numpy())
    if pool is None:
        return []
    test = pooled_permutation(pool, seed)
    others = int((~pool.claimed).sum())
    effect = within_layer_auc([pool])
    found = Significance(test.p, test.p_opposite, test.min_p, effect, test.labelings, test.exact, others)
    row = _null_test(predicted, None, "depth", test.statistic, test.percentile, found, test.quantiles)
    return [replace(row, n_heads=len(role), null_mean=test.null_mean, null_sd=test.null_sd)]


def head_rows(
    predicted: Predicted, head: Head, claims: Claims, architecture: Architecture, resamples: Resamples | None = None
) -> list[NullTest]:
    """Test a head under `layer` (its rank among its layer's unclaimed heads) and under `depth`.

    A composition is not tested under `depth`. There is no row for a null without reference heads, and none at all if
    the head has no value. For the arguments see `role_rows`.
    """
    layer, _ = head
    signed = predicted.sign * predicted.values
    if math.isnan(signed[head]):
        return []
    value = float(predicted.values[head])
    barred = {head} | (claims.heads if claims.reliability != "unreliable" else set())
    groups = architecture.kv_of_head.numpy()
    same = np.array([signed[layer, h] for h in range(architecture.n_heads) if (layer, h) not in barred])
    same = same[~np.isnan(same)] if len(same) else same
    rows = []
    if len(same):
        plain = predicted.sign * same
        effect = _effect(predicted, claims, architecture, resamples or {}, True, of=head)
        found = replace(reference_counts(signed[head], same), effect=effect.auc)
        row = _null_test(
            predicted, head, "layer", value, percentile(value, plain), found, np.quantile(plain, QUANTILES).tolist()
        )
        mean, sd = float(plain.mean()), float(plain.std())
        rows.append(replace(row, null_mean=mean, null_sd=sd, ci_low=effect.low, ci_high=effect.high))
    composes = METRICS[predicted.config.metric].of == "pair"
    near = None if composes else depth_reference(signed, head, barred, groups)
    if near is not None:
        found = near.counts()
        place = found.effect if predicted.sign > 0 else 1 - found.effect
        quantiles = near.quantiles(predicted.sign).tolist()
        rows.append(_null_test(predicted, head, "depth", value, place, found, quantiles))
    return rows


def ensemble_row(
    predicted: Predicted,
    head: Head | None,
    null: str,
    value: float,
    draws: NDArray[np.float64],
    test: MonteCarlo,
    heads: Sequence[Head],
    most: int,
) -> NullTest:
    """Test a mean over heads against random draws, under `spectrum`, `token` or `token_pairs`.

    Args:
        predicted: the prediction.
        head: the head; None if the test is about the role as a whole.
        null: the null's name.
        value: the metric's mean over `heads`.
        draws: the same mean in each draw, [draw].
        test: the p-values, counted on these draws.
        heads: the heads that have a value.
        most: how many draws there would be if none had stopped early; 1 / (1 + most) is the smallest p.
    """
    effect = percentile(predicted.sign * value, predicted.sign * draws)
    found = Significance(test.p, test.p_opposite, 1 / (1 + most), effect, test.n, False, len(draws))
    quantiles = np.quantile(draws, QUANTILES).tolist()
    row = _null_test(predicted, head, null, value, percentile(value, draws), found, quantiles)
    return replace(row, n_heads=len(heads), null_mean=float(draws.mean()), null_sd=float(draws.std()))


def _null_test(
    predicted: Predicted,
    head: Head | None,
    null: str,
    value: float,
    place: float,
    found: Significance,
    quantiles: Sequence[float],
) -> NullTest:
    return NullTest(
        role=predicted.role,
        head=head,
        metric=predicted.config.metric if head is None else predicted.metric_of(head[0]),
        prediction=predicted.config.direction.value,
        primary=predicted.primary,
        exploratory=predicted.config.exploratory,
        null=null,
        counts=null in counting(predicted.config.metric, head is None) and not predicted.config.exploratory,
        value=value,
        percentile=place,
        effect=found.effect,
        p=found.p,
        p_opposite=found.p_opposite,
        min_p=found.min_p,
        n_null=found.n_null,
        exact=found.exact,
        n_heads=1,
        n_others=found.n_others,
        quantiles=quantiles,
    )


def correct(tests: Sequence[NullTest]) -> list[NullTest]:
    """Add q, q_opposite and min_q to the tests, by Benjamini & Hochberg 1995 (docs/definitions.md, section 6).

    A family holds the tests under one null. Roles and heads are separate families, and so are tests that count and
    tests that are only reported. Three kinds of tests are in no family and have no q: those that cannot be significant,
    exploratory ones, and those of a single head under `layer`, which only describe.
    """
    corrected = list(tests)
    families: dict[tuple[str, bool, bool], list[int]] = {}
    for index, test in enumerate(tests):
        is_role = test.head is None
        if test.testable and not test.exploratory and (is_role or test.null != "layer"):
            families.setdefault((test.null, is_role, test.counts), []).append(index)
    for family in families.values():
        qs = benjamini_hochberg([tests[index].p for index in family])
        opposite = benjamini_hochberg([tests[index].p_opposite for index in family])
        for index, q, q_opposite in zip(family, qs, opposite, strict=True):
            least = min(1.0, tests[index].min_p * len(family))
            corrected[index] = replace(tests[index], q=q, q_opposite=q_opposite, min_q=least)
    return corrected
