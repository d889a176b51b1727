"""`python -m ovqk`: the command `ovqk`, see `ovqk.command`."""

from ovqk.command import run

if __name__ == "__main__":
    run()
