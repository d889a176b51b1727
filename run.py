"""Compute one cell, or with -m a sweep of them:  python run.py -m model=gpt2,gpt2-medium task=ioi,sva"""

# ruff: noqa: E402 (what is imported below takes a moment, in which Ctrl-C is one message too)
import atexit
import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    """End the command at Ctrl-C while it imports, when nothing was begun."""
    os.write(2, b"ovqk: interrupted.\n")
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ovqk.config.mistakes import check_keys, mistakes
from ovqk.config.rerun import refuse_foreign_files
from ovqk.config.schema import register
from ovqk.errors import UserError, one_message, print_any_text, was_interrupted
from ovqk.sweep import end_early, launcher_hint

gc.disable()  # until ovqk.sweep has imported the rest: to look for garbage in what stays takes a tenth of the start
atexit.register(gc.freeze)  # and what is there at the end goes with the process
register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Run the composed cell."""
    from hydra.core.hydra_config import HydraConfig

    from ovqk.cell import run_job  # torch is imported here, after the config has been accepted

    run_job(config, HydraConfig.get())


def run() -> None:
    """Run the command line, and say in one message what is wrong with it or what broke it off."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    print_any_text()
    try:
        with one_message():
            run_choice()
    except (Exception, KeyboardInterrupt) as error:
        end_early(error)
        raise


def run_choice() -> None:
    """Run the command line's choice.

    Raises:
        UserError: the choice is mistaken.
    """
    if "-sc" not in sys.argv:  # Hydra's shell completion, whose install= and query= are no keys
        check_keys(sys.argv[1:])
        refuse_foreign_files(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, and a config's mistake is one message here
    try:
        main()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        folders = [Path(a) for a in sys.argv[1:] if Path(a).is_dir()] + [Path(__file__).parent / "conf"]
        raise UserError("\n".join([*mistakes(error, folders), *launcher_hint(error)])) from None


if __name__ == "__main__":
    run()
