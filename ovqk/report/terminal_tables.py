"""Tables about one cell for a person: verdicts, candidates, pairs of heads, means by layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.text import Text

from ovqk import wording
from ovqk.metrics import METRICS, SHOWN_CANDIDATES, Place, shown_in
from ovqk.report.fitted_table import CORE, UNBROKEN, Column, FittedTable

STYLES = {
    "corroborated": "green",
    "partial": "yellow",
    "consistent": "dim yellow",
    "contradicted": "red",
    "unsupported": "magenta",
}
LEGEND = ("partial", "consistent only", "unsupported", "unsupported (spectrum)")
"""Verdicts with flags that a table explains."""
SHOWN_PAIRS = 5  # head pairs for each kind of composition


def _shown(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that tables show: the strongest heads for each role, by what ranks it."""
    return candidates[candidates["ranked"] & (candidates["rank"] <= SHOWN_CANDIDATES)]


def has_spread(candidates: pd.DataFrame) -> bool:
    """Say whether any shown candidate has a `z`; none has one if most heads have one value."""
    return bool(_shown(candidates)["z"].notna().any())


def ranking_legend(candidates: Iterable[pd.DataFrame]) -> str:
    """Return what the metrics mean by which shown candidates are ranked, each once; empty without candidates."""
    names: dict[str, None] = {}
    for table in candidates:
        for row in _shown(table).to_dict("records"):
            names |= dict.fromkeys([row["metric"], *str(row.get("beside") or "").split()])
    return " ".join(f"{name}: {wording.ranked_by(name)}." for name in names if name in METRICS)


def strongest_candidates(candidates: pd.DataFrame) -> list[tuple[str, str, list[dict[Any, Any]]]]:
    """Return (roles, the metric that ranks them, the strongest heads' rows); roles with the same heads are joined."""
    shown = _shown(candidates)
    same: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
    for role, rows in shown.groupby("role", sort=False):
        told = [name for name in ("metric", "prediction", "partners", "layer", "head", "on_prompts") if name in rows]
        key = tuple(rows[told].itertuples(index=False, name=None))
        same.setdefault(key, []).append(str(role))
    found = []
    for roles in same.values():
        records: list[dict[Any, Any]] = shown[shown["role"] == roles[0]].to_dict("records")
        by = f"{records[0]['metric']}{UNBROKEN}{wording.ARROWS[records[0]['prediction']]}"
        by += f" with {records[0]['partners']}" if records[0]["partners"] else ""
        beside = str(records[0].get("beside") or "")
        by += f" and {beside.replace(' ', UNBROKEN)} (worse place)" if beside else ""
        by += "" if records[0]["primary"] or beside else " (not its primary)"
        found.append((", ".join(wording.role(role) for role in roles), by, records))
    return found


def candidate_table(candidates: pd.DataFrame) -> FittedTable:
    """Return a table with the strongest candidates, one per row, without a p (docs/method.md says why)."""
    ran, spread = "on_prompts" in candidates, has_spread(candidates)
    table = FittedTable(
        [
            Column("candidates for", None, text=True, wraps_at=16),
            Column("ranked by", CORE - 1, text=True, wraps_at=18),
            Column("head", None),
            Column("value", CORE),
            *[Column("z", 60), Column("gap", 50)] * spread,
            Column("in layer", 40),
            *[Column("on prompts", 90, text=True)] * ran,
        ],
        "candidates.parquet",
    )
    for roles, by, rows in strongest_candidates(candidates):
        for place, row in enumerate(rows):
            table.add_row(
                roles if not place else "",
                by if not place else "",
                f"{row['layer']}.{row['head']}",
                rounded(row["value"]),
                *[rounded(row["z"], digits=1), rounded(row["gap"])] * spread,
                percent(row["percentile"]),
                *([wording.ON_PROMPTS.get(row["on_prompts"], "")] if ran else []),
            )
    return table


def sweep_candidate_table(cells: Iterable[tuple[str, str, pd.DataFrame]]) -> FittedTable:
    """Return a table with the strongest candidates in several cells, (task, model, candidates), one role per row.

    Rows for the same task and role stand together. If cells say the same, as two analyses of one model do, the row is
    shown once.
    """
    table = FittedTable(
        [
            Column("task", None, text=True, place=True),
            Column("candidates for", None, text=True, wraps_at=16),
            Column("model", None, text=True, place=True),
            Column("ranked by", 50, text=True, wraps_at=18),
            Column("strongest heads, each with its value", None, text=True, wraps_at=26),
        ],
        "candidates.parquet",
    )
    found = [
        (task, roles, model, by, rows)
        for task, model, candidates in cells
        for roles, by, rows in strongest_candidates(candidates)
    ]
    places = list(dict.fromkeys((task, roles) for task, roles, *_ in found))
    tasks = list(dict.fromkeys(task for task, *_ in found))
    found.sort(key=lambda row: (tasks.index(row[0]), places.index(row[:2])))
    lines = {(task, roles, model, by, _named(rows)): None for task, roles, model, by, rows in found}
    for line in lines:
        table.add_row(*line)
    return table


