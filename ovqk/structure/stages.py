"""The stages that need no task: every head's spectra, symmetry, positions and directions, layer by layer."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ovqk.circuits import moments, positions, spectra
from ovqk.circuits.components import SIDES, Components, components, singular_components
from ovqk.circuits.composition import LayerCircuits
from ovqk.circuits.maps import Maps
from ovqk.circuits.simulated import Senders, Simulated, attention
from ovqk.circuits.spectra import full_circuit_ratio
from ovqk.circuits.summed_qk import layer_metrics
from ovqk.config.schema import Circuit
from ovqk.structure.diagonal_ranks import DiagonalRanks
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model

HeadValues = dict[str, Float[Tensor, " head"]]
WAITING = 2**23  # the most numbers in components that wait for a pass over the vocabulary
COMPOSED = "qk_composed_margin"  # the one metric here that needs the layers before
MOVES = 1e-3  # a value that changes by more when 32-bit weights are rounded is decided by rounding
Tables = dict[str, pd.DataFrame]
"""Name -> rows: heads, layers, spectra, offsets, directions; a table that a model does not have is absent."""


@runtime_checkable
class Stage(Protocol):
    """A part of a cell's computation: it visits each layer once, and then makes its tables."""

    def visit(self, layer: Layer) -> None:
        """Take the numbers that the tables need from a layer. Keep no layer, or its weights would stay in memory."""
        ...

    def tables(self, made: Tables) -> Tables:
        """Return this stage's tables, once all layers are visited; `made` holds those that earlier stages made."""
        ...


def layer_structure(layer: Layer) -> Tables:
    """Compute one layer's rows in every table; `heads` has a column for each metric with a value, and `unstable`."""
    model = layer.model
    tables: dict[str, list[pd.DataFrame]] = {"layers": [layer_row(layer)] if Circuit.qk in model.circuits else []}
    values = HeadValues()
    unstable = [""] * model.architecture.n_heads
    for circuit in model.circuits:
        metrics, spectrum = circuit_spectra(layer, circuit)
        values |= metrics
        unstable = _joined(unstable, rounding_sensitive(layer, circuit, metrics))
        values |= block0_metrics(layer, circuit)
        tables.setdefault("spectra", []).append(spectrum)
    if Circuit.qk in model.circuits:
        metrics, profile = position_metrics(layer)
        values |= metrics
        tables["offsets"] = [] if profile is None else [profile]
    tables["heads"] = [heads_rows(layer.index, model.architecture.n_heads, values).assign(unstable=unstable)]
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}


def stacked(layers: Sequence[Tables]) -> Tables:
    """Join the layers' tables, name by name."""
    names = dict.fromkeys(name for tables in layers for name in tables)
    return {name: pd.concat([t[name] for t in layers if name in t], ignore_index=True) for name in names}


class StructureTables:
    """The stage that makes all tables without a task but `directions`."""

    def __init__(self, model: Model) -> None:
        """Start without layers."""
        self.model, self._layers, self._senders = model, list[Tables](), Senders()
        self._ranks = DiagonalRanks(model)

    def visit(self, layer: Layer) -> None:
        """See `Stage`."""
        tables = layer_structure(layer)
        if Circuit.qk in self.model.circuits:
            columns = {n: v.double().cpu().numpy() for n, v in simulated_metrics(layer, self._senders).items()}
            tables["heads"] = tables["heads"].assign(**columns)
        self._layers.append(tables)
        self._ranks.visit(layer)

    def tables(self, _: Tables) -> Tables:
        """Return `heads`, `layers`, `spectra` and `offsets` for all layers visited."""
        ranks = self._ranks.columns()
        for tables in self._layers:
            found = ranks.get(int(tables["heads"]["layer"].iloc[0]), {})
            tables["heads"] = tables["heads"].assign(**{name: x.cpu().numpy() for name, x in found.items()})
        return stacked(self._layers)


