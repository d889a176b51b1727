"""The report's page: records, thinned to a few megabytes, in one HTML file.

The page's parts (style, script, skeleton) are the files in `template/`. The data are JSON that no text in a record can
end or turn into markup, and the script shows every text as text.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ovqk import wording
from ovqk.figures import colours
from ovqk.figures.colours import Scale
from ovqk.figures.embedded import theme
from ovqk.metrics import COMPOSITION_METRICS, METRICS, ratios, shares, shown_in
from ovqk.records.cells import Cell, CellTables, Failure, Heads, Json, labels
from ovqk.records.comparison import could_be_corroborated
from ovqk.records.role_tests import about_roles
from ovqk.records.steps import said, shared_steps
from ovqk.report import pictures, thinning
from ovqk.report.cycle_image import cycle_image
from ovqk.report.opening import BY_FREQUENCY, opening
from ovqk.report.prompts_data import prompt_data, prompt_palette, prompt_words
from ovqk.report.thinning import DETAILS, Detail, Grid, Pool, columnar, short

BYTES = 5_000_000
"""How large a page with up to CELLS cells may be; a page with more cells may be larger in proportion."""
CELLS = 20
STYLES = ("page.css",)
SCRIPTS = tuple(
    f"{name}.js"
    for name in ("elements", "plots", "panels", "compare", "prompts", "atlas", "head", "circuit", "provenance", "main")
)
ROLE_TABLES = ("verdicts", "candidates", "joint")  # whose roles the page names
THINNED: dict[str, Callable[[CellTables, Grid, Detail, Heads, Pool], Json]] = {
    "spectra": thinning.spectra,
    "offsets": thinning.offsets,
    "directions": thinning.directions,
}


# --- one page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A page, and its detail for heads that are neither claimed nor candidates."""

    html: str
    detail: Detail

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self.html.encode())


def make_page(
    cells: Sequence[Cell],
    failures: Sequence[Failure],
    beside: Path,
    figures: str | None = None,
    limit: int | None = None,
) -> Page:
    """Return the page with as much detail as fits.

    Args:
        cells, failures: the cells to show.
        beside: the page's folder, from which it links to the cells' files.
        figures: the folder beside it that holds its figures, if any.
        limit: the largest size in bytes; if None, in proportion to the number of cells.
    """
    most = limit or BYTES * max(1, len(cells) / CELLS)
    drawn = pictures.draw_depth(cells)
    for detail in DETAILS:
        data = page_data(cells, failures, beside, detail, drawn) | {"figures": figures}
        page = Page(render(data), detail)
        if page.size <= most:
            break
    return page


def render(data: Json) -> str:
    """Return one HTML file that loads nothing and may run only its own script."""
    template = files("ovqk.report") / "template"

    def joined(names: Iterable[str]) -> str:
        return "\n".join((template / name).read_text(encoding="utf-8") for name in names)

    script = f'"use strict";\n(() => {{\n{joined(SCRIPTS)}\n}})();'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "POLICY": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:",
        "STYLE": f"{joined(STYLES)}\n:root {{ {theme(dark=False)} }}\n:root[data-dark] {{ {theme(dark=True)} }}",
        "DATA": embedded(data),
        "SCRIPT": script,
    }
    page = (template / "page.html").read_text(encoding="utf-8")
    for name, content in parts.items():
        before, _, after = page.partition(f"%{name}%")
        page = before + content + after
    return page


