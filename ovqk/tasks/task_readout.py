"""A task on a model: its words as tokens, and each head's metrics on its variable (definitions: section 5)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits.effective_embeddings import Block0, EffectiveRows, Streams
from ovqk.circuits.factors import scores
from ovqk.circuits.head_maps import HeadMaps, Scorer
from ovqk.circuits.threads import begun
from ovqk.config.schema import Circuit, Embedding, VariableKind
from ovqk.metrics import METRICS, NOT_APPLICABLE, metric_names
from ovqk.structure.kept import Kept, once
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.stages import Tables, heads_rows
from ovqk.tasks.readouts import Readout, metrics_of_other_kinds
from ovqk.tasks.words import TaskTokens, resolve_task

MATCHES_RUN = 32
"""The largest number of matched tokens per word that a model runs on for `analysis.embedding=stream`."""
ALONGSIDE = 2**20
"""The largest number of elements in a layer's W_O with which readouts of a layer run while the next layer is visited:
their maps, some 50 bytes an element, then stay in memory beside the next layer's."""
BySource = dict[str, Float[Tensor, "head source"]]
"""Metric -> its value for each head and source token, or word pair."""


class Read(NamedTuple):
    """What a layer's readout gives.

    Attributes:
        metrics: metric -> [head].
        by_source: circuit -> its metrics for each head and source token, or word pair.
    """

    metrics: dict[str, Float[Tensor, " head"]]
    by_source: dict[Circuit, BySource]


RunWords = Callable[[Int[Tensor, " token"], Int[Tensor, " word"]], Streams | str]
"""Runs a model on single tokens, some of them the task's words; says why if it cannot be run."""


