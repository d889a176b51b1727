"""One cell from start to end: skip it if it is done, else compute, record and track it, and report the outcome."""

import difflib
import json
import math
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.types import RunMode
from omegaconf import DictConfig
from tokenizers import Tokenizer

from ovqk.analyse import analyse
from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.files import cache_folder
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.checks import refuse_untyped
from ovqk.config.resolve import resolve, tracking_mode, user_path
from ovqk.config.schema import Config, Embedding, Source, TrackingMode
from ovqk.errors import UserError, one_mistake, told, was_interrupted, without_secrets
from ovqk.interrupts import raise_if_remembered
from ovqk.memory import FreedMemory, give_all_back, is_exhausted
from ovqk.orphans import end_with_parent
from ovqk.records.identity import cell_folder, cell_id, identity, unopened_id
from ovqk.records.outcomes import Outcome, Outcomes, Status
from ovqk.records.record import (
    Origin,
    claim,
    forget_failure,
    forget_peak_memory,
    is_done,
    read_done,
    write_done,
    write_failed,
)
from ovqk.records.sweeps import note_cells
from ovqk.report import terminal
from ovqk.report.progress import steps_of
from ovqk.report.suggestions import shipped_tasks
from ovqk.structure.cache import StructureCache
from ovqk.structure.kept import Kept, once
from ovqk.tasks.tokenizer import start_tokens, tokenizer_for
from ovqk.tasks.words import readable_tasks
from ovqk.tracking.service import start_meanwhile
from ovqk.weights.devices import resolve_device
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_named
from ovqk.weights.types import OpenedModel
from ovqk.whole_files import DISK, clear_abandoned, in_the_way

if TYPE_CHECKING:
    from ovqk.activations.forward import RunningModel
    from ovqk.activations.stage import Runner


KEPT = Kept()
"""What cells leave to each other if a sweep runs in this process, one cell after the other."""


@one_mistake()
def run_job(config: DictConfig, hydra: Any) -> float | None:
    """Run the cell that Hydra composed, and return its objective, if the choice names one.

    A single run prints the cell's tables. It ends with one message after a user's mistake, and with a traceback after a
    defect. In a sweep a failed cell is recorded and returns, so that the others go on.

    Raises:
        SystemExit: a single run met a user's mistake, or the machine's limits.
    """
    refuse_untyped(config)
    if hydra.mode == RunMode.MULTIRUN:
        return _run_in_sweep(config, hydra)
    try:
        outcome = run_cell(resolve(config))
    except Exception as error:
        if not (isinstance(error, UserError) or _is_of_machine(error)):
            raise
        raise UserError(told(error)) from None
    if outcome.warning:
        print(outcome.warning, file=sys.stderr)
    assert outcome.folder is not None
    if config.sweep and outcome.status == "cached":  # another sweep may have computed it
        with suppress(OSError):  # a full disk loses the note alone
            note_cells(Path(config.results_dir), config.sweep, [Path(outcome.folder)])
    try:
        terminal.print_cell(Path(outcome.folder), cached=outcome.status == "cached")
    except Exception as error:
        if outcome.status != "cached" or isinstance(error, BrokenPipeError):
            raise
        raise UserError(
            f"{outcome.folder}: its record cannot be shown ({told(error)}); force=true computes the cell again."
        ) from error
    return objective_of(config.objective, Path(outcome.folder))


def objective_of(name: str | None, folder: Path) -> float | None:
    """Return a number from a done cell's summary; None if no name is given.

    Raises:
        UserError: the cell has no such number.
    """
    if name is None:
        return None
    record = read_done(folder)
    summary = {} if record is None else record["summary"]
    if name not in summary:
        near = difflib.get_close_matches(name, summary, n=3, cutoff=0.4)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise UserError(f"objective={name}: the record's summary has no such number.{hint}")
    return float(summary[name])


def _run_in_sweep(config: DictConfig, hydra: Any) -> float | None:
    """Run one cell of a sweep, and leave its outcome for the process that prints the sweep; return its objective.

    The objective is nan if the cell failed, or if it has no such number.
    """
    objective, exhausted = None if config.objective is None else math.nan, False
    started = time.perf_counter()
    if hydra.launcher._target_.endswith(".JoblibLauncher"):
        end_with_parent()
    try:
        _enter(Path(hydra.runtime.cwd))
        cell = resolve(config)
        if cell.sweep is None:
            cell.sweep = Outcomes(Path(hydra.sweep.dir)).name()
        here = runs_here(hydra)
        outcome = run_cell(cell, started, alone=here, kept=KEPT if here else None)
        objective = objective_of(cell.objective, Path(str(outcome.folder)))
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        seconds = time.perf_counter() - started
        known = isinstance(error, UserError) or _is_of_machine(error)
        if exhausted := is_exhausted(error):
            KEPT.begin("")  # the next cell may need the memory
        trace = "" if known else _portable(traceback.format_exc())
        outcome = Outcome("failed", *_names(config), None, seconds, error=told(error), traceback=trace or None)
    if exhausted:
        give_all_back()  # after the error, whose frames hold what the cell had made
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    Outcomes(Path(hydra.sweep.dir)).add(hydra.job.num, outcome)
    return objective


