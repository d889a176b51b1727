"""A layer's two circuits, head by head, as low-rank factors (definitions: section 1).

    W_QK = W_Q W_K^T      where the head looks; rows: the query (destination), columns: the key (source)
    W_OV = W_V W_O        what the head copies; rows: read at the source, columns: written at the destination

Under rotary positions W_QK(D) = W_Q R(D) W_K^T for a key D tokens back. If the model normalises queries and keys, W_QK
includes the gains but not the divisors: it is the form on queries and keys before they are normalised.

Both are [d_model, d_model] with rank at most d_head. They are never formed, because every number that ovqk reports can
be computed from a core of d_head x d_head.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.config.schema import Circuit
from ovqk.weights.types import Architecture, LayerWeights, keys, queries


@dataclass(frozen=True)
class Factors:
    """Bilinear or linear maps M = left @ right, one per head.

    Attributes:
        circuit: OV (a map from the source's residual stream to the destination's) or QK (a form on both).
    """

    circuit: Circuit
    left: Float[Tensor, "head d_model d_head"]
    right: Float[Tensor, "head d_head d_model"]


def ov_factors(weights: LayerWeights, architecture: Architecture) -> Factors:
    """Return each query head's W_V and W_O; under grouped queries a group's heads share W_V."""
    return Factors(Circuit.ov, weights.W_V[architecture.kv_of_head.to(weights.W_V.device)], weights.W_O)


def qk_factors(weights: LayerWeights, architecture: Architecture, offsets: Iterable[int] = (0,)) -> Factors:
    """Return each query head's W_Q Rbar and W_K^T, with Rbar the mean of R(D) over these offsets.

    D = query position - key position; R(0) = 1, and without rotary positions every R is 1.
    """
    keys = key_side(weights.W_K, weights)
    return Factors(
        Circuit.qk, query_side(weights.W_Q, weights, offsets), keys[architecture.kv_of_head.to(keys.device)].mT
    )


def query_side(
    W_Q: Float[Tensor, "head row d_head"], weights: LayerWeights, offsets: Iterable[int] = (0,)
) -> Float[Tensor, "head row d_head"]:
    """Return W_Q, or its coordinates in a basis, with the norm's gain and the mean rotation."""
    return _rotated(
        W_Q if weights.qk_norm is None else W_Q * weights.qk_norm.query_gain.to(W_Q)[:, None], weights, offsets
    )


def key_side(W_K: Float[Tensor, "kv_head row d_head"], weights: LayerWeights) -> Float[Tensor, "kv_head row d_head"]:
    """Return W_K, or its coordinates in a basis, with the norm's gain."""
    return W_K if weights.qk_norm is None else W_K * weights.qk_norm.key_gain.to(W_K)[:, None]


def scores(
    weights: LayerWeights,
    architecture: Architecture,
    query_rows: Float[Tensor, "query d_model"],
    key_rows: Float[Tensor, "key d_model"],
    offsets: Iterable[int] = (0,),
) -> Float[Tensor, "head query key"]:
    """Return each head's scores before the softmax, with biases and normalisation but without the attention scale."""
    k = keys(weights, key_rows)[architecture.kv_of_head.to(key_rows.device)]
    return _rotated(queries(weights, query_rows), weights, offsets) @ k.mT


def _rotated(
    x: Float[Tensor, "head row d_head"], weights: LayerWeights, offsets: Iterable[int]
) -> Float[Tensor, "head row d_head"]:
    """Return x Rbar, Rbar the mean rotation over the offsets."""
    if weights.rotary is None:
        return x
    cos, sin = weights.rotary.angles(torch.tensor(list(offsets)))
    return weights.rotary.rotate(x, cos.mean(0).to(x), sin.mean(0).to(x))
