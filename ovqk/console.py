"""What a person reads in the terminal: a cell's claimed heads, a sweep's comparison, and where the results are."""

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ovqk import comparison
from ovqk.availability import NOT_APPLICABLE
from ovqk.directions import describe
from ovqk.outcomes import Outcome
from ovqk.record import read_record, read_tracking
from ovqk.results import load_table

STYLES = {"corroborated": "green", "partial": "yellow", "contradicted": "red", "unsupported": "magenta"}
ARROWS = {"high": "↑", "low": "↓"}
SHOWN_CANDIDATES = 3  # of each role
SHOWN_PAIRS = 5  # of heads, of each kind of composition
SHOWN_TOKENS = 4  # on each side of a component
SHOWN_MISSING = 20  # cells of a sweep
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
        out.print(f"{claims_line(record['claims'], record['model'])}\n")
        out.print(verdict_table(heads, verdicts))
        for line in reasons(verdicts):
            out.print(line, style="dim")
        _print_directions(out, folder, verdicts)
    _print_pairs(out, folder)
    for reason, names in grouped(record["unavailable"]).items():
        if reason.startswith(NOT_APPLICABLE):
            continue
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more (see record.json)" if len(names) > 4 else "")
        out.print(f"unavailable ({reason}): {shown}", style="dim", soft_wrap=True)
    for note in record["notes"]:
        out.print(f"note: {note}", style="dim", soft_wrap=True)
    for name, dropped in record["words"]["reasons"].items():
        for reason, words in grouped(dropped).items():
            counted = f"{len(words)} words are" if len(words) > 1 else "1 word is"
            out.print(f"of '{name}', {counted} left out: {reason}", style="dim")
    _print_places(out, folder, record)


def claims_line(claims: Mapping[str, str], model: str) -> str:
    """Whose heads are judged, and who says so."""
    of = "Claims" if claims["of"] == model else f"Claims of {claims['of']}, applied to {model}"
    note = f" - {claims['note']}" if "note" in claims else ""
    return f"{of}: {claims['source']} ({claims['reliability']}){note}"


def _print_directions(out: Console, folder: Path, verdicts: pd.DataFrame) -> None:
    """What the leading singular and eigen component of each circuit of the claimed heads read and write."""
    table = load_table(folder, "directions")
    if table is None or not len(table):
        return
    table = table[table["component"] == 0]
    claimed = verdicts[verdicts["kind"] == "head"][["layer", "head"]].astype(int).drop_duplicates()
    out.print("\nLeading singular and eigen components (the next ones: directions.parquet)", style="dim")
    for layer, head in claimed.to_numpy().tolist():
        for line in describe(table, layer, head, shown=SHOWN_TOKENS):
            out.print(Text(f"  {layer}.{head}  {line}", style="dim"), soft_wrap=True)


def _print_pairs(out: Console, folder: Path) -> None:
    """The strongest compositions and virtual heads, where all pairs of heads were composed."""
    virtual, composition = load_table(folder, "virtual_heads"), load_table(folder, "composition")
    if virtual is None or composition is None:
        return
    out.print("\nStrongest compositions (more of them: composition.parquet)\n")
    out.print(pair_table(composition))
    out.print(
        "above random: score less what iid weights score. in layer: percentile of the sender in its layer. matching: "
        "1 where the receiver looks for its own token moved by the sender (K).",
        style="dim",
    )
    out.print("\nStrongest virtual heads (more of them: virtual_heads.parquet)\n")
    out.print(virtual_table(virtual))
    out.print(
        "share: of what the receiver's values read of all earlier heads. OV copying: of what the two write together.",
        style="dim",
    )


