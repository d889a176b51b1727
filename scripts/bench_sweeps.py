"""Cells per minute of a sweep over one model, and the time from a command to its first answer.

    python scripts/bench.py --what sweep
    python scripts/bench.py --what startup [--repeats 8]

A sweep runs as a command of its own, one cell after the other, with an empty cache. Wall time counts start-up.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASKS = "ioi,sva,induction,acronym,country_capital,greater_than"
ANALYSES = "b03,composition"
MODEL = "smollm2-135m-instruct"


def run(*command: str, check: bool = True, **environment: str) -> tuple[float, float, str]:
    """Run Python on this command; return its wall time, its processor time in seconds, and what it printed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=check, env=os.environ | environment
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def report_sweep(models: str, tasks: str, analyses: str) -> None:
    """Time a sweep over these choices with an empty cache, then once more with the cache that it left, and print."""
    with tempfile.TemporaryDirectory() as folder:
        choice = ["tracking.mode=none", f"cache_dir={folder}/cache", f"model={models}", f"task={tasks}"]
        for kind in ("empty", "filled"):
            command = ["run.py", "-m", *choice, f"analysis={analyses}", f"results_dir={folder}/{kind}"]
            wall, processor, printed = run(*command, check=False)
            cells = sum("  done  " in line for line in printed.splitlines())
            failed = sum("  failed  " in line for line in printed.splitlines())
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the larger sweep so far
            print(
                f"sweep, cache {kind}: {cells} cells done, {failed} failed, {wall:.1f} s ({processor:.1f} s of "
                f"processor time, peak {peak:,.0f} MB): {60 * cells / wall:.1f} cells a minute",
                flush=True,
            )


def report_start_up(repeats: int) -> None:
    """Print the default cell's wall time beside that of importing torch, hydra, pandas and wandb; and of short answers.

    Each cell runs right after its imports, so that both meet the same machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        imports, first, again = list[float](), list[float](), list[float]()
        for number in range(repeats):
            imports.append(run("-c", "import torch, hydra, pandas, wandb")[0])
            for kind, times in (("first", first), ("again", again)):
                place = f"results_dir={folder}/{kind}-{number}"
                times.append(run("run.py", place, OVQK_CACHE_DIR=f"{folder}/cache-{number}")[0])
        print(f"imports: {_middle(imports)}")
        for what, times in (("default cell", first), ("its structure cached", again)):
            ratios = [own / beside for own, beside in zip(times, imports, strict=True)]
            print(
                f"{what}: {_middle(times)}; {statistics.median(ratios):.2f} x the imports in the middle "
                f"({min(ratios):.2f} to {max(ratios):.2f}), best over best {min(times) / min(imports):.2f} x"
            )
        for choice in ("--help", "tsak=ioi", "model=no-such", "nulls.draws=x", "analysis.components=-1"):
            print(f"run.py {choice}: {_middle([run('run.py', choice, check=False)[0] for _ in range(repeats)])}")


def _middle(times: Sequence[float]) -> str:
    """Return a median and a range in words."""
    return f"{statistics.median(times):.2f} s in the middle of {len(times)} runs ({min(times):.2f} to {max(times):.2f})"
