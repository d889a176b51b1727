"""Other doors than a single cell, on a GPU that is only pretended: each is run in a process of its own.

`python -m support.pretended_doors DOOR FOLDER`, with a function's name for the door.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import ovqk
from ovqk.cell import run_cell
from ovqk.published.quantities import QUANTITIES, Opened, compute
from ovqk.records.record import read_record
from ovqk.structure.kept import Kept
from ovqk.testing.table_comparison import disagreements
from support.commands import compose
from support.models import SHARED
from support.pretend_gpu import NAME, pretended, register

HEAVY = ("cell_heads", "cell_rank", "cell_lead", "on_prompts", "attention_on_prompts")
"""Quantities that are read from a cell's record and tables."""
OF_CYCLES = (
    "neuron_frequencies",
    "frequency_share",
    "addition_accuracy",
    "distance_irrelevance",
    "gradient_symmetricity",
)


def equal(here: Any, there: Any) -> bool:
    """Say whether two values agree: tables within their tolerance, numbers within 1e-4 of the largest."""
    if isinstance(here, pd.DataFrame):
        return not disagreements(here, there)
    here, there = (np.asarray(value, dtype=np.float64) for value in (here, there))
    return bool(np.allclose(here, there, rtol=0, atol=1e-4 * np.nanmax(np.abs(here)), equal_nan=True))


def library(_: Path) -> None:
    """Every number that a notebook can ask of a model, of its heads and of their circuits."""
    for name in ("mini-gpt2", "mini-llama"):
        here = answers(ovqk.open(name, "cache=off"))
        with pretended():
            there = answers(ovqk.open(name, "cache=off"))
        wrong = [what for what in here if not equal(here[what], there[what])]
        assert not wrong, (name, wrong)


def answers(model: Any) -> dict[str, Any]:
    """Return what a model, one of its heads and that head's circuits say, by name."""
    first, head = model.head(0, 1), model.head(2, 1)
    found = {"heads": model.heads(), "W_E": model.W_E, "W_U": model.W_U, "metrics": head.metrics.drop("unstable")}
    found |= {mode: model.composition(mode, first, head) for mode in "qkv"}
    found |= {"copying": head.ov.copying, "matching": head.qk.matching, "symmetry": head.qk.symmetry}
    for circuit in (head.ov, head.qk):
        name = circuit.circuit.value
        for part in ("left", "right", "effective_rank", "singular_values", "vocabulary_singular_values"):
            found[f"{name} {part}"] = getattr(circuit, part)
        for part in ("eigenvalues", "vocabulary_eigenvalues"):  # neighbours of one modulus may change places
            found[f"{name} {part}"] = abs(getattr(circuit, part))
        for part in ("left_singular_vectors", "right_singular_vectors"):  # signs mean nothing
            found[f"{name} {part}"] = getattr(circuit, part) @ getattr(circuit, part).T
        found |= {f"{name} matrix": circuit.matrix(), f"{name} tokens": circuit.tokens(2)}
    found["pairs"] = head.ov.pairs("country_capital")
    head.portrait("country_capital")
    return found


def sweep(folder: Path) -> None:
    """Cells of one process that leave layers to each other, on the device, on the CPU and on the device again.

    They share a cache. Each one's tables are those of a cell that is computed alone, on the CPU.
    """
    kept, cache = Kept(), f"cache_dir={folder / 'cache'}"
    cells = [
        ("device=auto", "task=induction", "analysis=b03"),
        ("device=auto", "task=ioi", "analysis=composition"),
        ("device=cpu", "task=ioi", "analysis=composition"),
        ("device=cpu", "task=induction", "analysis=b03"),
        ("device=auto", "task=ioi", "analysis=b03"),
        ("device=auto", "task=induction", "analysis=composition"),
    ]
    for number, (device, *choice) in enumerate(cells):
        asked = (*choice, "model=mini-gpt2", "nulls.draws=99", "tracking=none")
        one = compose(*asked, device, cache, f"results_dir={folder / str(number)}")
        other = compose(*asked, "cache=off", f"results_dir={folder / 'alone' / str(number)}")
        if device == "device=cpu":
            there = run_cell(one, kept=kept)
        else:
            with pretended():
                there = run_cell(one, kept=kept)
        computed_on = read_record(Path(there.folder))["provenance"]["device"]
        assert computed_on == ("cpu" if device == "device=cpu" else NAME)
        here, there = (Path(each.folder) for each in (run_cell(other), there))
        for path in here.glob("*.parquet"):
            wrong = disagreements(pd.read_parquet(path), pd.read_parquet(there / path.name))
            assert not wrong, (number, path.name, wrong)


def published(_: Path) -> None:
    """Each quantity of published statements."""
    heads = ["1.0", "2.1"]
    options: dict[str, list[dict[str, Any]]] = {
        "layer_median": [{"column": "qk_symmetry"}],
        "composition_rank": [{"mode": mode, "sender": "0.1", "receiver": "2.1"} for mode in "qkv"],
        "least_copying": [{"heads": heads}],
        "diagonal": [
            {"head": "2.1 2.2", "circuit": circuit, "rows": rows, "lowest": 10}
            for circuit in ("ov", "qk")
            for rows in ("token", "block0", "mlp0")
        ]
        + [{"head": "2.1", "circuit": "qk", "rows": "mlp0", "queries": "block0"}],
    }
    assert {*options, *HEAVY, *OF_CYCLES} == set(QUANTITIES)
    asked = [(name, "mini-gpt2", each) for name, every in options.items() for each in every]
    grokked = SHARED / "nanda-mod113-grokked" / "model.safetensors"
    if grokked.exists():  # the bundled models add nothing up
        asked += [("neuron_frequencies", grokked, {"modulus": 113})]
        asked += [("frequency_share", grokked, {"modulus": 113, "frequencies": [1, 2], "constant": True})]
        asked += [
            (name, grokked, {"modulus": 113, "query": 113}) for name in ("addition_accuracy", "distance_irrelevance")
        ]
        asked += [("gradient_symmetricity", grokked, {"modulus": 113, "query": 113, "triples": 10})]
    for name, place, each in asked:
        here = compute(name, Opened(place, ("cache=off",)), each)
        with pretended():
            there = compute(name, Opened(place, ("cache=off",)), each)
        assert here == there if isinstance(here, frozenset) else equal(here, there), (name, each, here, there)


if __name__ == "__main__":
    register()
    torch.set_num_threads(1)
    {door.__name__: door for door in (library, sweep, published)}[sys.argv[1]](Path(sys.argv[2]))
