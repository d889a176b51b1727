"""A cell's tables, thinned for the page.

Everything is kept about heads that are claimed or candidates, and the leading part about other heads. Values that
several cells share are held once, in a pool.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ovqk.records.cells import CellTables, Heads, Json

QUANTILES = (0.05, 0.5, 0.95)
FIRST_OFFSETS = 17  # kept one by one; later ones stand farther and farther apart
MOST_OFFSETS = 96
DIRECTION_COLUMNS = (
    "layer", "head", "circuit", "kind", "component", "value", "value_im", "cluster", "cluster_size",
    "side", "sign", "token", "contrast",
)  # fmt: skip
Short = float | int | None


@dataclass(frozen=True)
class Detail:
    """The detail that is kept for a head that is neither claimed nor a candidate; None stands for everything.

    Attributes:
        values: how many leading eigenvalues and singular values in each spectrum.
        tokens: how many tokens for each component's side and sign; 0 for no component.
        partners: how many strongest compositions for each head, mode and side.
        offsets: how many points in its offset profile.
    """

    values: int | None = None
    tokens: int | None = None
    partners: int | None = None
    offsets: int | None = None


DETAILS = (
    Detail(),
    Detail(values=32, tokens=6, partners=10, offsets=64),
    Detail(values=16, tokens=4, partners=6, offsets=40),
    Detail(values=8, tokens=2, partners=4, offsets=24),
    Detail(values=0, tokens=0, partners=2, offsets=0),
)
"""Details from the most to the least; the page takes the first that fits."""


@dataclass
class Texts:
    """Distinct texts in a list; each is known by its index."""

    items: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """Add the text unless it is there, and return its place."""
        if text not in self.places:
            self.places[text] = len(self.items)
            self.items.append(text)
        return self.places[text]


@dataclass
class Pool:
    """Distinct items, each held once, such as one model's spectra, which several tasks share."""

    items: list[Any] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    tokens: Texts = field(default_factory=Texts)

    def add(self, item: Any) -> int:
        """Add the item unless it is there, and return its place."""
        key = json.dumps(item, separators=(",", ":"))
        if key not in self.places:
            self.places[key] = len(self.items)
            self.items.append(item)
        return self.places[key]


def columnar(table: pd.DataFrame, pool: Pool) -> Json:
    """Return a table by columns, each in the pool. A text column is a list of distinct texts and indexes into it."""
    found: Json = {"rows": len(table)}
    for name in map(str, table.columns):
        values = [_plain(value) for value in table[name]]
        if any(isinstance(value, str) for value in values):
            texts = list(dict.fromkeys(value for value in values if value is not None))
            places = {text: place for place, text in enumerate(texts)}
            found[name] = {"texts": texts, "at": pool.add([None if v is None else places[v] for v in values])}
        else:
            found[name] = pool.add(values)
    return found


def _plain(value: Any) -> Any:
    """Return a table's value as JSON holds it; None if it is missing."""
    if value is None or isinstance(value, str | bool | list):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return short(float(value))
    return int(value)


def short(value: float) -> Short:
    """Return a number with 4 digits, and a whole number without a point; None if it is not finite.

    If the last of the digits is a 5, more are kept, all of them if need be: the page shows fewer, and rounded twice,
    5.3952 would become 5.395 and then 5.39.
    """
    if not math.isfinite(value):
        return None
    rounded = value
    for digits in range(4, 10):
        text = f"{value:.{digits - 1}e}".partition("e")[0]
        if text.rstrip("0")[-1] != "5":
            rounded = float(f"{value:.{digits}g}")
            break
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e6 else rounded


def _tuples(table: pd.DataFrame) -> Iterable[Any]:
    """Return the rows as named tuples."""
    return table.itertuples(index=False)


# --- tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A model's heads, in the order of their layers."""

    layers: int
    heads: int
    index: pd.MultiIndex

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Grid":
        """Return the grid for a heads table."""
        layers, heads = int(table["layer"].max()) + 1, int(table["head"].max()) + 1
        return cls(layers, heads, pd.MultiIndex.from_product([range(layers), range(heads)]))

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return a table with one row for each head, in the grid's order."""
        return table.set_index(["layer", "head"]).reindex(self.index)


