"""Memory that the C library keeps after it was freed, given back to the system."""

import ctypes
import gc
import time
from collections.abc import Callable
from functools import cache

EXHAUSTED = (
    "can't allocate memory",  # main memory
    "out of memory",  # CUDA, if another process holds the GPU's, or ovqk itself
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
"""What PyTorch's other errors say if memory is exhausted: only its own blocks on a GPU have an OutOfMemoryError."""
SPACING = 2.0  # the least time between two returns, in seconds; each return takes some milliseconds


class FreedMemory:
    """Memory that was freed and not given back: glibc keeps blocks between others that are still in use.

    A layer's matrices come and go in all sizes and in several threads. Without this class memory grows with every
    layer, although no matrix is kept.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()

    def give_back(self, at_once: bool = False) -> bool:
        """Return freed memory to the system; False if it is too soon, unless `at_once`, or if glibc is not there."""
        trim = malloc_trim()
        if trim is None or not (at_once or time.monotonic() - self._last >= SPACING):
            return False
        trim(0)
        self._last = time.monotonic()
        return True


def give_all_back() -> None:
    """Free objects that only a search for cycles finds, such as a model with hooks, and return their memory."""
    gc.collect()
    trim = malloc_trim()
    if trim is not None:
        trim(0)


def is_exhausted(error: BaseException) -> bool:
    """Say whether an error means that memory is exhausted, in main memory or on a GPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(said in str(error) for said in EXHAUSTED)


@cache
def malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's `malloc_trim`; None if the C library is another, which has no such function."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no such function, no library, or Windows
        return None
    function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int  # type: ignore[attr-defined]
    return function
