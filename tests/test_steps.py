"""Steps of a training that hold the same weights are found by their digests, and marked where steps are compared."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from support import ROOT
from support.commands import compose
from support.hub_models import SINGLE
from support.hub_stub import REPO, Hub
from support.models import BUNDLED

from ovqk.cell import run_cell
from ovqk.records.cells import read_cells
from ovqk.records.outcomes import Outcome
from ovqk.records.results import cell_folders, load_results
from ovqk.records.steps import said, shared_steps, twins
from ovqk.report import terminal
from ovqk.report.page import page_data
from ovqk.report.thinning import DETAILS


def record(name: str, digest: str, step: int | None, repo: str = "some/training") -> dict:
    model = {"name": name, "repo": repo, "checkpoint": step}
    return {"model": name, "provenance": {"weights_digest": digest, "config": {"model": model}}}


def test_steps_are_grouped_by_the_digest_of_their_weights() -> None:
    of_m = (("m-step10", "a", 10), ("m-step2", "a", 2), ("m-step3", "b", 3), ("m-step2", "a", 2), ("m", "a", None))
    records = [*(record(*each) for each in of_m), record("n-step2", "a", 2, "other/training")]
    assert shared_steps(records) == [["m-step2", "m-step10"]]
    assert twins(records) == {"m-step10": "m-step2"}
    assert said(["m-step2", "m-step10"]).startswith("m-step10: the same weights as m-step2 (one digest)")
    assert shared_steps([record("m-step2", "a", 2), record("m-step3", "b", 3)]) == []
    assert shared_steps([{"model": "m", "provenance": {"weights_digest": "a"}}]) == []


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three steps of a training; the second holds the same weights as the first."""
    folder = tmp_path_factory.mktemp("steps") / "results"
    run_cell(compose("tracking=none", f"results_dir={folder}", "task=none", "analysis=ov", "analysis.components=0"))
    (made,) = cell_folders(folder)
    for step, digest in ((0, "a"), (1, "a"), (8, "b")):
        copied = folder / f"m-step{step}" / "none" / made.name
        shutil.copytree(made, copied)
        content = json.loads((copied / "record.json").read_text())
        content |= {"model": f"m-step{step}", "cell_id": f"{step}" * 12}
        content["provenance"]["weights_digest"] = digest * 64
        content["provenance"]["config"]["model"] |= {"repo": "some/training", "checkpoint": step}
        (copied / "record.json").write_text(json.dumps(content))
    shutil.rmtree(made.parents[1])
    return folder


def test_a_sweep_marks_steps_that_share_their_weights(results, capsys) -> None:
    outcomes = {
        number: Outcome("done", folder.parts[-3], "none", "ov", str(folder), 1.0)
        for number, folder in enumerate(cell_folders(results))
    }
    terminal.print_sweep(outcomes, [["seed=1"]] * 4, {}, results, interrupted=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "m-step1 (= m-step0)" in printed and "m-step8 (=" not in printed and "m-step0 (=" not in printed
    assert "note: m-step1: the same weights as m-step0 (one digest)" in printed
    assert "missing: seed=1 missing: stopped by you, or never started. The same command computes them." in printed


def test_the_page_and_the_loaded_results_tell_of_them(results) -> None:
    cells, failures = read_cells(results)
    assert not failures
    data = page_data(cells, failures, results, DETAILS[0])
    notes = {cell["model"]: cell["notes"] for cell in data["cells"]}
    assert all(any("the same weights as m-step0" in note for note in notes[name]) for name in ("m-step0", "m-step1"))
    assert not any("same weights" in note for note in notes["m-step8"])
    digests = load_results(results)["cells"].set_index("model")["weights_digest"]
    assert digests["m-step0"] == digests["m-step1"] != digests["m-step8"]


@pytest.mark.slow
def test_the_training_sweep_marks_revisions_that_hold_one_content(tmp_path) -> None:
    """The sweep as users start it, on a hub of three revisions; the second holds the weights of the first."""
    holds = {path.name: path.read_bytes() for path in BUNDLED.iterdir() if path.is_file()}
    save_file({name: 1.01 * tensor for name, tensor in load_file(BUNDLED / SINGLE).items()}, tmp_path / SINGLE)
    later = holds | {SINGLE: (tmp_path / SINGLE).read_bytes()}
    with Hub() as hub:
        hub.revisions = {"step0": holds, "step1": holds, "step8": later}
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "COLUMNS": "150",
               "HF_HUB_CACHE": str(tmp_path / "hf"), "OVQK_CACHE_DIR": str(tmp_path / "ovqk"),
               "NO_PROXY": "127.0.0.1,localhost"}  # fmt: skip
        command = [sys.executable, "run.py", "-cd", "sweeps", "-cn", "training", "model=hub", f"model.repo={REPO}",
                   "model.name=tiny", 'model.checkpoints="step{checkpoint}"', "model.checkpoint=0,1,8", "task=none",
                   "analysis.components=0", "tracking=none", "cache=off", f"results_dir={tmp_path}/r"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny-step1 (= tiny-step0)" in done.stdout and "tiny-step8 (=" not in done.stdout
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: tiny-step1: the same weights as tiny-step0 (one digest)")
