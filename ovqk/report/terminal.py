"""The terminal's output: a cell's claimed heads, a sweep's comparison, and where the results are."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column as RichColumn
from rich.text import Text

from ovqk import wording
from ovqk.config.command_line import program, python, send_command, tool
from ovqk.config.schema import TrackingConfig
from ovqk.errors import printable
from ovqk.metrics import NOT_APPLICABLE
from ovqk.records.outcomes import Outcome
from ovqk.records.record import read_record, read_tracking, says_done
from ovqk.records.relation_pairs import relation_legend, relation_lines
from ovqk.records.results import load_table
from ovqk.records.role_tests import further_predictions
from ovqk.records.steps import said, shared_steps
from ovqk.report.cycles import print_cycles
from ovqk.report.on_prompts import (
    attending_lines,
    effects_lines,
    prompt_reasons,
    prompts_lines,
    prompts_table,
    role_reasons,
)
from ovqk.report.suggestions import next_arguments
from ovqk.report.sweep_tables import candidates_legend, candidates_table, depth_table, role_table
from ovqk.report.terminal_tables import (
    candidate_table,
    claimed_pairs,
    column_legend,
    found_line,
    has_spread,
    layer_table,
    pair_table,
    ranking_legend,
    reasons,
    rounded,
    verdict_table,
    virtual_table,
)
from ovqk.report.token_lists import describe, leading_eigenvalues

SHOWN_TOKENS = 4  # tokens on each side of a component
SHOWN_HEADS = 8  # heads whose tokens are listed
SHOWN_MISSING = 20  # a sweep's missing cells that are named
LOG_WIDTH = 150  # a table's width if the output is not a terminal
NARROW, WIDE = 80, 100  # a bar has no name below the first, and names what it does not count from the second on
NOTEBOOK_WIDTH = 110  # a table's width in a notebook's cell


def output_console() -> Console:
    """Return the console for results, as wide as the terminal.

    Without a terminal it is as wide as COLUMNS says. If COLUMNS is not set, it has NOTEBOOK_WIDTH in a notebook and
    LOG_WIDTH elsewhere. FORCE_COLOR colours a pipe, and does not change its width.
    """
    if sys.stdout.isatty():
        return Console(highlight=False)
    columns = os.environ.get("COLUMNS", "")
    known = int(columns) if columns.isdecimal() and int(columns) > 0 else None
    return Console(highlight=False, width=known or (NOTEBOOK_WIDTH if "JPY_PARENT_PID" in os.environ else LOG_WIDTH))


def _say(out: Console, line: str, style: str = "") -> None:
    """Print a sentence: broken at words in a terminal, one line in a file or a pipe."""
    out.print(printable(line), style=style, markup=False, soft_wrap=not sys.stdout.isatty())


def print_cell(folder: Path, cached: bool) -> None:
    """Print a finished cell: its claimed heads, unavailable metrics, where its files are, and next commands."""
    record = read_record(folder)
    heads, verdicts = load_table(folder, "heads"), load_table(folder, "verdicts")
    if record is None or heads is None:
        return
    out = output_console()
    summary = record["summary"]
    where = f"{summary['n_layers']} layers, {summary['n_heads']} heads, weights {record['processing']['applied']}"
    state = "done before, read from its record" if cached else f"{record['provenance']['wall_seconds']:.1f} s"
    out.print(f"\n[bold]{record['model']}[/bold] / {record['task']} / {record['analysis']}: {where} ({state})\n")
    if verdicts is None:
        out.print(f"No verdicts: {record['claims']['none']}. Means over the heads of each layer:\n")
        means = layer_table(heads)
        out.print(means)
        out.print(f"{column_legend(heads, means.titles(out.width))}\n", style="dim")
    else:
        _print_directions(out, folder, heads, verdicts)
    print_pairs(out, folder)
    _print_notes(out, record)
    if verdicts is None:
        _print_candidates(out, folder)
    else:
        out.print(f"\n{claims_line(record['claims'], record['model'])}")
        out.print(f"{found_line(verdicts)}\n", style="bold")
        table = verdict_table(heads, verdicts)
        out.print(table)
        for line in reasons(heads, verdicts, table.titles(out.width)):
            out.print(line, style="dim")
        _print_further(out, folder, record)
    relations = load_table(folder, "relations")
    if relations is not None and (lines := relation_lines(relations)):
        out.print()
        _say(out, relation_legend(relations), "dim")
        for line in lines:
            _say(out, f"  {line}")
    cycles = load_table(folder, "cycles")
    if cycles is not None:
        print_cycles(out, cycles, record["summary"])
    _print_on_prompts(out, folder, record)
    _print_places(out, folder, record)


def _print_notes(out: Console, record: Mapping[str, Any]) -> None:
    """Print the unavailable metrics, the notes, and the words that were left out, each with its reason."""
    for reason, names in grouped(record["unavailable"]).items():
        if reason.startswith(NOT_APPLICABLE):
            continue
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more (see record.json)" if len(names) > 4 else "")
        _say(out, f"unavailable ({reason}): {shown}", "dim")
    for note in record["notes"]:
        _say(out, f"note: {note}", "dim")
    for line in words_lines(record["words"]):
        _say(out, line, "dim")


def words_lines(words: Mapping[str, Any]) -> list[str]:
    """Return lines on each word set of which words were left out: how many, why, and how many are read."""
    found = []
    for name, dropped in words["reasons"].items():
        for reason, some in grouped(dropped).items():
            verb = "is" if len(some) == 1 else "are"
            found.append(f"{wording.counted(len(some), 'word')} of '{name}' {verb} left out: {reason}")
        if dropped:
            found.append(f"{wording.counted(words['kept'][name], 'word')} of '{name}' are read")
    return found


def claims_line(claims: Mapping[str, str], model: str) -> str:
    """Return the line on the claims: the model they are about, and their source."""
    of = "Claims" if claims["of"] == model else f"Claims of {claims['of']}, applied to {model}"
    note = f" - {claims['note']}" if "note" in claims else ""
    return f"{of}: {claims['source']} ({claims['reliability']}){note}"


def _print_directions(out: Console, folder: Path, heads: pd.DataFrame, verdicts: pd.DataFrame) -> None:
    """Print the tokens that each claimed head's circuits read and write, by their leading singular components."""
    table, spectra = load_table(folder, "directions"), load_table(folder, "spectra")
    if table is None or not len(table):
        return
    table = table[table["component"] == 0]
    claimed = verdicts[verdicts["kind"] == "head"][["layer", "head"]].astype(int).drop_duplicates().to_numpy().tolist()
    indexed = heads.set_index(["layer", "head"])
    legend = "in brackets, each list's contrast: its mean score over the standard deviation of all tokens' scores."
    out.print(f"Leading component of each circuit, as tokens; {legend}", style="dim")
    for layer, head in claimed[:SHOWN_HEADS]:
        values = "" if spectra is None else leading_eigenvalues(spectra, "ov", layer, head)
        if "ov_copying" in heads and values:
            said = f"OV copying {rounded(indexed.at[(layer, head), 'ov_copying'])}: eigenvalues over the vocabulary"
            out.print(Text(f"  {layer}.{head}  {said} {values}, ...", style="dim"))
        for line in describe(table, layer, head, shown=SHOWN_TOKENS, kinds=("singular",)):
            out.print(Text(f"  {layer}.{head}  {line}", style="dim"))
    more = f"{len(claimed) - SHOWN_HEADS} more heads, " if len(claimed) > SHOWN_HEADS else ""
    out.print(f"  {more}further and eigen components: directions.parquet, and the report", style="dim")


