"""The cost of ranks of diagonals (`analysis.diagonals=true`), beside the eigen- and singular values of all heads.

    python scripts/bench.py --what diagonals --shapes gpt2-small [--threads 1]
    python scripts/bench.py --what diagonals --path MODEL

MODEL is a Hugging Face directory or a GGUF file. The ranks need what block 0's MLP writes for every token. A cell runs
this MLP for its Grams, and keeps these rows on the way: what keeping costs is the time of the Grams with it less the
time without, and is counted. Times are of the processor, over all threads, and by the clock.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

Times = tuple[float, float]
"""Seconds by the clock, and of the processor."""


def measure_diagonals(config: Any, repeats: int) -> dict[str, Times]:
    """Return the best of some runs, in turn: `spectra`, `grams` without and `keeping` with the rows kept, `ranks`.

    Args:
        config: a cell with both circuits; it is measured with ranks and without.
        repeats: how many runs, at least 1.
    """
    from bench import open_model, spectra_alone

    from ovqk.checkpoints.opening import open_checkpoint
    from ovqk.structure.diagonal_ranks import DiagonalRanks
    from ovqk.structure.layer import Layer
    from ovqk.structure.model import Model
    from ovqk.tasks.tokenizer import load_tokenizer
    from ovqk.weights.types import OpenedModel

    opened = OpenedModel(open_model(config), "bench", load_tokenizer(open_checkpoint(config.model)))

    def read(ranks: bool) -> Model:
        config.analysis.diagonals = ranks
        return Model.read(opened, config)

    def once() -> dict[str, Times]:
        found = {"spectra": timed(partial(spectra_alone, config))}
        for name, ranks in (("grams", False), ("keeping", True)):
            model = read(ranks)
            found[name] = timed(partial(getattr, model, "block0_grams"))
        stage = DiagonalRanks(model)
        spent = [0.0, 0.0]
        for index in range(opened.source.architecture.n_layers):
            layer = Layer(model, index)
            layer.folded  # noqa: B018  # read before the clock starts, as spectra read it
            spent = [a + b for a, b in zip(spent, timed(partial(stage.visit, layer)), strict=True)]
        last = timed(stage.columns)
        return found | {"ranks": (spent[0] + last[0], spent[1] + last[1])}

    runs = [once() for _ in range(repeats)]
    return {name: min((run[name] for run in runs), key=lambda times: times[1]) for name in runs[0]}


def timed(function: Callable[[], Any]) -> Times:
    """Call once."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def report_diagonals(name: str, config: Any, repeats: int) -> None:
    """Measure, and print the ranks' time as a ratio to the spectra's; the aim is at most 2."""
    found = measure_diagonals(config, repeats)
    for kind, what in enumerate(("by the clock", "of the processor")):
        spectra, grams, keeping, ranks = (found[part][kind] for part in ("spectra", "grams", "keeping", "ranks"))
        kept = max(0.0, keeping - grams)
        print(
            f"{name} ranks of diagonals, seconds {what}: {ranks:.2f} and {kept:.2f} to keep block 0's rows; spectra "
            f"{spectra:.2f}: {(ranks + kept) / spectra:.2f} x (Grams of block 0: {grams:.2f})",
            flush=True,
        )
