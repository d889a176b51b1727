"""The quantities in published statements, by name: each is computed from a model by the functions that cells use."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ovqk import library
from ovqk.activations import one_block
from ovqk.cell import run_cell
from ovqk.circuits import composition, diagonals, fourier
from ovqk.circuits.composition import LayerCircuits, Mode
from ovqk.config import choices
from ovqk.config.schema import Circuit, Config
from ovqk.errors import UserError
from ovqk.metrics import METRICS
from ovqk.records.record import read_done
from ovqk.records.results import load_table
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.stages import layer_row
from ovqk.tasks.cycle import Cycle
from ovqk.verdicts.cycles import one_mlp
from ovqk.weights.types import Head

Found = float | frozenset[int]
"""A number, or a set of integers; nan if the model has no such value."""


@dataclass
class Opened:
    """A model that is opened when a quantity first asks for it.

    Attributes:
        place: a path, or a name in conf/model or on the hub.
        choices: further choices with which it is opened.
    """

    place: str | Path
    choices: tuple[str, ...] = ()

    @cached_property
    def library(self) -> library.LibraryModel:
        """The model as notebooks open it."""
        return library.open(self.place, *self.choices)

    @property
    def model(self) -> Model:
        """The model without a task."""
        return self.library.model

    @cached_property
    def circuits(self) -> list[LayerCircuits]:
        """All heads' QK and OV circuits, layer by layer, as compositions read them."""
        found = []
        for index in range(self.model.architecture.n_layers):
            layer = Layer(self.model, index)
            parts = layer.decomposition(Circuit.ov, True), layer.decomposition(Circuit.qk, True, layer.span)
            found.append(LayerCircuits.of(*parts))
        return found

    @cached_property
    def _cells(self) -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, pd.DataFrame]]]:
        return {}

    def cell(self, task: str, analysis: str) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
        """Compute a cell on the model in a temporary folder, and return its record and its tables."""
        if (task, analysis) not in self._cells:
            with tempfile.TemporaryDirectory() as folder:
                config = choices.composed(
                    [*choices.model_choice(self.place), f"task={task}", f"analysis={analysis}", "tracking=none",
                     "nulls.draws=99", *self.choices]
                )  # fmt: skip
                outcome = run_cell(replace_folder(config, folder))
                assert outcome.folder is not None
                record = read_done(Path(outcome.folder))
                assert record is not None
                tables = {
                    path.stem: load_table(path.parent, path.stem) for path in Path(outcome.folder).glob("*.parquet")
                }
                self._cells[task, analysis] = record, {name: t for name, t in tables.items() if t is not None}
        return self._cells[task, analysis]


def replace_folder(config: Config, folder: str) -> Config:
    """Return a cell's choice with another results folder, and with nothing in the user's cache."""
    return replace(config, results_dir=folder, cache=False)


QUANTITIES: dict[str, Callable[..., Found]] = {}
"""Name -> function that takes an opened model and a statement's options."""


def quantity(function: Callable[..., Found]) -> Callable[..., Found]:
    """Register a function under its name."""
    QUANTITIES[function.__name__] = function
    return function


def compute(name: str, opened: Opened, options: Mapping[str, Any]) -> Found:
    """Compute a quantity.

    Raises:
        UserError: there is no such quantity, or it does not take these options.
    """
    if name not in QUANTITIES:
        raise UserError(f"function={name}: allowed: {', '.join(QUANTITIES)}.")
    _check_heads(opened, options)
    return QUANTITIES[name](opened, **options)


def _check_heads(opened: Opened, options: Mapping[str, Any]) -> None:
    """Refuse heads that the model does not have, which means that its folder holds another model.

    Raises:
        UserError: the model lacks such a head.
    """
    named = [name for key in ("head", "sender", "receiver") for name in str(options.get(key, "")).split()]
    named += [name for name in options.get("heads") or () if isinstance(name, str)]
    architecture = opened.model.architecture if named else None
    for layer, head in map(head_of, named):
        if architecture is not None and not (layer < architecture.n_layers and head < architecture.n_heads):
            raise UserError(
                f"{opened.place}: no head {layer}.{head} in {architecture.n_layers} layers of {architecture.n_heads} "
                "heads: it is another model than the statement's."
            )


def head_of(name: str) -> Head:
    """Return (layer, head) for "4.11"."""
    layer, _, head = name.partition(".")
    return int(layer), int(head)


# --- whole layers and pairs of heads -----------------------------------------------------------------------------


@quantity
def layer_median(opened: Opened, column: str, sign: int = 1) -> float:
    """Return a column's median over layers in layers.parquet, times `sign`."""
    model = opened.model
    rows = [layer_row(Layer(model, index)) for index in range(model.architecture.n_layers)]
    return sign * float(pd.concat(rows)[column].median())


