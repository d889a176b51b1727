"""One cell's computation, as the list of its stages: from weights to tables.

`analyse` reads top to bottom: words and claims, what all layers share, every layer's heads, the tests of the claims.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ovqk import positions, spectra
from ovqk.candidates import candidate_rows, unclaimed
from ovqk.claims import Claims, resolve_claims
from ovqk.composition import STRONGEST, composition_table, virtual_heads_table
from ovqk.config import Config
from ovqk.heads import Circuit, regauge
from ovqk.layers import layer_metrics
from ovqk.metrics import COMPOSITION_METRICS, METRICS, metric_names
from ovqk.model import Layer, Model
from ovqk.nulls import Predicted
from ovqk.patterns import head_patterns
from ovqk.readouts import full_circuit_ratio
from ovqk.statistics import QUANTILES
from ovqk.testing import ClaimTests, matching_grams
from ovqk.verdicts import VERDICTS, judge, subjects
from ovqk.weights import WeightSource

HeadValues = dict[str, Float[Tensor, " head"]]
GAUGE_MOVE = 1e-3  # a value that moves by more under a change of gauge is decided by rounding


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
    source: WeightSource, tokenizer: Tokenizer | None, n_tokens: int | None, label: str, config: Config
) -> Analysis:
    """Compute one cell.

    Args:
        source: the model's raw weights.
        tokenizer: its tokenizer, where it has one.
        n_tokens: the number of real tokens, where the tokenizer tells.
        label: how messages name the model.
        config: the resolved cell.

    Raises:
        UserError: the task cannot be read on this model: its words, its claims.
    """
    claims = resolve_claims(config.task, config.model, source.architecture)
    model = Model.read(source, tokenizer, n_tokens, label, config)
    tests = ClaimTests(model, claims if isinstance(claims, Claims) else unclaimed(config.task))
    head_values: list[HeadValues] = []
    names = ("heads", "layers", "spectra", "offsets", "directions")
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
    for index in range(source.architecture.n_layers):
        layer = Layer(model, index)
        values = HeadValues()
        unstable = [""] * source.architecture.n_heads
        for circuit in model.circuits:
            metrics, spectrum = circuit_spectra(layer, circuit)
            values |= metrics
            unstable = _joined(unstable, gauge_sensitive(layer, circuit, metrics))
            values |= task_metrics(layer, circuit) | block0_metrics(layer, circuit)
            tables["spectra"].append(spectrum)
            tables["directions"] += direction_rows(layer, circuit)
        if "qk" in model.circuits:
            metrics, profile = position_metrics(layer)
            values |= metrics
            tables["layers"].append(layer_row(layer))
            tables["offsets"] += [] if profile is None else [profile]
        head_values.append(values)
        tables["heads"].append(heads_rows(layer, values, unstable))
        tests.visit(layer)
    made = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}
    started = time.perf_counter()
    by_head = {name: _grid(model, head_values, name) for name in METRICS}
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
        words={"kept": model.tokens.kept, "dropped": model.tokens.dropped},
        processing=model.processing,
        claims=_describe(claims),
        notes=[*source.notes, *model.tokens.notes, *tests.notes],
        null_seconds=null_seconds,
    )


# --- stages of a layer ---------------------------------------------------------------------------------------


def circuit_spectra(layer: Layer, circuit: Circuit) -> tuple[HeadValues, pd.DataFrame]:
    """Residual-space and full-circuit metrics of one circuit (at D = 0), and its spectra at the offsets asked for."""
    model = layer.model
    rotates = circuit == "qk" and layer.folded.rotary is not None
    tables = []
    for offset in dict.fromkeys(model.config.analysis.offsets) if rotates else [0]:
        found = spectrum(model, circuit, layer.decomposition(circuit, model.folds, (offset,)))
        tables += [_spectrum_table(layer.index, circuit, *lines, offset=offset) for lines in found[1]]
    metrics, _ = spectrum(model, circuit, layer.decomposition(circuit, model.folds))
    return metrics, pd.concat(tables, ignore_index=True)


def spectrum(
    model: Model, circuit: Circuit, decomposition: spectra.Decomposition
) -> tuple[HeadValues, list[tuple[str, str, Tensor]]]:
    """Metrics of one circuit, and (space, kind, values [head, index]) of its spectra."""
    values = spectra.spectrum_metrics(decomposition)
    residual = "ov_copying_residual" if circuit == "ov" else "qk_matching_residual"
    metrics = {residual: values.pop("trace_ratio")} | {f"{circuit}_{name}": v for name, v in values.items()}
    lines = [
        ("residual", "eigen", spectra.eigenvalues(spectra.core(decomposition))),
        ("residual", "singular", decomposition.sigma),
    ]
    vocabulary = model.spectral_vocabulary
    if vocabulary is None:
        return metrics, lines
    gram, gram_out = vocabulary.gram_embed, vocabulary.gram_embed
    if circuit == "ov":
        if vocabulary.gram_cross is None or vocabulary.gram_unembed is None:
            return metrics, lines
        gram, gram_out = vocabulary.gram_cross, vocabulary.gram_unembed
    eigen = spectra.eigenvalues(spectra.core(decomposition, gram))
    sigma = spectra.full_circuit_singular_values(decomposition, vocabulary.gram_embed, gram_out)
    metrics["ov_copying" if circuit == "ov" else "qk_matching"] = spectra.trace_ratio(eigen, sigma.sum(-1))
    if circuit == "qk":
        metrics["qk_symmetry_vocab"] = spectra.vocabulary_symmetry(decomposition, gram)
    return metrics, [*lines, ("vocab", "eigen", eigen), ("vocab", "singular", sigma)]


def direction_rows(layer: Layer, circuit: Circuit) -> list[pd.DataFrame]:
    """The tokens that the leading components of one circuit read and write (at D = 0)."""
    model = layer.model
    if model.directions is None:
        return []
    parts = layer.decomposition(circuit, model.folds)
    return [model.directions.table(layer.index, circuit, parts, model.config.analysis.components)]


def gauge_sensitive(layer: Layer, circuit: Circuit, metrics: HeadValues) -> list[str]:
    """Per head, the metrics that move by more than 1e-3 (of their own size above 1) under a random gauge."""
    model = layer.model
    factors = regauge(layer.factors(circuit, model.folds), seed=model.config.seed + layer.index)
    moved, _ = spectrum(model, circuit, spectra.decompose(factors, model.centred))
    names: list[list[str]] = [[] for _ in range(model.architecture.n_heads)]
    for name, value in metrics.items():
        for head in ((value - moved[name]).abs() > GAUGE_MOVE * value.abs().clamp_min(1)).nonzero()[:, 0].tolist():
            names[head].append(name)
    return [" ".join(found) for found in names]


def task_metrics(layer: Layer, circuit: Circuit) -> HeadValues:
    """What the heads do with the task's first variable; under rotary positions with the mean rotation."""
    model = layer.model
    maps = layer.task_maps(circuit)
    if model.readout is None or maps is None:
        return {}
    means = {name: values.mean(-1) for name, values in layer.by_source(circuit).items()}
    return means | model.readout.of_subspace(layer.index, maps)


