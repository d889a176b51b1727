"""One cell's computation, as the list of its stages: from weights to tables.

`analyse` reads top to bottom: words and claims, what all layers share, every layer's heads, the tests of the claims.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ovqk import positions, spectra
from ovqk.availability import unavailable_metrics
from ovqk.claims import Claims, resolve_claims
from ovqk.config import Config, Processing
from ovqk.errors import UserError
from ovqk.heads import Circuit, Factors, ov_factors, qk_factors, regauge
from ovqk.layers import layer_metrics
from ovqk.metrics import COMPOSITION_METRICS, METRICS, metric_names
from ovqk.nulls import Predicted, correct, head_rows, predicted_values, role_rows
from ovqk.readouts import Readout, block0_matching
from ovqk.tasks import TaskTokens, resolve_task
from ovqk.verdicts import VERDICTS, judge, subjects
from ovqk.vocabulary import ACTIVATIONS, Block0, Vocabulary, read_vocabulary
from ovqk.weights import Architecture, LayerWeights, WeightSource, fold_embeddings, fold_layer, fold_mlp

HeadValues = dict[str, Float[Tensor, " head"]]
Weights = TypeVar("Weights")
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
    """

    tables: dict[str, pd.DataFrame]
    unavailable: dict[str, str]
    summary: dict[str, float | int]
    words: dict[str, Any]
    processing: dict[str, str]
    claims: dict[str, Any]
    notes: list[str]


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
    shared = Shared.read(source, tokenizer, n_tokens, label, config)
    head_values: list[HeadValues] = []
    tables: dict[str, list[pd.DataFrame]] = {"heads": [], "layers": [], "spectra": [], "offsets": []}
    for index in range(source.architecture.n_layers):
        layer = Layer(shared, index)
        values = HeadValues()
        unstable = [""] * source.architecture.n_heads
        for circuit in shared.circuits:
            metrics, spectrum = circuit_spectra(layer, circuit)
            values |= metrics
            unstable = _joined(unstable, gauge_sensitive(layer, circuit, metrics))
            values |= task_metrics(layer, circuit)
            tables["spectra"].append(spectrum)
        if "qk" in shared.circuits:
            metrics, profile = position_metrics(layer)
            values |= metrics | matching_block0(layer)
            tables["layers"].append(layer_row(layer))
            tables["offsets"] += [] if profile is None else [profile]
        head_values.append(values)
        tables["heads"].append(heads_rows(layer, values, unstable))
    made = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}
    tests: list[dict[str, Any]] = []
    if isinstance(claims, Claims):
        by_head = {name: _grid(shared, head_values, name) for name in METRICS}
        tests, verdicts = test_claims(shared, claims, by_head)
        made |= {"tests": pd.DataFrame(tests), "verdicts": pd.DataFrame(verdicts)}
    return Analysis(
        tables={name: table for name, table in made.items() if len(table)},
        unavailable=shared.unavailable,
        summary=summarise(shared, made),
        words={"kept": shared.tokens.kept, "dropped": shared.tokens.dropped},
        processing=shared.processing,
        claims=_describe(claims),
        notes=[*source.notes, *shared.tokens.notes],
    )