class DirectionTables:
    """The stage that lists the tokens which each circuit's leading components read and write (at offset D = 0).

    Layers wait for each other, up to WAITING numbers, so that one pass over the vocabulary serves several.
    """

    def __init__(self, model: Model, count: int | None = None) -> None:
        """Start without layers; without a vocabulary, or if no component is asked for, no table is made.

        `count` is how many components of each circuit are listed; `analysis.components` unless given.
        """
        self.model, self.count = model, model.config.analysis.components if count is None else count
        self._waiting: list[tuple[int, Circuit, Components]] = []
        self._made: list[pd.DataFrame] = []
        self._block0_read = False

    def visit(self, layer: Layer) -> None:
        """Take a layer's leading components, and read their tokens once enough are waiting."""
        model = self.model
        if model.directions is None:
            return
        for circuit in model.circuits:
            parts, near = layer.decomposition(circuit, model.folds), layer.eigenvalues(circuit)
            found = components(parts, self.count, near)
            gain = layer.gain
            if gain is not None:  # token rows come without the gain
                write = found.write * gain if circuit is Circuit.qk else found.write
                found = dataclasses.replace(found, read=found.read * gain, write=write)
            self._waiting.append((layer.index, circuit, found))
        if sum(found.read.numel() + found.write.numel() for _, _, found in self._waiting) >= WAITING:
            self._pass()

    def tables(self, _: Tables) -> Tables:
        """Return `directions` for all layers visited, or nothing."""
        self._pass()
        if self.model.block0_side is not None:
            self.model.block0_side.forget()
        return {"directions": pd.concat(self._made, ignore_index=True)} if self._made else {}

    def _pass(self) -> None:
        if self._waiting and self.model.directions is not None:
            kind = self.model.config.analysis.directions_embedding.kind
            if not self._block0_read and any(kind(index) == "block0" for index, *_ in self._waiting):
                self.model.read_block0_rows()
                self._block0_read = True
            self._made += self.model.directions.tables(self._waiting)
            self._waiting = []


def component_rows(
    model: Model, layers: Sequence[LayerCircuits], wanted: Collection[tuple[int, int, int]]
) -> pd.DataFrame:
    """List the tokens that single components of heads' OV read and write, as `directions` lists the leading ones.

    Args:
        model: the model, whose `directions` is not None.
        layers: all layers' circuits, folded.
        wanted: (layer, head, component), each at least once.
    """
    assert model.directions is not None
    found = []
    for layer in sorted({layer for layer, _, _ in wanted}):
        here = {(head, component) for at, head, component in wanted if at == layer}
        parts = singular_components(layers[layer].ov, 1 + max(component for _, component in here))
        places = zip(parts.head.tolist(), parts.component.tolist(), strict=True)
        kept = torch.tensor([place in here for place in places], dtype=torch.bool, device=parts.head.device)
        chosen = {each.name: getattr(parts, each.name)[kept] for each in dataclasses.fields(Components)}
        chosen |= {side: chosen[side].double() for side in SIDES}
        found.append((layer, Circuit.ov, Components(**chosen)))
    made = pd.concat(model.directions.tables(found), ignore_index=True)
    if model.block0_side is not None:
        model.block0_side.forget()
    return made


def structure_tables(model: Model, layers: Iterable[Layer]) -> Tables:
    """Return the tables without a task for these layers, by the stages of a cell."""
    stages: list[Stage] = [StructureTables(model), DirectionTables(model)]
    for layer in layers:
        for stage in stages:
            stage.visit(layer)
    made = Tables()
    for stage in stages:
        made |= stage.tables(made)
    return made


# --- circuits ------------------------------------------------------------------------------------------------


def circuit_spectra(layer: Layer, circuit: Circuit) -> tuple[HeadValues, pd.DataFrame]:
    """Compute one circuit's spectral metrics, and its rows in `spectra` (docs/definitions.md, section 2).

    Metrics are at offset D = 0. Under rotary positions QK has spectra at each of `analysis.offsets`.

    Returns:
        metric -> [head], in residual space and for the full circuit; the rows.
    """
    model = layer.model
    rotates = circuit is Circuit.qk and layer.folded.rotary is not None
    tables, found = [], {}
    for offset in dict.fromkeys(model.config.analysis.offsets) if rotates else [0]:
        eigen = layer.eigenvalues(circuit) if offset == 0 else None
        metrics, lines = spectrum(model, circuit, layer.maps(circuit, model.folds, (offset,)), eigen)
        tables += [_spectrum_table(layer.index, circuit, *line, offset=offset) for line in lines]
        found[offset] = metrics
    at_zero = (
        found[0]
        if 0 in found
        else spectrum(model, circuit, layer.maps(circuit, model.folds), layer.eigenvalues(circuit))[0]
    )
    return at_zero, pd.concat(tables, ignore_index=True)


