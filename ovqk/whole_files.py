"""Files that are written whole or not at all: first under a temporary name to the disk, then renamed to their own.

If a process is killed, it leaves at most a file with a temporary name, which `is_temporary` knows.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

DISK = {
    *(errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EIO, errno.ESTALE),
}
"""Errors from a full, read-only, forbidden or failing disk, from a bad name, or from a file in a folder's place. They
are not defects; the user gets a message."""
IN_THE_WAY = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
LARGEST_JSON = 2**24
"""The largest JSON file in bytes: far above any that ovqk reads, and small enough that its content fits in memory."""


def in_the_way(error: OSError) -> str:
    """Return an error in the system's words, with the path if something else stands there."""
    said = os.strerror(error.errno or 0)
    return f"{said}: {error.filename2 or error.filename}" if error.errno in IN_THE_WAY else said


def temporary(path: Path) -> Path:
    """Return this process's temporary name for a file or folder, beside it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(name: str, of: str | None = None) -> bool:
    """Say whether a file has a temporary name, by any process; with `of`, whether it is that file's."""
    found = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return found is not None and of in (None, found[1])


def clear_abandoned(folder: Path, of: str | None = None, ending: str = "") -> None:
    """Delete what killed processes left under temporary names in a folder, for the file `of` if that is given.

    It leaves alone what was to become a file whose name does not end with `ending`.

    The caller holds the lock of those who write there.
    """
    for abandoned in folder.iterdir() if folder.is_dir() else ():
        if not is_temporary(abandoned.name, of) or not abandoned.name.rsplit(".", 2)[0].endswith(ending):
            continue
        if abandoned.is_symlink() or not abandoned.is_dir():
            abandoned.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Flush a file, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file to write; it takes the place of an earlier one at the end, and only if nothing was raised.

    Args:
        path: the file.
        mode: `w` for UTF-8 text, `wb` for bytes.

    Raises:
        OSError: the disk does not take it.
    """
    unfinished = temporary(path)
    try:
        with unfinished.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, not JSON, larger than LARGEST_JSON, or nested too deeply.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device might never end
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON} bytes")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by null, because JSON does not have them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
