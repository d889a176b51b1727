"""What a causal variable looks like to each layer, and what each head does with it.

Layer 0 reads the embedding; later layers read the `block0` effective embedding, unless the analysis chooses one for
all.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ovqk import alignment, heads, spectra
from ovqk.config import Embedding, VariableKind
from ovqk.heads import Factors
from ovqk.spectra import Decomposition
from ovqk.tasks import Variable
from ovqk.vocabulary import Block0, Vocabulary
from ovqk.weights import Architecture, LayerWeights, normalise

SET_METRICS = (
    "ov_task_auc",
    "ov_task_auc_raw",
    "ov_task_copy",
    "ov_task_suppress",
    "qk_task_auc",
    "qk_task_auc_raw",
    "qk_task_auc_unembed",
)
CONTRAST_METRICS = ("ov_task_transfer", "ov_task_read")


@dataclass(frozen=True)
class Side:
    """A variable's read side.

    Attributes:
        rows: normalised effective embeddings of the (first) read words.
        basis: orthonormal basis of the read subspace.
    """

    rows: Float[Tensor, "word d_model"]
    basis: Float[Tensor, "r d_model"]


class Readout:
    """One causal variable on one model: its read side by layer, its write side, and the metrics of a layer's heads."""

    def __init__(
        self,
        variable: Variable,
        vocabulary: Vocabulary,
        block0: Block0 | None,
        architecture: Architecture,
        embedding: Embedding,
    ) -> None:
        """Take the variable's tokens and the folded vocabulary; `block0` is None where it cannot be had."""
        self.variable, self.vocabulary, self.architecture = variable, vocabulary, architecture
        self.block0, self.embedding = block0, embedding
        self._sides: dict[str, Side | None] = {}
        self.ids = variable.read[0].ids.to(vocabulary.W_E.device)
        self.write = self._write_basis()

    def side(self, layer: int) -> Side | None:
        """The read side as this layer sees it; None where its effective embedding cannot be had."""
        by_layer = self.embedding is Embedding.by_layer
        kind = "token" if self.embedding is Embedding.token or (by_layer and layer == 0) else "block0"
        if kind not in self._sides:
            self._sides[kind] = None if kind == "block0" and self.block0 is None else self._side(kind)
        return self._sides[kind]

    def ov_metrics(
        self, layer: int, factors: Factors, decomposition: Decomposition
    ) -> dict[str, Float[Tensor, " head"]]:
        """Task metrics of the OV circuits of a layer; none where its effective embedding cannot be had."""
        side = self.side(layer)
        if side is None:
            return {}
        values = {}
        contrast = self.variable.kind is VariableKind.contrast
        if contrast:
            inside = alignment.side_alignment(decomposition.read, decomposition.sigma, side.basis)
            values["ov_task_read"] = inside.whole  # one direction: r/d = 1/d
        if self.vocabulary.W_U is None or self.write is None:
            return values
        written = alignment.side_alignment(decomposition.write, decomposition.sigma, self.write)
        values |= {"ov_task_alignment": written.whole, "ov_top_alignment": written.top}
        if contrast:
            return values | {"ov_task_transfer": alignment.transfer(decomposition, side.basis, self.write)}
        logits = alignment.readout(factors, side.rows, self.vocabulary.W_U[:, self.ids].T)
        centred, raw = alignment.task_auc(logits)
        copied, suppressed = alignment.top_shares(factors, side.rows, self.ids, self.vocabulary.W_U)
        return values | {
            "ov_task_auc": centred,
            "ov_task_auc_raw": raw,
            "ov_task_copy": copied,
            "ov_task_suppress": suppressed,
        }

    def qk_metrics(
        self, layer: int, weights: LayerWeights, offsets: tuple[int, ...], decomposition: Decomposition
    ) -> dict[str, Float[Tensor, " head"]]:
        """Task metrics of the QK circuits of a layer, mean rotation over the offsets, as decomposed.

        None without the layer's effective embedding. Where the model normalises queries and keys, so do the scores.
        """
        side = self.side(layer)
        if side is None:
            return {}
        query = alignment.side_alignment(decomposition.read, decomposition.sigma, side.basis)
        key = alignment.side_alignment(decomposition.write, decomposition.sigma, side.basis)
        values = {
            "qk_query_alignment": query.whole,
            "qk_key_alignment": key.whole,
            "qk_top_query_alignment": query.top,
            "qk_top_key_alignment": key.top,
        }
        if self.variable.kind is VariableKind.contrast:
            return values
        centred, raw = alignment.task_auc(self._scores(weights, offsets, side.rows, side.rows))
        values |= {"qk_task_auc": centred, "qk_task_auc_raw": raw}
        if self.vocabulary.W_U is not None:
            queries = self._normalised(self.vocabulary.W_U[:, self.ids].T)
            scores = self._scores(weights, offsets, queries, side.rows)
            values["qk_task_auc_unembed"] = alignment.task_auc(scores)[0]
        return values

    def _scores(
        self,
        weights: LayerWeights,
        offsets: tuple[int, ...],
        query_rows: Float[Tensor, "query d_model"],
        key_rows: Float[Tensor, "key d_model"],
    ) -> Float[Tensor, "head query key"]:
        """e_t W_QK e_u^T; of normalised queries and keys, with their biases, where the model has a norm there."""
        if weights.qk_norm is not None:
            return heads.scores(weights, self.architecture, query_rows, key_rows, offsets)
        return alignment.readout(heads.qk_factors(weights, self.architecture, offsets), query_rows, key_rows)

    def _side(self, kind: str) -> Side:
        words = self._rows(self.variable.read[0].ids, kind)
        if self.variable.kind is VariableKind.contrast:
            plus = self._rows(self.variable.read[1].ids, kind)
            return Side(words, alignment.unit_contrast(words, plus))
        return Side(words, alignment.subspace(words, self._rows(self.variable.band, kind)))

    def _rows(self, ids: Int[Tensor, " word"], kind: str) -> Float[Tensor, "word d_model"]:
        rows = self.vocabulary.W_E[ids.to(self.vocabulary.W_E.device)]
        if kind == "block0" and self.block0 is not None:
            rows = self.block0.rows(rows)
        return self._normalised(rows)

    def _normalised(self, rows: Float[Tensor, "word d_model"]) -> Float[Tensor, "word d_model"]:
        return normalise(rows, self.architecture.norm, self.architecture.norm_eps)

    def _write_basis(self) -> Float[Tensor, "r d_model"] | None:
        W_U = self.vocabulary.W_U
        if W_U is None:
            return None
        columns = [W_U[:, words.ids.to(W_U.device)].T for words in self.variable.write]
        if self.variable.kind is VariableKind.contrast:
            return alignment.unit_contrast(columns[0], columns[1])
        return alignment.subspace(columns[0], W_U[:, self.variable.band.to(W_U.device)].T)


def full_circuit_ratio(
    decomposition: Decomposition,
    gram_in: Float[Tensor, "d_model d_model"],
    gram_cross: Float[Tensor, "d_model d_model"],
    gram_out: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, " head"]:
    """Trace ratio of A M B, in [-1, 1], from A^T C A, B C A and B C B^T (A, B: token matrices)."""
    eigen = spectra.eigenvalues(spectra.core(decomposition, gram_cross))
    sigma = spectra.full_circuit_singular_values(decomposition, gram_in, gram_out)
    return spectra.trace_ratio(eigen, sigma.sum(-1))
