"""Figures that show models beside each other (`models`) or one head (`portraits`), as functions of tables.

`ovqk.figures.NAME` is `ovqk.figures.models.NAME`. It is imported when it is first used, because matplotlib takes a
second.
"""

import importlib

MODULES = ("choice", "colours", "cycles", "drawing", "models", "portraits", "prompts")


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.figures.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'ovqk.figures' has no attribute '{name}'")
    return getattr(importlib.import_module("ovqk.figures.models"), name)