def runs_here(hydra: Any) -> bool:
    """Say whether the launcher runs a sweep's cells in the process that was started, one after the other."""
    return bool(hydra.launcher._target_.endswith(".BasicLauncher"))


def run_cell(cell: Config, started: float | None = None, alone: bool = True, kept: Kept | None = None) -> Outcome:
    """Compute, record and track one resolved cell, unless it is done.

    Args:
        cell: the resolved choice.
        started: when work on it began (time.perf_counter); now if None.
        alone: whether no other process computes for this terminal.
        kept: what this process's cells leave to each other; None to leave nothing.

    Raises:
        UserError: the cell cannot be computed as asked; its record says so, unless it is a cell of no sweep whose
            weights cannot be opened.
    """
    raise_if_remembered()
    started = time.perf_counter() if started is None else started
    mode = tracking_mode(cell, os.environ.get("WANDB_MODE"))
    results_dir = Path(cell.results_dir)
    make_results_dir(results_dir)
    checkpoint = _open(cell)
    content = identity(cell, checkpoint.digest)
    identifier = cell_id(content)
    folder = cell_folder(cell, identifier)
    with claim(results_dir, identifier):
        clear_abandoned(folder)
        before = read_done(folder)  # a folder may be a copy under another cell's name
        cached = before is not None and before["cell_id"] == identifier and not cell.force
        if not cached:
            if mode is not TrackingMode.none:
                start_meanwhile()
            try:
                compute(cell, checkpoint, content, identifier, folder, started, alone, kept)
            except Exception as error:
                if not is_done(folder):  # with force=true, an earlier result stands
                    _record_failure(folder, cell, identifier, error)
                raise
        warning = None if mode is TrackingMode.none else _track(cell, folder, mode)
    seconds = time.perf_counter() - started
    names = cell.model.name, cell.task.name, cell.analysis.name
    tracking = {"mode": mode.value, "project": cell.tracking.project, "entity": cell.tracking.entity}
    status: Status = "cached" if cached else "done"
    return Outcome(status, *names, str(folder), seconds, warning=warning, tracking=tracking)


def _open(cell: Config) -> Checkpoint:
    """Open the cell's checkpoint. If that fails in a sweep, the failure is recorded until the cell can be opened."""
    identifier = unopened_id(cell)
    folder = cell_folder(cell, identifier)
    try:
        if cell.model.source is Source.hub:
            resolve_device(cell.device)  # refused before anything is fetched
        checkpoint = open_checkpoint(cell.model, cell.hub_timeout, tensors_read)
    except Exception as error:
        if cell.sweep is not None:
            _record_failure(folder, cell, identifier, error)
        raise
    forget_failure(folder)
    return checkpoint


def _record_failure(folder: Path, cell: Config, identifier: str, error: Exception) -> None:
    """Record why a cell failed, unless Ctrl-C ended it."""
    if was_interrupted(error):
        return
    trace = "" if isinstance(error, UserError) else _portable(traceback.format_exc())
    with suppress(OSError):  # the disk may take no record either; the sweep's end reports that
        write_failed(folder, cell, identifier, told(error), trace)


def _track(cell: Config, folder: Path, mode: TrackingMode) -> str | None:
    from ovqk.tracking.track import needs_tracking, track_cell

    if not needs_tracking(folder):
        return None
    tracking = cell.tracking
    warning = track_cell(folder, Path(cell.results_dir), mode, tracking.project, tracking.entity, cell.sweep)
    return warning and f"warning: W&B: {warning}"


