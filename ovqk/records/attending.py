"""Heads that attend as a role's heads do on prompts, and write too little directly to have the role."""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from ovqk.activations.least import LEAST_ATTENTION_ALONE, LEAST_SHARE
from ovqk.records.on_prompts import TESTING, Json, role_choice
from ovqk.verdicts.statistics import ALPHA

COLUMNS = "attention", "attention_p", "write_share", "effect"
"""The columns that say whether a head attends as a role's heads do, and what it does with it."""


class Attending(NamedTuple):
    """A head that attends as a role's heads do: its attention, its write and its effect, as shares; nan if unknown."""

    layer: int
    head: int
    attention: float
    write_share: float
    effect: float


class WithoutWrite(NamedTuple):
    """A role that asks for a direct write, as a signed share, and the heads that lack it, most attention first."""

    role: str
    asked: float
    heads: list[Attending]


def without_write(record: Json, activations: pd.DataFrame, roles: pd.DataFrame) -> Iterator[WithoutWrite]:
    """Yield, for each role that asks for a write, the heads that attend as its heads do and write too little directly.

    They are neither claimed nor chosen for the role. On the testing half they give the source significantly more
    attention than the control, and at least LEAST_ATTENTION_ALONE of it all; their write in the role's direction is
    below LEAST_SHARE of the mean logit difference. A role without such heads is left out.
    """
    for role in activations["role"].unique():
        choice = role_choice(record, role)
        if not {"attention", "write"} <= set(choice.get("decides") or ()):
            continue
        rows = activations[(activations["role"] == role) & (activations["half"] == TESTING)]
        rows = rows.reindex(columns=["layer", "head", *COLUMNS])
        looks = (rows["attention_p"] <= ALPHA) & (rows["attention"] >= LEAST_ATTENTION_ALONE)
        sign = choice["write"]["sign"]
        rows = rows[looks & (sign * rows["write_share"] < LEAST_SHARE)].sort_values(
            "attention", ascending=False, kind="stable"
        )
        of_role = roles[roles["role"] == role] if len(roles) else roles
        told = {(int(row["layer"]), int(row["head"])) for row in of_role.to_dict("records")}
        heads = [
            Attending(int(row["layer"]), int(row["head"]), row["attention"], row["write_share"], row["effect"])
            for row in rows.to_dict("records")
            if (row["layer"], row["head"]) not in told
        ]
        if heads:
            yield WithoutWrite(str(role), sign * LEAST_SHARE, heads)
