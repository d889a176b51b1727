"""Workers that end when the command that started them has died; joblib's own would stay for five minutes."""

import os
import threading
import time

PARENT = "OVQK_PARENT"
"""Environment variable: the process id of the command, for its workers on this machine."""
LOOK_EVERY = 2.0  # seconds

_watching: list[threading.Thread] = []


def be_parent() -> None:
    """Tell workers that are started from now on that this process is their parent."""
    os.environ[PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """Watch the parent from now on, if `be_parent` named one, and end this process at once when it has died.

    A cell that is being computed at that moment is lost, as if it had been killed; the same command computes it again.
    """
    parent = os.environ.get(PARENT, "")
    if _watching or not parent.isdecimal() or int(parent) == os.getpid():
        return
    _watching.append(threading.Thread(target=_watch, args=(int(parent),), name="ovqk-parent", daemon=True))
    _watching[0].start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(1)
