"""Panels of words about one head: the tokens of its components, and a relation's pairs that it raises or lowers."""

import textwrap

import pandas as pd
from matplotlib.axes import Axes

from ovqk import wording
from ovqk.figures import drawing
from ovqk.figures.drawing import INK, MUTED, legible
from ovqk.records.relation_pairs import pairs_by_head, place_counted

SHOWN_COMPONENTS, SHOWN_TOKENS = 3, 5
LETTERS, MOST_LINES = 150, 4
"""How many letters a line of pairs has at most, and how many lines each kind of pairs takes."""


def component_tokens(axes: Axes, rows: pd.DataFrame, circuit: str) -> None:
    """Draw a table with sigma and the tokens that each end of a circuit's leading singular components reads and writes.

    Args:
        axes: where to draw.
        rows: the head's rows in directions.parquet.
        circuit: `ov` or `qk`.
    """
    title = f"{circuit.upper()}: tokens of its leading singular components"
    if len(rows):
        rows = rows[
            (rows["circuit"] == circuit) & (rows["kind"] == "singular") & (rows["component"] < SHOWN_COMPONENTS)
        ]
    if not len(rows):
        drawing.unavailable(axes, title, "no tokens were read out")
        return
    axes.set_axis_off()
    clustered = (rows["cluster_size"] > 1).any()
    axes.set_title(title + (" (grey: a cluster, only its span means something)" if clustered else ""))
    reads, writes = wording.VERBS[circuit]
    for x, text in zip((0.0, 0.11, 0.56), ("sigma", reads, f"→ {writes}"), strict=True):
        axes.text(x, 0, text, color=MUTED, va="center", fontsize=12)
    y = 1.0
    for _, part in rows.groupby("component"):
        colour = INK if part["cluster_size"].iloc[0] == 1 else MUTED
        axes.text(0, y, f"{part['value'].iloc[0]:.3g}", va="center", fontweight="bold", color=colour)
        for sign in (1, -1):
            axes.text(0.085, y, "+" if sign > 0 else "\N{MINUS SIGN}", va="center", color=MUTED)
            for x, side in ((0.11, "read"), (0.56, "write")):
                mine = part[(part["side"] == side) & (part["sign"] == sign)].nsmallest(SHOWN_TOKENS, "rank")
                text = "  ".join(legible(drawing.spaces_marked(token), 12) for token in mine["token"])
                axes.text(x, y, text, va="center", fontsize=12, color=colour)
            y += 0.9
        y += 0.25
    axes.set(xlim=(0, 1), ylim=(y, -0.6))


def relation_pairs(axes: Axes, rows: pd.DataFrame) -> None:
    """Write which of a relation's word pairs a head raises and which it lowers.

    Args:
        axes: where to write.
        rows: the head's rows in relations.parquet, at least one.
    """
    axes.set_axis_off()
    axes.set_title("OV: pairs of the task's words")
    (found,) = pairs_by_head(rows).to_dict("records")
    y = 0.0
    said = f"If the head attends to the source, the target is {place_counted(rows)} that it raises, or that it lowers."
    axes.text(0, y, said, color=MUTED, va="center", fontsize=12)
    for title, count, named in (("raises", "raises", "raised"), ("lowers", "lowers", "lowered")):
        y += 1.2
        axes.text(0, y, f"{title} {found[count]} of {found['pairs']}", va="center", fontweight="bold", color=INK)
        whole = found[named].replace(" -> ", "\N{NO-BREAK SPACE}->\N{NO-BREAK SPACE}")
        lines = textwrap.wrap(whole, LETTERS, max_lines=MOST_LINES, placeholder=" …") or ["none"]
        for place, line in enumerate(lines):
            y += 0.9 * (place > 0)
            axes.text(0.13, y, legible(line, LETTERS), va="center", fontsize=12, color=INK)
    axes.set(xlim=(0, 1), ylim=(y + 0.9, -0.6))