def position_metrics(layer: Layer) -> tuple[HeadValues, pd.DataFrame | None]:
    """Shares of position and content, the offset fit, the previous-token score, and the offset profile."""
    model, facts = layer.model, layer.model.architecture
    values = HeadValues()
    profile: Tensor | None = None
    if facts.positions == "learned" and model.W_pos is not None:
        if model.token_moments is not None and model.position_moments is not None:
            content, places = model.token_moments[0], model.position_moments
            values |= positions.learned_shares(layer.folded, facts, content, places)
        if "qk_prev_auc" not in model.unavailable:
            scores = positions.learned_position_scores(layer.folded, facts, model.W_pos)
            profile = scores.by_offset
            values |= {"qk_offset_r2": scores.offset_r2, "qk_prev_auc": scores.previous_auc}
    elif layer.folded.rotary is not None and model.vocabulary is not None:
        plain, normalised = (token_head_moments(layer, normalised) for normalised in (False, True))
        values |= positions.rotary_shares(layer.folded, facts, plain)
        shares = positions.rotary_shares(layer.folded, facts, normalised)
        values |= {f"{name}_normalised": value for name, value in shares.items()}
        profile = positions.rotary_offset_scores(layer.folded, facts, plain)
        if "qk_prev_auc" not in model.unavailable:
            values["qk_prev_auc"] = positions.previous_token_auc_rotary(profile)
    return values, None if profile is None else _offset_table(layer.index, profile)


def token_head_moments(layer: Layer, normalised: bool) -> positions.HeadMoments:
    """Moments of the heads' queries and keys over the vocabulary, of plain or of normalised embedding rows."""
    model, weights, facts = layer.model, layer.folded, layer.model.architecture
    if model.vocabulary is None or model.token_moments is None:
        raise ValueError("moments need an embedding")
    if weights.qk_norm is None:
        return positions.head_moments(weights, facts, model.token_moments[normalised])
    rows = positions.token_rows(model.vocabulary, facts, normalised)
    return positions.normalised_head_moments(weights, facts, rows)


