"""What killed processes leave is removed by whoever comes next, and what living ones use is not."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from support import ROOT
from support.commands import compose

from ovqk import scratch
from ovqk.cell import run_cell

KEEP = "from ovqk.scratch import scratch_folder; print(scratch_folder(), flush=True); input()"


def keeper(temporary: Path) -> "tuple[subprocess.Popen[str], Path]":
    """A process that has a temporary folder of its own, and lives until it is killed or told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_temporary_folder_outlives_its_process_only_until_the_next(tmp_path) -> None:
    killed, left = keeper(tmp_path)
    (left / "file").touch()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.is_dir()
    living, used = keeper(tmp_path)
    other, _ = keeper(tmp_path)
    assert not left.exists() and used.is_dir()
    for process in (living, other):
        process.communicate("\n", timeout=60)
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    young = tmp_path / f"{scratch.PREFIX}young"
    young.mkdir()
    old = tmp_path / f"{scratch.PREFIX}old"
    old.mkdir()
    os.utime(old, (1, 1))
    (tmp_path / f"{scratch.PREFIX}link").symlink_to(young)
    scratch.clear_abandoned()
    assert young.exists() and not old.exists() and (tmp_path / f"{scratch.PREFIX}link").is_symlink()


def test_half_written_entries_of_the_cache_are_removed(tmp_path) -> None:
    folder = tmp_path / "structure"
    names = {name: folder / f".{name * 32}.4194304.tmp" for name in "ab"}
    for path in names.values():
        path.mkdir(parents=True)
        (path / "heads.parquet").touch()
    (folder / ".notes.tmp").mkdir()
    with FileLock(folder / f".{'b' * 32}.lock"):
        run_cell(compose(
            "task=none", "analysis=qk", "analysis.components=0", "tracking=none", f"cache_dir={tmp_path}",
            f"results_dir={tmp_path / 'results'}",
        ))  # fmt: skip
    assert not names["a"].exists() and names["b"].exists() and (folder / ".notes.tmp").exists()


@pytest.mark.slow
def test_a_killed_command_with_wandb_leaves_nothing_that_stays(tmp_path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [
        sys.executable, str(ROOT / "run.py"), "-m", "task=none", "analysis=qk", "analysis.components=0",
        "tracking=offline", "nulls.draws=19",
    ]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "seed=range(60)"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("results/*/*/*/tracking.json")):
        assert process.poll() is None
    process.kill()
    process.wait()
    left = list(temporary.iterdir())
    subprocess.run([*command, "seed=0"], cwd=tmp_path, env=environment, capture_output=True, check=True, timeout=120)
    assert left and not list(temporary.iterdir())
    states = [json.loads(path.read_text()) for path in tmp_path.glob("results/*/*/*/tracking.json")]
    assert "done" in {state["status"] for state in states}
