"""A W&B workspace that compares models: the sections Claims, Spectra, Symmetry and position, Heads, Health.

    python -m ovqk.dashboard RESULTS_DIR [--project NAME] [--entity NAME] [--name TITLE]

Runs are grouped by `config.model`, and a panel is made only for data that the records hold. This command needs the
extra `dashboard` (wandb-workspaces).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from ovqk import wording
from ovqk.config.command_line import tool
from ovqk.config.schema import TrackingConfig
from ovqk.errors import UserError, one_message, print_any_text, told
from ovqk.metrics import METRICS, Topic, shown_in
from ovqk.records.record import done_records, read_tracking
from ovqk.records.results import cell_folders
from ovqk.tracking.cell_panels import Panels, read_panels
from ovqk.tracking.sweep_panels import read_sweeps
from ovqk.tracking.track import noted_for, place_of
from ovqk.wording import counted

NAME = "Heads, claims and spectra by model"
TABLE_SECTIONS = {
    "Claims": ("verdicts", "tests", "candidates", "roles", "joint", "fidelity"),
    "Heads": ("heads", "directions", "composition", "virtual_heads", "nulls", "cycles", "relations"),
}
CURVE_SECTIONS: dict[str, tuple[Topic | Literal["summed"], ...]] = {
    "Spectra": ("spectrum",),
    "Symmetry and position": ("symmetry", "summed", "position"),
    "Heads": ("copying", "task"),
}
"""Section -> its line plots' topics; `summed` for plots about the layer's summed W_QK."""
SUMMED = ("summed_qk_symmetry", "summed_qk_directionality")
SWEEP_FIGURES = ("figures/verdicts", "figures/effects", "figures/depth")
SECTIONS = ("Claims", "Spectra", "Symmetry and position", "Heads", "Health")
Places = Counter[tuple[str | None, str]]
"""(entity, project) -> the number of cells whose runs are there; the entity is None if nothing names it."""


def workspace(entity: str, project: str, title: str, shown: Iterable[Panels], swept: bool = False) -> Any:
    """Return the workspace (`wandb_workspaces.workspaces.Workspace`), not yet saved.

    Args:
        entity: the project's owner.
        project: the runs' project.
        title: the workspace's name.
        shown: the runs' content; data that no run has gets no panel.
        swept: whether there is a sweep, whose own run has figures over all its cells.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces import expr

    shown = list(shown)
    curves = {str(name) for panels in shown for name in panels.curves}
    tables = {name for panels in shown for name in panels.tables}
    spectra = sorted({name for panels in shown for name in panels.eigenvalues})
    scalars = {name for panels in shown for name in panels.scalars}
    model = reports.Config("model")

    def bars(title: str, *metrics: str) -> list[Any]:
        there: list[Any] = [reports.SummaryMetric(metric) for metric in metrics if metric in scalars]
        return [reports.BarPlot(title=title, metrics=there, groupby=model)] if there else []

    panels: dict[str, list[Any]] = {section: [] for section in SECTIONS}
    for role in sorted({name.split("/")[1] for name in scalars if name.startswith("role/")}):
        panels["Claims"] += bars(wording.role(role), f"role/{role}/effect", f"role/{role}/p")
    if swept:
        panels["Claims"].append(reports.MediaBrowser(title="whole sweeps", media_keys=list(SWEEP_FIGURES)))
        panels["Claims"].append(reports.WeavePanelSummaryTable(table_name="comparison/roles"))
        if "prompts/accuracy" in scalars:
            panels["Claims"].append(reports.WeavePanelSummaryTable(table_name="comparison/prompts"))
    for name in spectra:
        panels["Spectra"].append(_eigenvalue_chart(reports, name))
    for section, topics in CURVE_SECTIONS.items():
        for name in filter(curves.__contains__, chain.from_iterable(map(curves_about, topics))):
            meaning = METRICS[name].title if name in METRICS else "of the layer's summed W_QK"
            plot = reports.LinePlot(title=f"{name}: {meaning}", x="relative_depth", y=[f"depth/{name}"], groupby=model)
            panels[section].append(plot)
    for section, names in TABLE_SECTIONS.items():
        panels[section] += [
            reports.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in names if name in tables
        ]
    panels["Health"] += bars("seconds", "health/wall_seconds", "health/null_seconds")
    panels["Health"] += bars("peak memory (MB)", "health/peak_memory_mb")
    panels["Health"] += bars("metrics that are not there", "health/unavailable_metrics")
    panels["Health"] += bars("words dropped", "health/words_dropped")
    panels["Health"].append(reports.RunComparer(diff_only="split"))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            workspaces.Section(name=section, panels=panels[section], is_open=section == "Claims")
            for section in SECTIONS
            if panels[section]
        ],
        runset_settings=workspaces.RunsetSettings(
            groupby=[expr.Config("model")],
            pinned_columns=["config:task", "config:analysis", "config:processing", "summary:status"],
        ),
    )


