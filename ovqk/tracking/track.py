"""Weights & Biases: one run per cell, made from its record alone, so that it can be made again elsewhere or later.

    python -m ovqk.tracking RESULTS_DIR [--mode online] [--project NAME] [--entity NAME] [--all]

A sweep also has a run of its own, with figures and tables over all its cells. Records are never changed, so a failure
here loses no result: tracking.json says what happened, and the next run or the command above tries again.
"""

import contextlib
import hashlib
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ovqk.config.command_line import tool
from ovqk.config.schema import TrackingMode
from ovqk.records.record import claim, read_done, read_record, read_tracking, says_done, write_tracking
from ovqk.records.sweeps import remember_cells, sweep_folder
from ovqk.tracking.cell_panels import read_panels
from ovqk.tracking.environment import entity_of, noted_in, project_of, set_now
from ovqk.tracking.run import Destination, Label, log_overview, log_panels, make_run
from ovqk.tracking.service import NotReceivedError, in_words, is_of_server
from ovqk.tracking.sweep_panels import (
    Sweep,
    draw,
    overview_config,
    overview_tables,
    read_sweeps,
)

PAUSE_SECONDS = 300.0  # after the server fails, no other cell in this process waits for it during this time


@dataclass
class Pause:
    """Until when the server is left alone, and why."""

    until: float = 0.0
    reason: str = ""


@runtime_checkable
class Trackable(Protocol):
    """A cell or a sweep with its own run, and a folder with the run's tracking.json."""

    @property
    def folder(self) -> Path:
        """The folder that holds its tracking.json."""
        ...

    def identify(self) -> dict[str, str]:
        """Return the `run_id`, and the `record` that the run shows if the id does not name it."""
        ...

    def send(self, identifier: str, destination: Destination) -> dict[str, str]:
        """Make the run with this id, and return its place: {"directory": ...} or {"url": ...}."""
        ...


@dataclass(frozen=True)
class TrackedCell:
    """A done cell.

    Attributes:
        folder: its results folder.
        record: its record.json.
        agents_sweep: the sweep's name that a W&B agent gave; None for the one in the record.
    """

    folder: Path
    record: dict[str, Any]
    agents_sweep: str | None = None

    def identify(self) -> dict[str, str]:
        """Return the record's own run, or the one that a W&B agent made for this process.

        Raises:
            NotReceivedError: the agent's run holds another cell already.
        """
        if not in_agent():
            return {"run_id": run_id(self.record)}
        identifier, cell_id = os.environ["WANDB_RUN_ID"], self.record["cell_id"]
        if agent_cells.setdefault(identifier, cell_id) != cell_id:
            raise NotReceivedError("the run of a W&B agent holds one cell: its command must not be a sweep (-m)")
        return {"run_id": identifier, "record": run_id(self.record)}

    def send(self, identifier: str, destination: Destination) -> dict[str, str]:
        """See `Trackable`."""
        record = self.record | ({} if self.agents_sweep is None else {"sweep": self.agents_sweep})
        panels = read_panels(self.folder, record)
        label = Label(
            name=run_name(record),
            group=record["sweep"] or record["cell_id"],
            job_type=record["analysis"],
            tags=[record[key] for key in ("model", "task", "analysis")],
            config=panels.config,
        )
        return make_run(identifier, destination, label, lambda run, wandb: log_panels(run, wandb, panels))


@dataclass(frozen=True)
class TrackedSweep:
    """A sweep with the figures and tables over all its cells."""

    sweep: Sweep

    @property
    def folder(self) -> Path:
        """See `Trackable`."""
        return self.sweep.folder

    def identify(self) -> dict[str, str]:
        """Return the sweep's run; `made_of` names the cells it shows."""
        return {"run_id": self.folder.name, "record": self.made_of}

    @property
    def made_of(self) -> str:
        """A hash over its cells, which changes if a cell is added or computed again."""
        return hashlib.sha256(" ".join(map(run_id, self.sweep.records)).encode()).hexdigest()[:12]

    @property
    def needs_tracking(self) -> bool:
        """Say whether it was never tracked with these cells."""
        state = read_tracking(self.folder)
        return not says_done(state) or state.get("record") != self.made_of

    def send(self, identifier: str, destination: Destination) -> dict[str, str]:
        """See `Trackable`. The figures are drawn before W&B is asked for anything."""
        sweep = self.sweep
        label = Label(sweep.name, sweep.name, job_type="sweep", tags=["sweep"], config=overview_config(sweep))
        tables = overview_tables(sweep)
        with tempfile.TemporaryDirectory() as folder:
            figures = list(draw(sweep, Path(folder)))
            return make_run(
                identifier, destination, label, lambda run, wandb: log_overview(run, wandb, tables, figures)
            )


pause = Pause()
agent_cells: dict[str, str] = {}  # run that a W&B agent handed out -> the cell it holds


def track_cell(
    folder: Path,
    results_dir: Path,
    mode: TrackingMode,
    project: str,
    entity: str | None,
    sweep: str | None = None,
) -> str | None:
    """Make a done cell's W&B run, and return a warning if that failed.

    A W&B agent's run belongs to the `sweep` at hand; any other run belongs to the sweep that computed the cell.

    tracking.json gets the status, the mode, the project, W&B's variables that the run follows, the run's id, its folder
    relative to the results (offline) or its address (online), and the reason if the status is not `done`. The status is
    then `failed`, or `pending` if the server was not tried because an earlier cell in this process had found it
    failing.

    Raises:
        ValueError: there is no finished record.
    """
    record = read_done(folder)
    if record is None:
        raise ValueError(f"{folder} holds no finished record")
    status, reason = attempt_tracking(
        TrackedCell(folder, record, sweep if in_agent() else None),
        destination_of(results_dir, mode, project, entity, noted_for(folder)),
    )
    if status != "failed":
        return None
    waiting = f"W&B is left alone for {PAUSE_SECONDS / 60:.0f} minutes. " if _is_paused(mode) else ""
    told = f"{run_name(record)} was computed and recorded, but not tracked ({reason}). {waiting}"
    return f"{told}Later: `{_command(results_dir)}`"


