"""The interface for notebooks: a model, its heads and their two circuits, by the functions that cells use.

    import ovqk

    model = ovqk.open("mini-attn")        # or a path, a GGUF file, or OWNER/NAME on the hub
    head = model.head(3, 0)
    head.ov.copying, head.qk.singular_values, head.qk.symmetry
    head.ov.tokens(3)                     # what its leading components read and write
    head.portrait()                       # one sheet, as a Matplotlib figure
    model.heads()                         # a row for each head: heads.parquet without a task

The numbers equal those in a cell with `task=none`: the same code computes them, and they come from the same cache.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Complex128, Float, Float64
from numpy import ndarray

from ovqk.cell import structure_cache
from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.composition import MODES, LayerCircuits, scores
from ovqk.circuits.maps import Decomposition
from ovqk.circuits.simulated import Senders
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.config.choices import chosen, composed
from ovqk.config.command_line import composable
from ovqk.config.schema import Circuit
from ovqk.errors import UserError, did_you_mean
from ovqk.figures.portraits import TABLES
from ovqk.metrics import METRICS
from ovqk.structure.cache import StructureParts
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.stages import COMPOSED, DirectionTables, HeadValues, Tables, simulated_metrics, structure_tables
from ovqk.structure.token_tables import TOKENS, component_lists
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.tokenizer import tokenizer_for
from ovqk.weights.devices import resolve_device
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_named
from ovqk.weights.stored_rows import Rows
from ovqk.weights.types import OpenedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = {Circuit.ov: ("reads", "writes"), Circuit.qk: ("queries", "keys")}


def open(model: str | Path, *choices: str) -> "LibraryModel":
    """Open a model by its name in conf/model, a path, or its name on the hub.

    Args:
        model: `mini-attn`, or another file in conf/model; a Hugging Face directory, a GGUF file or one safetensors file
            with TransformerLens names; or OWNER/NAME on the hub.
        choices: further choices as on the command line: `processing=raw`, `device=cuda`, `model.revision=v1`.

    Raises:
        UserError: there is no such model, or it cannot be read; the message says what is allowed.
    """
    config = chosen(model, *choices)
    resolve_device(config.device)  # refused before anything is fetched
    checkpoint = open_checkpoint(config.model, config.hub_timeout, tensors_read)
    source = open_named(checkpoint, config.model)
    tokenizer, notes = tokenizer_for(config.task, checkpoint)
    model_read = Model.read(OpenedModel(source, checkpoint.label, tokenizer), config)
    return LibraryModel(model_read, checkpoint, [*source.notes, *notes])


class LibraryModel:
    """A model, opened: its sizes, its heads and their numbers.

    Attributes:
        name: its name in records.
        n_layers, n_heads, d_model, d_head: its sizes; `n_heads` counts the query heads in a layer.
        notes: remarks on how it was read.
        unavailable: metric -> why none of its heads has a value.
    """

    def __init__(self, model: Model, checkpoint: Checkpoint, notes: Sequence[str]) -> None:
        """Take the parts that layers share; `open` makes them."""
        architecture = model.architecture
        self.name = model.config.model.name
        self.n_layers, self.n_heads = architecture.n_layers, architecture.n_heads
        self.d_model, self.d_head = architecture.d_model, architecture.d_head
        self.notes = [*notes, *model.sample_notes, *model.direction_notes]
        self.unavailable = model.unavailable
        self.model, self.checkpoint = model, checkpoint
        self._of_layer: dict[int, Tables] = {}
        self._circuits_of: dict[int, LayerCircuits] = {}
        self._margins, self._senders = list[HeadValues](), Senders()
        self._readouts = dict[str, TaskReadout]()
        self._last: Layer | None = None

    def __repr__(self) -> str:
        """Say what it is: sizes and processing."""
        sizes = f"{self.n_layers} layers of {self.n_heads} heads, d_model {self.d_model}, d_head {self.d_head}"
        return f"<ovqk model {self.name}: {sizes}, weights {self.model.processing['applied']}>"

    def head(self, layer: int, head: int) -> "Head":
        """Return a head; `model.head(3, 0)` is 3.0 in tables.

        Raises:
            UserError: the model has no such head.
        """
        whole = isinstance(layer, Integral) and isinstance(head, Integral)
        if not (whole and 0 <= layer < self.n_layers and 0 <= head < self.n_heads):
            last = f"{self.n_layers - 1}, 0 to {self.n_heads - 1}"
            raise UserError(f"head({layer!r}, {head!r}): {self.name} has layers and heads 0 to {last}.")
        return Head(self, layer, head)

    def heads(self) -> pd.DataFrame:
        """Return one row per head: layer, head, and every metric that needs no task; heads.parquet with task=none.

        Columns: see `ovqk.metrics.METRICS` for titles, ranges and sources; `unstable` names the metrics that rounding
        the weights would move. All layers are computed, unless a cell left them in the cache.
        """
        return self.tables["heads"].copy()

    @cached_property
    def tables(self) -> Tables:
        """All tables that need no task: heads, layers, spectra, offsets and directions, as cells write them."""
        with ExitStack() as held:
            parts = StructureParts(structure_cache(self.model.config, self.checkpoint), self.model, held)
            for index in range(self.n_layers) if parts.stages else ():
                for stage in parts.stages:
                    stage.visit(self.layer(index))
            return parts.tables()

    def of_layer(self, index: int) -> Tables:
        """Return one layer's tables, computed once, without the other layers; hence without `qk_composed_margin`."""
        if "tables" in self.__dict__:
            return {name: table[table["layer"] == index] for name, table in self.tables.items()}
        if index not in self._of_layer:
            self._of_layer[index] = structure_tables(self.model, [self.layer(index)])
        return self._of_layer[index]

    def composed_margins(self, index: int) -> HeadValues:
        """Return a layer's `qk_composed_margin`, [head]; empty for the first layer, or if the model has none.

        Earlier layers are read for it, each once, but not taken apart.
        """
        while len(self._margins) <= index:
            values = simulated_metrics(self.layer(len(self._margins)), self._senders)
            self._margins.append({name: value for name, value in values.items() if name == COMPOSED})
        return self._margins[index]

    @property
    def W_E(self) -> Float[ndarray, "token d_model"]:  # noqa: N802 - the field's name
        """Embedding, with norms folded in unless `processing=raw`, over the tokenizer's tokens; not centred.

        Full circuits take it less its mean, `W_E - W_E.mean(0)`.

        Raises:
            UserError: the checkpoint has none.
        """
        return self._vocabulary(lambda vocabulary: vocabulary.W_E)

    @property
    def W_U(self) -> Float[ndarray, "d_model token"]:  # noqa: N802
        """Unembedding, likewise, with the same error."""
        return self._vocabulary(lambda vocabulary: vocabulary.written).T

    def _vocabulary(self, part: Callable[[Vocabulary], Rows | None]) -> ndarray:
        vocabulary = self.model.spectral_vocabulary
        rows = None if vocabulary is None else part(vocabulary)
        if rows is None:
            raise UserError(f"{self.name}: {self.model.source.no_vocabulary or 'the checkpoint has no such weights'}.")
        return rows[:].cpu().numpy()  # type: ignore[no-any-return]

    def composition(self, mode: str, sender: "Head", receiver: "Head") -> float:
        """Return how strongly a head reads what a head in an earlier layer writes, in [0, 1] (Elhage et al. 2021).

        norm(W_OV W_QK), norm(W_OV W_QK^T) or norm(W_OV W_OV), sender first, over both norms; 1 / sqrt(d_model) by
        chance. It is `score` in composition.parquet: folded weights, and under rotary positions W_QK with its mean
        rotation over the offsets (docs/definitions.md).

        Args:
            mode: `q`, `k` or `v`: the receiver's input that the sender writes.
            sender, receiver: the head that writes, and the head that reads.

        Raises:
            UserError: there is no such mode, a head is another model's, or the sender is not in an earlier layer.
        """
        if mode not in MODES:
            raise UserError(f"composition({mode!r}, ...): no such mode; allowed: {', '.join(MODES)}.")
        for head in (sender, receiver):
            if not isinstance(head, Head) or head.model is not self:
                raise UserError(f"composition: {head!r} is no head of this model; allowed: model.head(layer, head).")
        if sender.layer >= receiver.layer:
            raise UserError(f"composition: {sender!r} writes after {receiver!r} has read; allowed: an earlier layer.")
        writer, reader = (self._circuits(head.layer).only([head.index]) for head in (sender, receiver))
        return float(scores(writer, reader, mode)[0, 0])  # type: ignore[arg-type]

    def pairs(self, layer: int, task: str) -> pd.DataFrame:
        """Return a layer's part of relations.parquet: a row for each head and word pair (see `ov.pairs`)."""
        if task not in self._readouts:
            config = replace(self.model.config, task=composed([composable("task", task), "tracking=none"]).task)
            self._readouts[task] = TaskReadout.read(replace(self.model, config=config))
        found = self._readouts[task].of_pairs(self.layer(layer))
        if found is None:
            raise UserError(f"task={task}: {self._readouts[task].why_no_pairs}.")
        return found

    def _circuits(self, index: int) -> LayerCircuits:
        """Return a layer's circuits as compositions read them: folded, QK with its mean rotation; kept for pairs."""
        if index not in self._circuits_of:
            layer = self.layer(index)
            parts = layer.decomposition(Circuit.ov, True), layer.decomposition(Circuit.qk, True, layer.span)
            self._circuits_of[index] = LayerCircuits.of(*parts)
        return self._circuits_of[index]

    def layer(self, index: int) -> Layer:
        """Return a layer's weights and decompositions; the last one asked for is kept."""
        if self._last is None or self._last.index != index:
            self._last = Layer(self.model, index)
        return self._last


