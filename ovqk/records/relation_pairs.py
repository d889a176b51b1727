"""A relation's word pairs, from `relations.parquet`: which of them a head raises, and which it lowers."""

from typing import Any

import pandas as pd

from ovqk.wording import counted

SHOWN_PAIRS = 8  # pairs that a line names of each kind
SHOWN_HEADS = {"ov_relation_score": 3, "ov_relation_suppress": 1}
"""Metric -> for how many heads pairs are listed: for those in which it is largest."""
VERBS = {"ov_relation_score": "raises", "ov_relation_suppress": "lowers"}
"""Metric -> what a head does to the targets that it counts."""
TIES = {"ov_relation_score": False, "ov_relation_suppress": True}
"""Metric -> whether, of heads that tie, the one with the smallest `ov_relation_auc` comes first, as for candidates."""


def relation_legend(table: pd.DataFrame) -> str:
    """Return how to read the lines."""
    return (
        "Pairs of the heads that raise or lower most of them, which are chosen for that. Raised: if the head attends "
        f"to the source, the target is {place_counted(table)} that it raises; lowered: of those that it lowers."
    )


def place_counted(table: pd.DataFrame) -> str:
    """Return in words the places that count as the top: one if all words are paired with themselves, else ten."""
    copies = (table["source"] == table["target"]).all()
    return "the first of all tokens" if copies else "among the first ten of all tokens"


def relation_lines(table: pd.DataFrame) -> list[str]:
    """Return a line for each of the strongest heads: `2.4  raises 1 of 2 pairs: France -> Paris; not ...`."""
    found = []
    for metric, shown in SHOWN_HEADS.items():
        shares = table.groupby(["layer", "head"])[[metric, "ov_relation_auc"]].mean()
        shares = shares[shares[metric] > 0]
        order = shares.sort_values([metric, "ov_relation_auc"], ascending=[False, TIES[metric]], kind="stable")
        for layer, head in order.head(shown).index:
            rows = table[(table["layer"] == layer) & (table["head"] == head)]
            hit, missed = rows[rows[metric] > 0], rows[rows[metric] == 0]
            line = f"{layer}.{head}  {VERBS[metric]} {len(hit)} of {counted(len(rows), 'pair')}: {_named(hit)}"
            found.append(line + (f"; not {_named(missed)}" if len(missed) else ""))
    return found


def pairs_by_head(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each head, in order: which of the relation's pairs it raises and which it lowers.

    Columns: layer, head, pairs (how many there are), raises and lowers (how many of them), raised and lowered (the
    pairs, as "France -> Paris, ...").

    Args:
        table: relations.parquet.
    """
    rows: list[dict[str, Any]] = []
    for (layer, head), own in table.groupby(["layer", "head"]):
        raised, lowered = (own[own[metric] > 0] for metric in VERBS)
        counts = {"pairs": len(own), "raises": len(raised), "lowers": len(lowered)}
        named = {"raised": _named(raised, None), "lowered": _named(lowered, None)}
        rows.append({"layer": layer, "head": head, **counts, **named})
    return pd.DataFrame(rows)


def _named(rows: pd.DataFrame, shown: int | None = SHOWN_PAIRS) -> str:
    """Return pairs as text, all of them if `shown` is None, and how many more there are."""
    pairs = [f"{row.source} -> {row.target}" for row in rows.head(len(rows) if shown is None else shown).itertuples()]
    more = len(rows) - len(pairs)
    return ", ".join(pairs) + (f" and {more} more" if more else "")
