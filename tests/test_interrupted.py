"""Ctrl-C is `interrupted.` and status 130, at whatever moment, and whatever a library makes of it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from support import ROOT
from support.commands import compose

import ovqk.cell
from ovqk import interrupts
from ovqk.config.command_line import TOOLS
from ovqk.errors import UserError, one_message, was_interrupted
from ovqk.report.progress import steps_of

QUICK = ("task=none", "analysis=qk", "analysis.components=0", "tracking=none")


def wrapped(kind: type[Exception]) -> Exception:
    """An error that a library raised for an interrupt."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stopped:
            raise kind("an odd message") from stopped
    except kind as error:
        return error


def test_an_interrupt_is_known_by_its_causes() -> None:
    assert was_interrupted(KeyboardInterrupt()) and was_interrupted(wrapped(ValueError))
    assert not was_interrupted(ValueError("x"))
    turning = ValueError("x")
    turning.__cause__ = OSError()
    turning.__cause__.__cause__ = turning
    assert not was_interrupted(turning)


@pytest.mark.parametrize("kind", [ConfigCompositionException, UserError, RuntimeError])
def test_an_interrupt_while_hydra_composes(cli, monkeypatch, kind) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise wrapped(kind)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", interrupted)
    assert cli(*QUICK) == (130, "ovqk: interrupted.\n")


def test_an_interrupt_in_a_cell_of_a_sweep_stops_the_sweep(cli, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise wrapped(UserError)

    monkeypatch.setattr(ovqk.cell, "open_checkpoint", interrupted)
    code, printed = cli("-m", *QUICK, "seed=0,1")
    assert code == 130 and printed.endswith("ovqk: interrupted.\n") and "0 failed, 2 missing" in printed


@pytest.fixture
def remembering() -> Iterator[None]:
    """This process as a command whose imports are over."""
    interrupts.stop_while_importing()
    interrupts.importing_is_over()
    yield
    interrupts.forget()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def swallowed() -> None:
    """Ctrl-C, of which a library makes nothing."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_is_remembered_if_a_library_makes_another_error_of_it(remembering, capsys) -> None:
    assert not was_interrupted(AttributeError("x"))
    swallowed()
    with pytest.raises(SystemExit) as ended, one_message():
        raise AttributeError("module 'numpy' has no attribute 'matrix'")
    assert ended.value.code == 130 and capsys.readouterr().err == "ovqk: interrupted.\n"


def test_an_interrupt_that_a_library_swallowed_ends_the_cell_at_its_next_step(remembering) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), steps_of("a cell", False) as steps:
        for index in steps(4, "layer"):
            done.append(index)
            if index == 1:
                swallowed()
    assert done == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        ovqk.cell.run_cell(compose(*QUICK))


DESTRUCTORS = """
import os, signal
from ovqk import interrupts
class Interrupted:
    def __del__(self): os.kill(os.getpid(), signal.SIGINT)
class Broken:
    def __del__(self): raise ValueError("a defect")
interrupts.stop_while_importing()
interrupts.importing_is_over()
Interrupted(), Broken()
print(interrupts.remembered())
"""


def test_an_interrupt_inside_a_destructor_is_remembered_without_a_traceback() -> None:
    command = [sys.executable, "-c", DESTRUCTORS]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "True\n" and "KeyboardInterrupt" not in done.stderr and "a defect" in done.stderr


def test_an_interrupt_that_is_sent_on_counts_once_and_a_later_one_ends_the_command(remembering, monkeypatch) -> None:
    swallowed()
    signal.raise_signal(signal.SIGINT)
    ended = []
    monkeypatch.setattr(interrupts, "_stop", lambda *_: ended.append(130))
    monkeypatch.setattr(interrupts, "AGAIN", -1.0)
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_a_program_that_imports_ovqk_keeps_its_own_meaning_of_an_interrupt(monkeypatch) -> None:
    for start, follow, ours in (
        (["python", "-m", "ovqk.report"], ["results"], True), (["python", "-X", "dev", "-m", "ovqk"], [], True),
        (["python", "-movqk.plan"], ["gpt2"], True), (["python", "-m", "mine"], ["-m", "ovqk"], False),
        (["python", "-m", "ovqk_mine"], [], False),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "orig_argv", [*start, *follow])
        monkeypatch.setattr(sys, "argv", ["-m", *follow])
        assert interrupts.is_command() is ours, start
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert not interrupts.is_command()
    interrupts.importing_is_over()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


INTERRUPTED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
raise AttributeError("module 'numpy' has no attribute 'matrix'")
"""
ARGUMENTS = {"report": ["results", "--no-figures"], "plan": ["mini-attn"], "fetch": ["mini-attn"], "published": []}


@pytest.mark.parametrize("name", ["run.py", "ovqk", "ovqk report", *TOOLS])
def test_an_interrupt_inside_an_import_that_swallows_it(tmp_path, name) -> None:
    (tmp_path / "numpy.py").write_text(INTERRUPTED_IMPORT)
    start = {"run.py": [str(ROOT / "run.py"), *QUICK], "ovqk": ["-m", "ovqk", *QUICK]}
    start["ovqk report"] = ["-m", "ovqk", "report", str(tmp_path)]
    if name in TOOLS:
        start[name] = ["-m", TOOLS[name].module, *ARGUMENTS.get(name, ["."])]
    done = subprocess.run(
        [sys.executable, *start[name]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "ovqk: interrupted.\n")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["numpy.py"]


def test_an_interrupt_in_a_text_of_code_ends_with_the_status_too(tmp_path) -> None:
    """Python marks an interrupt that leaves exec(), and would end by the signal after whatever status."""
    (tmp_path / "tool.py").write_text(
        "from ovqk.errors import one_message\n"
        "from ovqk.interrupts import stop_while_importing\n"
        "stop_while_importing()\n"
        "with one_message():\n"
        "    exec('import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "tool"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "ovqk: interrupted.\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.py", "report", "plan"])
def test_an_interrupt_at_any_moment(tmp_path, results, name) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *QUICK, "force=true"]
    if name != "run.py":
        command = [sys.executable, "-m", TOOLS[name].module, *ARGUMENTS[name]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    whole = time.monotonic() - started
    chance = random.Random(9)
    stopped = 0
    for _ in range(6):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(chance.uniform(0.25, whole))
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            continue  # it had ended
        stopped += 1
        assert (process.returncode, errors) == (130, "ovqk: interrupted.\n"), printed
    assert stopped >= 3
