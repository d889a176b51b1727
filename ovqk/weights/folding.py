"""Folding of norms into the weights that read through them (definitions: section 1, Processing).

A norm's gain and bias move into the weights behind it, and a LayerNorm's centring into the weights on both sides;
only `norms.normalise` remains to be done to the residual stream.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import Norm, NormKind
from ovqk.weights.stored_rows import StoredRows
from ovqk.weights.types import Architecture, EmbeddingWeights, LayerWeights


def _read_through(
    norm: Norm | None, weight: Float[Tensor, "*head d_model d_out"], bias: Float[Tensor, "*head d_out"]
) -> tuple[Float[Tensor, "*head d_model d_out"], Float[Tensor, "*head d_out"]]:
    """Fold the norm before a reading weight into it: first the bias, by the original weight, then the gain."""
    if norm is not None and norm.bias is not None:
        bias = bias + torch.einsum("d,...do->...o", norm.bias, weight)
    return read_through(norm, weight), bias


def read_through(
    norm: Norm | None, weight: Float[Tensor, "*head d_model d_out"]
) -> Float[Tensor, "*head d_model d_out"]:
    """Fold the norm before a reading weight into it: its gain, and for LayerNorm no all-ones direction is left."""
    if norm is None:
        return weight
    weight = norm.weight.to(weight)[:, None] * weight
    return weight - weight.mean(-2, keepdim=True) if norm.kind == "layernorm" else weight


def _write_centred(kind: NormKind, weight: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Drop the all-ones direction of a write, which no reader behind a LayerNorm sees."""
    return weight - weight.mean(-1, keepdim=True) if kind == "layernorm" else weight


def fold_reads(weights: LayerWeights, architecture: Architecture) -> LayerWeights:
    """Fold the norm before attention into W_Q, W_K, W_V and centre W_O; a norm after attention stays beside W_O."""
    W_Q, b_Q = _read_through(weights.norm, weights.W_Q, weights.b_Q)
    W_K, b_K = _read_through(weights.norm, weights.W_K, weights.b_K)
    W_V, b_V = _read_through(weights.norm, weights.W_V, weights.b_V)
    W_O = _write_centred(architecture.norm, weights.W_O)
    return dataclasses.replace(weights, W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O, b_Q=b_Q, b_K=b_K, b_V=b_V, norm=None)


def fold_layer(weights: LayerWeights, architecture: Architecture) -> LayerWeights:
    """Fold the norms before and after attention (definitions: section 1, Processing).

    A norm after attention has a divisor that depends on all heads together. It is left out: only the gain is folded.
    """
    folded = fold_reads(weights, architecture)
    if weights.post_norm is None:
        return folded
    return dataclasses.replace(folded, W_O=folded.W_O * weights.post_norm.weight, post_norm=None)


def fold_embeddings(weights: EmbeddingWeights, architecture: Architecture) -> EmbeddingWeights:
    """Centre W_E and W_pos, and fold the final norm into W_U (its bias moves every logit alike for all sources)."""
    W_E, W_pos, W_U, centred = weights.W_E, weights.W_pos, weights.W_U, architecture.norm == "layernorm"
    if isinstance(W_U, StoredRows):
        norm = weights.final_norm
        W_U = W_U if norm is None else W_U.folded(norm.weight, norm.kind == "layernorm")
    elif W_U is not None:
        W_U, _ = _read_through(weights.final_norm, W_U, W_U.new_zeros(W_U.shape[-1]))
    if isinstance(W_E, StoredRows):
        W_E = W_E.folded(None, centred)
    elif W_E is not None:
        W_E = _write_centred(architecture.norm, W_E)
    return EmbeddingWeights(
        W_E=W_E,
        W_pos=None if W_pos is None else _write_centred(architecture.norm, W_pos),
        W_U=W_U,
        final_norm=None,
    )


def fold_mlp(weights: MLPWeights, architecture: Architecture) -> MLPWeights:
    """Fold the norm before an MLP into both of its reading weights and centre its writes; a norm after it stays."""
    W_in, b_in = _read_through(weights.norm, weights.W_in, weights.b_in)
    W_linear, b_linear = weights.W_linear, weights.b_linear
    if W_linear is not None:
        bias = W_linear.new_zeros(W_linear.shape[-1]) if b_linear is None else b_linear
        W_linear, b_linear = _read_through(weights.norm, W_linear, bias)
    return dataclasses.replace(
        weights,
        W_in=W_in,
        b_in=b_in,
        W_linear=W_linear,
        b_linear=b_linear,
        W_out=_write_centred(architecture.norm, weights.W_out),
        b_out=_write_centred(architecture.norm, weights.b_out),
        norm=None,
    )
