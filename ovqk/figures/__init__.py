"""Figures of models beside each other (`models`, `depth`), one circuit (`circuits`) or one head (`portraits`).

They are functions of tables. `ovqk.figures.NAME` is the function NAME of `models`, `depth` or `circuits`. It is
imported when it is first used, because matplotlib takes a second.
"""

import importlib

MODULES = ("choice", "circuits", "colours", "depth", "drawing", "embedded", "models", "portraits", "prompts")
ELSEWHERE = {"depth_curves": "depth", "circuit": "circuits"}


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.figures.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'ovqk.figures' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ovqk.figures.{ELSEWHERE.get(name, 'models')}"), name)
