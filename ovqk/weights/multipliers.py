"""Numbers that multiply one activation to give another, and whether two activations are the same in float32.

A model of 135 million parameters that is read right differs from its own activations by 8e-7 of the largest.
"""

import torch
from torch import Tensor

TOLERANCE = 3e-5
"""Largest difference from the model's own activations that counts as agreement, relative to the largest of those."""
SAME_NUMBER = 1e-6
"""Relative difference up to which a fitted number is taken for another, or for 1: sums in float32 tell no less."""


def agrees(mine: Tensor, own: Tensor) -> bool:
    """Return whether two tensors differ by at most TOLERANCE times the second's largest entry."""
    if mine.shape != own.shape:
        return False
    return bool((mine - own).abs().max() <= TOLERANCE * own.abs().max().clamp_min(1e-6))


def same(one: float, other: float) -> bool:
    """Return whether two numbers are the same, as far as float32 tells."""
    return abs(one - other) <= SAME_NUMBER * max(abs(one), abs(other))


def fit_multiplier(mine: Tensor, own: Tensor) -> float:
    """Return the number that brings one tensor nearest to another (least squares); exactly 1 if it is 1 in float32."""
    mine, own = mine.detach().double(), own.detach().double()
    fitted = float((mine * own).sum() / mine.square().sum().clamp_min(1e-30))
    return 1.0 if same(fitted, 1.0) else fitted


def nearest_known(fitted: float, *known: float | None) -> float:
    """Return the known number that a fitted one is, as far as float32 tells; the fitted one if it is none of them."""
    return next((number for number in known if number is not None and same(fitted, number)), fitted)


def without_mean(x: Tensor) -> Tensor:
    """Return rows less their mean over positions: a constant of all positions is no head's."""
    return x - x.mean(0)


def is_constant(x: Tensor, to: float = 1e-4) -> bool:
    """Return whether a tensor has one value, apart from rounding, and that is not 0."""
    mean = float(x.double().mean())
    return mean > 0 and bool(torch.isfinite(x).all()) and float((x - mean).abs().max()) <= to * mean
