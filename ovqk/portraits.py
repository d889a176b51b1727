"""Figures about one head, by the name that notebooks use: see `ovqk.figures.portraits`."""

import importlib


def __getattr__(name: str) -> object:
    return getattr(importlib.import_module("ovqk.figures.portraits"), name)
