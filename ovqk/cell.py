"""One cell, start to end: skip it if it is done, else compute, record, track; and say what became of it."""

import errno
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from hydra.types import RunMode
from omegaconf import DictConfig

from ovqk import console
from ovqk.analyses import analyse
from ovqk.checkpoints import Checkpoint, open_checkpoint
from ovqk.config import Config, TrackingMode
from ovqk.errors import UserError
from ovqk.identity import cell_folder, cell_id, identity, resolve, tracking_mode
from ovqk.record import is_done, read_tracking, write_done, write_failed
from ovqk.sources import open_weights
from ovqk.tasks import load_tokenizer

OUTCOME = "outcome.json"
DISK = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM}
"""A full, read-only or forbidden disk: a message for the user, and no defect."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell; written beside Hydra's files so that the end of a sweep can count."""

    status: Literal["done", "cached", "failed"]
    model: str
    task: str
    analysis: str
    folder: str | None
    seconds: float
    error: str | None = None


def run_job(config: DictConfig, hydra: Any) -> None:
    """Run the cell that Hydra composed.

    A single run prints the cell's tables, and ends in a message (SystemExit) on a user's mistake or in a traceback on
    a defect. In a sweep a failed cell is recorded and returns, so that the others go on.

    Raises:
        SystemExit: a single run met a user's mistake.
    """
    sweeping = hydra.mode == RunMode.MULTIRUN
    started = time.perf_counter()
    try:
        cell = resolve(config)
        if cell.sweep is None and sweeping:
            cell.sweep = Path(hydra.sweep.dir).name
        outcome = run_cell(cell, started)
    except UserError as error:
        if not sweeping:
            raise SystemExit(f"ovqk: {error}") from None
        outcome = _failed(config, started, str(error))
    except Exception as error:
        if not sweeping and (isinstance(error, MemoryError) or getattr(error, "errno", None) in DISK):
            raise SystemExit(f"ovqk: {type(error).__name__}: {error}") from None
        if not sweeping:
            raise
        outcome = _failed(config, started, f"{type(error).__name__}: {error}")
    if sweeping:
        output = Path(hydra.runtime.output_dir)
        (output / OUTCOME).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        console.print_cell_line(outcome, hydra.job.num, _expected(Path(hydra.sweep.dir)))
    elif outcome.folder is not None:
        console.print_cell(Path(outcome.folder), cached=outcome.status == "cached")


def run_cell(cell: Config, started: float | None = None) -> Outcome:
    """Compute, record and track one resolved cell, unless it is done.

    Raises:
        UserError: the cell cannot be computed as asked; where its id was known, its record says so.
    """
    started = time.perf_counter() if started is None else started
    mode = tracking_mode(cell, os.environ.get("WANDB_MODE"))
    check_results_dir(Path(cell.results_dir))
    checkpoint = open_checkpoint(cell.model, cell.hub_timeout)
    content = identity(cell, checkpoint.digest)
    identifier = cell_id(content)
    folder = cell_folder(cell, identifier)
    locks = Path(cell.results_dir) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{identifier}.lock"):
        cached = is_done(folder) and not cell.force
        if not cached:
            try:
                compute(cell, checkpoint, content, identifier, folder, started)
            except Exception as error:
                shown = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                defect = not isinstance(error, UserError)
                write_failed(folder, cell, identifier, shown, _portable(traceback.format_exc()) if defect else "")
                raise
        if mode is not TrackingMode.none and (not cached or read_tracking(folder)["status"] != "done"):
            from ovqk.tracking import track_cell

            warning = track_cell(folder, Path(cell.results_dir), mode, cell.tracking.project, cell.tracking.entity)
            if warning:
                print(f"warning: W&B: {warning}", file=sys.stderr)
    seconds = time.perf_counter() - started
    status: Literal["done", "cached"] = "cached" if cached else "done"
    return Outcome(status, cell.model.name, cell.task.name, cell.analysis.name, str(folder), seconds)


def compute(
    cell: Config,
    checkpoint: Checkpoint,
    content: dict[str, Any],
    identifier: str,
    folder: Path,
    started: float,
) -> None:
    """Decompose the model's heads and write the record.

    Raises:
        UserError: the checkpoint or the task does not allow it.
    """
    source = open_weights(checkpoint, cell.model)
    tokenizer = load_tokenizer(checkpoint)
    n_tokens = None if tokenizer is None else tokenizer.get_vocab_size()
    analysis = analyse(source, tokenizer, n_tokens, checkpoint.label, cell)
    seconds = time.perf_counter() - started
    write_done(folder, cell, content, identifier, checkpoint, source.loaded_by, analysis, seconds)


def check_results_dir(path: Path) -> None:
    """Refuse a results folder that cannot be one.

    Raises:
        UserError: a file stands where the folder, or one above it, should be, or it cannot be written.
    """
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"results_dir={path}: {place} is a file, not a folder.")
            if not os.access(place, os.W_OK):
                raise UserError(f"results_dir={path}: {place} cannot be written.")
            return


def _failed(config: DictConfig, started: float, error: str) -> Outcome:
    def name(group: str) -> str:
        try:
            return str(config[group].name)
        except Exception:
            return "local" if group == "model" else "?"

    seconds = time.perf_counter() - started
    return Outcome("failed", name("model"), name("task"), name("analysis"), None, seconds, error)


def _portable(text: str) -> str:
    """A traceback without this machine's folders."""
    for place, name in ((str(Path(__file__).parents[1]), "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>")):
        text = text.replace(place, name)
    return text


def _expected(sweep_dir: Path) -> int | None:
    try:
        return int(json.loads((sweep_dir / "expected.json").read_text(encoding="utf-8"))["cells"])
    except (OSError, ValueError, KeyError):
        return None
