"""Permutation tests, exact and sampled, corrections and effect sizes (definitions: section 6).

Nothing here knows about heads' weights or the config: functions take arrays and return numbers.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
"""The significance level, for p and for q."""
EXACT_LABELINGS = 100_000
DRAWS = 10_000
EXCEEDANCES = 20  # after which a Monte Carlo test stops
TIE = 1e-12  # values closer than this are equal
QUANTILES = (0.0, 0.01, 0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975, 0.99, 1.0)
"""The null quantiles that are kept for every test."""

Distribution = dict[int, int]
"""Sum of scores -> the number of labelings with that sum."""


@dataclass(frozen=True)
class Stratum:
    """The heads in one layer among which a role's labels are permuted.

    Attributes:
        values: the metric, [n], larger in the predicted direction.
        claimed: whether the role claims each head, [n].
        groups: each head's KV group, [n]; without grouped queries, every head is a group of its own.
    """

    values: NDArray[np.float64]
    claimed: NDArray[np.bool_]
    groups: NDArray[np.int64]


@dataclass(frozen=True)
class Permutation:
    """The claimed heads' mean rank within their layers, tested by permuting labels within layers.

    Attributes:
        statistic: (rank - 0.5) / n, averaged over the claimed heads, in (0, 1); 0.5 by chance.
        p, p_opposite: one-sided, in the predicted and in the other direction, in (0, 1]; the identity is included.
        min_p: the smallest p that these labels and ranks can give.
        null_mean, null_sd: the statistic's mean and standard deviation over the labelings.
        percentile: the share of labelings with a smaller statistic, ties half, in [0, 1].
        labelings: how many labelings were counted, the identity included.
        exact: whether these are all there are, and not a sample.
        quantiles: the statistic over the labelings, at QUANTILES.
    """

    statistic: float
    p: float
    p_opposite: float
    min_p: float
    null_mean: float
    null_sd: float
    percentile: float
    labelings: int
    exact: bool
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class MonteCarlo:
    """A test against random draws in both directions, each counted until its p is known well enough.

    Attributes:
        p, p_opposite: (1 + exceedances) / (1 + draws), in (0, 1].
        n: how many draws p was counted on.
        p_stopped: whether p has met its 20 exceedances, so that more draws would not change it.
        stopped: whether both directions have met theirs, so that more draws would change neither p.
    """

    p: float
    p_opposite: float
    n: int
    p_stopped: bool
    stopped: bool


def monte_carlo(observed: float, draws: NDArray[np.float64]) -> MonteCarlo:
    """Count p in both directions by sequential Monte Carlo (Besag & Clifford 1991).

    The draws are counted in order, up to the 20th that is at least as extreme. Ties count against the claim.

    Args:
        observed: the value, larger in the predicted direction.
        draws: the same under the null, [draw].
    """
    p, n, stopped = _counted(draws >= observed - TIE)
    p_opposite, _, stopped_opposite = _counted(draws <= observed + TIE)
    return MonteCarlo(p, p_opposite, n, stopped, stopped and stopped_opposite)


def _counted(exceeds: NDArray[np.bool_]) -> tuple[float, int, bool]:
    counts = exceeds.cumsum()
    n, exceedances = len(exceeds), int(counts[-1]) if len(exceeds) else 0
    if exceedances >= EXCEEDANCES:
        n, exceedances = int(np.searchsorted(counts, EXCEEDANCES)) + 1, EXCEEDANCES
    return (1 + exceedances) / (1 + n), n, exceedances == EXCEEDANCES


def midranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each value's mid-rank times two, [n], so that ties have integers too; the least value alone has 2."""
    difference = values[:, None] - values[None, :]
    return 2 * (difference > TIE).sum(1) + (np.abs(difference) <= TIE).sum(1) + 1


