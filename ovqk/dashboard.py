"""`python -m ovqk.dashboard`: see `ovqk.tracking.dashboard`."""

from ovqk.tracking.dashboard import main

if __name__ == "__main__":
    main()