def embedded(data: Any) -> str:
    """Return JSON for a script element: ASCII only, and no character that begins or ends markup."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(
    cells: Sequence[Cell], failures: Sequence[Failure], beside: Path, detail: Detail, drawn: pictures.Drawn = ()
) -> Json:
    """Return the page's data: words, palettes, metrics, every cell, and the values that several cells share."""
    pool = Pool()
    made: dict[tuple[str, str, int], Json] = {}
    names = cell_names(cells)
    told = {name: [said(group)] for group in shared_steps(cell.record for cell in cells) for name in group}
    return {
        "metrics": _metrics(cells),
        "shown": _shown(),
        "scales": _scales(cells),
        "roles": _roles(cells),
        "wording": {
            "nulls": wording.NULLS,
            "verdicts": wording.VERDICTS,
            "flags": wording.FLAGS,
            "arrows": wording.ARROWS,
            "modes": wording.MODES,
            "parts": wording.PARTS,
            "candidates_worth": wording.CANDIDATES_WORTH,
            "ranked_by": {name: wording.ranked_by(name) for name in _ranking(cells)},
            "patterns": wording.PATTERNS,
            "by_frequency": {"title": "By frequency", "says": BY_FREQUENCY},
            "pair_metrics": {name: wording.metric(name) for name in COMPOSITION_METRICS},
        }
        | pictures.panel_words()
        | prompt_words(cells),
        "palette": {
            "sequential": [colours.SEQUENTIAL, colours.SEQUENTIAL],
            "diverging": [colours.DIVERGING, colours.DIVERGING_DARK],
            "categories": [colours.CATEGORIES, colours.CATEGORIES_DARK],
            "missing": [colours.MISSING, colours.MISSING_DARK],
            "verdicts": colours.VERDICT_COLOURS,
            "modes": colours.MODES,
            "band": colours.BAND,
            "crossed": colours.CROSSED,
        }
        | prompt_palette(cells),
        "cells": [
            _cell(cell, name, beside, detail, pool, _marked(cells, cell), made, told.get(cell.record["model"], []))
            | {"label": label, "line": line, "graph": pictures.graph(cell, cells)}
            | {"frequencies": cycle_image(cell, label)}
            for cell, name, label, line in zip(cells, names, labels(cells), pictures.line_places(cells), strict=True)
        ],
        "depth": pictures.depth_data(cells, drawn, pool),
        "limits": pictures.limits(),
        "opening": opening(cells, failures),
        "failures": [vars(failure) for failure in failures],
        "detail": vars(detail),
        "tokens": pool.tokens.items,
        "pool": pool.items,
    }


def cell_names(cells: Sequence[Cell]) -> list[str]:
    """Return each cell's name in the page: `model/task` for the first, and with analysis or id for further ones."""
    found: list[str] = []
    for cell in cells:
        model, task = (quote(part, safe="") for part in cell.place)
        record = cell.record
        endings = ("", f"~{record['analysis']}", f"~{record['analysis']}-{record['cell_id']}", f"~{len(found)}")
        found.append(next(name for end in endings if (name := f"{model}/{task}{end}") not in found))
    return found


def _marked(cells: Sequence[Cell], cell: Cell) -> Heads:
    """Return the heads that are marked in any cell with the same weights, so that these cells can share data."""
    return set().union(*(other.marked() for other in cells if other.weights == cell.weights))


def _metrics(cells: Sequence[Cell]) -> Json:
    """Return name -> title, formula and so on, for each metric that some cell has a column for."""
    there = {name for cell in cells for name in cell.tables["heads"].columns}
    return {
        name: {
            "title": metric.title,
            "formula": metric.formula,
            "source": metric.source,
            "circuit": metric.circuit,
            "chance": metric.chance,
            "low": metric.low,
            "high": metric.high,
            "of_task": metric.is_readout,
            "later_layers": "block0" in metric.needs,
            "counts_dimensions": metric.counts_dimensions,
            "topic": metric.topic,
        }
        for name, metric in METRICS.items()
        if name in there
    }


def _shown() -> Json:
    """Return the metrics for each place in the page: along the depth, in a head's profile, below its eigenvalues."""
    profile = [METRICS[name] for name in METRICS if "profile" in METRICS[name].shown]
    below: dict[str, dict[str, str]] = {}
    for (circuit, space), name in ratios().items():
        below.setdefault(circuit, {})[space] = name
    return {
        "depth": shown_in("depth"),
        "profile": {circuit: [metric.name for metric in profile if metric.circuit == circuit] for circuit in below},
        "ratios": below,
        "scatter": {"x": "qk_symmetry", "y": "qk_positional_share"},
        "offsets": "qk_prev_auc",
        "shares": {
            kind: [
                {"metric": metric, "name": name, "group": part}
                for part, names in parts.items()
                for metric, name in names.items()
            ]
            for kind, parts in shares().items()
        },
    }


def _scales(cells: Sequence[Cell]) -> Json:
    """Return task -> metric -> its scale over all models with this task, so that their colours can be compared."""
    found: Json = {}
    for task in dict.fromkeys(cell.record["task"] for cell in cells):
        tables = [cell.tables["heads"] for cell in cells if cell.record["task"] == task]
        found[task] = {}
        for name in METRICS:
            values = [value for table in tables if name in table for value in table[name].to_numpy(float)]
            if any(math.isfinite(value) for value in values):
                scale = Scale.of(name, values)
                ends = {key: short(getattr(scale, key)) for key in ("low", "centre", "high")}
                found[task][name] = {"kind": scale.kind} | ends
    return found