def spectrum(
    model: Model, circuit: Circuit, maps: Maps, eigen: Complex[Tensor, "head k"] | None = None
) -> tuple[HeadValues, list[tuple[str, str, Tensor]]]:
    """Return one circuit's metrics, and (space, kind, values [head, index]) for its spectra.

    `eigen` are the eigenvalues in residual space, if a caller has them.
    """
    cores = maps.core()
    eigen = spectra.eigenvalues(cores) if eigen is None else eigen
    values = spectra.spectrum_metrics(maps, (cores, eigen))
    residual = "ov_copying_residual" if circuit is Circuit.ov else "qk_matching_residual"
    metrics = {residual: values.pop("trace_ratio")} | {f"{circuit}_{name}": v for name, v in values.items()}
    lines = [
        ("residual", "eigen", eigen),
        ("residual", "singular", maps.sigma),
    ]
    vocabulary = model.spectral_vocabulary
    if vocabulary is None:
        return metrics, lines
    full = vocabulary.full_circuit(circuit)
    if full is None:
        return metrics, lines
    eigen = spectra.eigenvalues(maps.core(full.cross))  # before singular values: see `Maps.core`
    sigma = spectra.full_circuit_singular_values(maps, full.read, full.write)
    metrics["ov_copying" if circuit is Circuit.ov else "qk_matching"] = spectra.trace_ratio(eigen, sigma.sum(-1))
    if circuit is Circuit.qk:
        metrics["qk_symmetry_vocab"] = spectra.vocabulary_symmetry(maps, full.read)
    return metrics, [*lines, ("vocab", "eigen", eigen), ("vocab", "singular", sigma)]


def rounding_sensitive(layer: Layer, circuit: Circuit, metrics: HeadValues) -> list[str]:
    """Name, head by head, the metrics that change by over 1e-3 if weights are rounded (relative, if they exceed 1)."""
    model = layer.model
    maps = layer.maps(circuit, model.folds).rounded(seed=2 * (model.config.seed + layer.index))
    moved, _ = spectrum(model, circuit, maps)
    names: list[list[str]] = [[] for _ in range(model.architecture.n_heads)]
    for name, value in metrics.items():
        for head in ((value - moved[name]).abs() > MOVES * value.abs().clamp_min(1)).nonzero()[:, 0].tolist():
            names[head].append(name)
    return [" ".join(found) for found in names]


# --- positions -----------------------------------------------------------------------------------------------


def position_metrics(layer: Layer) -> tuple[HeadValues, pd.DataFrame | None]:
    """Measure whether a layer's heads attend by position or by content (docs/definitions.md, section 4).

    Returns:
        metric -> [head], as far as positions are learned or rotary and the embeddings are there; the rows of `offsets`,
        None without a profile.
    """
    model, architecture = layer.model, layer.model.architecture
    values = HeadValues()
    profile: Tensor | None = None
    if architecture.positions == "learned" and model.W_pos is not None:
        if model.token_moments is not None and model.position_moments is not None:
            content, places = model.token_moments[0], model.position_moments
            values |= positions.learned_shares(layer.folded, architecture, content, places, _query_key_bases(layer))
        if "qk_prev_auc" not in model.unavailable:
            scores = positions.learned_position_scores(layer.folded, architecture, model.W_pos)
            profile = scores.by_offset
            values |= {"qk_offset_r2": scores.offset_r2, "qk_prev_auc": scores.previous_auc}
    elif layer.folded.rotary is not None and model.vocabulary is not None:
        plain, normalised = token_head_moments(layer)
        values |= positions.rotary_shares(layer.folded, architecture, plain)
        shares = positions.rotary_shares(layer.folded, architecture, normalised)
        values |= {f"{name}_normalised": value for name, value in shares.items()}
        profile = positions.rotary_offset_scores(layer.folded, architecture, plain)
        if "qk_prev_auc" not in model.unavailable:
            values["qk_prev_auc"] = positions.previous_token_auc_rotary(profile)
    return values, None if profile is None else _offset_table(layer.index, profile)


