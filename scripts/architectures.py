"""How exactly ovqk reads each causal architecture that transformers has: tiny random models against their own modules.

    python scripts/architectures.py [--write] [--only NAME ...]

Each architecture of transformers' causal language models is shrunk (`ovqk.testing.tiny_architectures`), saved as a
Hugging Face directory and opened by ovqk, in workers with a time limit for each. What ovqk reads is compared with the
Hugging Face model itself (`ovqk.testing.module_comparison`). `--write` writes docs/architectures.md.
"""

import argparse
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.testing.materialised import compare_materialised
from ovqk.testing.module_comparison import compare
from ovqk.testing.tiny_architectures import BESIDE_PICTURES, VARIANTS, WHOLE, shrunk_model
from ovqk.weights.block_probes import CannotRunError
from ovqk.weights.readers import open_weights
from ovqk.weights.types import WeightSource

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120
"""For one architecture."""
RIGHT = 1e-4
"""Largest relative difference that is called right; float32 weights and activations of ovqk reach 1e-6."""


@dataclasses.dataclass
class Row:
    """One architecture: how it is read, why not, and the largest relative differences."""

    name: str
    read: str = ""
    why: str = ""
    w_qk: float | None = None
    w_ov: float | None = None
    scores: float | None = None
    writes: float | None = None
    block0: float | None = None
    logits: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        """Whether a number that ovqk gives differs from the model's own."""
        return any(number is not None and not number < RIGHT for number in self.numbers)

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The largest relative differences, in the order of the page's columns."""
        return self.w_qk, self.w_ov, self.scores, self.writes, self.block0, self.logits

    @property
    def shown(self) -> list[str]:
        """The same in words; a dash for a number that ovqk does not give."""
        return ["-" if number is None else f"{number:.0e}" for number in self.numbers]


def examine(name: str) -> Row:
    """Make one architecture, open it and compare it."""
    row = Row(name)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "m"
        try:
            shrunk_model(name, directory)
            print(f"MADE {name}", flush=True)
        except Exception as error:  # of any architecture's own code
            message = " ".join(str(error).split())
            row.read, row.why = "not shrunk", f"{type(error).__name__}: {message}"[:240]
            return row
        config = ModelConfig(name="tiny", source=Source.local, path=str(directory))
        try:
            source = open_weights(open_checkpoint(config), config)
        except UserError as error:
            row.read, row.why = "refused", str(error).replace(f"model.path={directory}: ", "")
            return row
        row.read = {"families": "natively", "bridge": "through the bridge"}[source.loaded_by]
        row.notes = tuple(note for note in source.notes if not note.startswith("read through"))
        if not source.foldable:
            row.read += ", raw"
        elif source.no_vocabulary is not None:
            row.why = f"no vocabulary: {source.no_vocabulary}"
        for key, value in compare_in_float64(source, directory, name.split(",")[0]).items():
            setattr(row, key, value)
    return row


def compare_in_float64(source: WeightSource, directory: Path, name: str) -> dict[str, float | None]:
    """Compare with the model in float64; in float32 if its own code does not run in float64."""
    import transformers

    kind = getattr(transformers, WHOLE[name] if name in BESIDE_PICTURES else "AutoModelForCausalLM")
    for dtype in (torch.float64, torch.float32):
        model = kind.from_pretrained(
            directory, attn_implementation="eager", experts_implementation="eager", dtype=dtype
        ).eval()
        try:
            found = compare(source, model)
            if found["scores"] is not None:
                found.update(compare_materialised(source, model))
            return found
        except CannotRunError:
            if dtype == torch.float32:
                raise
    raise AssertionError("not reached")


# --- many of them, in workers with a time limit ------------------------------------------------------------------


def work() -> None:
    """Examine the architectures named on standard input, one JSON line each."""
    import traceback
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        name = line.strip()
        try:
            row = examine(name)
        except Exception:  # a defect, of ovqk or of this script: the table must show it
            row = Row(name, "TRACEBACK", traceback.format_exc(limit=-2))
        print("ROW " + json.dumps(dataclasses.asdict(row)), flush=True)


