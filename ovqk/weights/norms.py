"""A model's norms, as data and as functions, for the residual stream and for queries and keys."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

NormKind = Literal["layernorm", "rmsnorm", "none"]


@dataclass(frozen=True)
class Norm:
    """A norm's gain and bias, [d_model] each; `weight` holds the whole gain (Gemma: 1 + gamma)."""

    kind: NormKind
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True)
class QueryKeyNorm:
    """A root-mean-square norm for queries and keys, before they are rotated.

    Attributes:
        query_gain, key_gain: factors on the normalised components.
        over_heads: a token has one root mean square over all heads (OLMo 2) instead of one for each.
    """

    query_gain: Float[Tensor, "head d_head"]
    key_gain: Float[Tensor, "kv_head d_head"]
    eps: float
    over_heads: bool = False

    def apply(
        self, x: Float[Tensor, "any_head row d_head"], gain: Float[Tensor, "any_head d_head"]
    ) -> Float[Tensor, "any_head row d_head"]:
        """Apply the norm to queries or to keys, with their gain."""
        return x * self.inverse_scale(x) * gain[:, None]

    def inverse_scale(self, x: Float[Tensor, "any_head row d_head"]) -> Float[Tensor, "one_or_any_head row one"]:
        """Return what queries or keys are multiplied by, besides their gain."""
        over = (0, 2) if self.over_heads else (2,)
        return torch.rsqrt(x.square().mean(over, keepdim=True) + self.eps)


def normalise(x: Float[Tensor, "*batch d_model"], kind: NormKind, eps: float) -> Float[Tensor, "*batch d_model"]:
    """Apply a norm without gain and bias, the part that remains once it is folded."""
    if kind == "none":
        return x
    if kind == "layernorm":
        return functional.layer_norm(x, x.shape[-1:], eps=eps)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return x * torch.rsqrt(square + eps)


def apply_norm(norm: Norm | None, x: Float[Tensor, "*batch d_model"], eps: float) -> Float[Tensor, "*batch d_model"]:
    """Apply a whole norm, with gain and bias; None leaves the rows as they are."""
    if norm is None:
        return x
    x = normalise(x, norm.kind, eps) * norm.weight
    return x if norm.bias is None else x + norm.bias


def inverse_scale(x: Float[Tensor, "*batch d_model"], kind: NormKind, eps: float) -> Float[Tensor, "*batch one"]:
    """Return what a norm multiplies rows by, besides its gain; under `layernorm` their mean is removed before."""
    if kind == "none":
        return torch.ones_like(x[..., :1])
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    return torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def linear_part(
    norm: Norm | None,
    parts: Float[Tensor, "*part_and_batch d_model"],
    whole: Float[Tensor, "*batch d_model"],
    eps: float,
) -> Float[Tensor, "*part_and_batch d_model"]:
    """Apply a norm without its bias to parts of rows, with the scale that it has on the whole rows.

    Parts that sum to the whole come out as parts that sum to the normalised whole.
    """
    if norm is None:
        return parts
    centred = parts - parts.mean(-1, keepdim=True) if norm.kind == "layernorm" else parts
    return centred * inverse_scale(whole, norm.kind, eps) * norm.weight
