"""Weights & Biases: one run per cell, made from its record alone, so that it can be made again elsewhere or later.

    python -m ovqk.tracking RESULTS_DIR [--mode online] [--project NAME] [--entity NAME] [--all]

The record is never touched and a failure here never loses a result: tracking.json says what happened.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk.comparison import QUARTERS, quarter_means, relative_depth, roles
from ovqk.config import TrackingMode
from ovqk.record import read_record, read_tracking, write_tracking
from ovqk.results import cell_folders, load_table

MAX_TABLE_ROWS = 10_000  # W&B cuts longer tables; the full ones stay in Parquet
LAYER_CURVES = (
    "ov_copying",
    "qk_matching",
    "qk_matching_block0",
    "ov_symmetry",
    "qk_symmetry",
    "qk_symmetry_vocab",
    "qk_positional_share",
    "qk_prev_auc",
    "ov_effective_rank",
    "qk_effective_rank",
    "ov_task_auc",
    "qk_task_auc",
    "ov_task_alignment",
)


def track_cell(folder: Path, results_dir: Path, mode: TrackingMode, project: str, entity: str | None) -> str | None:
    """Make the W&B run of a done cell; returns a warning where that failed.

    tracking.json gets status `done` or `failed`, the mode, the run's id, its folder relative to the results where it
    is offline, and on failure the reason.
    """
    record = read_record(folder)
    if record is None or record.get("status") != "done":
        raise ValueError(f"{folder} holds no finished record")
    identifier = run_id(record)
    write_tracking(folder, {"status": "pending", "mode": mode.value, "run_id": identifier})
    before = os.environ.get("WANDB_DATA_DIR")
    if before is None:  # staged tables travel with the results
        os.environ["WANDB_DATA_DIR"] = str((results_dir / "wandb" / "data").absolute())
    try:
        directory = _log(folder, record, results_dir, mode, project, entity, identifier)
    except Exception as error:  # whatever W&B raises, the result is safe in its record
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        write_tracking(folder, {"status": "failed", "mode": mode.value, "run_id": identifier, "reason": reason})
        return f"{run_name(record)} was computed and recorded, but not tracked ({reason})."
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
    content = {"status": "done", "mode": mode.value, "run_id": identifier}
    write_tracking(folder, content | ({"directory": directory} if directory else {}))
    return None


def run_id(record: dict[str, Any]) -> str:
    """One run per computed record: tracking a record twice is one run."""
    wall = record["provenance"]["wall_seconds"]
    text = f"{record['cell_id']} {wall} {record['provenance']['peak_memory_mb']}"
    return f"{record['cell_id']}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def run_name(record: dict[str, Any]) -> str:
    """What W&B shows."""
    return f"{record['model']} {record['task']} {record['analysis']}"


def _log(
    folder: Path,
    record: dict[str, Any],
    results_dir: Path,
    mode: TrackingMode,
    project: str,
    entity: str | None,
    identifier: str,
) -> str | None:
    results_dir.mkdir(parents=True, exist_ok=True)
    staging = (results_dir / "wandb" / "data").absolute()
    staging.mkdir(parents=True, exist_ok=True)
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_machine_info=True,
        init_timeout=60,
        host="",  # the machine's name is nobody's business
    )
    run = wandb.init(
        project=project,
        entity=entity,
        dir=str(results_dir),
        id=identifier,
        name=run_name(record),
        group=record["sweep"] or record["cell_id"],
        job_type=record["analysis"],
        tags=[record["model"], record["task"], record["analysis"]],
        config=run_config(record),
        mode=mode.value,  # type: ignore[arg-type]
        reinit="finish_previous",
        resume="allow" if mode is TrackingMode.online else None,
        settings=settings,
    )
    try:
        log_record(run, wandb, folder, record)
    except BaseException:
        run.finish(exit_code=1)
        raise
    offline = Path(run.dir).parent if mode is TrackingMode.offline else None
    run.finish()
    return None if offline is None else os.path.relpath(offline, results_dir.absolute())


def run_config(record: dict[str, Any]) -> dict[str, Any]:
    """Flat coordinates to group and filter by, and the resolved config under `cfg`."""
    coordinates = {key: record[key] for key in ("model", "task", "analysis", "seed", "cell_id", "sweep")}
    more = {
        "processing": record["processing"]["applied"],
        "loaded_by": record["loaded_by"],
        "weights_digest": record["provenance"]["weights_digest"],
    }
    return coordinates | more | {"cfg": record["provenance"]["config"]}


def log_record(run: Any, wandb: Any, folder: Path, record: dict[str, Any]) -> None:
    """Curves over layers, eigenvalue curves of the claimed heads, tables, summary scalars."""
    heads = load_table(folder, "heads")
    assert heads is not None
    run.define_metric("layer")
    run.define_metric("relative_depth")  # the axis on which models of different depths compare
    run.define_metric("layer/*", step_metric="layer")
    run.define_metric("depth/*", step_metric="relative_depth")
    curves = layer_curves(heads, load_table(folder, "layers"))
    curves["relative_depth"] = relative_depth(curves["layer"], record["summary"]["n_layers"])
    for row in curves.to_dict("records"):
        steps = {"layer": int(row.pop("layer")), "relative_depth": row.pop("relative_depth")}
        values = {k: v for k, v in row.items() if pd.notna(v)}
        run.log(steps | {f"{axis}/{k}": v for axis in ("layer", "depth") for k, v in values.items()})
    panels: dict[str, Any] = {}
    verdicts, spectra = load_table(folder, "verdicts"), load_table(folder, "spectra")
    if verdicts is not None and spectra is not None:
        panels |= _eigenvalue_panels(wandb, spectra, verdicts)
    for name in ("heads", "layers", "tests", "verdicts"):
        table = load_table(folder, name)
        if table is not None:
            panels[f"tables/{name}"] = wandb.Table(dataframe=plain_table(table.head(MAX_TABLE_ROWS)))
    run.log(panels)
    run.summary.update({"status": "done", "wall_seconds": record["provenance"]["wall_seconds"]} | record["summary"])
    run.summary.update(comparison_scalars(folder, heads, record))


def comparison_scalars(folder: Path, heads: pd.DataFrame, record: dict[str, Any]) -> dict[str, Any]:
    """The cell's rows of the comparison as scalars: `role/ROLE/depth` and `/verdict`, `quarter/N/METRIC`."""
    scalars: dict[str, Any] = {}
    for row in roles([folder]).to_dict("records"):
        if row["role"]:
            scalars |= {f"role/{row['role']}/{key}": row[key] for key in ("depth", "verdict", "heads")}
    means = quarter_means(heads, record["summary"]["n_layers"])
    for number, name in enumerate(QUARTERS, start=1):
        scalars |= {f"quarter/{number}/{metric}": value for metric, value in means.loc[name].dropna().items()}
    return scalars