@dataclass(frozen=True)
class TaskReadout:
    """A task on one model.

    Attributes:
        model: the model.
        tokens: the task's words as the model's tokens.
        readout: the readout for the task's variable; None if no word is read.
        unavailable: metric -> why no head in this model can have it on this task.
        unread: why layers after the first have no effective embedding, if they have none.
    """

    model: Model
    tokens: TaskTokens
    readout: Readout | None
    unavailable: dict[str, str]
    unread: str = ""
    _sources: WeakKeyDictionary[Layer, dict[Circuit, Callable[[], BySource]]] = field(default_factory=WeakKeyDictionary)

    @classmethod
    def read(cls, model: Model, run_words: RunWords | None = None) -> "TaskReadout":
        """Read the task's words with the model's tokenizer.

        Args:
            model: the model, with its cell's choices.
            run_words: runs the model on single words, for `analysis.embedding=stream`.

        Raises:
            UserError: the words cannot be read as the model's tokens (`resolve_task`).
        """
        if model.config.analysis.embedding is Embedding.stream:
            tokens, readout, why = read_task(model, run_words)
        else:
            tokens, readout, why = once(model.kept, "task", words_depend_on(model), lambda: read_task(model))
        return cls(model, tokens, readout, unavailable_on(model, readout, why), why)

    @property
    def kept(self) -> Kept | None:
        """Where cells with other analyses find what they share with this task; None if the model is run for its words.

        It depends on `words_depend_on`, besides the model.
        """
        return None if self.model.config.analysis.embedding is Embedding.stream else self.model.kept

    @property
    def notes(self) -> list[str]:
        """A note, if words are read as the running model has them, or should have been."""
        if self.readout is None or self.readout.embedding is not Embedding.stream:
            return []
        streams, name = self.readout.effective.streams, "analysis.embedding=stream"
        if streams is None:
            return [f"{name}: behind layer 0 no word is read: {self.unread}"]
        return [
            f"{name}: behind layer 0 words are read as the running model has them behind short prefixes "
            f"({len(streams.ids):,} tokens were run, at most {MATCHES_RUN} matched to each word)"
        ]

    def maps(self, layer: Layer, circuit: Circuit) -> HeadMaps | None:
        """Return a circuit's maps as readouts use them: folded, and for QK with the mean rotation.

        The result is None for QK if ovqk does not know how the model encodes positions.
        """
        architecture = self.model.architecture
        if circuit is Circuit.ov:
            return HeadMaps(layer.factors(Circuit.ov, True), layer.decomposition(Circuit.ov, True))
        if architecture.positions == "unsupported":
            return None
        weights, span = layer.folded, layer.span
        scorer: Scorer | None = None
        if weights.qk_norm is not None:

            def scorer(query_rows: Tensor, key_rows: Tensor) -> Tensor:
                return scores(weights, architecture, query_rows, key_rows, span)

        return HeadMaps(layer.factors(Circuit.qk, True, span), layer.decomposition(Circuit.qk, True, span), scorer)

    def by_source(self, layer: Layer, circuit: Circuit) -> dict[str, Float[Tensor, "head source"]]:
        """Return a circuit's metrics for each head and source token; they are computed once for each layer."""
        known = self._sources.setdefault(layer, {})
        if circuit not in known:
            maps = None if self.readout is None else self.maps(layer, circuit)
            found = {} if self.readout is None or maps is None else self.readout.by_source(layer.index, maps)
            known[circuit] = lambda: found
        return known[circuit]()

    def metrics(self, layer: Layer) -> dict[str, Float[Tensor, " head"]]:
        """Return the task metrics for the layer's heads; under rotary positions with the mean rotation."""
        return self.begin(layer)().metrics

    def begin(self, layer: Layer) -> Callable[[], Read]:
        """Begin to read a layer, each circuit in a thread of its own, and return a function that waits for the result.

        Everything that the threads need of the layer is made before this returns; its maps stay in memory until then.
        """
        readout, index = self.readout, layer.index
        if readout is None:
            return lambda: Read({}, {})
        maps = {circuit: of for circuit in self.model.circuits if (of := self.maps(layer, circuit)) is not None}
        readout.make_ready(index)

        def read(of: HeadMaps) -> tuple[BySource, dict[str, Tensor]]:
            by_source = readout.by_source(index, of)
            means = {name: values.mean(-1) for name, values in by_source.items()}
            return by_source, means | readout.of_subspace(index, of)

        circuits, found = list(maps), begun(read, list(maps.values()), layer.folded.W_O.device)

        def results() -> Read:
            by_source, metrics = zip(*found(), strict=True) if circuits else ((), ())
            return Read(
                {name: values for some in metrics for name, values in some.items()},
                dict(zip(circuits, by_source, strict=True)),
            )

        def sources_of(circuit: Circuit) -> BySource:
            return results().by_source[circuit]

        self._sources[layer] = {circuit: partial(sources_of, circuit) for circuit in circuits}

        return results

    @property
    def why_no_pairs(self) -> str:
        """Why `of_pairs` has none for a layer: the task is about no relation, or no word is read there."""
        if all(variable.kind is not VariableKind.relation for variable in self.model.config.task.variables.values()):
            return "it is about no relation between words; allowed: a task that is, such as country_capital"
        return f"no word is read there: {self.unread or 'the checkpoint lacks an embedding'}"

    def of_pairs(self, layer: Layer) -> pd.DataFrame | None:
        """Return the layer's part of `relations`: a row for each head and word pair.

        Its columns are layer, head, source, target, and each metric whose mean over pairs `heads` has. None if the
        task's variable is no relation, or the layer has no such metric.
        """
        if self.readout is None or self.readout.variable.pairs is None or Circuit.ov not in self.model.circuits:
            return None
        return self.pairs_rows(layer.index, self.by_source(layer, Circuit.ov))

    def pairs_rows(self, layer: int, found: BySource) -> pd.DataFrame | None:
        """Return `of_pairs`, given the layer's OV metrics for each word pair."""
        if self.readout is None or self.readout.variable.pairs is None or not found:
            return None
        (sources,), (targets,) = (self.readout.variable.read, self.readout.variable.write)
        n_heads, n_pairs = next(iter(found.values())).shape
        return pd.DataFrame(
            {
                "layer": np.full(n_heads * n_pairs, layer, np.int32),
                "head": np.arange(n_heads, dtype=np.int32).repeat(n_pairs),
                "source": sources.words * n_heads,
                "target": targets.words * n_heads,
            }
            | {name: values.flatten().cpu().double().numpy() for name, values in found.items()}
        )


