"""QK and OV circuits of every attention head, tested against the mechanism a paper claims."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
"""Read when torch is imported: how long its threads spin before they sleep. Without it a busy machine takes half as
long again, and a free one gains nothing."""
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""Read by torch: large arrays lie in large pages of memory, which are handed out in fewer pieces."""

__version__ = "0.1.0"
__all__ = ["load_results"]


def __getattr__(name: str) -> object:
    """`ovqk.load_results`, without importing pandas for those who need nothing of it."""
    if name == "load_results":
        from ovqk.results import load_results

        return load_results
    raise AttributeError(f"module 'ovqk' has no attribute '{name}'")