@quantity
def composition_rank(opened: Opened, mode: Mode, sender: str, receiver: str) -> float:
    """Return a sender's rank among all heads in layers before the receiver, 1 for the strongest; ties count."""
    (layer, head), (to_layer, to_head) = head_of(sender), head_of(receiver)
    scores = composition.received(opened.circuits[: to_layer + 1], to_layer, mode, [to_head])[..., 0]
    own = scores[layer, head]
    return float((scores >= own).sum()) if own.isfinite() else float("nan")


# --- copying, over the vocabulary or a task's words ----------------------------------------------------------------


@quantity
def least_copying(opened: Opened, heads: Sequence[str]) -> float:
    """Return the smallest `ov_copying` among some heads."""
    return min(opened.library.head(*head_of(name)).ov.copying for name in heads)


@quantity
def cell_heads(opened: Opened, task: str, metric: str, reduce: str, heads: Sequence[str] | None = None) -> float:
    """Return a metric's least or mean value in a cell's heads.parquet, over some heads or all."""
    values = _values(opened, task, metric)
    if heads is not None:
        values = values.loc[[head_of(name) for name in heads]]
    return float(getattr(values, reduce)())


def _values(opened: Opened, task: str, metric: str) -> "pd.Series[float]":
    """Return a metric of all heads in a cell's heads.parquet, by (layer, head).

    Raises:
        UserError: the model has no such metric.
    """
    record, tables = opened.cell(task, str(METRICS[metric].circuit))
    if metric in record["unavailable"]:
        raise UserError(f"{metric}: {record['unavailable'][metric]}.")
    return tables["heads"].set_index(["layer", "head"])[metric]


@quantity
def cell_rank(opened: Opened, task: str, metric: str, head: str) -> float:
    """Rank a head among all heads by a metric in heads.parquet, 1 for the largest; ties count. Nan without a value."""
    values = _values(opened, task, metric)
    own = values.loc[head_of(head)]
    return float((values >= own).sum()) if np.isfinite(own) else float("nan")


@quantity
def cell_lead(opened: Opened, task: str, metric: str, head: str) -> float:
    """Return a head's value of a metric over the largest of all other heads'; nan if no other is above 0."""
    values = _values(opened, task, metric)
    own, rest = float(values.loc[head_of(head)]), float(values.drop(index=head_of(head)).max())
    return own / rest if rest > 0 else float("nan")


@quantity
def diagonal(
    opened: Opened,
    head: str,
    circuit: str,
    rows: str,
    queries: str = "unembedding",
    highest: int | None = None,
    lowest: int | float | None = None,
) -> float:
    """Return how a token's own entry ranks in its row of a full circuit: a share of tokens in percent, or a median.

    In OV, row t of E' W_OV W_U holds the logits of all tokens if t is attended to. In QK it holds the scores of all
    keys for the query t. Rows are centred, but not divided by their size, and the unembedding's columns are less their
    mean, as the sources have them: no rank in OV depends on either.

    Args:
        opened: the model.
        head: "10.7"; if there are several, as in "1.4 1.10", their circuits are summed.
        circuit: `ov` or `qk`.
        rows: what heads read of tokens (keys in QK): `token` for the embedding, `block0` for the stream after block 0
            if each token attends to itself alone, or `mlp0` for what block 0's MLP writes there.
        queries: for QK: `unembedding` for its columns, or as `rows`.
        highest: how many places from the largest entry count.
        lowest: how many places from the smallest entry count; if it is below 1, the share of all tokens that may come
            before. Without either end, the median place from the largest entry is returned, which is 1 or more.
    """
    model = opened.model
    vocabulary = model.vocabulary
    if vocabulary is None or vocabulary.W_U_rows is None:
        raise UserError("the checkpoint holds no unembedding.")
    W_U = vocabulary.W_U_rows[:]
    W_U = W_U - W_U.mean(0)
    E = _token_rows(model, rows)
    sides = (E, W_U) if circuit == "ov" else (W_U if queries == "unembedding" else _token_rows(model, queries), E)
    left, right = [], []
    for layer, index in map(head_of, head.split()):
        factors = Layer(model, layer).factors(Circuit(circuit), True)
        left.append(sides[0] @ factors.left[index].to(E))
        right.append(sides[1] @ factors.right[index].to(E).T)
    ranks = diagonals.own_ranks(
        torch.cat(right, -1)[None], torch.cat(left, -1)[None], torch.arange(len(E), device=E.device)
    )
    if highest is not None:
        return 100 * float(diagonals.share_up_to(ranks.from_largest, highest))
    if lowest is None:
        return float(ranks.from_largest.double().median())
    count = int(lowest) if lowest >= 1 else 1 + int(len(E) * lowest)
    return 100 * float(diagonals.share_up_to(ranks.from_smallest, count))