def examine_all(names: list[str]) -> list[Row]:
    """Examine architectures in a worker process, which is replaced if one takes too long."""
    rows: list[Row] = []
    waiting = list(names)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    while waiting:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        ) as worker:
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True).start()
            assert worker.stdin is not None
            while waiting:
                name = waiting.pop(0)
                row, made = None, False
                try:
                    worker.stdin.write(name + "\n")
                    worker.stdin.flush()
                    row, made = next_row(lines, time.monotonic() + SECONDS)
                except BrokenPipeError:
                    pass
                late = Row(name, "TRACEBACK" if made else "not shrunk", f"no answer within {SECONDS} s")
                rows.append(row or late)
                print(_shown(rows[-1]), flush=True)
                if row is None:
                    break
            worker.kill()
    return rows


def _forward(stream: Any, lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def next_row(lines: "queue.Queue[str]", until: float) -> tuple[Row | None, bool]:
    """The next row, None if it is late, and whether the tiny model was made."""
    made = False
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None, made
        if not line:
            return None, made
        made |= line.startswith("MADE ")
        if line.startswith("ROW "):
            fields = json.loads(line[4:])
            return Row(**fields | {"notes": tuple(fields["notes"])}), made


def _shown(row: Row) -> str:
    return f"{'WRONG ' if row.wrong else ''}{row.name}: {row.read} {' '.join(row.shown)} {row.why}"


HEADING = """# Which architectures are read, and how exactly

Every architecture of transformers {version} that is a causal language model, and some for pictures that hold one, as a
tiny random model (4 layers of width 48, 4 heads, 2 KV heads where the architecture has them), opened by ovqk and
compared in float64 with what hooks on the Hugging Face model see. `python scripts/architectures.py --write` makes this
page anew.

- **W_QK**, **W_OV**: each head's whole matrix, with gains, multipliers and rotation and without the scale of the
  scores, against the one that least squares find in what the module makes of random streams
  (`ovqk/testing/materialised.py`).
- **scores**: each head's scores before the softmax, every query with every key, positions included.
- **writes**: what each head adds to the residual stream, with every norm and multiplier behind the output projection.
- **block 0**: the first block as the effective embedding of later layers.
- **logits**: what the unembedding makes of the last residual stream, with every multiplier and before any cap.

Numbers are the largest difference over all layers and heads, relative to the largest entry; ovqk holds weights in
float32, so 1e-6 is exact. A dash: ovqk gives no such number, and says so. *Raw* means that the residual spectra of the
stored weights are given and nothing else, because ovqk's form did not reproduce the model; the record's notes say why.
"""


def page(rows: list[Row], version: str) -> str:
    """docs/architectures.md."""
    text = [HEADING.format(version=version)]
    read = [row for row in rows if row.read.startswith(("natively", "through"))]
    text += [
        f"\n## Read ({len(read)})\n",
        "| architecture | read | W_QK | W_OV | scores | writes | block 0 | logits | remarks |",
    ]
    text.append("|---|---|---|---|---|---|---|---|---|")
    for row in read:
        remarks = "; ".join([*([row.why] if row.why else []), *row.notes])
        text.append(f"| {row.name} | {row.read} | {' | '.join(row.shown)} | {_cell(remarks)} |")
    for kind, title in (
        ("refused", "Refused, with this message"),
        ("not shrunk", "Not examined: no tiny model can be made"),
    ):
        these = [row for row in rows if row.read == kind]
        text += [f"\n## {title} ({len(these)})\n", "| architecture | reason |", "|---|---|"]
        text += [f"| {row.name} | {_cell(row.why)} |" for row in these]
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Examine the architectures; exit with 1 if one is read wrongly or ends in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    parser.add_argument("--only", nargs="*", help="these model types alone")
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = examine_all(arguments.only or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *BESIDE_PICTURES, *VARIANTS}))
    if arguments.write:
        (ROOT / "docs" / "architectures.md").write_text(page(rows, transformers.__version__))
    bad = [row for row in rows if row.wrong or row.read == "TRACEBACK"]
    for row in bad:
        print(_shown(row))
    print(f"{len(rows)} architectures, {len(bad)} of them wrong or ending in a traceback")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
