"""The tail of a null's draws, fitted, so that a p-value is not bounded by the number of draws (definitions: section 6).

Knijnenburg et al. 2009: draws above a high quantile are fitted by a generalised Pareto distribution, the fit is tested,
and p is the share above the quantile times the fitted chance to exceed the observed value.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TAIL = 0.1  # share of the draws that the first tail tried holds
LEAST = 50  # draws in the smallest tail
STEP = 10  # draws by which a tail is shortened if it does not fit
ENOUGH = 10  # exceedances by which p is counted, and no tail is needed
BOOTSTRAPS = 199
REJECTED = 0.05


@dataclass(frozen=True)
class Tail:
    """A p-value from a fitted tail.

    Attributes:
        p: the chance that a draw is at least as extreme, in (0, 1]; nan if no tail was fitted, or none fits.
        fit: p of the test that the tail is generalised Pareto, in (0, 1]: of the tail that was used, or of the last
            that was tried; nan if none was.
        n: how many draws the tail holds; 0 if none was fitted.
    """

    p: float
    fit: float
    n: int


def tail_p(observed: float, draws: NDArray[np.float64]) -> Tail:
    """Return p of an observed value from the fitted upper tail of the draws.

    Draws that exceed the value ENOUGH times need no tail: p is then counted, as (1 + exceedances) / (1 + draws), and
    `fit` is nan. Otherwise the largest tenth of the draws is fitted, and STEP draws fewer as long as the fit is
    rejected, down to LEAST. The tail's shape is bounded below by the exponential's: a tail with an end would give p = 0
    beyond it, and an end is the last thing that a hundred draws can show.

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
        shape >= 0 (0: exponential) and scale > 0, each [sample].
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
    """Return the log of the chance to exceed each excess [sample, n]."""
    x = excess / scale[:, None]
    heavy = np.maximum(shape, 1e-9)[:, None]
    return np.where(shape[:, None] > 1e-9, -np.log1p(heavy * x) / heavy, -x)


def _test_of_fit(excess: NDArray[np.float64], shape: float, scale: float) -> float:
    """Return p of an Anderson-Darling test whose null is drawn from the fit, and fitted again (BOOTSTRAPS times)."""
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
