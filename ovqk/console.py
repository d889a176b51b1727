"""What a person reads in the terminal: a cell's claimed heads, a sweep's comparison, and where the results are."""

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ovqk import comparison
from ovqk.availability import NOT_APPLICABLE
from ovqk.directions import describe
from ovqk.record import read_record, read_tracking
from ovqk.results import load_table

STYLES = {"corroborated": "green", "partial": "yellow", "contradicted": "red", "unsupported": "magenta"}
SHOWN_CANDIDATES = 3  # of each role
MIN_WIDTH = 150  # of tables where the output is no terminal

RESIDUAL_COLUMNS = (
    ("OV sign (residual)", "ov_copying_residual"),
    ("QK sign (residual)", "qk_matching_residual"),
    ("previous AUC", "qk_prev_auc"),
)
HEAD_COLUMNS = (
    ("OV copying", "ov_copying"),
    ("QK matching", "qk_matching"),
    ("symmetry", "qk_symmetry"),
    ("position", "qk_positional_share"),
    ("OV align", "ov_task_alignment"),
    ("QK align", "qk_key_alignment"),
)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(MIN_WIDTH, console.width))


def print_cell(folder: Path, cached: bool) -> None:
    """The claimed heads of a finished cell, what was unavailable, where things are, and what to do next."""
    record = read_record(folder)
    heads, verdicts = load_table(folder, "heads"), load_table(folder, "verdicts")
    if record is None or heads is None:
        return
    out = _console()
    summary = record["summary"]
    where = f"{summary['n_layers']} layers, {summary['n_heads']} heads, weights {record['processing']['applied']}"
    state = "done before, read from its record" if cached else f"{record['provenance']['wall_seconds']:.1f} s"
    out.print(f"\n[bold]{record['model']}[/bold] / {record['task']} / {record['analysis']}: {where} ({state})\n")
    if verdicts is None:
        out.print(f"No verdicts: {record['claims']['none']}. Means over the heads of each layer:\n")
        out.print(layer_table(heads))
        _print_candidates(out, folder)
    else:
        note = f" - {record['claims']['note']}" if "note" in record["claims"] else ""
        out.print(f"Claims: {record['claims']['source']} ({record['claims']['reliability']}){note}\n")
        out.print(verdict_table(heads, verdicts))
        for line in reasons(verdicts):
            out.print(line, style="dim")
        _print_directions(out, folder, verdicts)
    for reason, names in grouped(record["unavailable"]).items():
        if reason.startswith(NOT_APPLICABLE):
            continue
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more (see record.json)" if len(names) > 4 else "")
        out.print(f"unavailable ({reason}): {shown}", style="dim", soft_wrap=True)
    for note in record["notes"]:
        out.print(f"note: {note}", style="dim", soft_wrap=True)
    for name, words in record["words"]["dropped"].items():
        if words:
            out.print(f"{len(words)} words of '{name}' are not one token here and were left out", style="dim")
    _print_places(out, folder, record)


def _print_directions(out: Console, folder: Path, verdicts: pd.DataFrame) -> None:
    """What the leading singular component of each circuit of the claimed heads reads and writes."""
    table = load_table(folder, "directions")
    if table is None or not len(table):
        return
    table = table[(table["kind"] == "singular") & (table["component"] == 0)]
    claimed = verdicts[verdicts["kind"] == "head"][["layer", "head"]].astype(int).drop_duplicates()
    out.print("\nLeading singular components (all of them, and the eigen components: directions.parquet)", style="dim")
    for layer, head in claimed.to_numpy().tolist():
        for line in describe(table, layer, head, shown=4):
            out.print(Text(f"  {layer}.{head}  {line}", style="dim"), soft_wrap=True)


def _print_candidates(out: Console, folder: Path) -> None:
    """The strongest heads for each role, where no circuit is claimed."""
    found = load_table(folder, "candidates")
    if found is None or not len(found):
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("candidates for", "metric", "head", "value", "in layer", "q nearby", "p frame, all"):
        table.add_column(title, justify="left" if title in ("candidates for", "metric") else "right")
    for row in found[found["primary"] & (found["rank"] <= SHOWN_CANDIDATES)].to_dict("records"):
        first = row["rank"] == 1
        arrow = {"high": "↑", "low": "↓"}[row["prediction"]]
        table.add_row(
            row["role"].replace("_", " ") if first else "",
            f"{row['metric']} {arrow}" if first else "",
            f"{row['layer']}.{row['head']}",
            _number(row["value"]),
            _percent(row["percentile"]),
            _number(row["q_depth"], digits=3),
            _number(row["p_frame_all"], digits=3),
        )
    out.print("\nCandidates, not verdicts: the heads are chosen for being the strongest.\n")
    out.print(table)
    out.print(
        "q nearby: against heads of nearby layers, corrected over all heads. p frame, all: against heads of the same "
        "spectrum, times the number of heads.",
        style="dim",
    )


