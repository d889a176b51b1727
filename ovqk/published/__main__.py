"""Published numbers beside ovqk's own: `ovqk published [NAME ...]`.

    python -m ovqk.published [NAME ...] [--weights FOLDER] [--hub] [--out FILE]

Each row is a published statement about QK or OV weights, computed again by the functions that cells use. Weights are
looked for in FOLDER, and fetched from the hub only with --hub. NAME chooses rows; it is a model, or MODEL/STATEMENT.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ovqk.config.command_line import tool
from ovqk.errors import UserError, one_message, print_any_text
from ovqk.published.statements import Statement, statements


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
        "--hub", action="store_true", help="fetch from the hub what is not in FOLDER: up to 26 GB a model"
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
    from ovqk.published.table import Places, frame, rows
    from ovqk.whole_files import whole

    found = rows(some, Places(asked.weights, asked.hub), print_row)
    table = frame(found)
    try:
        with whole(asked.out, "wb") as file:
            table.to_csv(file, index=False) if asked.out.suffix == ".csv" else table.to_parquet(file, index=False)
    except OSError as error:
        raise UserError(f"--out {asked.out}: {error.strerror}.") from error
    print_totals(found, asked.out)
    sys.stdout.flush()


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
