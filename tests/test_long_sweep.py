"""A sweep's memory does not grow with the number of its cells, whether they are computed or only tracked."""

import os
import pickle
import subprocess
import sys

import pytest
from support import ROOT

from ovqk.sweep import SweepCallback

QUICK = ("task=none", "analysis=qk", "analysis.components=0", "cache=false", "nulls.draws=9")
CELLS, EVERY = 1000, 50
MEASURED = f"""
import sys
from pathlib import Path
import ovqk.command, ovqk.sweep
from hydra.plugins.sweeper import Sweeper

Sweeper.validate_batch_is_legal = lambda *_: None  # composes each cell once more, and a third of the time
ended, callback = 0, ovqk.sweep.SweepCallback.on_job_end

def on_job_end(*given, **named):
    global ended
    callback(*given, **named)
    ended += 1
    if ended % {EVERY} == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print("resident", ended, pages * 4096 / 2**20, flush=True)

ovqk.sweep.SweepCallback.on_job_end = on_job_end
ovqk.command.run()
"""
MOST = 0.02
"""Megabytes for a cell; it was 0.24, and 0.42 with W&B, as long as Hydra kept two copies of each cell's choice."""


def test_what_hydra_keeps_of_a_cell_is_small(cli, monkeypatch) -> None:
    kept, callback = [], SweepCallback.on_job_end

    def on_job_end(*given, job_return, **named) -> None:
        callback(*given, job_return=job_return, **named)
        kept.append(job_return)

    monkeypatch.setattr(SweepCallback, "on_job_end", on_job_end)
    code, printed = cli("-m", "tracking=none", *QUICK, "seed=0,1")
    assert code == 0, printed
    assert [len(pickle.dumps(each)) < 2000 for each in kept] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_a_thousand_cells_take_no_more_memory_than_two_hundred(tmp_path, tiny_gpt2) -> None:
    """Half of them are computed; the others find those done, and make their W&B runs."""
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    command = [
        sys.executable, str(script), "-m", "tracking=none,offline", "model=local", f"model.path={tiny_gpt2}",
        *QUICK, f"seed=range({CELLS // 2})",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{CELLS // 2} done, {CELLS // 2} cached, 0 failed, 0 missing" in done.stdout
    assert len(list(tmp_path.glob("results/wandb/offline-run-*"))) == CELLS // 2
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("resident ")]
    resident = {int(cells): float(megabytes) for cells, megabytes in said}
    for first, last in ((200, CELLS // 2), (700, CELLS)):
        print(f"cell {first}: {resident[first]:.1f} MB, cell {last}: {resident[last]:.1f} MB")
        assert resident[last] - resident[first] <= MOST * (last - first), resident
