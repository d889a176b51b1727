"""The finished cells in a results folder, read into memory, and labels that tell them apart."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk.records.comparison import differences
from ovqk.records.record import fault, read_record, says_done
from ovqk.records.results import cell_folders, folders_of_part, load_table

ANALYSES = (
    "full",
    "b03",
    "activations",
    "qk",
    "ov",
    "composition",
)  # several cells with the same model and task are shown in this order
TABLES = (
    "heads",
    "layers",
    "spectra",
    "offsets",
    "directions",
    "composition",
    "tests",
    "nulls",
    "verdicts",
    "candidates",
    "activations",
    "roles",
    "joint",
    "cycles",
    "frequencies",
    "relations",
)
Json = dict[str, Any]
Heads = set[tuple[int, int]]
CellTables = dict[str, pd.DataFrame]


@dataclass
class Cell:
    """One finished cell.

    Attributes:
        folder: its results folder.
        record: its record.json.
        tables: name -> table.
        prints: name -> a table's fingerprint, once it is computed.
    """

    folder: Path
    record: Json
    tables: CellTables
    prints: dict[str, int] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str]:
        """The model's name and the task's."""
        return self.record["model"], self.record["task"]

    @property
    def weights(self) -> str:
        """The weights and their processing. Cells that share both share all results that do not depend on a task."""
        return f"{self.digest[:16]} {self.record['processing']['applied']}"

    @property
    def d_head(self) -> int | None:
        """Its heads' dimension, which is a circuit's number of singular values; None if the cell keeps no spectra."""
        spectra = self.tables.get("spectra")
        if spectra is None or not len(spectra):
            return None
        return int(spectra.loc[(spectra["space"] == "residual") & (spectra["kind"] == "singular"), "index"].max()) + 1

    @property
    def variant(self) -> tuple[str, str]:
        """Processing and seed, which order the cells that differ in nothing else."""
        return str(self.record["processing"].get("applied")), f"{self.record['seed']:>6}"

    @property
    def digest(self) -> str:
        """The digest over the weights' files."""
        return str(self.record["provenance"].get("weights_digest"))

    def print_of(self, name: str) -> tuple[str, int]:
        """Return a table's fingerprint. If cells share it, as most with the same weights do, it is thinned once."""
        if name not in self.prints:
            self.prints[name] = int(pd.util.hash_pandas_object(self.tables[name], index=False).sum())
        return self.weights, self.prints[name]

    def marked(self) -> Heads:
        """Return the heads that are claimed, candidates, or chosen on prompts."""
        found: Heads = set()
        for name in ("verdicts", "candidates", "roles"):
            if name in self.tables and len(self.tables[name]):
                rows = self.tables[name][["layer", "head"]].dropna().astype(int)
                found |= {(int(layer), int(head)) for layer, head in rows.to_numpy()}
        return found


@dataclass(frozen=True)
class Failure:
    """A cell without results, because it failed or its files cannot be read; `error` says why."""

    model: str
    task: str
    analysis: str
    error: str


def read_cells(results_dir: Path) -> tuple[list[Cell], list[Failure]]:
    """Read the cells in a results folder, or in a model's, a task's or a cell's folder inside one.

    Returns:
        The finished cells, and those that failed or whose files cannot be read.
    """
    cells, failures = [], []
    for folder in list(cell_folders(results_dir)) or folders_of_part(results_dir):
        record = read_record(folder)
        parts = (results_dir.resolve() / folder.relative_to(results_dir)).parts[-3:]
        name = dict(zip(("model", "task", "analysis"), parts, strict=True))
        if record is None:
            failures.append(Failure(**name, error="its record.json cannot be read"))
            continue
        name |= {key: str(record.get(key, value)) for key, value in name.items()}
        if not says_done(record):
            failures.append(Failure(**name, error=str(record.get("error") or f"status {record.get('status')}")))
            continue
        if (wrong := fault(folder, record)) is not None:
            failures.append(Failure(**name, error=wrong))
            continue
        try:
            tables = {table: found for table in TABLES if (found := load_table(folder, table)) is not None}
        except Exception as error:  # pyarrow raises many kinds of errors for a file that is not Parquet
            failures.append(Failure(**name, error=f"a table cannot be read ({type(error).__name__})"))
            continue
        cells.append(Cell(folder, record, tables))
    rank = {name: place for place, name in enumerate(ANALYSES)}
    cells.sort(key=lambda cell: (*cell.place, rank.get(cell.record["analysis"], len(rank)), *cell.variant, cell.folder))
    return cells, failures


def labels(cells: Sequence[Cell]) -> list[str]:
    """Return each cell's model, with brackets that tell the cell from others with its model and task.

    If a model has verdicts of several analyses for one task, its cells of all tasks name theirs: else a task that was
    run would be missing beside the name with brackets.
    """
    told_apart = differences([cell.record for cell in cells])
    found = [
        _named(cell.record["model"], [text.replace("processing=", "")])
        for cell, text in zip(cells, told_apart, strict=True)
    ]
    judged = Counter((label, cell.place) for label, cell in zip(found, cells, strict=True) if "verdicts" in cell.tables)
    several = {label for (label, _), n in judged.items() if n > 1}
    return [
        _named(label, [cell.record["analysis"] if label in several else ""])
        for label, cell in zip(found, cells, strict=True)
    ]


def weights_labels(cells: Sequence[Cell]) -> list[str]:
    """Return each cell's model, with its weights or processing in brackets if the model has several.

    These labels are for results that do not depend on a task.
    """
    digests, kinds = defaultdict(set), defaultdict(set)
    for cell in cells:
        digests[cell.record["model"]].add(cell.digest)
        kinds[cell.record["model"]].add(cell.record["processing"]["applied"])
    return [
        _named(
            cell.record["model"],
            [
                cell.digest[:8] if len(digests[cell.record["model"]]) > 1 else "",
                cell.record["processing"]["applied"] if len(kinds[cell.record["model"]]) > 1 else "",
            ],
        )
        for cell in cells
    ]


def _named(model: str, parts: Iterable[str]) -> str:
    more = " ".join(filter(None, parts))
    return f"{model} ({more})" if more else model