def _chosen_place(places: Places, entity: str | None, project: str | None) -> tuple[str | None, str]:
    """Return the workspace's entity and project: as given, else the one place that the cells' runs have.

    Raises:
        UserError: they have several.
    """
    fitting = [
        (owner, name) for owner, name in places if owner in (entity or owner, None) and name == (project or name)
    ] or list(places)
    found = {(entity or owner, project or name) for owner, name in fitting}
    if len(found) > 1:
        cells = [f"{'/'.join(filter(None, place))} ({counted(n, 'cell')})" for place, n in places.most_common()]
        raise UserError(
            f"--project: the cells are in several projects: {', '.join(cells)}. Choose with --project and --entity."
        )
    return found.pop()


def curves_about(topic: Topic | Literal["summed"]) -> Sequence[str]:
    """Return a run's curves about a topic, in order."""
    return SUMMED if topic == "summed" else [name for name in shown_in("curve") if METRICS[name].topic == topic]


def _eigenvalue_chart(reports: Any, name: str) -> Any:
    circuit, space = name.split("_")
    return reports.CustomChart(
        query={"summaryTable": {"tableKey": f"eigenvalues/{name}_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": f"{circuit.upper()} eigenvalues, {space} (real part)", "xname": "index"},
    )


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Save the workspace for the cells under a results folder."""
    print_any_text()
    parser = argparse.ArgumentParser(prog=tool("dashboard"), description="Make a W&B workspace.")
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--project", help="the one to which the cells were sent, or will be, unless given")
    parser.add_argument("--entity", help="the owner of that project unless given")
    parser.add_argument("--name", default=NAME, help="the workspace's title")
    chosen = parser.parse_args(arguments)
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError:
        raise UserError("the dashboard needs an extra: pip install -c constraints.txt -e '.[dashboard]'") from None
    shown, places = gathered_panels(chosen.results_dir)
    swept = bool(read_sweeps(chosen.results_dir))
    entity, project = _chosen_place(places, chosen.entity, chosen.project)
    if entity is None:
        raise UserError(
            "--entity: not given, and no record names it, because no cell there was tracked online. Needed: the "
            "project's owner in W&B."
        )
    try:
        saved = workspace(entity, project, chosen.name, shown, swept).save()
    except Exception as error:  # whatever W&B raises
        raise UserError(f"the workspace was not saved: {told(error)}") from None
    print(f"saved {saved.url}")


def gathered_panels(results_dir: Path) -> tuple[list[Panels], Places]:
    """Return one cell's panels for each task and analysis, and the places of all cells' runs.

    If a cell is online, only the cells that are online count; else each is where it would be sent.
    """
    shown: dict[tuple[str, str, str], Panels] = {}
    online, planned = Places(), Places()
    for folder, record in done_records(cell_folders(results_dir)):
        address = str(read_tracking(folder).get("url", "")).split("/")  # .../ENTITY/PROJECT/runs/ID
        if len(address) > 4:
            online[unquote(address[-4]), unquote(address[-3])] += 1
        tracking = record["provenance"]["config"].get("tracking", {})
        project = tracking.get("project") or TrackingConfig.project
        planned[place_of(project, tracking.get("entity"), noted_for(folder))] += 1
        key = (record["task"], record["analysis"], record["processing"]["applied"])
        if key not in shown:
            try:
                shown[key] = read_panels(folder, record)
            except Exception as error:  # raised by a value that no reader expects
                print(f"left out {folder}: it cannot be shown ({told(error)})", file=sys.stderr)
    if not shown:
        raise UserError(f"{results_dir}: no finished cells there (MODEL/TASK/ANALYSIS-ID folders).")
    return list(shown.values()), online or planned


if __name__ == "__main__":
    main()