def compute(
    cell: Config,
    checkpoint: Checkpoint,
    content: dict[str, Any],
    identifier: str,
    folder: Path,
    started: float,
    alone: bool = True,
    kept: Kept | None = None,
) -> None:
    """Decompose the model's heads and write the record.

    Raises:
        UserError: the checkpoint or the task does not allow it, or the disk does not take the results.
    """
    if kept is not None:
        kept.begin(model_depends_on(cell, checkpoint))
        FreedMemory().give_back(at_once=True)  # what the cell before has freed
    forget_peak_memory()
    source = open_named(checkpoint, cell.model)
    needed = bool(cell.task.variables)
    tokenizer, notes = once(kept, "tokenizer", needed, lambda: tokenizer_for(cell.task, checkpoint))
    opened = OpenedModel(source, checkpoint.label, tokenizer)
    runs = cell.analysis.activations or cell.analysis.embedding is Embedding.stream
    runner = runner_of(checkpoint, cell, tokenizer) if runs else None
    with steps_of(f"{cell.model.name} / {cell.task.name} / {cell.analysis.name}", alone) as steps:
        cache = structure_cache(cell, checkpoint)
        analysis = analyse(opened, cell, steps, cache, runner, steps.draws, kept, steps.plan)
    analysis.notes.extend(notes)
    analysis.words["tasks"] = once(
        kept, "tasks", needed, lambda: [] if tokenizer is None else readable_tasks(shipped_tasks(), tokenizer)
    )
    origin = Origin(checkpoint.digest, checkpoint.revision, checkpoint.quantisation, source.loaded_by)
    seconds = time.perf_counter() - started
    try:
        write_done(folder, cell, content, identifier, origin, analysis, seconds)
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise UserError(
            f"results_dir={cell.results_dir}: the results cannot be written ({in_the_way(error)}). "
            "Earlier results of the cell are unchanged."
        ) from error


def runner_of(checkpoint: Checkpoint, cell: Config, tokenizer: Tokenizer | None) -> "Runner":
    """Return how the checkpoint's model is run on prompts; nothing is loaded yet."""
    from ovqk.activations.one_block import OneBlock
    from ovqk.activations.stage import Runner

    def load(device: torch.device) -> "RunningModel":
        from ovqk.activations.forward import RunningModel  # transformers and TransformerLens: some seconds

        whole = checkpoint
        if cell.model.source is Source.hub:  # only the tensors that weights' analyses read are here
            whole = open_checkpoint(cell.model, cell.hub_timeout)
        return RunningModel.load(whole, cell.model, device)

    try:
        start = [] if tokenizer is None else start_tokens(tokenizer, checkpoint)
    except ValueError as error:
        raise UserError(f"{checkpoint.label}: {error}.") from error
    return Runner(load, start, lambda: OneBlock(checkpoint, cell.model.attn_coeff))


def model_depends_on(cell: Config, checkpoint: Checkpoint) -> str:
    """Return everything that a model's layers, embeddings and tokenizer depend on, as text."""
    stated = cell.model.n_ctx, cell.model.causal, cell.model.attn_coeff
    return json.dumps([checkpoint.digest, *stated, cell.processing.value, cell.device.value])


def structure_cache(cell: Config, checkpoint: Checkpoint) -> StructureCache | None:
    """Return the cache for results that depend on no task; None if `cache=false`."""
    if not cell.cache:
        return None
    folder = cache_folder() if cell.cache_dir is None else user_path("cache_dir", cell.cache_dir)
    return StructureCache(folder, cell.cache_gb, checkpoint.digest)


def make_results_dir(path: Path) -> None:
    """Make the results folder, or refuse one that cannot be made.

    Raises:
        UserError: the folder or one above it is a file, or it cannot be made or written.
    """
    try:
        place = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise UserError(f"results_dir={path}: {error.strerror}.") from error
    if not place.is_dir():
        raise UserError(f"results_dir={path}: {place} is a file, not a folder.")
    if not os.access(place, os.W_OK):
        raise UserError(f"results_dir={path}: {place} cannot be written.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"results_dir={path}: cannot be made ({error.strerror}).") from error


def _enter(call: Path) -> None:
    """Change to the folder in which the command was typed: paths are relative to it, and a worker may start elsewhere.

    Raises:
        UserError: this machine has no such folder.
    """
    try:
        os.chdir(call)
    except OSError as error:
        raise UserError(
            f"{call}: this machine cannot enter the folder in which the command was started ({error.strerror}). All "
            "machines of a cluster must share it."
        ) from error


def _is_of_machine(error: Exception) -> bool:
    """Say whether the machine's memory or disk is exhausted or closed, which is not a defect."""
    return is_exhausted(error) or getattr(error, "errno", None) in DISK


def _names(config: DictConfig) -> tuple[str, str, str]:
    """Return model, task and analysis, if a failed choice has them."""

    def name(group: str) -> str:
        try:
            return without_secrets(str(config[group].name))
        except Exception:
            return "local" if group == "model" else "?"

    return name("model"), name("task"), name("analysis")


def _portable(text: str) -> str:
    """Return a traceback without this machine's folders and secrets."""
    for place, name in ((str(Path(__file__).parents[1]), "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>")):
        text = text.replace(place, name)
    return without_secrets(text)
