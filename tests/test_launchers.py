"""Hydra's launchers really at work: joblib, submitit and Ray, and what becomes of a sweep whose worker is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from support import ROOT
from support.commands import compose

from ovqk.cell import run_cell
from ovqk.records.record import is_done, read_record

pytestmark = pytest.mark.slow
LIMIT = 240  # seconds for a sweep of tiny cells, on a machine that does other things too
SEEDS = 3


class Sweep:
    """run.py -m over seeds of a tiny model, with a launcher, in a folder of its own."""

    def __init__(self, folder: Path, model: Path, launcher: str) -> None:
        self.folder, self.results, self.launcher = folder, folder / "results", launcher
        self.command = [
            sys.executable, str(ROOT / "run.py"), "-m", f"hydra/launcher={launcher}", "model=local",
            f"model.path={model}", "task=none", "tracking=none", f"seed=range({SEEDS})",
        ]  # fmt: skip
        self.environment = os.environ | {"HOME": str(folder), "PYTHONWARNINGS": "default"}
        self.environment.pop("OMP_NUM_THREADS", None)

    def start(self, *more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.command, *more], cwd=self.folder, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *more: str) -> tuple[int, str, str]:
        return self.finish(self.start(*more))

    def finish(self, process: "subprocess.Popen[str]") -> tuple[int, str, str]:
        try:
            printed, complaint = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        assert "Traceback" not in printed, printed
        return process.returncode, printed, complaint

    def records(self) -> list[dict]:
        found = [read_record(path.parent) for path in self.results.glob("*/*/*/record.json")]
        return [record for record in found if record is not None]


@pytest.fixture
def sweep(tmp_path, tiny_gpt2, request) -> Sweep:
    return Sweep(tmp_path, tiny_gpt2, request.param)


def assert_complete(sweep: Sweep, printed: str, model: Path) -> None:
    """Every cell has its line and its record, with the numbers of a cell that was computed here."""
    assert f"{SEEDS} done, 0 cached, 0 failed, 0 missing" in printed
    for number in range(1, SEEDS + 1):
        assert printed.count(f"[{number}/{SEEDS}] tiny-gpt2 / none / b03 seed=") == 1
    assert [record["status"] for record in sweep.records()] == ["done"] * SEEDS
    assert len({record["sweep"] for record in sweep.records()}) == 1
    overrides = ["model=local", f"model.path={model}", "task=none", "tracking=none"]
    here = run_cell(compose(*overrides, f"results_dir={sweep.folder / 'here'}"))
    assert here.folder is not None
    there = sweep.results / Path(here.folder).relative_to(sweep.folder / "here")
    assert is_done(there)
    for table in Path(here.folder).glob("*.parquet"):
        frames = pd.read_parquet(table), pd.read_parquet(there / table.name)
        pd.testing.assert_frame_equal(*frames, rtol=1e-6, atol=1e-9)


def kill_one(command: str, sweep: Sweep, ended: int, group: int) -> None:
    """Kill a process of the sweep whose command line holds these words, once that many cells have ended."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        time.sleep(0.01)
        if len(list(sweep.results.glob(".hydra_runs/*/outcomes/*.json"))) < ended:
            continue
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command in words and descends_from(int(process.name), group):
                    os.kill(int(process.name), signal.SIGKILL)
                    return
            except (OSError, ValueError):
                continue
    raise AssertionError(f"no process {command!r} to kill")


