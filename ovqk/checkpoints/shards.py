"""Safetensors files by their headers: which tensors one holds at which bytes, and a smaller file with some of them."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovqk.whole_files import clear_abandoned, whole

LONGEST_HEADER = 2**25
"""Bytes: the format allows 100 MB, and no model comes near; what such a header holds would take gigabytes of memory."""
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"F64": 64, "I64": 64, "U64": 64}
"""Number format -> bits in a number, for the formats in use that take whole bytes."""
LEFT_OUT = "ovqk_left_out"
"""Key in a smaller file's metadata: the tensors in the whole file that it leaves out, by name, as JSON."""

Read = Callable[[int, int], bytes]
"""(offset, length) -> that many bytes."""


@dataclass(frozen=True)
class Header:
    """A safetensors file's header.

    Attributes:
        tensors: name -> dtype, shape and data_offsets, as the file gives them, ordered by their bytes.
        metadata: the file's own remarks.
        start: offset at which the first byte after the header lies.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    def size(self, names: Iterable[str]) -> int:
        """Count these tensors' bytes."""
        return sum(stop - start for start, stop in (self.tensors[name]["data_offsets"] for name in names))

    def runs(self, names: Iterable[str]) -> list[tuple[int, int]]:
        """List the (offset, length) at which these tensors lie in the file, adjoining ones in one piece."""
        runs: list[tuple[int, int]] = []
        for name in self._ordered(names):
            first, last = (self.start + offset for offset in self.tensors[name]["data_offsets"])
            if runs and sum(runs[-1]) == first:
                first = runs.pop()[0]
            runs.append((first, last - first))
        return runs

    def part(self, names: Iterable[str]) -> bytes:
        """Write the header for a file that holds these tensors alone, ordered as `runs` has them."""
        held = self._ordered(names)
        left_out = [name for name in self.tensors if name not in held]
        header: dict[str, Any] = {"__metadata__": self.metadata | {LEFT_OUT: json.dumps(left_out)}}
        stop = 0
        for name in held:
            start, stop = stop, stop + self.size([name])
            header[name] = self.tensors[name] | {"data_offsets": [start, stop]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _ordered(self, names: Iterable[str]) -> dict[str, None]:
        wanted = set(names)
        return dict.fromkeys(name for name in self.tensors if name in wanted)


def read_header(read: Read, size: int) -> Header:
    """Read the header from a safetensors file that is `size` bytes long.

    Raises:
        ValueError: it is none, or does not describe a file this long.
    """
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}; allowed: up to {LONGEST_HEADER}")
    try:
        header, stop = json.loads(read(8, length)), 0
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    try:
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not texts")
        tensors = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        for name, tensor in tensors.items():
            start, end = tensor["data_offsets"]
            if start != stop or end < start:
                raise ValueError(f"tensors are not laid end to end at byte {stop}")
            _check_tensor(name, tensor, end - start)
            stop = end
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not the header of a safetensors file: {error!r}") from error
    if 8 + length + stop != size:
        raise ValueError(f"tensors of {stop} bytes in a file of {size}")
    return Header(tensors, metadata, 8 + length)


def _check_tensor(name: str, tensor: dict[str, Any], size: int) -> None:
    """Check that a tensor's shape and number format take as many bytes as it has.

    Raises:
        ValueError: they do not.
    """
    shape, kind = tensor["shape"], tensor["dtype"]
    if not isinstance(kind, str) or not isinstance(shape, list):
        raise TypeError(name)
    if any(not isinstance(length, int) or isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"tensor '{name}' has the shape {str(shape)[:60]}")
    if kind in BITS and math.prod(shape) * BITS[kind] != 8 * size:
        raise ValueError(f"tensor '{name}' of shape {shape} in {kind} has {size} bytes")


def is_part(path: Path, reads: Callable[[str], bool]) -> bool:
    """Say whether a smaller file is there, is whole, and leaves out no tensor that is read."""
    try:
        with path.open("rb") as file:
            header = read_header(lambda offset, length: os.pread(file.fileno(), length, offset), path.stat().st_size)
        return not any(reads(name) for name in json.loads(header.metadata[LEFT_OUT]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_part(path: Path, header: Header, names: Iterable[str], pieces: Iterator[bytes]) -> None:
    """Write a smaller file under a temporary name, and give it its own when it is whole and on the disk.

    Args:
        path: the smaller file.
        header: the whole file's.
        names: the tensors that are kept.
        pieces: the bytes at `header.runs(names)`.

    Raises:
        OSError: the disk does not take it.
        ValueError: the pieces are not as long as the tensors.
    """
    names = list(names)
    clear_abandoned(path.parent, path.name)
    with whole(path, "wb") as file:
        expected = file.write(header.part(names)) + header.size(names)
        for piece in pieces:
            file.write(piece)
        if file.tell() != expected:
            raise ValueError(f"{file.tell()} bytes rather than {expected}")