# --- what all layers share -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What is read once per model and task.

    Attributes:
        vocabulary: folded; for readouts and shares. None where the checkpoint holds no embedding.
        spectral_vocabulary: as processed; for full-circuit spectra.
        block0: the effective embedding of later layers, or why there is none.
        readout: the task's first variable; None where no word is read.
    """

    source: WeightSource
    config: Config
    device: torch.device
    tokens: TaskTokens
    vocabulary: Vocabulary | None
    spectral_vocabulary: Vocabulary | None
    token_moments: tuple[positions.Moments, positions.Moments] | None
    """Of plain and of normalised embedding rows (the second is used under rotary positions)."""
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    block0: Block0 | str
    block0_gram: Float[Tensor, "d_model d_model"] | None
    readout: Readout | None
    unavailable: dict[str, str]

    @property
    def architecture(self) -> Architecture:
        """The model's facts."""
        return self.source.architecture

    @property
    def circuits(self) -> list[Circuit]:
        """The circuits that the analysis takes apart."""
        return list(self.config.analysis.circuits)  # type: ignore[arg-type]

    @property
    def folds(self) -> bool:
        """Whether the spectra are of folded weights."""
        return self.config.processing is Processing.folded and self.source.foldable

    @property
    def centred(self) -> bool:
        """Whether the spectra's weights are orthogonal to the all-ones direction."""
        return self.folds and self.architecture.norm == "layernorm"

    @property
    def processing(self) -> dict[str, str]:
        """What was asked for and what was done to the weights."""
        asked = self.config.processing.value
        applied = "folded" if self.folds else "raw"
        if self.architecture.norm == "none":
            return {"requested": asked, "applied": "raw", "reason": "the model has no norms: nothing to fold"}
        if applied != asked:
            return {"requested": asked, "applied": applied, "reason": "the model's norms cannot be folded"}
        return {"requested": asked, "applied": applied}

    @classmethod
    def read(
        cls, source: WeightSource, tokenizer: Tokenizer | None, n_tokens: int | None, label: str, config: Config
    ) -> "Shared":
        """Read the embeddings, the words and block 0."""
        device = resolve_device(config.device)
        facts = source.architecture
        raw = to_device(source.embeddings(), device)
        folded = fold_embeddings(raw, facts) if source.foldable else raw
        tokens = read_words(config, tokenizer, n_tokens, raw.W_E, label)
        vocabulary = None if folded.W_E is None else read_vocabulary(folded, n_tokens)
        spectral = vocabulary
        if config.processing is Processing.raw and source.foldable and raw.W_E is not None:
            spectral = read_vocabulary(raw, n_tokens)
        block0 = read_block0(source, vocabulary, tokens, device)
        readout = None
        if vocabulary is not None and tokens.variables:
            effective = block0 if isinstance(block0, Block0) else None
            readout = Readout(tokens.variables[0], vocabulary, effective, facts, config.analysis.embedding)
        no_words = f"task {config.task.name} reads no words" if not config.task.variables else "no word is read"
        moments = None
        if vocabulary is not None:
            plain = positions.token_moments(vocabulary)
            normal = positions.normalised_moments(vocabulary, facts) if facts.rotary is not None else plain
            moments = (plain, normal)
        gram = None
        if isinstance(block0, Block0) and vocabulary is not None and "qk" in config.analysis.circuits:
            gram = block0.gram(vocabulary.W_E) if facts.n_layers > 1 else None
        unavailable = unavailable_metrics(
            list(config.analysis.circuits),
            facts,
            vocabulary,
            None if folded.W_pos is None else folded.W_pos.shape[0],
            block0,
            readout,
            no_words,
        )
        return cls(
            source, config, device, tokens, vocabulary, spectral, moments, folded.W_pos, block0, gram, readout, unavailable
        )  # fmt: skip


def read_words(
    config: Config, tokenizer: Tokenizer | None, n_tokens: int | None, W_E: Tensor | None, label: str
) -> TaskTokens:
    """The task's words as tokens; none where the checkpoint has neither embeddings nor a tokenizer to read them by."""
    if tokenizer is None and W_E is None:
        note = ["the checkpoint has no embeddings and no tokenizer: no word is read"] if config.task.variables else []
        return TaskTokens([], {}, {}, note)
    if n_tokens is None:
        n_tokens = tokenizer.get_vocab_size() if tokenizer is not None else 0
        n_tokens = n_tokens if W_E is None else W_E.shape[0]
    return resolve_task(config.task, tokenizer, n_tokens, label)


