"""The gallery: figures and pages of the bundled models, and the notebooks with their output.

    python scripts/gallery.py [RESULTS_DIR]

Computes what is missing in RESULTS_DIR (a few minutes; a temporary folder unless given) and writes
docs/figures/gallery/: figures as SVG and PNG, screenshots of the report where Chromium and Playwright are there. The
notebooks of examples/ are run on these results, and their output is kept in them.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import nbclient
import nbformat

from ovqk.figures import comparisons, portraits
from ovqk.figures.choice import cell_figures, sweep_figures
from ovqk.records.cells import Cell, read_cells
from ovqk.report.write import PAGE, write_report

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs" / "figures" / "gallery"
MODELS = "model=mini-attn,mini-gpt2,mini-llama"
SWEEPS = (
    (MODELS, "task=ioi,sva,induction,none"),
    (MODELS, "task=none", "analysis=composition"),
)
CHOSEN = (
    "verdicts",
    "effects",
    "depth",
    "atlas_induction_ov_copying",
    "atlas_ioi_ov_task_auc",
    "circuit_mini-gpt2_induction",
    "head_mini-attn_induction_3.0",
)
"""Of the report's figures."""
ONE_HEAD = ("mini-attn", "induction", 3, 0)
SCREENS = {
    "report_compare": ("compare", "light"),
    "report_atlas": ("atlas/ioi/ov_copying", "light"),
    "report_head": ("head/mini-attn/induction/3.0", "light"),
    "report_head_dark": ("head/mini-attn/induction/3.0", "dark"),
    "report_circuit": ("circuit/mini-gpt2/induction", "light"),
}
"""Name of a screenshot -> the address it is of, and the colours."""


def main() -> None:
    """Make the results that are missing, then everything from them."""
    parser = argparse.ArgumentParser(description="Figures, screenshots and notebooks of the bundled models.")
    parser.add_argument("results_dir", type=Path, nargs="?")
    given = parser.parse_args().results_dir
    with tempfile.TemporaryDirectory() as temporary:
        results_dir = (given or Path(temporary) / "results").absolute()
        for overrides in SWEEPS:
            command = [sys.executable, "run.py", "-m", *overrides, "tracking=none", f"results_dir={results_dir}"]
            subprocess.run(command, cwd=ROOT, check=True)
        shutil.rmtree(GALLERY, ignore_errors=True)
        GALLERY.mkdir(parents=True)
        draw(read_cells(results_dir)[0])
        photograph(results_dir)
        for path in sorted((ROOT / "examples").glob("*.ipynb")):
            execute(path, results_dir)


def draw(cells: list[Cell]) -> None:
    """The chosen figures of the report, and those of one head."""
    for name, figure in chain(sweep_figures(cells), cell_figures(cells)):
        if name in CHOSEN:
            comparisons.save(figure, GALLERY / name)
    model, task, layer, head = ONE_HEAD
    cell = next(cell for cell in cells if cell.place == (model, task))
    for circuit in ("ov", "qk"):
        comparisons.save(portraits.eigenvalues(cell.tables, layer, head, circuit), GALLERY / f"eigenvalues_{circuit}")
    comparisons.save(portraits.null_strips(cell.tables, layer, head), GALLERY / "nulls")
    comparisons.save(portraits.position_or_content(cell.tables, layer, head), GALLERY / "positions")


def photograph(results_dir: Path) -> None:
    """Screenshots of the report; none where there is no browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print("no chromium: the gallery has no screenshots", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    write_report(results_dir, with_figures=False)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (address, scheme) in SCREENS.items():
            page = browser.new_page(
                viewport={"width": 1180, "height": 1000},
                color_scheme="dark" if scheme == "dark" else "light",
            )
            page.goto(f"file://{results_dir / PAGE}#{address}")
            page.screenshot(path=GALLERY / f"{name}.png")
            page.close()
        browser.close()


def execute(path: Path, results_dir: Path) -> None:
    """Run a notebook beside a folder `results`, and keep its output but not when it was made."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "results").symlink_to(results_dir)
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
