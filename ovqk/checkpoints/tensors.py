"""Named tensors on disk: the protocol, and safetensors files.

Tensors are read one at a time, so that only those that an analysis needs are ever in memory. A file's header is read
once, and of each tensor only the bytes asked for: mapped pages would count as resident memory.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ovqk.checkpoints.shards import Read, read_header
from ovqk.errors import UserError

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATING = tuple(KINDS)


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
class ShapesAlone:
    """The shapes of tensors that are not on this machine: sizes can be told of them, and nothing can be read."""

    shapes: Mapping[str, tuple[int, ...]]
    unread: Mapping[str, str] = field(default_factory=dict)
    allowed = "none, for nothing was fetched"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Refuse to read.

        Raises:
            UserError: always.
        """
        raise UserError(f"{name}: only its shape was asked for; its numbers were not fetched.")


class Place(NamedTuple):
    """A tensor's place: its file, its number format, and the offset at which its bytes begin."""

    path: Path
    format: str
    offset: int


@dataclass(frozen=True)
class SafetensorsFiles:
    """The tensors of one or more safetensors files.

    Attributes:
        files: tensor name -> its place.
    """

    files: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, ...]]
    unread: Mapping[str, str]
    allowed = ", ".join(FLOATING)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or its rows start .. stop - 1, as float32.

        Raises:
            UserError: the file is damaged.
        """
        (path, stored, offset), shape = self.files[name], self.shapes[name]
        kind, row = KINDS[stored], math.prod(shape[1:])
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            offset, shape = offset + start * row * kind.itemsize, (max(0, stop - start), *shape[1:])
        content = bytearray(math.prod(shape) * kind.itemsize)
        if not content:
            return torch.empty(shape)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                view, done = memoryview(content), 0
                while done < len(content) and (read := file.readinto(view[done:])):
                    done += read
        except OSError as error:
            raise UserError(_damaged(path, error)) from error
        if done < len(content):
            raise UserError(_damaged(path, ValueError(f"{len(content)} bytes from byte {offset} on are not there")))
        return torch.frombuffer(content, dtype=kind).reshape(shape).to(torch.float32)


def index_files(paths: Iterable[Path]) -> tuple[dict[str, Place], dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the places and shapes of readable tensors, and the other tensors' dtypes: masks and quantised tensors.

    Raises:
        UserError: a file is no safetensors file, is cut short, or holds a tensor that another one holds, too.
    """
    files: dict[str, Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unread: dict[str, str] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                header = read_header(_reader(file.fileno()), os.fstat(file.fileno()).st_size)
            for name, tensor in header.tensors.items():
                if name in shapes or name in unread:
                    other = files[name].path.name if name in files else "another file"
                    raise UserError(f"{path.name}: it holds '{name}', and so does {other}; allowed: each tensor once.")
                if tensor["dtype"] in KINDS:
                    files[name] = Place(path, tensor["dtype"], header.start + tensor["data_offsets"][0])
                    shapes[name] = tuple(tensor["shape"])
                else:
                    unread[name] = tensor["dtype"]
        except (ValueError, OSError) as error:
            raise UserError(_damaged(path, error)) from error
    return files, shapes, unread


def _reader(descriptor: int) -> Read:
    return lambda offset, length: os.pread(descriptor, length, offset)


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name}: not a complete safetensors file ({error}). Copy or download it again."