def block0_metrics(layer: Layer, circuit: Circuit) -> HeadValues:
    """`ov_copying_block0` and `qk_matching_block0`: full circuits of tokens as layers after the first see them."""
    vocabulary, (gram, cross, _) = layer.model.vocabulary, layer.model.block0_grams
    if gram is None or vocabulary is None or layer.index == 0:
        return {}
    decomposition = layer.decomposition(circuit, True)
    if circuit == "qk":
        return {"qk_matching_block0": full_circuit_ratio(decomposition, gram, gram, gram)}
    if cross is None or vocabulary.gram_unembed is None:
        return {}
    return {"ov_copying_block0": full_circuit_ratio(decomposition, gram, cross, vocabulary.gram_unembed)}


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
    return {"tests": pd.DataFrame(rows), "nulls": pd.DataFrame(quantiles), "verdicts": pd.DataFrame(verdicts)}


def composition_tables(model: Model, tests: ClaimTests) -> dict[str, pd.DataFrame]:
    """composition.parquet: the pairs that the claims name, or the strongest of all, and then virtual_heads.parquet."""
    if not tests.layers:
        return {}
    grams, every = matching_grams(model), model.config.analysis.pairs
    gram, first_gram = (None, None) if isinstance(grams, str) else grams
    table = composition_table(tests.layers, tests.pairs(), gram, first_gram, strongest=STRONGEST if every else 0)
    if not every:
        return {"composition": table}
    full, first_full = model.full_grams
    return {"composition": table, "virtual_heads": virtual_heads_table(tests.layers, table, full, first_full)}


def _why_no_primary(tests: ClaimTests, predicted: list[Predicted]) -> str | None:
    if not predicted:
        return None
    model, config = tests.model, predicted[0].config
    metric = config.metric
    if metric in COMPOSITION_METRICS:
        if not tests.layers:
            return (
                f"its primary metric, {metric}, composes QK with OV, and analysis {model.config.analysis.name} has one"
            )
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
    return {"source": claims.source, "reliability": claims.reliability} | ({"note": claims.note} if claims.note else {})


# --- tables --------------------------------------------------------------------------------------------------


def heads_rows(layer: Layer, values: HeadValues, unstable: list[str]) -> pd.DataFrame:
    """One row per head, every metric of the analysis in the registry's order; null where it has no value."""
    model = layer.model
    n_heads = model.architecture.n_heads
    columns: dict[str, Any] = {
        "layer": np.full(n_heads, layer.index, dtype=np.int32),
        "head": np.arange(n_heads, dtype=np.int32),
    }
    for name in metric_names(model.circuits):  # type: ignore[arg-type]
        value = None if name in model.unavailable else values.get(name)
        columns[name] = np.full(n_heads, math.nan) if value is None else value.double().cpu().numpy()
    return pd.DataFrame(columns | {"unstable": unstable})


def layer_row(layer: Layer) -> pd.DataFrame:
    """The layer's row of layers.parquet."""
    return pd.DataFrame([{"layer": layer.index} | layer_metrics(layer.raw, layer.folded, layer.model.architecture)])


def _spectrum_table(layer: int, circuit: Circuit, space: str, kind: str, values: Tensor, offset: int) -> pd.DataFrame:
    n_heads, n = values.shape
    real = values.real if values.is_complex() else values
    imaginary = values.imag if values.is_complex() else torch.zeros_like(real)
    return pd.DataFrame(
        {
            "layer": np.int32(layer),
            "head": np.repeat(np.arange(n_heads, dtype=np.int32), n),
            "circuit": circuit,
            "space": space,
            "kind": kind,
            "offset": np.int32(offset),
            "index": np.tile(np.arange(n, dtype=np.int32), n_heads),
            "re": real.flatten().cpu().numpy(),
            "im": imaginary.flatten().cpu().numpy(),
        }
    )


def _offset_table(layer: int, profile: Float[Tensor, "head offset"]) -> pd.DataFrame:
    n_heads, n_offsets = profile.shape
    return pd.DataFrame(
        {
            "layer": np.int32(layer),
            "head": np.repeat(np.arange(n_heads, dtype=np.int32), n_offsets),
            "offset": np.tile(np.arange(n_offsets, dtype=np.int32), n_heads),
            "mean_score": profile.flatten().cpu().numpy(),
        }
    )


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


def _grid(model: Model, head_values: list[HeadValues], name: str) -> NDArray[np.float64]:
    n_heads = model.architecture.n_heads
    nothing = np.full(n_heads, math.nan)
    missing = name in model.unavailable
    return np.stack([nothing if missing or name not in v else v[name].double().cpu().numpy() for v in head_values])


def _joined(a: list[str], b: list[str]) -> list[str]:
    return [" ".join(filter(None, pair)) for pair in zip(a, b, strict=True)]
