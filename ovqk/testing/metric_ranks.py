"""How well a weight metric ranks the heads that have a role in the running model (docs/evidence.md)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovqk.activations.joint import spearman
from ovqk.verdicts.statistics import Stratum, stratified_permutation, within_layer_auc
from ovqk.weights.types import Head

Values = NDArray[np.float64]
"""[layer, head]; nan if a head has none."""


@dataclass(frozen=True)
class Ranks:
    """One metric, one role, one model.

    Attributes:
        auc: the probability that a head with the role exceeds another in its layer, in [0, 1]; nan if there is no pair.
        p: its p if the role's labels are permuted within layers, KV groups first; nan if there is no pair.
        top: how many of the three heads that the metric puts first in the whole model have the role.
        rho: Spearman's correlation between the metric and the quantity that measures the role, over all heads, on the
            half of the prompts that did not choose the role's heads.
        ceiling: the same correlation between this quantity on one half of the prompts and on the other.
    """

    auc: float
    p: float
    top: int
    rho: float
    ceiling: float


def rank(values: Values, role: Collection[Head], groups: NDArray[np.int64], quantity: Mapping[str, Values]) -> Ranks:
    """Compare a metric with a role's heads and with the quantity that measures the role.

    Args:
        values: the metric [layer, head], larger in the role's direction.
        role: the heads that have the role.
        groups: each head's KV group in its layer [head].
        quantity: `choosing` and `testing` -> the quantity [layer, head] on that half of the prompts.
    """
    auc, p = pooled(strata_of(values, role, groups))
    order = np.argsort(np.where(np.isnan(values), -np.inf, values), axis=None, kind="stable")[::-1][:3]
    first = [(int(place) // values.shape[1], int(place) % values.shape[1]) for place in order]
    return Ranks(
        auc=auc,
        p=p,
        top=sum(head in role for head in first),
        rho=spearman(values, quantity["testing"]),
        ceiling=spearman(quantity["choosing"], quantity["testing"]),
    )


def strata_of(values: Values, role: Collection[Head], groups: NDArray[np.int64]) -> list[Stratum]:
    """Return the layers that hold a head with the role and another head with a value; for the arguments see `rank`."""
    found = []
    for layer in sorted({layer for layer, _ in role}):
        there = np.flatnonzero(~np.isnan(values[layer]))
        claimed = np.array([(layer, head) in role for head in there], dtype=bool)
        if claimed.any() and not claimed.all():
            found.append(Stratum(values[layer, there], claimed, groups[there]))
    return found


def pooled(strata: list[Stratum]) -> tuple[float, float]:
    """Return the AUC within layers, over one model or several, and its p; nan if there are no layers."""
    return (within_layer_auc(strata), stratified_permutation(strata, 0).p) if strata else (math.nan, math.nan)
