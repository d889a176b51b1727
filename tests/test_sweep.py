"""Sweeps: files that name one, what a sweep survives, and names that cannot lead out of the results folder."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from support import ROOT
from support.commands import compose
from support.models import BUNDLED

import ovqk
import ovqk.cell
from ovqk.errors import UserError
from ovqk.records import record
from ovqk.records.record import is_done, read_record
from ovqk.report import terminal
from ovqk.sweep import expected_cells, plugin_hint, sweep_name

QUICK = ("task=none", "analysis=ov", "tracking=none")
FILES = sorted(path for path in (ROOT / "sweeps").glob("*.yaml") if "hydra:" in path.read_text())
COMMAND = [sys.executable, str(ROOT / "run.py")]


# --- sweep files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_file_expands_to_cells_that_resolve(path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    text = path.read_text()
    stated = re.search(r"^# (\w+) cells", text, flags=re.MULTILINE)[1]
    assert f"python run.py -cd sweeps -cn {path.stem}" in text and "?" in text
    with initialize_config_dir(str(path.parent), version_base="1.3"):
        composed = hydra_compose(
            path.stem, overrides=[f"hydra.searchpath=[file://{ROOT / 'conf'}]"], return_hydra_config=True
        )
    cells = expected_cells(composed)
    assert len(cells) == ({"Six": 6, "Nine": 9}.get(stated) or int(stated))
    assert len({tuple(cell) for cell in cells}) == len(cells) and composed.sweep == path.stem
    seen: set[str] = set()
    for cell in cells:  # each choice once: to compose every cell takes long
        if not seen.issuperset(cell):
            assert compose(*cell).nulls.draws == 999
            seen.update(cell)


# --- what is survived -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),  # another process has taken the GPU's
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_cell_without_memory_is_recorded_and_the_others_go_on(cli, tmp_path, monkeypatch, error) -> None:
    real, made, alive = ovqk.cell.analyse, [], []

    def sometimes(opened, config, *more) -> object:
        if config.seed == 0:
            large = torch.zeros(3)
            made.append(weakref.ref(large))
            raise type(error)(str(error))
        return real(opened, config, *more)

    monkeypatch.setattr(ovqk.cell, "analyse", sometimes)
    monkeypatch.setattr(ovqk.cell, "give_all_back", lambda: alive.append(made[-1]() is not None))
    code, printed = cli("-m", *QUICK, "seed=0,1")
    assert code == 1 and "1 done, 0 cached, 1 failed, 0 missing" in printed
    assert alive == [False]  # what the cell held was let go before memory was given back
    assert printed.count(f"{type(error).__name__}: {error}") == 1
    assert "failed: mini-attn / none / ov seed=0 (its message is above)\n" in printed
    records = [read_record(path.parent) for path in tmp_path.glob("results/*/*/*/record.json")]
    (failed,) = [found for found in records if found["status"] == "failed"]
    assert str(error) in failed["error"] and "sometimes" in failed["traceback"]
    assert str(ROOT) not in failed["traceback"]
    code, printed = cli(*QUICK, "seed=0")
    assert code == 1 and f"ovqk: {type(error).__name__}: {error}" in printed and "Traceback" not in printed
    monkeypatch.setattr(ovqk.cell, "analyse", real)
    code, printed = cli("-m", *QUICK, "seed=0,1")
    assert code == 0 and "1 done, 1 cached" in printed


def basic_launcher() -> type:
    """Hydra's launcher, after Hydra has looked for its plugins: it makes the class anew when it does."""
    from hydra.core.plugins import Plugins

    Plugins.instance()
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    return BasicLauncher