class Head:
    """A model's head.

    Attributes:
        layer, index: its layer, and its number in the layer.
        ov: its OV circuit, W_V W_O.
        qk: its QK circuit, W_Q W_K^T.
    """

    def __init__(self, model: LibraryModel, layer: int, index: int) -> None:
        """Take its place; nothing is computed yet."""
        self.model, self.layer, self.index = model, layer, index
        self.ov, self.qk = OV(self, Circuit.ov), QK(self, Circuit.qk)

    def __repr__(self) -> str:
        """Say which head it is."""
        return f"<head {self.layer}.{self.index} of {self.model.name}>"

    @cached_property
    def _alone(self) -> dict[Any, Any]:
        """The head's row in `heads`, without what needs earlier layers unless all layers have been computed."""
        (row,) = self.rows("heads").drop(columns=["layer", "head"]).to_dict("records")
        return row

    @cached_property
    def metrics(self) -> "pd.Series[Any]":
        """Every metric for the head that needs no task, by name; `ovqk.metrics.METRICS` explains them.

        Earlier layers are read for `qk_composed_margin`.
        """
        margins = {} if COMPOSED in self._alone else self.model.composed_margins(self.layer)
        row = self._alone | {name: float(of[self.index]) for name, of in margins.items()}
        return pd.Series(row, name=f"{self.layer}.{self.index}", dtype=object)

    def rows(self, table: str) -> pd.DataFrame:
        """Return the head's rows in a model's table (heads, spectra, offsets, directions); none if it has none."""
        found = self.model.of_layer(self.layer).get(table)
        return pd.DataFrame() if found is None else found[found["head"] == self.index].reset_index(drop=True)

    def value(self, metric: str) -> float:
        """Return a metric's value; no other layer is read for it, except earlier ones for `qk_composed_margin`.

        Raises:
            UserError: this model or layer has none, or there is no such metric; the message says why.
        """
        if metric in self.model.unavailable:
            raise UserError(f"{metric}: {self.model.name} has none: {self.model.unavailable[metric]}.")
        if self.layer == 0 and metric in METRICS and "block0" in METRICS[metric].needs:
            raise UserError(f"{metric}: heads in layer 0 have none: it is about what earlier layers write.")
        if metric in self._alone and metric in METRICS:
            return float(self._alone[metric])
        if metric not in self.metrics or metric not in METRICS:
            there = [name for name in self.metrics.index if name in METRICS]
            said = f"not a metric that a head has without a task.{did_you_mean(metric, there)}"
            raise UserError(f"{metric}: {said} Allowed: {', '.join(there)}.")
        return float(self.metrics[metric])

    def portrait(self, task: str | None = None) -> "Figure":
        """Draw the head on one sheet: spectra, tokens, positions; all the model's heads are computed for its bands.

        If `task` names a task about a relation, as `country_capital`, its word pairs are shown too (`ov.pairs`).
        """
        from ovqk.figures import portraits

        tables = {name: self.model.tables.get(name) for name in TABLES}
        tables["relations"] = None if task is None else self.model.pairs(self.layer, task)
        return portraits.sheet(tables, self.layer, self.index, self.model.name, self.model.unavailable)  # type: ignore[no-any-return]


