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

import ovqk
from ovqk.errors import UserError
from ovqk.records.record import Origin, provenance
from ovqk.testing.table_comparison import disagreements

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
FEW = ("nulls.draws=19",)


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


def with_tests_on_path() -> dict[str, str]:
    """The environment of a process that imports this checkout and its tests' helpers."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


def on_a_pretended_gpu(tmp_path: Path, *choice: str) -> dict[str, list[str]]:
    """Compute the cell here and, in another process, on a device that is not there; return what disagrees by table."""
    _, _, here = computed(tmp_path / "cpu", *choice, "cache=off")
    command = [sys.executable, "-m", "support.pretend_gpu", str(tmp_path / "gpu"), *choice]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, env=with_tests_on_path())
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


ON_TWO_DEVICES = """
import torch
from support.pretend_gpu import pretended
with pretended() as device:
    here, there, place = torch.ones(3), torch.ones(3, device=device), torch.arange(2)
    assert there[place].device == device and there[place.to(device)].device == device
    tried = {
        "sum": lambda: here + there,
        "row": lambda: here[place.to(device)],
        "put": lambda: there.index_put((place,), here[:2]),
        "draw": lambda: there.normal_(generator=torch.Generator()),
        "array": lambda: there.numpy(),
    }
    for name, operation in tried.items():
        try:
            operation()
        except (RuntimeError, TypeError):
            print(name)
"""


@pytest.mark.slow
def test_a_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    child = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES], capture_output=True, text=True, timeout=120, env=with_tests_on_path()
    )
    assert child.stdout.split() == ["sum", "row", "put", "draw", "array"], child.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("door", ["library", "sweep", "published"])
def test_notebooks_sweeps_and_published_quantities_on_a_pretended_gpu_mix_no_devices(tmp_path, door) -> None:
    command = [sys.executable, "-m", "support.pretended_doors", door, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600, env=with_tests_on_path())
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused_and_auto_takes_the_cpu(tmp_path) -> None:
    cell = ("model=mini-attn", "task=none", "analysis.components=0")
    with pytest.raises(UserError, match="device=cuda"):
        computed(tmp_path, *cell, "device=cuda")
    assert compose("device=auto").device.value == "auto"
    record = computed(tmp_path, *cell, "device=auto")[1]
    assert record["status"] == "done" and record["provenance"]["device"] == "cpu"
    assert "peak_gpu_memory_mb" not in record["provenance"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_hub_models_files_are_not_asked_for(tmp_path, monkeypatch) -> None:
    def fetched(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("ovqk.cell.open_checkpoint", fetched)
    monkeypatch.setattr("ovqk.library.open_checkpoint", fetched)
    for door in (
        lambda: computed(tmp_path, "model=gpt2", "task=none", "device=cuda"),
        lambda: ovqk.open("gpt2", "device=cuda"),
    ):
        with pytest.raises(UserError, match="device=cuda: torch finds no CUDA device here; allowed: cpu, auto"):
            door()


def test_a_record_names_the_gpu_and_the_memory_that_was_taken_there(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("ovqk.weights.devices.resolve_device", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    found = provenance(compose("model=mini-attn", "task=none", "device=cuda"), {}, Origin("", None, {}, ""), 1.0)
    assert found["device"] == "cuda (NVIDIA H200)" and found["peak_gpu_memory_mb"] == 1536.0


def test_tables_that_differ_by_more_than_rounding_disagree() -> None:
    table = pd.DataFrame({"head": [0, 1], "value": [2.0, np.nan], "verdict": ["partial", None], "text": ["a", "b"]})
    assert disagreements(table, table.assign(value=[2.0001, np.nan], text=["c", "d"])) == []
    assert disagreements(table, table.assign(value=[2.001, np.nan])) == ["value: 0.0005"]
    assert disagreements(table, table.assign(value=[2.0, 0.0]))
    assert disagreements(table, table.assign(verdict=["partial", "partial"])) == ["verdict: other words"]
    assert disagreements(table, table.iloc[:1]) and disagreements(table, table.drop(columns="text"))
