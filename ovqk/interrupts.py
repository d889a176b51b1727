"""Ctrl-C while a command imports what it needs: nothing was begun, and one message says all."""

import os
import signal
from types import FrameType


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ovqk: interrupted.\n")
    os._exit(130)


def stop_while_importing() -> None:
    """End the command at Ctrl-C until `importing_is_over`, unless Ctrl-C has been given another meaning."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def importing_is_over() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