def shown_columns(heads: pd.DataFrame) -> list[tuple[str, str]]:
    """(title, metric) of what a person reads; residual-space ones where the model gives little else."""

    def there(columns: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(title, name) for title, name in columns if name in heads and heads[name].notna().any()]

    columns = there(HEAD_COLUMNS)
    return columns if len(columns) >= 3 else there((*RESIDUAL_COLUMNS, *HEAD_COLUMNS))


def verdict_table(heads: pd.DataFrame, verdicts: pd.DataFrame) -> Table:
    """One row per claimed head under a row for its role."""
    columns = shown_columns(heads)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role: primary metric / head", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right")
    for title in ("primary", "percentile", "q"):
        table.add_column(title, justify="right")
    table.add_column("verdict", no_wrap=True)
    indexed = heads.set_index(["layer", "head"])
    for row in verdicts.to_dict("records"):
        is_role = row["kind"] == "role"
        values = ["" for _ in columns]
        if not is_role:
            head = (int(row["layer"]), int(row["head"]))
            values = [_number(indexed.at[head, name]) for _, name in columns]
        arrow = {"high": "↑", "low": "↓"}.get(row["prediction"] or "", "")
        verdict = row["verdict"] + (f" ({row['flags']})" if row["flags"] else "")
        if is_role:
            name = Text(row["role"].replace("_", " "), style="bold")
            name.append(f": {row['primary']} {arrow}" if row["primary"] else "", style="dim")
        else:
            name = Text(f"  {int(row['layer'])}.{int(row['head'])}")
        table.add_row(
            name,
            *values,
            _number(row["value"]),
            "" if is_role else _percent(row["percentile"]),
            _number(row["q"], digits=3),
            Text(verdict, style=STYLES.get(row["verdict"], "dim")),
        )
    return table


def reasons(verdicts: pd.DataFrame) -> Iterable[str]:
    """How to read the table, and why claims could not be tested, each reason once."""
    yield ""
    yield (
        "position: share of the QK score's variance that is positional. OV align, QK align: writing and key side in "
        "the task's subspace, 1 by chance."
    )
    yield (
        "primary: value of the primary metric; for a role its heads' mean rank within their layers (0.5 by chance). "
        "percentile: among unclaimed heads of the layer."
    )
    yield (
        "q: the largest corrected p under the nulls that count (named in verdicts.parquet): other heads, heads of the "
        "same spectrum, other words. partial (consistent): only heads of the same spectrum are beaten."
    )
    untested = verdicts[verdicts["reason"] != ""]
    for reason, rows in untested.groupby("reason", sort=False):
        names = [
            row["role"].replace("_", " ") if row["kind"] == "role" else f"{int(row['layer'])}.{int(row['head'])}"
            for row in rows.to_dict("records")
        ]
        yield f"{rows['verdict'].iloc[0]} ({', '.join(names)}): {reason}"


def layer_table(heads: pd.DataFrame) -> Table:
    """Mean of the main metrics over the heads of each layer."""
    columns = shown_columns(heads)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", *(title for title, _ in columns)):
        table.add_column(title, justify="right")
    for layer, rows in heads.groupby("layer"):
        table.add_row(str(layer), *(_number(rows[name].mean()) for _, name in columns))
    return table


def _print_places(out: Console, folder: Path, record: Mapping[str, Any]) -> None:
    tracking = read_tracking(folder)
    results_dir = folder.parents[2]
    out.print(f"\nrecord: {folder}", soft_wrap=True)
    if tracking["status"] == "done" and tracking.get("directory"):
        run = results_dir / tracking["directory"]
        out.print(f"W&B (offline): {run}", soft_wrap=True)
        sync = f"   {_python()} -m wandb sync {shlex.quote(str(run))}"
    elif tracking["status"] == "done":
        sync = ""
        out.print(f"W&B: run {tracking['run_id']}")
    else:
        sync = f"   {_python()} -m ovqk.tracking {shlex.quote(str(results_dir))}"
        out.print("W&B: not tracked" + (f" ({tracking['reason']})" if "reason" in tracking else ""), soft_wrap=True)
    out.print("next:")
    chosen = record["provenance"]["config"]["model"]
    model = f"model={chosen['name']}"
    if chosen["source"] == "local":
        model = f"model=local {shlex.quote('model.path=' + chosen['path'])}"
    out.print(f"   {_python()} run.py -m {model} task=ioi,sva,induction analysis=b03,qk", soft_wrap=True)
    out.print(f"   {_python()} -c \"import ovqk; print(ovqk.load_results('{results_dir}')['heads'])\"", soft_wrap=True)
    if sync:
        out.print(sync, soft_wrap=True)


