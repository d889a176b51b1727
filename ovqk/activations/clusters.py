"""Means over clusters of prompts, and tests by flipping the clusters' signs (definitions: section 7).

Prompts of one template are alike, so that the cluster is the unit: its mean is one observation.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 20_000
"""Draws of signs, unless all of them are fewer."""
TIE = 1e-12

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClusterTest:
    """Means over clusters with their tests, [column].

    Attributes:
        mean: of the clusters' means; nan if fewer than two clusters have a value.
        se: its standard error over clusters.
        quartiles: 25, 50 and 75 % of the prompts' own values, [3, column].
        p: share of sign flips, the one observed among them, whose mean is as large; p_opposite: as small.
        min_p: the smallest p that as many clusters can give.
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
        clusters: the number of each prompt's cluster.
    """
    whole = ~np.isnan(values).any(1)
    names, index = np.unique(clusters[whole], return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, index, values[whole])
    return sums / np.bincount(index, minlength=len(names))[:, None]


def flip_signs(values: Array, clusters: NDArray[np.int64], seed: int) -> ClusterTest:
    """Test that means over clusters are above 0 by flipping clusters' signs, the same ones in all columns.

    All 2^clusters flips are tried, or 20,000 drawn ones and the observed where they are fewer. The sum of squares does
    not change under flips, so that the studentised mean and the mean itself rank them alike.

    Args:
        values: [prompt, column]; a prompt with nan in some columns is left out of all, a column of nan alone stays so.
        clusters: the number of each prompt's cluster.
        seed: of the draws.
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
    """Return a test of some columns as one of all, with nan in the others."""

    def spread(part: Array) -> Array:
        whole = np.full((*part.shape[:-1], len(valued)), np.nan)
        whole[..., valued] = part
        return whole

    parts = {name: spread(getattr(test, name)) for name in ("mean", "se", "quartiles", "p", "p_opposite")}
    return ClusterTest(**parts, min_p=test.min_p)


@lru_cache(maxsize=16)
def _signs(n: int, seed: int) -> Array:
    """Return flips [flip, cluster], the unflipped first."""
    if 2**n <= DRAWS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    drawn = np.random.default_rng([seed, n]).choice((1.0, -1.0), size=(DRAWS, n))
    drawn[0] = 1.0
    return drawn
