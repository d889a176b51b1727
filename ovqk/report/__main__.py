"""One page that shows a results folder, and its figures as files.

    python -m ovqk.report RESULTS_DIR [--out FILE] [--figures | --no-figures]

RESULTS_DIR is the folder that cells were written to. If it is a model's, a task's or a cell's folder inside, the page
shows these cells alone. It writes RESULTS_DIR/report.html, which needs no network and no other file, and
RESULTS_DIR/figures/ with the same figures as SVG and PNG. Figures from an earlier report are removed if this report
does not make them; other files in that folder stay. Only records and tables are read, and the same records give the
same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ovqk.config.command_line import tool
from ovqk.errors import one_message, print_any_text, printable
from ovqk.report.write import write_report


def _print(line: str) -> None:
    print(printable(line), file=sys.stderr if line.startswith("without ") else sys.stdout, flush=True)


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report on a results folder."""
    print_any_text()
    parser = argparse.ArgumentParser(prog=tool("report"), description="One page that shows a folder of results.")
    parser.add_argument(
        "results_dir", type=Path, help="the folder that cells were written to, or a model's folder inside it"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; RESULTS_DIR/report.html unless given")
    parser.add_argument(
        "--figures", action=argparse.BooleanOptionalAction, default=True,
        help="also write the figures, as SVG and PNG, to `figures` beside the page",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    write_report(chosen.results_dir, chosen.out, chosen.figures, _print)


if __name__ == "__main__":
    main()
