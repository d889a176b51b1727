"""A cell's results on disk: Parquet tables, a config that runs the cell again, and record.json, written last.

A cell is done if and only if `record.json` has "status": "done". The file is renamed into place after all others, so a
cell that was interrupted at any moment is not done.
"""

import importlib.metadata
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ovqk.config.resolve import plain
from ovqk.config.schema import Config
from ovqk.errors import UserError
from ovqk.locks import locked
from ovqk.metrics import SCHEMA_VERSION
from ovqk.records.soundness import TABLES, record_fault, tables_fault
from ovqk.whole_files import IN_THE_WAY, in_the_way, read_json, temporary, to_disk, write_json, write_text

RECORD = "record.json"
TRACKING = "tracking.json"
PACKAGES = (
    "ovqk",
    "torch",
    "transformer-lens",
    "transformers",
    "hydra-core",
    "wandb",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "tokenizers",
)


@dataclass(frozen=True)
class Analysis:
    """A cell's results.

    Attributes:
        tables: name -> table; the tables that the analysis does not make are absent.
        unavailable: metric -> why no head has a value.
        summary: name -> number, without nesting.
        words: kept and dropped words of the task's sets.
        processing: the processing that was asked for, and the one that was applied to the weights.
        claims: the claims' source and reliability, or the reason why there are none.
        notes: further facts that a reader of the tables should know.
        null_seconds: seconds spent on drawing nulls.
        activations: prompts, halves and controls for the measurement on prompts, or why there was none; None if the
            analysis does not run the model.
    """

    tables: dict[str, pd.DataFrame]
    unavailable: dict[str, str]
    summary: dict[str, float | int]
    words: dict[str, Any]
    processing: dict[str, str]
    claims: dict[str, Any]
    notes: list[str]
    null_seconds: float
    activations: dict[str, Any] | None = None


@dataclass(frozen=True)
class Origin:
    """Where a cell's weights come from.

    Attributes:
        digest: the checkpoint's digest.
        revision: the hub's resolved commit; None for weights from elsewhere.
        quantisation: tensor kind -> its quantisation.
        loaded_by: `families` or `bridge`.
    """

    digest: str
    revision: str | None
    quantisation: Mapping[str, str]
    loaded_by: str


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a cell's record.json; None if there is none or it cannot be read."""
    try:
        record = read_json(folder / RECORD)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return a cell's record if its results are complete and sound, else None."""
    record = read_record(folder)
    return record if record is not None and says_done(record) and fault(folder, record) is None else None


