"""Which rows of tests.parquet are about a role as a whole, and the predictions beside a role's primary one."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ovqk import wording
from ovqk.metrics import METRICS

Json = dict[str, Any]


def about_roles(tests: pd.DataFrame, record: Json) -> "pd.Series[bool]":
    """Say of each row whether it is about its role: it has no head, or its head stands for the role.

    If one alone of a role's heads has a value, a prediction is tested once, as this head (docs/method.md).

    Args:
        tests: tests.parquet.
        record: the cell's record.
    """
    found = tests["layer"].isna()
    for role, predictions in _predictions(record):
        for prediction in predictions:
            rows = _rows_of(tests, role, prediction)
            heads = rows[["layer", "head"]].drop_duplicates()
            if len(heads) == 1 and METRICS[prediction["metric"]].of != "pair":
                found |= tests.index.isin(rows.index)
    return found


def further_predictions(tests: pd.DataFrame, record: Json) -> list[str]:
    """Return, for each role, the predictions beside its primary one that were tested, and how if it was as one head."""
    about, lines = tests[about_roles(tests, record)], list[str]()
    for role, predictions in _predictions(record):
        said = []
        for prediction in predictions[1:]:
            rows = _rows_of(about, role, prediction)
            if not len(rows):
                continue
            alone = "" if rows["layer"].isna().any() else f", by its one head {_head(rows.iloc[0])}"
            kind = "exploratory" if prediction["exploratory"] else "secondary"
            said.append(f"{prediction['metric']} {wording.ARROWS[prediction['direction']]} ({kind}{alone})")
        if said:
            lines.append(f"{wording.role(role)}: {', '.join(said)}")
    return lines


def _predictions(record: Json) -> Iterable[tuple[str, list[Json]]]:
    """Yield each role with its predictions, the primary first, as the cell's choice has them."""
    roles = ((record["provenance"].get("config") or {}).get("task") or {}).get("roles") or {}
    for role, config in roles.items():
        yield role, [each for each in (config or {}).get("predictions") or () if each.get("metric") in METRICS]


def _rows_of(tests: pd.DataFrame, role: str, prediction: Mapping[str, Any]) -> pd.DataFrame:
    """Return a prediction's rows about the role, or else those about its heads, whose metric may differ in layer 0."""
    rows = tests[(tests["role"] == role) & (tests["prediction"] == prediction["direction"])]
    together = rows[rows["layer"].isna() & (rows["metric"] == prediction["metric"])]
    if len(together):
        return together
    first = prediction.get("first_layer") or prediction["metric"]
    expected = (rows["layer"] == 0).map({True: first, False: prediction["metric"]})
    return rows[rows["layer"].notna() & (rows["metric"] == expected)]


def _head(row: "pd.Series[Any]") -> str:
    return f"{int(row['layer'])}.{int(row['head'])}"