def with_quantiles(tests: pd.DataFrame, nulls: pd.DataFrame | None) -> pd.DataFrame:
    """Return the tests, each with its null's quantiles as a list."""
    if nulls is None:
        return tests
    keys = ["role", "layer", "head", "metric", "null"]
    lists = nulls.sort_values("quantile", kind="stable").groupby(keys, dropna=False, sort=False)
    found = {
        tuple(_plain(part) for part in key): ([short(q) for q in rows["quantile"]], [short(v) for v in rows["value"]])
        for key, rows in lists
    }
    matched = [found.get(tuple(map(_plain, key)), ([], [])) for key in _tuples(tests[keys])]
    at, values = (pd.Series([pair[side] for pair in matched], index=tests.index, dtype=object) for side in (0, 1))
    return tests.assign(quantiles=at, quantile_values=values)


def spectra(tables: CellTables, grid: Grid, detail: Detail, marked: Heads, pool: Pool) -> Json:
    """Return eigenvalues (re, im; one from each conjugate pair) and singular values per head, circuit and space."""
    table = tables["spectra"]
    table = table[table["offset"] == table["offset"].min()]
    heads: list[dict[str, Any]] = [{} for _ in grid.index]
    bands: Json = {}
    for (circuit, space, kind), part in table.groupby(["circuit", "space", "kind"], sort=False):
        part = part.sort_values(["layer", "head", "index"], kind="stable")
        n = int(part["index"].max()) + 1
        values = part[["re", "im"]].to_numpy(float).reshape(-1, n, 2)
        places = part[["layer", "head"]].to_numpy()[::n].tolist()
        if kind == "singular":
            bands.setdefault(circuit, {})[space] = _band(values[:, :, 0])
        for (layer, head), own in zip(places, values, strict=True):
            keep = n if (layer, head) in marked or detail.values is None else min(n, detail.values)
            slot = heads[layer * grid.heads + head].setdefault(circuit, {}).setdefault(space, {"of": n})
            slot[kind] = _eigen(own[:keep]) if kind == "eigen" else [short(value) for value in own[:keep, 0]]
    return {"offset": int(table["offset"].min()), "bands": bands, "heads": [pool.add(head) for head in heads]}


def _eigen(values: np.ndarray) -> list[Short]:
    """Return re, im, re, im ... for real eigenvalues and, from each conjugate pair, for the one above the axis."""
    return [short(part) for re, im in values if im >= 0 for part in (re, im)]


def _band(sigma: np.ndarray) -> list[list[Short]]:
    """Return sigma_k / sigma_1's quantiles over heads, for every k; heads with zero weights are left out."""
    first = sigma[:, :1]
    scaled = sigma[first[:, 0] > 0] / first[first[:, 0] > 0]
    if not len(scaled):
        return []
    return [[short(value) for value in line] for line in np.quantile(scaled, QUANTILES, axis=0)]


def offsets(tables: CellTables, grid: Grid, detail: Detail, marked: Heads, pool: Pool) -> Json:
    """Return the mean score by offset: the first offsets, then fewer and fewer."""
    table = tables["offsets"]
    every = sorted(table["offset"].unique().tolist())
    dense = spaced_offsets(len(every), MOST_OFFSETS)
    sparse = dense if detail.offsets is None else spaced_offsets(len(every), detail.offsets)
    lines = table.pivot(index=["layer", "head"], columns="offset", values="mean_score").reindex(grid.index)
    profiles = []
    for place, line in zip(grid.index, lines.to_numpy(float), strict=True):
        kept = dense if place in marked else sparse
        profiles.append(pool.add([short(line[at]) for at in kept] if not np.isnan(line).all() else []))
    at = {"dense": [every[k] for k in dense], "sparse": [every[k] for k in sparse]}
    return {"at": at, "of": len(every), "heads": profiles}