class CircuitOfHead:
    """A head's circuit: M = left @ right with rank d_head; M is formed only if `matrix` is called.

    It works like TransformerLens's FactoredMatrix: `left` and `right` are its A and B, `matrix()` its AB,
    `singular_values` and `eigenvalues` its S and eigenvalues.
    """

    def __init__(self, head: Head, circuit: Circuit) -> None:
        """Take the head; nothing is computed yet."""
        self.head, self.circuit = head, circuit

    def __repr__(self) -> str:
        """Say which circuit it is."""
        return f"<{self.circuit.value.upper()} of {self.head!r}>"

    @cached_property
    def _factors(self) -> tuple[ndarray, ndarray]:
        model = self.head.model
        factors = model.layer(self.head.layer).factors(self.circuit, model.model.folds)
        return tuple(part[self.head.index].double().cpu().numpy() for part in (factors.left, factors.right))  # type: ignore[return-value]

    @property
    def left(self) -> Float64[ndarray, "d_model d_head"]:
        """W_V for OV, W_Q for QK; norms folded in unless `processing=raw`."""
        return self._factors[0]

    @property
    def right(self) -> Float64[ndarray, "d_head d_model"]:
        """W_O for OV, W_K^T for QK."""
        return self._factors[1]

    def matrix(self) -> Float64[ndarray, "d_model d_model"]:
        """Return left @ right: the side that is read by rows (QK: the query), the other by columns (QK: the key)."""
        return self.left @ self.right

    @property
    def effective_rank(self) -> float:
        """Return ov_effective_rank or qk_effective_rank, in [1, d_head]."""
        return self.head.value(f"{self.circuit.value}_effective_rank")

    @property
    def symmetry(self) -> float:
        """Return ov_symmetry or qk_symmetry, in [-1, 1]: 1 if M is symmetric, -1 if it is antisymmetric."""
        return self.head.value(f"{self.circuit.value}_symmetry")

    @property
    def singular_values(self) -> Float64[ndarray, " k"]:
        """Singular values in the residual space, descending; k = min(d_head, d_model)."""
        return self._spectrum("residual", "singular").real

    @property
    def eigenvalues(self) -> Complex128[ndarray, " k"]:
        """Nonzero eigenvalues in the residual space, by falling modulus."""
        return self._spectrum("residual", "eigen")

    @property
    def left_singular_vectors(self) -> Float64[ndarray, "d_model k"]:
        """Directions that OV reads, for QK those of queries: the U of left @ right = U S V^T, by falling S.

        The sign of a pair of columns, here and in `right_singular_vectors`, means nothing.
        """
        return self._decomposition.read[self.head.index].double().cpu().numpy()  # type: ignore[no-any-return]

    @property
    def right_singular_vectors(self) -> Float64[ndarray, "d_model k"]:
        """Directions that OV writes, for QK those of keys: the V of left @ right = U S V^T."""
        return self._decomposition.write[self.head.index].double().cpu().numpy()  # type: ignore[no-any-return]

    @property
    def _decomposition(self) -> Decomposition:
        model = self.head.model
        return model.layer(self.head.layer).decomposition(self.circuit, model.model.folds)

    @property
    def vocabulary_singular_values(self) -> Float64[ndarray, " k"]:
        """The full circuit's singular values, from token to token, over the whole vocabulary."""
        return self._spectrum("vocab", "singular").real

    @property
    def vocabulary_eigenvalues(self) -> Complex128[ndarray, " k"]:
        """The full circuit's nonzero eigenvalues over the whole vocabulary, which copying and matching sum."""
        return self._spectrum("vocab", "eigen")

    def _spectrum(self, space: str, kind: str) -> Complex128[ndarray, " k"]:
        rows = self.head.rows("spectra")
        rows = rows[(rows["circuit"] == self.circuit.value) & (rows["space"] == space) & (rows["kind"] == kind)]
        rows = rows[rows["offset"] == rows["offset"].min()].sort_values("index")
        if not len(rows):
            raise UserError(f"{self!r}: no spectrum over the vocabulary: the checkpoint lacks an embedding.")
        return rows["re"].to_numpy() + 1j * rows["im"].to_numpy()  # type: ignore[no-any-return]

    def tokens(self, components: int = 3, shown: int = 5) -> pd.DataFrame:
        """List the tokens at both ends of the leading singular components, the strongest first.

        Columns: component, sigma, end (+ and -), and the two sides' tokens: reads and writes for OV, queries and keys
        for QK. If a component reads tokens at one end, it writes those at the same end; which end is + means nothing.

        Args:
            components: how many components, at most d_head.
            shown: how many tokens in each list, at most 10.

        Raises:
            UserError: a number is not allowed, or the checkpoint has no tokens.
        """
        width = min(self.head.model.d_head, self.head.model.d_model)
        for name, number, most in (("components", components, width), ("shown", shown, TOKENS)):
            if not isinstance(number, Integral) or not 1 <= number <= most:
                raise UserError(f"{self!r}: tokens({name}={number!r}): must be a whole number from 1 to {most}.")
        model = self.head.model
        stage = DirectionTables(model.model, components)
        stage.visit(model.layer(self.head.layer))
        table = stage.tables({}).get("directions", pd.DataFrame())
        if not len(table):
            raise UserError(f"{self!r}: no token lists: the checkpoint lacks an embedding.")
        table = table[(table["head"] == self.head.index) & (table["circuit"] == self.circuit.value)]
        return component_lists(table[(table["kind"] == "singular") & (table["rank"] <= shown)], SIDES[self.circuit])


