"""The content for a cell's W&B run, from its record alone: curves, eigenvalues, histograms, tables and scalars.

It is plain data, which `tracking.run` logs. No name contains a head: heads are rows in tables and lines in charts, so
that all models' runs use the same names, whatever their size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk import wording
from ovqk.metrics import METRICS, ratios, shown_in
from ovqk.records.comparison import QUARTERS, quarter_means, relative_depth, roles
from ovqk.records.relation_pairs import pairs_by_head
from ovqk.records.results import load_table

MAX_ROWS = 10_000  # W&B cuts longer tables; the full ones stay in Parquet
BINS = 32
NUMBERS = ("integer", "floating", "mixed-integer-float", "decimal")  # pandas' names for a column's values
SHOWN_HEADS = 8  # heads whose eigenvalues are drawn if there is neither claim nor candidate
SHOWN_TOKENS = 5  # tokens at each end of a component
SHOWN_COORDINATES = ("model", "task", "analysis")
TABLES = (
    "heads",
    "layers",
    "tests",
    "verdicts",
    "candidates",
    "nulls",
    "composition",
    "virtual_heads",
    "directions",
    "roles",
    "joint",
    "fidelity",
    "cycles",
    "relations",
)
"""Tables that are shown if the analysis made them; spectra and offsets are drawn, or in Parquet."""
COMPONENT = ["layer", "head", "circuit", "kind", "component"]
LEADING = {
    "composition": ("score_above_random", False),
    "virtual_heads": ("score", False),
    "directions": ("component", True),
    "relations": ("raises", False),
}
"""Table -> the column that decides which rows of a long table to keep, and whether it rises; else row order decides."""


@dataclass(frozen=True)
class Panels:
    """A run's content.

    Attributes:
        config: flat coordinates to group and filter by, and the resolved choice under `cfg`.
        curves: one row per layer: layer, relative_depth, and the values drawn over them.
        eigenvalues: `CIRCUIT_SPACE` -> rows for a line chart (step, lineKey, lineVal).
        histograms: metric -> (counts, edges).
        tables: name -> at most MAX_ROWS rows.
        scalars: flat, for the run's summary.
    """

    config: dict[str, Any]
    curves: pd.DataFrame
    eigenvalues: dict[str, pd.DataFrame]
    histograms: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
    tables: dict[str, pd.DataFrame]
    scalars: dict[str, Any]


def read_panels(folder: Path, record: dict[str, Any]) -> Panels:
    """Return the content for a done cell's run.

    Raises:
        FileNotFoundError: heads.parquet is not there.
    """
    made = {name: table for name in (*TABLES, "spectra") if (table := load_table(folder, name)) is not None}
    if "heads" not in made:
        raise FileNotFoundError(f"{folder / 'heads.parquet'} is missing")
    heads = made["heads"]
    tables, left_out = _tables(made, record)
    scalars = health(record) | record["summary"] | _comparison(folder, heads, record)
    return Panels(
        config=run_config(record),
        curves=layer_curves(heads, made.get("layers"), record["summary"]["n_layers"]),
        eigenvalues=_eigenvalues(made),
        histograms=_histograms(heads),
        tables=tables,
        scalars=scalars | {f"rows_left_out/{name}": rows for name, rows in left_out.items()},
    )


def run_config(record: dict[str, Any]) -> dict[str, Any]:
    """Return flat coordinates to group and filter by, and the resolved choice under `cfg`."""
    coordinates = {key: record[key] for key in ("model", "task", "analysis", "seed", "cell_id", "sweep")}
    more = {
        "processing": record["processing"]["applied"],
        "embedding": record["provenance"]["config"]["analysis"]["embedding"],
        "loaded_by": record["loaded_by"],
        "weights_digest": record["provenance"]["weights_digest"],
        "n_layers": record["summary"]["n_layers"],
        "n_heads": record["summary"]["n_heads"],
        "schema_version": record["schema_version"],
        "git_commit": record["provenance"]["git_commit"],
    }
    local = ("results_dir", "sweep", "force", "tracking")  # these belong to this run of the cell, not to the cell
    chosen = {key: value for key, value in record["provenance"]["config"].items() if key not in local}
    return coordinates | more | {"cfg": chosen}


def layer_curves(heads: pd.DataFrame, layers: pd.DataFrame | None, n_layers: int) -> pd.DataFrame:
    """Return means over each layer's heads, and the layer's own metrics (`summed_`), by layer and depth."""
    wanted = [name for name in shown_in("curve") if name in heads and heads[name].notna().any()]
    curves = heads.groupby("layer", as_index=False)[wanted].mean()
    curves.insert(1, "relative_depth", relative_depth(curves["layer"], n_layers))
    if layers is None:
        return curves
    return curves.merge(layers.rename(columns=lambda name: name if name == "layer" else f"summed_{name}"), on="layer")


def health(record: dict[str, Any]) -> dict[str, Any]:
    """Return the cell's state and cost: `status` and `health/...`."""
    made = record["provenance"]
    words = {place: sum(map(_count, record["words"].get(place, {}).values())) for place in ("kept", "dropped")}
    return {
        "status": record["status"],
        "health/wall_seconds": made["wall_seconds"],
        "health/null_seconds": made.get("null_seconds"),
        "health/peak_memory_mb": made["peak_memory_mb"],
        "health/unavailable_metrics": len(record["unavailable"]),
        "health/notes": len(record["notes"]),
        "health/words_kept": words["kept"],
        "health/words_dropped": words["dropped"],
    }