def fault(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a cell whose record says that it is done, or with its tables; None if it is sound."""
    return record_fault(record) or tables_fault(folder, record)


def says_done(state: Mapping[str, Any]) -> bool:
    """Say whether a record.json calls its results complete, or a tracking.json its run."""
    return state.get("status") == "done"


def done_records(folders: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the cell folders with complete results, in their order, each with its record."""
    return [(folder, record) for folder in folders if (record := read_done(folder)) is not None]


def is_done(folder: Path) -> bool:
    """Say whether the cell's results are complete."""
    return read_done(folder) is not None


@contextmanager
def claim(results_dir: Path, identifier: str, wait: bool = True) -> Iterator[None]:
    """Lock a cell, so that one process at a time computes or tracks it. The system frees the lock if its owner dies.

    Raises:
        UserError: the file system has no locks, or refuses this one; or a file is in the way.
        Timeout: another process holds it, and wait=False.
    """
    locks = results_dir / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        raise UserError(f"results_dir={results_dir}: no cell can be locked ({in_the_way(error)}).") from error
    with locked(locks / f"{identifier}.lock", f"results_dir={results_dir}, cell {identifier}", wait):
        yield


def write_done(
    folder: Path,
    config: Config,
    identity: dict[str, Any],
    identifier: str,
    origin: Origin,
    analysis: Analysis,
    seconds: float,
) -> dict[str, Any]:
    """Write a cell's tables, its config and then its record, and return the record.

    Results from an earlier computation stand until every new table is on the disk. The cell must be claimed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tables(folder, analysis.tables)
    write_text(folder / "cell.yaml", cell_yaml(config))
    record = _header(config, identifier, "done") | {
        "summary": analysis.summary,
        "unavailable": analysis.unavailable,
        "notes": analysis.notes,
        "words": analysis.words,
        "claims": analysis.claims,
        "loaded_by": origin.loaded_by,
        "processing": analysis.processing,
        **({} if analysis.activations is None else {"activations": analysis.activations}),
        "tables": {name: len(table) for name, table in analysis.tables.items()},
        "provenance": provenance(config, identity, origin, seconds) | {"null_seconds": round(analysis.null_seconds, 3)},
    }
    write_json(folder / RECORD, record)
    return record


def _write_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Replace an earlier computation's tables; its record is removed, so that it never describes other tables."""
    assert tables.keys() <= TABLES, f"{sorted(tables.keys() - TABLES)} would not be believed"
    written = {folder / f"{name}.parquet": table for name, table in tables.items()}
    try:
        for path, table in written.items():
            table.to_parquet(temporary(path), index=False)
            to_disk(temporary(path))
        for name in (RECORD, TRACKING):
            (folder / name).unlink(missing_ok=True)
        for stale in folder.glob("*.parquet"):
            stale.unlink()
        for path in written:
            temporary(path).replace(path)
        to_disk(folder)
    finally:
        for path in written:
            temporary(path).unlink(missing_ok=True)


def write_failed(folder: Path, config: Config, identifier: str, error: str, traceback: str) -> None:
    """Record that a cell failed, so that a later run computes it again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, _header(config, identifier, "failed") | {"error": error, "traceback": traceback})


def forget_failure(folder: Path) -> None:
    """Remove a failed cell's record and its folder, if there is one."""
    with suppress(OSError):
        (folder / RECORD).unlink(missing_ok=True)
        folder.rmdir()


def _header(config: Config, identifier: str, status: str) -> dict[str, Any]:
    return {
        "status": status,
        "model": config.model.name,
        "task": config.task.name,
        "analysis": config.analysis.name,
        "cell_id": identifier,
        "schema_version": SCHEMA_VERSION,
        "sweep": config.sweep,
        "seed": config.seed,
    }


def cell_yaml(config: Config) -> str:
    """Return the resolved choice as a primary Hydra config, for `python run.py -cd FOLDER -cn cell`."""
    content = plain(config)
    for key in ("results_dir", "force", "sweep", "cache", "cache_dir", "cache_gb"):
        content.pop(key)
    tracking = content["tracking"].pop("mode")  # chosen as its group, so that tracking=none overrides it
    defaults = {"defaults": ["schema", "settings", {"tracking": tracking}, "_self_"]}
    return yaml.safe_dump(defaults | _literal(content), sort_keys=False, allow_unicode=True, width=110)


def _literal(value: Any) -> Any:
    """Return plain data with `${` escaped, so that OmegaConf does not interpolate it a second time."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value) if isinstance(value, str) else value


def provenance(config: Config, identity: dict[str, Any], origin: Origin, seconds: float) -> dict[str, Any]:
    """Return where the numbers come from: weights, identity, config, versions, code, cost."""
    import torch

    from ovqk.weights.devices import device_name, resolve_device

    commit, dirty = _git()
    device = resolve_device(config.device)
    return {
        "weights_digest": origin.digest,
        "revision": origin.revision,
        "quantisation": dict(origin.quantisation),
        "identity": identity,
        "config": plain(config),
        "versions": dict(_versions()),
        "git_commit": commit,
        "git_dirty": dirty,
        "wall_seconds": round(seconds, 3),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "peak_memory_mb": round(peak_memory() / 2**20, 1),
        **({"peak_gpu_memory_mb": round(peak_gpu_memory() / 2**20, 1)} if device.type == "cuda" else {}),
    }


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def forget_peak_memory() -> None:
    """Reset the peaks, so that each cell in a sweep reports its own (main memory's on Linux only)."""
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return this process's peak memory in resident bytes, since it began or since `forget_peak_memory`."""
    with suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Return the peak of this process's tensors on the GPU in bytes, since it began or since `forget_peak_memory`."""
    import torch

    return torch.cuda.max_memory_allocated()


@cache
def _git() -> tuple[str | None, bool | None]:
    """Return the code's commit and whether it has uncommitted changes; None for both outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def read_tracking(folder: Path) -> dict[str, Any]:
    """Return a cell's tracking.json; {"status": "pending"} if there is none."""
    try:
        content = read_json(folder / TRACKING)
        return {key: text for key, text in content.items() if isinstance(text, str)}
    except (OSError, ValueError, AttributeError):
        return {"status": "pending"}


def write_tracking(folder: Path, content: dict[str, Any]) -> None:
    """Write tracking.json, which belongs to tracking and may change after the record is done."""
    write_json(folder / TRACKING, content)
