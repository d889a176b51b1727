"""Weights & Biases: one run per cell, made from its record alone, so that it can be made again elsewhere or later.

    python -m ovqk.tracking RESULTS_DIR [--mode online] [--project NAME] [--entity NAME] [--all]

A sweep also has a run of its own, with figures and tables over all its cells. Records are never changed, so a failure
here loses no result: tracking.json says what happened, and the next run or the command above tries again.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from ovqk.config.command_line import tool
from ovqk.config.schema import TrackingConfig, TrackingMode
from ovqk.errors import UserError, one_message, print_any_text, printable
from ovqk.interrupts import raise_if_remembered
from ovqk.records.record import claim, fault, read_record, read_tracking, says_done
from ovqk.records.results import cell_folders
from ovqk.tracking.environment import not_followed, project_of
from ovqk.tracking.run import Destination
from ovqk.tracking.sweep_panels import Sweep, read_sweeps
from ovqk.tracking.track import TrackedCell, TrackedSweep, attempt_tracking, needs_tracking
from ovqk.whole_files import DISK


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Track the finished cells under a results folder that were never tracked, and then its sweeps."""
    print_any_text()
    parser = argparse.ArgumentParser(prog=tool("track"), description="Send finished cells to W&B.")
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--mode", choices=["online", "offline"], help="WANDB_MODE unless given, else online")
    parser.add_argument("--project", help="each cell's own, from its config, or WANDB_PROJECT")
    parser.add_argument("--entity", help="each cell's own, from its config, unless given")
    parser.add_argument("--all", action="store_true", help="also cells that were tracked before, offline for instance")
    chosen = parser.parse_args(arguments)
    if not chosen.results_dir.is_dir():
        raise UserError(f"{chosen.results_dir}: no such results folder.")
    mode = _mode(chosen.mode)
    if said := not_followed():
        print(f"warning: {said}", file=sys.stderr)
    folders = list(cell_folders(chosen.results_dir))
    if not folders:
        raise UserError(f"{chosen.results_dir}: no cells there (MODEL/TASK/ANALYSIS-ID folders).")
    sent = [_track_later(folder, chosen, mode) for folder in folders]
    sweeps = read_sweeps(chosen.results_dir)
    sent += [_track_sweep_later(sweep, chosen, mode) for sweep in sweeps]
    places = folders + [sweep.folder for sweep in sweeps]
    waiting = [place for place in places if _waits_offline(place, chosen.results_dir)]
    if waiting and mode is TrackingMode.online:
        again = f"{tool('track')} --all {shlex.quote(str(chosen.results_dir))}"
        print(f"{len(waiting)} wait offline; this sends them: {again}")
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
    destination = _destination(record, arguments, mode)

    def attempt() -> tuple[str, str | None] | None:
        return (
            attempt_tracking(TrackedCell(folder, record), destination)
            if arguments.all or needs_tracking(folder)
            else None
        )

    return _held(arguments.results_dir, record["cell_id"], str(folder), folder, attempt)


def _track_sweep_later(sweep: Sweep, arguments: argparse.Namespace, mode: TrackingMode) -> bool:
    """Track a sweep's own run in the same way."""
    destination = _destination(sweep.records[0], arguments, mode)

    tracked = TrackedSweep(sweep)

    def attempt() -> tuple[str, str | None] | None:
        return attempt_tracking(tracked, destination) if arguments.all or tracked.needs_tracking else None

    return _held(arguments.results_dir, sweep.folder.name, f"the sweep {sweep.name}", sweep.folder, attempt)


def _destination(record: dict[str, Any], arguments: argparse.Namespace, mode: TrackingMode) -> Destination:
    chosen = record.get("provenance", {}).get("config", {}).get("tracking", {})
    project = arguments.project or project_of(chosen.get("project") or TrackingConfig.project)
    return Destination(arguments.results_dir, mode, project, arguments.entity or chosen.get("entity"))


def _held(
    results_dir: Path, identifier: str, name: str, folder: Path, attempt: Callable[[], tuple[str, str | None] | None]
) -> bool:
    """Make an attempt unless another process holds the cell, print its outcome, and return whether it succeeded."""
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
        print(printable(" ".join(filter(None, ("tracked", name, read_tracking(folder).get("url"))))))
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