def _count(words: int | list[str]) -> int:
    return words if isinstance(words, int) else len(words)


def _comparison(folder: Path, heads: pd.DataFrame, record: dict[str, Any]) -> dict[str, Any]:
    """Return the cell's rows in the comparison: `role/ROLE/depth`, `/verdict` and `/heads`, `quarter/N/METRIC`."""
    scalars: dict[str, Any] = {}
    for row in roles([folder]).to_dict("records"):
        if row["role"]:
            scalars |= {f"role/{row['role']}/{key}": row[key] for key in ("depth", "verdict", "heads")}
    means = quarter_means(heads, record["summary"]["n_layers"])
    for number, name in enumerate(QUARTERS, start=1):
        scalars |= {f"quarter/{number}/{metric}": value for metric, value in means.loc[name].dropna().items()}
    return scalars


def _histograms(heads: pd.DataFrame) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    found = {}
    for name in shown_in("histogram"):
        values = heads[name].dropna().to_numpy() if name in heads else np.empty(0)
        if len(values):
            low, high = METRICS[name].low, METRICS[name].high
            own = (float(values.min()), float(values.max()))
            span = (own[0] if low is None else low, own[1] if high is None else high)
            found[name] = np.histogram(np.clip(values, *span), bins=BINS, range=span)
    return found