def _ranking(cells: Sequence[Cell]) -> list[str]:
    """Return the metrics by which these cells' candidates are ranked."""
    found = dict[str, None]()
    for table in (cell.tables["candidates"] for cell in cells if "candidates" in cell.tables):
        for row in table[table["ranked"]].to_dict("records"):
            found |= dict.fromkeys([row["metric"], *str(row.get("beside") or "").split()])
    return [name for name in found if name in METRICS]


def _roles(cells: Sequence[Cell]) -> Json:
    """Return role -> its name in plain words, and its letters in pictures."""
    tables = [cell.tables[name] for cell in cells for name in ROLE_TABLES if name in cell.tables]
    names = wording.short_roles(role for table in tables if "role" in table for role in table["role"])
    return {role: {"name": wording.role(role), "short": letters} for role, letters in names.items()}


# --- one cell ------------------------------------------------------------------------------------------------


def _cell(
    cell: Cell,
    name: str,
    beside: Path,
    detail: Detail,
    pool: Pool,
    marked: Heads,
    made: dict[tuple[str, str, int], Json],
    told: Sequence[str] = (),
) -> Json:
    record, tables = cell.record, cell.tables
    heads = Grid.of(tables["heads"])
    folder = "/".join(quote(part) for part in Path(os.path.relpath(cell.folder, beside)).parts)
    keys = ("model", "task", "analysis", "cell_id", "seed", "sweep", "schema_version", "loaded_by", "notes", "claims")
    rows = heads.rows(tables["heads"])
    content: Json = {key: record.get(key) for key in keys}
    content["notes"] = [*(content["notes"] or []), *told]
    content |= {
        "name": name,
        "weights": cell.weights,
        "folder": folder,
        "layers": heads.layers,
        "heads": heads.heads,
        "d_head": cell.d_head,
        "columns": {
            metric: pool.add([short(value) for value in rows[metric].to_numpy(float)])
            for metric in METRICS
            if metric in rows and rows[metric].notna().any()
        },
        "spans": pictures.spans(tables["heads"]),
        "columns_there": [metric for metric in METRICS if metric in tables["heads"]],
        "unavailable": record.get("unavailable", {}),
        "provenance": _provenance(record),
        "tables": record.get("tables", {}),
    }
    if "unstable" in tables["heads"]:
        unstable = tables["heads"][tables["heads"]["unstable"].fillna("") != ""]
        content["unstable"] = {f"{r.layer}.{r.head}": r.unstable for r in unstable.itertuples()}
    if "layers" in tables:
        content["by_layer"] = columnar(tables["layers"], pool)
    if "verdicts" in tables:
        verdicts = tables["verdicts"]
        verdicts = verdicts.assign(decidable=could_be_corroborated(verdicts))
        if "reason" in verdicts:
            verdicts["reason"] = verdicts["reason"].map(wording.reason, na_action="ignore")
        content["verdicts"] = columnar(verdicts, pool)
    if "relations" in tables:
        content["relations"] = thinning.relations(tables["relations"], heads)
    if "candidates" in tables:
        content["candidates"] = columnar(tables["candidates"], pool)
    if "tests" in tables:
        tests = pictures.with_bounds(thinning.with_quantiles(tables["tests"], tables.get("nulls")))
        content["tests"] = columnar(tests.assign(of_role=about_roles(tables["tests"], record)), pool)
    for table, thin in THINNED.items():
        if table in tables:
            key = (table, *cell.print_of(table))
            if key not in made:
                made[key] = thin(tables, heads, detail, marked, pool)
            content[table] = made[key]
    if "composition" in tables:
        content["composition"] = columnar(thinning.partners(tables["composition"], detail.partners, marked), pool)
    return content | prompt_data(cell, detail, marked, pool)


def _provenance(record: Json) -> Json:
    found = record["provenance"]
    keys = (
        "weights_digest", "revision", "versions", "git_commit", "git_dirty", "wall_seconds", "peak_memory_mb", "device",
        "threads", "peak_gpu_memory_mb",
    )  # fmt: skip
    nulls = (found.get("config") or {}).get("nulls")
    return {key: found.get(key) for key in keys} | {
        "processing": record["processing"],
        "words": record.get("words", {}),
        "draws": (nulls or {}).get("draws"),
    }
