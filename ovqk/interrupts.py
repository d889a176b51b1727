"""Ctrl-C handling: it ends a command with one message and status 130, even if a library catches it.

While a command imports its modules, no work has begun, and Ctrl-C ends it at once. Later Ctrl-C raises
KeyboardInterrupt and is remembered, because an import or a library may turn it into its own error, or go on as if
nothing had happened.
"""

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

AGAIN = 1.0
"""After this many seconds a second Ctrl-C ends the command at once; before, it may be the first, sent by a wrapper."""
_first: float | None = None
"""The time of the first Ctrl-C that was remembered."""
_status: int | None = None
"""A command's status if Ctrl-C has ended it."""
_tell = sys.unraisablehook
"""Python's own hook that reports an error from a destructor."""


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ovqk: interrupted.\n")
    os._exit(130)


def _remember(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is None:
        _first = time.monotonic()
        raise KeyboardInterrupt
    if time.monotonic() - _first > AGAIN:
        _stop(number, frame)


def _last() -> None:
    """End the process with this command's own status, after everything else has ended.

    Python gives Ctrl-C back to the system when it shuts down. And if Ctrl-C came while Python ran code from a text, as
    it does to make a dataclass, Python would end by the signal, whatever status it was given.
    """
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a pipe that nobody reads, or a stream that is closed
                stream.flush()
        os._exit(_status)
    if signal.getsignal(signal.SIGINT) in (_stop, _remember):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tell_others(lost: Any) -> None:
    """Report an error from a destructor, unless it is Ctrl-C, which is remembered."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        _tell(lost)


def is_command() -> bool:
    """Say whether `python -m` is about to run a module in this package; known only while the package is imported."""
    if sys.argv[:1] != ["-m"]:
        return False
    module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
    return module.partition(".")[0] in ("ovqk", "-movqk")


def stop_while_importing() -> None:
    """End the command at Ctrl-C until `importing_is_over`, unless Ctrl-C has been given another meaning."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
        atexit.register(_last)  # the first function registered is the last one called


def importing_is_over() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and remember it; nothing changes if `stop_while_importing` was not called."""
    global _tell
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, _remember)
        if sys.unraisablehook is not _tell_others:
            _tell, sys.unraisablehook = sys.unraisablehook, _tell_others


def work_is_over() -> None:
    """End the command at Ctrl-C from now on, because only Python's own shutdown is left."""
    if signal.getsignal(signal.SIGINT) is _remember:
        signal.signal(signal.SIGINT, _stop)


def forget() -> None:
    """Give Ctrl-C back the meaning that it had before `stop_while_importing`, for a process that goes on."""
    global _first, _status
    _first = _status = None
    if signal.getsignal(signal.SIGINT) in (_stop, _remember):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.unraisablehook is _tell_others:
        sys.unraisablehook = _tell


def end_with(status: int) -> None:
    """Set the command's status after Ctrl-C; nothing changes if `stop_while_importing` was not called."""
    global _status
    _status = status


def remembered() -> bool:
    """Say whether Ctrl-C came since the imports were over."""
    return _first is not None


def raise_if_remembered() -> None:
    """Do what Ctrl-C asked for, if a library did not.

    Raises:
        KeyboardInterrupt: Ctrl-C came since the imports were over.
    """
    if remembered():
        raise KeyboardInterrupt
