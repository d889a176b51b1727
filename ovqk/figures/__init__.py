"""Figures of models beside each other (`models`) and of one head (`portraits`), as functions of tables.

`ovqk.figures.NAME` is `ovqk.figures.models.NAME`, imported when it is first asked for: matplotlib takes a second.
"""

import importlib

MODULES = ("choice", "colours", "drawing", "models", "portraits", "prompts")


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.figures.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'ovqk.figures' has no attribute '{name}'")
    return getattr(importlib.import_module("ovqk.figures.models"), name)
