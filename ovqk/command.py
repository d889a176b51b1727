"""The command line: cells and sweeps, and the tools that go with them.

ovqk [KEY=VALUE ...]              one cell; with -m a sweep (the same as `python run.py`)
ovqk report RESULTS_DIR           the page about a results folder
ovqk track RESULTS_DIR            send to W&B what was never tracked
ovqk fetch MODEL                  a model's files, for cells without a network
ovqk plan MODEL                   a cell's cost beforehand: bytes to fetch, memory, time
ovqk dashboard RESULTS_DIR        a W&B workspace for a sweep
ovqk published                    published numbers beside ovqk's own
"""

import argparse
import atexit
import gc
import importlib
import os
import sys
from pathlib import Path

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ovqk.config.command_line import TOOLS, choices_together, config_folders, program
from ovqk.config.composing import MAIN, compose_once
from ovqk.config.hydra_errors import check_keys, mistakes, of_hydra
from ovqk.config.place import CONF
from ovqk.config.rerun import refuse_foreign_files
from ovqk.config.schema import register
from ovqk.errors import SHOWS_TRACEBACK, UserError, one_mistake, print_any_text, was_interrupted
from ovqk.interrupts import work_is_over
from ovqk.sweep import end_early, is_running, plugin_hint

gc.disable()  # until ovqk.sweep has imported the rest: searching modules that stay takes a tenth of the start-up
atexit.register(gc.freeze)  # objects that are left at the end go with the process
register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name=MAIN)
def main(config: DictConfig) -> float | None:
    """Run the composed cell, and return its objective if one is named."""
    from hydra.core.hydra_config import HydraConfig

    from ovqk.cell import run_job  # torch is imported here, after the config has been accepted

    return run_job(config, HydraConfig.get())


def run() -> None:
    """Run the command line; if it is wrong or is interrupted, say so in one message."""
    print_any_text()
    try:
        with one_mistake():
            _run()
    except (Exception, KeyboardInterrupt) as error:
        end_early(error)
        raise
    finally:
        work_is_over()


def _run() -> None:
    """Run a tool, or the command line's choice.

    Raises:
        UserError: the choice is wrong.
    """
    if len(sys.argv) > 1 and sys.argv[1] in TOOLS:
        gc.enable()
        importlib.import_module(TOOLS[sys.argv[1]].command).main(sys.argv[2:])
        return
    sys.argv[1:] = choices_together(sys.argv[1:])
    if {"-m", "--multirun"} & set(sys.argv) and {"-c", "--cfg"} & set(sys.argv):
        raise UserError("--cfg shows the choice of one cell: leave out -m, and give one value for each key.")
    _mend_hydra()  # before anything reads the command line
    compose_once()
    if "-sc" not in sys.argv:  # Hydra's shell completion, whose install= and query= are not keys
        check_keys(sys.argv[1:])
        refuse_foreign_files(sys.argv[1:])
    if {"--help", "-h"} & set(sys.argv) and Path(sys.argv[0]).name != "run.py":
        sys.argv.append(f"hydra.help.app_name={program()!r}")
    asked = os.environ.get("HYDRA_FULL_ERROR")
    if asked == "1":
        os.environ[SHOWS_TRACEBACK] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on, and this module prints one message
    try:
        main()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        folders = [*map(Path, config_folders()), CONF]
        raise UserError("\n".join([*mistakes(error, folders), *plugin_hint(error)])) from error
    except Exception as error:
        said = None if is_running() or was_interrupted(error) else of_hydra(error)
        if said is None:
            raise
        raise UserError(said) from error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ |= {} if asked is None else {"HYDRA_FULL_ERROR": asked}


def _mend_hydra() -> None:
    """Let Python 3.14 take Hydra 1.3.8's options: its argparse reads each option's help, and one is not text."""
    argparse.HelpFormatter._get_help_string = only_text  # type: ignore[method-assign, assignment]


def only_text(formatter: argparse.HelpFormatter, action: argparse.Action) -> str | None:
    """Return an option's help if it is text."""
    return action.help if isinstance(action.help, str | None) else "Install or uninstall the shell's completion."
