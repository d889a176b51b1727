"""Weights & Biases: one run per cell, made from its record alone, so that it can be made again elsewhere or later.

    python -m ovqk.tracking RESULTS_DIR [--mode online] [--project NAME] [--entity NAME] [--all]

The record is never touched and a failure here never loses a result: tracking.json says what happened, and a cell that
was not tracked is tracked by the next run or by the command above.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import Timeout

from ovqk.config import TrackingConfig, TrackingMode
from ovqk.errors import UserError
from ovqk.panels import Panels, plain_table, read_panels
from ovqk.record import claim, read_record, read_tracking, write_tracking
from ovqk.results import cell_folders
from ovqk.wandb_service import NotReceivedError, finish, is_of_server, quiet_wandb, settings, staged_in, within

LOG_SECONDS = 30.0  # for W&B to take what is logged
PAUSE_SECONDS = 300.0  # after a failure of the server, in which no other cell of this process waits for it
MAX_TAG, MAX_NAME = 64, 128  # what W&B allows, in letters


@dataclass
class _Pause:
    """Until when the server is left alone, and why."""

    until: float = 0.0
    reason: str = ""


_pause = _Pause()
_agent_cells: dict[str, str] = {}  # run that a W&B agent handed out -> the cell it holds


@dataclass(frozen=True)
class _Destination:
    results_dir: Path
    mode: TrackingMode
    project: str
    entity: str | None


def track_cell(folder: Path, results_dir: Path, mode: TrackingMode, project: str, entity: str | None) -> str | None:
    """Make the W&B run of a done cell; returns a warning where that failed.

    tracking.json gets the status, the mode, the run's id, its folder relative to the results (offline) or its address
    (online), and the reason where it is not `done`: `failed`, or `pending` where the server was not tried because it
    had failed an earlier cell of this process.

    Raises:
        ValueError: there is no finished record.
    """
    record = read_record(folder)
    if record is None or record.get("status") != "done":
        raise ValueError(f"{folder} holds no finished record")
    status, reason = _attempt(folder, record, _Destination(results_dir, mode, project, entity))
    if status != "failed":
        return None
    waiting = f"W&B is left alone for {PAUSE_SECONDS / 60:.0f} minutes. " if _is_paused(mode) else ""
    command = f"`python -m ovqk.tracking {results_dir}`"
    return f"{run_name(record)} was computed and recorded, but not tracked ({reason}). {waiting}Later: {command}"


def _attempt(folder: Path, record: dict[str, Any], destination: _Destination) -> tuple[str, str | None]:
    """Track a cell and write tracking.json: the status, and the reason where it is not `done`.

    Where a record that was tracked is to be tracked again and that fails, tracking.json stays as it was.
    """
    before = read_tracking(folder)
    state: dict[str, Any] = {"mode": destination.mode.value}
    status = "pending"
    reason: str | None = f"not tried after: {_pause.reason}"
    try:
        state |= _run(record)
        if not _is_paused(destination.mode):
            write_tracking(folder, {"status": "pending"} | state)
            state |= _send(folder, record, destination, state["run_id"])
            status, reason = "done", None
    except Exception as error:  # whatever W&B raises, the result is safe in its record
        status, reason = "failed", _reason(error, destination.results_dir)
        if destination.mode is TrackingMode.online and is_of_server(error):
            _pause.until, _pause.reason = time.monotonic() + PAUSE_SECONDS, reason
    state = {"status": status} | state | ({"reason": reason} if reason else {})
    tracked = before.get("status") == "done" and before.get("run_id") == state.get("run_id")
    with contextlib.suppress(OSError):  # of a full disk; a cell without the file is pending
        write_tracking(folder, before if tracked and status != "done" else state)
    return status, reason


def _is_paused(mode: TrackingMode) -> bool:
    return mode is TrackingMode.online and time.monotonic() < _pause.until


def needs_tracking(folder: Path) -> bool:
    """Whether a done cell is still to be tracked: its record never was, or a W&B agent waits for it in its own run."""
    record, state = read_record(folder), read_tracking(folder)
    if in_agent() or record is None or state.get("status") != "done":
        return True
    return state.get("record", state.get("run_id")) != run_id(record)


def in_agent() -> bool:
    """Whether `wandb agent` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"))