def _token_rows(model: Model, kind: str) -> torch.Tensor:
    """Return what heads are taken to read of each token: `token`, `block0` or `mlp0`.

    Raises:
        UserError: the model has no such rows.
    """
    vocabulary, block0 = model.vocabulary, model.block0
    assert vocabulary is not None
    if kind == "token":
        return vocabulary.W_E[:]
    if isinstance(block0, str):
        raise UserError(f"{block0}.")
    if kind == "block0":
        return block0.rows(vocabulary.W_E[:])
    if block0.mlp is None:
        raise UserError("the model has no MLP.")
    return block0.mlp_output(vocabulary.W_E[:])


# --- cycles ------------------------------------------------------------------------------------------------------


def _embedding_power(opened: Opened, modulus: int, first: int) -> torch.Tensor:
    vocabulary = opened.model.vocabulary
    if vocabulary is None or vocabulary.size < first + modulus:
        raise UserError(f"modulus={modulus}: the model has no embedding of that many residues.")
    return fourier.power(vocabulary.W_E[first : first + modulus])


@quantity
def neuron_frequencies(opened: Opened, modulus: int, first: int = 0) -> frozenset[int]:
    """Return the fewest frequencies that hold 95 % of the power of what neurons write to the residues' logits."""
    vocabulary, mlp = opened.model.vocabulary, one_mlp(opened.model)
    if mlp is None:
        raise UserError("only a model of one block, with an MLP without a gate, has a map from neurons to logits.")
    if vocabulary is None or vocabulary.written is None or vocabulary.written.shape[0] < first + modulus:
        raise UserError(f"modulus={modulus}: the model has no logits of that many residues.")
    rows = vocabulary.written[first : first + modulus].double()
    shares = fourier.power(rows @ mlp.W_out.to(rows).T)
    count = int(fourier.frequencies_needed(shares))
    return frozenset(int(k) + 1 for k in shares.argsort(descending=True)[:count])


@quantity
def frequency_share(
    opened: Opened, modulus: int, frequencies: Sequence[int], first: int = 0, constant: bool = False
) -> float:
    """Return the share of the embedding's power that some frequencies hold together, in [0, 1].

    The power at frequency 0 is left out of the whole, unless `constant` is set.
    """
    share = float(_embedding_power(opened, modulus, first)[torch.tensor(list(frequencies)) - 1].sum())
    if not constant or opened.model.vocabulary is None:
        return share
    rows = opened.model.vocabulary.W_E[first : first + modulus].double()
    return share * float((rows - rows.mean(0)).square().sum() / rows.square().sum())


def _block(opened: Opened) -> one_block.OneBlock:
    library_model = opened.library
    return one_block.OneBlock(library_model.checkpoint, library_model.model.config.model.attn_coeff)


def _cycle(modulus: int, query: int | None) -> Cycle:
    return Cycle(torch.arange(modulus), query)


@quantity
def addition_accuracy(opened: Opened, modulus: int, query: int | None = None) -> float:
    """Return the share of all pairs that are added correctly, in percent."""
    cycle = _cycle(modulus, query)
    return 100 * one_block.accuracy(one_block.logits_of_pairs(_block(opened), cycle), cycle)


@quantity
def distance_irrelevance(opened: Opened, modulus: int, query: int | None = None) -> float:
    """Return the distance irrelevance over all pairs, in [0, 1]."""
    cycle = _cycle(modulus, query)
    return one_block.distance_irrelevance(one_block.logits_of_pairs(_block(opened), cycle), cycle)


@quantity
def gradient_symmetricity(
    opened: Opened, modulus: int, triples: int | None = None, seed: int = 0, query: int | None = None
) -> float:
    """Return the gradient symmetricity in percent, over all triples or over some that are drawn."""
    chosen = one_block.every_triple(modulus) if triples is None else one_block.drawn_triples(modulus, triples, seed)
    return 100 * float(one_block.symmetricities(_block(opened), chosen, _cycle(modulus, query)).mean())


# --- forward passes of language models ---------------------------------------------------------------------------


@quantity
def on_prompts(opened: Opened, task: str, key: str, scale: int | float = 1) -> float:
    """Return accuracy or mean logit difference over all of a task's prompts, from both halves."""
    record, _ = opened.cell(task, "activations")
    halves = _told(record)["halves"].values()
    return scale * float(np.average([half[key] for half in halves], weights=[half["prompts"] for half in halves]))


@quantity
def attention_on_prompts(opened: Opened, task: str, role: str, heads: Sequence[str], column: str, reduce: str) -> float:
    """Return a column's mean or least value in activations.parquet over some heads in a role, both halves averaged."""
    record, tables = opened.cell(task, "activations")
    _told(record)
    rows = tables["activations"]
    values = rows[rows["role"] == role].groupby(["layer", "head"])[column].mean()
    return float(getattr(values.loc[[head_of(name) for name in heads]], reduce)())


def _told(record: Mapping[str, Any]) -> Mapping[str, Any]:
    described: Mapping[str, Any] = record["activations"]
    if "halves" not in described:
        raise UserError(f"on prompts: {described['untestable']}")
    return described
