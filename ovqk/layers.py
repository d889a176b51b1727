"""Metrics of a whole layer: all of its heads' W_QK summed (layers.parquet).

Published values are of the raw weights, so `qk_symmetry` and `qk_directionality` always are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.heads import qk_factors
from ovqk.weights import Architecture, LayerWeights


def layer_metrics(raw: LayerWeights, folded: LayerWeights, architecture: Architecture) -> dict[str, float]:
    """`qk_symmetry` and `qk_directionality` of the raw, `qk_symmetry_folded` of the folded sum over heads of W_Q W_K^T.

    Saponati et al. 2025, arXiv 2502.10927. Symmetry tr(M M) / |M|_F^2 and directionality both lie in [-1, 1];
    positive directionality is column (key) dominated (the paper's tables print the negative). 0 for a zero layer.
    """
    keys = raw.W_K[architecture.kv_of_head.to(raw.W_K.device)]  # without the gains of a norm of queries and keys
    matrix = _summed(raw.W_Q, keys.mT)
    processed = qk_factors(folded, architecture)
    return {
        "qk_symmetry": _symmetry(matrix),
        "qk_directionality": directionality(matrix),
        "qk_symmetry_folded": _symmetry(_summed(processed.left, processed.right)),
    }


def _summed(
    left: Float[Tensor, "head d_model d_head"], right: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "d_model d_model"]:
    return torch.einsum("hdx,hxe->de", left.double(), right.double())


def _symmetry(matrix: Float[Tensor, "d_model d_model"]) -> float:
    energy = matrix.square().sum()
    return float((matrix * matrix.T).sum() / energy) if energy > 0 else 0.0


def directionality(matrix: Float[Tensor, "row column"]) -> float:
    """How far outlying column norms exceed outlying row norms, in [-1, 1].

    With c, r the norms of columns and rows and tau = mean + 2 sd (ddof 1) of each:
    (sum over c > tau_c of (c - tau_c) - sum over r > tau_r of (r - tau_r)) / (their sum); 0 where none exceeds.
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
