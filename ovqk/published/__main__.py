"""Published numbers beside ovqk's own: `ovqk published [NAME ...]`.

    python -m ovqk.published [NAME ...] [--weights FOLDER] [--hub] [--out FILE]

Each row is a published statement about QK or OV weights, computed again by the functions that cells use. Weights are
looked for in FOLDER, and fetched from the hub only with --hub. NAME chooses rows; it is a model, or MODEL/STATEMENT.
If the command is interrupted, the table holds the rows that were made.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ovqk.config.command_line import tool
from ovqk.errors import UserError, one_message, print_any_text
from ovqk.published.statements import Statement, statements

if TYPE_CHECKING:
    import pandas as pd


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the statements, print each row, and write the table.

    Raises:
        UserError: a name is unknown, or the table cannot be written there.
    """
    print_any_text()
    parser = argparse.ArgumentParser(
        prog=tool("published"), description="Published numbers about QK and OV weights beside ovqk's own."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models, or MODEL/STATEMENT; all unless given")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="a folder of local weights (docs/published.md)")
    parser.add_argument(
        "--hub", action="store_true", help="fetch what FOLDER does not hold, or not whole: up to 26 GB a model"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("published.csv"),
        help="the table, as .csv or .parquet; published.csv unless given",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    if asked.out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out {asked.out}: allowed: a name that ends in .csv or .parquet.")
    if not asked.out.absolute().parent.is_dir():
        raise UserError(f"--out {asked.out}: no such folder: {asked.out.parent}.")
    some = chosen_statements(asked.names)

    from ovqk.published.printing import print_row, print_totals
    from ovqk.published.table import Places, Row, frame, rows

    made = list[Row]()

    def told(row: Row) -> None:
        made.append(row)
        print_row(row)

    try:
        found = rows(some, Places(asked.weights, asked.hub), told)
    except BaseException:
        if made:
            _write(frame(made), asked.out)
            print(f"not finished: {len(made)} of {len(some)} statements are in the table: {asked.out}", file=sys.stderr)
        raise
    _write(frame(found), asked.out)
    print_totals(found, asked.out)
    sys.stdout.flush()


def _write(table: "pd.DataFrame", out: Path) -> None:
    """Write the table as its name's ending says.

    Raises:
        UserError: it cannot be written there.
    """
    from ovqk.whole_files import whole

    try:
        with whole(out, "wb") as file:
            table.to_csv(file, index=False) if out.suffix == ".csv" else table.to_parquet(file, index=False)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}.") from error


def chosen_statements(names: Sequence[str]) -> list[Statement]:
    """Return the statements with these names or about these models; all statements if no name is given.

    Raises:
        UserError: a name belongs to neither a statement nor a model.
    """
    every = statements()
    models = dict.fromkeys(each.subject.name for each in every)
    for name in names:
        if name not in models and name not in {each.name for each in every}:
            of_model = [each.name for each in every if each.subject.name == name.partition("/")[0]]
            allowed = ", ".join(of_model or models)
            raise UserError(f"published {name}: no such statement or model; allowed: {allowed}.")
    return [each for each in every if not names or each.name in names or each.subject.name in names]


if __name__ == "__main__":
    main()
