"""Sweeps end to end: their files, what they print, what they survive, and where they cannot write."""

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
from ovqk.records.outcomes import Outcome, Outcomes
from ovqk.records.record import is_done, read_record
from ovqk.report import progress, terminal
from ovqk.sweep import expected_cells, launcher_hint, sweep_name

QUICK = ("task=none", "analysis=ov", "tracking=none")
FILES = sorted(path for path in (ROOT / "sweeps").glob("*.yaml") if "hydra:" in path.read_text())
COMMAND = [sys.executable, str(ROOT / "run.py")]


def outcome(status: str = "done", **keys: object) -> Outcome:
    return Outcome(status, "m", "t", "a", None, 1.0, **keys)  # type: ignore[arg-type]


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


# --- what is printed --------------------------------------------------------------------------------------------------


def test_cells_alike_in_name_are_told_apart_by_what_the_sweep_varies(cli) -> None:
    code, printed = cli("-m", *QUICK, "seed=0,1", "processing=folded,raw")
    assert code == 0 and "[1/4] mini-attn / none / ov seed=0 processing=folded  done" in printed
    assert "[4/4] mini-attn / none / ov seed=1 processing=raw  done" in printed


def test_what_remains_is_estimated_from_the_cells_that_were_computed(tmp_path, monkeypatch, capsys) -> None:
    outcomes = Outcomes(tmp_path)
    outcomes.begin("a sweep", [["seed=0"], ["seed=1"], ["seed=2"], ["seed=3"]])
    shown = progress.SweepProgress(outcomes)
    clock = shown.started
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    outcomes.add(2, outcome("cached"))
    shown.print_new()
    assert "[1/4] m / t / a seed=2  cached  1.0 s\n" in capsys.readouterr().out
    clock += 600
    outcomes.add(0, outcome())
    shown.print_new()
    assert "[2/4] m / t / a seed=0  done  1.0 s  (about 20 min left)\n" in capsys.readouterr().out
    clock += 60  # without what only the first cell pays
    outcomes.add(1, outcome("failed", error="no"))
    shown.print_new()
    printed = capsys.readouterr()
    assert "[3/4] m / t / a seed=1  failed  1.0 s  (about 60 s left)\n    no\n" in printed.out
    outcomes.add(3, outcome(warning="warning: W&B: away"))
    shown.print_new()
    printed = capsys.readouterr()
    assert "[4/4] m / t / a seed=3  done  1.0 s\n" in printed.out and "warning: W&B: away" in printed.err


def test_lines_of_cells_that_run_elsewhere_are_printed_as_they_end(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY", 0.01)
    outcomes = Outcomes(tmp_path)
    outcomes.begin("a sweep", None)
    outcomes.add(0, outcome())
    shown = progress.SweepProgress(outcomes)
    shown.watch()
    Outcomes(tmp_path).add(7, outcome())  # by another process
    deadline = time.monotonic() + 10
    while shown.ended < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    shown.stop()
    assert "[1] m / t / a  done" in capsys.readouterr().out and list(outcomes.all()) == [0, 7]


def test_a_folder_used_again_forgets_the_sweep_before(cli, tmp_path) -> None:
    cli("-m", *QUICK, "seed=0,1,2", "hydra.sweep.dir=mine")
    code, printed = cli("-m", *QUICK, "seed=0,1", "hydra.sweep.dir=mine")
    assert code == 0 and "0 done, 2 cached, 0 failed, 0 missing" in printed


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "8 s"), (89.0, "89 s"), (91.0, "2 min"), (7300.0, "2 h 2 min")])
def test_durations(seconds, text) -> None:
    assert terminal.duration(seconds) == text


def test_a_long_cell_shows_a_bar_on_a_terminal_and_a_short_one_nothing(monkeypatch) -> None:
    import io

    from rich.console import Console

    for short, shown in ((0.01, True), (60.0, False)):
        out = Console(file=io.StringIO(), force_terminal=True, width=100)
        monkeypatch.setattr(terminal, "progress_console", lambda out=out: out)
        monkeypatch.setattr(progress, "SHORT", short)
        with progress.steps_of("m / t / a", alone=True) as steps:
            for _ in steps(3, "layer"):
                time.sleep(0.15)
            time.sleep(0.15)
            for done in (5, 10):
                steps.draws(done, 1000)
                time.sleep(0.15)
        for stage in ("layer 2 of 3, then claims and nulls", "null draw 10 of at most 1,000", "m / t / a:"):
            assert (stage in out.file.getvalue()) is shown