def run_id(record: dict[str, Any]) -> str:
    """One run per computed record: tracking a record twice is one run."""
    wall = record["provenance"]["wall_seconds"]
    text = f"{record['cell_id']} {wall} {record['provenance']['peak_memory_mb']}"
    return f"{record['cell_id']}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def run_name(record: dict[str, Any]) -> str:
    """What W&B shows."""
    return f"{record['model']} {record['task']} {record['analysis']}"


def _run(record: dict[str, Any]) -> dict[str, str]:
    """{"run_id": ...}: the record's own run, or the one that a W&B agent made for this process, with the `record`.

    Raises:
        NotReceivedError: the agent's run holds another cell already.
    """
    if not in_agent():
        return {"run_id": run_id(record)}
    identifier = os.environ["WANDB_RUN_ID"]
    if _agent_cells.setdefault(identifier, record["cell_id"]) != record["cell_id"]:
        raise NotReceivedError("the run of a W&B agent holds one cell: its command must not be a sweep (-m)")
    return {"run_id": identifier, "record": run_id(record)}


def _send(folder: Path, record: dict[str, Any], destination: _Destination, identifier: str) -> dict[str, str]:
    """Make the run; where it is: {"directory": ...} or {"url": ...}."""
    panels = read_panels(folder, record)
    wandb_dir = destination.results_dir.absolute() / "wandb"
    staging = wandb_dir / "data" / f"{identifier}-{time.time_ns()}"
    wandb_dir.mkdir(parents=True, exist_ok=True)
    online = destination.mode is TrackingMode.online
    limits = settings()
    with quiet_wandb() as (wandb, service), staged_in(staging):
        with within(limits["init_timeout"], service):
            run = wandb.init(
                project=destination.project,
                entity=destination.entity,
                dir=str(destination.results_dir),
                id=identifier,
                name=run_name(record)[:MAX_NAME],
                group=(record["sweep"] or record["cell_id"])[:MAX_NAME],
                job_type=record["analysis"][:MAX_TAG],
                tags=list(dict.fromkeys(record[key][:MAX_TAG] for key in ("model", "task", "analysis"))),
                config=panels.config,
                mode=destination.mode.value,
                reinit="create_new",  # a run of the caller's own goes on
                settings=wandb.Settings(**limits),
            )
        with within(LOG_SECONDS, service):
            log_panels(run, wandb, panels)
        with within(limits["finish_timeout"], service):
            finish(run)
    directory = Path(run.settings.sync_dir)
    _remove_earlier(wandb_dir, identifier, {directory.name} if online else {directory.name, staging.name})
    if online:
        return {"url": run.url} if run.url else {}
    return {"directory": os.path.relpath(directory, destination.results_dir.absolute())}


def _remove_earlier(wandb_dir: Path, identifier: str, kept: set[str]) -> None:
    """Remove what earlier attempts at a run have left on disk, and tables that wait for nothing any more."""
    for pattern in (f"*run-*-{identifier}", f"*run-*-{identifier}-[0-9]", f"data/{identifier}-*"):
        for left in wandb_dir.glob(pattern):
            if left.name not in kept:
                shutil.rmtree(left, ignore_errors=True)


def log_panels(run: Any, wandb: Any, panels: Panels) -> None:
    """Hand over curves, histograms, eigenvalues and tables, and the summary.

    Raises:
        TimeoutError: W&B takes too long over it.
    """
    deadline = time.monotonic() + LOG_SECONDS
    run.define_metric("layer", hidden=True)
    run.define_metric("relative_depth", hidden=True)  # the axis on which models of different depths compare
    run.define_metric("layer/*", step_metric="layer", summary="none")
    run.define_metric("depth/*", step_metric="relative_depth", summary="none")
    for row in panels.curves.to_dict("records"):
        steps = {"layer": int(row.pop("layer")), "relative_depth": row.pop("relative_depth")}
        values = {key: value for key, value in row.items() if pd.notna(value)}
        run.log(steps | {f"{axis}/{key}": value for axis in ("layer", "depth") for key, value in values.items()})
    for name, panel in _media(wandb, panels):
        run.log({name: panel}, commit=False)
        if time.monotonic() > deadline:
            raise TimeoutError(f"W&B did not take the run within {LOG_SECONDS:.0f} s")
    run.log({})
    run.summary.update(panels.scalars)


