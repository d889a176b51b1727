"""A cell on a GPU and the same cell on the CPU: equal verdicts, and numbers within rounding. Skipped without a GPU.

On any machine cells are computed on a GPU that is only pretended (`support/pretend_gpu.py`): it finds tensors that are
on the wrong side.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support import ROOT
from support.commands import compose, computed
from support.models import shared_model

from ovqk.errors import UserError
from ovqk.testing.table_comparison import disagreements

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
FEW = ("nulls.draws=99",)


def compared(tmp_path, names: tuple[str, ...], *choice: str) -> dict[str, list[str]]:
    """Compute the cell on both devices, and return the disagreements of each of these tables."""
    found = {}
    for device in ("cpu", "cuda"):
        _, record, tables = computed(tmp_path / device, *choice, f"device={device}", "cache=off")
        assert record["status"] == "done"
        found[device] = tables
    assert set(names) <= set(found["cpu"]) and set(found["cpu"]) == set(found["cuda"])
    return {name: disagreements(found["cpu"][name], found["cuda"][name]) for name in names}


@NO_GPU
@pytest.mark.parametrize("model", ["mini-attn", "mini-gpt2", "mini-llama"])
def test_weights_on_a_gpu_give_the_tables_of_the_cpu(tmp_path, model) -> None:
    """Spectra, positions, composition and verdicts. Eigenvalues are compared by the metrics made of them: their order
    within a head may change if two have the same size.
    """
    names = ("heads", "layers", "offsets", "composition", "verdicts")
    found = compared(tmp_path, names, f"model={model}", "task=induction", "analysis=b03", "nulls.draws=99")
    assert not any(found.values()), found


@NO_GPU
def test_activations_on_a_gpu_give_the_tables_of_the_cpu(tmp_path) -> None:
    names = ("activations", "roles")
    choice = ("model=mini-gpt2", "task=induction", "analysis=activations", "activations.prompts=96")
    found = compared(tmp_path, names, *choice)
    assert not any(found.values()), found


def on_a_pretended_gpu(tmp_path: Path, *choice: str) -> dict[str, list[str]]:
    """Compute the cell here and, in another process, on a device that is not there; return what disagrees by table."""
    _, _, here = computed(tmp_path / "cpu", *choice, "cache=off")
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-m", "support.pretend_gpu", str(tmp_path / "gpu"), *choice]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths})
    assert child.returncode == 0, child.stderr[-3000:]
    there = {path.stem: pd.read_parquet(path) for path in (tmp_path / "gpu").rglob("*.parquet")}
    assert set(here) == set(there)
    return {name: disagreements(here[name], there[name]) for name in here}


def test_a_cell_on_a_pretended_gpu_mixes_no_devices(tmp_path) -> None:
    found = on_a_pretended_gpu(tmp_path, "model=mini-gpt2", "task=induction", "analysis.diagonals=true", *FEW)
    assert not any(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        ("model=mini-llama", "task=ioi", "analysis=full", "activations.prompts=32"),
        ("model=mini-attn", "task=induction", "analysis=composition"),
        ("model=mini-gpt2", "task=country_capital", "analysis.rare_tokens=true"),
        ("model=mini-gpt2", "task=sva", "analysis=full", "analysis.embedding=stream", "activations.prompts=32"),
        ("model=mini-gpt2", "task=ioi", "processing=raw", "analysis.directions_embedding=token"),
    ],
)
def test_every_kind_of_cell_on_a_pretended_gpu_mixes_no_devices(tmp_path, choice) -> None:
    found = on_a_pretended_gpu(tmp_path, *choice, *FEW)
    assert not any(found.values()), found


@pytest.mark.slow
def test_cycles_on_a_pretended_gpu_mix_no_devices(tmp_path) -> None:
    path = shared_model("nanda-mod113-grokked") / "model.safetensors"
    found = on_a_pretended_gpu(tmp_path, "model=local", f"model.path={path}", "task=modular_addition", "analysis=full")
    assert not any(found.values()), found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused_and_auto_takes_the_cpu(tmp_path) -> None:
    cell = ("model=mini-attn", "task=none", "analysis.components=0")
    with pytest.raises(UserError, match="device=cuda"):
        computed(tmp_path, *cell, "device=cuda")
    assert compose("device=auto").device.value == "auto"
    assert computed(tmp_path, *cell, "device=auto")[1]["status"] == "done"


def test_tables_that_differ_by_more_than_rounding_disagree() -> None:
    table = pd.DataFrame({"head": [0, 1], "value": [2.0, np.nan], "verdict": ["partial", None], "text": ["a", "b"]})
    assert disagreements(table, table.assign(value=[2.0001, np.nan], text=["c", "d"])) == []
    assert disagreements(table, table.assign(value=[2.001, np.nan])) == ["value: 0.0005"]
    assert disagreements(table, table.assign(value=[2.0, 0.0]))
    assert disagreements(table, table.assign(verdict=["partial", "partial"])) == ["verdict: other words"]
    assert disagreements(table, table.iloc[:1]) and disagreements(table, table.drop(columns="text"))
