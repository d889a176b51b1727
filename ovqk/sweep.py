"""The start and the end of a sweep: which cells to expect, and what became of them.

Hydra's launchers run the cells, in this process, in others or on other machines. A cell that fails records it and
returns; where the system kills one, the launcher gives up, and the end is told here all the same.
"""

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

if TYPE_CHECKING:
    from ovqk.progress import SweepProgress

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended
LAUNCHER_ERROR = "launcher_error.txt"
EXTRAS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
"""Hydra's launchers that are packages of their own, and ovqk's extras that install them."""


class RunningSweep:
    """The sweep of this process, from its start to its end."""

    def __init__(self, folder: Path, results_dir: Path, progress: "SweepProgress") -> None:
        self.folder, self.results_dir, self.progress = folder, results_dir, progress

    def end(self) -> int:
        """Print the comparison and the count; returns the exit status."""
        from ovqk import console

        self.progress.stop()
        outcomes, expected = self.progress.outcomes.all(), self.progress.expected
        console.print_sweep(outcomes, expected, self.progress.details, self.results_dir)
        finished = [outcome for outcome in outcomes.values() if outcome.status != "failed"]
        return int(len(finished) < max(len(expected or ()), len(outcomes)))


running: RunningSweep | None = None
"""Set in the process that was started, and in no worker."""


class SweepCallback(Callback):
    """Hydra calls this around a run or a sweep; the exceptions of a callback it only warns of, so SystemExit it is."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse an unusable results folder before Hydra makes folders in it."""
        _check_results_dir(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same, note which cells the overrides expand to, and look out for those that end.

        Raises:
            SystemExit: the results folder cannot be used.
        """
        global running
        _check_results_dir(config)
        from ovqk.cell import runs_here
        from ovqk.outcomes import Outcomes
        from ovqk.progress import SweepProgress

        folder = _settle_sweep_dir(config)
        outcomes = Outcomes(folder)
        try:
            outcomes.begin(expected_cells(config))
        except OSError as error:
            raise SystemExit(f"ovqk: results_dir={config.results_dir}: {error.strerror or error}") from None
        running = RunningSweep(folder, Path(config.results_dir), SweepProgress(outcomes))
        cells = running.progress.expected
        if cells is not None:  # Hydra composes each of them before the first begins
            print(f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}", flush=True)
        if not runs_here(config.hydra):
            _prepare_workers()
            running.progress.watch()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Print the line of a cell that ran in this process."""
        if running is not None:
            running.progress.print_new()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison and the count.

        Raises:
            SystemExit: (status 1) where a cell failed or is missing.
        """
        global running
        sweep, running = running, None
        assert sweep is not None
        try:
            status = sweep.end()
        except Exception as error:
            raise SystemExit(f"ovqk: the end of the sweep: {type(error).__name__}: {error}") from error
        if status:
            raise SystemExit(status)


def end_early(error: BaseException) -> None:
    """End what `error` broke off, with one message: a sweep whose launcher gave up, or anything the user stopped.

    Returns where there is nothing to say but the error itself.

    Raises:
        SystemExit: with the exit status.
    """
    global running
    sweep, running = running, None
    stopped = isinstance(error, KeyboardInterrupt)
    if sweep is None:
        if stopped:
            raise SystemExit(_said("interrupted.", INTERRUPTED)) from None
        return
    if not stopped:
        _wait_for_the_others(error)
    status = sweep.end()
    if stopped:
        raise SystemExit(_said("interrupted; cells that a cluster has taken go on there.", INTERRUPTED)) from None
    if status == 0:  # it gave up at a cell that had ended
        raise SystemExit(0) from None
    words = sweep.folder / LAUNCHER_ERROR
    with words.open("w", encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    first = (str(error).strip().splitlines() or [""])[0]
    told = f"the launcher gave up ({type(error).__name__}: {first}). Its own words: {os.path.relpath(words)}"
    raise SystemExit(_said(told, 1)) from None


def launcher_hint(error: BaseException) -> list[str]:
    """What to install, where the launcher that was asked for is not there."""
    launcher = (getattr(error, "missing_cfg_file", None) or "").removeprefix("hydra/launcher/")
    if launcher not in EXTRAS:
        return []
    return [f"hydra/launcher={launcher} needs an extra: pip install -c constraints.txt -e '.[{EXTRAS[launcher]}]'"]


def _said(message: str, status: int) -> int:
    print(f"ovqk: {message}", file=sys.stderr)
    return status


def _wait_for_the_others(error: BaseException) -> None:
    """Wait for the cells that still run or wait in a queue where the launcher gave up at one that was killed.

    Only the launcher knows them: submitit's jobs and Ray's references are in the frame that raised. Joblib's workers
    end with it.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name != "launch":
            continue
        for job in frame.f_locals.get("jobs", ()):
            job.wait()
        references = frame.f_locals.get("runs", ())
        if references and "ray" in frame.f_globals:
            frame.f_globals["ray"].wait(list(references), num_returns=len(references))


def expected_cells(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each cell that the sweep's overrides expand to; None for a sweeper that decides as it goes."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides(parameters + list(config.hydra.overrides.task))
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _settle_sweep_dir(config: DictConfig) -> Path:
    """The sweep's folder as one absolute path, for workers that start in another folder."""
    from hydra.core.override_parser.types import Quote, QuotedString

    folder = Path(config.hydra.sweep.dir).absolute()
    literal = str(folder).replace("${", "\\${")
    config.hydra.sweep.dir = literal
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir={QuotedString(literal, Quote.single).with_quotes()}")
    return folder


def _prepare_workers() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers of each cluster unless told not to
    # joblib replaces a worker that has grown, as after a large model; nothing is lost by it
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")


def _check_results_dir(config: DictConfig) -> None:
    from ovqk.cell import check_results_dir
    from ovqk.errors import UserError

    try:
        check_results_dir(Path(str(config.results_dir)))
    except UserError as error:
        raise SystemExit(f"ovqk: {error}") from None
