"""Two tables with the same rows, computed in two ways: which columns differ by more than rounding."""

import numpy as np
import pandas as pd

WITHIN = 1e-4
"""The largest difference, relative to the column's largest value: as for ratios in float32 (docs/definitions.md)."""
DECIDED = ("verdict", "status", "reason", "role", "layer", "head", "metric", "null", "kind", "mode")
COUNTED, SHARE = ("attention_p", "attention_p_opposite", "effect_p", "effect_p_opposite"), 0.02
"""Shares of sign flips, and how far they may be apart: rounding decides whether two sums are equal."""


def disagreements(one: pd.DataFrame, two: pd.DataFrame, within: float = WITHIN) -> list[str]:
    """Name the columns in which two tables with the same rows disagree: numbers beyond `within`, or other words."""
    if list(one.columns) != list(two.columns) or len(one) != len(two):
        return [f"{len(one)} rows of {list(one.columns)}, {len(two)} rows of {list(two.columns)}"]
    found = [f"{name}: {apart:.2g}" for name, apart in differences(one, two).items() if not apart <= within]
    for name in set(DECIDED) & set(one.select_dtypes(exclude="number").columns):
        if not one[name].fillna("").astype(str).equals(two[name].fillna("").astype(str)):
            found.append(f"{name}: other words")
    return found


def differences(one: pd.DataFrame, two: pd.DataFrame) -> dict[str, float]:
    """Return each numeric column's largest difference, relative to the column's largest value.

    It is infinite if a value is missing from one table alone. Shares of draws (`COUNTED`) differ by 0 up to `SHARE`.
    """
    found = {}
    for name in one.columns:
        if not pd.api.types.is_numeric_dtype(one[name]):
            continue
        a, b = (table[name].to_numpy(dtype=np.float64) for table in (one, two))
        if (np.isnan(a) != np.isnan(b)).any():
            found[name] = np.inf
            continue
        apart = float(np.nanmax(np.abs(a - b), initial=0.0))
        if name in COUNTED and apart <= SHARE:
            apart = 0.0
        found[name] = apart / max(1e-12, float(np.nanmax(np.abs(a), initial=0.0)))
    return found
