"""Figures as functions of tables: models side by side (`comparisons`), one head (`portraits`), prompts (`prompts`).

`ovqk.figures.NAME` is `ovqk.figures.comparisons.NAME`. It is imported when it is first used, because matplotlib takes a
second. `choice` picks the figures of a report, and `drawing` holds the panels that figures are built of.
"""

import importlib

MODULES = ("choice", "colours", "comparisons", "drawing", "portraits", "prompts")


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.figures.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'ovqk.figures' has no attribute '{name}'")
    return getattr(importlib.import_module("ovqk.figures.comparisons"), name)
