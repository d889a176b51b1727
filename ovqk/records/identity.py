"""A cell's identity: everything that its numbers depend on, and nothing else.

Two cells with the same id have the same tables. They are equal to the byte on one machine with the same number of
threads. If the machine, the device or the number of threads differs, they differ by rounding (docs/performance.md says
by how much).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ovqk.config.resolve import plain
from ovqk.config.schema import Config
from ovqk.metrics import SCHEMA_VERSION


def identity(config: Config, digest: str) -> dict[str, Any]:
    """Return everything that the cell's numbers depend on, as plain data.

    Args:
        config: the resolved cell.
        digest: the digest over the checkpoint's weights, config and tokenizer.
    """
    model, activations = plain(config.model), plain(config.activations)
    activations.pop("batch")  # no number depends on it
    analysis = plain(config.analysis)
    if not analysis["diagonals"]:  # so cells that were computed before this choice existed keep their id
        analysis.pop("diagonals")
    task = plain(config.task)
    for key, default in (("operator", "+"), ("between", None)):  # likewise
        if task["cycle"] is not None and task["cycle"][key] == default:
            task["cycle"].pop(key)
    rate = {} if config.model.attn_coeff == 1 else {"attn_coeff": config.model.attn_coeff}  # likewise
    for claims in task["claims"].values():  # for readers
        del claims["places"], claims["revision"]
    for role in task["roles"].values():
        for prediction in role["predictions"]:
            if not prediction["ranks"]:  # as for diagonals
                del prediction["ranks"]
    return {
        "schema_version": SCHEMA_VERSION,
        "weights": digest,
        "processing": config.processing.value,
        "seed": config.seed,
        "model": {key: model[key] for key in ("name", "claims", "n_ctx", "causal")} | rate,
        "task": task,
        "analysis": analysis,
        "nulls": plain(config.nulls),
        **({"activations": activations} if config.analysis.activations else {}),
    }


def cell_id(identity: dict[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the identity's SHA-256."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def unopened_id(config: Config) -> str:
    """Return the id under which a cell's failure is recorded if its weights cannot be opened, so have no digest.

    It does not depend on the weights' place, so that it is the same after a wrong path was mended.
    """
    return cell_id(identity(config, "not opened"))


def cell_folder(config: Config, identifier: str) -> Path:
    """Return `<results_dir>/<model>/<task>/<analysis>-<cell_id>`."""
    return Path(config.results_dir) / config.model.name / config.task.name / f"{config.analysis.name}-{identifier}"
