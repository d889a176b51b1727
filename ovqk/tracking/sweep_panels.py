"""The content for a sweep's W&B run: tables and figures over all its cells, from their records alone.

`ovqk.records.sweeps` says which cells are a sweep's. `<results_dir>/.sweeps/<id>/` has its run's tracking.json.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk import wording
from ovqk.records.cells import Cell
from ovqk.records.comparison import depths, roles
from ovqk.records.on_prompts import tasks_done
from ovqk.records.record import done_records
from ovqk.records.results import cell_folders, load_table
from ovqk.records.sweeps import noted_cells, sweep_folder

LEAST = 2  # the smallest number of cells in a sweep
FIGURE_SECONDS = 20.0  # after this time no other figure is begun
DOTS = 120  # a figure's dots per inch
DRAWN = ("heads", "verdicts")  # tables from which the figures are made


@dataclass(frozen=True)
class Sweep:
    """A sweep's name, its folder under `.sweeps`, and its done cells' folders."""

    name: str
    folder: Path
    cells: list[Path]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Its cells' records, in the same order."""
        return [record for _, record in done_records(self.cells)]


def read_sweeps(results_dir: Path) -> list[Sweep]:
    """Return the sweeps in a results folder that have at least LEAST done cells, by name."""
    cells = noted_cells(results_dir)
    done = dict(done_records(cell_folders(results_dir)))
    for folder, record in done.items():
        if record.get("sweep"):
            cells.setdefault(record["sweep"], set()).add(folder)
    found = [
        Sweep(name, sweep_folder(results_dir, name), sorted(folders & done.keys()))
        for name, folders in sorted(cells.items())
    ]
    return [sweep for sweep in found if len(sweep.cells) >= LEAST]


# --- what it shows -------------------------------------------------------------------------------------------


def overview_config(sweep: Sweep) -> dict[str, Any]:
    """Return keys by which a sweep's run is filtered, without `model`, so that no model's group contains the run."""
    records = sweep.records
    lists = {f"{key}s": sorted({record[key] for record in records}) for key in ("model", "task")}
    return {"sweep": sweep.name, "cells": len(records)} | lists | {"analyses": sorted({r["analysis"] for r in records})}


def overview_tables(sweep: Sweep) -> dict[str, pd.DataFrame]:
    """Return `roles` and `depths` (the terminal's comparison), `cells` (each cell's cost), and `prompts`.

    `prompts` is there if a cell ran its model on prompts; it says how well the models do the tasks.
    """
    claimed = roles(sweep.cells)
    claimed["of_its_heads"] = [
        ", ".join(f"{count} {wording.verdict(verdict)}" for verdict, count in counts.items())
        for counts in claimed["of_its_heads"]
    ]
    if "on_prompts" in claimed:
        claimed["on_prompts"] = [wording.counts(counts, wording.ON_PROMPTS) for counts in claimed["on_prompts"]]
    keys = ("model", "task", "analysis", "seed", "cell_id", "sweep")
    cells = [
        {key: record[key] for key in keys}
        | {"processing": record["processing"]["applied"]}
        | {key: record["provenance"][key] for key in ("wall_seconds", "peak_memory_mb")}
        for record in sweep.records
    ]
    tables = {"roles": claimed, "depths": depths(sweep.cells), "cells": pd.DataFrame(cells)}
    done = tasks_done(sweep.cells)
    return tables | ({"prompts": done} if len(done) else {})


def draw(sweep: Sweep, into: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, PNG file) for the report's figures about all models, as many as FIGURE_SECONDS allow."""
    import matplotlib

    from ovqk.figures.choice import sweep_figures
    from ovqk.figures.drawing import STYLE

    cells = [
        Cell(folder, record, {name: table for name in DRAWN if (table := load_table(folder, name)) is not None})
        for folder, record in done_records(sweep.cells)
    ]
    deadline = time.monotonic() + FIGURE_SECONDS
    for name, figure in sweep_figures(cells):
        path = into / f"{name}.png"
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, dpi=DOTS, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.15)
        yield name, path
        if time.monotonic() > deadline:
            return