def read_block0(
    source: WeightSource, vocabulary: Vocabulary | None, tokens: TaskTokens, device: torch.device
) -> Block0 | str:
    """Block 0 as the effective embedding of later layers, or why it cannot be had."""
    if vocabulary is None:
        return "the checkpoint has no token embedding"
    if not tokens.variables:
        return "block 0's MLP is read only where a task's words are"
    if not source.foldable:
        return "the model's norms cannot be folded"
    layer0 = fold_layer(to_device(source.layer(0), device), source.architecture)
    mlp = source.first_mlp()
    if mlp == "the model has no MLP":
        return Block0(layer0, None, source.architecture)
    if isinstance(mlp, str):
        return mlp
    if mlp.activation not in ACTIVATIONS:
        return f"block 0's MLP has the activation '{mlp.activation}'; known: {', '.join(ACTIVATIONS)}"
    return Block0(layer0, fold_mlp(to_device(mlp, device), source.architecture), source.architecture)


class Layer:
    """One layer's weights, raw and folded, and the decompositions that its stages share."""

    def __init__(self, shared: Shared, index: int) -> None:
        """Read the layer."""
        self.shared, self.index = shared, index
        self.raw = to_device(shared.source.layer(index), shared.device)
        self.folded = fold_layer(self.raw, shared.architecture) if shared.source.foldable else self.raw
        self.decomposition = cache(self._decomposition)

    def factors(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> Factors:
        """Factors of the folded or of the processed weights; QK with the mean rotation over the offsets."""
        weights = self.folded if folded or self.shared.folds else self.raw
        if circuit == "ov":
            return ov_factors(weights, self.shared.architecture)
        return qk_factors(weights, self.shared.architecture, offsets)

    def _decomposition(
        self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)
    ) -> spectra.Decomposition:
        return spectra.decompose(self.factors(circuit, folded, offsets), self.shared.centred)


# --- stages of a layer ---------------------------------------------------------------------------------------


def circuit_spectra(layer: Layer, circuit: Circuit) -> tuple[HeadValues, pd.DataFrame]:
    """Residual-space and full-circuit metrics of one circuit (at D = 0), and its spectra at the offsets asked for."""
    shared = layer.shared
    rotates = circuit == "qk" and shared.architecture.rotary is not None
    tables = []
    for offset in dict.fromkeys(shared.config.analysis.offsets) if rotates else [0]:
        found = spectrum(shared, circuit, layer.decomposition(circuit, shared.folds, (offset,)))
        tables += [_spectrum_table(layer.index, circuit, *lines, offset=offset) for lines in found[1]]
    metrics, _ = spectrum(shared, circuit, layer.decomposition(circuit, shared.folds))
    return metrics, pd.concat(tables, ignore_index=True)


def spectrum(
    shared: Shared, circuit: Circuit, decomposition: spectra.Decomposition
) -> tuple[HeadValues, list[tuple[str, str, Tensor]]]:
    """Metrics of one circuit, and (space, kind, values [head, index]) of its spectra."""
    values = spectra.spectrum_metrics(decomposition)
    residual = "ov_copying_residual" if circuit == "ov" else "qk_matching_residual"
    metrics = {residual: values.pop("trace_ratio")} | {f"{circuit}_{name}": v for name, v in values.items()}
    lines = [
        ("residual", "eigen", spectra.eigenvalues(spectra.core(decomposition))),
        ("residual", "singular", decomposition.sigma),
    ]
    vocabulary = shared.spectral_vocabulary
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


def gauge_sensitive(layer: Layer, circuit: Circuit, metrics: HeadValues) -> list[str]:
    """Per head, the metrics that move by more than 1e-3 (of their own size above 1) under a random gauge."""
    shared = layer.shared
    factors = regauge(layer.factors(circuit, shared.folds), seed=shared.config.seed + layer.index)
    moved, _ = spectrum(shared, circuit, spectra.decompose(factors, shared.centred))
    names: list[list[str]] = [[] for _ in range(shared.architecture.n_heads)]
    for name, value in metrics.items():
        for head in ((value - moved[name]).abs() > GAUGE_MOVE * value.abs().clamp_min(1)).nonzero()[:, 0].tolist():
            names[head].append(name)
    return [" ".join(found) for found in names]


