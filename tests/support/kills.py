"""One cell that is killed at each of its file operations in turn, by a process that imports everything once.

    python tests/support/kills.py FOLDER STEP KEY=VALUE ...

For each operation, or every STEP-th, a fork of this process computes the cell and kills itself just before the
operation, and another fork computes it again. What is not as it should be is printed, one line each, and at the end the
number of operations. Each case has a folder of its own, with results, cache and temporary files. With force=true the
cell is done already when it is computed and killed.
"""

import atexit
import dataclasses
import fcntl
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from ovqk.cell import run_cell
from ovqk.config.schema import Config, TrackingMode
from ovqk.records.record import RECORD, read_done
from ovqk.scratch import PREFIX
from ovqk.whole_files import read_json
from support.commands import compose

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
AT = {
    "os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.utime": 3,
    "os.chmod": 2, "os.truncate": None,
}  # fmt: skip
"""Audited event whose first argument is a path -> the argument that says which folder it is relative to."""
PATIENCE = 60.0  # seconds for one run
CELL = re.compile(r"(?<=-)[0-9a-f]{12}(?=-)")  # in the name of a run's folder, among its date and what W&B adds


class Operations:
    """Counts the file operations of this process below a folder, and kills it just before one of them."""

    def __init__(self, below: Path, last: int | None, counted: int) -> None:
        self.below, self.last, self.counted, self.count, self.process = below, last, counted, 0, os.getpid()

    def begin(self) -> None:
        """Count from now on. Python tells of its own calls; `fsync` and Arrow's writer are wrapped."""
        sys.addaudithook(self._heard)
        fsync, table = os.fsync, pd.DataFrame.to_parquet
        write, close = pq.ParquetWriter.write_table, pq.ParquetWriter.close
        place = Path()

        def counted_fsync(descriptor: int) -> None:
            path = _path_of(descriptor)
            self._one(path, torn=True)
            self._one(path)
            fsync(descriptor)

        def placed_table(frame: pd.DataFrame, path: Any, *given: Any, **named: Any) -> None:
            nonlocal place
            place = Path(path)
            table(frame, path, *given, **named)

        def counted_write(writer: Any, *given: Any, **named: Any) -> None:
            self._one(place)
            write(writer, *given, **named)

        def counted_close(writer: Any) -> None:
            self._one(place)
            close(writer)

        os.fsync, pd.DataFrame.to_parquet = counted_fsync, placed_table
        pq.ParquetWriter.write_table, pq.ParquetWriter.close = counted_write, counted_close

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if not isinstance(path, int) and isinstance(flags, int) and flags & WRITING:
                self._one(Path(os.fsdecode(path)))
        elif event in AT:
            place = AT[event]
            folder = given[place] if place is not None and place < len(given) else -1
            path = _path_of(given[0]) if isinstance(given[0], int) else Path(os.fsdecode(given[0]))
            self._one(_path_of(folder) / path if isinstance(folder, int) and folder >= 0 else path)
        elif event == "fcntl.flock":
            self._one(_path_of(given[0]))

    def _one(self, path: Path, torn: bool = False) -> None:
        if not path.absolute().is_relative_to(self.below) or os.getpid() != self.process:
            return
        self.count += 1
        os.pwrite(self.counted, b"%8d" % self.count, 0)
        if self.count != self.last:
            return
        if torn and path.is_file():  # half of what was to be written has arrived
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def run(folder: Path, cell: Config, last: int | None = None) -> tuple[int | None, int, str]:
    """Compute the cell in a fork; return its exit status (None if it was killed), its operations and its words."""
    counts, log = folder / "operations", folder / "log"
    process = os.fork()
    if process == 0:
        _compute(folder, cell, last, counts, log)
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"{folder}: {log.read_text()}")
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    return (None if status == -signal.SIGKILL else status), int(counts.read_text()), log.read_text()


def _compute(folder: Path, cell: Config, last: int | None, counts: Path, log: Path) -> None:
    """Compute the cell and end, as a command does that has composed it."""
    status = 99
    try:
        counted = os.open(counts, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
        os.pwrite(counted, b"0", 0)
        said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        place = folder / "case"
        (place / "tmp").mkdir(parents=True, exist_ok=True)
        os.chdir(place)
        os.environ |= {"TMPDIR": str(place / "tmp"), "OVQK_CACHE_DIR": str(place / "cache")}
        os.environ |= {name: str(folder / name) for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC")}
        tempfile.tempdir = None
        Operations(place, last, counted).begin()
        try:
            print(run_cell(cell).warning or "")
            status = 0
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def tables(place: Path) -> dict[str, bytes]:
    """The tables of a case's cell, by name."""
    return {path.name: path.read_bytes() for path in place.glob("results/*/*/*/*.parquet")}


def names(place: Path) -> list[str]:
    """The files and folders of a case, without dates; Hydra's folder of each command is left out.

    So are the temporary folders of processes: W&B's service may outlive a killed command in one, and the next command
    that makes such a folder clears it (test_leftovers).
    """
    found = []
    for path in place.rglob("*"):
        parts = path.relative_to(place).parts
        if any(part.startswith(PREFIX) for part in parts):
            continue
        if ".hydra_runs" not in parts and not ("wandb" in parts and len(parts) > 2):
            found.append("/".join(parts))
    runs = [name for path in place.glob("results/wandb/offline-run-*") for name in CELL.findall(path.name)]
    staged = [path.name.partition("-")[0] for path in place.glob("results/wandb/data/*")]
    return sorted([*found, *(f"run {name}" for name in runs), *(f"staged {name}" for name in staged)])


def after_the_kill(place: Path, whole: dict[str, bytes]) -> Iterator[str]:
    """What is wrong at once: a record that is believed and should not be, or a lock that is held."""
    for path in place.glob(f"results/*/*/*/{RECORD}"):
        if read_json(path)["status"] != "done" or read_done(path.parent) is None:
            yield "the record is not whole"
        if tables(place) != whole:
            yield "a record stands beside other tables"
    for lock in [*place.glob("results/.locks/*"), *place.glob("cache/*/*.lock")]:
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"{lock.name} is held"


def main() -> None:
    """Kill the cell at each operation, and print what is wrong."""
    folder, step, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    cell = compose(*overrides)
    again = dataclasses.replace(cell, force=False)
    warm = _new(folder / "warm")
    os.environ["OVQK_CACHE_DIR"] = str(warm / "cache")
    silent = dataclasses.replace(cell.tracking, mode=TrackingMode.none)
    run_cell(dataclasses.replace(cell, tracking=silent, results_dir=str(warm / "results")))
    status, total, said = run(_new(folder / "whole"), again)
    assert (status, said) == (0, "\n"), said
    whole, named = tables(folder / "whole" / "case"), names(folder / "whole" / "case")
    assert whole
    killed = 0
    for number in itertools.count(1, step):
        case = _new(folder / f"{number}")
        if cell.force:
            shutil.copytree(folder / "whole" / "case", case / "case", symlinks=True)
        status, counted, _ = run(case, cell, number)
        if status is not None:
            break
        killed += 1
        place = case / "case"
        faults = [*after_the_kill(place, whole)]
        status, _, said = run(case, again)
        if (status, said) != (0, "\n"):
            faults.append(f"status {status}: {said}")
        if tables(place) != whole:
            faults.append("the tables differ")
        if (left := names(place)) != named:
            faults.append(f"more or fewer files: {sorted(set(left) ^ set(named))}")
        for fault in faults:
            print(f"fault at {number}: {fault}", flush=True)
        shutil.rmtree(case)
    print(f"operations {max(total, counted)} killed {killed} status {status}", flush=True)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
