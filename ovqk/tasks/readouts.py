"""A causal variable as each layer reads it, and each head's metrics on it (definitions: section 5).

Layer 0 reads the embedding. Later layers read the `block0` effective embedding, unless the analysis chooses one
embedding for all layers or runs the model on single words (`stream`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ovqk.circuits import alignment, relations
from ovqk.circuits.effective_embeddings import MLP0, WRITE, EffectiveRows, RowKind, StreamBefore
from ovqk.circuits.head_maps import CircuitMaps
from ovqk.config.schema import Circuit, Embedding, VariableKind
from ovqk.errors import UserError
from ovqk.metrics import METRICS, Metric, named
from ovqk.tasks.lookup import WordSet
from ovqk.tasks.words import Variable
from ovqk.weights.stored_rows import Rows

SET_METRICS = named(lambda metric: metric.variable is VariableKind.set)
"""Metrics that are means over a `set` variable's source tokens."""
RELATION_METRICS = named(lambda metric: metric.variable is VariableKind.relation)
"""Metrics that are means over a `relation`'s pairs."""
SUBSPACE_METRICS = named(lambda metric: metric.of == "subspace")
"""Metrics about the subspace that a variable's words span, on either side of a circuit."""

TOP_METRICS = {name: METRICS[name].in_top for name in named(lambda metric: metric.in_top != 0)}
"""Metric that ranks a word's target in the whole vocabulary -> the sign by which W_OV is multiplied."""


def metrics_of_other_kinds(kind: VariableKind) -> tuple[str, ...]:
    """Return the metrics that a variable of this kind does not have; a relation spans no subspace."""

    def is_other(metric: Metric) -> bool:
        if kind is VariableKind.relation:
            return metric.is_readout and metric.variable is not kind
        return metric.variable not in (None, kind)

    return named(is_other)


@dataclass(frozen=True)
class InTop:
    """One of the TOP_METRICS for a batch of heads; some words may still be undecided.

    Attributes:
        search: the search, which several metrics may share.
        index: the metric's sign in the search, by index.
        W_U_rows: the vocabulary in which the words are ranked.
    """

    search: alignment.TopSearch
    index: int
    W_U_rows: Rows

    @property
    def by_source(self) -> Float[Tensor, "head word"]:
        """Return 1 for each word whose target is in the top among the tokens compared so far, and 0 for the others."""
        return self.search.found()[self.index]

    @staticmethod
    def settle(several: "Sequence[InTop]") -> None:
        """Finish these searches in one pass over the remaining tokens."""
        searches = list({id(top.search): top.search for top in several}.values())
        if searches:
            alignment.settle(searches, several[0].W_U_rows)


