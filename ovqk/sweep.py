"""A sweep's start and end: the cells to expect, and their outcomes.

Hydra's launchers run the cells, in this process, in others or on other machines. If a cell fails, it records that and
returns. If the system kills a cell, the launcher gives up, and this module still prints the sweep's end.
"""

import gc
import hashlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ovqk.config.command_line import config_folders
from ovqk.config.hydra_errors import mistakes, untold
from ovqk.config.place import CONF
from ovqk.config.sources import refuse_unread, refuse_unread_in_sweep
from ovqk.errors import (
    INTERRUPTED,
    UserError,
    end_command,
    first_line,
    one_mistake,
    told,
    was_interrupted,
    without_secrets,
)
from ovqk.interrupts import importing_is_over
from ovqk.orphans import be_parent
from ovqk.whole_files import DISK, write_text
from ovqk.wording import counted

if TYPE_CHECKING:
    from ovqk.records.outcomes import Outcome, Outcomes
    from ovqk.report.progress import SweepProgress

FAILED = 1  # exit status
LAUNCHER_ERROR = "launcher_error.txt"
EXTRAS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
"""Hydra launcher in a separate package -> ovqk's extra that installs it."""
SWEEPERS = {
    "optuna": "hydra-optuna-sweeper",
    "ax": "hydra-ax-sweeper",
    "nevergrad": "hydra-nevergrad-sweeper",
}
"""Hydra sweeper in a separate package -> the package."""


LOCAL = (
    "results_dir",
    "objective",
    "sweep",
    "tracking",
    "force",
    "device",
    "hub_timeout",
    "cache",
    "cache_dir",
    "cache_gb",
    "hydra",
)
"""Keys that say how a sweep is run, and do not change its results."""
MAX_NAME = 120  # letters in a sweep's name


class RunningSweep:
    """This process's sweep, from its start to its end.

    Attributes:
        outcomes: its cells' outcomes, in its folder.
        results_dir: the results folder.
        progress: the lines printed so far.
        elsewhere: whether its cells run in other processes, or on other machines.
        named: whether its name was given, and is not made of its choices.
    """

    def __init__(
        self, outcomes: "Outcomes", results_dir: Path, progress: "SweepProgress", elsewhere: bool, named: bool
    ) -> None:
        self.outcomes, self.results_dir, self.progress = outcomes, results_dir, progress
        self.elsewhere, self.named = elsewhere, named

    def end(self, interrupted: bool = False) -> int:
        """Print the comparison and the count, and return the exit status. Say if Ctrl-C ended the sweep."""
        from ovqk.report import terminal

        self.progress.stop()
        outcomes, expected = self.outcomes.all(), self.progress.expected
        terminal.print_sweep(outcomes, expected, self.progress.details, self.results_dir, interrupted)
        self._note_other_sweeps(outcomes)
        self.outcomes.forget()
        finished = [outcome for outcome in outcomes.values() if outcome.status != "failed"]
        return int(len(finished) < max(len(expected or ()), len(outcomes)))

    def _note_other_sweeps(self, outcomes: Mapping[int, "Outcome"]) -> None:
        """Note which cells another sweep computed, because their records name that one; say so if this sweep grew."""
        from ovqk.records.record import read_record
        from ovqk.records.sweeps import note_cells

        name = self.outcomes.name()
        done = [Path(outcome.folder) for outcome in outcomes.values() if outcome.folder]
        names = [(read_record(folder) or {}).get("sweep") for folder in done]
        others = len(done) - names.count(name)
        grown = 0 < others < len(done)
        if not (grown or (others and self.named)):
            return
        with suppress(OSError, UserError):  # other messages say what is wrong with a disk or its locks
            note_cells(self.results_dir, name, done)
        if grown:
            print(
                f"note: {others} of {len(done)} cells were computed under another sweep's name, which their records "
                f"and W&B runs keep; ovqk.load_results(..., sweep={name!r}) reads all {len(done)}. With "
                "sweep=NAME from the start, a sweep keeps its name while it grows."
            )

    def track(self) -> None:
        """Make the sweep's own W&B run if all its cells are tracked alike; a failure gives one warning."""
        done = [outcome for outcome in self.outcomes.all().values() if outcome.folder]
        tracking = done[0].tracking if done else None
        if tracking is None or tracking["mode"] == "none" or any(outcome.tracking != tracking for outcome in done):
            return
        from ovqk.config.schema import TrackingConfig, TrackingMode
        from ovqk.records.record import read_tracking, says_done
        from ovqk.records.sweeps import sweep_folder
        from ovqk.tracking.track import destination_of, noted_for, shown_by, track_sweep

        name = self.outcomes.name()
        folders, own = [Path(str(outcome.folder)) for outcome in done], sweep_folder(self.results_dir, name)
        narrowed = not self.named and all(outcome.status == "cached" for outcome in done)
        narrowed &= not says_done(read_tracking(own))
        if narrowed and (other := shown_by(self.results_dir, folders)) not in (None, name):
            print(f"W&B: no new run for the sweep: the run of the sweep {other!r} shows all its cells")
            return
        destination = destination_of(
            self.results_dir,
            TrackingMode(tracking["mode"]),
            str(tracking["project"]),
            tracking["entity"],
            noted_for(own, folders),
        )
        try:
            warning = track_sweep(name, folders, destination, _say_begun)
        except OSError as error:
            warning = f"the sweep's own run, of all its cells, was not made ({error})"
        if warning:
            print(f"warning: W&B: {warning}", file=sys.stderr)
            return
        state = read_tracking(own)
        if says_done(state):
            place = state.get("url") or self.results_dir / state.get("directory", "wandb")
            own_project = destination.project != TrackingConfig.project and not state.get("url")
            print(f"W&B: the sweep's own run{f', for the project {destination.project}' * own_project}: {place}")


