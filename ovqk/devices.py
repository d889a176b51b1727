"""Where tensors live."""

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from ovqk.errors import UserError
from ovqk.weights import StoredRows

Weights = TypeVar("Weights")


def resolve_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: cuda where there is one.

    Raises:
        UserError: another name, or no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device={name}: allowed: cpu, cuda, auto.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device here; allowed: cpu, auto.")
    return torch.device(name)


def to_device(weights: Weights, device: torch.device) -> Weights:
    """The same dataclass of weights with its tensors (and its norm's) on a device."""
    if device.type == "cpu":
        return weights
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, field.name)
        if isinstance(value, (Tensor, StoredRows)):
            moved[field.name] = value.to(device)
        elif dataclasses.is_dataclass(value):
            moved[field.name] = to_device(value, device)
    return dataclasses.replace(weights, **moved)  # type: ignore[type-var]
