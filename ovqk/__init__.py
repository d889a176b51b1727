"""QK and OV circuits of every attention head, tested against the mechanism a paper claims."""

import importlib
import os

from ovqk.interrupts import is_command, stop_while_importing

if is_command():
    stop_while_importing()
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
"""Read when torch is imported: how long its threads spin before they sleep. Without it a busy machine takes half as
long again, and a free one gains nothing."""
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""Read by torch: large arrays lie in large pages of memory, which are handed out in fewer pieces."""

__version__ = "0.1.0"
__all__ = ["cell_folders", "figures", "load_results", "load_table", "open", "portraits", "report", "tracking"]
MODULES = ("figures", "portraits", "report", "tracking")
LAZY = {
    "load_results": "ovqk.records.results",
    "load_table": "ovqk.records.results",
    "cell_folders": "ovqk.records.results",
    "open": "ovqk.library",
}
"""Public name -> the module that has it: imported when it is first asked for, so that no cell waits for pandas."""


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.{name}")
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module 'ovqk' has no attribute '{name}'")