def _print_further(out: Console, folder: Path, record: dict[str, Any]) -> None:
    """Print which predictions beside the primary ones were tested, and where their numbers are."""
    tests = load_table(folder, "tests")
    if tests is not None and (found := further_predictions(tests, record)):
        where = 'in tests.parquet, and on the page\'s circuit under "against the nulls"'
        out.print(Text(f"Further predictions, {where}: {'; '.join(found)}."), style="dim")


def _print_on_prompts(out: Console, folder: Path, record: dict[str, Any]) -> None:
    """Print the heads' quantities and verdicts on prompts, if the analysis ran the model."""
    if record.get("activations") is None:
        return
    out.print()
    for line in prompts_lines(record["activations"]):
        _say(out, line)
    joint, roles = load_table(folder, "joint"), load_table(folder, "roles")
    if joint is not None and roles is not None and (joint["kind"] == "head").any():
        out.print()
        out.print(prompts_table(joint, roles))
        out.print(wording.PROMPT_LEGEND, style="dim")
        activations = load_table(folder, "activations")
        for line in (*effects_lines(record, activations, roles), *attending_lines(record, activations, roles)):
            _say(out, line)
        for line in (*role_reasons(joint), *prompt_reasons(roles)):
            _say(out, line, "dim")


def print_pairs(out: Console, folder: Path) -> None:
    """Print the strongest compositions and virtual heads, if all pairs of heads were composed."""
    virtual, composition = load_table(folder, "virtual_heads"), load_table(folder, "composition")
    if virtual is None or composition is None:
        return
    out.print("\nStrongest compositions, whatever the task (more of them: composition.parquet)\n")
    out.print(pair_table(composition))
    claimed = claimed_pairs(composition, load_table(folder, "verdicts"))
    if len(claimed):
        out.print("\nStrongest compositions between heads claimed for different roles\n")
        out.print(pair_table(claimed))
    out.print(
        "above random: score minus that of random weights. in layer: percentile of the sender in its layer. matching: "
        "1 if the receiver looks for its own token moved by the sender (K).",
        style="dim",
    )
    out.print("\nStrongest virtual heads (more of them: virtual_heads.parquet)\n")
    out.print(virtual_table(virtual))
    out.print(
        "share: the pair's part of all that the receiver's values read from earlier heads. OV copying: the pair's.",
        style="dim",
    )