class Readout:
    """One causal variable on one model: its read side in each layer, its write side, and the heads' metrics.

    Attributes:
        variable: the variable.
        effective: the effective embeddings for the model's tokens.
        vocabulary: the model's vocabulary.
        embedding: the effective embedding that the analysis chose.
        like: the readout for which this one is a surrogate; None for the task's own. A surrogate takes over its ranks,
            and its band without the words drawn.
        ids: the (first) read words' token ids.
        targets: token ids for the words that these should be mapped to: themselves, or a relation's targets.
    """

    def __init__(
        self,
        variable: Variable,
        rows: EffectiveRows,
        embedding: Embedding,
        like: "Readout | None" = None,
        origins: dict[RowKind, Tensor] | None = None,
    ) -> None:
        """Take the variable's tokens, the model's rows for tokens, and `origins` if known for the same band."""
        self.variable, self.effective, self.vocabulary = variable, rows, rows.vocabulary
        self.embedding, self.like = embedding, like
        self._words: dict[RowKind, Tensor] = {}
        self._both_sides: Tensor | None = None
        self._bases: dict[RowKind, Tensor] = {}
        self._origins: dict[RowKind, Tensor] = {} if origins is None else origins
        self.ids = variable.read[0].ids.to(self.vocabulary.W_E.device)
        self.targets = self.ids if variable.pairs is None else variable.write[0].ids.to(self.ids.device)

    def surrogates(self, variables: Sequence[Variable]) -> "Readout":
        """Return a readout for other words, for all these variables at once: its values are [draw, head].

        The subspaces keep their ranks. In the band, the task's words take the place of the words drawn.
        """
        return Readout(Variable.stacked(variables), self.effective, self.embedding, like=self)

    def of_some(self, variables: Sequence[Variable]) -> "Readout":
        """Return a readout for some of the words, with the same band, for all choices at once: values [draw, head]."""
        return Readout(Variable.stacked(variables), self.effective, self.embedding, origins=self._origins)

    def kind(self, layer: int) -> RowKind:
        """Return the kind of rows that a layer's readouts use on the read side.

        A relation's words are read as block 0's MLP writes them, unless the analysis chooses one embedding.
        """
        kind = self.embedding.kind(layer)
        if self.variable.kind is VariableKind.relation and self.embedding is Embedding.by_layer and layer:
            return MLP0
        return StreamBefore(layer) if kind == "stream" else kind

    def kinds(self, layer: int) -> dict[str, RowKind]:
        """Return effective embedding -> its kind of rows, for the embeddings that are available in this layer."""
        there: dict[str, RowKind] = {"token": "token"}
        if layer and self.effective.block0 is not None:
            there["block0"] = "block0"
        if layer and self.effective.streams is not None:
            there["stream"] = StreamBefore(layer)
        return there

    def reads(self, layer: int) -> bool:
        """Say whether the layer's effective embedding is available."""
        kind = self.embedding.kind(layer)
        there = {"block0": self.effective.block0, "stream": self.effective.streams}
        return kind == "token" or there[kind] is not None

    def rows(self, layer: int) -> Float[Tensor, "*draw word d_model"]:
        """Return the (first) read words' normalised effective embeddings, as this layer reads them."""
        kind = self.kind(layer)
        if kind not in self._words:
            self._words[kind] = self.effective(self.variable.read[0].ids, kind)
        return self._words[kind]

    @property
    def written(self) -> Float[Tensor, "*draw word d_model"]:
        """W_U's columns, as rows, for the words that are sources and targets; for a relation, for its targets."""
        if WRITE not in self._words:
            self._words[WRITE] = self.effective(self.targets, WRITE)
        return self._words[WRITE]

    def basis(self, layer: int) -> Float[Tensor, "*draw r d_model"]:
        """Return an orthonormal basis for the read subspace, as this layer reads it."""
        return self._basis(self.kind(layer))

    @property
    def write(self) -> Float[Tensor, "*draw r d_model"] | None:
        """An orthonormal basis for the write subspace; None if there is no unembedding."""
        return None if self.vocabulary.W_U_rows is None else self._basis(WRITE)

    def prepare(self, layer: int) -> None:
        """Compute this layer's subspaces, and the band means that centre surrogates."""
        for kind in (self.kind(layer), WRITE):
            if kind != WRITE or self.vocabulary.W_U_rows is not None:
                self._basis(kind)

    def make_ready(self, layer: int) -> None:
        """Compute what this layer's readouts of both circuits share, so that neither computes it beside the other."""
        if not self.reads(layer):
            return
        if self.variable.pairs is None:
            self.prepare(layer)
        if self.variable.kind is not VariableKind.contrast:
            self.rows(layer)
            if self.vocabulary.W_U_rows is not None:
                _ = self.written, self.effective.first_unembedded

    def metrics(
        self, layer: int, maps: CircuitMaps, wanted: Collection[str] | None = None
    ) -> dict[str, Float[Tensor, "*draw head"]]:
        """Return the task metrics for these maps, as for heads in this layer.

        There are none if the layer's effective embedding cannot be computed.

        Args:
            layer: the layer.
            maps: the heads' maps, for one circuit.
            wanted: the metrics' names; all metrics if it is None.
        """
        means = {name: values.mean(-1) for name, values in self.by_source(layer, maps, wanted).items()}
        return means | self.of_subspace(layer, maps, wanted)

    def by_source(
        self, layer: int, maps: CircuitMaps, wanted: Collection[str] | None = None
    ) -> dict[str, Float[Tensor, "*draw head source"]]:
        """Return, for each token or pair, the metrics that are means over a `set`'s tokens or a relation's pairs."""
        W_U_rows = self.vocabulary.W_U_rows
        if not self.reads(layer) or self.variable.kind is VariableKind.contrast:
            return {}
        rows = self.rows(layer)
        if self.variable.pairs is not None:
            return self._of_pairs(layer, maps, self.variable.pairs, wanted)

        def asked(*names: str) -> bool:
            return wanted is None or any(name in wanted for name in names)

        found: dict[str, Tensor] = {}
        if maps.circuit is Circuit.ov and W_U_rows is not None:
            if asked("ov_task_auc", "ov_task_auc_raw", "ov_task_margin"):
                found |= _of_scores("ov_task", maps.scores(rows, self.written), wanted)
            in_top = self.in_top(layer, maps, wanted)
            InTop.settle(list(in_top.values()))
            found |= {name: top.by_source for name, top in in_top.items()}
        if maps.circuit is Circuit.qk:
            if asked("qk_task_auc", "qk_task_auc_raw", "qk_task_margin"):
                found |= _of_scores("qk_task", maps.scores(rows, rows), wanted)
            if W_U_rows is not None and asked("qk_task_auc_unembed"):
                scores = maps.scores(self.effective.normalised(self.written), rows)
                found["qk_task_auc_unembed"] = alignment.task_auc_by_source(scores)[0]
        return found

    def _of_pairs(
        self, layer: int, maps: CircuitMaps, pairs: relations.Pairs, wanted: Collection[str] | None
    ) -> dict[str, Float[Tensor, "head pair"]]:
        """Return a relation's OV metrics for each pair."""
        if maps.circuit is not Circuit.ov or self.vocabulary.W_U_rows is None:
            return {}
        found: dict[str, Tensor] = {}
        ours = {"ov_relation_first": relations.first_by_pair, "ov_relation_auc": relations.auc_by_pair}
        if asked := [name for name in ours if wanted is None or name in wanted]:
            if self._both_sides is None:
                self._both_sides = self.effective(pairs.words, WRITE)
            logits = maps.scores(self.rows(layer), self._both_sides)
            found |= {name: ours[name](logits, pairs) for name in asked}
        in_top = self.in_top(layer, maps, wanted)
        InTop.settle(list(in_top.values()))
        return found | {name: ranked.by_source for name, ranked in in_top.items()}

    def in_top(self, layer: int, maps: CircuitMaps, wanted: Collection[str] | None = None) -> "dict[str, InTop]":
        """Return the variable's TOP_METRICS, compared with the first tokens; `InTop.settle` compares the rest."""
        kind, pairs = self.variable.kind, self.variable.pairs
        names = [name for name in TOP_METRICS if METRICS[name].variable is kind and (wanted is None or name in wanted)]
        there = self.reads(layer) and maps.circuit is Circuit.ov
        unembedding = self.effective.unembedding if there and names else None
        if unembedding is None:
            return {}
        signs = [TOP_METRICS[name] for name in names]
        top = alignment.TOP if pairs is None else pairs.places
        search = alignment.TopSearch(maps.written(self.rows(layer)), self.targets, self.written, signs, top)
        alignment.settle([search], self.effective.first_unembedded)
        return {name: InTop(search, index, unembedding) for index, name in enumerate(names)}

    def of_subspace(
        self, layer: int, maps: CircuitMaps, wanted: Collection[str] | None = None
    ) -> dict[str, Float[Tensor, "*draw head"]]:
        """Return the metrics about the subspaces that the variable's words span; a relation has none."""
        mine = [name for name in SUBSPACE_METRICS if METRICS[name].circuit == maps.circuit]
        if self.variable.pairs is not None:
            return {}
        if not self.reads(layer) or (wanted is not None and not set(wanted) & set(mine)):
            return {}
        parts, basis = maps.decomposition, self.basis(layer)
        if maps.circuit is Circuit.qk:
            query = alignment.side_alignment(parts.read, parts.sigma, basis)
            key = alignment.side_alignment(parts.write, parts.sigma, basis)
            return {
                "qk_query_alignment": query.whole,
                "qk_key_alignment": key.whole,
                "qk_top_query_alignment": query.top,
                "qk_top_key_alignment": key.top,
            }
        read, write = alignment.side_alignment(parts.read, parts.sigma, basis), self.write
        found, contrast = {"ov_read_alignment": read.whole}, self.variable.kind is VariableKind.contrast
        if contrast:  # one direction: r/d = 1/d
            found["ov_task_read"] = read.whole
        if write is not None:
            written = alignment.side_alignment(parts.write, parts.sigma, write)
            found |= {"ov_task_alignment": written.whole, "ov_top_alignment": written.top}
            if contrast:
                found["ov_task_transfer"] = alignment.transfer(parts, basis, write)
        return found

    def _basis(self, kind: RowKind) -> Float[Tensor, "*draw r d_model"]:
        """Return the read side's basis for one kind of embedding, or the write side's (`write`)."""
        if kind not in self._bases:
            first, *second = (self.effective(words.ids, kind) for words in self._sets(kind))
            if second:
                self._bases[kind] = self._contrast(kind, first, second[0])
            else:
                rank = None if self.like is None else len(self.like._basis(kind))
                self._bases[kind] = alignment.subspace(first, self._origin(kind, first), rank)
        return self._bases[kind]

    def _contrast(self, kind: RowKind, minus: Tensor, plus: Tensor) -> Float[Tensor, "*draw 1 d_model"]:
        """Return the unit direction between the contrast's sides.

        Raises:
            UserError: both sides have the same mean in this model.
        """
        if alignment.same_mean(minus, plus):
            side = "write" if kind == WRITE else "read"
            raise UserError(
                f"task.variables.{self.variable.name}.{side}: in this model the two sides have the same mean "
                f"{'unembedding' if kind == WRITE else 'embedding'}: there is no direction between them."
            )
        return alignment.unit_contrast(minus, plus)

    def _sets(self, kind: RowKind) -> tuple[WordSet, ...]:
        return self.variable.write if kind == WRITE else self.variable.read

    def _origin(self, kind: RowKind, words: Float[Tensor, "*draw word d_model"]) -> Float[Tensor, "*or_one d_model"]:
        """Return the mean over the band with which the words are compared, on the read or the write side."""
        if self.like is not None:
            like = self.like  # the words drawn leave the band, and the task's words enter it
            n, own = len(like.variable.band), like.effective(like._sets(kind)[0].ids, kind)
            n_words = words.shape[-2]
            return (like._origin(kind, words) * n + own.sum(0) - words.sum(-2)) / (n + len(own) - n_words)
        if kind not in self._origins:
            self._origins[kind] = self.effective(self.variable.band, kind).mean(0)
        return self._origins[kind]


def _of_scores(
    prefix: str, scores: Float[Tensor, "*draw head source target"], wanted: Collection[str] | None
) -> dict[str, Float[Tensor, "*draw head source"]]:
    """Return the wanted metrics for a matrix of logits or scores, for each source token."""
    found: dict[str, Tensor] = {}
    if wanted is None or {f"{prefix}_auc", f"{prefix}_auc_raw"} & set(wanted):
        found[f"{prefix}_auc"], found[f"{prefix}_auc_raw"] = alignment.task_auc_by_source(scores)
    if wanted is None or f"{prefix}_margin" in wanted:
        found[f"{prefix}_margin"] = alignment.margin_by_source(scores)
    return found
