"""The terminal's frequency table, for a task whose words form a cycle."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from rich.console import Console

from ovqk import wording
from ovqk.report.fitted_table import Column, FittedTable
from ovqk.report.terminal_tables import rounded

COLUMNS = (
    Column("part", importance=None, text=True),
    Column("frequency", importance=90),
    Column("share", importance=80),
    Column("for 95 %", importance=40),
    Column("Gini", importance=20),
    Column("within", importance=70),
    Column("q", importance=85),
    Column("verdict", importance=95, text=True),
)
LEGEND = (
    "frequency: the strongest, with the words in their order; share: its part of the power; for 95 %: how many hold as "
    "much. OV: from word to word; within: the part that goes from a frequency to the same one. keys: the scores that "
    "words have. neurons to logits: W_out W_U; OV to neurons: W_E W_OV W_in. q: against the same words in other "
    "orders. verdict: the embeddings and what neurons write are sparse in Fourier space; keys are of one frequency; "
    "OV moves that same one, also to the neurons."
)


def part_name(row: Mapping[Hashable, Any]) -> str:
    """Return a part's name, with its head if it belongs to one."""
    head = "" if pd.isna(row["layer"]) else f"{int(row['layer'])}.{int(row['head'])} "
    return f"{head}{wording.CYCLE_PARTS[row['part']]}"


def pairs_line(summary: Mapping[str, Any]) -> str:
    """Return a sentence about the run of all pairs, from a record's summary; empty if they were not run."""
    if "pairs/accuracy" not in summary:
        return ""
    told = [f"{100 * summary['pairs/accuracy']:.1f} % right"]
    if "pairs/distance_irrelevance" in summary:
        told.append(f"distance irrelevance {summary['pairs/distance_irrelevance']:.2f}")
    symmetricity, error = (summary[f"pairs/gradient_symmetricity{end}"] for end in ("", "_se"))
    about = f" (standard error {error:.3f})" if error else ""
    return f"All pairs were run: {', '.join(told)}, gradient symmetricity {symmetricity:.2f}{about}."


def print_cycles(out: Console, cycles: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """Print a row for the embeddings and for each head's OV and keys, and what a run of all pairs came to."""
    table = FittedTable(COLUMNS, "cycles.parquet")
    for row in cycles.to_dict("records"):
        there = not math.isnan(row["share"])
        table.add_row(
            part_name(row),
            str(int(row["frequency"])) if there else "none",
            rounded(row["share"]),
            str(int(row["n_frequencies"])) if there else "",
            rounded(row["gini"]),
            rounded(row["block_share"]),
            rounded(row["q"], 3),
            wording.VERDICTS[row["verdict"]] if row.get("verdict") in wording.VERDICTS else "",
        )
    out.print()
    if line := pairs_line(summary):
        out.print(line)
    out.print(table)
    out.print(LEGEND, style="dim")
