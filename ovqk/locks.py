"""A lock that several processes share. A process waits while another holds it, says so, and never waits in vain.

The system frees the lock if its owner dies.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ovqk.errors import UserError

SILENT = 5.0
"""After this many seconds a waiting process says that it waits."""
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def locked(path: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: the lock's file, in a folder that exists.
        what: the thing that is locked, as messages name it.
        wait: whether to wait for another process that holds it.

    Raises:
        UserError: the lock cannot be taken at all; the message says why.
        Timeout: another process holds it, and wait=False.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        if not wait:
            lock.acquire(timeout=0)
        else:
            _wait_for(lock, path, what)
    except OSError as error:
        if isinstance(error, Timeout):  # a Timeout is an OSError
            raise
        raise _refused(path, what, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # if the file system has gone away, the lock has too
            lock.release()


def _wait_for(lock: FileLock, path: Path, what: str) -> None:
    try:
        lock.acquire(timeout=SILENT)
        return
    except Timeout:
        _probe(path)
        print(f"waiting for {what}: another process is at work on it (lock {path})", file=sys.stderr, flush=True)
    lock.acquire()


def _probe(path: Path) -> None:
    """Try the lock once more: filelock takes a file system that forbids locks for another process that holds it.

    Raises:
        OSError: the system says that it forbids them.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # EAGAIN: held by another process
        pass
    finally:
        os.close(descriptor)


def _refused(path: Path, what: str, error: OSError) -> UserError:
    if error.errno in NO_LOCKS:
        why = (
            f"its file system has no file locks ({error.strerror}), without which two processes would write the same "
            "files. Choose another folder, or mount it with locks (Lustre: -o flock)"
        )
    else:
        why = f"the system refuses it ({error.strerror or error})"
    return UserError(f"{what}: it cannot be locked by {path}: {why}.")