def task_metrics(layer: Layer, circuit: Circuit) -> HeadValues:
    """What the heads do with the task's first variable; under rotary positions with the mean rotation."""
    shared = layer.shared
    if shared.readout is None:
        return {}
    if circuit == "ov":
        factors, decomposition = layer.factors("ov", True), layer.decomposition("ov", True)
        return shared.readout.ov_metrics(layer.index, factors, decomposition)
    if shared.architecture.positions == "unsupported":
        return {}
    rotates = shared.architecture.rotary is not None
    span = tuple(range(positions.rotary_span(shared.architecture))) if rotates else (0,)
    factors, decomposition = layer.factors("qk", True, span), layer.decomposition("qk", True, span)
    return shared.readout.qk_metrics(layer.index, factors, decomposition)


def position_metrics(layer: Layer) -> tuple[HeadValues, pd.DataFrame | None]:
    """Shares of position and content, the offset fit, the previous-token score, and the offset profile."""
    shared, facts = layer.shared, layer.shared.architecture
    values = HeadValues()
    profile: Tensor | None = None
    if facts.positions == "learned" and shared.W_pos is not None:
        if shared.token_moments is not None:
            places = positions.row_moments(shared.W_pos)
            values |= positions.learned_shares(layer.folded, facts, shared.token_moments[0], places)
        if "qk_prev_auc" not in shared.unavailable:
            scores = positions.learned_position_scores(layer.folded, facts, shared.W_pos)
            profile = scores.by_offset
            values |= {"qk_offset_r2": scores.offset_r2, "qk_prev_auc": scores.previous_auc}
    elif facts.rotary is not None and shared.token_moments is not None:
        plain, normalised = (positions.rotary_shares(layer.folded, facts, m) for m in shared.token_moments)
        values |= plain | {f"{name}_normalised": value for name, value in normalised.items()}
        profile = positions.rotary_offset_scores(layer.folded, facts, shared.token_moments[0])
        if "qk_prev_auc" not in shared.unavailable:
            values["qk_prev_auc"] = positions.previous_token_auc_rotary(profile)
    return values, None if profile is None else _offset_table(layer.index, profile)


def matching_block0(layer: Layer) -> HeadValues:
    """`qk_matching_block0`, for the layers after the first."""
    if layer.shared.block0_gram is None or layer.index == 0:
        return {}
    return {"qk_matching_block0": block0_matching(layer.decomposition("qk", True), layer.shared.block0_gram)}


# --- claims --------------------------------------------------------------------------------------------------