class ReadoutTables:
    """The stage that adds the task's metrics to the metrics that need no task.

    They do not depend on the rest of the analysis: a cell with another one leaves them, if this process keeps them.
    Those of a layer are computed while the next layer is visited, if no other stage has much to do there, and unless
    layers are large (ALONGSIDE).
    """

    def __init__(self, task: TaskReadout, alongside: bool = False) -> None:
        """Start without layers; `alongside` says whether threads are free while the next layer is visited."""
        self._alongside = alongside
        self.task, self._layers, self._pairs = task, list[pd.DataFrame](), list[pd.DataFrame]()
        self._of = *words_depend_on(task.model), task.model.circuits
        self._known = task.kept is not None and task.kept.has("readouts", self._of)
        self._take: Callable[[], None] = lambda: None  # the layer before, as soon as it is read

    def visit(self, layer: Layer) -> None:
        """See `Stage`."""
        if self._known:
            return
        index, n_heads = layer.index, layer.model.architecture.n_heads
        read = self.task.begin(layer)
        self._take()

        def take() -> None:
            self._layers.append(heads_rows(index, n_heads, read().metrics))
            if (pairs := self.task.pairs_rows(index, read().by_source.get(Circuit.ov, {}))) is not None:
                self._pairs.append(pairs)

        self._take = take
        if not self._alongside or layer.folded.W_O.numel() > ALONGSIDE:
            self._finish()

    def _finish(self) -> None:
        self._take()
        self._take = lambda: None

    def tables(self, made: Tables) -> Tables:
        """Return `heads`: a row for each head, a column for each metric in the analysis; null if there is no value.

        If the task's variable is a relation, `relations` has a row for each head and word pair as well.
        """
        self._finish()
        readouts, pairs = once(self.task.kept, "readouts", self._of, self._joined)
        structure = made["heads"]
        columns = {name: structure[name] for name in ("layer", "head")}
        for name in metric_names(self.task.model.circuits):
            of = readouts if name in readouts else structure
            there = name in of and name not in self.task.unavailable
            columns[name] = of[name] if there else pd.Series(math.nan, index=structure.index)
        return {"heads": pd.DataFrame(columns | {"unstable": structure["unstable"]})} | pairs

    def _joined(self) -> tuple[pd.DataFrame, Tables]:
        """Return the layers' metrics, and `relations` if there is such a table."""
        pairs = {"relations": pd.concat(self._pairs, ignore_index=True)} if self._pairs else {}
        return pd.concat(self._layers, ignore_index=True), pairs


def words_depend_on(model: Model) -> tuple[object, ...]:
    """Return everything that a task's words and their readout depend on besides the model and its tokenizer."""
    task, embedding = model.config.task, model.config.analysis.embedding
    return task.name, task.words, task.continuations, task.variables, embedding, model.label


def read_task(model: Model, run_words: RunWords | None = None) -> tuple[TaskTokens, Readout | None, str]:
    """Return a task's words, their readout (None if no word is read), and why layers have no effective embedding.

    Raises:
        UserError: the words cannot be read as tokens of the model (`resolve_task`).
    """
    tokens, why = read_words(model), str(model.block0)
    if model.vocabulary is None or not tokens.variables:
        return tokens, None, why
    block0 = model.block0 if isinstance(model.block0, Block0) else None
    embedding, variable = model.config.analysis.embedding, tokens.variables[0]
    streams: Streams | str | None = None
    if embedding is Embedding.stream:
        variable = variable.thinned(MATCHES_RUN)
        streams = (
            "the model was not run"
            if run_words is None
            else run_words(variable.tokens, torch.cat([words.ids for words in variable.read]))
        )
    ran = streams if isinstance(streams, Streams) else None
    readout = Readout(variable, EffectiveRows(model.vocabulary, block0, model.architecture, ran), embedding)
    return tokens, readout, streams if isinstance(streams, str) else why


def read_words(model: Model) -> TaskTokens:
    """Return the task's words as tokens; none if the model has neither embeddings nor a tokenizer.

    Raises:
        UserError: the words cannot be read as tokens of the model (`resolve_task`).
    """
    task, tokenizer, vocabulary = model.config.task, model.tokenizer, model.vocabulary
    if vocabulary is not None:  # a tokenizer may know more tokens than the model has rows for
        return resolve_task(task, tokenizer, vocabulary.size, model.label)
    if tokenizer is not None:
        return resolve_task(task, tokenizer, tokenizer.get_vocab_size(), model.label)
    note = ["the checkpoint has no embeddings and no tokenizer: no word is read"] if task.variables else []
    return TaskTokens([], {}, {}, note)


def unavailable_on(model: Model, readout: Readout | None, unread: str) -> dict[str, str]:
    """Return metric -> reason, for the metrics that no head in this model can have on this task.

    `unread` says why no layer's effective embedding is available, if none is.
    """
    task, architecture, circuits = model.config.task, model.architecture, model.circuits
    reasons, of_tasks = dict(model.unavailable), [n for n in metric_names(circuits) if METRICS[n].is_readout]
    if readout is None:
        why = "no word is read" if task.variables else f"{NOT_APPLICABLE}task {task.name} has no words"
        for name in of_tasks:
            reasons.setdefault(name, why)
        return reasons
    kind = readout.variable.kind
    for name in metrics_of_other_kinds(kind):
        if METRICS[name].circuit in circuits:
            why = f"{NOT_APPLICABLE}the task's variable '{readout.variable.name}' is a {kind.value}"
            reasons.setdefault(name, why)
    if not any(readout.reads(layer) for layer in range(architecture.n_layers)):
        for name in of_tasks:
            reasons.setdefault(name, f"no effective embedding: {unread}")
    if architecture.positions == "unsupported":
        for name in of_tasks:
            if METRICS[name].circuit is Circuit.qk:
                reasons.setdefault(name, "ovqk does not know how this model encodes positions")
    return reasons