def _python() -> str:
    """The interpreter as a person here would type it: a virtual environment below this folder, else `python`."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else "python"


def print_cell_line(outcome: Any, number: int, expected: int | None) -> None:
    """One line for a cell of a sweep, as it ends."""
    count = f"[{number + 1}/{expected}]" if expected else f"[{number + 1}]"
    name = f"{outcome.model} / {outcome.task} / {outcome.analysis}"
    style = {"done": "green", "cached": "dim", "failed": "red"}[outcome.status]
    line = Text(f"{count} {name}  ")
    line.append(outcome.status, style=style)
    line.append(f"  {outcome.seconds:.1f} s")
    if outcome.error:
        line.append(f"  {outcome.error}")
    _console().print(line, soft_wrap=True)


def print_sweep(outcomes: Sequence[Mapping[str, Any]], expected: int | None, results_dir: Path) -> None:
    """The comparison over the sweep's cells, then done / cached / failed / missing with the messages."""
    out = _console()
    folders = [Path(outcome["folder"]) for outcome in outcomes if outcome["folder"]]
    if folders:
        claimed = role_table(folders)
        out.print("\n[bold]By role[/bold] (depth: mean over its heads, 0 the first layer and 1 the last)\n")
        out.print(claimed if claimed.row_count else Text("none of these models has claimed heads here", style="dim"))
    if len({outcome["model"] for outcome in outcomes if outcome["folder"]}) > 1:
        out.print("\n[bold]By relative depth[/bold]\n")
        out.print(depth_table(folders))
    counts = {status: sum(o["status"] == status for o in outcomes) for status in ("done", "cached", "failed")}
    missing = max(0, (expected or 0) - len(outcomes))
    done = ", ".join(f"{n} {status}" for status, n in counts.items())
    out.print(f"\n{done}, {missing} missing; results in {results_dir}", soft_wrap=True)
    for outcome in outcomes:
        if outcome["status"] == "failed":
            name = f"{outcome['model']} / {outcome['task']} / {outcome['analysis']}"
            out.print(Text(f"failed: {name}: {outcome['error']}", style="red"), soft_wrap=True)


def role_table(folders: Sequence[Path]) -> Table:
    """One row per role and model: where its heads are, how they stand out, the verdict. Empty where none is claimed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    right = ("heads", "depth", "AUC in layer", "p")
    for title in ("task", "analysis", "role", "model", "heads", "depth", "primary metric", "AUC in layer", "p"):
        table.add_column(title, justify="right" if title in right else "left", no_wrap=title == "model")
    table.add_column("verdict")
    table.add_column("of its heads")
    rows = comparison.roles(folders).to_dict("records")
    for row in rows if any(row["role"] for row in rows) else []:
        place = [row["task"], row["analysis"], row["role"].replace("_", " "), row["model"]]
        if not row["role"]:
            table.add_row(*place, *[""] * 5, Text(row["verdict"], style="dim"))
            continue
        table.add_row(
            *place,
            str(row["heads"]),
            _number(row["depth"]),
            row["primary"] or "",
            _number(row["effect"]),
            _number(row["p"], digits=3),
            Text(row["verdict"], style=STYLES.get(row["verdict"], "dim")),
            ", ".join(f"{n} {verdict}" for verdict, n in row["of_its_heads"].items()),
        )
    return table


def depth_table(folders: Sequence[Path]) -> Table:
    """One row per metric and model: means over heads by quarter of the relative depth."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric, mean over heads")
    table.add_column("model", no_wrap=True)
    for title in comparison.QUARTERS:
        table.add_column(title, justify="right")
    rows = comparison.depths(folders).to_dict("records")
    several = len({(row["metric"], row["model"]) for row in rows}) < len(rows)  # the same model folded and raw
    for row in rows:
        model = f"{row['model']} ({row['processing']})" if several else row["model"]
        table.add_row(row["metric"], model, *(_number(row[title]) for title in comparison.QUARTERS))
    return table


def grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the metrics it holds for."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def _number(value: Any, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def _percent(value: Any) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.0%}"
