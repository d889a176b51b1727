"""Metrics for a whole layer: the sum of its heads' W_QK (layers.parquet).

Published values are for raw weights, so `qk_symmetry` and `qk_directionality` always use them.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits.factors import key_side, query_side
from ovqk.circuits.grams import STRIPE_COLUMNS, blocks, precision
from ovqk.weights.folding import read_through
from ovqk.weights.types import Architecture, LayerWeights


def layer_metrics(raw: LayerWeights, folded: LayerWeights, architecture: Architecture) -> dict[str, float]:
    """Measure whether a layer's summed W_Q W_K^T is symmetric, and whether keys or queries dominate it.

    Source: Saponati et al. 2025, arXiv 2502.10927. `qk_symmetry` is tr(M M) / |M|_F^2; `qk_directionality` is positive
    if columns (keys) dominate (the paper's tables print the negative). Both are in [-1, 1], 0 for zero weights, and
    computed from raw weights; `qk_symmetry_folded` is the symmetry of folded weights.
    """
    matrix = _summed(raw, architecture)  # without the gains of a query and key norm
    values = {"qk_symmetry": _symmetry(matrix), "qk_directionality": directionality(matrix)}
    if folded is raw:
        return values | {"qk_symmetry_folded": values["qk_symmetry"]}
    if folded.qk_norm is None:  # folding is linear in each side's rows: the sum is folded, and not summed again
        for _ in range(2):
            matrix = read_through(raw.norm, matrix).T
    else:
        W_Q, W_K = query_side(folded.W_Q, folded), key_side(folded.W_K, folded)
        matrix = _summed(dataclasses.replace(folded, W_Q=W_Q, W_K=W_K), architecture)
    return values | {"qk_symmetry_folded": _symmetry(matrix)}


def _summed(weights: LayerWeights, architecture: Architecture) -> Float[Tensor, "d_model d_model"]:
    """Sum W_Q W_K^T over heads, as one product; query heads that share keys are summed first.

    Each side is divided by a power of two near its size: no metric here sees a scale, and tiny weights' products have
    squares that underflow float32.
    """
    group = architecture.n_heads // architecture.n_kv_heads
    queries = weights.W_Q.unflatten(0, (-1, group)).sum(1) if group > 1 else weights.W_Q
    dtype = precision(architecture.d_model)
    left, right = (_sized(side.transpose(0, 1).flatten(1), dtype) for side in (queries, weights.W_K))
    return left @ right.T


def _sized(side: Float[Tensor, "d_model column"], dtype: torch.dtype) -> Float[Tensor, "d_model column"]:
    """Scale one side so that its largest entry is below 1; exact, in two steps that stay finite."""
    exponent = int(torch.frexp(torch.stack(side.aminmax()).abs().amax()).exponent)
    return side.to(dtype) * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2)


def _symmetry(matrix: Float[Tensor, "d_model d_model"]) -> float:
    """Return tr(M M) / |M|_F^2, in stripes: no second matrix is held."""
    product = energy = 0.0
    for rows in blocks(len(matrix), STRIPE_COLUMNS):
        stripe = matrix[rows]
        product += float((stripe * matrix[:, rows].T).sum(dtype=torch.float64))
        energy += float(stripe.square().sum(dtype=torch.float64))
    return product / energy if energy > 0 else 0.0


def directionality(matrix: Float[Tensor, "row column"]) -> float:
    """Say how far outlying column norms exceed outlying row norms, in [-1, 1].

    With norms c of columns and r of rows, and tau = mean + 2 sd (ddof 1) for each:
    (sum over c > tau_c of (c - tau_c) - sum over r > tau_r of (r - tau_r)) / (their sum); 0 if none exceeds.
    """
    columns, rows = matrix.norm(dim=0), matrix.norm(dim=1)
    excess_columns, excess_rows = _excess(columns), _excess(rows)
    total = excess_columns + excess_rows
    return float((excess_columns - excess_rows) / total) if total > 0 else 0.0


def _excess(norms: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    if len(norms) < 2:
        return norms.new_zeros(())
    threshold = norms.mean() + 2 * norms.std()
    return (norms - threshold).clamp_min(0).sum()