def stratified_permutation(strata: Sequence[Stratum], seed: int) -> Permutation:
    """Permute the role's labels within each layer (docs/definitions.md, section 6).

    Under grouped queries KV groups are permuted first, and then heads within groups. Up to 100,000 labelings are all
    counted, by convolution. If there are more, 10,000 are drawn, and the identity is counted with them (Phipson & Smyth
    2010).

    Raises:
        ValueError: no stratum claims a head.
    """
    claimed = sum(int(stratum.claimed.sum()) for stratum in strata)
    if claimed == 0:
        raise ValueError("no claimed head in any stratum")
    common = math.lcm(*(len(stratum.values) for stratum in strata))
    scores = [(midranks(s.values) - 1) * (common // len(s.values)) for s in strata]
    observed = sum(int(score[s.claimed].sum()) for s, score in zip(strata, scores, strict=True))
    per_layer = [_labelings(s, score) for s, score in zip(strata, scores, strict=True)]
    total = math.prod(sum(layer.values()) for layer in per_layer)
    best_count = math.prod(layer[max(layer)] for layer in per_layer)
    scale = 2 * common * claimed
    if total <= EXACT_LABELINGS:
        sums = _convolve(per_layer)
        values, counts = np.array(list(sums)), np.array(list(sums.values()))
        at_least, at_most, labelings = (
            counts[values >= observed].sum(),
            counts[values <= observed].sum(),
            total,
        )
        below = counts[values < observed].sum() + 0.5 * counts[values == observed].sum()
    else:
        values = _draw(per_layer, seed)
        counts = np.ones_like(values)
        at_least, at_most = 1 + (values >= observed).sum(), 1 + (values <= observed).sum()
        below, labelings = (values < observed).sum() + 0.5 * (values == observed).sum(), DRAWS + 1
    mean = float(np.average(values, weights=counts))
    return Permutation(
        statistic=observed / scale,
        p=float(at_least / labelings),
        p_opposite=float(at_most / labelings),
        min_p=best_count / total if total <= EXACT_LABELINGS else 1 / labelings,
        null_mean=mean / scale,
        null_sd=float(np.sqrt(np.average((values - mean) ** 2, weights=counts))) / scale,
        percentile=float(below / counts.sum()),
        labelings=labelings,
        exact=total <= EXACT_LABELINGS,
        quantiles=tuple(float(value) / scale for value in _weighted_quantiles(values, counts)),
    )


def pooled_permutation(pool: Stratum, seed: int) -> Permutation:
    """Permute the role's labels over one pool of heads from several layers, KV groups first, then heads within groups.

    Up to 100,000 labelings this is `stratified_permutation` with one stratum. If there are more, 10,000 are drawn
    directly. `stratified_permutation` would first compute the distribution of all, which takes too long for a pool with
    many groups.

    Raises:
        ValueError: no head is claimed.
    """
    if not pool.claimed.any():
        raise ValueError("no claimed head in the pool")
    _, place = np.unique(pool.groups, return_inverse=True)
    sizes, taken = np.bincount(place), np.bincount(place, pool.claimed).astype(int)
    total = 1
    for size in set(sizes.tolist()):
        counts = Counter(taken[sizes == size].tolist())
        total *= math.factorial(sum(counts.values())) // math.prod(math.factorial(n) for n in counts.values())
        total *= math.prod(math.comb(size, kind) ** n for kind, n in counts.items())
    if total <= EXACT_LABELINGS:
        return stratified_permutation([pool], seed)
    scores, generator = midranks(pool.values) - 1, np.random.default_rng(seed)
    drawn, claimed = np.zeros(DRAWS, dtype=np.int64), int(pool.claimed.sum())
    for size in set(sizes.tolist()):
        inside = np.array([scores[place == index] for index in np.flatnonzero(sizes == size)])  # [group, head]
        wanted = taken[sizes == size]
        wanted = wanted[wanted > 0]
        if len(wanted):
            chosen = generator.random((DRAWS, len(inside))).argsort(1)[:, : len(wanted)]
            order = generator.random((DRAWS, len(wanted), size)).argsort(-1)
            kept = np.arange(size) < wanted[:, None]  # the first `wanted` in a random order
            drawn += (np.take_along_axis(inside[chosen], order, -1) * kept).sum((1, 2))
    observed, scale = int(scores[pool.claimed].sum()), 2 * len(scores) * claimed
    return Permutation(
        statistic=observed / scale,
        p=float((1 + (drawn >= observed).sum()) / (1 + DRAWS)),
        p_opposite=float((1 + (drawn <= observed).sum()) / (1 + DRAWS)),
        min_p=1 / (1 + DRAWS),
        null_mean=float(drawn.mean()) / scale,
        null_sd=float(drawn.std()) / scale,
        percentile=float((drawn < observed).mean() + 0.5 * (drawn == observed).mean()),
        labelings=DRAWS + 1,
        exact=False,
        quantiles=tuple(float(v) / scale for v in _weighted_quantiles(drawn, np.ones_like(drawn))),
    )


def _weighted_quantiles(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each share in QUANTILES, the smallest value that at least this share of counts does not exceed."""
    order = np.argsort(values)
    reached = counts[order].cumsum() / counts.sum()
    places = np.searchsorted(reached, np.array(QUANTILES) - TIE)
    return values[order][np.minimum(places, len(values) - 1)]


def _labelings(stratum: Stratum, scores: NDArray[np.int64]) -> Distribution:
    """Count one layer's labelings by the claimed heads' sum of scores.

    A KV group trades labels only with groups that have as many heads in this layer.
    """
    sizes: dict[int, list[tuple[NDArray[np.int64], int]]] = {}
    for group in np.unique(stratum.groups):
        inside = stratum.groups == group
        sizes.setdefault(int(inside.sum()), []).append((scores[inside], int(stratum.claimed[inside].sum())))
    return _convolve([_group_labelings([s for s, _ in groups], [c for _, c in groups]) for groups in sizes.values()])


def _group_labelings(groups: Sequence[NDArray[np.int64]], counts: Sequence[int]) -> Distribution:
    """Count the ways to assign these numbers of claimed heads to equal groups, and to choose heads within each."""
    kinds = sorted(set(counts))
    start = tuple(counts.count(kind) for kind in kinds)
    states: dict[tuple[int, ...], Distribution] = {start: {0: 1}}
    for scores in groups:
        choices = [Counter(sum(chosen) for chosen in itertools.combinations(scores.tolist(), k)) for k in kinds]
        following: dict[tuple[int, ...], Distribution] = {}
        for left, sums in states.items():
            for index, choice in enumerate(choices):
                if left[index]:
                    state = (*left[:index], left[index] - 1, *left[index + 1 :])
                    into = following.setdefault(state, {})
                    for value, ways in _convolve([sums, choice]).items():
                        into[value] = into.get(value, 0) + ways
        states = following
    return next(iter(states.values()))


def _convolve(distributions: Sequence[Distribution]) -> Distribution:
    total: Distribution = {0: 1}
    for distribution in distributions:
        sums: Distribution = {}
        for (a, ways_a), (b, ways_b) in itertools.product(total.items(), distribution.items()):
            sums[a + b] = sums.get(a + b, 0) + ways_a * ways_b
        total = sums
    return total


def _draw(per_layer: Sequence[Distribution], seed: int) -> NDArray[np.int64]:
    """Draw the sums of random labelings. Layers are independent, so each layer's sum has its own exact distribution."""
    generator = np.random.default_rng(seed)
    drawn = np.zeros(DRAWS, dtype=np.int64)
    for layer in per_layer:
        weights = np.array(list(layer.values()), dtype=np.float64)
        drawn += generator.choice(np.array(list(layer)), size=DRAWS, p=weights / weights.sum())
    return drawn


def within_layer_auc(strata: Sequence[Stratum]) -> float:
    """Return the probability that a claimed head exceeds an unclaimed one in its layer, in [0, 1]; 0.5 by chance.

    Ties count half. All pairs weigh the same, so layers with more pairs weigh more. The result is nan if there is no
    pair.
    """
    above = pairs = 0.0
    for stratum in strata:
        claimed, others = stratum.values[stratum.claimed], stratum.values[~stratum.claimed]
        above += float(_above(claimed[:, None] - others[None, :]).sum())
        pairs += len(claimed) * len(others)
    return float(above / pairs) if pairs else math.nan


def group_auc(strata: Sequence[Stratum]) -> float:
    """Return the probability that a KV group with a claimed head exceeds one without in its layer, in [0, 1].

    A group's value is the mean over its heads. Ties count half; the result is nan if there is no pair.
    """
    return within_layer_auc([grouped(stratum) for stratum in strata])


def grouped(stratum: Stratum) -> Stratum:
    """Replace the stratum's heads by KV groups; a group's value is its heads' mean, and one claimed head claims it."""
    names, place = np.unique(stratum.groups, return_inverse=True)
    sizes = np.bincount(place)
    values, claimed = np.bincount(place, stratum.values) / sizes, np.bincount(place, stratum.claimed) > 0
    return Stratum(values, claimed, names)


def _above(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 for a positive difference, and 0.5 for one that is no more than rounding."""
    return (difference > TIE) + 0.5 * (np.abs(difference) <= TIE)


def within_layer_auc_interval(
    strata: Sequence[Stratum], resamples: Sequence[NDArray[np.float64]]
) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % quantiles of `within_layer_auc` over resamples; nan if there is no pair.

    Args:
        strata: the observed strata.
        resamples: for each stratum, its heads' metric in every resample [draw, n], larger in the predicted direction.
    """
    above, pairs = 0.0, 0
    for stratum, values in zip(strata, resamples, strict=True):
        difference = values[:, stratum.claimed][:, :, None] - values[:, ~stratum.claimed][:, None, :]
        above = above + _above(difference).sum((1, 2))
        pairs += difference[0].size
    if not pairs:
        return math.nan, math.nan
    low, high = np.quantile(np.asarray(above) / pairs, (0.025, 0.975))
    return float(low), float(high)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Benjamini & Hochberg 1995; return q, in [0, 1], in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(1.0, np.minimum.accumulate(adjusted[::-1])[::-1])
    return [float(value) for value in q]


@dataclass(frozen=True)
class Significance:
    """How extreme a value is under a null. The fields are described in `NullTest`."""

    p: float
    p_opposite: float
    min_p: float
    effect: float
    n_null: int
    exact: bool
    n_others: int


def reference_counts(
    value: float, reference: NDArray[np.float64], groups: NDArray[np.int64] | None = None
) -> Significance:
    """Rank one head among reference heads: p = (1 + heads at least as extreme) / (1 + heads).

    Heads that share keys and values count together as one head.

    Args:
        value: the head's value, larger in the predicted direction.
        reference: the reference heads' values, [n].
        groups: each reference head's KV group, [n]; if None, every head is its own group.
    """
    weights, n = np.ones(len(reference)), len(reference)
    if groups is not None:
        kv_heads, place = np.unique(groups, return_inverse=True)
        weights, n = 1 / np.bincount(place)[place], len(kv_heads)
    above, below = reference >= value - TIE, reference <= value + TIE
    return Significance(
        p=float((1 + weights[above].sum()) / (1 + n)),
        p_opposite=float((1 + weights[below].sum()) / (1 + n)),
        min_p=1 / (1 + n),
        effect=float(below.sum() + (~above).sum()) / (2 * len(reference)),
        n_null=n,
        exact=True,
        n_others=len(reference),
    )


def percentile(value: float, reference: NDArray[np.float64]) -> float:
    """Return the share of reference values below the value, ties half, in [0, 1]; nan without reference values."""
    if not len(reference):
        return math.nan
    return float(_above(value - reference).mean())
