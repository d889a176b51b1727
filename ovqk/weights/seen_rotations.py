"""The rotations that a Hugging Face model holds, and the factor on their cosines and sines as its blocks see them.

A factor on cosines and sines multiplies R(D), and so belongs to W_QK: it need not reach all of a head's components.
Every other number that multiplies queries, keys or scores is the scale of the scores (docs/definitions.md, section 1).
Which number a model puts on its cosines is not told by any name, so it is measured on those that a block is handed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ovqk.weights.multipliers import is_constant, nearest_known
from ovqk.weights.rotary import Rotary

SAME_ANGLES = 1e-3
"""Largest difference between cosines of the same angles, over a few positions."""


@dataclass(frozen=True)
class CosineTable:
    """Cosines that a module is given or gives, and the square of the factor on them and on their sines.

    Attributes:
        cosines: without the factor, one row for each position from 0 on.
        scale: the factor's square, which multiplies a score.
    """

    cosines: Float[Tensor, "position component"]
    scale: float


def cosine_tables(value: Any, length: int) -> Iterator[CosineTable]:
    """Yield the cosines among a module's arguments or outputs: a pair of tensors whose squares sum to one number.

    Args:
        value: arguments or outputs, in any nest of tuples, lists and dictionaries.
        length: how many positions there are.
    """
    if isinstance(value, Mapping):
        for each in value.values():
            yield from cosine_tables(each, length)
    elif torch.is_tensor(value) and value.is_complex():
        yield from _table(value.real, value.imag, length)
    elif isinstance(value, tuple | list):
        if len(value) == 2 and all(torch.is_tensor(each) and each.is_floating_point() for each in value):
            yield from _table(value[0], value[1], length)
        for each in value:
            yield from () if torch.is_tensor(each) and not each.is_complex() else cosine_tables(each, length)


def _table(cos: Tensor, sin: Tensor, length: int) -> Iterator[CosineTable]:
    if cos.shape != sin.shape or cos.dim() < 2 or cos.shape[-2] != length:
        return
    cos, sin = (each.detach().double().reshape(-1, length, each.shape[-1])[0] for each in (cos, sin))
    square = cos.square() + sin.square()
    if is_constant(square):
        scale = nearest_known(float(square.mean()), 1.0)
        yield CosineTable((cos / scale**0.5).float(), scale)


def measured_scale(rotary: Rotary, tables: Sequence[CosineTable]) -> float | None:
    """Return the square of the factor on a rotation's cosines; None if they were not seen, or with several factors."""
    found: list[float] = []
    for table in tables:
        angles = torch.arange(len(table.cosines))[:, None] * rotary.inverse_frequencies
        own = angles.cos()
        for layout in (own, torch.cat((own, own), -1), own.repeat_interleave(2, -1)):
            if layout.shape == table.cosines.shape and (layout - table.cosines).abs().max() < SAME_ANGLES:
                if nearest_known(table.scale, *found) not in found:
                    found.append(table.scale)
                break
    return found[0] if len(found) == 1 else None


def find_rotations(model: nn.Module) -> list[Rotary]:
    """Return the rotations that the model's buffers and config hold, each once in either layout and direction.

    They are without factors: `measured_scale` tells those.
    """
    found: list[Rotary] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and buffer.dim() == 1 and "original" not in name:
                found.append(Rotary(buffer.detach().float()))
    rotary_dim = getattr(getattr(model, "config", None), "rotary_dim", None)
    if isinstance(rotary_dim, int) and rotary_dim > 0:  # CodeGen keeps tables of sines and cosines
        found.append(Rotary(10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)))
    once: list[Rotary] = []
    for rotary in found:
        if not any(torch.equal(each.inverse_frequencies, rotary.inverse_frequencies) for each in once):
            once.append(rotary)
    once += [replace(rotary, inverse_frequencies=-rotary.inverse_frequencies) for rotary in once]  # turned backwards
    return [replace(rotary, interleaved=interleaved) for interleaved in (False, True) for rotary in once]