def test_a_launcher_that_gives_up_is_one_message_and_the_next_run_does_the_rest(cli, tmp_path, monkeypatch) -> None:
    real = basic_launcher().launch

    def dies(self, overrides, initial_job_idx) -> None:
        real(self, overrides[:1], initial_job_idx)
        raise RuntimeError("a worker was killed\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(basic_launcher(), "launch", dies)
        code, printed = cli("-m", *QUICK, "seed=0,1,2")
    assert code == 1 and "1 done, 0 cached, 0 failed, 2 missing" in printed and "Traceback" not in printed
    assert "missing: task=none analysis=ov tracking=none seed=2" in printed
    assert "the launcher gave up (RuntimeError: a worker was killed). Its own words: results/.hydra_runs" in printed
    (words,) = tmp_path.glob("results/.hydra_runs/*/launcher_error.txt")
    assert "and more" in words.read_text()
    code, printed = cli("-m", *QUICK, "seed=0,1,2")
    assert code == 0 and "2 done, 1 cached, 0 failed, 0 missing" in printed


def test_a_launcher_that_gives_up_after_the_last_cell_has_ended_does_no_harm(cli, monkeypatch) -> None:
    real = basic_launcher().launch

    def dies(self, *arguments, **keys) -> None:
        real(self, *arguments, **keys)
        raise RuntimeError("late")

    monkeypatch.setattr(basic_launcher(), "launch", dies)
    code, printed = cli("-m", *QUICK)
    assert code == 0 and "1 done" in printed and "late" not in printed


def test_an_end_that_cannot_be_told_is_no_success(cli, monkeypatch) -> None:
    def breaks(*arguments: object) -> None:
        raise ValueError("a damaged table")

    monkeypatch.setattr(terminal, "print_sweep", breaks)
    code, printed = cli("-m", *QUICK)
    assert code == 1 and "the end of the sweep: ValueError: a damaged table" in printed


def test_a_forced_cell_that_fails_leaves_the_record_that_was_done(cli, tmp_path, monkeypatch) -> None:
    cli(*QUICK)
    (path,) = tmp_path.glob("results/*/*/*/record.json")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def full(self, *arguments: object, **keys: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    code, printed = cli(*QUICK, "force=true")
    assert code == 1 and "Traceback" not in printed
    assert "ovqk: results_dir=" in printed and "(No space left on device). Earlier results" in printed
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_cell_that_is_cut_off_while_its_tables_change_is_not_done(cli, tmp_path, monkeypatch) -> None:
    cli(*QUICK)
    (path,) = tmp_path.glob("results/*/*/*/record.json")

    class Killed(BaseException):
        """What no handler catches."""

    def dies(folder: Path, content: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_json", dies)
        with pytest.raises(Killed):
            cli(*QUICK, "force=true")
    assert not is_done(path.parent) and list(path.parent.glob("*.parquet"))
    with pytest.raises(FileNotFoundError):
        ovqk.load_results(tmp_path / "results")
    code, _ = cli(*QUICK)
    assert code == 0 and is_done(path.parent)


def test_what_killed_processes_left_is_never_read_and_removed(cli, tmp_path) -> None:
    cli(*QUICK)
    (path,) = tmp_path.glob("results/*/*/*/record.json")
    torn = [path.parent / f".{name}.4194304.tmp" for name in ("heads.parquet", "record.json", "cell.yaml")]
    for file in torn:
        file.write_bytes(b"PAR1 half")
    assert len(ovqk.load_results(tmp_path / "results")["heads"]) == 32
    cli(*QUICK, "force=true")
    assert not any(file.exists() for file in torn)
    assert not [file for file in tmp_path.rglob("*.tmp") if "results" in file.parts]


def test_a_forced_cell_is_tracked_anew(cli, tmp_path) -> None:
    cli(*QUICK)
    (path,) = tmp_path.glob("results/*/*/*/record.json")
    record.write_tracking(path.parent, {"status": "done", "run_id": "of the record before"})
    cli(*QUICK, "force=true")
    assert record.read_tracking(path.parent) == {"status": "pending"}


def test_the_peak_of_memory_is_of_the_cell_and_not_of_those_before() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux forgets a peak")
    large = torch.ones(120_000_000)
    peak = record.peak_memory()
    del large
    record.forget_peak_memory()
    assert peak - record.peak_memory() > 200_000_000
    before = record.peak_memory()
    large = torch.ones(60_000_000)
    assert record.peak_memory() - before > 200_000_000
    del large


def test_a_file_system_without_locks_is_one_message(cli, tmp_path, monkeypatch) -> None:
    def missing(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    code, printed = cli(*QUICK)
    assert code == 1 and "results_dir=results, cell " in printed and "its file system has no file locks" in printed
    assert not list(tmp_path.glob("results/*/*/*"))


def test_a_launcher_or_a_sweeper_that_is_not_installed_is_named_with_what_installs_it() -> None:
    from hydra.errors import MissingConfigException

    missing = MissingConfigException("Could not find 'hydra/launcher/joblib'", "hydra/launcher/joblib")
    assert plugin_hint(missing) == [
        "hydra/launcher=joblib needs an extra: pip install -c constraints.txt -e '.[parallel]'"
    ]
    missing = MissingConfigException("Could not find 'hydra/sweeper/optuna'", "hydra/sweeper/optuna")
    assert plugin_hint(missing) == ["hydra/sweeper=optuna is not installed: pip install hydra-optuna-sweeper"]
    assert plugin_hint(MissingConfigException("no", "model/gpt3")) == plugin_hint(ValueError("no")) == []


def test_an_unknown_wandb_mode_is_refused_before_the_first_cell(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    code, printed = cli("-m", "seed=0,1")
    assert code == 1 and printed == "ovqk: WANDB_MODE=onlin: allowed: online, offline, dryrun, disabled.\n"
    assert not list(tmp_path.rglob("*.json"))


def test_a_sweep_without_a_name_is_called_by_what_it_computes() -> None:
    def name(*overrides: str, **params: str) -> str:
        return sweep_name(
            OmegaConf.create({"hydra": {"overrides": {"task": list(overrides)}, "sweeper": {"params": params}}})
        )

    call = ("model=a,b", "task=ioi", "+nulls.draws=9")
    assert name(*call) == " ".join(call)
    how = ("results_dir=r", "tracking=none", "tracking.project=p", "cache=off", "force=true", "device=cuda", "sweep=x")
    assert name(*call, *how) == name(*call)  # how it is run makes no other sweep
    assert name("task=sva", task="ioi,sva", model="a") == "task=sva model=a"
    assert name() == "one cell"
    long = [name(f"model={letter * 500}") for letter in "ab"]
    assert len(set(long)) == 2 and all(len(each) <= 120 for each in long)


def test_an_unusable_sweep_folder_is_one_message(cli, tmp_path) -> None:
    (tmp_path / "taken").write_text("mine")
    code, printed = cli("-m", *QUICK, "hydra.sweep.dir=taken/here")
    assert code == 1 and "Not a directory" in printed and "Traceback" not in printed


def test_a_hub_that_never_answers_fails_its_cell_alone(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are accepted by the system and never read
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        started = time.monotonic()
        done = subprocess.run(
            [*COMMAND, "-m", "model=gpt2,mini-attn", *QUICK, "hub_timeout=2"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 60
    assert "1 done, 0 cached, 1 failed, 0 missing" in done.stdout and "hub_timeout" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_two_sweeps_over_one_results_folder_share_the_work(tmp_path, tiny_gpt2) -> None:
    command = [*COMMAND, "-m", "model=local", f"model.path={tiny_gpt2}", *QUICK, "seed=range(12)"]
    started = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    done = [int(text.split(" done, ")[0].split()[-1]) for text in printed]
    assert sum(done) == 12
    for number, text in zip(done, printed, strict=True):
        assert f"{number} done, {12 - number} cached, 0 failed, 0 missing" in text
    assert len(list(tmp_path.glob("results/.hydra_runs/*/sweep.json"))) == 2
    assert len(list(tmp_path.glob("results/*/*/*/record.json"))) == 12


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_with_what_is_done_and_a_status_of_its_own(tmp_path) -> None:
    command = [*COMMAND, "-m", *QUICK, "seed=range(20)"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("20 cells")
    assert process.stdout.readline().startswith("[1/20]")
    os.killpg(process.pid, signal.SIGINT)
    printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    told = " ".join(printed.split())  # lines wrap at 80 columns
    assert " missing; results in results" in told and "stopped by you, or never started. The same" in told
    assert "ovqk: interrupted" in complaint and "Traceback" not in complaint


# --- where nothing can be written -------------------------------------------------------------------------------------

HOSTILE = ("../up", "../../up", "/tmp/up", "a/b", "a b", "a=b", "ü", "..", ".hidden", "x" * 101, "", "a\nb", "wandb")


@pytest.mark.parametrize(
    ("group", "name"),
    [("model", name) for name in HOSTILE] + [(group, name) for group in ("task", "analysis") for name in HOSTILE[:3]],
    ids=ascii,
)
def test_a_name_in_a_config_cannot_lead_out_of_the_results_folder(cli, tmp_path, group, name) -> None:
    inside = tmp_path / "deep" / "er"
    (inside / "mine" / group).mkdir(parents=True)
    content = {
        "model": {"name": name, "source": "local", "path": str(BUNDLED)},
        "task": {"name": name, "title": "t"},
        "analysis": {"name": name, "circuits": ["ov"]},
    }
    (inside / "mine" / group / "hostile.yaml").write_text(json.dumps(content[group]))  # JSON is YAML
    before = sorted(tmp_path.rglob("*"))
    arguments = [f"{key}={value}" for key, value in (("task", "none"), ("analysis", "ov")) if key != group]
    cli.folder = inside
    code, printed = cli("--config-dir", str(inside / "mine"), f"{group}=hostile", *arguments, "tracking=none")
    assert code == 1 and f"{group}.name={name if name == 'wandb' else repr(name)}" in printed, printed
    assert "Traceback" not in printed
    written = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(
        path.is_relative_to(inside / "results" / ".hydra_runs") or path == inside / "results" for path in written
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=pythia-70m-deduped", "model.checkpoints='../{checkpoint}'", "model.checkpoint=1"], "model.name="),
        (["model=gpt2", "model.revision=../../../up"], "model.revision='../../../up'"),
        (["model=gpt2", "model.revision=/up"], "model.revision='/up'"),
        (["model=gpt2", "model.repo=../up"], "model.repo='../up': must be OWNER/NAME"),
        (["model=gpt2", "model.repo=a/b/c"], "model.repo='a/b/c': must be OWNER/NAME"),
    ],
)
def test_no_other_key_makes_a_path_either(overrides, message) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        compose(*overrides)


def test_branches_tags_and_commits_of_the_hub_are_revisions() -> None:
    for revision in ("main", "step1000", "refs/pr/1", "v1.0", "0" * 40):
        assert compose("model=gpt2", f"model.revision='{revision}'").model.revision == revision


def test_a_very_long_override_is_one_message(cli, tmp_path) -> None:
    for override in (f"model.path={'x' * 5000}", f"results_dir={'x' * 5000}", f"model.name={'x' * 5000}"):
        for sweep in ((), ("-m",)):
            code, printed = cli(*sweep, "model=local", "model.path=nowhere", override, *QUICK)
            assert code == 1 and "Traceback" not in printed, printed
            assert sum(len(path.name) for path in tmp_path.rglob("*")) < 1000


ODD = ["a b=c,d", "ü ☃", 'it\'s "so"', "a{b}[c]$HOME", "${x}", "back\\slash#%", "-m"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_odd_results_folder_is_used_as_it_is_typed(cli, tmp_path, name) -> None:
    from hydra.core.override_parser.types import Quote, QuotedString

    typed = QuotedString(name.replace("${", "\\${"), Quote.single).with_quotes()
    code, printed = cli("-m", *QUICK, f"results_dir={typed}", "seed=0,1")
    assert code == 0 and "2 done, 0 cached, 0 failed, 0 missing" in printed
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(list((tmp_path / name).glob("mini-attn/none/*/record.json"))) == 2


def test_nothing_is_left_locked(cli, tmp_path) -> None:
    cli("-m", *QUICK, "seed=0,1")
    locks = list((tmp_path / "results" / ".locks").iterdir())
    assert len(locks) == 2
    for path in locks:
        with FileLock(path, timeout=0):
            pass
