"""One head among the heads of nearby layers, standardised by a smooth trend over depth (definitions: section 6).

The null `depth`. A layer alone holds too few heads that share no keys to tell one from: the window of layers around the
head grows until it does. Layers differ, so what is compared is not the metric but how far it is from the trend.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ovqk.verdicts.statistics import QUANTILES, TIE, Significance, Stratum, reference_counts
from ovqk.weights.types import Head

WINDOW = 40
"""KV groups with an unclaimed head that the smallest window holds; 1 / (1 + WINDOW) is below the level."""
SMOOTHED = 10.0
"""KV groups that a layer's trend rests on, by weight: a layer with as many of its own borrows next to nothing."""
LEAST_VARIANCE = 0.05  # of a head around its layer's place, relative to the layer's: a trend never passes through it
NARROWEST = 0.3  # layers: the least standard deviation of the kernel, at which a neighbour weighs .004


@dataclass(frozen=True)
class DepthReference:
    """A head beside its reference heads.

    Attributes:
        z: the head's distance from the trend over the spread around it, larger in the predicted direction.
        reference: the reference heads', likewise.
        layers: the layers that the reference heads are in.
        groups: each one's KV group, numbered over the model.
    """

    z: float
    reference: NDArray[np.float64]
    layers: NDArray[np.int64]
    groups: NDArray[np.int64]

    def quantiles(self, sign: float) -> NDArray[np.float64]:
        """Return the reference's standardised values at QUANTILES; `sign` turns them into the metric's direction."""
        return np.quantile(sign * self.reference, QUANTILES, method="inverted_cdf")

    def counts(self) -> Significance:
        """Say how extreme the head is among its reference heads."""
        return reference_counts(self.z, self.reference, groups=self.groups)


def depth_reference(
    signed: NDArray[np.float64], head: Head, barred: Collection[Head], groups: NDArray[np.int64]
) -> DepthReference | None:
    """Compare a head with the unclaimed heads of its window, each standardised; None if there are none, or no spread.

    The window is the smallest number of layers on both sides of the head's that holds WINDOW KV groups with an
    unclaimed head, or the whole model. Place and spread at a layer are the trend's (`over_depth`), over the reference
    heads and the head itself: if others alone standardised it, it would be the more extreme of the two by construction.

    Why the level holds: let values be exchangeable between KV groups, but for a place and a spread that change smoothly
    from layer to layer. The standardisation treats all heads of the window alike, so that the head's rank among them
    is uniform, up to what the trend's error at the first and last layers, and in layers with few heads, adds: a
    tail that is measured and not proved (docs/calibration.md). Layers that differ from their neighbours in jumps are
    followed as far as they have SMOOTHED groups of their own.

    Args:
        signed: the metric [layer, head], larger in the predicted direction; nan if a head has no value.
        head: the head.
        barred: heads that are no reference.
        groups: each head's KV group, [head], the same in every layer.
    """
    layers, columns = _window(signed, [head], barred, groups)
    if not len(layers):
        return None
    layers, columns = np.append(layers, head[0]), np.append(columns, head[1])
    ids = layers * len(groups) + groups[columns]
    z = over_depth(signed[layers, columns], layers, ids)
    return None if z is None else DepthReference(float(z[-1]), z[:-1], layers[:-1], ids[:-1])


def depth_pool(
    signed: NDArray[np.float64], role: Sequence[Head], barred: Collection[Head], groups: NDArray[np.int64]
) -> Stratum | None:
    """Return a role's heads among the unclaimed heads of the smallest window around all of them; None without spread.

    All heads are standardised together, so that the values do not depend on which of them are the role's: a
    permutation of labels among the pool's KV groups is exact, given that groups are exchangeable once the trend is
    taken off. This is what it conditions on, and what `layer`, which permutes within layers, does not need.

    Args:
        signed, groups: as in `depth_reference`.
        role: the role's heads that have a value.
        barred: heads that other roles claim.
    """
    layers, columns = _window(signed, role, barred, groups)
    if not len(layers):
        return None
    own_layers, own_columns = np.array(role).T
    layers, columns = np.append(layers, own_layers), np.append(columns, own_columns)
    ids = layers * len(groups) + groups[columns]
    z = over_depth(signed[layers, columns], layers, ids)
    return None if z is None else Stratum(z, np.arange(len(z)) >= len(z) - len(role), ids)


