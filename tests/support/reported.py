"""A small folder of real results for the tests of the report and its figures, made once for all processes."""

import json
import shutil
from pathlib import Path

import pandas as pd
from filelock import FileLock
from safetensors.torch import load_file, save_file

from ovqk.cell import run_cell
from support.commands import compose
from support.models import BUNDLED, make_gpt2

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "\"quoted\" 'twice' & more",
    " \u202eright to left",
    "\u05e9\u05dc\u05d5\u05dd",
    "\x00\x1b[31m\x7f",
    "line\nbreak\u2028and\u2029more",
    "$\\frac{1}{0}$",
    "\ud83d",  # half of a pair, as a tokenizer of bytes can hold
    "\u6f22\u5b57\U0001f642",
    "",
]
"""Texts that a tokenizer may hold and that must reach a reader as text."""
STORABLE = [text for text in HOSTILE if "\ud83d" not in text]
"""Those that a Parquet file can hold."""
HOSTILE_MODEL = '"><script>alert(2)</script>'
CLAIMS = (
    'task.claims.mini-attn.roles.induction=["3.0","3.1","3.3","3.4"]',
    'task.claims.mini-attn.roles.previous_token=["1.1"]',
    "~task.claims.mini-llama.roles.previous_token",
)
"""Some claims, whatever the bundled models' own are."""
CELLS = (
    ("model=mini-attn", "task=induction", *CLAIMS),
    ("model=mini-llama", "task=induction", *CLAIMS),
    ("model=mini-attn", "task=none", "analysis=composition"),
    ("model=local", f"model.path={BUNDLED}", "model.name=unclaimed", "task=induction"),
)

FAILED = (("broken", "ioi"), ("partial", "induction"))


def make_results(tmp_path_factory) -> Path:
    """Real cells of bundled models, one of a checkpoint without embeddings, one with hostile texts, two that failed."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    results = shared / "reported"
    with FileLock(shared / "reported.lock"):
        if not (results / "made").exists():
            for overrides in CELLS:
                run_cell(compose(*overrides, "tracking=none", "nulls.draws=39", f"results_dir={results}"))
            partial = shared / "partial"
            make_partial(partial)
            run_cell(
                compose("model=local", f"model.path={partial}", "task=none", "tracking=none", f"results_dir={results}")
            )
            make_hostile(results)
            for model, task in FAILED:
                failed = results / model / task / "b03-000000000000"
                failed.mkdir(parents=True)
                (failed / "record.json").write_text(json.dumps({"status": "failed", "error": "<b>no weights</b>"}))
            (results / "made").touch()
    return results


def make_partial(directory: Path) -> None:
    """A tiny GPT-2 without its token embedding."""
    make_gpt2(directory)
    path = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "wte" not in name and "lm_head" not in name}
    save_file(kept, path, metadata={"format": "pt"})


def make_hostile(results: Path) -> None:
    """A copy of a cell whose tokens, names and notes are hostile."""
    (source,) = (results / "mini-llama" / "induction").glob("b03-*")
    folder = results / "hostile" / "induction" / source.name
    shutil.copytree(source, folder)
    table = pd.read_parquet(folder / "directions.parquet")
    table["token"] = [STORABLE[place % len(STORABLE)] for place in range(len(table))]
    table.to_parquet(folder / "directions.parquet", index=False)
    path = folder / "record.json"
    record = json.loads(path.read_text()) | {"model": HOSTILE_MODEL, "notes": HOSTILE[:4]}
    record["provenance"]["weights_digest"] = "f" * 64  # other weights: it shares nothing with the cell it was made of
    record["words"]["dropped"] = {"names": HOSTILE[:8]}
    path.write_text(json.dumps(record))


def page_data(html: str) -> dict:
    """The data that a page holds."""
    text = html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(text)
