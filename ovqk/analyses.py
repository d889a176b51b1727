"""One cell's computation, as the list of its stages: from weights to tables.

`analyse` reads top to bottom: words and claims, what all layers share, every layer's heads, the tests of the claims.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovqk.cache import Entry, StructureCache
from ovqk.candidates import candidate_rows, unclaimed
from ovqk.claims import Claims, resolve_claims
from ovqk.composition import STRONGEST, composition_table, virtual_heads_table
from ovqk.config import Config
from ovqk.memory import FreedMemory
from ovqk.metrics import COMPOSITION_METRICS, METRICS, metric_names
from ovqk.model import Layer, Model
from ovqk.nulls import Predicted
from ovqk.patterns import PATTERNS, head_patterns
from ovqk.statistics import QUANTILES
from ovqk.structure import DirectionTables, HeadValues, heads_rows, layer_structure, stacked
from ovqk.testing import ClaimTests, matching_grams
from ovqk.verdicts import VERDICTS, judge, subjects
from ovqk.weights import WeightSource


@dataclass(frozen=True)
class Analysis:
    """A cell's results.

    Attributes:
        tables: name -> table; a table the analysis does not make is absent.
        unavailable: metric -> why no head has a value.
        summary: flat scalars.
        words: kept and dropped words of the task's sets.
        processing: what was asked for and what was really done.
        claims: source and reliability of the claims, or why there are none.
        notes: what a reader of the tables should know besides.
        null_seconds: the part of the time that went into drawing nulls.
    """

    tables: dict[str, pd.DataFrame]
    unavailable: dict[str, str]
    summary: dict[str, float | int]
    words: dict[str, Any]
    processing: dict[str, str]
    claims: dict[str, Any]
    notes: list[str]
    null_seconds: float


def analyse(
    source: WeightSource,
    tokenizer: Tokenizer | None,
    n_tokens: int | None,
    label: str,
    config: Config,
    layers: Callable[[int], Iterable[int]] = range,
    cache: StructureCache | None = None,
) -> Analysis:
    """Compute one cell.

    Args:
        source: the model's raw weights.
        tokenizer: its tokenizer, where it has one.
        n_tokens: the number of real tokens, where the tokenizer tells.
        label: how messages name the model.
        config: the resolved cell.
        layers: counts off the layers, and may show how far it is.
        cache: where what depends on no task is kept for other cells; None computes it anew.

    Raises:
        UserError: the task cannot be read on this model: its words, its claims.
    """
    claims = resolve_claims(config.task, config.model, source.architecture)
    model = Model.read(source, tokenizer, n_tokens, label, config)
    tests = ClaimTests(model, claims if isinstance(claims, Claims) else unclaimed(config.task))
    with nullcontext(Entry()) if cache is None else cache.entry(model) as entry:
        structure, directions, readouts, freed = [], DirectionTables(model), [], FreedMemory()
        for index in layers(source.architecture.n_layers):
            layer = Layer(model, index)
            if entry.tables is None:
                structure.append(layer_structure(layer))
                directions.add(layer)
            readouts.append(heads_rows(layer, task_metrics(layer)))
            tests.visit(layer)
            del layer
            freed.give_back()
        made = entry.tables
        if made is None:
            made = stacked(structure) | directions.tables()
            entry.keep(made)
    made = made | {"heads": heads_table(model, made["heads"], pd.concat(readouts, ignore_index=True))}
    started = time.perf_counter()
    by_head = {name: _grid(model, made["heads"], name) for name in METRICS}
    if isinstance(claims, Claims):
        made |= judge_claims(tests, by_head)
    else:
        made["candidates"], notes = candidate_rows(tests, by_head)
        tests.notes.extend(notes)
    null_seconds = time.perf_counter() - started
    made |= composition_tables(model, tests)
    return Analysis(
        tables={name: table for name, table in made.items() if len(table)},
        unavailable=model.unavailable,
        summary=summarise(model, made),
        words={"kept": model.tokens.kept, "dropped": model.tokens.dropped, "reasons": model.tokens.reasons},
        processing=model.processing,
        claims=_describe(claims),
        notes=[*source.notes, *model.tokens.notes, *tests.notes, *model.direction_notes],
        null_seconds=null_seconds,
    )


# --- heads ---------------------------------------------------------------------------------------------------


def task_metrics(layer: Layer) -> HeadValues:
    """What the heads do with the task's first variable; under rotary positions with the mean rotation."""
    readout, found = layer.model.readout, HeadValues()
    for circuit in layer.model.circuits if readout is not None else ():
        maps = layer.task_maps(circuit)
        if readout is not None and maps is not None:
            found |= {name: values.mean(-1) for name, values in layer.by_source(circuit).items()}
            found |= readout.of_subspace(layer.index, maps)
    return found


def heads_table(model: Model, structure: pd.DataFrame, readouts: pd.DataFrame) -> pd.DataFrame:
    """One row per head, every metric of the analysis in the registry's order; null where it has no value."""
    columns = {name: structure[name] for name in ("layer", "head")}
    for name in metric_names(model.circuits):  # type: ignore[arg-type]
        of = readouts if name in readouts else structure
        there = name in of and name not in model.unavailable
        columns[name] = of[name] if there else pd.Series(math.nan, index=structure.index)
    return pd.DataFrame(columns | {"unstable": structure["unstable"]})


# --- claims --------------------------------------------------------------------------------------------------


