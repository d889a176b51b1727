"""The page's figure for a task whose words form a cycle; the terminal's table is elsewhere and needs no Matplotlib."""

import base64
import io
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from ovqk import wording
from ovqk.figures.choice import cycle_figure
from ovqk.records.cells import Cell
from ovqk.report.cycles import pairs_line, part_name
from ovqk.report.terminal_tables import rounded


def cycle_image(cell: Cell, label: str) -> dict[str, Any] | None:
    """Return an address and a description for a cell's figure by frequency, its verdicts, and a sentence on all pairs.

    It is None if the cell's task has no cycle. The address holds the figure itself, as SVG, so the page needs no other
    file. The sentence is empty if pairs were not run. `label` names the model.
    """
    figure = cycle_figure(cell, label)
    if figure is None:
        return None
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    address = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode('ascii')}"
    rows = cell.tables["cycles"].to_dict("records")
    told = [f"{part_name(row)}: {_strongest(row)}" for row in rows]
    description = f"Power by frequency, {label}. " + "; ".join(told)
    there = {str(row.get("verdict")) for row in rows}
    return {
        "address": address,
        "description": description,
        "pairs": pairs_line(cell.record["summary"]),
        "verdicts": [name for name in wording.VERDICTS if name in there],
    }


def _strongest(row: Mapping[Hashable, Any]) -> str:
    if pd.isna(row["frequency"]):
        return "no power"
    said = wording.VERDICTS.get(row.get("verdict") or "", "")
    return f"{int(row['frequency'])} has {rounded(row['share'])}{f', {said}' if said else ''}"
