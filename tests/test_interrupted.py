"""Ctrl-C is `interrupted.` and status 130, at whatever moment, and whatever a library makes of it."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from support import ROOT

import ovqk.cell
from ovqk.errors import UserError, was_interrupted

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


@pytest.mark.slow
def test_an_interrupt_at_any_moment(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *QUICK, "force=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
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
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            continue  # it had ended
        stopped += 1
        assert (process.returncode, errors) == (130, "ovqk: interrupted.\n")
    assert stopped >= 3