def token_head_moments(layer: Layer) -> tuple[moments.HeadMoments, moments.HeadMoments]:
    """Return the moments that queries and keys have over the vocabulary, for plain and for normalised embedding rows.

    If the model normalises queries and keys, they are taken over sampled rows.

    Raises:
        ValueError: there is no embedding.
    """
    model, weights, architecture = layer.model, layer.folded, layer.model.architecture
    if weights.qk_norm is not None and model.sampled_rows is not None:
        return moments.normalised_head_moments(weights, architecture, model.sampled_rows)
    if model.token_moments is None:
        raise ValueError("moments need an embedding")
    plain, normalised = model.token_moments
    bases = _query_key_bases(layer)
    return (
        moments.head_moments(weights, architecture, plain, bases),
        moments.head_moments(weights, architecture, normalised, bases),
    )


def _query_key_bases(layer: Layer) -> moments.QueryKeyBases:
    return layer.basis("Q", True), layer.basis("K", True)


def block0_metrics(layer: Layer, circuit: Circuit) -> HeadValues:
    """Return `ov_copying_block0` or `qk_matching_block0`, in [-1, 1]: copying or matching of block0 embeddings.

    Empty in layer 0, which does not read them, and if they cannot be had (docs/definitions.md, section 2).
    """
    full = None if layer.index == 0 else layer.model.block0_circuit(circuit)
    if full is None:
        return {}
    name = "ov_copying_block0" if circuit is Circuit.ov else "qk_matching_block0"
    return {name: full_circuit_ratio(layer.maps(circuit, True), full)}


def simulated_metrics(layer: Layer, senders: Senders) -> HeadValues:
    """Return the metrics of simulated attention, and let the layer's heads send (docs/definitions.md, section 4).

    Empty if the positions or the layer's effective embedding cannot be had.
    """
    model, kind = layer.model, Simulated.kind(layer.index)
    simulated = None if "qk_simulated_previous" in model.unavailable else model.simulated
    if simulated is None or kind not in simulated.tokens:
        return {}
    weights, architecture, tokens = layer.folded, model.architecture, simulated.tokens[kind]
    values = attention(weights, architecture, simulated.sequences[kind])
    margins = senders.margins(weights, architecture, tokens, layer.span)
    senders.add(layer.factors(Circuit.ov, True), tokens, values["qk_simulated_previous"])
    return values if margins is None else values | {COMPOSED: margins}


# --- tables --------------------------------------------------------------------------------------------------


def heads_rows(layer: int, n_heads: int, values: HeadValues) -> pd.DataFrame:
    """Return one row for each head in a layer, with a column for each metric given."""
    columns: dict[str, Any] = {
        "layer": np.full(n_heads, layer, dtype=np.int32),
        "head": np.arange(n_heads, dtype=np.int32),
    }
    return pd.DataFrame(columns | {name: value.double().cpu().numpy() for name, value in values.items()})


def layer_row(layer: Layer) -> pd.DataFrame:
    """Return the layer's row in layers.parquet: metrics of the QK matrix summed over its heads."""
    raw, folded = layer.raw_and_folded()
    return pd.DataFrame([{"layer": layer.index} | layer_metrics(raw, folded, layer.model.architecture)])


def _spectrum_table(layer: int, circuit: Circuit, space: str, kind: str, values: Tensor, offset: int) -> pd.DataFrame:
    n_heads, n = values.shape
    real = values.real if values.is_complex() else values
    imaginary = values.imag if values.is_complex() else torch.zeros_like(real)
    return pd.DataFrame(
        {
            "layer": np.int32(layer),
            "head": np.repeat(np.arange(n_heads, dtype=np.int32), n),
            "circuit": circuit.value,
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


def _joined(a: list[str], b: list[str]) -> list[str]:
    return [" ".join(filter(None, pair)) for pair in zip(a, b, strict=True)]
