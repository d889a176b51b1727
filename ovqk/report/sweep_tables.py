"""Tables that compare the cells of a sweep, for the terminal."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.text import Text

from ovqk import wording
from ovqk.records import comparison
from ovqk.records.record import read_record, says_done
from ovqk.records.results import load_table
from ovqk.records.steps import twins
from ovqk.report.fitted_table import CORE, Column, FittedTable
from ovqk.report.terminal_tables import STYLES, ranking_legend, rounded, sweep_candidate_table


def candidates_table(folders: Sequence[Path]) -> FittedTable:
    """Return a table with the strongest heads for each role in the cells without claimed heads."""
    return sweep_candidate_table(_unclaimed(folders))


def candidates_legend(folders: Sequence[Path]) -> str:
    """Return what the metrics mean that rank these cells' candidates."""
    return ranking_legend(candidates for _, _, candidates in _unclaimed(folders))


def _unclaimed(folders: Sequence[Path]) -> list[tuple[str, str, pd.DataFrame]]:
    """Return (task, model, candidates) for the cells without claimed heads."""
    cells = []
    for folder in folders:
        record, candidates = read_record(folder), load_table(folder, "candidates")
        if record is not None and candidates is not None and len(candidates):
            cells.append((record["task"], record["model"], candidates))
    return cells


def role_table(folders: Sequence[Path]) -> FittedTable:
    """Return a table with a row for each role and model: its heads' depth, effect, verdict; empty without claims."""
    rows = comparison.roles(folders).to_dict("records")
    several = any(row["cell"] for row in rows)
    ran = any("on_prompts" in row for row in rows)
    table = FittedTable(
        [
            Column("task", None, text=True, place=True),
            Column("analysis", None, text=True, place=True),
            Column("role", None, text=True),
            Column("model", None, text=True),
            *[Column("cell", None, text=True, wraps_at=12)] * several,
            Column("heads", 30),
            Column("depth", 10),
            Column("primary metric", 50, text=True),
            Column("AUC in layer", CORE),
            Column("p", CORE + 1),
            Column("verdict", None, text=True),
            Column("of its heads", 60, text=True, wraps_at=18),
            *[Column("on prompts", 70, text=True, wraps_at=18)] * ran,
        ],
        "the report and ovqk.load_results",
    )
    for row in rows if any(row["role"] for row in rows) else []:
        place = [row["task"], row["analysis"], wording.role(row["role"]), row["model"], *[row["cell"]] * several]
        if not row["role"]:
            table.add_row(*place, *[""] * 5, Text(row["verdict"], style="dim"))
            continue
        table.add_row(
            *place,
            str(row["heads"]),
            rounded(row["depth"]),
            row["primary"] or "",
            rounded(row["effect"]),
            rounded(row["p"], digits=3),
            Text(wording.verdict(row["verdict"]), style=STYLES.get(row["verdict"], "dim")),
            ", ".join(f"{n} {wording.verdict(verdict)}" for verdict, n in row["of_its_heads"].items()),
            *([wording.counts(row["on_prompts"], wording.ON_PROMPTS)] if ran else []),
        )
    return table


def depth_table(folders: Sequence[Path]) -> FittedTable:
    """Return a table with a row for each metric and model: means over heads by quarter of the relative depth."""
    names = [Column("metric, mean over heads", None, text=True, wraps_at=20), Column("model", None, text=True)]
    table = FittedTable([*names, *(Column(title, CORE) for title in comparison.QUARTERS)], "heads.parquet")
    rows = comparison.depths(folders).to_dict("records")
    models = {row["model"] for row in rows}
    same = twins(record for folder in folders if (record := read_record(folder)) and says_done(record))
    varied = [  # one model both folded and raw, or different weights under one name
        key for key in ("processing", "weights") if len({(row["model"], row[key]) for row in rows}) > len(models)
    ]
    for row in rows:
        model = f"{row['model']} ({', '.join(row[key] for key in varied)})" if varied else row["model"]
        model += f" (= {same[row['model']]})" if row["model"] in same else ""
        table.add_row(row["metric"], model, *(rounded(row[title]) for title in comparison.QUARTERS))
    return table
