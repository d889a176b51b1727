"""`python -m ovqk`, and the installed command `ovqk`: see `ovqk.command`, which takes a moment to import."""

from ovqk.interrupts import stop_while_importing


def main() -> None:
    """Run the command line."""
    stop_while_importing()
    from ovqk.command import run

    run()


if __name__ == "__main__":
    main()
