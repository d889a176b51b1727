"""A relation's word pairs as lines of text, from `relations.parquet`: which a head raises, and which it does not."""

import pandas as pd

from ovqk.wording import counted

SHOWN_PAIRS = 8  # pairs that a line names of each kind
SHOWN_HEADS = {"ov_relation_score": 3, "ov_relation_suppress": 1}
"""Metric -> for how many heads pairs are listed: for those in which it is largest."""
VERBS = {"ov_relation_score": "raises", "ov_relation_suppress": "lowers"}
"""Metric -> what a head does to the targets that it counts."""


def relation_legend(table: pd.DataFrame) -> str:
    """Return how to read the lines."""
    copies = (table["source"] == table["target"]).all()
    place = "the first of all tokens" if copies else "among the first ten of all tokens"
    return (
        "Pairs of the heads that raise or lower most of them, which are chosen for that. Raised: if the head attends "
        f"to the source, the target is {place} that it raises; lowered: of those that it lowers."
    )


def relation_lines(table: pd.DataFrame) -> list[str]:
    """Return a line for each of the strongest heads: `2.4  raises 1 of 2 pairs: France -> Paris; not ...`."""
    found = []
    for metric, shown in SHOWN_HEADS.items():
        shares = table.groupby(["layer", "head"])[metric].mean()
        strongest = shares[shares > 0].sort_values(ascending=False, kind="stable").head(shown)
        for layer, head in strongest.index:
            rows = table[(table["layer"] == layer) & (table["head"] == head)]
            hit, missed = rows[rows[metric] > 0], rows[rows[metric] == 0]
            line = f"{layer}.{head}  {VERBS[metric]} {len(hit)} of {counted(len(rows), 'pair')}: {_named(hit)}"
            found.append(line + (f"; not {_named(missed)}" if len(missed) else ""))
    return found


def _named(rows: pd.DataFrame) -> str:
    """Return pairs as text, and how many more there are."""
    pairs = [f"{row.source} -> {row.target}" for row in rows.head(SHOWN_PAIRS).itertuples()]
    more = len(rows) - len(pairs)
    return ", ".join(pairs) + (f" and {more} more" if more else "")