def layer_curves(heads: pd.DataFrame, layers: pd.DataFrame | None) -> pd.DataFrame:
    """Mean over heads of the main metrics by layer, with the layer's own metrics beside them."""
    wanted = [name for name in LAYER_CURVES if name in heads and heads[name].notna().any()]
    curves = heads.groupby("layer", as_index=False)[wanted].mean()
    if layers is None:
        return curves
    return curves.merge(layers.rename(columns=lambda name: name if name == "layer" else f"summed_{name}"), on="layer")


def _eigenvalue_panels(wandb: Any, spectra: pd.DataFrame, verdicts: pd.DataFrame) -> dict[str, Any]:
    """Real parts of the eigenvalues of every claimed head, by falling modulus: one line chart per circuit and space."""
    claimed = verdicts[verdicts["kind"] == "head"][["role", "layer", "head"]].astype({"layer": int, "head": int})
    labels = claimed.groupby(["layer", "head"])["role"].agg("+".join)
    eigen = spectra[(spectra["kind"] == "eigen") & (spectra["offset"] == spectra["offset"].min())]
    panels = {}
    for (circuit, space), part in eigen.groupby(["circuit", "space"]):
        lines = {head: group["re"].tolist() for head, group in part.groupby(["layer", "head"]) if head in labels.index}
        if lines:
            panels[f"eigenvalues/{circuit}_{space}"] = wandb.plot.line_series(
                xs=list(range(len(next(iter(lines.values()))))),
                ys=list(lines.values()),
                keys=[f"{layer}.{head} {labels[(layer, head)]}" for layer, head in lines],
                title=f"{circuit.upper()} eigenvalues of the claimed heads, {space} space (real part)",
                xname="index",
            )
    return panels


def plain_table(table: pd.DataFrame) -> pd.DataFrame:
    """Missing values as None, which W&B tables show as empty, with columns of one type each."""
    return table.astype(object).where(table.notna(), None)


def main() -> None:
    """Track the finished cells under a results folder that were never tracked."""
    parser = argparse.ArgumentParser(prog="python -m ovqk.tracking", description="Send finished cells to W&B.")
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--mode", choices=["offline", "online"], default=os.environ.get("WANDB_MODE", "online"))
    parser.add_argument("--project", default="ovqk")
    parser.add_argument("--entity")
    parser.add_argument("--all", action="store_true", help="also cells that were tracked, offline for instance")
    arguments = parser.parse_args()
    if not arguments.results_dir.is_dir():
        raise SystemExit(f"ovqk: {arguments.results_dir}: no such results folder.")
    failed = 0
    for folder in cell_folders(arguments.results_dir):
        record = read_record(folder)
        if record is None or record.get("status") != "done":
            continue
        if read_tracking(folder)["status"] == "done" and not arguments.all:
            continue
        mode = TrackingMode(arguments.mode)
        warning = track_cell(folder, arguments.results_dir, mode, arguments.project, arguments.entity)
        failed += warning is not None
        print(warning or f"tracked {folder}", file=sys.stderr if warning else sys.stdout)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