def _say_begun() -> None:
    print("W&B: making the sweep's own run, with figures over all its cells", file=sys.stderr, flush=True)


running: RunningSweep | None = None
"""This process's sweep; None in a worker."""


def is_running() -> bool:
    """Say whether this process has begun a sweep and not ended it."""
    return running is not None


@contextmanager
def _never_a_warning() -> Iterator[None]:
    """End the command at any error, because Hydra would only warn about an Exception in a callback and go on.

    Raises:
        SystemExit: something was raised inside; if ovqk has no message for it, it is shown with its traceback.
    """
    with one_mistake():
        try:
            yield
        except UserError:
            raise
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError("\n".join(mistakes(error, []))) from error
        except BrokenPipeError:
            raise
        except Exception as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from None
            traceback.print_exc()
            raise SystemExit(FAILED) from None


class SweepCallback(Callback):
    """The calls that Hydra makes around a run or a sweep. Hydra only warns about an Exception; SystemExit ends it."""

    @_never_a_warning()
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a wrong choice before torch is imported, and an unusable results folder before Hydra uses it."""
        from ovqk.config.resolve import resolve

        cell = config.copy()
        with open_dict(cell):
            del cell["hydra"]
        refuse_unread(config.hydra.overrides.task, resolve(cell).model)
        _check(config)

    @_never_a_warning()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse an unusable results folder, note the cells that the overrides expand to, and watch for their outcomes.

        Raises:
            SystemExit: the results folder cannot be used, or WANDB_MODE is unknown.
        """
        global running
        for part in ("sweeper", "launcher"):
            if not OmegaConf.select(config, f"hydra.{part}._target_"):
                raise UserError(f"hydra.{part}: not set. If you leave it out, cells run here, one after the other.")
        _check(config)
        refuse_unread_in_sweep(config.hydra.overrides.task, config.model, [*map(Path, config_folders()), CONF])
        from ovqk.cell import runs_here
        from ovqk.records.outcomes import Outcomes
        from ovqk.report.progress import SweepProgress

        outcomes, elsewhere = Outcomes(_settle_sweep_dir(config)), not runs_here(config.hydra)
        try:
            outcomes.begin(config.sweep or sweep_name(config), expected_cells(config))
        except OSError as error:
            raise UserError(f"results_dir={config.results_dir}: {error.strerror or error}") from None
        running = RunningSweep(
            outcomes, Path(config.results_dir), SweepProgress(outcomes), elsewhere, bool(config.sweep)
        )
        cells = running.progress.expected
        if cells is not None:  # Hydra composes each of them before the first begins
            print(counted(len(cells), "cell"), flush=True)
        if elsewhere:
            _prepare_workers()
            running.progress.watch()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Print the line for a cell that ran in this process, and release its choice.

        Hydra keeps each job's return value to the end of the sweep, with two copies of its choice that nobody reads: a
        quarter of a megabyte for each cell.
        """
        job_return.cfg = job_return.hydra_cfg = None
        if running is not None:
            running.progress.print_new()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison and the count.

        Raises:
            SystemExit: a cell failed or is missing (status 1).
        """
        global running
        sweep, running = running, None
        assert sweep is not None
        try:
            status = sweep.end()
            sweep.track()
        except Exception as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from None
            end_command(f"the end of the sweep: {told(error)}", FAILED)
        if status:
            raise SystemExit(status)


def end_early(error: BaseException) -> None:
    """End a sweep whose launcher gave up, or a command that the user stopped, with one message.

    The function returns if there is nothing to add to the error itself.

    Raises:
        SystemExit: with the exit status.
    """
    global running
    sweep, running = running, None
    stopped = was_interrupted(error)
    if sweep is None and not stopped and isinstance(error, OSError) and error.errno in DISK:
        raise UserError(f"{error.filename or 'a file'}: cannot be written ({error.strerror}).") from None
    if sweep is None:
        if stopped:
            end_command("interrupted.", INTERRUPTED)
        return
    if not stopped:
        _wait_for_the_others(error)
    status = sweep.end(stopped)
    if stopped:
        more = " Cells that a cluster has taken go on there." if sweep.elsewhere else ""
        end_command(f"interrupted.{more}", INTERRUPTED)
    if status == 0 and sweep.outcomes.all():  # the launcher gave up at a cell that had ended
        raise SystemExit(0) from None
    message = f"the launcher gave up ({type(error).__name__}: {first_line(error)})."
    words = sweep.outcomes.folder / LAUNCHER_ERROR
    try:
        write_text(words, without_secrets("".join(traceback.format_exception(error))))
        message += f" Its own words: {os.path.relpath(words)}"
    except OSError as other:
        message += f" Its own words cannot be written ({other.strerror})."
    end_command(message, FAILED)


