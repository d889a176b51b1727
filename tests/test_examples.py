"""The notebooks run from top to bottom on real results, and show what they say."""

from pathlib import Path

import pytest
from support import ROOT
from support.commands import compose

from ovqk.cell import run_cell

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the results that the notebooks ask for."""
    folder = tmp_path_factory.mktemp("examples")
    common = ("tracking=none", "nulls.draws=19", f"results_dir={folder / 'results'}")
    for model, task in (("mini-attn", "induction"), ("mini-attn", "ioi"), ("mini-llama", "induction")):
        run_cell(compose(f"model={model}", f"task={task}", *common))
    run_cell(compose("model=mini-attn", "task=none", "analysis=composition", *common))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, folder) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in codes)
    outputs = [output for cell in codes for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == sum(
        cell.source.startswith(("figures.", "portraits.")) or "\nfigures." in cell.source for cell in codes
    )
    said = "".join(output.get("text", "") for output in outputs)
    assert "It does not establish that the model does this on task inputs" in said
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_names_no_place_of_this_machine(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text.replace('"/root', "")