def pair_table(composition: pd.DataFrame) -> Table:
    """The strongest pairs of each mode, by score."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("composition", "sender", "receiver", "score", "above random", "in layer", "matching"):
        table.add_column(title, justify="left" if title == "composition" else "right")
    for mode, rows in composition.groupby("mode", sort=False):
        for place, row in enumerate(rows.nlargest(SHOWN_PAIRS, "score").to_dict("records")):
            table.add_row(
                f"{str(mode).upper()}" if not place else "",
                *_pair(row),
                _number(row["score"], digits=3),
                _number(row["score_above_random"], digits=3),
                _percent(row["percentile"]),
                _number(row["matching"]),
            )
    return table


def virtual_table(virtual: pd.DataFrame) -> Table:
    """The virtual heads of the strongest V pairs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("sender", "receiver", "score", "share", "OV copying"):
        table.add_column(title, justify="right")
    for row in virtual.nlargest(SHOWN_PAIRS, "score").to_dict("records"):
        numbers = (_number(row["score"], digits=3), _percent(row["frobenius_share"]), _number(row["ov_copying"]))
        table.add_row(*_pair(row), *numbers)
    return table


def _pair(row: Mapping[Any, Any]) -> tuple[str, str]:
    sender, receiver = (f"{row[f'{side}_layer']}.{row[f'{side}_head']}" for side in ("sender", "receiver"))
    return sender, receiver


def _print_candidates(out: Console, folder: Path) -> None:
    """The strongest heads for each role, where no circuit is claimed."""
    found = load_table(folder, "candidates")
    if found is None or not len(found):
        return
    out.print("\nCandidates, not verdicts: the heads are chosen for being the strongest.\n")
    out.print(candidate_table(found))
    out.print(
        "in layer: share of the layer's other heads that are lower; where ↓ is predicted, 0% is the strongest. "
        "q nearby: against heads of nearby layers, corrected over all heads. p frame, all: against heads of the same "
        "spectrum, times the number of heads.",
        style="dim",
    )


def candidate_table(candidates: pd.DataFrame) -> Table:
    """The strongest candidates; roles that the same heads stand for by the same metric are one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("candidates for", "ranked by", "head", "value", "in layer", "q nearby", "p frame, all"):
        table.add_column(title, justify="left" if title in ("candidates for", "ranked by") else "right")
    shown = candidates[candidates["ranked"] & (candidates["rank"] <= SHOWN_CANDIDATES)]
    same: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
    for role, rows in shown.groupby("role", sort=False):
        key = tuple(rows[["metric", "prediction", "partners", "layer", "head"]].itertuples(index=False, name=None))
        same.setdefault(key, []).append(str(role))
    for roles in same.values():
        for place, row in enumerate(shown[shown["role"] == roles[0]].to_dict("records")):
            by = f"{row['metric']} {ARROWS[row['prediction']]}"
            by += f" with {row['partners']}" if row["partners"] else ""
            table.add_row(
                ", ".join(role.replace("_", " ") for role in roles) if not place else "",
                by + ("" if row["primary"] else " (not its primary)") if not place else "",
                f"{row['layer']}.{row['head']}",
                _number(row["value"]),
                _percent(row["percentile"]),
                _number(row["q_depth"], digits=3),
                _number(row["p_frame_all"], digits=3),
            )
    return table


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
        primary = f"{row['primary']} {ARROWS[row['prediction']]}" if isinstance(row["primary"], str) else ""
        verdict = row["verdict"] + (f" ({row['flags']})" if row["flags"] else "")
        if is_role:
            name = Text(row["role"].replace("_", " "), style="bold")
            name.append(f": {primary}" if primary else "", style="dim")
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
        "percentile: among unclaimed heads of the layer; where ↓ is predicted, 0% is the strongest."
    )
    yield (
        "q: the largest corrected p under the nulls that count (named in verdicts.parquet): other heads, heads of the "
        "same spectrum, other words. partial (consistent): only heads of the same spectrum are beaten; contradicted "
        "(frame): only they are, the other way."
    )
    untested = verdicts[verdicts["reason"] != ""]
    for (verdict, reason), rows in untested.groupby(["verdict", "reason"], sort=False):
        names = [
            row["role"].replace("_", " ") if row["kind"] == "role" else f"{int(row['layer'])}.{int(row['head'])}"
            for row in rows.to_dict("records")
        ]
        yield f"{verdict} ({', '.join(dict.fromkeys(names))}): {reason}"


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
        model += f" model.claims={chosen['claims']}" if chosen["claims"] else ""
    table = "composition" if "virtual_heads" in record["tables"] else "heads"
    out.print(f"   {_python()} run.py -m {model} task=ioi,sva,induction analysis=b03,qk", soft_wrap=True)
    out.print(
        f"   {_python()} -c \"import ovqk; print(ovqk.load_results('{results_dir}')['{table}'])\"", soft_wrap=True
    )
    if sync:
        out.print(sync, soft_wrap=True)


def _python() -> str:
    """The interpreter as a person here would type it: a virtual environment below this folder, else `python`."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else "python"


