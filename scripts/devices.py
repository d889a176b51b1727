"""Compute one cell on the CPU and on a GPU: how long each takes, how much memory, and how far their tables are apart.

    python scripts/devices.py model=smollm2-135m-instruct task=ioi
    python scripts/devices.py --on cuda --against results/.../CELL model=...   # the CPU's cell is there already
    python scripts/devices.py --profile 25 --on cuda model=...                 # and where the time goes

Each device has a process of its own, without a cache. Times are the cell's, from its files to its tables.
"""

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from bench import compose_cell

from ovqk.cell import run_cell
from ovqk.testing.table_comparison import differences, disagreements


def computed(choice: list[str], device: str, folder: str, profile: int) -> None:
    """Compute the cell in this process, and print its folder, seconds and peaks as JSON in the last line."""
    cell = compose_cell(*choice, f"device={device}", "cache=off", f"results_dir={folder}")
    if device == "cuda":
        torch.zeros(1, device=device)  # starting CUDA is not the cell's
    profiler, started = cProfile.Profile(), time.perf_counter()
    outcome = profiler.runcall(run_cell, cell) if profile else run_cell(cell)
    took = time.perf_counter() - started
    if profile:
        for order in ("tottime", "cumtime"):
            pstats.Stats(profiler).sort_stats(order).print_stats(profile)
    on_device = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    here = resource.getrusage(resource.RUSAGE_SELF)
    found = {"folder": str(outcome.folder), "seconds": took, "processor seconds": here.ru_utime + here.ru_stime}
    print("\n" + json.dumps(found | {"peak MB": here.ru_maxrss / 1024, "device MB": on_device / 2**20}))


def tables_of(folder: Path) -> dict[str, pd.DataFrame]:
    """Read a cell's tables."""
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def main() -> None:
    """Run the children, and print a line for each device and each table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choice", nargs="+", help="as for run.py")
    parser.add_argument("--on", default="cpu,cuda")
    parser.add_argument("--against", type=Path, help="the folder of the same cell, computed elsewhere")
    parser.add_argument("--folder", help="where results are kept; else they are not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", type=int, default=0, help="how many functions are listed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        computed(arguments.choice, arguments.child, arguments.folder, arguments.profile)
        return
    if "cuda" in arguments.on.split(",") and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --on cpu computes the cell on the CPU alone")
    with tempfile.TemporaryDirectory() as temporary:
        found = {} if arguments.against is None else {"against": tables_of(arguments.against)}
        for device in arguments.on.split(","):
            folder = str(Path(arguments.folder or temporary).resolve() / device)
            given = ["--folder", folder, "--threads", str(arguments.threads), "--profile", str(arguments.profile)]
            command = [sys.executable, __file__, "--child", device, *given, *arguments.choice]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            *printed, last = child.stdout.strip().splitlines()
            print(*(printed if arguments.profile else ()), sep="\n")
            made = json.loads(last)
            found[device] = tables_of(Path(made.pop("folder")))
            print(device, *(f"{name} {value:.1f}" for name, value in made.items()), sep="  ", flush=True)
    if len(found) < 2:
        return
    (one, first), (two, second) = list(found.items())[:2]
    print(f"{one} and {two}: tables in one alone: {sorted(set(first) ^ set(second)) or 'none'}")
    for name in sorted(set(first) & set(second)):
        apart = differences(first[name], second[name]) if len(first[name]) == len(second[name]) else {}
        worst = max(apart, key=lambda column: apart[column], default="")
        print(f"  {name}: {apart.get(worst, 0.0):.2g} ({worst})  {'; '.join(disagreements(first[name], second[name]))}")


if __name__ == "__main__":
    main()
