"""The null `depth`: one head among the heads in nearby layers (definitions: section 6).

One layer holds too few heads with keys of their own for a test at the 5 % level, so the window of layers around the
head grows until it holds enough. Layers differ, so heads are not compared by the metric itself, but by its distance
from a smooth trend over depth.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ovqk.verdicts.statistics import QUANTILES, TIE, Significance, Stratum, reference_counts
from ovqk.weights.types import Head

WINDOW = 40
"""How many KV groups with an unclaimed head the smallest window holds; 1 / (1 + WINDOW) is below the level."""
SMOOTHED = 10.0
"""The summed weight of the KV groups that a layer's trend rests on; a layer with this many borrows almost nothing."""
LEAST_VARIANCE = 0.05  # a head's variance around the trend over its layer's, so that no trend passes through the head
NARROWEST = 0.3  # layers: the least standard deviation of the kernel, at which a neighbour weighs .004


@dataclass(frozen=True)
class DepthReference:
    """One head's standardised value, and its reference heads'.

    Attributes:
        z: (the head's value - the trend) / the spread around the trend, larger in the predicted direction.
        reference: the same for each reference head, [n].
        layers: each reference head's layer, [n].
        groups: each reference head's KV group, [n], numbered over the model.
    """

    z: float
    reference: NDArray[np.float64]
    layers: NDArray[np.int64]
    groups: NDArray[np.int64]

    def quantiles(self, sign: float) -> NDArray[np.float64]:
        """Return the quantiles (at QUANTILES) of the reference heads' standardised values.

        Args:
            sign: -1 if the prediction is `low`, else 1: turns the values into the metric's own direction.
        """
        return np.quantile(sign * self.reference, QUANTILES, method="inverted_cdf")

    def counts(self) -> Significance:
        """Return p-values for the head's rank among its reference heads; a KV group counts as one head."""
        return reference_counts(self.z, self.reference, groups=self.groups)


def depth_reference(
    signed: NDArray[np.float64], head: Head, barred: Collection[Head], groups: NDArray[np.int64]
) -> DepthReference | None:
    """Compare a head with the unclaimed heads in its window, after standardising all of them.

    The window has the head's layer in its middle. It is the smallest one that holds WINDOW KV groups with an unclaimed
    head, or the whole model if that has fewer. Place and spread at a layer come from the trend over the reference heads
    and the head itself (`over_depth`). If the reference heads alone gave the trend, the head would be farther from it
    than they are by construction.

    Why the level holds: assume that values are exchangeable between KV groups, apart from a place and a spread that
    change smoothly from layer to layer. All heads in the window are standardised alike, so the head's rank among them
    is uniform. Only the trend's error disturbs that, at the first and last layers and in layers with few heads; its
    size is measured, not proved (docs/calibration.md). If a layer differs abruptly from its neighbours, the trend
    follows it as far as the layer has SMOOTHED groups of its own.

    Args:
        signed: the metric [layer, head], larger in the predicted direction; nan if a head has no value.
        head: the head.
        barred: heads that may not serve as references.
        groups: each head's KV group, [head], the same in every layer.

    Returns:
        None if there is no reference head, or no spread.
    """
    layers, columns = _window(signed, [head], barred, groups)
    if not len(layers):
        return None
    layers, columns = np.append(layers, head[0]), np.append(columns, head[1])
    ids = layers * len(groups) + groups[columns]
    z = over_depth(signed[layers, columns], layers, ids)
    return None if z is None else DepthReference(float(z[-1]), z[:-1], layers[:-1], ids[:-1])


def depth_references(signed: NDArray[np.float64], groups: NDArray[np.int64]) -> dict[Head, DepthReference]:
    """Compare every head that has a value with all others in its window: `depth_reference`, if no head is barred.

    A head and its reference heads are all heads in its window, so heads with one window are standardised together.

    Args:
        signed, groups: as in `depth_reference`.

    Returns:
        Head -> its comparison, without heads that have no reference head or no spread.
    """
    known, found = ~np.isnan(signed), dict[Head, DepthReference]()
    group = np.unique(groups, return_inverse=True)[1]
    members = known @ (group[:, None] == np.arange(group.max(initial=-1) + 1)).astype(int)  # [layer, group]
    all_groups = (members > 0).sum(1)
    standardised: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64] | None]] = {}
    for layer, index in np.argwhere(known).tolist():
        there = all_groups.copy()
        there[layer] -= members[layer, group[index]] == 1  # the head itself is no reference head
        low, stop = _nearby(there, layer, layer)
        if (low, stop) not in standardised:
            layers, columns = np.nonzero(known[low:stop])
            layers += low
            ids = layers * len(groups) + groups[columns]
            standardised[low, stop] = layers, ids, over_depth(signed[layers, columns], layers, ids)
        layers, ids, z = standardised[low, stop]
        if z is not None and len(z) > 1:
            place = int(known[low:layer].sum() + known[layer, :index].sum())
            others = np.arange(len(z)) != place
            found[layer, index] = DepthReference(float(z[place]), z[others], layers[others], ids[others])
    return found


