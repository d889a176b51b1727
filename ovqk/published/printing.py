"""Rows in the table of published statements, as the terminal prints them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ovqk.published.table import BOUNDS, Row, printed


def print_row(row: Row) -> None:
    """Print one row: the model and statement, the published value, ovqk's, and the result."""
    statement = row.statement
    published = BOUNDS[statement.relation] + statement.value
    value = f", here {printed(row)}" if row.value is not None else ""
    why = f" ({row.reason})" if row.reason else ""
    print(f"{statement.name}: {published}{value}: {row.result}{why}", flush=True)


def print_totals(rows: Sequence[Row], out: Path) -> None:
    """Print how many rows agree, and where the table is."""
    counts = Counter(row.result for row in rows)
    told = ", ".join(f"{counts[result]} {result}" for result in ("reproduced", "differs", "not runnable here"))
    print(f"{len(rows)} statements: {told}\ntable: {out}")
