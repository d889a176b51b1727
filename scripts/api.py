"""docs/api.md from the docstrings:  python scripts/api.py"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
OPENING = """# API

The functions that notebooks and scripts call, from their docstrings (`python scripts/api.py` writes this page). For the
rest of the package read its files, from `ovqk/cell.py` on; every public function has a docstring with shapes, range,
errors and source.

## A model and its heads

    import ovqk

    model = ovqk.open("mini-attn")        # or a path, a GGUF file, or OWNER/NAME on the hub
    head = model.head(3, 0)
    head.ov.copying, head.qk.singular_values, head.qk.symmetry
    head.ov.tokens(3)                     # what its leading components read and write
    head.portrait()                       # one sheet, as a Matplotlib figure
    model.heads()                         # a row for each head, as a DataFrame

The numbers are those of a cell with `task=none`: the same code computes them, and both use the same cache. For those
who know TransformerLens, the same things there and here (OV and QK of layer 3, head 0; here norms are folded in unless
`ovqk.open(..., "processing=raw")` says otherwise):

| TransformerLens | ovqk |
|---|---|
| `model.OV[3, 0]`, `model.QK[3, 0]` (`FactoredMatrix`) | `head.ov`, `head.qk` |
| `.A`, `.B`, `.AB` | `.left`, `.right`, `.matrix()` |
| `.S`, `.eigenvalues` | `.singular_values`, `.eigenvalues` |
| `.U`, `.Vh` | `.left_singular_vectors`, `.right_singular_vectors.T` |
| `model.W_E`, `model.W_U` | `model.W_E`, `model.W_U` |
| `model.all_composition_scores("K")[1, 6, 3, 3]` | `model.composition("k", model.head(1, 6), model.head(3, 3))` |
| `((model.W_E - model.W_E.mean(0)) @ model.OV[3, 0] @ model.W_U).eigenvalues` | `head.ov.vocabulary_eigenvalues` |
| `eigenvalues.sum().real / eigenvalues.abs().sum()` of these | `head.ov.copying` |

Eigenvalues over the vocabulary are of the circuit centred over the tokens
([definitions, section 1](definitions.md#1-conventions)), because a softmax cannot see a constant. Without
`- model.W_E.mean(0)` the values differ: SmolLM2-135M-Instruct's 18.6 has a ratio of 0.59 with it, and 0.28 without.

Under rotary positions `head.qk` is at offset 0, without a rotation, and compositions use W_QK with its mean rotation
over the offsets ([definitions, section 3](definitions.md#3-composition)). So for rotary models alone the norm of
`sender.ov.matrix() @ receiver.qk.matrix().T`, over both norms, is not `model.composition("k", sender, receiver)`, nor
is TransformerLens's score.
"""
SECTIONS: dict[str, list[str]] = {
    "": [
        "ovqk.library.open as ovqk.open",
        "ovqk.library.LibraryModel",
        "ovqk.library.LibraryModel.head",
        "ovqk.library.LibraryModel.heads",
        "ovqk.library.LibraryModel.composition",
        "ovqk.library.Head",
        "ovqk.library.Head.value",
        "ovqk.library.Head.rows",
        "ovqk.library.Head.portrait",
        "ovqk.library.CircuitOfHead",
        "ovqk.library.CircuitOfHead.matrix",
        "ovqk.library.CircuitOfHead.tokens",
        "ovqk.library.OV",
        "ovqk.library.OV.pairs",
        "ovqk.library.QK",
    ],
    "Results": [
        "ovqk.records.results.load_results as ovqk.load_results",
        "ovqk.records.results.load_table as ovqk.load_table",
        "ovqk.records.results.cell_folders as ovqk.cell_folders",
    ],
    "Metrics": ["ovqk.metrics.Metric", "ovqk.metrics.metric_names"],
    "Figures of models beside each other": ["ovqk.figures.comparisons.*", "ovqk.figures.depth.depth_curves"],
    "Figures of a circuit": ["ovqk.figures.circuits.circuit", "ovqk.figures.circuits.layout"],
    "Figures of one head": ["ovqk.figures.portraits.*"],
    "Report": ["ovqk.report.write.write_report"],
    "From a config to a record": ["ovqk.cell.run_cell", "ovqk.analyse.analyse", "ovqk.records.record.Analysis"],
    "Circuits": [
        "ovqk.circuits.factors.Factors",
        "ovqk.circuits.factors.ov_factors",
        "ovqk.circuits.factors.qk_factors",
        "ovqk.circuits.maps.decompose",
        "ovqk.circuits.spectra.spectrum_metrics",
    ],
}
"""Heading -> dotted names; `as` gives the name to show, and `*` stands for all public functions of a module."""
PARTS = re.compile(r"^(Args|Attributes|Returns|Raises|Columns):\s*(.*)$")


def page() -> str:
    """Return the whole page."""
    parts = [OPENING]
    for title, names in SECTIONS.items():
        parts += [f"## {title}\n"] if title else []
        parts += [entry(*each) for name in names for each in found(name)]
    return "\n".join(parts)


def found(name: str) -> list[tuple[str, Any]]:
    """Return (name to show, object) for a line of SECTIONS."""
    dotted, _, shown = name.partition(" as ")
    place, _, last = dotted.rpartition(".")
    if last == "*":
        module = importlib.import_module(place)
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [(n, f) for n, f in functions if f.__module__ == place and not n.startswith("_")]
        return [
            (f"{place}.{n}", f)
            for n, f in sorted(own, key=lambda each: inspect.unwrap(each[1]).__code__.co_firstlineno)
        ]
    try:
        return [(shown or dotted, getattr(importlib.import_module(place), last))]
    except ModuleNotFoundError:
        module_name, _, owner = place.rpartition(".")
        return [(f"{owner}.{last}", getattr(getattr(importlib.import_module(module_name), owner), last))]


def entry(name: str, thing: Any) -> str:
    """Return the section on a function or a class: its call, its docstring, and a class's properties."""
    lines = [
        f"### {name}\n",
        f"    {call(name, thing)}\n" if not inspect.isclass(thing) else "",
        prose(inspect.getdoc(thing) or ""),
    ]
    if inspect.isclass(thing):
        own = {n: p for n, p in vars(thing).items() if isinstance(p, property) and not n.startswith("_")}
        lines += [f"- `{n}`: {prose(inspect.getdoc(p) or '').strip()}" for n, p in own.items()]
        lines += [""] if own else []
    return "\n".join(line for line in lines if line is not None).replace("\n\n\n", "\n\n")


def call(name: str, thing: Any) -> str:
    """Return a function's name with its parameters and their defaults, without annotations."""
    parameters = inspect.signature(inspect.unwrap(thing)).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.name != "self"]
    return re.sub(r"<function [^>]*>+( at 0x\w+>)?", "...", f"{name}{inspect.Signature(plain)}")


def prose(doc: str) -> str:
    """Return a docstring as Markdown: lists of arguments, attributes and errors become bullets."""
    lines: list[str] = []
    inside = False
    for line in doc.splitlines():
        if match := PARTS.match(line):
            inside = not match[2]
            lines += ["", f"*{match[1]}*: {match[2]}".rstrip(" :") + (":" if not match[2] else ""), *[""] * inside]
        elif inside and re.match(r"^    \S", line):
            named = re.match(r"([\w, *]+): (.*)", line.strip())
            lines.append(f"- `{named[1]}`: {named[2]}" if named else f"- {line.strip()}")
        elif inside and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}", file=sys.stderr)