def _print_candidates(out: Console, folder: Path) -> None:
    """Print the strongest heads for each role, if no circuit is claimed."""
    found = load_table(folder, "candidates")
    if found is None or not len(found):
        return
    out.print("\nCandidates, not verdicts: the heads are chosen for being the strongest.\n")
    out.print(candidate_table(found))
    out.print(ranking_legend([found]), style="dim")
    out.print(
        "z: distance from the median head of the model, in standard deviations (from the MAD) and in the predicted "
        "direction. gap: distance from the next head; 0 if it ties. Both are empty if most heads have one value. "
        * has_spread(found)
        + "in layer: share of the layer's other heads that are lower; if ↓ is predicted, 0% is the strongest.",
        style="dim",
    )
    _say(out, wording.CANDIDATES_WORTH, "dim")


def _print_places(out: Console, folder: Path, record: Mapping[str, Any]) -> None:
    """Print where the results are, and suggested commands."""
    tracking = read_tracking(folder)
    results_dir = folder.parents[2]
    place = shlex.quote(str(results_dir))
    out.print(f"\nrecord: {folder}", soft_wrap=True)
    send = f"{tool('track')} {place}"
    if says_done(tracking) and tracking.get("directory"):
        project = tracking.get("project", TrackingConfig.project)
        named = "" if project == TrackingConfig.project else f", for the project {project}"
        out.print(f"W&B (offline{named}): {results_dir / tracking['directory']}", soft_wrap=True, markup=False)
        send = send_command(results_dir)
    elif says_done(tracking):
        send = ""
        out.print(f"W&B: {tracking.get('url') or 'run ' + tracking['run_id']}", soft_wrap=True)
    else:
        out.print("W&B: not tracked" + (f" ({tracking['reason']})" if "reason" in tracking else ""), soft_wrap=True)
    arguments = next_arguments(folder, record)
    table = "composition" if "virtual_heads" in record["tables"] else "heads"
    code = f"import ovqk; print(ovqk.load_results({str(results_dir)!r})[{table!r}])"
    quoted = shlex.quote(code) if set(str(results_dir)) & set("\"'$`\\") else f'"{code}"'
    commands = {
        f"{tool('report')} {place}": "the page of all heads",
        f"{program()} {arguments}" if arguments else "": "",
        f"{python()} -c {quoted}": "",
        send: "to W&B, with the network",
    }
    out.print("next:")
    for command, why in commands.items():
        if command:
            out.print(Text(f"   {command}").append(f"   # {why}" if why else "", style="dim"), soft_wrap=True)