def depth_pool(
    signed: NDArray[np.float64], role: Sequence[Head], barred: Collection[Head], groups: NDArray[np.int64]
) -> Stratum | None:
    """Return a role's heads and the unclaimed heads in the smallest window around all of them, standardised.

    All heads are standardised together, so the values do not depend on which heads are the role's. Permuting labels
    among the pool's KV groups is therefore exact if the groups are exchangeable once the trend is subtracted. The null
    `layer` permutes within layers and does not need that assumption.

    Args:
        signed, groups: as in `depth_reference`.
        role: the role's heads that have a value.
        barred: heads that other roles claim.

    Returns:
        None if there is no unclaimed head, or no spread.
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
    """Return the unclaimed heads (layers and indices) in the smallest window around these heads' layers.

    The window holds WINDOW KV groups with an unclaimed head, or is the whole model.
    """
    known = ~np.isnan(signed)
    for other in (*barred, *heads):
        known[other] = False
    there = (known @ (groups[:, None] == np.unique(groups))).sum(1)  # KV groups of each layer
    low, stop = _nearby(there, min(at for at, _ in heads), max(at for at, _ in heads))
    layers, columns = np.nonzero(known[low:stop])
    return layers + low, columns


def _nearby(there: NDArray[np.int64], first: int, last: int) -> tuple[int, int]:
    """Return the smallest window (start, stop) around layers first .. last with WINDOW groups, or all layers.

    `there` counts the groups of each layer.
    """
    radius = 0
    while there[max(0, first - radius) : last + radius + 1].sum() < WINDOW and radius < len(there):
        radius += 1
    return max(0, first - radius), last + radius + 1


def over_depth(
    values: NDArray[np.float64], layers: NDArray[np.int64], groups: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Standardise heads by a trend over depth: (value - place) / spread.

    The place at a layer is a local linear fit through the layers' medians. The spread is the local mean of the layers'
    median distances from the place. Both weigh a layer by its number of KV groups times a Gaussian kernel, which is as
    wide as it takes for the weights to sum to SMOOTHED groups. Medians are over KV groups, so that a few extreme groups
    move neither place nor spread.

    Args:
        values: the metric, [n].
        layers: each head's layer, [n].
        groups: each head's KV group, [n], numbered over the model.

    Returns:
        The standardised values, [n]; None if there is no spread.
    """
    ids, member, n_heads = np.unique(groups, return_inverse=True, return_counts=True)
    at, place = np.unique(layers, return_inverse=True)
    layer_of = np.zeros(len(ids), dtype=np.int64)
    layer_of[member] = place
    counts = np.bincount(layer_of)
    last = np.cumsum(counts) - 1
    middle = last - counts // 2, last - (counts - 1) // 2  # once groups are sorted by layer, then by value

    def medians(of_heads: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each layer's median over KV groups; the value of a group is the mean over its heads."""
        means = np.bincount(member, of_heads) / n_heads
        ordered = means[np.lexsort((means, layer_of))]
        return (ordered[middle[0]] + ordered[middle[1]]) / 2  # type: ignore[no-any-return]

    sizes = counts.astype(float)
    weights, lines = _kernel(tuple(at.tolist()), tuple(sizes.tolist()))
    # If a place rests on few groups, above all on the layer's own, heads lie nearer to it than they should. Correct
    # this by the factor that holds for independent groups with equal variance.
    nearer = 1 - 2 * lines.diagonal() / sizes + (lines**2 / sizes).sum(1)
    distance = values - (lines @ medians(values))[place]
    distance /= np.sqrt(np.maximum(nearer, LEAST_VARIANCE))[place]
    spread = (weights @ medians(np.abs(distance))) / weights.sum(1)
    return distance / spread[place] if (spread > TIE * np.abs(values).max()).all() else None


@lru_cache(maxsize=256)
def _kernel(at: tuple[int, ...], sizes: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the layers' weights [at, from] and local lines, which all metrics share: only KV groups decide them."""
    offset = (np.array(at)[None, :] - np.array(at)[:, None]).astype(float)
    weights = _weights(np.array(sizes), offset)
    return weights, _local_lines(weights, offset)


def _weights(sizes: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weights [at, from]; each layer has the narrowest kernel whose weights sum to SMOOTHED groups."""
    widths = np.geomspace(NARROWEST, 4 * (1 + np.abs(offset).max()), 60)
    found = sizes * np.exp(-0.5 * (offset / widths[:, None, None]) ** 2)  # [width, at, from]
    enough = found.sum(-1) >= SMOOTHED
    first = np.where(enough.any(0), enough.argmax(0), len(widths) - 1)
    return found[first, np.arange(len(sizes))]


def _local_lines(weights: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return coefficients [at, from] that give the weighted linear fit at offset 0, or the mean for a lone offset."""
    s0, s1, s2 = ((weights * power).sum(1, keepdims=True) for power in (np.ones_like(offset), offset, offset**2))
    determinant = s0 * s2 - s1**2
    varies = determinant > 1e-9 * s0**2
    line = weights * (s2 - s1 * offset) / np.where(varies, determinant, 1.0)
    return np.where(varies, line, weights / s0)
