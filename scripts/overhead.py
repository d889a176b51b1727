"""What a cell of a sweep costs beyond its computation: composing its config, locking, recording, W&B.

    python scripts/overhead.py                         # 200 cells of a tiny model, without W&B and with it, offline
    python scripts/overhead.py --cells 20 --tracking none

Each sweep runs in this process, after torch and the like are imported; `analyse` is timed inside it, and everything
else, from Hydra's first composition to the comparison at the end, is divided by the number of cells.
"""

import argparse
import contextlib
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from ovqk import cell

RUN = Path(__file__).parents[1] / "run.py"


class Stopwatch:
    """Calls a function, and adds up the time spent in it, by the clock and of this process."""

    def __init__(self, function: Any) -> None:
        self.function, self.wall, self.cpu = function, 0.0, 0.0

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return self.function(*arguments, **keys)
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


def measure(model: Path, cells: int, tracking: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor that a cell of a sweep takes beside `analyse`.

    Raises:
        SystemExit: a cell failed.
    """
    analyse, cell.analyse = cell.analyse, Stopwatch(cell.analyse)
    overrides = ["model=local", f"model.path={model}", "task=none", f"seed=range({cells})", f"tracking={tracking}"]
    sys.argv = ["run.py", "-m", *overrides, f"results_dir={tracking}"]
    whole = Stopwatch(runpy.run_path)
    try:
        with Path("printed.txt").open("a") as file, contextlib.redirect_stdout(file):
            whole(str(RUN), run_name="__main__")
        return (whole.wall - cell.analyse.wall) / cells, (whole.cpu - cell.analyse.cpu) / cells
    finally:
        cell.analyse = analyse


def main() -> None:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(description="Measure what a cell costs beyond its computation.")
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--tracking", nargs="+", default=["none", "offline"], choices=["none", "offline"])
    arguments = parser.parse_args()
    os.environ.pop("WANDB_MODE", None)  # the choice is made here
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        model = Path(folder) / "tiny"
        sizes = GPT2Config(vocab_size=40, n_embd=24, n_layer=3, n_head=4, n_positions=12)
        GPT2LMHeadModel(sizes).save_pretrained(model)
        os.environ["OVQK_CACHE_DIR"] = str(Path(folder) / "cache")
        for tracking in arguments.tracking:
            busy = os.getloadavg()[0]
            wall, cpu = measure(model, arguments.cells, tracking)
            print(f"tracking={tracking}: {wall:.3f} s a cell, {cpu:.3f} s of the processor (load {busy:.1f})")


if __name__ == "__main__":
    main()
