"""The terminal's table about heads on prompts, beside the verdicts from their weights."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from rich.text import Text

from ovqk import wording
from ovqk.records.attending import without_write
from ovqk.records.on_prompts import Json, largest_effects, outdone_roles
from ovqk.report.fitted_table import CORE, Column, FittedTable
from ovqk.report.terminal_tables import STYLES, rounded

PROMPT_STYLES = {
    "realised": "green",
    "partial": "yellow",
    "opposite": "red",
    "not_realised": "magenta",
    "sensitive": "yellow",
}
PROMPT_IMPORTANCE = {
    "effect": CORE + 1,
    "attention": CORE,
    "write_share": 50,
    "attention_control": 40,
    "write_link": 30,
}
"""Quantity -> its column's importance; columns for other quantities are left out first."""
SHOWN = 8
"""How many heads are shown for a role at most; claimed and measured ones come first."""


def prompts_table(joint: pd.DataFrame, roles: pd.DataFrame) -> FittedTable:
    """Return a table with a row for each claimed or chosen head: its quantities on prompts and both verdicts."""
    table = FittedTable(
        [
            Column("role / head", None, text=True),
            *(Column(title, PROMPT_IMPORTANCE.get(name, 0)) for name, title in wording.PROMPT_COLUMNS.items()),
            Column("weights", CORE - 1, text=True, wraps_at=12),
            Column("on prompts", None, text=True),
            Column("together", CORE - 2, text=True, wraps_at=20),
        ],
        "roles.parquet and joint.parquet",
    )
    heads = joint[joint["kind"] == "head"]
    for role, rows in heads.groupby("role", sort=False):
        table.add_row(
            Text(wording.role(str(role)), style="bold"),
            *_together(joint, str(role)),
        )
        of_role = {(row["layer"], row["head"]): row for row in roles[roles["role"] == role].to_dict("records")}
        ordered = rows.sort_values(["measured", "claimed"], ascending=False, kind="stable")
        for row in ordered.head(SHOWN).to_dict("records"):
            numbers = of_role[int(row["layer"]), int(row["head"])]
            weights = row["weights"] if isinstance(row["weights"], str) else None
            found = "" if row["claimed"] else " (measured)" if row["measured"] else " (chosen)"
            table.add_row(
                f"  {int(row['layer'])}.{int(row['head'])}{found}",
                *(
                    (share if name in wording.PROMPT_SHARES else rounded)(numbers.get(name))
                    for name in wording.PROMPT_COLUMNS
                ),
                Text(wording.verdict(weights), style=STYLES.get(weights, "dim")) if weights else "",
                Text(wording.ON_PROMPTS[row["activations"]], style=PROMPT_STYLES.get(row["activations"], "dim")),
                "" if row["reading"] == "undecided" else wording.READINGS[row["reading"]],
            )
        if len(ordered) > SHOWN:
            table.add_row(f"  and {len(ordered) - SHOWN} more")
    return table


def _together(joint: pd.DataFrame, role: str) -> list[Text | str]:
    """Return a role's effect, its verdicts from weights and on prompts, and how both read; empty if there is none.

    The effect is measured with all its heads replaced in one run.
    """
    found = joint[(joint["kind"] == "role") & (joint["role"] == role)].reindex(
        columns=["weights", "activations", "reading", *wording.PROMPT_TOGETHER.values()]
    )
    if not len(found):
        return [""] * (len(wording.PROMPT_COLUMNS) + 3)
    row = found.iloc[0]
    weights, activations, reading = (
        row[name] if isinstance(row[name], str) else None for name in ("weights", "activations", "reading")
    )
    columns = [wording.PROMPT_TOGETHER.get(name) for name in wording.PROMPT_COLUMNS]
    return [
        *("" if name is None else share(row[name]) for name in columns),
        Text(wording.verdict(weights), style=STYLES.get(weights, "dim")) if weights else "",
        Text(wording.ON_PROMPTS[activations], style=PROMPT_STYLES.get(activations, "dim")) if activations else "",
        "" if reading in (None, "undecided") else wording.READINGS[reading],
    ]


