"""The outcomes in a sweep, as small files that any process on any machine can write and read.

A sweep's folder under `<results_dir>/.hydra_runs` holds `sweep.json`, which lists the expected cells, and in
`outcomes/` a file for each cell that has ended. If a cell has no file, the system killed it, or it never started.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ovqk.whole_files import write_json

Status = Literal["done", "cached", "failed"]
EXPECTED = "sweep.json"
ENDED = "outcomes"


@dataclass(frozen=True)
class Outcome:
    """One cell's outcome.

    Attributes:
        status: `done`, `failed`, or `cached` if the cell was done before.
        model, task, analysis: the cell's choice.
        folder: its results folder, if it has one.
        seconds: the time it took, tracking included.
        error: why the cell failed, if it did.
        traceback: the error's traceback, if the error is a defect of ovqk and not a user's mistake.
        warning: a failure that did not cost the result, for instance in its W&B run.
        tracking: its W&B run's mode, project and entity.
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
        """The cell's name in messages."""
        return f"{self.model} / {self.task} / {self.analysis}"


class Outcomes:
    """One sweep's outcomes, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[int, Outcome] = {}
        self._beside = _folder_beside(folder)

    def begin(self, name: str, cells: list[list[str]] | None) -> None:
        """Note the sweep's name and each expected cell's overrides; remove outcomes from an earlier sweep."""
        (self.folder / ENDED).mkdir(parents=True, exist_ok=True)
        for earlier in (self.folder / ENDED).iterdir():
            earlier.unlink(missing_ok=True)
        write_json(self.folder / EXPECTED, {"name": name, "cells": cells})

    def name(self) -> str:
        """Return the sweep's name."""
        return str(self._begun()["name"])

    def expected(self) -> list[list[str]] | None:
        """Return the expected cells' overrides, by number; None if the sweeper decides as it goes."""
        cells: list[list[str]] | None = self._begun()["cells"]
        return cells

    def _begun(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / EXPECTED).read_text(encoding="utf-8")))

    def details(self) -> dict[int, str]:
        """Return number -> the overrides, such as seed=1, that tell a cell from others with its choice."""
        cells = [dict(override.split("=", 1) for override in cell) for cell in self.expected() or []]
        varied = [key for key in (cells[0] if cells else ()) if len({cell[key] for cell in cells}) > 1]
        shown = [key for key in varied if key not in ("model", "task", "analysis")]
        return {number: " ".join(f"{key}={cell[key]}" for key in shown) for number, cell in enumerate(cells)}

    def add(self, number: int, outcome: Outcome) -> None:
        """Write one cell's outcome.

        If the results' disk is full, the outcome is kept in this process and in the machine's temporary folder, where
        the process that prints the sweep finds it.
        """
        try:
            write_json(self.folder / ENDED / f"{number}.json", asdict(outcome))
        except OSError:
            unwritten.setdefault(self.folder, {})[number] = outcome
            with suppress(OSError):
                self._beside.mkdir(mode=0o700, exist_ok=True)
                write_json(self._beside / f"{number}.json", asdict(outcome))

    def new(self) -> dict[int, Outcome]:
        """Return the outcomes since the last call, by the cell's number."""
        kept = unwritten.get(self.folder, {})
        found = {number: outcome for number, outcome in kept.items() if number not in self._read}
        folders = [self.folder / ENDED, *([self._beside] if _is_own(self._beside) else [])]
        for path in chain.from_iterable(folder.glob("*.json") for folder in folders):
            number = int(path.stem)
            if number not in self._read and number not in found:
                found[number] = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        self._read |= found
        return dict(sorted(found.items()))

    def forget(self) -> None:
        """Remove the outcomes that were kept elsewhere."""
        unwritten.pop(self.folder, None)
        if _is_own(self._beside):
            shutil.rmtree(self._beside, ignore_errors=True)

    def all(self) -> dict[int, Outcome]:
        """Return every outcome so far, by its cell's number."""
        self.new()
        return dict(sorted(self._read.items()))


unwritten: dict[Path, dict[int, Outcome]] = {}
"""Sweep's folder -> outcomes that could not be written to the disk."""


def _folder_beside(folder: Path) -> Path:
    """Return the folder for outcomes in this machine's temporary folder."""
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"ovqk-outcomes-{name}"


def _is_own(folder: Path) -> bool:
    """Say whether a folder exists and belongs to this user; anybody may write to the temporary folder."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