def _media(wandb: Any, panels: Panels) -> Iterator[tuple[str, Any]]:
    for name, (counts, edges) in panels.histograms.items():
        yield f"histograms/{name}", wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
    for name, rows in panels.eigenvalues.items():
        circuit, space = name.split("_")
        yield (
            f"eigenvalues/{name}",
            wandb.plot_table(
                vega_spec_name="wandb/lineseries/v0",
                data_table=_table(wandb, rows),
                fields={column: column for column in rows.columns},
                string_fields={"title": f"{circuit.upper()} eigenvalues, {space} (real part)", "xname": "index"},
            ),
        )
    for name, table in panels.tables.items():
        yield f"tables/{name}", _table(wandb, table)


def _table(wandb: Any, frame: pd.DataFrame) -> Any:
    """A W&B table with columns of one type each; what is missing or no finite number is shown as empty."""
    kinds, rows = plain_table(frame)
    table = wandb.Table(columns=[str(name) for name in frame.columns], data=[], dtype=kinds)
    table.data = rows  # the types are known: W&B need not look at every value
    return table


def _reason(error: Exception, results_dir: Path) -> str:
    text = str(error) or "W&B's service on this machine ended"
    text = f"{type(error).__name__}: {text}".splitlines()[0]
    return text.replace(str(results_dir.absolute()), str(results_dir))


def main() -> None:
    """Track the finished cells under a results folder that were never tracked."""
    parser = argparse.ArgumentParser(prog="python -m ovqk.tracking", description="Send finished cells to W&B.")
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--mode", choices=["online", "offline"], help="WANDB_MODE unless given, else online")
    parser.add_argument("--project", help="the one in each cell's config unless given")
    parser.add_argument("--entity", help="the one in each cell's config unless given")
    parser.add_argument("--all", action="store_true", help="also cells that were tracked, offline for instance")
    arguments = parser.parse_args()
    if not arguments.results_dir.is_dir():
        raise SystemExit(f"ovqk: {arguments.results_dir}: no such results folder.")
    mode = _mode(arguments.mode)
    folders = list(cell_folders(arguments.results_dir))
    if not folders:
        raise SystemExit(f"ovqk: {arguments.results_dir}: no cells there (MODEL/TASK/ANALYSIS-ID folders).")
    missed = [folder for folder in folders if not _track_later(folder, arguments, mode)]
    waiting = [folder for folder in folders if _waits_offline(folder, arguments.results_dir)]
    if waiting and mode is TrackingMode.online:
        print(f"{len(waiting)} wait offline: --all sends them, or `wandb sync {arguments.results_dir}/wandb`.")
    raise SystemExit(1 if missed else 0)


def _mode(asked: str | None) -> TrackingMode:
    name = asked or os.environ.get("WANDB_MODE") or TrackingMode.online.value
    name = "offline" if name == "dryrun" else name
    if name not in ("online", "offline"):
        raise SystemExit(f"ovqk: WANDB_MODE={name}: with it nothing is sent; --mode online or --mode offline.")
    return TrackingMode(name)


def _track_later(folder: Path, arguments: argparse.Namespace, mode: TrackingMode) -> bool:
    """Track a cell, unless it was or another process is at work on it; says what became of it. False: not tracked."""
    record = read_record(folder)
    if record is None or not {"status", "cell_id"} <= record.keys():
        print(f"skipped {folder}: its record cannot be read", file=sys.stderr)
        return True
    if record["status"] != "done":
        return True
    try:
        with claim(arguments.results_dir, record["cell_id"], wait=False):
            if not (arguments.all or needs_tracking(folder)):
                return True
            chosen = record.get("provenance", {}).get("config", {}).get("tracking", {})
            project = arguments.project or chosen.get("project") or TrackingConfig.project
            entity = arguments.entity or chosen.get("entity")
            status, reason = _attempt(folder, record, _Destination(arguments.results_dir, mode, project, entity))
    except Timeout:
        print(f"skipped {folder}: another process is at work on it", file=sys.stderr)
        return True
    except UserError as error:
        raise SystemExit(f"ovqk: {error}") from None
    if status == "done":
        print(" ".join(filter(None, ("tracked", str(folder), read_tracking(folder).get("url")))))
        return True
    print(f"not tracked {folder}: {reason}", file=sys.stderr)
    return False


def _waits_offline(folder: Path, results_dir: Path) -> bool:
    """Whether a cell's offline run was not yet sent by `wandb sync`, which leaves a mark."""
    state = read_tracking(folder)
    offline = state.get("status") == "done" and "directory" in state
    return offline and not list((results_dir / state["directory"]).glob("*.wandb.synced"))


if __name__ == "__main__":
    main()