def prompt_reasons(roles: pd.DataFrame) -> Iterable[str]:
    """Yield the verdicts' reasons, each reason once with its heads."""
    told = roles[roles["reason"].fillna("") != ""]
    for (verdict, reason), rows in told.groupby(["verdict", "reason"], sort=False):
        names = [f"{int(row['layer'])}.{int(row['head'])}" for row in rows.to_dict("records")]
        yield f"{wording.ON_PROMPTS[str(verdict)]} ({', '.join(dict.fromkeys(names))}): {reason}"


def effects_lines(record: Json, activations: pd.DataFrame | None, roles: pd.DataFrame | None) -> Iterable[str]:
    """Yield which heads have the largest effects on the answer, whatever their role."""
    if activations is None or roles is None or record["activations"].get("untestable"):
        return
    for query, heads in largest_effects(record, activations, roles).items():
        named = [
            f"{each.layer}.{each.head} {share(each.effect)}"
            + (f" ({', '.join(map(wording.role, each.roles))})" if each.roles else "")
            for each in heads
        ]
        yield f"Largest effects at {query} of the heads that were replaced, with their roles: {', '.join(named)}."


def attending_lines(record: Json, activations: pd.DataFrame | None, roles: pd.DataFrame | None) -> Iterable[str]:
    """Yield, for each role that asks for a write, the heads that attend as its heads do and write too little."""
    if activations is None or roles is None or record["activations"].get("untestable"):
        return
    for role, asked, heads in without_write(record, activations, roles):
        named = [
            f"{each.layer}.{each.head} (attention {rounded(each.attention)}, write {share(each.write_share)}"
            + (f", effect {share(each.effect)})" if math.isfinite(each.effect) else ")")
            for each in heads[:SHOWN]
        ]
        more = f" and {len(heads) - SHOWN} more" if len(heads) > SHOWN else ""
        yield (
            f"Attend as {wording.role(role)} heads do, but do not write directly what the role asks for, a share of "
            f"{share(asked)}: {', '.join(named)}{more}."
        )


def role_reasons(joint: pd.DataFrame) -> Iterable[str]:
    """Yield which roles do not stand out among other heads."""
    for role, p in outdone_roles(joint).items():
        yield f"{wording.role(role)}: its heads together do not stand out of other heads (p = {p:.2f})"


def prompts_lines(activations: Mapping[str, Any]) -> Iterable[str]:
    """Yield how well the model does the task, and how to read the table; or why it was not run."""
    if "halves" not in activations:
        yield f"Not run on prompts: {activations['untestable']}"
        return
    choosing, testing = (activations["halves"][half] for half in ("choosing", "testing"))
    yield (
        f"On prompts: heads are chosen on {choosing['prompts']} and tested on {testing['prompts']} others of "
        f"{testing['clusters']} clusters. There the answer beats the foil in {testing['accuracy']:.0%}, by "
        f"{testing['logit_difference']:.2f} logits on average."
    )
    if left_out := activations.get("left_out"):
        said = "; ".join(f"{n} with {why}" for why, n in left_out.items())
        yield f"{wording.counted(sum(left_out.values()), 'prompt')} left out: {said}."
    if activations["untestable"]:
        yield f"Untestable: {activations['untestable']}."
    elif untrained := activations.get("controls", {}).get("untrained"):
        role, passed = max(
            ((role, max(shares.values())) for role, shares in untrained.items()), key=lambda pair: pair[1]
        )
        yield (
            f"Control: with its matrices drawn at random, {passed:.1%} of the model's heads pass the test of attention "
            f"for {wording.role(role)}, and no more for another role."
        )


def share(value: Any) -> str:
    """Return a share in whole percent; empty if it is missing."""
    return "" if value is None or not math.isfinite(value) else f"{100 * value:.0f}%".replace("-0%", "0%")
