"""Checks that a done cell's record and tables have the form that ovqk writes.

They may come from someone else, or be damaged. If several cells are read, an unsound one is left out with a reason.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovqk.errors import CONTROL

CELL_ID = re.compile("[0-9a-f]{12}")
TABLE = re.compile("[a-z_]{1,40}")
MOST_LAYERS, MOST_HEADS = 10_000, 10_000_000
"""The largest numbers of layers and heads. No model has more, and tables by layer and head would not fit in memory."""
ROWS_PER_BYTE, FEW_ROWS = 8, 100_000
"""If a table has more than FEW_ROWS rows, it may have at most this many for each byte; a sound one holds numbers."""
MOST_COLUMNS = 2_000
"""The largest number of columns. The widest table that ovqk writes has some eighty."""
LARGEST = 2**63 - 1
"""The largest whole number in a record, with either sign; tables, JavaScript and W&B's protocol take no larger one."""
POSITIONS = {
    "heads": ("layer", "head"),
    "layers": ("layer",),
    "spectra": ("layer", "head"),
    "offsets": ("layer", "head"),
    "directions": ("layer", "head"),
    "composition": ("sender_layer", "sender_head", "receiver_layer", "receiver_head"),
    "virtual_heads": ("sender_layer", "sender_head", "receiver_layer", "receiver_head"),
    "tests": ("layer", "head"),
    "nulls": ("layer", "head"),
    "verdicts": ("layer", "head"),
    "candidates": ("layer", "head"),
    "activations": ("layer", "head"),
    "roles": ("layer", "head"),
    "joint": ("layer", "head"),
    "fidelity": ("layer",),
    "relations": ("layer", "head"),
}
"""Table -> its columns with the numbers of layers and heads."""
TEXTS: dict[str, tuple[str, ...]] = {
    "heads": ("unstable",),
    "spectra": ("circuit", "space", "kind"),
    "directions": ("circuit", "kind", "side", "token"),
    "composition": ("mode",),
    "tests": ("role", "metric", "prediction", "null"),
    "nulls": ("role", "metric", "null"),
    "verdicts": ("kind", "role", "verdict"),
    "candidates": ("role",),
    "activations": ("role", "half"),
    "roles": ("role", "verdict"),
    "joint": ("kind", "role"),
    "fidelity": ("embedding",),
    "relations": ("source", "target"),
    "cycles": ("part",),
    "frequencies": ("part",),
}
"""Table -> its text columns that readers need."""
NUMBERS: dict[str, tuple[str, ...]] = {
    "spectra": ("offset", "index", "re", "im"),
    "offsets": ("offset", "mean_score"),
    "directions": ("component", "value", "cluster", "cluster_size", "sign", "rank", "score"),
    "composition": ("score", "score_above_random", "percentile"),
    "virtual_heads": ("score", "ov_copying"),
    "tests": ("value", "p", "q"),
    "nulls": ("quantile", "value"),
    "verdicts": ("value", "effect", "p", "q"),
    "fidelity": ("n_words", "cosine"),
    "relations": ("ov_relation_score", "ov_relation_suppress"),
    "cycles": ("layer", "head", "frequency", "share", "q"),
    "frequencies": ("layer", "head", "frequency", "power"),
}
"""Table -> its number columns that readers need, besides POSITIONS."""

TABLES = frozenset({*POSITIONS, "cycles", "frequencies"})
"""Every table that an analysis may make."""


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _flat(value: Any) -> bool:
    return isinstance(value, dict) and all(each is None or _is(int, float)(each) for each in value.values())


def _name(value: Any) -> bool:
    return isinstance(value, str) and CONTROL.search(value) is None


def _describes(value: Any) -> bool:
    return isinstance(value, dict) and all(_name(text) for text in value.values() if isinstance(text, str))


def _seed(value: Any) -> bool:
    return _is(int)(value) and 0 <= value < 2**32


def _text_or_null(value: Any) -> bool:
    return value is None or _name(value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_name, "a text without control characters"),
    "task": (_name, "a text without control characters"),
    "analysis": (_name, "a text without control characters"),
    "cell_id": (lambda value: isinstance(value, str) and CELL_ID.fullmatch(value) is not None, "12 digits in 0-9a-f"),
    "schema_version": (_is(int), "a whole number"),
    "seed": (_seed, "0 .. 2^32 - 1"),
    "sweep": (_text_or_null, "null or a text without control characters"),
    "summary": (_flat, "numbers by name"),
    "unavailable": (lambda value: isinstance(value, dict) and _texts([*value.values()]), "texts by name"),
    "notes": (_texts, "a list of texts"),
    "words": (_is(dict), "an object"),
    "words.kept": (_is(dict), "an object"),
    "words.dropped": (_is(dict), "an object"),
    "claims": (_describes, "texts without control characters, by name"),
    "processing": (_is(dict), "an object"),
    "processing.applied": (_name, "a text without control characters"),
    "provenance": (_is(dict), "an object"),
    "provenance.wall_seconds": (_is(int, float), "a number"),
    "provenance.peak_memory_mb": (_is(int, float), "a number"),
    "provenance.weights_digest": (_name, "a text without control characters"),
    "provenance.identity": (_is(dict), "an object"),
    "provenance.config": (_is(dict), "an object"),
    "provenance.config.analysis": (_is(dict), "an object"),
    "provenance.config.task": (_is(dict), "an object"),
    "provenance.config.tracking": (_is(dict), "an object"),
    "provenance.config.tracking.project": (_text_or_null, "null or a text without control characters"),
    "provenance.config.tracking.entity": (_text_or_null, "null or a text without control characters"),
}
"""Key in a done cell's record, with dots between levels -> a check for its value, and the allowed values in words."""
OPTIONAL = {
    "sweep",
    "unavailable",
    "words",
    "words.kept",
    "words.dropped",
    "claims",
    "provenance.identity",
    "provenance.config.tracking",
    "provenance.config.tracking.project",
    "provenance.config.tracking.entity",
}
"""Keys that may be missing."""


