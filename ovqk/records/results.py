"""Records as DataFrames: every done cell's tables, with the cell's coordinates as columns."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ovqk.records.record import RECORD, fault, read_record, says_done
from ovqk.records.soundness import TABLES
from ovqk.records.sweeps import noted_cells

COORDINATES = ("model", "task", "analysis", "processing", "seed", "cell_id")


def cell_folders(results_dir: str | Path) -> Iterator[Path]:
    """Yield the cells' folders under a results folder that have a record, sorted by name."""
    yield from sorted(path.parent for path in Path(results_dir).glob(f"*/*/*/{RECORD}"))


def folders_of_part(part: Path) -> list[Path]:
    """Return the cells' folders under a model's, a task's or a cell's own folder; none if it is none of these."""
    found = ([path.parent for path in part.glob("*/" * depth + RECORD)] for depth in range(3))
    return sorted(next(filter(None, found), []))


def load_table(folder: Path, name: str) -> pd.DataFrame | None:
    """Return one of a cell's tables; None if the analysis did not make it."""
    path = folder / f"{name}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def load_results(
    places: str | Path | Iterable[str | Path], tables: Sequence[str] | None = None, sweep: str | None = None
) -> dict[str, pd.DataFrame]:
    """Return one DataFrame per table over all done cells, with COORDINATES as its first columns.

    `cells` has one row per cell: its coordinates, folder, sweep, schema_version, wall_seconds, peak_memory_mb,
    weights_digest and its summary. A cell that is found twice (one cell_id) is taken from the first place.

    Args:
        places: a results folder, a folder inside it down to one cell's, or several of these.
        tables: the tables to read besides `cells`, by name; all tables if None.
        sweep: the name of the sweep whose cells to read: those that it computed, and those that it found done, whose
            column `sweep` names the sweep that computed them. All cells if None.

    Raises:
        FileNotFoundError: a place does not exist or holds no done cell.
        ValueError: no place is given, no cell is of the sweep, or no cell has one of the tables.

    Warns:
        UserWarning: a cell is left out because its record or one of its tables is damaged; or cells with several schema
            versions are read.
    """
    if isinstance(tables, str):
        raise ValueError(f"tables={tables!r}: must be a list of names, as ['{tables}']")
    rows: list[dict[str, Any]] = []
    parts: dict[str, list[pa.Table]] = {}
    made: set[str] = set()
    noted: dict[Path, set[Path]] = {}
    named: set[str] = set()
    for folder, record in _done_cells(places):
        if sweep is not None and record.get("sweep") != sweep:
            named.add(str(record.get("sweep")))
            root = folder.absolute().parents[2]
            if root not in noted:
                noted[root] = noted_cells(root).get(sweep, set())
            if folder.absolute() not in noted[root]:
                continue
        row = _row(folder, record)
        try:
            read = {
                name: _with_coordinates(_read(folder / f"{name}.parquet"), row)
                for name in _made(folder, record)
                if tables is None or name in tables
            }
        except ValueError as error:
            _leave_out(folder, str(error))
            continue
        rows.append(row)
        made.update(_made(folder, record))
        for name, table in read.items():
            parts.setdefault(name, []).append(table)
    if not rows and named:
        raise ValueError(f"sweep={sweep!r}: no cell is of that sweep; there: {', '.join(map(repr, sorted(named)))}")
    if not rows:
        raise ValueError("places: none is given; a results folder, or several")
    versions = sorted({row["schema_version"] for row in rows})
    if len(versions) > 1:
        warnings.warn(
            f"cells of schema versions {', '.join(map(str, versions))}: numbers of different versions may differ in "
            "meaning; results['cells'] says which cell has which",
            stacklevel=2,
        )
    missing = sorted(set(tables or ()) - set(parts) - {"cells"})
    if missing:
        there = sorted(made)
        raise ValueError(f"tables: {', '.join(missing)}: in none of the {len(rows)} cells; there: {', '.join(there)}")
    frames = {name: _joined(name, parts[name]).to_pandas() for name in sorted(parts)}
    return {"cells": pd.DataFrame(rows)} | frames


def _done_cells(places: str | Path | Iterable[str | Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    seen = set()
    for place in [places] if isinstance(places, str | Path) else places:
        if not Path(place).is_dir():
            raise FileNotFoundError(f"{place}: no such folder")
        depths = ("", "*/", "*/*/", "*/*/*/")
        folders = sorted({path.parent for depth in depths for path in Path(place).glob(f"{depth}{RECORD}")})
        read = [(folder, record) for folder in folders if (record := read_record(folder)) and says_done(record)]
        faults = {folder: wrong for folder, record in read if (wrong := fault(folder, record)) is not None}
        for folder, wrong in faults.items():
            _leave_out(folder, wrong)
        done = [(folder, record) for folder, record in read if folder not in faults]
        if not done:
            found = f"none of its {len(folders)} cells is done" if folders else "no MODEL/TASK/ANALYSIS-ID folders"
            raise FileNotFoundError(f"{place}: no results: {found}")
        for folder, record in done:
            if record.get("cell_id", folder) not in seen:
                seen.add(record.get("cell_id", folder))
                yield folder, record


def _made(folder: Path, record: dict[str, Any]) -> list[str]:
    """Name a sound cell's tables; a record from an earlier version does not hold their names."""
    there = [name for name in TABLES if (folder / f"{name}.parquet").is_file()]
    return sorted(record.get("tables", there))


def _joined(name: str, tables: list[pa.Table]) -> pa.Table:
    """Join one table over all cells; if a cell's column holds another kind of value than the others, it is left out."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        pass
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for table in tables:
        for field in table.schema:
            kinds[field.name][_kind(field.type)] += 1
    usual = {column: (found - Counter(null=found["null"])).most_common(1) for column, found in kinds.items()}
    kept = []
    for table in tables:
        odd = [
            field.name
            for field in table.schema
            if (most := usual[field.name]) and _kind(field.type) not in ("null", most[0][0])
        ]
        if odd:
            cell = table.column("cell_id")[0].as_py() if table.num_rows else "an empty one"
            told = f"{name}.parquet of cell {cell} is left out: {odd[0]} holds {_kind(table.schema.field(odd[0]).type)}"
            warnings.warn(f"{told}, and {usual[odd[0]][0][0]} in other cells", stacklevel=3)
        else:
            kept.append(table)
    return pa.concat_tables(kept, promote_options="permissive")


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_null(kind):
        return "null"
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return "numbers" if numeric else "true or false" if pa.types.is_boolean(kind) else "texts"


def _leave_out(folder: Path, wrong: str) -> None:
    warnings.warn(f"{folder} is left out: {wrong}; force=true computes the cell again", stacklevel=4)


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path, memory_map=True).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error


def _row(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    row = {key: record[key] for key in ("model", "task", "analysis")}
    row |= {"processing": record["processing"]["applied"], "seed": record["seed"], "cell_id": record["cell_id"]}
    row |= {"folder": str(folder), "sweep": record.get("sweep"), "schema_version": record["schema_version"]}
    row |= {key: record["provenance"][key] for key in ("wall_seconds", "peak_memory_mb", "weights_digest")}
    return row | record["summary"]


def _with_coordinates(table: pa.Table, row: dict[str, Any]) -> pa.Table:
    columns = [pa.repeat(pa.scalar(row[key]), table.num_rows) for key in COORDINATES]
    return pa.Table.from_arrays([*columns, *table.columns], names=[*COORDINATES, *table.column_names])
