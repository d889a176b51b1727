"""Weights & Biases: one run per cell, made from its record alone, so that it can be made again elsewhere or later.

    python -m ovqk.tracking RESULTS_DIR [--mode online] [--project NAME] [--entity NAME] [--all]

A sweep also has a run of its own, with figures and tables over all its cells. Records are never changed, so a failure
here loses no result: tracking.json says what happened, and the next run or the command above tries again.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from filelock import Timeout

from ovqk.config.command_line import send_command, tool
from ovqk.config.schema import TrackingConfig, TrackingMode
from ovqk.errors import UserError, one_message, print_any_text, printable
from ovqk.interrupts import raise_if_remembered
from ovqk.records.record import claim, fault, read_record, read_tracking, says_done
from ovqk.records.results import cell_folders
from ovqk.tracking.environment import as_typed, not_followed, set_now
from ovqk.tracking.run import Destination
from ovqk.tracking.sweep_panels import Sweep, read_sweeps
from ovqk.tracking.track import (
    TrackedCell,
    TrackedSweep,
    attempt_tracking,
    destination_of,
    needs_tracking,
    noted_for,
)
from ovqk.whole_files import DISK


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Track the finished cells under a results folder that were never tracked, and then its sweeps."""
    print_any_text()
    parser = argparse.ArgumentParser(prog=tool("track"), description="Send finished cells to W&B.")
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--mode", choices=["online", "offline"], help="WANDB_MODE unless given, else online")
    parser.add_argument("--project", help="each cell's own, from its config, or WANDB_PROJECT, now or when it ran")
    parser.add_argument("--entity", help="each cell's own, from its config, unless given")
    parser.add_argument("--all", action="store_true", help="also cells that were tracked before, offline for instance")
    chosen = parser.parse_args(arguments)
    _say_once.cache_clear()
    if chosen.results_dir.is_file():
        raise UserError(f"{chosen.results_dir}: a file, not a results folder.")
    if not chosen.results_dir.is_dir():
        raise UserError(f"{chosen.results_dir}: no such results folder.")
    mode = _mode(chosen.mode)
    if said := not_followed(chosen.results_dir):
        print(f"warning: {said}", file=sys.stderr)
    folders = list(cell_folders(chosen.results_dir))
    if not folders:
        raise UserError(f"{chosen.results_dir}: no cells there (MODEL/TASK/ANALYSIS-ID folders).")
    chosen.offline_by = None if chosen.mode or mode is TrackingMode.online else os.environ["WANDB_MODE"]
    sent = [_track_later(folder, chosen, mode) for folder in folders]
    sweeps = read_sweeps(chosen.results_dir)
    sent += [_track_sweep_later(sweep, chosen, mode) for sweep in sweeps]
    places = folders + [sweep.folder for sweep in sweeps]
    waiting = [place for place in places if _waits_offline(place, chosen.results_dir)]
    if waiting and (mode is TrackingMode.online or chosen.offline_by):
        why = f", because WANDB_MODE={chosen.offline_by} is set" if chosen.offline_by else ""
        print(f"{len(waiting)} wait offline{why}; this sends them: {send_command(chosen.results_dir)}")
    raise SystemExit(0 if all(sent) else 1)


def _mode(asked: str | None) -> TrackingMode:
    name = asked or os.environ.get("WANDB_MODE") or TrackingMode.online.value
    name = "offline" if name == "dryrun" else name
    if name not in ("online", "offline"):
        raise UserError(f"WANDB_MODE={name}: with it nothing is sent; use --mode online or --mode offline.")
    return TrackingMode(name)


