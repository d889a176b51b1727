"""Cells composed from overrides, and run.py in the process of a test."""

import copy
import logging
import runpy
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig

from ovqk.config.schema import Config, register
from ovqk.interrupts import forget
from support import ROOT

register()


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def compose(*overrides: str) -> Config:
    """The resolved cell that these overrides compose; Hydra, which is slow, is asked once for the same ones."""
    from ovqk.config.resolve import resolve

    return resolve(copy.deepcopy(_composed(overrides)))


def computed(tmp_path: Path, *overrides: str) -> tuple[Path, dict, dict[str, pd.DataFrame]]:
    """A cell's folder, record and tables, computed in this process."""
    from ovqk.cell import run_cell
    from ovqk.records.record import read_record

    outcome = run_cell(compose(*overrides, "tracking=none", f"results_dir={tmp_path / 'results'}"))
    folder = Path(outcome.folder)
    return folder, read_record(folder), {path.stem: pd.read_parquet(path) for path in folder.glob("*.parquet")}


class CLI:
    """run.py in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.capfd, self.monkeypatch, self.folder = capfd, monkeypatch, folder

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status and everything printed."""
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        self.capfd.readouterr()
        handlers, level = logging.root.handlers[:], logging.root.level
        code = 0
        try:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            forget()
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers[:] = handlers  # Hydra's own write to what is captured here, which ends with the test
        logging.root.setLevel(level)
        printed = self.capfd.readouterr()
        return code, printed.out + printed.err
