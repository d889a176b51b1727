"""Records as DataFrames: every table of every done cell under a results folder, with its coordinates as columns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk.record import RECORD, read_record

COORDINATES = ("model", "task", "analysis", "cell_id")


def cell_folders(results_dir: str | Path) -> Iterator[Path]:
    """Folders of the cells under a results folder that have a record, in the order of their names."""
    yield from sorted(path.parent for path in Path(results_dir).glob(f"*/*/*/{RECORD}"))


def load_table(folder: Path, name: str) -> pd.DataFrame | None:
    """One table of one cell; None where the analysis did not make it."""
    path = folder / f"{name}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def load_results(results_dir: str | Path) -> dict[str, pd.DataFrame]:
    """One DataFrame per table over all done cells, with model, task, analysis and cell_id as first columns.

    `cells` has one row per done cell: its coordinates, processing, seed and summary.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not Path(results_dir).is_dir():
        raise FileNotFoundError(f"no results folder at {results_dir}")
    parts: dict[str, list[pd.DataFrame]] = {}
    cells: list[dict[str, Any]] = []
    for folder in cell_folders(results_dir):
        record = read_record(folder)
        if record is None or record.get("status") != "done":
            continue
        coordinates = {key: record[key] for key in COORDINATES}
        cells.append(
            coordinates
            | {"processing": record["processing"]["applied"], "seed": record["seed"], "folder": str(folder)}
            | record["summary"]
        )
        for path in sorted(folder.glob("*.parquet")):
            table = pd.read_parquet(path)
            for position, (key, value) in enumerate(coordinates.items()):
                table.insert(position, key, value)
            parts.setdefault(path.stem, []).append(table)
    return {"cells": pd.DataFrame(cells)} | {
        name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()
    }