def print_cell_line(name: str, outcome: Outcome, ended: int, expected: int | None, seconds_left: float | None) -> None:
    """Print a line when a sweep's cell ends: the count so far, its outcome, its time, and the time left.

    If the cell failed, its message is printed on a second line, and nowhere else.
    """
    count = f"[{ended}/{expected}]" if expected else f"[{ended}]"
    style = {"done": "green", "cached": "dim", "failed": "red"}[outcome.status]
    line = Text(f"{count} {name}  ")
    line.append(outcome.status, style=style)
    line.append(f"  {outcome.seconds:.1f} s")
    if seconds_left is not None:
        line.append(f"  (about {duration(seconds_left)} left)", style="dim")
    if outcome.error:
        line.append(f"\n    {outcome.error}")
    output_console().print(line, soft_wrap=True)
    if outcome.warning:
        Console(stderr=True, highlight=False).print(Text(outcome.warning), soft_wrap=True)


def progress_console() -> Console:
    """Return the console for progress: only results go to the standard output."""
    return Console(stderr=True, highlight=False)


class TimeLeft(TimeRemainingColumn):
    """The time left for a bar's steps, or what its task's fields say: `left` in seconds, and `without`, in words."""

    def __init__(self, width: int) -> None:
        """Take the terminal's width: if it is small, `without` is one word or a sign."""
        super().__init__(compact=True, table_column=RichColumn(no_wrap=True, min_width=5))
        self.short = "+" if width < NARROW else " + more" if width < WIDE else ""

    def render(self, task: Task) -> Text:
        """Return minutes and seconds, hours too if there are any."""
        if task.fields.get("left") is None:
            return super().render(task)
        minutes, seconds = divmod(round(task.fields["left"]), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
        without = task.fields.get("without", "")
        without = self.short or without if without else ""
        return Text(clock, style="progress.remaining").append(without, style="dim")


def cell_bar(out: Console) -> Progress:
    """Return a bar over a cell's steps, which disappears when the cell is done.

    If the terminal is narrow, the cell's name is shortened first, and below NARROW columns name and bar are left out. A
    task of the bar has that name in its field `name`.
    """
    said = TextColumn("{task.description}", table_column=RichColumn(no_wrap=True))
    left = TextColumn("left"), TimeLeft(out.width)
    if out.width < NARROW:
        return Progress(said, *left, console=out, transient=True)
    name = TextColumn("{task.fields[name]}", table_column=RichColumn(no_wrap=True, overflow="ellipsis", ratio=1))
    columns = name, said, BarColumn(bar_width=8), *left
    return Progress(*columns, console=out, transient=True, expand=True)


def print_steps(
    name: str,
    done: int,
    count: int,
    seconds: float,
    follows: str = "",
    at_most: bool = False,
    whole: float | None = None,
) -> None:
    """Print a line for a log that says how many steps are done: layers, prompt batches, or null draws.

    `whole` is the time left, in seconds, if it is known for more than these steps.
    """
    left = duration(seconds * (count - done) / done if whole is None else whole)
    of, about = ("of at most", "at most") if at_most else ("of", "about")
    line = f"{name} {done:,} {of} {count:,} in {duration(seconds)}, {about} {left} left{follows}"
    progress_console().print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def print_sweep(
    outcomes: Mapping[int, Outcome],
    expected: Sequence[Sequence[str]] | None,
    details: Mapping[int, str],
    results_dir: Path,
    interrupted: bool = False,
) -> None:
    """Print the comparison over the sweep's cells and the counts by status, and name the failed and the missing.

    Args:
        outcomes: the ended cells' outcomes, by number.
        expected: every cell's overrides.
        details: overrides that tell cells apart if they share model, task and analysis.
        results_dir: the results folder.
        interrupted: whether Ctrl-C ended the sweep.
    """
    out = output_console()
    ended = list(outcomes.values())
    folders = [Path(folder) for folder in dict.fromkeys(outcome.folder for outcome in ended) if folder]
    if folders:
        claimed, unclaimed = role_table(folders), candidates_table(folders)
        if claimed.row_count or not unclaimed.row_count:
            out.print("\n[bold]By role[/bold] (depth: mean over its heads, 0 the first layer and 1 the last)\n")
            nothing = Text("none of these models has claimed heads here", style="dim")
            out.print(claimed if claimed.row_count else nothing)
        if unclaimed.row_count:
            out.print("\n[bold]Candidates, not verdicts[/bold]: no heads are claimed; these are the strongest\n")
            out.print(unclaimed)
            out.print(candidates_legend(folders), style="dim")
            _say(out, wording.CANDIDATES_WORTH, "dim")
    if len({outcome.model for outcome in ended if outcome.folder}) > 1:
        out.print("\n[bold]By relative depth[/bold]\n")
        out.print(depth_table(folders))
    for group in shared_steps(record for folder in folders if (record := read_record(folder)) and says_done(record)):
        out.print(Text(f"\nnote: {said(group)}", style="yellow"), soft_wrap=True)
    if said_words := _left_out_line(folders):
        out.print(Text(f"\nnote: {said_words}", style="dim"), soft_wrap=True)
    missing = [cell for number, cell in enumerate(expected or []) if number not in outcomes]
    counts = [f"{sum(o.status == status for o in ended)} {status}" for status in ("done", "cached", "failed")]
    out.print(f"\n{', '.join(counts)}, {len(missing)} missing; results in {results_dir}", soft_wrap=True)
    if folders:
        out.print(f"next: {tool('report')} {shlex.quote(str(results_dir))}   # the page of all cells", soft_wrap=True)
    for number, outcome in outcomes.items():
        if outcome.status == "failed":
            name = " ".join(filter(None, (outcome.name, details.get(number))))
            out.print(Text(f"failed: {name} (its message is above)", style="red"), soft_wrap=True)
    for cell in missing[:SHOWN_MISSING]:
        out.print(Text(f"missing: {' '.join(cell)}", style="red"), soft_wrap=True)
    if missing:
        more = f" ({len(missing) - SHOWN_MISSING} more)" if len(missing) > SHOWN_MISSING else ""
        by = "you" if interrupted else "the system"
        out.print(f"missing{more}: stopped by {by}, or never started. The same command computes them.")
    untracked = sum("reason" in read_tracking(folder) for folder in folders)  # failed, or not tried after a failure
    if untracked:
        command = f"{tool('track')} {shlex.quote(str(results_dir))}"
        out.print(f"{untracked} not tracked by W&B; later: {command}", soft_wrap=True)


def _left_out_line(folders: Sequence[Path]) -> str | None:
    """Return a line that counts the words left out of each model's task; None if there are none."""
    counts: dict[str, int] = {}
    for folder in folders:
        record = read_record(folder)
        if record is not None and says_done(record):
            words = sum(len(dropped) for dropped in record.get("words", {}).get("reasons", {}).values())
            counts |= {f"{record['model']} / {record['task']} {words}": words} if words else {}
    if not counts:
        return None
    return f"words left out, with reasons in record.json: {', '.join(counts)}"


def grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return reason -> the metrics that are unavailable for it."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found
