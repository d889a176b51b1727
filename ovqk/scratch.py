"""A process's own temporary folder. If the process is killed, the next one that makes such a folder removes it."""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

PREFIX = "ovqk-process-"
LOCK = "lock"
"""The file that a process keeps locked as long as it lives."""
UNLOCKED_SECONDS = 3600.0
"""A folder without a locked file is abandoned, too, if it is older than this; a younger one may be in the making."""


def scratch_folder() -> Path:
    """Return this process's temporary folder, which is removed when it ends."""
    return _made(os.getpid())


@cache
def _made(process: int) -> Path:
    clear_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)  # open, and so locked, to the end of the process
    with suppress(OSError):  # the file system may have no locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned() -> None:
    """Remove this user's folders whose processes have ended, so that nothing holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
                continue
            if not (folder / LOCK).is_file():
                if time.time() - status.st_mtime > UNLOCKED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
