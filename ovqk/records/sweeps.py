"""A sweep's cells: those whose records bear its name, and those that it found done.

A record keeps the name of the sweep that computed its cell. If another sweep has the cell too, because it grew or was
handed out by W&B, `<results_dir>/.sweeps/<id>/sweep.json` notes that.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ovqk.records.record import claim, read_record
from ovqk.whole_files import read_json, write_json

SWEEPS = ".sweeps"
CELLS = "sweep.json"


def sweep_folder(results_dir: Path, name: str) -> Path:
    """Return the folder for a sweep's own files; its name is also the run's id."""
    return results_dir / SWEEPS / f"sweep-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def remember_cells(results_dir: Path, name: str, cells: Iterable[Path]) -> None:
    """Note a sweep's cells and keep those noted before. The sweep must be claimed."""
    folder = sweep_folder(results_dir, name)
    earlier = _noted(folder).get("cells", [])
    noted = {str(cell.relative_to(results_dir)) for cell in cells if cell.is_relative_to(results_dir)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CELLS, {"name": name, "cells": sorted(noted | set(earlier))})


def note_cells(results_dir: Path, name: str, cells: Iterable[Path]) -> None:
    """Claim a sweep and note its cells, unless all their records bear its name.

    Raises:
        OSError: the results folder cannot be written.
    """
    cells = list(cells)
    if all((read_record(cell) or {}).get("sweep") == name for cell in cells):
        return
    with claim(results_dir, sweep_folder(results_dir, name).name):
        remember_cells(results_dir, name, cells)


def noted_cells(results_dir: Path) -> dict[str, set[Path]]:
    """Return sweep -> the folders of the cells that are noted for it."""
    found: dict[str, set[Path]] = {}
    for path in (results_dir / SWEEPS).glob(f"*/{CELLS}"):
        noted = _noted(path.parent)
        if noted:
            found[noted["name"]] = {results_dir / cell for cell in noted["cells"]}
    return found


def _noted(folder: Path) -> dict[str, Any]:
    try:
        noted = read_json(folder / CELLS)
        texts = all(isinstance(each, str) for each in (noted["name"], *noted["cells"]))
        return {"name": noted["name"], "cells": list(noted["cells"])} if texts else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
