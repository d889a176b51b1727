"""Rotary positions as a linear map: query or key rows times R(m).

`rotations` reads the frequencies from a checkpoint's config.json.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: a row x at position m becomes x R(m).

    Attributes:
        inverse_frequencies: radians per position, for each rotated pair, [rotary_dim / 2].
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J); otherwise (0, r/2), (1, r/2 + 1), ... (Llama, NeoX).
        scale: a factor on R(D), from a scaling that also multiplies queries' and keys' cosines and sines (YaRN,
            LongRoPE: the square of their attention factor).
    """

    inverse_frequencies: Float[Tensor, " pair"]
    interleaved: bool = False
    scale: float = 1.0

    def rotate(
        self,
        x: Float[Tensor, "*#batch d_head"],
        cos: Float[Tensor, "*#batch pair"],
        sin: Float[Tensor, "*#batch pair"],
    ) -> Float[Tensor, "*batch d_head"]:
        """Return x R for the rotation with these cosines and sines (their means give the mean rotation)."""
        rotary_dim = 2 * self.inverse_frequencies.numel()
        turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        rotated_first, rotated_second = first * cos - second * sin, first * sin + second * cos
        if self.interleaved:
            rotated = torch.stack((rotated_first, rotated_second), dim=-1).flatten(-2)
        else:
            rotated = torch.cat((rotated_first, rotated_second), dim=-1)
        return torch.cat((rotated, passed.expand(*rotated.shape[:-1], -1)), dim=-1)

    def angles(
        self, offsets: Float[Tensor, " offset"] | Int[Tensor, " offset"]
    ) -> tuple[Float[Tensor, "offset pair"], Float[Tensor, "offset pair"]]:
        """Return R(D)'s cosines and sines for each offset D, times the scale."""
        radians = offsets.to(self.inverse_frequencies)[:, None] * self.inverse_frequencies
        return self.scale * radians.cos(), self.scale * radians.sin()