def judge_claims(tests: ClaimTests, values: dict[str, NDArray[np.float64]]) -> dict[str, pd.DataFrame]:
    """tests.parquet, nulls.parquet and verdicts.parquet."""
    model, claims = tests.model, tests.claims
    predicted = tests.predicted(values)
    rows = tests.rows(predicted)
    verdicts = []
    for subject in subjects(claims):
        about = [
            r for r in rows if r["role"] == subject.role and (r["layer"], r["head"]) == (subject.head or (None, None))
        ]
        reason = _why_no_primary(tests, predicted[subject.role])
        patterns = None
        if subject.head is not None:
            shape = (model.architecture.d_model - model.centred, model.architecture.d_head)
            patterns = head_patterns(values, subject.head, shape, tests.second.get(subject.head, math.nan), about)
        verdicts.append(judge(subject, predicted[subject.role], about, reason, patterns))
    quantiles = [
        {**{key: row[key] for key in ("role", "layer", "head", "metric", "null")}, "quantile": q, "value": float(v)}
        for row in rows
        for q, v in zip(QUANTILES, row.pop("quantiles"), strict=True)
    ]
    table = pd.DataFrame(verdicts)
    for name in set(PATTERNS) & set(table):  # where none is known the column is empty, and not of numbers
        table[name] = table[name].astype(object).where(table[name].notna(), None)
    return {"tests": pd.DataFrame(rows), "nulls": pd.DataFrame(quantiles), "verdicts": table}


def composition_tables(model: Model, tests: ClaimTests) -> dict[str, pd.DataFrame]:
    """composition.parquet: the pairs that the claims name, or the strongest of all, and then virtual_heads.parquet."""
    if not tests.layers:
        return {}
    grams, every = matching_grams(model), model.config.analysis.pairs
    gram, first_gram = (None, None) if isinstance(grams, str) else grams
    if isinstance(grams, str):
        tests.notes.append(f"composition: matching is empty: {grams}")
    table = composition_table(tests.layers, tests.pairs(), gram, first_gram, strongest=STRONGEST if every else 0)
    if not every:
        return {"composition": table}
    full, first_full = model.full_grams
    if full is None:
        why = grams if isinstance(grams, str) else "the checkpoint has no unembedding"
        tests.notes.append(f"virtual_heads: ov_copying is empty: {why}")
    return {"composition": table, "virtual_heads": virtual_heads_table(tests.layers, table, full, first_full)}


def _why_no_primary(tests: ClaimTests, predicted: list[Predicted]) -> str | None:
    if not predicted:
        return None
    model, config = tests.model, predicted[0].config
    metric = config.metric
    if metric in COMPOSITION_METRICS:
        if not tests.layers:
            computed = " and ".join(circuit.upper() for circuit in model.circuits)
            name = model.config.analysis.name
            return f"its primary metric, {metric}, needs both circuits; analysis={name} computes only {computed}"
        if not tests.partners(config):
            return f"its primary metric, {metric}, is with {_and(config.partners)}, and no such head is claimed"
        if np.isnan(predicted[0].values).all():
            return f"its primary metric, {metric}, has no value: no layer lies between it and {_and(config.partners)}"
        return None
    if metric not in metric_names(model.circuits):  # type: ignore[arg-type]
        return f"analysis {model.config.analysis.name} does not compute its primary metric, {metric}"
    reason = model.unavailable.get(metric)
    return None if reason is None else f"its primary metric, {metric}, is unavailable: {reason}"


def _and(roles: list[str]) -> str:
    return " and ".join(f"{role.replace('_', ' ')} heads" for role in roles)


def _describe(claims: Claims | str) -> dict[str, Any]:
    if isinstance(claims, str):
        return {"none": claims}
    described = {"of": claims.of, "source": claims.source, "reliability": claims.reliability}
    return described | ({"note": claims.note} if claims.note else {})


# --- tables --------------------------------------------------------------------------------------------------


def summarise(model: Model, tables: dict[str, pd.DataFrame]) -> dict[str, float | int]:
    """Flat scalars: sizes, means over heads, verdict counts, each role's effect and p."""
    facts = model.architecture
    summary: dict[str, float | int] = {
        "n_layers": facts.n_layers,
        "n_heads": facts.n_layers * facts.n_heads,
        "n_unstable_heads": int((tables["heads"]["unstable"] != "").sum()),
    }
    for name in metric_names(model.circuits):  # type: ignore[arg-type]
        if name not in model.unavailable:
            summary[f"mean/{name}"] = float(tables["heads"][name].mean())
    if "verdicts" in tables:
        verdicts = tables["verdicts"]
        for kind in ("role", "head"):
            counts = verdicts[verdicts["kind"] == kind]["verdict"].value_counts()
            summary |= {f"verdicts/{kind}/{verdict}": int(counts.get(verdict, 0)) for verdict in VERDICTS}
        for row in verdicts[(verdicts["kind"] == "role") & verdicts["p"].notna()].to_dict("records"):
            summary |= {f"role/{row['role']}/{name}": float(row[name]) for name in ("effect", "p")}
    return summary


def _grid(model: Model, heads: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """A metric's values as [layer, head]; nan where the analysis does not have it."""
    shape = model.architecture.n_layers, model.architecture.n_heads
    return heads[name].to_numpy(dtype=np.float64).reshape(shape) if name in heads else np.full(shape, math.nan)