def _named(rows: Sequence[Mapping[Any, Any]]) -> str:
    """Return candidates as text for a line, each with its value, and say if the next head has the last one's value."""
    told = [f"{row['layer']}.{row['head']}{UNBROKEN}({rounded(row['value'])}){_on_prompts(row)}" for row in rows]
    return ", ".join([*told, *["others tie"] * (rows[-1]["gap"] == 0)])


def _on_prompts(row: Mapping[Any, Any]) -> str:
    """Return a candidate's verdict on prompts as text for a line; empty if its cell did not run the model."""
    found = row.get("on_prompts")
    return f" {wording.ON_PROMPTS[found]}" if isinstance(found, str) and found in wording.ON_PROMPTS else ""


def shown_columns(heads: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (title, metric) for the columns to show; residual-space ones if the model has few others."""

    def there(place: Place) -> list[tuple[str, str]]:
        names = [name for name in shown_in(place) if name in heads and heads[name].notna().any()]
        return [(METRICS[name].column or METRICS[name].title, name) for name in names]

    columns = there("column")
    return columns if len(columns) >= 3 else [*there("residual column"), *columns]


def verdict_table(heads: pd.DataFrame, verdicts: pd.DataFrame) -> FittedTable:
    """Return a table with one row per claimed head under a row for its role."""
    columns = shown_columns(heads)
    table = FittedTable(
        [
            Column("role: primary metric / head", None, text=True),
            *(Column(title, CORE - 1 - place) for place, (title, _) in enumerate(columns)),
            Column("primary", CORE + 1),
            Column("percentile", CORE),
            Column("q", CORE + 2),
            Column("verdict", None, text=True),
        ],
        "heads.parquet",
    )
    indexed = heads.set_index(["layer", "head"])
    for row in verdicts.to_dict("records"):
        is_role = row["kind"] == "role"
        values = ["" for _ in columns]
        if not is_role:
            head = (int(row["layer"]), int(row["head"]))
            values = [rounded(indexed.at[head, name]) for _, name in columns]
        primary = (
            f"{row['primary']}{UNBROKEN}{wording.ARROWS[row['prediction']]}" if isinstance(row["primary"], str) else ""
        )
        verdict = wording.verdict(row["verdict"], row["flags"])
        if not row["flags"]:
            verdict = verdict.replace(" ", UNBROKEN)  # the first column would take the letter that it lacks
        if is_role:
            name = Text(wording.role(row["role"]), style="bold")
            name.append(f": {primary}" if primary else "", style="dim")
        else:
            name = Text(f"  {int(row['layer'])}.{int(row['head'])}")
        table.add_row(
            name,
            *values,
            rounded(row["value"]),
            "" if is_role else percent(row["percentile"]),
            rounded(row["q"], digits=3),
            Text(verdict, style=STYLES.get(row["verdict"], "dim")),
        )
    return table


def found_line(verdicts: pd.DataFrame) -> str:
    """Return a sentence that lists the roles by verdict, strongest first."""
    roles = verdicts[verdicts["kind"] == "role"]
    said: dict[str, list[str]] = {word: [] for word in wording.VERDICTS.values()}
    for row in roles.to_dict("records"):
        said.setdefault(wording.verdict(row["verdict"]), []).append(wording.role(row["role"]))
    parts = [f"{word}: {', '.join(dict.fromkeys(names))}" for word, names in said.items() if names]
    return "Found: " + "; ".join(parts) + "."


def column_legend(heads: pd.DataFrame, shown: Sequence[str] | None = None) -> str:
    """Return how to read the columns of metrics; `shown` are the titles that the table shows, None for all."""
    columns = [(title, METRICS[name]) for title, name in shown_columns(heads) if shown is None or title in shown]
    legend = [f"{title}: {metric.legend}." for title, metric in columns if metric.legend]
    if sides := {title: metric.side for title, metric in columns if metric.side}:
        legend.append(f"{', '.join(sides)}: {' and '.join(sides.values())} side in the task's subspace, 1 by chance.")
    return " ".join(legend)


def reasons(heads: pd.DataFrame, verdicts: pd.DataFrame, shown: Sequence[str] | None = None) -> Iterable[str]:
    """Yield lines on how to read the table, and the verdicts' reasons, each reason once.

    `shown` are the titles that the table shows; None for all.
    """
    yield ""
    if legend := column_legend(heads, shown):
        yield legend
    yield (
        "primary: value of the primary metric; for a role of several heads their mean rank within their layers (0.5 by "
        "chance). percentile: among unclaimed heads of the layer; if ↓ is predicted, 0% is the strongest."
    )
    flagged = {wording.verdict(row["verdict"], row["flags"]) for row in verdicts.to_dict("records")}
    yield " ".join(
        [
            "q: the largest corrected p under the nulls that count (named in verdicts.parquet): other heads, random "
            "heads with the same singular values (spectrum), other words.",
            *(f"{name}: {wording.FLAGS[name]}." for name in LEGEND if name in flagged),
        ]
    )
    untested = verdicts[verdicts["reason"] != ""]
    for (verdict, reason), rows in untested.groupby(["verdict", "reason"], sort=False):
        names = [
            wording.role(row["role"]) if row["kind"] == "role" else f"{int(row['layer'])}.{int(row['head'])}"
            for row in rows.to_dict("records")
        ]
        yield f"{wording.verdict(str(verdict))} ({', '.join(dict.fromkeys(names))}): {wording.reason(str(reason))}"


def layer_table(heads: pd.DataFrame) -> FittedTable:
    """Return a table with the main metrics, averaged over the heads in each layer."""
    columns = shown_columns(heads)
    kept = [Column(title, CORE - 1 - place) for place, (title, _) in enumerate(columns)]
    table = FittedTable([Column("layer", None), *kept], "heads.parquet")
    for layer, rows in heads.groupby("layer"):
        table.add_row(str(layer), *(rounded(rows[name].mean()) for _, name in columns))
    return table


def claimed_pairs(composition: pd.DataFrame, verdicts: pd.DataFrame | None) -> pd.DataFrame:
    """Return the pairs whose heads are claimed for different roles, with the column `roles`: sender's to receiver's.

    Empty if no heads are claimed, or if no such pair composes.
    """
    roles: dict[tuple[int, int], list[str]] = {}
    for row in () if verdicts is None else verdicts[verdicts["kind"] == "head"].to_dict("records"):
        roles.setdefault((int(row["layer"]), int(row["head"])), []).append(wording.role(row["role"]))
    named = [
        [" and ".join(roles.get((row[f"{side}_layer"], row[f"{side}_head"]), ())) for side in ("sender", "receiver")]
        for row in composition.to_dict("records")
    ]
    said = [
        f"{sender} to {receiver}" if sender and receiver and sender != receiver else "" for sender, receiver in named
    ]
    found = composition.assign(roles=said)
    return found[found["roles"] != ""]


def pair_table(composition: pd.DataFrame) -> FittedTable:
    """Return a table with the strongest pairs for each kind of composition, by score; with `roles` if they have any."""
    table = FittedTable(
        [
            Column("composition", None, text=True),
            *(Column(title, None) for title in ("sender", "receiver", "score")),
            *(Column(title, weight) for title, weight in (("above random", 3), ("in layer", 2), ("matching", 1))),
            *[Column("roles", 4, text=True, wraps_at=30)] * ("roles" in composition),
        ],
        "composition.parquet",
    )
    for mode, rows in composition.groupby("mode", sort=False):
        for place, row in enumerate(rows.nlargest(SHOWN_PAIRS, "score").to_dict("records")):
            table.add_row(
                f"{str(mode).upper()}" if not place else "",
                *_pair(row),
                rounded(row["score"], digits=3),
                rounded(row["score_above_random"], digits=3),
                percent(row["percentile"]),
                rounded(row["matching"]),
                *([row["roles"]] if "roles" in row else []),
            )
    return table


def virtual_table(virtual: pd.DataFrame) -> FittedTable:
    """Return a table with the virtual heads that the strongest V pairs make."""
    kept = [Column(title, None) for title in ("sender", "receiver", "score")]
    table = FittedTable([*kept, Column("share", 1), Column("OV copying", 2)], "virtual_heads.parquet")
    for row in virtual.nlargest(SHOWN_PAIRS, "score").to_dict("records"):
        numbers = (rounded(row["score"], digits=3), percent(row["frobenius_share"]), rounded(row["ov_copying"]))
        table.add_row(*_pair(row), *numbers)
    return table


def _pair(row: Mapping[Any, Any]) -> tuple[str, str]:
    sender, receiver = (f"{row[f'{side}_layer']}.{row[f'{side}_head']}" for side in ("sender", "receiver"))
    return sender, receiver


def rounded(value: Any, digits: int = 2) -> str:
    """Return a number with this many digits after the point, or none if it is large; empty if it is missing."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def percent(value: Any) -> str:
    """Return a share in percent; empty if it is missing."""
    return "" if value is None or not math.isfinite(value) else f"{value:.0%}"