def track_sweep(
    name: str, cells: Iterable[Path], destination: Destination, begun: Callable[[], object] = lambda: None
) -> str | None:
    """Make or replace a sweep's W&B run, and return a warning if that failed.

    It shows the cells given, those that the sweep had before, and those whose records bear its name. Nothing happens if
    they are the same as last time, or fewer than two; else `begun` is called first, because it takes some seconds.

    Raises:
        OSError: the results folder cannot be written.
    """
    results_dir = destination.results_dir
    with claim(results_dir, sweep_folder(results_dir, name).name):
        remember_cells(results_dir, name, cells)
        sweep = next((sweep for sweep in read_sweeps(results_dir) if sweep.name == name), None)
        if sweep is None or not TrackedSweep(sweep).needs_tracking:
            return None
        begun()
        status, reason = attempt_tracking(TrackedSweep(sweep), destination)
    if status == "done":
        return None
    return f"the sweep's own run, of all its cells, was not made ({reason}). Later: `{_command(results_dir)}`"


def shown_by(results_dir: Path, cells: Iterable[Path]) -> str | None:
    """Return the name of a sweep whose own run shows all these cells as they are; None if there is none."""
    wanted = set(cells)
    for sweep in read_sweeps(results_dir):
        if wanted <= set(sweep.cells) and not TrackedSweep(sweep).needs_tracking:
            return sweep.name
    return None


def noted_for(folder: Path, cells: Iterable[Path] = ()) -> dict[str, str]:
    """Return W&B's variables as they were when a run was made first, as its folder's tracking.json notes them.

    A sweep whose own run was never made has those that all its cells have in common.
    """
    state = read_tracking(folder)
    if "run_id" in state:
        return noted_in(state)
    noted = [set(noted_in(read_tracking(cell)).items()) for cell in cells]
    return dict(sorted(set.intersection(*noted))) if noted else {}


def destination_of(
    results_dir: Path, mode: TrackingMode, project: str, entity: str | None, noted: Mapping[str, str]
) -> Destination:
    """Return where a run goes: the config's project and entity, then W&B's variables that are set, then those noted."""
    owner, found = place_of(project, entity, noted)
    return Destination(results_dir, mode, found, owner, dict(noted) | set_now())


def place_of(project: str, entity: str | None, noted: Mapping[str, str]) -> tuple[str | None, str]:
    """Return a run's entity and project: see `destination_of`."""
    variables = dict(noted) | set_now()
    return entity_of(entity, variables), project_of(project, variables)


def _command(results_dir: Path) -> str:
    return f"{tool('track')} {shlex.quote(str(results_dir))}"


def attempt_tracking(what: Trackable, destination: Destination) -> tuple[str, str | None]:
    """Track a cell or a sweep, write its tracking.json, and return the status and the reason if it is not `done`.

    If an attempt fails after an earlier one succeeded, tracking.json stays as it was.
    """
    before = read_tracking(what.folder)
    state: dict[str, Any] = {"mode": destination.mode.value, "project": destination.project} | dict(
        destination.variables
    )
    status = "pending"
    reason: str | None = f"not tried after: {pause.reason}"
    try:
        state |= what.identify()
        if not _is_paused(destination.mode):
            what.folder.mkdir(parents=True, exist_ok=True)
            write_tracking(what.folder, {"status": "pending"} | state)
            state |= what.send(state["run_id"], destination)
            status, reason = "done", None
    except Exception as error:  # whatever W&B raises, the result is safe in its record
        status, reason = "failed", _reason(error, destination.results_dir)
        if destination.mode is TrackingMode.online and is_of_server(error):
            pause.until, pause.reason = time.monotonic() + PAUSE_SECONDS, reason
    state = {"status": status} | state | ({"reason": reason} if reason else {})
    tracked = says_done(before) and before.get("run_id") == state.get("run_id")
    with contextlib.suppress(OSError):  # the disk may be full; without this file the run counts as pending
        write_tracking(what.folder, before if tracked and status != "done" else state)
    return status, reason


def _is_paused(mode: TrackingMode) -> bool:
    return mode is TrackingMode.online and time.monotonic() < pause.until


def needs_tracking(folder: Path) -> bool:
    """Say whether a done cell must be tracked: it never was, or a W&B agent waits for it in its own run."""
    record, state = read_record(folder), read_tracking(folder)
    if in_agent() or record is None or not says_done(state):
        return True
    return state.get("record", state.get("run_id")) != run_id(record)


def in_agent() -> bool:
    """Say whether `wandb agent` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"))


def run_id(record: dict[str, Any]) -> str:
    """Return the id for a record's run; tracking a record twice gives one run."""
    wall = record["provenance"]["wall_seconds"]
    text = f"{record['cell_id']} {wall} {record['provenance']['peak_memory_mb']}"
    return f"{record['cell_id']}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def run_name(record: dict[str, Any]) -> str:
    """Return the run's name in W&B."""
    return f"{record['model']} {record['task']} {record['analysis']}"


def _reason(error: Exception, results_dir: Path) -> str:
    return in_words(error).replace(str(results_dir.absolute()), str(results_dir))