def test_claims(
    shared: Shared, claims: Claims, values: dict[str, NDArray[np.float64]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of tests.parquet and of verdicts.parquet."""
    facts = shared.architecture
    predicted = {
        role: [
            Predicted(role, config, primary=index == 0, values=predicted_values(config, values, facts))
            for index, config in enumerate(predictions)
        ]
        for role, predictions in claims.predictions.items()
    }
    rows: list[dict[str, Any]] = []
    for role, predictions in predicted.items():
        for prediction in predictions:
            rows += role_rows(prediction, claims, facts, shared.config.seed)
            for head in claims.roles[role]:
                rows += head_rows(prediction, head, claims, facts)
    correct(rows)
    variable = shared.readout.variable.name if shared.readout is not None else None
    for row in rows:
        row["variable"] = variable
    verdicts = []
    for subject in subjects(claims):
        about = [r for r in rows if r["role"] == subject.role and (r["layer"], r["head"]) == (subject.head or (None, None))]
        verdicts.append(judge(subject, predicted[subject.role], about, _why_no_primary(shared, predicted[subject.role])))
    return rows, verdicts


def _why_no_primary(shared: Shared, predicted: list[Predicted]) -> str | None:
    if not predicted:
        return None
    metric = predicted[0].config.metric
    if metric in COMPOSITION_METRICS:
        return f"its primary metric, {metric}, is a composition of two heads, which this analysis does not compute"
    if metric not in metric_names(shared.circuits):  # type: ignore[arg-type]
        return f"analysis {shared.config.analysis.name} does not compute its primary metric, {metric}"
    reason = shared.unavailable.get(metric)
    return None if reason is None else f"its primary metric, {metric}, is unavailable: {reason}"


def _describe(claims: Claims | str) -> dict[str, Any]:
    if isinstance(claims, str):
        return {"none": claims}
    return {"source": claims.source, "reliability": claims.reliability} | ({"note": claims.note} if claims.note else {})


# --- tables --------------------------------------------------------------------------------------------------


def heads_rows(layer: Layer, values: HeadValues, unstable: list[str]) -> pd.DataFrame:
    """One row per head, every metric of the analysis in the registry's order; null where it has no value."""
    shared = layer.shared
    n_heads = shared.architecture.n_heads
    columns: dict[str, Any] = {
        "layer": np.full(n_heads, layer.index, dtype=np.int32),
        "head": np.arange(n_heads, dtype=np.int32),
    }
    for name in metric_names(shared.circuits):  # type: ignore[arg-type]
        value = None if name in shared.unavailable else values.get(name)
        columns[name] = np.full(n_heads, math.nan) if value is None else value.double().cpu().numpy()
    return pd.DataFrame(columns | {"unstable": unstable})


def layer_row(layer: Layer) -> pd.DataFrame:
    """The layer's row of layers.parquet."""
    return pd.DataFrame([{"layer": layer.index} | layer_metrics(layer.raw, layer.folded, layer.shared.architecture)])


def _spectrum_table(
    layer: int, circuit: Circuit, space: str, kind: str, values: Tensor, offset: int
) -> pd.DataFrame:
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


def summarise(shared: Shared, tables: dict[str, pd.DataFrame]) -> dict[str, float | int]:
    """Flat scalars: sizes, means over heads, verdict counts, each role's effect and p."""
    facts = shared.architecture
    summary: dict[str, float | int] = {
        "n_layers": facts.n_layers,
        "n_heads": facts.n_layers * facts.n_heads,
        "n_unstable_heads": int((tables["heads"]["unstable"] != "").sum()),
    }
    for name in metric_names(shared.circuits):  # type: ignore[arg-type]
        if name not in shared.unavailable:
            summary[f"mean/{name}"] = float(tables["heads"][name].mean())
    if "verdicts" in tables:
        verdicts = tables["verdicts"]
        for kind in ("role", "head"):
            counts = verdicts[verdicts["kind"] == kind]["verdict"].value_counts()
            summary |= {f"verdicts/{kind}/{verdict}": int(counts.get(verdict, 0)) for verdict in VERDICTS}
        for row in verdicts[(verdicts["kind"] == "role") & verdicts["p"].notna()].to_dict("records"):
            summary |= {f"role/{row['role']}/{name}": float(row[name]) for name in ("effect", "p")}
    return summary


def _grid(shared: Shared, head_values: list[HeadValues], name: str) -> NDArray[np.float64]:
    n_heads = shared.architecture.n_heads
    nothing = np.full(n_heads, math.nan)
    missing = name in shared.unavailable
    return np.stack(
        [nothing if missing or name not in v else v[name].double().cpu().numpy() for v in head_values]
    )


def _joined(a: list[str], b: list[str]) -> list[str]:
    return [" ".join(filter(None, pair)) for pair in zip(a, b, strict=True)]


# --- devices -------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: cuda where there is one.

    Raises:
        UserError: another name, or no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device={name}: allowed: cpu, cuda, auto.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device here; allowed: cpu, auto.")
    return torch.device(name)


def to_device(weights: Weights, device: torch.device) -> Weights:
    """The same dataclass of weights with its tensors (and its norm's) on a device."""
    if device.type == "cpu":
        return weights
    moved = {}
    for field in dataclasses.fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device)
        elif dataclasses.is_dataclass(value):
            moved[field.name] = to_device(value, device)
    return dataclasses.replace(weights, **moved)  # type: ignore[type-var]
