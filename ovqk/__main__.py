"""`python -m ovqk`, and the installed command `ovqk`: see `ovqk.command`, which takes a moment to import."""

import importlib.util
import sys

from ovqk.errors import UserError, one_message
from ovqk.interrupts import stop_while_importing


def main() -> None:
    """Run the command line."""
    stop_while_importing()
    if importlib.util.find_spec("hydra") is None:  # any Python may start a checkout's run.py
        with one_message():
            raise UserError(
                f"{sys.executable} lacks the packages that ovqk needs. If they are in .venv, as after make demo, "
                "type first: source .venv/bin/activate"
            )
    from ovqk.command import run

    run()


if __name__ == "__main__":
    main()