def plugin_hint(error: BaseException) -> list[str]:
    """Say what to install if the launcher or the sweeper is not installed; else return nothing."""
    missing = getattr(error, "missing_cfg_file", None) or ""
    launcher, sweeper = missing.removeprefix("hydra/launcher/"), missing.removeprefix("hydra/sweeper/")
    if sweeper in SWEEPERS:
        return [f"hydra/sweeper={sweeper} is not installed: pip install {SWEEPERS[sweeper]}"]
    if launcher not in EXTRAS:
        return []
    return [f"hydra/launcher={launcher} needs an extra: pip install -c constraints.txt -e '.[{EXTRAS[launcher]}]'"]


def _wait_for_the_others(error: BaseException) -> None:
    """Wait for the cells that still run or are in a queue, if the launcher gave up because one was killed.

    Only the launcher knows these cells: submitit's jobs and Ray's references are in the frame that raised. Joblib's
    workers end with the launcher.
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
    """Return each cell's overrides; None if the sweeper decides as it goes.

    Raises:
        UserError: the sweep has no cell, or Hydra's own sweeper does not take its values.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    most = config.hydra.sweeper.max_batch_size
    if most is not None and most < 1:
        raise UserError(f"hydra.sweeper.max_batch_size={most}: must be null or a number of cells >= 1.")
    hydra = GlobalHydra.instance()
    parser = OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)  # glob() looks there
    overrides = parser.parse_overrides(_sweep_overrides(config))
    try:
        cells = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    except (ValueError, TypeError) as error:  # range(0,1,0) raises one, for instance
        raise UserError(untold(error, "hydra.sweeper.params")) from error
    if not cells:
        empty = next(each for each in overrides if each.is_sweep_override() and not [*each.sweep_string_iterator()])
        raise UserError(f"{empty.input_line}: it has no value, so the sweep has no cell.")
    return cells


def sweep_name(config: DictConfig) -> str:
    """Return a name for a sweep that was given none: its choices, so that the same command is the same sweep."""
    chosen = {each.split("=", 1)[0]: each for each in _sweep_overrides(config)}  # the command line's come last
    name = " ".join(each for key, each in chosen.items() if re.split("[.@]", key.lstrip("+~"))[0] not in LOCAL)
    name = name or "one cell"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]} {digest}"


def _sweep_overrides(config: DictConfig) -> list[str]:
    """Return the overrides from the sweep's file, and then those from the command line."""
    params = config.hydra.sweeper.get("params")
    swept = params.items() if isinstance(params, DictConfig) else ()  # another sweeper may have a list here
    return [f"{key!s}={value}" for key, value in swept] + list(config.hydra.overrides.task)


def _settle_sweep_dir(config: DictConfig) -> Path:
    """Make the sweep's folder an absolute path, for workers that start in another folder, and return it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    folder = Path(config.hydra.sweep.dir).absolute()
    literal = str(folder).replace("${", "\\${")
    config.hydra.sweep.dir = literal
    config.hydra.overrides.hydra.append(f"hydra.sweep.dir={QuotedString(literal, Quote.single).with_quotes()}")
    return folder


def _prepare_workers() -> None:
    be_parent()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports each cluster to its makers
    # joblib replaces a worker that has grown, for instance after a large model; nothing is lost
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")


def _check(config: DictConfig) -> None:
    """Refuse a choice that would fail every cell: an unusable results folder, an unknown WANDB_MODE."""
    from ovqk.cell import make_results_dir  # torch, numpy and pandas
    from ovqk.config.checks import refuse_tilde, refuse_untyped
    from ovqk.config.resolve import tracking_mode
    from ovqk.config.schema import TrackingMode
    from ovqk.config.secrets import refuse_secrets
    from ovqk.records import mounts
    from ovqk.tracking.environment import not_followed

    importing_is_over()
    _collect_garbage()
    refuse_secrets(config)
    refuse_untyped(config)
    tracked = tracking_mode(config, os.environ.get("WANDB_MODE")) is not TrackingMode.none
    refuse_tilde(str(config.results_dir))
    results_dir = Path(str(config.results_dir))
    make_results_dir(results_dir)
    if tracked and (said := not_followed(results_dir)):
        print(f"warning: {said}", file=sys.stderr)
    if said := mounts.warning(results_dir):
        print(f"warning: {said}", file=sys.stderr)


def _collect_garbage() -> None:
    """Turn garbage collection on again, which run.py turns off while it imports; objects made so far are exempt."""
    gc.freeze()
    gc.set_threshold(10_000)  # a task's tables and W&B's module alone hold some hundred thousand objects that stay
    gc.enable()
