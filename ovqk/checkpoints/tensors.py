"""Named tensors on disk: the protocol, and safetensors files.

Tensors are read one at a time, so that only those that an analysis needs are ever in memory. A file is reopened for
each read, because mapped pages count as resident memory for as long as it stays open.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovqk.errors import UserError

FLOATING = ("F64", "F32", "F16", "BF16")


@runtime_checkable
class Tensors(Protocol):
    """Named tensors on disk."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        ...

    @property
    def unread(self) -> Mapping[str, str]:
        """Name -> number format, of tensors whose numbers cannot be had."""
        ...

    @property
    def allowed(self) -> str:
        """The number formats that can be read, for a message."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return a tensor, or its rows start .. stop - 1, as an array that shares no memory with a file."""
        ...


@dataclass(frozen=True)
class SafetensorsFiles:
    """The tensors of one or more safetensors files.

    Attributes:
        files: tensor name -> the file that holds it.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    unread: Mapping[str, str]
    allowed = ", ".join(FLOATING)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or its rows start .. stop - 1, as float32.

        Raises:
            UserError: the file is damaged.
        """
        try:
            with safe_open(self.files[name], framework="pt") as file:
                whole = start == 0 and stop is None
                found = file.get_tensor(name) if whole else file.get_slice(name)[start:stop]
                return found.to(torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(self.files[name], error)) from error


def index_files(paths: Iterable[Path]) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the files and shapes of readable tensors, and the dtypes of others: masks and quantised tensors."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unread: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    piece = file.get_slice(name)
                    if piece.get_dtype() in FLOATING:
                        files[name], shapes[name] = path, tuple(piece.get_shape())
                    else:
                        unread[name] = piece.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(path, error)) from error
    return files, shapes, unread


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name}: not a complete safetensors file ({error}). Copy or download it again."