def _window(
    signed: NDArray[np.float64], heads: Sequence[Head], barred: Collection[Head], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return layers and indices of the unclaimed heads in the smallest window around these heads' layers.

    It holds WINDOW KV groups, or is the whole model.
    """
    known = ~np.isnan(signed)
    for other in (*barred, *heads):
        known[other] = False
    there = (known @ (groups[:, None] == np.unique(groups))).sum(1)  # KV groups of each layer
    first, last = min(at for at, _ in heads), max(at for at, _ in heads)
    radius = 0
    while there[max(0, first - radius) : last + radius + 1].sum() < WINDOW and radius < len(signed):
        radius += 1
    low = max(0, first - radius)
    layers, columns = np.nonzero(known[low : last + radius + 1])
    return layers + low, columns


def over_depth(
    values: NDArray[np.float64], layers: NDArray[np.int64], groups: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Standardise heads by a trend over depth: (value - place) / spread; None if there is no spread.

    The place at a layer is the local linear fit through the layers' medians, the spread the local mean of the layers'
    median distances from the place. A layer weighs as many KV groups as it has, times a Gaussian kernel, as wide as it
    takes for the weights to sum to SMOOTHED groups. Medians are over KV groups: a few extreme ones move neither.

    Args:
        values: the metric, one head each.
        layers: each head's layer.
        groups: each head's KV group, numbered over the model.
    """
    ids, member = np.unique(groups, return_inverse=True)
    layer_of = np.zeros(len(ids), dtype=np.int64)
    layer_of[member] = layers
    at, place = np.unique(layers, return_inverse=True)

    def medians(of_heads: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each layer's median over KV groups, a group's value being its heads' mean."""
        means = np.bincount(member, of_heads) / np.bincount(member)
        return np.array([np.median(means[layer_of == layer]) for layer in at])

    sizes = np.array([(layer_of == layer).sum() for layer in at], dtype=float)
    weights, lines = _kernel(tuple(at.tolist()), tuple(sizes.tolist()))
    # Where a place rests on few groups, on the layer's own above all, heads are nearer to it: as much as independent
    # groups of one variance would be.
    nearer = 1 - 2 * lines.diagonal() / sizes + (lines**2 / sizes).sum(1)
    distance = values - (lines @ medians(values))[place]
    distance /= np.sqrt(np.maximum(nearer, LEAST_VARIANCE))[place]
    spread = (weights @ medians(np.abs(distance))) / weights.sum(1)
    return distance / spread[place] if (spread > TIE * np.abs(values).max()).all() else None


@lru_cache(maxsize=256)
def _kernel(at: tuple[int, ...], sizes: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights [at, from] of layers with so many KV groups, and their local lines, which all metrics share."""
    offset = (np.array(at)[None, :] - np.array(at)[:, None]).astype(float)
    weights = _weights(np.array(sizes), offset)
    return weights, _local_lines(weights, offset)


def _weights(sizes: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weights [at, from]: each layer's are by the narrowest kernel by which they sum to SMOOTHED groups."""
    widths = np.geomspace(NARROWEST, 4 * (1 + np.abs(offset).max()), 60)
    found = sizes * np.exp(-0.5 * (offset / widths[:, None, None]) ** 2)  # [width, at, from]
    enough = found.sum(-1) >= SMOOTHED
    first = np.where(enough.any(0), enough.argmax(0), len(widths) - 1)
    return found[first, np.arange(len(sizes))]


def _local_lines(weights: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return coefficients [at, from] of the weighted line's value at offset 0; of the mean if offsets do not vary."""
    s0, s1, s2 = ((weights * power).sum(1, keepdims=True) for power in (np.ones_like(offset), offset, offset**2))
    determinant = s0 * s2 - s1**2
    varies = determinant > 1e-9 * s0**2
    line = weights * (s2 - s1 * offset) / np.where(varies, determinant, 1.0)
    return np.where(varies, line, weights / s0)
