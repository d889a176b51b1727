"""P-values from a tail fitted to a null's draws, which the number of draws does not bound (definitions: section 6).

The method is by Knijnenburg et al. 2009. A generalised Pareto distribution is fitted to the draws above a high
quantile, and the fit is tested. p is the share of draws above the quantile, times the fitted chance that a draw exceeds
the observed value.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TAIL = 0.1  # the share of draws in the first tail that is tried
LEAST = 50  # draws in the smallest tail
STEP = 10  # draws by which a tail is shortened if it does not fit
ENOUGH = 10  # exceedances from which on p is counted without a tail
BOOTSTRAPS = 199
REJECTED = 0.05


@dataclass(frozen=True)
class Tail:
    """A p-value from a fitted tail.

    Attributes:
        p: the chance that a draw is at least as extreme, in (0, 1]; nan if no tail was fitted, or none fits.
        fit: p for the test that the tail is generalised Pareto, in (0, 1]; nan if none was tried. It is about the tail
            that was used or, if none fits, about the last that was tried.
        n: how many draws the tail holds; 0 if none was used.
    """

    p: float
    fit: float
    n: int


def tail_p(observed: float, draws: NDArray[np.float64]) -> Tail:
    """Return p for an observed value from the draws' fitted upper tail.

    If ENOUGH draws exceed the value, no tail is needed: p is counted as (1 + exceedances) / (1 + draws), and `fit` is
    nan. Otherwise the largest tenth of the draws is fitted. As long as the fit is rejected, the tail is shortened by
    STEP draws, down to LEAST. The tail is at least as heavy as the exponential's. A lighter one would have an end, and
    p = 0 beyond it; a hundred draws cannot show that there is an end.

    Args:
        observed: the value, larger in the predicted direction.
        draws: the same under the null, [draw]; infinite and nan draws are not allowed.
    """
    exceeding = int((draws >= observed).sum())
    if exceeding >= ENOUGH:
        return Tail((1 + exceeding) / (1 + len(draws)), math.nan, 0)
    ordered, fit = np.sort(draws)[::-1], math.nan
    for n in range(int(TAIL * len(draws)), LEAST - 1, -STEP):
        threshold = (ordered[n - 1] + ordered[n]) / 2
        excess = ordered[:n] - threshold
        if observed <= threshold or excess.mean() <= 0:
            break
        shape, scale = _fitted(excess[None])
        fit = _test_of_fit(excess, float(shape[0]), float(scale[0]))
        if fit > REJECTED:
            beyond = np.exp(_log_survival(np.array([[observed - threshold]]), shape, scale))
            return Tail(float(n / len(draws) * beyond[0, 0]), fit, n)
    return Tail(math.nan, fit, 0)


def _fitted(excess: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit generalised Pareto tails [sample, n] by probability-weighted moments (Hosking & Wallis 1987).

    Returns:
        Shape, in [0, 0.95] (0 is the exponential), and scale > 0, each [sample].
    """
    n = excess.shape[-1]
    rising = np.sort(excess, -1)
    mean = rising.mean(-1)
    weighted = (rising * ((n - np.arange(1, n + 1)) / (n - 1))).mean(-1)
    shape = np.clip(2 - mean / (mean - 2 * weighted), 0.0, 0.95)
    return shape, mean * (1 - shape)


def _log_survival(
    excess: NDArray[np.float64], shape: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the log of the fitted chance that a draw exceeds each excess, [sample, n]."""
    x = excess / scale[:, None]
    heavy = np.maximum(shape, 1e-9)[:, None]
    return np.where(shape[:, None] > 1e-9, -np.log1p(heavy * x) / heavy, -x)


def _test_of_fit(excess: NDArray[np.float64], shape: float, scale: float) -> float:
    """Return p of an Anderson-Darling test. Its null is BOOTSTRAPS samples drawn from the fit, each fitted again."""
    uniform = np.random.default_rng(0).random((BOOTSTRAPS, len(excess)))
    drawn = scale * (uniform**-shape - 1) / shape if shape > 1e-9 else -scale * np.log(uniform)
    found = _distance(excess[None], *_fitted(excess[None]))[0]
    null = _distance(drawn, *_fitted(drawn))
    return float((1 + (null >= found).sum()) / (1 + BOOTSTRAPS))


def _distance(
    excess: NDArray[np.float64], shape: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the Anderson-Darling distance of each sample [sample, n] from its fit."""
    above = np.minimum(_log_survival(np.sort(excess, -1), shape, scale), -1e-12)  # falling
    n = excess.shape[-1]
    weights = 2 * np.arange(1, n + 1) - 1
    return -n - (weights * (np.log(-np.expm1(above)) + above[:, ::-1])).mean(-1)
