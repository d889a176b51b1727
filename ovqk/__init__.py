"""Every attention head's QK and OV circuits, tested against the mechanism that a paper claims."""

import importlib
import os

from ovqk.interrupts import is_command, stop_while_importing

if is_command():
    stop_while_importing()
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
"""Read when torch is imported: how long its threads spin before they sleep. Without it a cell on a busy machine takes
half as long again, and on a free machine nothing is gained."""
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""Read by torch: it puts large arrays in large memory pages, which the system hands out in fewer pieces."""

__version__ = "0.1.0"
__all__ = ["cell_folders", "figures", "load_results", "load_table", "open", "portraits", "report", "tracking"]
MODULES = ("figures", "portraits", "report", "tracking")
LAZY = {
    "load_results": "ovqk.records.results",
    "load_table": "ovqk.records.results",
    "cell_folders": "ovqk.records.results",
    "open": "ovqk.library",
}
"""Public name -> its module, which is imported when the name is first used, so that no cell waits for pandas."""


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.{name}")
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module 'ovqk' has no attribute '{name}'")
