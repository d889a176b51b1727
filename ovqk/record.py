"""A cell's results on disk: Parquet tables, a config that runs the cell again, and record.json, written last.

`record.json` with "status": "done" is what done means. It is renamed into place after everything else, so a cell that
was cut off at any moment is a cell that is not done.
"""

import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ovqk.analyses import Analysis
from ovqk.checkpoints import Checkpoint
from ovqk.config import Config
from ovqk.identity import SCHEMA_VERSION, plain

RECORD = "record.json"
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


def read_record(folder: Path) -> dict[str, Any] | None:
    """A cell's record.json; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_done(folder: Path) -> bool:
    """Whether the cell's results are complete."""
    record = read_record(folder)
    return record is not None and record.get("status") == "done"


def write_done(
    folder: Path,
    config: Config,
    identity: dict[str, Any],
    identifier: str,
    checkpoint: Checkpoint,
    loaded_by: str,
    analysis: Analysis,
    seconds: float,
) -> dict[str, Any]:
    """Write a cell's tables, its config and then its record; returns the record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    for stale in folder.glob("*.parquet"):
        stale.unlink()
    for name, table in analysis.tables.items():
        path = folder / f"{name}.parquet"
        temporary = _temporary(path)
        table.to_parquet(temporary, index=False)
        temporary.replace(path)
    _write_text(folder / "cell.yaml", cell_yaml(config))
    record = _header(config, identifier, "done") | {
        "summary": analysis.summary,
        "unavailable": analysis.unavailable,
        "notes": analysis.notes,
        "words": analysis.words,
        "claims": analysis.claims,
        "loaded_by": loaded_by,
        "processing": analysis.processing,
        "tables": {name: len(table) for name, table in analysis.tables.items()},
        "provenance": provenance(config, identity, checkpoint, seconds)
        | {"null_seconds": round(analysis.null_seconds, 3)},
    }
    _write_json(folder / RECORD, record)
    return record


def write_failed(folder: Path, config: Config, identifier: str, error: str, traceback: str) -> None:
    """Record that a cell failed; a later run computes it again."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / RECORD, _header(config, identifier, "failed") | {"error": error, "traceback": traceback})


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
    """The resolved choice as a primary Hydra config: `python run.py -cd FOLDER -cn cell` computes it again."""
    content = plain(config)
    for key in ("results_dir", "force", "sweep"):
        content.pop(key)
    defaults = {"defaults": ["schema", "settings", "_self_"]}
    return yaml.safe_dump(defaults | content, sort_keys=False, allow_unicode=True, width=110)


def provenance(config: Config, identity: dict[str, Any], checkpoint: Checkpoint, seconds: float) -> dict[str, Any]:
    """What is needed to say where the numbers came from: weights, identity, config, versions, code, cost."""
    commit, dirty = _git()
    return {
        "weights_digest": checkpoint.digest,
        "revision": checkpoint.revision,
        "identity": identity,
        "config": plain(config),
        "versions": _versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "wall_seconds": round(seconds, 3),
        "peak_memory_mb": round(_peak_memory() / 2**20, 1),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git() -> tuple[str | None, bool | None]:
    """Commit of the code and whether it has uncommitted changes; None where it is not a git checkout."""
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_text(path: Path, text: str) -> None:
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a number that is not there is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value


def read_tracking(folder: Path) -> dict[str, Any]:
    """tracking.json of a cell; {"status": "pending"} where there is none."""
    try:
        return dict(json.loads((folder / "tracking.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {"status": "pending"}


def write_tracking(folder: Path, content: dict[str, Any]) -> None:
    """Write tracking.json, which belongs to tracking and may change after the record is done."""
    _write_json(folder / "tracking.json", content)
