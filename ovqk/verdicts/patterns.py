"""Four patterns of a claimed head, each with its evidence (definitions: section 6).

    ov_aligned   an OV prediction of the role holds for the head
    qk_simple    QK has few components (90 % of the energy in d_head / 4 or fewer), and the first stands alone
    ov_flat      the OV energy is spread as in a product of random matrices: no single role can be assigned
    both_align   an OV and a QK prediction hold

Exploratory predictions make no pattern. Predictions that hold only against `spectrum` make none either, because any
trained head may beat that null. The evidence lists both kinds and marks them.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ovqk import wording
from ovqk.config.schema import CIRCUITS
from ovqk.metrics import HEAD_METRICS, METRICS
from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.nulls import Values
from ovqk.verdicts.statistics import ALPHA
from ovqk.weights.types import Head

PATTERNS = tuple(wording.PATTERNS)
SIMPLE = 0.25  # share of d_head
CLUSTER = 0.1  # a component is not identified alone if the next one is closer than this share of its value
FLAT_QUANTILE, FLAT_DRAWS = 0.05, 400


def head_patterns(
    values: Values, head: Head, shape: tuple[int, int], second: float, rows: Sequence[NullTest]
) -> dict[str, Any]:
    """Return one claimed head's patterns as columns of verdicts.parquet.

    Each pattern is True, False, or None if a metric that it needs is missing. `evidence` says in words what each rests
    on.

    Args:
        values: metric -> [layer, head].
        head: the head.
        shape: how many dimensions its maps act on (d_model, or one less if they are centred), and d_head.
        second: sigma_2 / sigma_1 in W_QK, in [0, 1]; nan if QK was not taken apart.
        rows: its tests.
    """
    held = _holding(rows)
    ov, qk = (
        any(METRICS[name].circuit == c and not held[name] for name in held) for c in CIRCUITS
    )  # without a reserve
    rank, spread = (float(values[name][head]) for name in ("qk_rank90", "ov_effective_rank_energy"))
    least = iid_effective_rank(*shape) if math.isfinite(spread) else math.nan
    evidence = []
    if held:
        evidence.append("holds: " + ", ".join(n + (f" ({held[n]})" if held[n] else "") for n in held))
    if math.isfinite(rank):
        evidence.append(f"QK: {rank:.0f} of {shape[1]} components for 90 %, sigma_2 / sigma_1 = {second:.2f}")
    if math.isfinite(spread):
        evidence.append(f"OV: effective rank of energies {spread:.1f}, random weights {least:.1f} or more")
    return {
        "ov_aligned": ov if rows and math.isfinite(spread) else None,
        "qk_simple": bool(rank <= SIMPLE * shape[1] and second <= 1 - CLUSTER) if math.isfinite(rank) else None,
        "ov_flat": bool(spread >= least) if math.isfinite(spread) else None,
        "both_align": ov and qk if rows and math.isfinite(rank) and math.isfinite(spread) else None,
        "evidence": "; ".join(evidence),
    }


def _holding(rows: Sequence[NullTest]) -> dict[str, str]:
    """Return metric -> reservation for predictions that hold under every null that could decide.

    The reservation is empty unless the prediction is exploratory or holds against `spectrum` alone.
    """
    found: dict[str, str] = {}
    for metric in dict.fromkeys(row.metric for row in rows if row.metric in HEAD_METRICS):
        mine = [row for row in rows if row.metric == metric and row.testable]
        exploratory = all(row.exploratory for row in mine)
        deciding = [row for row in mine if row.counts or (exploratory and row.null in ("depth", "spectrum"))]
        if deciding and all((row.p if exploratory else row.q) < ALPHA for row in deciding):
            alone = all(row.null == "spectrum" for row in deciding)
            found[metric] = ", ".join(["exploratory, uncorrected"] * exploratory + ["against spectrum alone"] * alone)
    return found


@lru_cache(maxsize=64)
def iid_effective_rank(d_model: int, d_head: int) -> float:
    """Return the effective rank, exp H(sigma^2 / sum sigma^2) in [1, d_head], that 95 % of random OV circuits exceed.

    A random circuit is the product of iid Gaussian matrices [d_model, d_head] and [d_head, d_model]. FLAT_DRAWS
    circuits are drawn from a fixed seed. Only their triangular factors are drawn, by Bartlett's decomposition: chi
    variables on the diagonal, normal ones above it.
    """
    generator = np.random.default_rng(0)
    k = min(d_model, d_head)

    def triangular() -> np.ndarray:
        upper = np.triu(generator.standard_normal((FLAT_DRAWS, k, d_head)), 1)
        diagonal = np.sqrt(generator.chisquare(d_model - np.arange(k), size=(FLAT_DRAWS, k)))
        upper[:, np.arange(k), np.arange(k)] = diagonal
        return upper

    energy = np.linalg.svd(triangular() @ triangular().transpose(0, 2, 1), compute_uv=False) ** 2
    share = energy / energy.sum(-1, keepdims=True)
    entropy = -(share * np.log(np.clip(share, 1e-300, None))).sum(-1)
    return float(np.quantile(np.exp(entropy), FLAT_QUANTILE))