class OV(CircuitOfHead):
    """A head's OV circuit, W_OV = W_V W_O: its output when it attends to a token."""

    def pairs(self, task: str) -> pd.DataFrame:
        """List a relation's word pairs, and what attending to each source does to its target.

        Columns: source, target; ov_relation_score and ov_relation_suppress, 1 if the target is among the ten tokens
        that are raised, or lowered, most (of words with themselves: the first), else 0; ov_relation_first, 1 if it is
        raised most of its kind; ov_relation_auc, the share of other targets that are raised less.

        Raises:
            UserError: there is no such task, it is about no relation, or the model cannot read its words.
        """
        found = self.head.model.pairs(self.head.layer, task)
        return found[found["head"] == self.head.index].drop(columns=["layer", "head"]).reset_index(drop=True)

    @property
    def copying(self) -> float:
        """Return ov_copying, in [-1, 1]: the eigenvalues over the vocabulary, summed, over the sum of their moduli."""
        return self.head.value("ov_copying")


class QK(CircuitOfHead):
    """A head's QK circuit, W_QK = W_Q W_K^T: where it attends."""

    @property
    def matching(self) -> float:
        """Return qk_matching, in [-1, 1]: the same ratio as copying; 1 if every token looks for itself."""
        return self.head.value("qk_matching")
