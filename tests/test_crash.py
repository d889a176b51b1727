"""A sweep that is killed again and again: at the end every cell is done once, whole, tracked once, and free."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from support import ROOT
from support.commands import compose

from ovqk.cell import run_cell
from ovqk.records.record import read_record, read_tracking

pytestmark = pytest.mark.slow
CELLS = 60  # more than are done between the kills, on a fast machine too
KILLS = 32
MARK = "OVQK_CRASH_TEST"
PATIENCE = 120.0  # seconds for a cell to begin, on a machine that does other things too
SERIAL, BESIDE = (), ("hydra/launcher=laptop", "hydra.launcher.n_jobs=2")


class Attempt:
    """A sweep in processes of its own, which are all known by a mark in their environment."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder, self.log = folder, folder / f"{time.time_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=os.environ | {MARK: str(folder), "OMP_NUM_THREADS": "1"},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def wait_for_lines(self, number: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.printed.count("\n[") < number and self.process.poll() is None:
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def kill(self, what: str, chance: random.Random) -> bool:
        """Kill the command alone, with all that belongs to it, or one process that it started (or else the command).

        Returns whether there was anything to kill.
        """
        alive = self.process.poll() is None
        found = [process for process in marked(self.folder) if what in command_of(process)]
        if what == "all":
            found = marked(self.folder)
        elif found:
            found = [chance.choice(found)]
        for process in found or [self.process.pid] * alive:
            end(process)
        return alive

    def finish(self, seconds: float) -> None:
        """Let it go on for a while, and then end the command whatever it does."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def marked(folder: Path) -> list[int]:
    """The processes of this test, orphans among them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{MARK}={folder}".encode() in environment:
            found.append(int(process.name))
    return found


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in marked(tmp_path):
        end(process)


def records(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("results/*/*/*/record.json"))


def is_complete(run: Path) -> bool:
    """Whether the log of an offline run ends with an exit without an error; a long run says how long it took there."""
    (log,) = run.glob("*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    return json.loads(lines[-1]).get("exit", {}).get("exit_code") == 0


def assert_whole(folder: Path) -> None:
    """Every record is done, its tables are as it says, nothing else lies about, and nothing is locked."""
    for cell in records(folder):
        record = read_record(cell)
        assert record is not None and record["status"] == "done"
        assert {path.stem for path in cell.glob("*.parquet")} == set(record["tables"])
        for name, rows in record["tables"].items():
            assert len(pd.read_parquet(cell / f"{name}.parquet")) == rows
        expected = {"record.json", "cell.yaml", "tracking.json"} | {f"{name}.parquet" for name in record["tables"]}
        assert {path.name for path in cell.iterdir()} <= expected
    for lock in (folder / "results" / ".locks").iterdir():
        with FileLock(lock, timeout=30):  # an orphan may look at its last cell
            pass


def test_a_sweep_killed_at_random_moments_ends_complete(folder, tiny_gpt2) -> None:
    command = [
        sys.executable, str(ROOT / "run.py"), "-m", "model=local", f"model.path={tiny_gpt2}", "task=none",
        "analysis=b03,qk", f"seed=range({CELLS // 2})", "tracking=offline",
    ]  # fmt: skip
    chance = random.Random(20)
    start_up = 8.0  # seconds until a cell begins, as last seen
    targets = ["command", "all", "command", "wandb-core"] * (KILLS * 3 // 16) + ["LokyProcess", "all"] * (KILLS // 8)
    plan = [(target, SERIAL if number < KILLS * 3 // 4 else BESIDE) for number, target in enumerate(targets)]
    assert len(plan) == KILLS
    killed = 0
    for number, (target, launcher) in enumerate(plan):
        started, done = time.monotonic(), len(records(folder))
        attempt = Attempt(folder, [*command, *launcher])
        if number % 4 == 0:  # anywhere in its life; else while it works on a cell that was not done
            time.sleep(chance.uniform(0, start_up))
        else:
            attempt.wait_for_lines(done)
            start_up = time.monotonic() - started
            time.sleep(chance.uniform(0, 1.0))
        killed += attempt.kill(target, chance)
        attempt.finish(3.0 if target in ("wandb-core", "LokyProcess") else 0.0)
    assert killed >= 30

    done = len(records(folder))
    last = Attempt(folder, command)
    last.finish(PATIENCE)
    assert last.process.returncode == 0, last.printed
    assert f"{CELLS - done} done, {done} cached, 0 failed, 0 missing" in last.printed
    assert "not tracked" not in last.printed
    assert len(records(folder)) == CELLS
    assert_whole(folder)
    (sweep,) = folder.glob("results/.sweeps/*")
    states = [read_tracking(place) for place in (*records(folder), sweep)]
    assert {state["status"] for state in states} == {"done"} and len({state["run_id"] for state in states}) == CELLS + 1
    runs = {folder / "results" / state["directory"] for state in states}
    assert runs == set(folder.glob("results/wandb/offline-run-*"))  # no half of an earlier attempt to be synced
    assert not [run for run in sorted(runs)[:: CELLS // 6] if not is_complete(run)]
    assert not list(folder.glob("results/**/*.tmp"))

    for seed in (0, CELLS // 2 - 1):
        overrides = ["model=local", f"model.path={tiny_gpt2}", "task=none", f"seed={seed}", "tracking=none"]
        quiet = run_cell(compose(*overrides, "cache=false", f"results_dir={folder / 'undisturbed'}"))
        assert quiet.folder is not None
        for table in Path(quiet.folder).glob("*.parquet"):
            killed = folder / "results" / table.relative_to(folder / "undisturbed")
            pd.testing.assert_frame_equal(pd.read_parquet(table), pd.read_parquet(killed), check_exact=True)


def test_a_forced_sweep_that_is_killed_is_completed_by_one_that_is_not_forced(folder, tiny_gpt2) -> None:
    command = [
        sys.executable, str(ROOT / "run.py"), "-m", "model=local", f"model.path={tiny_gpt2}", "task=none",
        "analysis=qk", "seed=range(4)", "tracking=none",
    ]  # fmt: skip
    first = Attempt(folder, command)
    first.finish(PATIENCE)
    assert len(records(folder)) == 4
    chance = random.Random(4)
    for _ in range(4):
        attempt = Attempt(folder, [*command, "force=true"])
        attempt.wait_for_lines(1)
        time.sleep(chance.uniform(0, 0.6))
        attempt.kill("command", chance)
        attempt.finish(0.0)
    last = Attempt(folder, command)
    last.finish(PATIENCE)
    assert "0 failed, 0 missing" in last.printed
    assert len(records(folder)) == 4
    assert_whole(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="descriptors are named in /proc")
@pytest.mark.parametrize(("step", "least", "choice"), [
    (1, 80, ("analysis=b03", "tracking=none")),
    (1, 60, ("analysis=qk", "tracking=none", "force=true")),
    (9, 12, ("analysis=qk", "tracking=offline")),
])  # fmt: skip
def test_a_cell_killed_at_each_file_operation_is_found_whole_or_not_at_all(
    tmp_path, tiny_gpt2, step, least, choice
) -> None:
    """And computing it again gives the tables of a cell that was left alone, and leaves nothing else behind."""
    command = [
        sys.executable, str(ROOT / "tests" / "support" / "kills.py"), str(tmp_path), str(step), "task=none",
        "model=local", f"model.path={tiny_gpt2}", *choice,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    *faults, last = done.stdout.splitlines()
    assert not faults
    found = re.fullmatch(r"operations (\d+) killed (\d+) status 0", last)
    assert found is not None and int(found[2]) >= least, last
