"""GGUF files, llama.cpp's format: a header with metadata and tensor places, and tensors that may be quantised.

The header is read here, since the package `gguf` takes seconds for a real vocabulary's words; that package knows which
numbers a quantised block stands for. Tensors are read one at a time, and only the bytes asked for.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from ovqk.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, unless the metadata give another
MOST_DIMENSIONS = 4
ROWS_TOGETHER = 2048  # rows dequantised at a time: the package's temporary arrays then fit in a processor's cache
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file.

    Attributes:
        shape: as numpy and torch write it, the outermost dimension first.
        quantisation: its number format, such as `F32`, `Q4_1` or `Q6_K`.
        offset: the byte in the file at which it begins.
        row_bytes: bytes in one row, the innermost dimension.
        known: whether its numbers can be had.
    """

    shape: tuple[int, ...]
    quantisation: str
    offset: int
    row_bytes: int
    known: bool

    @property
    def n_rows(self) -> int:
        """How many rows it has, each along the innermost dimension."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file by its header.

    Attributes:
        metadata: key -> a number, a truth value, a string, or a list of one of these.
        tensors: name -> its place in the file.
    """

    def __init__(self, path: Path, label: str) -> None:
        """Read the header.

        Args:
            path: the file.
            label: how messages name it.

        Raises:
            UserError: it is no GGUF file that can be read, it is cut short, or it is one part of several.
        """
        self.path, self.label = path, label
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _read_header(data)
        except (ValueError, struct.error, OverflowError) as error:
            raise UserError(f"{label}: not a complete GGUF file ({error}). Copy or download it again.") from error
        except OSError as error:
            raise UserError(f"{label}: cannot be read ({error.strerror or error}).") from error
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise UserError(
                f"{label}: one of the {parts} parts of a split GGUF file, which ovqk does not put together; allowed: "
                "one whole file. `llama-gguf-split --merge FIRST_PART WHOLE.gguf` makes it."
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Return a tensor dequantised, or its rows start .. stop - 1 along the outermost dimension.

        Raises:
            UserError: the file does not take the read.
        """
        tensor = self.tensors[name]
        per_row = math.prod(tensor.shape[1:-1]) if len(tensor.shape) > 1 else 1
        outermost = tensor.shape[0] if len(tensor.shape) > 1 else 1
        start, stop, _ = slice(start, stop).indices(outermost)
        first, count = start * per_row, max(0, stop - start) * per_row
        try:
            stored = np.fromfile(
                self.path, np.uint8, count * tensor.row_bytes, offset=tensor.offset + first * tensor.row_bytes
            ).reshape(count, tensor.row_bytes)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.label}: tensor '{name}' cannot be read ({error}).") from error
        shape = (max(0, stop - start), *tensor.shape[1:]) if len(tensor.shape) > 1 else tensor.shape
        return _dequantised(stored, tensor.quantisation, tensor.shape[-1]).reshape(shape)

    def quantisations(self) -> dict[str, str]:
        """Return kind of tensor -> its number formats; kinds go without layer and suffix (`attn_q`, `token_embd`)."""
        found: dict[str, set[str]] = {}
        for name, tensor in self.tensors.items():
            parts = [part for part in name.split(".") if not part.isdecimal() and part not in ("blk", "weight")]
            found.setdefault(".".join(parts), set()).add(tensor.quantisation)
        return {kind: ", ".join(sorted(found[kind])) for kind in sorted(found)}


def _dequantised(stored: NDArray[np.uint8], quantisation: str, n_columns: int) -> NDArray[np.float32]:
    """Turn bytes into numbers, row by row, some rows at a time."""
    from gguf import GGMLQuantizationType, quants

    numbers = np.empty((len(stored), n_columns), np.float32)
    kind = GGMLQuantizationType[quantisation]
    for start in range(0, len(stored), ROWS_TOGETHER):
        rows = slice(start, start + ROWS_TOGETHER)
        numbers[rows] = quants.dequantize(stored[rows], kind)
    return numbers


# --- the header ----------------------------------------------------------------------------------------------


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the metadata and the tensors.

    Raises:
        ValueError, struct.error: the bytes are no such header, or the file is shorter than it says.
    """
    if data[:4] != MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    header = _Cursor(data, 4)
    version = header.number("I")
    if version not in VERSIONS:
        kind = "of the other byte order" if version & 0xFFFF == 0 else f"of version {version}"
        raise ValueError(f"{kind}; allowed: little-endian files of version {' or '.join(map(str, VERSIONS))}")
    n_tensors, n_keys = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.string()
        metadata[key] = header.value(header.number("I"))
    places = [header.place() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin, formats = -(-header.at // alignment) * alignment, dict[int, tuple[str, int, int, bool]]()
    tensors: dict[str, StoredTensor] = {}
    for name, shape, number, offset in places:
        if number not in formats:
            formats[number] = _number_format(number)
        quantisation, block, size, known = formats[number]
        if shape[-1] % block:
            raise ValueError(f"tensor '{name}' has rows of {shape[-1]} numbers in blocks of {block}")
        tensor = StoredTensor(shape, quantisation, begin + offset, shape[-1] // block * size, known)
        if tensor.offset + tensor.n_rows * tensor.row_bytes > len(data):
            raise ValueError(f"tensor '{name}' ends beyond the file's {len(data)} bytes")
        if name in tensors:
            raise ValueError(f"tensor '{name}' stands in it twice")
        tensors[name] = tensor
    return metadata, tensors


def _number_format(kind: int) -> tuple[str, int, int, bool]:
    """Return the format's name, the numbers and bytes in a block, and whether the package can dequantise it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        found = GGMLQuantizationType(kind)
    except ValueError:
        return f"type {kind}", 1, 0, False
    block, size = GGML_QUANT_SIZES[found]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), found)
    except NotImplementedError:
        return found.name, block, size, False
    return found.name, block, size, True


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def number(self, letter: str) -> Any:
        """Read one number of struct's format."""
        if self.at + struct.calcsize(letter) > len(self.data):
            raise ValueError(f"its header goes beyond the file's {len(self.data):,} bytes")
        (found,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(letter)
        return found

    def string(self) -> str:
        """Read a string after its length."""
        length = self.number("Q")
        stop = self.at + length
        if stop > len(self.data):
            raise ValueError(f"a string ends beyond the file's {len(self.data)} bytes")
        text = self.data[self.at : stop].decode()
        self.at = stop
        return text

    def strings(self, count: int) -> list[str]:
        """Read several strings, of which a vocabulary has a hundred thousand."""
        data, at, size, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            begin = at + 8
            at = begin + length(data, at)[0] if begin <= size else size + 1
            if at > size:
                raise ValueError(f"a string ends beyond the file's {size} bytes")
            found.append(data[begin:at].decode())
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        """Read a value of the metadata."""
        if kind == STRING:
            return self.string()
        if kind == FLOAT32:
            return float(str(np.float32(self.number("f"))))  # 1e-06 was meant, and not the 9.999999974752427e-07 nearby
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"the metadata hold a value of the unknown type {kind}")
        of, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise ValueError(
                f"a list of {count:,} values in its metadata goes beyond the file's {len(self.data):,} bytes"
            )
        if of == STRING:
            return self.strings(count)
        if of not in SCALARS:
            raise ValueError(f"the metadata hold a list of values of the type {of}")
        letters = f"<{count}{SCALARS[of]}"
        found = list(struct.unpack_from(letters, self.data, self.at))
        self.at += struct.calcsize(letters)
        return found

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's name, shape, number format and offset."""
        name, n_dimensions = self.string(), self.number("I")
        if not 1 <= n_dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {n_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")


# --- as the tensors of a checkpoint ---------------------------------------------------------------------------

Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Puts a whole tensor's numbers back into another layout."""


@dataclass(frozen=True)
class RenamedTensors:
    """A GGUF file's tensors under other names and in another layout.

    Attributes:
        names: name here -> name in the file.
        changes: name here -> the change to the numbers, if there is one.
        shapes: name here -> shape, after the change.
    """

    file: GGUFFile
    names: Mapping[str, str]
    changes: Mapping[str, Change]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def unread(self) -> dict[str, str]:
        """Name -> number format, of tensors whose numbers cannot be had."""
        stored = {name: self.file.tensors[own] for name, own in self.names.items()}
        return {name: tensor.quantisation for name, tensor in stored.items() if not tensor.known}

    allowed = "any number format that the package gguf dequantises: F32, F16, BF16, Q4_0 to Q8_0, the K- and IQ-quants"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return a tensor, or its rows start .. stop - 1."""
        if name not in self.changes:
            return self.file.read(self.names[name], start, stop)
        return np.ascontiguousarray(self.changes[name](self.file.read(self.names[name]))[start:stop])
