"""Ranks of the full circuits' diagonals in every layer (docs/definitions.md, section 2)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits import diagonals
from ovqk.circuits.diagonals import OpenColumns, PlaceSearch, Reader
from ovqk.circuits.grams import BLOCK
from ovqk.circuits.sides import WrittenRows
from ovqk.config.schema import Circuit
from ovqk.errors import UserError
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.weights.stored_rows import Rows
from ovqk.weights.types import LayerWeights, keys, queries

WAITING = 2**24
"""The most numbers in open columns that wait for a pass over the vocabulary."""
AMONG = 10
"""How many places from an end count in OV; in QK the first alone does."""
SIGNS = {Circuit.ov: (1, -1), Circuit.qk: (1,)}
NAMES = {Circuit.ov: ("ov_diagonal_top10", "ov_diagonal_bottom10"), Circuit.qk: ("qk_diagonal_first",)}


class DiagonalRanks:
    """How often a token's own entry is at an end of its row in OV, or first in its row in QK, layer by layer.

    A row in OV holds what attending to one token does to all logits; a row in QK the scores of all keys for one query.
    Layers after the first read block 0's MLP output if the model has an MLP; else, and in layer 0, plain embeddings;
    rows are normalised. Queries are the unembedding's columns.

    The columns that a search leaves open wait, up to WAITING numbers, so that one pass over the vocabulary serves
    several layers.
    """

    def __init__(self, model: Model) -> None:
        """Start without layers."""
        self.model = model
        self._searches: dict[tuple[int, Circuit], PlaceSearch] = {}
        self._open = {name: OpenColumns() for name in ("unembedding", "plain", "written")}
        self._ranked: dict[str, Float[Tensor, "column d_model"]] = {}

    def visit(self, layer: Layer) -> None:
        """Rank a layer's own entries, unless the analysis does not ask for it, or what the layer reads is not there."""
        model, rows = self.model, "written" if layer.index > 0 else "plain"
        asked = [circuit for circuit in model.circuits if NAMES[circuit][0] not in model.unavailable]
        if asked and self._rows("unembedding") is not None and self._rows(rows) is not None:
            for circuit in asked:
                self._rank(layer, circuit, rows)

    def columns(self) -> dict[int, dict[str, Float[Tensor, " head"]]]:
        """Return layer -> metric -> the share of ranked tokens, in [0, 1], for all layers visited."""
        for name in self._open:
            self._pass(name)
        found: dict[int, dict[str, Float[Tensor, " head"]]] = {}
        for (index, circuit), search in self._searches.items():
            for name, sign in zip(NAMES[circuit], SIGNS[circuit], strict=True):
                found.setdefault(index, {})[name] = search.share(sign)
        return found

    def _rank(self, layer: Layer, circuit: Circuit, rows: str) -> None:
        weights, kv = layer.folded, self.model.architecture.kv_of_head.to(layer.folded.W_O.device)
        normed = circuit is Circuit.qk and weights.qk_norm is not None
        # in OV each row is ranked by what it writes to all logits, in QK by the keys that it meets
        if circuit is Circuit.ov:
            ranked, others = rows, "unembedding"
            x, own = self._of_ranked(ranked), self._of_ranked(others)
            columns, own_rows = (x @ weights.W_V.to(x))[kv], own @ weights.W_O.mT.to(own)
        else:
            ranked, others = "unembedding", rows
            x, own = self._of_ranked(ranked), self._of_ranked(others)
            columns = queries(weights, x) if normed else x @ weights.W_Q.to(x)
            own_rows = (keys(weights, own) if normed else own @ weights.W_K.to(own))[kv]
        try:
            search = PlaceSearch(columns, own_rows, AMONG if circuit is Circuit.ov else 1, SIGNS[circuit])
        except ValueError:
            raise UserError(
                f"analysis.diagonals=true: weights in layer {layer.index}'s {circuit.upper()} circuit are NaN or "
                "infinite, or too large to be multiplied; allowed: weights whose products are finite 32-bit numbers."
            ) from None
        self._searches[layer.index, circuit] = search
        for heads, met, reader in _readers(weights, circuit, kv.tolist(), columns):
            self._open[others].add(search, heads, met, reader)
        if self._open[others].size >= WAITING:
            self._pass(others)

    def _pass(self, name: str) -> None:
        if not self._open[name].size:  # else cells without ranks would take the unembedding into memory
            return
        rows, vocabulary = self._rows(name), self.model.vocabulary
        assert rows is not None and vocabulary is not None
        n, unembedding = rows.shape[0], vocabulary.unembedding if name == "unembedding" else None
        ranked = diagonals.ranked_tokens(n)
        if isinstance(unembedding, Tensor):
            order = farthest_first(unembedding)
            self._open[name].compare(lambda some: unembedding[order[some]], n, order.argsort().cpu()[ranked])
        else:
            self._open[name].compare(lambda some: self._normalised(name, rows[some]), n, ranked)

    def _of_ranked(self, name: str) -> Float[Tensor, "column d_model"]:
        if name not in self._ranked:
            rows = self._rows(name)
            assert rows is not None
            ids = diagonals.ranked_tokens(rows.shape[0])
            self._ranked[name] = self._normalised(name, rows[ids.to(rows.device)])
        return self._ranked[name]

    def _rows(self, name: str) -> Rows | WrittenRows | None:
        vocabulary = self.model.vocabulary
        if vocabulary is None or name == "written":
            return self.model.diagonal_rows
        return vocabulary.W_E if name == "plain" else vocabulary.W_U_rows

    def _normalised(self, name: str, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        return self.model.architecture.normalised(x) if name == "plain" else x


def farthest_first(rows: Float[Tensor, "token d_model"]) -> Int[Tensor, " token"]:
    """Return the tokens by the distance of their rows from the mean, the farthest first.

    Their logits differ most from the mean logit, so that they come before other tokens at one end or the other.
    """
    mean = rows.mean(0)
    return torch.cat([torch.linalg.vector_norm(some - mean, dim=1) for some in rows.split(BLOCK)]).argsort(
        descending=True, stable=True
    )


def _readers(
    weights: LayerWeights, circuit: Circuit, kv_of_head: Sequence[int], columns: Float[Tensor, "head column d_head"]
) -> list[tuple[list[int], Float[Tensor, "some_head column width"], Reader]]:
    """Return heads that read tokens alike, their columns, and how they read.

    Normalised keys are normalised in the reader, so that their gain goes to the columns. If all heads of a token share
    one norm, they have one reader, and a column meets nothing but its own head's keys there.
    """
    every, norm = range(len(kv_of_head)), weights.qk_norm
    if circuit is Circuit.ov:
        return [([head], columns[head : head + 1], Reader(weights.W_O[head])) for head in every]
    of_kv = [[head for head in every if kv_of_head[head] == kv] for kv in range(len(weights.W_K))]
    if norm is None:
        return [(heads, columns[heads], Reader(weights.W_K[kv].mT)) for kv, heads in enumerate(of_kv)]
    met = columns * norm.key_gain[list(kv_of_head), None].to(columns)

    def inverse_scale(k: Float[Tensor, "token width"]) -> Float[Tensor, "token one"]:
        return norm.inverse_scale(k[None])[0]

    if not norm.over_heads:
        return [
            (heads, met[heads], Reader(weights.W_K[kv].mT, weights.b_K[kv], inverse_scale))
            for kv, heads in enumerate(of_kv)
        ]
    width = columns.shape[-1]
    wide = met.new_zeros(*met.shape[:2], len(of_kv) * width)
    for head, kv in enumerate(kv_of_head):
        wide[head, :, kv * width : (kv + 1) * width] = met[head]
    return [(list(every), wide, Reader(weights.W_K.mT.flatten(0, 1), weights.b_K.flatten(), inverse_scale))]
