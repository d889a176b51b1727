"""Means over clusters of prompts, and tests that flip the clusters' signs (definitions: section 7).

Prompts from one template are alike, so a cluster's mean counts as one observation.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 20_000
"""The largest number of flips that are tried. If there are more, this many are drawn."""
TIE = 1e-12

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClusterTest:
    """Means over clusters with their tests, [column].

    Attributes:
        mean: the mean over the clusters' means; nan if fewer than two clusters have a value.
        se: its standard error over clusters.
        quartiles: the 25, 50 and 75 % quantiles over prompts, [3, column].
        p: the share of sign flips with a mean at least as large, in (0, 1]; the observed signs are one of the flips.
        p_opposite: the share of sign flips with a mean at least as small.
        min_p: the smallest p that this number of clusters can give.
    """

    mean: Array
    se: Array
    quartiles: Array
    p: Array
    p_opposite: Array
    min_p: float


def cluster_means(values: Array, clusters: NDArray[np.int64]) -> Array:
    """Return each cluster's mean, [cluster, column], over the prompts that have a value in every column.

    Args:
        values: [prompt, column].
        clusters: each prompt's cluster, by number, [prompt].
    """
    whole = ~np.isnan(values).any(1)
    names, index = np.unique(clusters[whole], return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, index, values[whole])
    return sums / np.bincount(index, minlength=len(names))[:, None]


def flip_signs(values: Array, clusters: NDArray[np.int64], seed: int) -> ClusterTest:
    """Test whether means over clusters are above 0, by flipping clusters' signs (the same clusters in all columns).

    All 2^clusters flips are tried. If they are more than 20,000, the observed signs and 19,999 drawn flips are tried.
    Flips do not change the sum of squares, so the studentised mean and the mean itself rank them alike.

    Args:
        values: [prompt, column]. A prompt with nan in some columns, but not in all, is left out of all. A column
            without any value gives nan.
        clusters: each prompt's cluster, by number, [prompt].
        seed: the seed for drawn flips.
    """
    valued: NDArray[np.bool_] = np.asarray(~np.isnan(values).all(0))
    if not valued.all():
        return _spread(flip_signs(values[:, valued], clusters, seed), valued)
    values, means = values[~np.isnan(values).any(1)], cluster_means(values, clusters)
    n, columns = means.shape
    if n < 2:
        empty = np.full(columns, np.nan)
        return ClusterTest(empty, empty, np.full((3, columns), np.nan), empty, empty, 1.0)
    mean, sd = means.mean(0), means.std(0, ddof=1)
    signs = _signs(n, seed)
    flipped = signs @ means / n
    slack = TIE * np.abs(means).max(0)
    return ClusterTest(
        mean=mean,
        se=sd / np.sqrt(n),
        quartiles=np.quantile(values, (0.25, 0.5, 0.75), axis=0),
        p=(flipped >= mean - slack).mean(0),
        p_opposite=(flipped <= mean + slack).mean(0),
        min_p=1 / len(signs),
    )


def _spread(test: ClusterTest, valued: NDArray[np.bool_]) -> ClusterTest:
    """Widen a test from some columns to all columns, with nan in the others."""

    def spread(part: Array) -> Array:
        whole = np.full((*part.shape[:-1], len(valued)), np.nan)
        whole[..., valued] = part
        return whole

    parts = {name: spread(getattr(test, name)) for name in ("mean", "se", "quartiles", "p", "p_opposite")}
    return ClusterTest(**parts, min_p=test.min_p)


@lru_cache(maxsize=16)
def _signs(n: int, seed: int) -> Array:
    """Return flips [flip, cluster] of +1 and -1; the first leaves all signs as they are."""
    if 2**n <= DRAWS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    drawn = np.random.default_rng([seed, n]).choice((1.0, -1.0), size=(DRAWS, n))
    drawn[0] = 1.0
    return drawn
