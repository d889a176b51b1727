"""docs/published.md from the statements and their results:  python scripts/published.py --weights FOLDER"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ovqk.published.printing import print_row
from ovqk.published.statements import Statement, statements
from ovqk.published.table import BOUNDS, HUB, Places, Row, printed, rows

PAGE = Path(__file__).parents[1] / "docs" / "published.md"
OPENING = """# Published numbers, computed again

Before new numbers are trusted, published ones should come out. `ovqk published` computes published statements about QK
and OV weights by the functions that cells use, and prints ovqk's value beside each published one. The page
comes from `python scripts/published.py --weights FOLDER`; the rules by which a value agrees are in
[the tests](method.md#published-values).

    ovqk published --weights FOLDER              # all that can be computed from local weights; writes published.csv
    ovqk published gpt2 --hub --out gpt2.parquet # one model, fetched from the hub

`python -m ovqk.published` and `python run.py published` are the same command. Each row of the table holds model,
definition, published value, tolerance, source, what it needs, ovqk's value, and the result: `reproduced`, `differs` or
`not runnable here`, with the reason. FOLDER holds models under the names [below](#weights); a model that is not there,
or that lacks a part which a statement needs, is fetched with `--hub`, and otherwise its rows say so. The statements
are data, in `ovqk/published/statements.yaml`. If the command is interrupted, the table holds the rows that were made.

Files of another model under a model's name are not compared with its values: layers, heads, width, vocabulary (within
5 %, or 1 % of at most 1,000 tokens) and family must be those in `ovqk/weights/known.yaml`, or the rows are
`not runnable here`. A fine-tune has the same sizes. The column `identified` says what a row rests on: `SHA-256` if the
file is the published one, `repository` if it came from the model's own on the hub, `sizes alone` otherwise, with the
numbers of tokens if they differ; the column `sha256` holds the files' digests.
"""


def page(found: Sequence[Row]) -> str:
    """Return the page."""
    counts: Counter[str] = Counter(row.result for row in found)
    told = ", ".join(f"{counts[result]} {what}" for result, what in RESULTS.items())
    parts = [OPENING, f"On the machine that wrote this page: {told}, of {len(found)} statements.\n"]
    parts.append(
        "## Computed\n\n| statement | quantity | published | ovqk | result | source |\n|---|---|---|---|---|---|"
    )
    parts += [computed(row) for row in found if row.value is not None and row.statement.kind == "published"]
    if reasons := [f"- `{row.statement.name}`: {row.reason}." for row in found if row.value is not None and row.reason]:
        parts.append("\nHow these differ from their sources, or why:\n\n" + "\n".join(reasons))
    parts.append(
        "\n### No publication's\n\nA separate script computed these once from the same weights.\n\n"
        "| statement | quantity | script | ovqk | result |\n|---|---|---|---|---|"
    )
    parts += [computed(row, source=False) for row in found if row.value is not None and row.statement.kind == "checked"]
    parts.append("\n## Not runnable here\n\n| statement | published | needs | why | source |\n|---|---|---|---|---|")
    parts += [missing(row) for row in found if row.value is None]
    parts.append(
        "\n## Definitions\n\n" + "\n".join(f"- **{quantity}**: {formula}." for quantity, formula in definitions(found))
    )
    parts.append(
        "\n## Files\n\nWhat the values above were computed on, and what shows that it is the model.\n\n"
        "| model | identified by | SHA-256 |\n|---|---|---|"
    )
    parts += list(dict.fromkeys(files(row) for row in found if row.value is not None))
    parts.append("\n## Weights\n\n| model | below FOLDER | on the hub | origin |\n|---|---|---|---|")
    subjects = {row.statement.subject.name: row.statement.subject for row in found}
    parts += [
        f"| {name} | {' or '.join(f'`{each}`' for each in of.local)} | {of.choice or ''} | {of.origin} |"
        for name, of in subjects.items()
    ]
    return "\n".join(parts) + "\n"


RESULTS = {"reproduced": "reproduced", "differs": "different", "not runnable here": "not runnable"}


def computed(row: Row, source: bool = True) -> str:
    """Return the line of a row with a value."""
    statement = row.statement
    cells = [f"`{statement.name}`", statement.quantity, published(statement), printed(row), row.result]
    return f"| {' | '.join([*cells, *([cited(statement)] if source else [])])} |"


def missing(row: Row) -> str:
    """Return the line of a row without a value."""
    statement = row.statement
    why = "no weights here, and not fetched" if row.reason == HUB else row.reason
    return (
        f"| `{statement.name}` | {published(statement)} | {', '.join(statement.needs)} | {why} | {cited(statement)} |"
    )


def files(row: Row) -> str:
    """Return the line of a row's weights: the model, what shows that they are its, and their digests."""
    return f"| {row.statement.subject.name} | {row.identified} | {row.sha256} |"


def published(statement: Statement) -> str:
    """Return the published value with its tolerance or bound."""
    within = "" if statement.tolerance is None else f" ± {statement.tolerance:g}"
    return BOUNDS[statement.relation] + statement.value + within


def cited(statement: Statement) -> str:
    """Return the source with the place in it."""
    return f"{statement.source}, {statement.place}" if statement.place else statement.source


def definitions(found: Sequence[Row]) -> list[tuple[str, str]]:
    """Return each quantity with its definition, once."""
    return list(dict.fromkeys((row.statement.quantity, row.statement.definition) for row in found))


def main() -> None:
    """Compute all statements and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--hub", action="store_true")
    asked = parser.parse_args()
    PAGE.write_text(page(rows(statements(), Places(asked.weights, asked.hub), print_row)), encoding="utf-8")


if __name__ == "__main__":
    main()
