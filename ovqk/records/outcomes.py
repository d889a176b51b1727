"""What became of the cells of a sweep, as small files that any process on any machine can write and read.

A sweep's folder under `<results_dir>/.hydra_runs` holds `sweep.json`, the cells it expects, and in `outcomes/` a file
for each cell that has ended. A cell that left none was killed by the system, or never started.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ovqk.whole_files import write_json

Status = Literal["done", "cached", "failed"]
EXPECTED = "sweep.json"
ENDED = "outcomes"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        status: `cached` where it was done before.
        folder: its results, where it has any.
        seconds: the time it took, with tracking.
        error: of a failed cell, what went wrong.
        traceback: of a failed cell, where that is a defect.
        warning: what went wrong and did not cost the result: its W&B run.
        tracking: how it is tracked: mode, project and entity.
    """

    status: Status
    model: str
    task: str
    analysis: str
    folder: str | None
    seconds: float
    error: str | None = None
    traceback: str | None = None
    warning: str | None = None
    tracking: dict[str, str | None] | None = None

    @property
    def name(self) -> str:
        """How messages name the cell."""
        return f"{self.model} / {self.task} / {self.analysis}"


class Outcomes:
    """The outcomes of one sweep, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[int, Outcome] = {}

    def begin(self, name: str, cells: list[list[str]] | None) -> None:
        """Note the sweep's name and the cells to expect, each by its overrides, and forget what an earlier one left."""
        (self.folder / ENDED).mkdir(parents=True, exist_ok=True)
        for earlier in (self.folder / ENDED).iterdir():
            earlier.unlink(missing_ok=True)
        write_json(self.folder / EXPECTED, {"name": name, "cells": cells})

    def name(self) -> str:
        """The sweep's name."""
        return str(self._begun()["name"])

    def expected(self) -> list[list[str]] | None:
        """The overrides of the cells to expect, by number; None where the sweeper decides as it goes."""
        cells: list[list[str]] | None = self._begun()["cells"]
        return cells

    def _begun(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / EXPECTED).read_text(encoding="utf-8")))

    def details(self) -> dict[int, str]:
        """By number, what tells a cell from others of one model, task and analysis: overrides like seed=1."""
        cells = [dict(override.split("=", 1) for override in cell) for cell in self.expected() or []]
        varied = [key for key in (cells[0] if cells else ()) if len({cell[key] for cell in cells}) > 1]
        shown = [key for key in varied if key not in ("model", "task", "analysis")]
        return {number: " ".join(f"{key}={cell[key]}" for key in shown) for number, cell in enumerate(cells)}

    def add(self, number: int, outcome: Outcome) -> None:
        """Leave the outcome of one cell."""
        write_json(self.folder / ENDED / f"{number}.json", asdict(outcome))

    def new(self) -> dict[int, Outcome]:
        """The outcomes that were left since the last time this was asked, by the number of the cell."""
        found: dict[int, Outcome] = {}
        for path in (self.folder / ENDED).glob("*.json"):
            number = int(path.stem)
            if number not in self._read:
                found[number] = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        self._read |= found
        return dict(sorted(found.items()))

    def all(self) -> dict[int, Outcome]:
        """Every outcome so far, by the number of its cell."""
        self.new()
        return dict(sorted(self._read.items()))
