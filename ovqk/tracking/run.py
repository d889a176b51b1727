"""One run in W&B, from its beginning to its end: its label, its content, and its place."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk.config.schema import TrackingMode
from ovqk.tracking.cell_panels import Panels, plain_table
from ovqk.tracking.environment import group_of, name_of, tags_of
from ovqk.tracking.service import finish, quiet_wandb, settings, staged_in, within

LOG_SECONDS = 30.0  # the time in which W&B must take the logged data
MAX_TAG, MAX_NAME = 64, 128  # what W&B allows, in letters


@dataclass(frozen=True)
class Destination:
    """Where runs go.

    Attributes:
        results_dir: the results folder, whose `wandb` holds them.
        mode: whether they are sent.
        project: the project; a run that is not sent names it too.
        entity: the project's owner; None for W&B's own default.
        variables: W&B's environment variables that the runs follow, from now or from when they were made first.
    """

    results_dir: Path
    mode: TrackingMode
    project: str
    entity: str | None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Label:
    """A run's name and the keys that W&B sorts it by; texts of any length."""

    name: str
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, Any]


def make_run(
    identifier: str, destination: Destination, label: Label, log: Callable[[Any, Any], None]
) -> dict[str, str]:
    """Make a run that replaces earlier ones with its id, and return its place: {"directory": ...} or {"url": ...}.

    Args:
        identifier: the run's id.
        destination: the run's destination.
        label: the run's label.
        log: a function that takes the run and the wandb module and logs the run's content.
    """
    wandb_dir = destination.results_dir.absolute() / "wandb"
    staging = wandb_dir / "data" / f"{identifier}-{time.time_ns()}"
    wandb_dir.mkdir(parents=True, exist_ok=True)
    online = destination.mode is TrackingMode.online
    limits = settings()
    with quiet_wandb() as (wandb, service), staged_in(staging):
        with within(limits["init_timeout"], service):
            run = wandb.init(
                project=destination.project,
                entity=destination.entity,
                dir=str(destination.results_dir),
                id=identifier,
                name=name_of(label.name, destination.variables)[:MAX_NAME],
                group=group_of(label.group, destination.variables)[:MAX_NAME],
                job_type=label.job_type[:MAX_TAG],
                tags=list(dict.fromkeys(tag[:MAX_TAG] for tag in tags_of(label.tags, destination.variables))),
                config=label.config,
                mode=destination.mode.value,
                reinit="create_new",  # if the caller has a run, it goes on
                settings=wandb.Settings(**limits),
            )
        with within(LOG_SECONDS, service):
            log(run, wandb)
        with within(limits["finish_timeout"], service):
            finish(run)
    directory = Path(run.settings.sync_dir)
    _remove_earlier(wandb_dir, identifier, {directory.name} if online else {directory.name, staging.name})
    if online:
        return {"url": run.url} if run.url else {}
    return {"directory": os.path.relpath(directory, destination.results_dir.absolute())}


def _remove_earlier(wandb_dir: Path, identifier: str, kept: set[str]) -> None:
    """Remove files from earlier attempts at a run, and staged tables that are no longer needed."""
    for pattern in (f"*run-*-{identifier}", f"*run-*-{identifier}-[0-9]", f"data/{identifier}-*"):
        for left in wandb_dir.glob(pattern):
            if left.name not in kept:
                shutil.rmtree(left, ignore_errors=True)


def log_panels(run: Any, wandb: Any, panels: Panels) -> None:
    """Log curves, histograms, eigenvalues, tables and the summary.

    Raises:
        TimeoutError: W&B takes too long.
    """
    deadline = time.monotonic() + LOG_SECONDS
    run.define_metric("layer", hidden=True)
    run.define_metric("relative_depth", hidden=True)  # the axis that compares models with different depths
    run.define_metric("layer/*", step_metric="layer", summary="none")
    run.define_metric("depth/*", step_metric="relative_depth", summary="none")
    for row in panels.curves.to_dict("records"):
        steps = {"layer": int(row.pop("layer")), "relative_depth": row.pop("relative_depth")}
        values = {key: value for key, value in row.items() if pd.notna(value)}
        run.log(steps | {f"{axis}/{key}": value for axis in ("layer", "depth") for key, value in values.items()})
    for name, panel in _media(wandb, panels):
        run.log({name: panel}, commit=False)
        if time.monotonic() > deadline:
            raise TimeoutError(f"W&B did not take the run within {LOG_SECONDS:.0f} s")
    run.log({})
    run.summary.update(panels.scalars)


def _media(wandb: Any, panels: Panels) -> Iterator[tuple[str, Any]]:
    for name, (counts, edges) in panels.histograms.items():
        yield f"histograms/{name}", wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
    for name, rows in panels.eigenvalues.items():
        circuit, space = name.split("_")
        yield (
            f"eigenvalues/{name}",
            wandb.plot_table(
                vega_spec_name="wandb/lineseries/v0",
                data_table=_table(wandb, rows),
                fields={column: column for column in rows.columns},
                string_fields={"title": f"{circuit.upper()} eigenvalues, {space} (real part)", "xname": "index"},
            ),
        )
    for name, table in panels.tables.items():
        yield f"tables/{name}", _table(wandb, table)


def log_overview(run: Any, wandb: Any, tables: dict[str, pd.DataFrame], figures: Iterable[tuple[str, Path]]) -> None:
    """Log tables, and figures by their PNG files' names."""
    shown = {f"comparison/{name}": _table(wandb, table) for name, table in tables.items() if len(table)}
    run.log(shown | {f"figures/{name}": wandb.Image(str(path), caption=name) for name, path in figures})


def _table(wandb: Any, frame: pd.DataFrame) -> Any:
    """Return a W&B table whose columns have one type each; values that are missing or not finite are empty."""
    kinds, rows = plain_table(frame)
    table = wandb.Table(columns=[str(name) for name in frame.columns], data=[], dtype=kinds)
    table.data = rows  # the types are known, so W&B need not look at every value
    return table