def record_fault(record: Mapping[str, Any]) -> str | None:
    """Return a sentence on the first fault in a done cell's record; None if it is sound."""
    for key, (fits, allowed) in FIELDS.items():
        place: Any = record
        for part in key.split("."):
            place = place.get(part, FIELDS) if isinstance(place, Mapping) else FIELDS
        if place is FIELDS:  # marks a missing key
            if key not in OPTIONAL:
                return f"its record.json has no {key}"
        elif not fits(place):
            return f"its record.json gives {key} as {_short(place)}; allowed: {allowed}"
    summary = record["summary"]
    for key, most in (("n_layers", MOST_LAYERS), ("n_heads", MOST_HEADS)):
        if not (_is(int)(summary.get(key)) and 1 <= summary[key] <= most):
            return f"its record.json gives summary.{key} as {_short(summary.get(key))}; allowed: 1 .. {most}"
    for key, value in _whole_numbers(record):
        if abs(value) > LARGEST:
            return f"its record.json gives {key} as {_short(value)}; allowed: whole numbers up to 2^63 - 1"
    return None


def _whole_numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield each whole number at any depth in a record, with its key as Python writes it."""
    waiting: list[tuple[str, Any]] = [("", record)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{each!s:.40}"[:120], inner) for each, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]
        elif isinstance(value, int):
            yield repr(key[1:])[1:-1], value


def tables_fault(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Return a sentence on the first fault in the tables that a sound record names; None if they are sound.

    Only the files' footers are read, and POSITIONS columns if the footer does not give their bounds.
    """
    there = [name for name in sorted(TABLES) if os.path.lexists(folder / f"{name}.parquet")]
    named = record.get("tables", dict.fromkeys(["heads", *there]))  # an earlier version named none
    if not isinstance(named, Mapping) or "heads" not in named or not all(map(TABLE.fullmatch, named)):
        return "its record.json does not name its tables"
    for name, rows in named.items():
        fault = _table_fault(folder / f"{name}.parquet", name, rows, record["summary"])
        if fault is not None:
            return f"{name}.parquet {fault}"
    for name in there:
        if name not in named:
            return f"{name}.parquet is there, and its record.json does not name it"
    return None


def _table_fault(path: Path, name: str, rows: Any, summary: Mapping[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return "is not there"
        with pq.ParquetFile(path) as file:
            return (
                _size_fault(file.metadata, rows, path.stat().st_size)
                or _columns_fault(file.schema_arrow, name)
                or _positions_fault(file, POSITIONS.get(name, ()), summary)
            )
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        return f"cannot be read ({type(error).__name__})"


def _size_fault(footer: pq.FileMetaData, rows: Any, size: int) -> str | None:
    if rows is not None and footer.num_rows != rows:
        return f"has {footer.num_rows} rows and not {_short(rows)}, as its record.json says"
    if footer.num_rows > FEW_ROWS + ROWS_PER_BYTE * size:
        return f"has {footer.num_rows} rows in {size} bytes"
    if footer.num_columns > MOST_COLUMNS:
        return f"has {footer.num_columns} columns; allowed: up to {MOST_COLUMNS}"
    return None


def _columns_fault(schema: pa.Schema, name: str) -> str | None:
    names = schema.names
    there = set(names)
    if len(there) < len(names):
        return f"has several columns of one name, {_short(next(each for each in names if names.count(each) > 1))}"
    for columns, fits, allowed in (
        ((*POSITIONS.get(name, ()), *NUMBERS.get(name, ())), _holds_numbers, "numbers"),
        (TEXTS.get(name, ()), _holds_texts, "texts"),
    ):
        for column in columns:
            if column not in there:
                return f"has no column {column}"
            if not fits(schema.field(column).type):
                return f"has {schema.field(column).type} in {column}; allowed: {allowed}"
    for field in schema:
        of_heads = name == "heads" and field.name not in TEXTS["heads"]
        if not (_holds_numbers(field.type) or pa.types.is_boolean(field.type)) and (
            of_heads or not _holds_texts(field.type)
        ):
            return f"has {field.type} in {field.name}; allowed: {'numbers' if of_heads else 'numbers or texts'}"
    return None


def _positions_fault(file: pq.ParquetFile, columns: tuple[str, ...], summary: Mapping[str, Any]) -> str | None:
    place = {column: index for index, column in enumerate(file.schema_arrow.names)}
    for column in columns:
        most = summary["n_layers"] if column.endswith("layer") else max(1, summary["n_heads"] // summary["n_layers"])
        for least, largest in _bounds(file, column, place[column]):
            if not (least >= 0 and largest < most):
                return f"has {column} {_short(least)} .. {_short(largest)}; allowed: 0 .. {most - 1}"
    return None


def _bounds(file: pq.ParquetFile, column: str, place: int) -> Iterator[tuple[Any, Any]]:
    """Yield a column's least and largest values, part by part: from the footer if it has them, else from the column."""
    unknown = []
    for group in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(group).column(place).statistics
        if found is not None and found.has_min_max:
            yield found.min, found.max
        else:
            unknown.append(group)
    for batch in file.iter_batches(row_groups=unknown, columns=[column]) if unknown else ():
        bounds = pc.min_max(batch.column(0)).as_py()
        if bounds["min"] is not None:  # a part may hold only nulls, because a role's row has no head
            yield bounds["min"], bounds["max"]


def _holds_numbers(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_null))


def _holds_texts(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