def test_a_bar_is_gone_when_the_cell_fails(monkeypatch) -> None:
    import io
    import threading

    from rich.console import Console

    out = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(terminal, "progress_console", lambda: out)
    monkeypatch.setattr(progress, "SHORT", 0.0)
    before = threading.active_count()
    with pytest.raises(MemoryError), progress.steps_of("m", alone=True) as steps:
        for _ in steps(3, "layer"):
            time.sleep(0.1)
            raise MemoryError
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


@pytest.mark.parametrize("alone", [True, False])
def test_a_long_cell_writes_lines_where_there_is_no_terminal(monkeypatch, capsys, alone) -> None:
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    with progress.steps_of("m / t / a", alone) as steps:
        assert list(steps(3, "layer")) == [0, 1, 2]
        steps.draws(600, 1000)
    then = ", then claims and nulls\n"
    assert capsys.readouterr().err == (
        f"m / t / a: layer 1 of 3 in 0 s, about 0 s left{then}m / t / a: layer 2 of 3 in 0 s, about 0 s left{then}"
        "m / t / a: null draw 600 of at most 1,000 in 0 s, at most 0 s left\n"
    )


@pytest.mark.parametrize("claimed", [True, False])
def test_every_draw_of_the_nulls_is_counted_and_no_more_than_there_may_be(claimed) -> None:
    """With claims, and with candidates."""
    from ovqk.analyse import analyse
    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.tasks.words import load_tokenizer
    from ovqk.weights.readers import open_weights
    from ovqk.weights.types import OpenedModel

    cell = compose("model=mini-attn", "task=ioi", "nulls.draws=99", *["model.claims=null"] * (not claimed))
    checkpoint = open_checkpoint(cell.model)
    opened = OpenedModel(open_weights(checkpoint, cell.model), checkpoint.label, load_tokenizer(checkpoint))
    told: list[tuple[int, int]] = []
    found = analyse(opened, cell, draws=lambda done, most: told.append((done, most)))
    assert ("verdicts" in found.tables) == claimed
    done, most = zip(*told, strict=True)
    assert len(set(most)) == 1 and most[0] % 99 == 0 and list(done) == sorted(done) and 99 <= done[-1] <= most[0]


# --- what is survived -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_cell_without_memory_is_recorded_and_the_others_go_on(cli, tmp_path, monkeypatch, error) -> None:
    real = ovqk.cell.analyse

    def sometimes(opened, config, *more) -> object:
        if config.seed == 0:
            raise error
        return real(opened, config, *more)

    monkeypatch.setattr(ovqk.cell, "analyse", sometimes)
    code, printed = cli("-m", *QUICK, "seed=0,1")
    assert code == 1 and "1 done, 0 cached, 1 failed, 0 missing" in printed
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


def test_a_launcher_that_gives_up_is_one_message_and_the_next_run_does_the_rest(cli, tmp_path, monkeypatch) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    real = BasicLauncher.launch

    def dies(self, overrides, initial_job_idx) -> None:
        real(self, overrides[:1], initial_job_idx)
        raise RuntimeError("a worker was killed\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(BasicLauncher, "launch", dies)
        code, printed = cli("-m", *QUICK, "seed=0,1,2")
    assert code == 1 and "1 done, 0 cached, 0 failed, 2 missing" in printed and "Traceback" not in printed
    assert "missing: task=none analysis=ov tracking=none seed=2" in printed
    assert "the launcher gave up (RuntimeError: a worker was killed). Its own words: results/.hydra_runs" in printed
    (words,) = tmp_path.glob("results/.hydra_runs/*/launcher_error.txt")
    assert "and more" in words.read_text()
    code, printed = cli("-m", *QUICK, "seed=0,1,2")
    assert code == 0 and "2 done, 1 cached, 0 failed, 0 missing" in printed


def test_a_launcher_that_gives_up_after_the_last_cell_has_ended_does_no_harm(cli, monkeypatch) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    real = BasicLauncher.launch

    def dies(self, *arguments, **keys) -> None:
        real(self, *arguments, **keys)
        raise RuntimeError("late")

    monkeypatch.setattr(BasicLauncher, "launch", dies)
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


def test_a_launcher_that_is_not_installed_is_named_with_its_extra() -> None:
    from hydra.errors import MissingConfigException

    missing = MissingConfigException("Could not find 'hydra/launcher/joblib'", "hydra/launcher/joblib")
    assert launcher_hint(missing) == [
        "hydra/launcher=joblib needs an extra: pip install -c constraints.txt -e '.[parallel]'"
    ]
    assert launcher_hint(MissingConfigException("no", "model/gpt3")) == launcher_hint(ValueError("no")) == []


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
    assert " missing; results in results" in printed and "The same command computes them" in printed
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
