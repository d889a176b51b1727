"""A results disk that fills up: each cell is tried, each failure is told, and the count at the end is right."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from ovqk.records import outcomes as module
from ovqk.records.outcomes import Outcome, Outcomes

MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
"""Shell: mount a small disk in a name space of its own, and run a command."""


def test_an_outcome_that_the_disk_does_not_take_reaches_the_end_of_the_sweep(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    written, write = Outcomes(tmp_path / "sweep"), module.write_json

    def full(path: Path, content: object) -> None:
        if path.is_relative_to(tmp_path / "sweep"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    written.begin("a sweep", [["seed=0"], ["seed=1"], ["seed=2"]])
    outcome = Outcome("failed", "m", "t", "a", None, 1.0, error="the disk is full")
    written.add(0, outcome)
    monkeypatch.setattr(module, "write_json", full)
    written.add(1, outcome)
    written.add(2, outcome)
    assert list(written.all()) == [0, 1, 2]
    module.unwritten.clear()  # as in another process
    other = Outcomes(tmp_path / "sweep")
    assert list(other.all()) == [0, 1, 2] and other.all()[2] == outcome
    other.forget()
    assert list(Outcomes(tmp_path / "sweep").all()) == [0] and not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "28k", "128k"])
def test_a_sweep_on_a_full_disk_tries_every_cell_and_counts_them(tmp_path, size) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    able = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if able.returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    command = [
        sys.executable, str(ROOT / "run.py"), "-m", f"results_dir={disk}/r", "task=none", "analysis=qk", "seed=0,1,2",
        "analysis.components=0", "nulls.draws=19", "tracking=none",
    ]  # fmt: skip
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, "sh", size, str(disk), *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed and done.returncode == 1, printed
    counts = [line for line in printed.splitlines() if "missing; results in" in line]
    numbers = [int(part.split()[0]) for part in counts[0].split(";")[0].split(",")]
    assert sum(numbers) == 3 and len(counts) == 1, printed
    assert numbers[3] == (3 if size == "4k" else 0), printed  # there Hydra itself cannot write
    assert printed.count("  failed  ") == numbers[2]