def descends_from(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except FileNotFoundError:  # it has ended meanwhile
            return False
        process = int(stat.rsplit(")", 1)[1].split()[1])
    return False


@pytest.mark.parametrize("sweep", ["laptop", "submitit_local", "ray_local"], indirect=True)
def test_a_sweep_on_each_launcher(sweep, tiny_gpt2) -> None:
    code, printed, complaint = sweep.run()
    assert code == 0, complaint
    assert_complete(sweep, printed, tiny_gpt2)
    assert "warning" not in complaint.lower(), complaint
    threads = {record["provenance"]["threads"] for record in sweep.records()}
    cores = len(os.sched_getaffinity(0))
    assert threads == {{"laptop": max(1, cores // 4), "ray_local": 1}.get(sweep.launcher, *threads)}


@pytest.mark.parametrize("sweep", ["laptop"], indirect=True)
def test_joblib_gives_up_when_a_worker_is_killed_and_the_same_command_does_the_rest(sweep) -> None:
    process = sweep.start("hydra.launcher.n_jobs=2")
    kill_one("LokyProcess", sweep, 1, process.pid)
    code, printed, complaint = sweep.finish(process)
    assert code == 1 and "missing: model=local" in printed and "0 failed" in printed
    assert "ovqk: the launcher gave up (TerminatedWorkerError" in complaint and "Traceback" not in complaint
    done = len([record for record in sweep.records() if record["status"] == "done"])
    code, printed, complaint = sweep.run("hydra.launcher.n_jobs=2")
    assert code == 0 and f"{SEEDS - done} done, {done} cached, 0 failed, 0 missing" in printed, complaint


@pytest.mark.parametrize("sweep", ["laptop"], indirect=True)
def test_joblibs_workers_end_with_a_command_that_is_killed(sweep) -> None:
    process = sweep.start("hydra.launcher.n_jobs=2", "seed=range(40)")
    deadline = time.monotonic() + LIMIT
    while not list(sweep.results.glob(".hydra_runs/*/outcomes/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [
        Path("/proc") / each.name
        for each in Path("/proc").glob("[0-9]*")
        if each.name != str(process.pid) and descends_from(int(each.name), process.pid)
    ]
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=LIMIT)
    time.sleep(10)
    assert not [worker for worker in workers if worker.exists() and "Z" not in (worker / "stat").read_text()]


@pytest.mark.parametrize("sweep", ["submitit_local"], indirect=True)
def test_a_job_that_is_killed_is_missing_and_the_others_are_waited_for(sweep) -> None:
    process = sweep.start()
    kill_one("submitit.core._submit", sweep, 0, process.pid)
    code, printed, complaint = sweep.finish(process)
    assert code == 1 and f"{SEEDS - 1} done, 0 cached, 0 failed, 1 missing" in printed, complaint
    assert "ovqk: the launcher gave up (UncompletedJobError" in complaint and "Traceback" not in complaint
    code, printed, complaint = sweep.run()
    assert code == 0 and f"1 done, {SEEDS - 1} cached, 0 failed, 0 missing" in printed, complaint


@pytest.mark.parametrize("sweep", ["ray_local"], indirect=True)
def test_ray_does_a_killed_cell_again_and_starts_where_the_command_was_given(sweep) -> None:
    (sweep.folder / "elsewhere").mkdir()  # Ray copies it and starts its workers in the copy
    place = f"+hydra.launcher.ray.init.runtime_env={{working_dir: {sweep.folder / 'elsewhere'}}}"
    process = sweep.start("hydra.launcher.ray.init.num_cpus=2", place)
    kill_one("ray::_run_job", sweep, 0, process.pid)
    code, printed, complaint = sweep.finish(process)
    assert code == 0 and "0 failed, 0 missing" in printed, complaint
    assert len(sweep.records()) == SEEDS


@pytest.mark.parametrize("sweep", ["ray_local"], indirect=True)
def test_ray_without_another_try_loses_the_killed_cell_alone(sweep) -> None:
    process = sweep.start("hydra.launcher.ray.init.num_cpus=1", "hydra.launcher.ray.remote.max_retries=0")
    kill_one("ray::_run_job", sweep, 0, process.pid)
    code, printed, complaint = sweep.finish(process)
    assert code == 1 and f"{SEEDS - 1} done, 0 cached, 0 failed, 1 missing" in printed, complaint
    assert "ovqk: the launcher gave up (WorkerCrashedError" in complaint and "Traceback" not in complaint


SBATCH = """#!/bin/bash
# Takes a script of job arrays as SLURM does, and runs its tasks one after the other.
cp "${@: -1}" {seen}
export SLURM_ARRAY_JOB_ID=7
last=$(grep -oP '(?<=--array=0-)[0-9]+' {seen})
(for task in $(seq 0 $last); do
    export SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$((100 + task)) SLURM_CPUS_PER_TASK=1 SLURM_NTASKS=1
    export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1
    bash {seen} >/dev/null 2>&1
done) >/dev/null 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == *=* || $1 == --unbuffered ]] && shift || shift 2; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for task in $(seq 0 9); do echo "7_$task|RUNNING|here"; done
"""


@pytest.mark.parametrize("sweep", ["cluster"], indirect=True)
def test_the_cluster_preset_asks_slurm_for_what_it_says(sweep, tiny_gpt2) -> None:
    """SLURM is played by three scripts; submitit's side, the script for sbatch and the jobs are real."""
    seen, folder = sweep.folder / "seen.sh", sweep.folder / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (folder / name).write_text(text.replace("{seen}", str(seen)))
        (folder / name).chmod(0o755)
    sweep.environment["PATH"] = f"{folder}:{sweep.environment['PATH']}"
    sweep.environment.pop("SLURM_JOB_ID", None)
    code, printed, complaint = sweep.run("hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1")
    assert code == 0, (printed, complaint)
    assert_complete(sweep, printed, tiny_gpt2)
    script = seen.read_text()
    for line in (
        "#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=1", "#SBATCH --mem=8GB", "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=120", f"#SBATCH --array=0-{SEEDS - 1}%{SEEDS}", "#SBATCH --job-name=ovqk",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
    ):  # fmt: skip
        assert line in script, script
    assert {record["provenance"]["threads"] for record in sweep.records()} == {1}


def test_without_slurm_the_cluster_preset_is_one_message(tmp_path, tiny_gpt2) -> None:
    sweep = Sweep(tmp_path, tiny_gpt2, "cluster")
    sweep.environment["PATH"] = str(tmp_path)
    code, printed, complaint = sweep.run()
    assert code == 1 and f"0 done, 0 cached, 0 failed, {SEEDS} missing" in printed
    assert "are you indeed on a slurm cluster" in complaint and "Traceback" not in complaint
