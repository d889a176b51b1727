"""The device that tensors live on."""

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from ovqk.config.schema import Device
from ovqk.errors import UserError
from ovqk.weights.stored_rows import StoredRows

Weights = TypeVar("Weights")


def resolve_device(device: Device) -> torch.device:
    """Return the device that was asked for.

    Raises:
        UserError: there is no CUDA device.
    """
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise UserError("device=cuda: torch finds no CUDA device here; allowed: cpu, auto.")
    return torch.device("cpu" if device is Device.cpu or not available else "cuda")


def device_name(device: torch.device) -> str:
    """Return how records name a device: `cpu`, or `cuda` with the GPU's own name."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def to_device(weights: Weights, device: torch.device) -> Weights:
    """Return the same dataclass of weights with its tensors (and its norm's) on a device."""
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