def print_cell_line(name: str, outcome: Outcome, ended: int, expected: int | None, seconds_left: float | None) -> None:
    """One line for a cell of a sweep, as it ends: how many have, what became of it, its time, and what is left."""
    count = f"[{ended}/{expected}]" if expected else f"[{ended}]"
    style = {"done": "green", "cached": "dim", "failed": "red"}[outcome.status]
    line = Text(f"{count} {name}  ")
    line.append(outcome.status, style=style)
    line.append(f"  {outcome.seconds:.1f} s")
    if seconds_left is not None:
        line.append(f"  (about {duration(seconds_left)} left)", style="dim")
    if outcome.error:
        line.append(f"  {outcome.error}")
    _console().print(line, soft_wrap=True)
    if outcome.warning:
        Console(stderr=True, highlight=False).print(Text(outcome.warning), soft_wrap=True)


def progress_console() -> Console:
    """Where the progress of a cell is shown: results alone go to the output."""
    return Console(stderr=True, highlight=False)


def layer_bar(out: Console) -> Progress:
    """A bar over a cell's layers, gone when it is done."""
    columns = TextColumn("{task.description}: layer"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=out, transient=True)


def print_layers(name: str, done: int, count: int, seconds: float) -> None:
    """The same as a line, for a log."""
    left = duration(seconds * (count - done) / done)
    line = f"{name}: {done} of {count} layers in {duration(seconds)}, about {left} left"
    progress_console().print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def print_sweep(
    outcomes: Mapping[int, Outcome],
    expected: Sequence[Sequence[str]] | None,
    details: Mapping[int, str],
    results_dir: Path,
) -> None:
    """The comparison over the sweep's cells, then done / cached / failed / missing with the messages.

    Args:
        outcomes: of the cells that ended, by number.
        expected: the overrides of every cell.
        details: what tells cells of one model, task and analysis apart.
        results_dir: where the results are.
    """
    out = _console()
    ended = list(outcomes.values())
    folders = [Path(outcome.folder) for outcome in ended if outcome.folder]
    if folders:
        claimed = role_table(folders)
        out.print("\n[bold]By role[/bold] (depth: mean over its heads, 0 the first layer and 1 the last)\n")
        out.print(claimed if claimed.row_count else Text("none of these models has claimed heads here", style="dim"))
    if len({outcome.model for outcome in ended if outcome.folder}) > 1:
        out.print("\n[bold]By relative depth[/bold]\n")
        out.print(depth_table(folders))
    missing = [cell for number, cell in enumerate(expected or []) if number not in outcomes]
    counts = [f"{sum(o.status == status for o in ended)} {status}" for status in ("done", "cached", "failed")]
    out.print(f"\n{', '.join(counts)}, {len(missing)} missing; results in {results_dir}", soft_wrap=True)
    for number, outcome in outcomes.items():
        if outcome.status == "failed":
            name = " ".join(filter(None, (outcome.name, details.get(number))))
            out.print(Text(f"failed: {name}: {outcome.error}", style="red"), soft_wrap=True)
    for cell in missing[:SHOWN_MISSING]:
        out.print(Text(f"missing: {' '.join(cell)}", style="red"), soft_wrap=True)
    if missing:
        more = f" ({len(missing) - SHOWN_MISSING} more)" if len(missing) > SHOWN_MISSING else ""
        out.print(f"missing{more}: stopped by the system, or never started. The same command computes them.")
    untracked = sum(outcome.warning is not None for outcome in ended)
    if untracked:
        command = f"{_python()} -m ovqk.tracking {shlex.quote(str(results_dir))}"
        out.print(f"{untracked} not tracked by W&B; later: {command}", soft_wrap=True)


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