def _eigenvalues(made: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return some heads' eigenvalues (real parts), by falling modulus, for each circuit and space."""
    if "spectra" not in made:
        return {}
    spectra = made["spectra"]
    eigen = spectra[(spectra["kind"] == "eigen") & (spectra["offset"] == spectra["offset"].min())]
    drawn = eigen.merge(_drawn_heads(made), on=["layer", "head"])
    drawn = drawn.rename(columns={"index": "step", "label": "lineKey", "re": "lineVal"})
    return {
        f"{circuit}_{space}": rows[["step", "lineKey", "lineVal"]]
        for (circuit, space), rows in drawn.groupby(["circuit", "space"])
    }


def _drawn_heads(made: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return layer, head and label for the claimed heads, else for candidates, else for extreme eigenvalue ratios."""
    if "verdicts" in made:
        shown = made["verdicts"].query("kind == 'head'")[["layer", "head", "role"]]
    elif len(made.get("candidates", ())):
        shown = made["candidates"][["layer", "head", "role"]].drop_duplicates()
    else:
        heads = made["heads"]
        between_tokens = [name for (_, space), name in ratios().items() if space == "vocab"]
        ratio = next((name for name in between_tokens if name in heads and heads[name].notna().any()), None)
        strongest = heads.index[:0] if ratio is None else heads[ratio].abs().nlargest(SHOWN_HEADS).index
        shown = heads.loc[strongest, ["layer", "head"]].assign(role="")
    shown = shown.astype({"layer": int, "head": int})
    shown["role"] = shown["role"].map(wording.role)
    named = shown.groupby(["layer", "head"])["role"].agg("+".join).reset_index()
    labels = [f"{row.layer}.{row.head} {row.role}".strip() for row in named.itertuples(index=False)]
    return named[["layer", "head"]].assign(label=labels)


def _tables(made: dict[str, pd.DataFrame], record: dict[str, Any]) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """Return the tables with the cell's coordinates first, and how many rows were cut from each that is too long."""
    tables: dict[str, pd.DataFrame] = {}
    left_out: dict[str, int] = {}
    for name in filter(made.__contains__, TABLES):
        table = SHAPES[name](made[name]) if name in SHAPES else made[name]
        if len(table) > MAX_ROWS:
            left_out[name] = len(table) - MAX_ROWS
            if name in LEADING:
                column, rising = LEADING[name]
                table = table.sort_values(column, ascending=rising, kind="stable")
            table = table.head(MAX_ROWS)
        coordinates = pd.DataFrame({key: record[key] for key in SHOWN_COORDINATES}, index=table.index)
        tables[name] = pd.concat([coordinates, table], axis=1)
    return tables, left_out


def _quantiles(nulls: pd.DataFrame) -> pd.DataFrame:
    """Return one row per null, with its quantiles as columns."""
    keys = [name for name in nulls.columns if name not in ("quantile", "value")]
    number = nulls.groupby(keys, dropna=False, sort=False, observed=True).ngroup()
    wide = nulls.assign(number=number).pivot(index="number", columns="quantile", values="value")
    wide = wide.rename(columns=lambda quantile: f"q{100 * quantile:g}").rename_axis(columns=None)
    return nulls.loc[~number.duplicated(), keys].reset_index(drop=True).join(wide)


def _ends(directions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per component, with the leading tokens at each end of each side: read, read_opposite, ..."""
    shown = directions[directions["rank"] <= SHOWN_TOKENS]
    first = ["value", "value_im", "cluster_size"]
    columns = [shown[name].tolist() for name in (*COMPONENT, *first, "side", "sign", "token")]
    return pd.DataFrame(list(_component_rows(zip(*columns, strict=True))), columns=[*COMPONENT, *first, *ENDS.values()])


ENDS = {
    ("read", 1): "read",
    ("read", -1): "read_opposite",
    ("write", 1): "write",
    ("write", -1): "write_opposite",
}
SHAPES = {"nulls": _quantiles, "directions": _ends, "relations": pairs_by_head}
"""Tables that are shown in another, shorter shape than in Parquet."""


def _component_rows(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for component, part in groupby(rows, key=lambda row: row[: len(COMPONENT) + 3]):
        ends: dict[str, list[str]] = {name: [] for name in ENDS.values()}
        for *_, side, sign, token in part:
            ends[ENDS[side, sign]].append(repr(token))
        yield (*component, *(" ".join(tokens) for tokens in ends.values()))


def plain_table(frame: pd.DataFrame) -> tuple[list[type], list[list[Any]]]:
    """Return each column's type (bool, float or str) and the rows; missing or infinite values are None."""
    kinds, columns = zip(*[_plain_column(column) for _, column in frame.items()], strict=True)
    return list(kinds), [list(row) for row in zip(*columns, strict=True)]


def _plain_column(column: pd.Series) -> tuple[type, list[Any]]:
    found = pd.api.types.infer_dtype(column, skipna=True)
    missing = column.isna().to_numpy(copy=True)
    kind: type = {"boolean": bool, "string": str}.get(found, float if found in NUMBERS else str)
    if kind is float:
        missing |= ~np.isfinite(column.to_numpy(dtype=float, na_value=np.nan))
    values = column.map(str) if kind is str and found != "string" else column
    plain = values.to_numpy(dtype=object, copy=True)
    plain[missing] = None
    return kind, plain.tolist()
