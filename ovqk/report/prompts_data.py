"""The page's data for a cell that ran its model on prompts, as JSON."""

from collections.abc import Iterable, Sequence

from ovqk import wording
from ovqk.figures import colours, prompts
from ovqk.records import on_prompts
from ovqk.records.cells import Cell, Heads, Json
from ovqk.report.on_prompts import effects_lines, prompts_lines
from ovqk.report.thinning import Detail, Pool, columnar, short


def ran(cell: Cell) -> bool:
    """Say whether a cell's analysis runs the model."""
    return cell.record.get("activations") is not None


def prompt_words(cells: Iterable[Cell]) -> Json:
    """Return the words about prompts that the page needs; none if no cell ran its model."""
    if not any(map(ran, cells)):
        return {}
    return {
        "on_prompts": wording.ON_PROMPTS,
        "readings": wording.READINGS,
        "found": wording.FOUND,
        "prompt_columns": wording.PROMPT_COLUMNS,
        "prompt_shares": wording.PROMPT_SHARES,
        "prompt_legend": wording.PROMPT_LEGEND,
    }


def prompt_palette(cells: Iterable[Cell]) -> Json:
    """Return marks and colours for verdicts on prompts, and for heads; none if no cell ran its model."""
    if not any(map(ran, cells)):
        return {}
    return {"on_prompts": colours.ON_PROMPTS, "found": colours.FOUND, "found_markers": colours.FOUND_MARKERS}


def prompt_data(cell: Cell, detail: Detail, marked: Heads, pool: Pool) -> Json:
    """Return a cell's `on_prompts`, `prompt_heads` and `prompt_values`; nothing if it did not run its model."""
    if not ran(cell):
        return {}
    record, tables = cell.record, cell.tables
    block = record["activations"]
    found: Json = {
        "on_prompts": {
            "lines": [
                *prompts_lines(block),
                *effects_lines(record, tables.get("activations"), tables.get("roles")),
            ],
            "testing": block.get("halves", {}).get(on_prompts.TESTING),
            "untestable": block.get("untestable", ""),
            "readings": on_prompts.readings(tables["joint"]) if "joint" in tables else [],
            "plot": PLOT,
            "rankings": [_ranking(ranking, pool) for ranking in on_prompts.rankings(record, tables)],
            "pictures": {},
        }
    }
    if {"joint", "roles"} <= tables.keys():
        heads = on_prompts.head_table(tables["joint"], tables["roles"])
        if len(heads):
            found["prompt_heads"] = columnar(heads, pool)
    if "activations" in tables:
        values = on_prompts.head_values(tables["activations"])
        roles: Sequence[str] = list(dict.fromkeys(values["role"]))
        found["on_prompts"]["pictures"] = {role: on_prompts.pictures(record, role) for role in roles}
        if detail.partners is not None:
            kept = [place in marked for place in zip(values["layer"], values["head"], strict=True)]
            values = values[kept]
        found["prompt_values"] = columnar(values, pool)
    return found


PLOT = (278, 238)
"""The size of the page's scatter plots inside their axes, in pixels."""
LETTER = (7 / 72, 12 / 72)
"""The size of a letter in their names, in inches."""


def _ranking(ranking: on_prompts.Ranking, pool: Pool) -> Json:
    points = ranking.points
    there = points.dropna(subset=["weights", "prompts"])
    across, upwards = prompts.limits(there) if len(there) else ((0.0, 1.0), (0.0, 1.0))
    names = prompts.names_beside(there, (PLOT[0] / 72, PLOT[1] / 72), LETTER) if len(there) else ()
    return {
        "role": ranking.role,
        "titles": ranking.titles,
        "quantity": ranking.quantity,
        "says": ranking.says,
        "limits": [[short(end) for end in ends] for ends in (across, upwards)],
        "names": {
            f"{int(row['layer'])}.{int(row['head'])}": [round(72 * x), round(72 * y), far] for row, (x, y, far) in names
        },
        "layer": pool.add([int(layer) for layer in points["layer"]]),
        "head": pool.add([int(head) for head in points["head"]]),
        "x": pool.add([short(value) for value in points["weights"]]),
        "y": pool.add([short(value) for value in points["prompts"]]),
        "found": pool.add(points["found"].to_list()),
    }