def _track_later(folder: Path, arguments: argparse.Namespace, mode: TrackingMode) -> bool:
    """Track a cell unless it was tracked or another process works on it; print the outcome. Return False on failure."""
    record = read_record(folder)
    if record is None or "status" not in record:
        print(printable(f"skipped {folder}: its record cannot be read"), file=sys.stderr)
        return True
    if not says_done(record):
        return True
    if (wrong := fault(folder, record)) is not None:
        print(printable(f"skipped {folder}: {wrong}"), file=sys.stderr)
        return True

    def attempt() -> tuple[str, str | None] | None:
        if not (arguments.all or needs_tracking(folder)):
            return None
        destination = _destination(record, arguments, mode, noted_for(folder))
        return attempt_tracking(TrackedCell(folder, record), destination)

    return _held(arguments, record["cell_id"], str(folder), folder, attempt)


def _track_sweep_later(sweep: Sweep, arguments: argparse.Namespace, mode: TrackingMode) -> bool:
    """Track a sweep's own run in the same way."""
    tracked = TrackedSweep(sweep)

    def attempt() -> tuple[str, str | None] | None:
        if not (arguments.all or tracked.needs_tracking):
            return None
        destination = _destination(sweep.records[0], arguments, mode, noted_for(sweep.folder, sweep.cells))
        return attempt_tracking(tracked, destination)

    return _held(arguments, sweep.folder.name, f"the sweep {sweep.name}", sweep.folder, attempt)


def _destination(
    record: dict[str, Any], arguments: argparse.Namespace, mode: TrackingMode, noted: dict[str, str]
) -> Destination:
    """Return where a run goes, and say once if W&B's variables of then decide that, or if those of now differ."""
    chosen = record.get("provenance", {}).get("config", {}).get("tracking", {})
    project, entity = chosen.get("project") or TrackingConfig.project, chosen.get("entity")
    found = destination_of(arguments.results_dir, mode, project, entity, noted)
    found = replace(found, project=arguments.project or found.project, entity=arguments.entity or found.entity)
    overruled = {
        "WANDB_PROJECT": arguments.project or project != TrackingConfig.project,
        "WANDB_ENTITY": arguments.entity or entity,
    }
    noted, now = {name: value for name, value in noted.items() if not overruled.get(name)}, set_now()
    followed = {name: value for name, value in noted.items() if name not in now}
    other = {name: now[name] for name, value in noted.items() if now.get(name, value) != value}
    if followed:
        _say_once(f"following W&B's variables as they were when the cells were tracked: {as_typed(followed)}")
    if other:
        before = as_typed({name: noted[name] for name in other})
        _say_once(f"{as_typed(other)} is set now and goes before {before} of then")
    return found


@cache
def _say_once(line: str) -> None:
    print(printable(line), flush=True)


def _held(
    arguments: argparse.Namespace,
    identifier: str,
    name: str,
    folder: Path,
    attempt: Callable[[], tuple[str, str | None] | None],
) -> bool:
    """Make an attempt unless another process holds the cell, print its outcome, and return whether it succeeded."""
    results_dir: Path = arguments.results_dir
    raise_if_remembered()
    try:
        with claim(results_dir, identifier, wait=False):
            outcome = attempt()
    except Timeout:
        print(printable(f"skipped {name}: another process is at work on it"), file=sys.stderr)
        return True
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise UserError(f"{results_dir}: it cannot be written ({error.strerror}); nothing was tracked.") from error
    if outcome is None:
        return True
    status, reason = outcome
    if status == "done":
        tracked = "tracked offline" if arguments.offline_by else "tracked"
        print(printable(" ".join(filter(None, (tracked, name, read_tracking(folder).get("url"))))))
        return True
    print(printable(f"not tracked {name}: {reason}"), file=sys.stderr)
    return False


def _waits_offline(folder: Path, results_dir: Path) -> bool:
    """Say whether a cell's or a sweep's offline run still waits for `wandb sync`, which leaves a mark."""
    state = read_tracking(folder)
    place = Path(state.get("directory", ".."))
    offline = says_done(state) and not place.is_absolute() and ".." not in place.parts
    return offline and not list((results_dir / place).glob("*.wandb.synced"))


if __name__ == "__main__":
    main()
