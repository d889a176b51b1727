"""Compute one cell, or with -m a sweep of them:  python run.py -m model=gpt2,gpt2-medium task=ioi,sva

The installed command `ovqk` does the same; see `ovqk/command.py`.
"""

from ovqk.__main__ import main

if __name__ == "__main__":
    main()