def spaced_offsets(n: int, most: int) -> list[int]:
    """Return at most `most` numbers from 0 .. n - 1: the first ones, then numbers at about equal logarithmic steps."""
    if n <= most:
        return list(range(n))
    if most <= FIRST_OFFSETS:
        return list(range(most))
    later = np.geomspace(FIRST_OFFSETS, n - 1, most - FIRST_OFFSETS)
    return sorted({*range(FIRST_OFFSETS), *(round(float(value)) for value in later)})


def directions(tables: CellTables, grid: Grid, detail: Detail, marked: Heads, pool: Pool) -> Json:
    """Return each head's components with the tokens at both ends of both sides, best first."""
    table, energy = tables["directions"], _energies(tables.get("spectra"))
    if detail.tokens is not None:
        claimed = pd.MultiIndex.from_frame(table[["layer", "head"]]).isin(list(marked))
        table = table[claimed | ((table["rank"] <= detail.tokens) & (table["kind"] == "singular"))]
    components: dict[tuple[Any, ...], Json] = {}
    table = table.sort_values("rank", kind="stable")
    for row in _tuples(table.reindex(columns=list(DIRECTION_COLUMNS))):  # earlier versions had no contrast
        key = (row.layer, row.head, row.circuit, row.kind, row.component)
        if key not in components:
            total = energy.get(key[:3])
            components[key] = {
                "circuit": row.circuit,
                "kind": row.kind,
                "component": int(row.component),
                "value": short(row.value),
                "im": short(row.value_im),
                "share": short(row.value**2 / total) if row.kind == "singular" and total else None,
                "cluster": int(row.cluster),
                "size": int(row.cluster_size),
            }
        side, sign = components[key].setdefault(row.side, {}), "plus" if row.sign > 0 else "minus"
        side.setdefault(sign, []).append(pool.tokens.add(str(row.token)))
        side.setdefault("contrast", {})[sign] = short(row.contrast)
    heads: list[list[Json]] = [[] for _ in grid.index]
    for key in sorted(components):
        heads[key[0] * grid.heads + key[1]].append(components[key])
    return {"heads": [pool.add(head) for head in heads]}


def _energies(spectra: pd.DataFrame | None) -> dict[tuple[int, int, str], float]:
    """Return (layer, head, circuit) -> sum sigma^2 at offset 0, where components are read."""
    if spectra is None:
        return {}
    wanted = (spectra["kind"] == "singular") & (spectra["space"] == "residual") & (spectra["offset"] == 0)
    found = spectra[wanted].assign(energy=spectra["re"] ** 2)
    return {key: float(rows["energy"].sum()) for key, rows in found.groupby(["layer", "head", "circuit"])}  # type: ignore[misc]


def relations(table: pd.DataFrame, grid: Grid) -> Json:
    """Return a relation's pairs, and for each head the places of those that it raises and of those that it lowers."""
    pairs: dict[tuple[str, str], int] = {}
    heads: list[dict[str, list[int]]] = [{"raised": [], "lowered": []} for _ in grid.index]
    for row in _tuples(table):
        place = pairs.setdefault((str(row.source), str(row.target)), len(pairs))
        mine = heads[row.layer * grid.heads + row.head]
        if row.ov_relation_score > 0:
            mine["raised"].append(place)
        if row.ov_relation_suppress > 0:
            mine["lowered"].append(place)
    return {"pairs": [list(pair) for pair in pairs], "heads": heads}


def partners(table: pd.DataFrame, most: int | None, marked: Heads) -> pd.DataFrame:
    """Return each head's strongest compositions as sender and as receiver, and all those between marked heads."""
    if most is None:
        return table
    ordered = table.sort_values("score", ascending=False, kind="stable")
    ends = [ordered.groupby(["mode", f"{end}_layer", f"{end}_head"]).cumcount() for end in ("sender", "receiver")]
    between = [
        (r.sender_layer, r.sender_head) in marked and (r.receiver_layer, r.receiver_head) in marked
        for r in _tuples(ordered)
    ]
    return ordered[(ends[0] < most) | (ends[1] < most) | np.array(between, dtype=bool)].sort_index()
