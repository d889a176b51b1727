"""Figures as functions of tables: models side by side (`comparisons`, `depth`), one circuit (`circuits`), one head
(`portraits`), weights against prompts (`prompts`).

`ovqk.figures.NAME` is the function NAME of `comparisons`, `depth` or `circuits`. It is imported when it is first used,
because matplotlib takes a second. `choice` picks the figures for a report, `drawing` holds the panels from which
figures are built, and `embedded` puts a figure on the page.
"""

import importlib

MODULES = (
    "choice", "circuits", "colours", "comparisons", "cycles", "depth", "drawing", "embedded", "portraits", "prompts",
    "verdict_marks",
)  # fmt: skip
ELSEWHERE = {"depth_curves": "depth", "circuit": "circuits"}


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ovqk.figures.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'ovqk.figures' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ovqk.figures.{ELSEWHERE.get(name, 'comparisons')}"), name)
