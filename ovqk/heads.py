"""The two circuits of every head of a layer, as low-rank factors.

    W_QK = W_Q W_K^T      where the head looks: rows the query (destination), columns the key (source)
    W_OV = W_V W_O        what it copies: rows what is read at the source, columns what is written

Both are [d_model, d_model] of rank at most d_head. They are never formed: everything ovqk reports has a core of
d_head x d_head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.weights import Architecture, LayerWeights

Circuit = Literal["ov", "qk"]


@dataclass(frozen=True)
class Factors:
    """A batch of bilinear or linear maps M = left @ right, one per head.

    Attributes:
        circuit: `ov` (a map from the source's residual stream to the destination's) or `qk` (a form on both).
    """

    circuit: Circuit
    left: Float[Tensor, "head d_model d_head"]
    right: Float[Tensor, "head d_head d_model"]


def ov_factors(weights: LayerWeights, architecture: Architecture) -> Factors:
    """W_V and W_O of each query head; under grouped queries heads of a group share W_V."""
    return Factors("ov", weights.W_V[architecture.kv_of_head.to(weights.W_V.device)], weights.W_O)


def qk_factors(weights: LayerWeights, architecture: Architecture, offsets: Iterable[int] = (0,)) -> Factors:
    """W_Q Rbar and W_K^T of each query head, Rbar the mean of R(D) over these offsets.

    D = query position - key position; R(0) = 1, and without rotary positions every R is 1.
    """
    left = weights.W_Q
    if architecture.rotary is not None:
        cos, sin = architecture.rotary.angles(torch.tensor(list(offsets)))
        left = architecture.rotary.rotate(left, cos.mean(0).to(left), sin.mean(0).to(left))
    return Factors("qk", left, weights.W_K[architecture.kv_of_head.to(left.device)].mT)


def regauge(factors: Factors, seed: int) -> Factors:
    """The same maps through a random orthogonal gauge of each head: left A, A^T right, rounded as the weights are.

    In exact arithmetic nothing changes; what does change is decided by rounding and not by the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, _, d_head = factors.left.shape
    noise = torch.randn(heads, d_head, d_head, generator=generator, dtype=torch.float64)
    gauge = torch.linalg.qr(noise).Q.to(factors.left.device)
    left = (factors.left.double() @ gauge).to(factors.left.dtype)
    right = (gauge.mT @ factors.right.double()).to(factors.right.dtype)
    return Factors(factors.circuit, left, right)
