"""Effective embeddings: a token's residual stream as a layer's heads read it (definitions: section 1).

`Block0` computes the stream after block 0 for a token that attended only to itself; `EffectiveRows` hands out rows
of any kind, normalised as a layer's norm would.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits.factors import ov_factors
from ovqk.circuits.grams import BLOCK, Block0Grams, centred_grams, kept
from ovqk.circuits.threads import each
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import apply_norm
from ovqk.weights.stored_rows import Rows, StoredRows
from ovqk.weights.types import Architecture, LayerWeights

HIDDEN_ELEMENTS = 2**21  # elements of block 0's hidden activations computed at a time
TOKENS_PER_THREAD = 512  # tokens computed by one thread at a time: rounding does not depend on the number of threads


class Block0:
    """The `block0` effective embedding: a token's residual stream after block 0 if it attended only to itself.

        E = r + MLP0(ln2(r)),   r = W_E + sum over heads of ln1(W_E) W_V W_O   (block 0)

    Positions, b_V and b_O are left out; MLP biases are kept. An attention-only model has E = r. In a parallel block
    the MLP reads W_E too; a norm after attention or MLP is applied to their output.
    """

    def __init__(self, layer0: LayerWeights, mlp: MLPWeights | None, architecture: Architecture) -> None:
        """Take block 0's attention and MLP weights, their reads folded (`fold_reads`, `fold_mlp`)."""
        factors, self.post_norm = ov_factors(layer0, architecture), layer0.post_norm
        heads, d_model, d_head = factors.left.shape
        joint = factors.left.transpose(0, 1).reshape(d_model, -1), factors.right.reshape(-1, d_model)
        # All heads together map a row to a row. If they have more dimensions than the row, one product is cheaper.
        self.attention = (joint[0] @ joint[1],) if 2 * heads * d_head > d_model else joint
        self.mlp, self.architecture = mlp, architecture

    def rows(self, W_E: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Return E for these rows of the folded embedding, in their precision; many are shared out among threads."""
        if len(W_E) <= TOKENS_PER_THREAD:
            return self._parts(W_E)[1]
        return torch.cat(each(lambda some: self._parts(some)[1], W_E.split(TOKENS_PER_THREAD), W_E.device))

    def parts(
        self, W_E: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]:
        """Return r, the stream without what the MLP writes, and E (`rows`); both by way of one attention."""
        if len(W_E) <= TOKENS_PER_THREAD:
            return self._parts(W_E)
        before, after = zip(*each(self._parts, W_E.split(TOKENS_PER_THREAD), W_E.device), strict=True)
        return torch.cat(before), torch.cat(after)

    def _parts(
        self, W_E: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]:
        architecture, eps = self.architecture, self.architecture.norm_eps
        written = architecture.normalised(W_E)
        for weight in self.attention:
            written = written @ weight.to(W_E)
        stream = W_E + apply_norm(self.post_norm, written, eps)
        if self.mlp is None:
            return stream, stream
        x = architecture.normalised(W_E if architecture.parallel else stream)
        tokens = max(1, HIDDEN_ELEMENTS // self.mlp.W_in.shape[1])
        written = torch.cat([self.mlp.apply(some) for some in x.split(tokens)])
        return stream, stream + apply_norm(self.mlp.post_norm, written, eps)

    def stream(self, W_E: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Return r, the stream without what the MLP writes; the MLP is not run."""
        before = copy.copy(self)
        before.mlp = None
        return before.rows(W_E)

    @cached_property
    def mlp_writes(self) -> bool:
        """Whether the block has an MLP, and one that writes anything."""
        return self.mlp is not None and bool(self.mlp.W_out.any() or self.mlp.b_out.any())

    def mlp_output(self, W_E: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Return what the MLP writes for rows of the folded embedding, each token attending to itself alone.

        It is the effective embedding as McDougall et al. 2023 (arXiv:2310.04625) and Elhelo & Geva 2024
        (arXiv:2412.11965) write it, without the residual stream. The code of the first ranks rows of the whole stream
        (`rows`), and that of the second leaves the attention out of what the MLP reads. If no MLP writes anything,
        these are the rows themselves.
        """
        if not self.mlp_writes:
            return W_E
        before, after = self.parts(W_E)
        return after - before

    def grams(
        self, vocabulary: Vocabulary, read: Callable[[int, int], Float[Tensor, "token d_model"]] | None = None
    ) -> Block0Grams:
        """Compute the block0 embeddings' Gram matrices, in one pass over the tokens.

        `read` gives E of tokens start .. stop - 1, if a caller has them. If both embeddings are one matrix in the
        checkpoint, its rows are read once.
        """
        W_E, W_U_rows = vocabulary.W_E, vocabulary.W_U_rows
        if isinstance(W_E, StoredRows) and isinstance(W_U_rows, StoredRows) and W_E.read is W_U_rows.read:
            once = _last_kept(W_E.read)
            W_E, W_U_rows = dataclasses.replace(W_E, read=once), dataclasses.replace(W_U_rows, read=once)
        read = read or (lambda start, stop: self.rows(W_E[start:stop]))
        E = StoredRows(read, (vocabulary.size, vocabulary.d_model), device=W_E.device)
        sides: list[Rows] = [E, W_E]
        if W_U_rows is None:
            second, plain = map(kept, centred_grams(sides, [(0, 0), (1, 0)]))
            return Block0Grams(second, None, plain)
        second, plain, cross = map(kept, centred_grams([*sides, W_U_rows], [(0, 0), (1, 0), (2, 0)]))
        return Block0Grams(second, cross, plain)


def _last_kept(read: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """Return the same reader, which does not read again the rows that it has just read."""
    kept: dict[tuple[int, int], Tensor] = {}

    def again(start: int, stop: int) -> Tensor:
        if (start, stop) not in kept:
            kept.clear()
            kept[start, stop] = read(start, stop)
        return kept[start, stop]

    return again


@dataclass(frozen=True)
class StreamBefore:
    """The kind of rows that one layer reads under the `stream` embedding: words as they are before this layer."""

    layer: int


RowKind = Literal["token", "block0", "mlp0", "write"] | StreamBefore
"""A kind of rows: effective embeddings on the read side, what block 0's MLP writes (`mlp0`), or `write`."""
WRITE: Final = "write"
"""The kind of rows for words on the write side: W_U's columns."""
MLP0: Final = "mlp0"
"""The kind of rows for words as block 0's MLP writes them."""
SCREEN = 4096
"""Tokens whose unembedding is kept in memory, if the rest stays on disk, to rank a word's logit among them first."""


@dataclass(frozen=True)
class Streams:
    """Words as the running model has them before each layer: the rows of the `stream` effective embedding.

    Attributes:
        ids: the words' tokens, rising.
        rows: their residual stream.
    """

    ids: Int[Tensor, " word"]
    rows: Float[Tensor, "layer word d_model"]

    def of(self, ids: Int[Tensor, " asked"], layer: int) -> Float[Tensor, "asked d_model"]:
        """Return the rows of these tokens.

        Raises:
            ValueError: one of them was not run.
        """
        place = torch.searchsorted(self.ids, ids.cpu()).clamp_max(len(self.ids) - 1)
        if not torch.equal(self.ids[place], ids.cpu()):
            raise ValueError("a stream is asked for of a token that was not run")
        return self.rows[layer][place]


class EffectiveRows:
    """Effective embeddings, row by row, normalised as a layer's norm would; rows for kept ids are computed once."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        block0: Block0 | None,
        architecture: Architecture,
        streams: Streams | None = None,
    ) -> None:
        """Take the folded vocabulary; `block0` is None if it is not available, `streams` unless the model was run."""
        self.vocabulary, self.block0, self.architecture, self.streams = vocabulary, block0, architecture, streams
        self._ids: Tensor | None = None
        self._rows: dict[RowKind, Tensor] = {}

    @contextmanager
    def only(self, ids: Int[Tensor, "*word"]) -> Iterator[None]:
        """Answer for these tokens alone, each row computed once, until the context is left."""
        before, self._ids, self._rows = (self._ids, self._rows), ids.unique().cpu(), {}
        try:
            yield
        finally:
            self._ids, self._rows = before

    def __call__(self, ids: Int[Tensor, "*word"], kind: RowKind) -> Float[Tensor, "*word d_model"]:
        """Return the rows for these tokens; for kind `write` they are W_U's columns, and not normalised.

        Raises:
            ValueError: a token is asked for that `only` leaves out or that was not run, `write` without an unembedding,
                or a stream if the model was not run.
        """
        if self._ids is None:
            if ids.dim() == 1:
                return self._compute(ids, kind)
            few, place = ids.unique(return_inverse=True)  # many draws of a few words
            return self._compute(few, kind)[place]
        place = torch.searchsorted(self._ids, ids.cpu()).clamp_max(len(self._ids) - 1)
        if not torch.equal(self._ids[place], ids.cpu()):
            raise ValueError(
                "rows are restricted by `only`; `ids` must be among the ids given to it, and one is not among those"
            )
        if kind not in self._rows:
            self._rows[kind] = self._compute(self._ids, kind)
        return self._rows[kind][place.to(self._rows[kind].device)]

    def _compute(self, ids: Int[Tensor, " word"], kind: RowKind) -> Float[Tensor, "word d_model"]:
        if kind == WRITE:
            if self.unembedding is None:
                raise ValueError("rows of kind 'write' need an unembedding, which the checkpoint does not hold")
            return self.unembedding[ids.to(self.unembedding.device)]
        if len(ids) > BLOCK:  # block 0's hidden activations are several times as wide as a row
            return torch.cat([self._compute(some, kind) for some in ids.split(BLOCK)])
        device = self.vocabulary.W_E.device
        if isinstance(kind, StreamBefore):
            if self.streams is None:
                raise ValueError(f"rows before layer {kind.layer} need streams, and the model was not run")
            return self.normalised(self.streams.of(ids, kind.layer).to(device))
        rows = self.vocabulary.W_E[ids.to(device)]
        if kind == "block0" and self.block0 is not None:
            rows = self.block0.rows(rows)
        if kind == MLP0 and self.block0 is not None:
            rows = self.block0.mlp_output(rows)
        return self.normalised(rows)

    @property
    def unembedding(self) -> Rows | None:
        """W_U^T (`Vocabulary.unembedding`)."""
        return self.vocabulary.unembedding

    @cached_property
    def first_unembedded(self) -> Float[Tensor, "token d_model"]:
        """The first SCREEN rows of W_U^T, in memory."""
        if self.unembedding is None:
            raise ValueError("rows of kind 'write' need an unembedding, which the checkpoint does not hold")
        return self.unembedding[:SCREEN]

    def normalised(self, rows: Float[Tensor, "*word d_model"]) -> Float[Tensor, "*word d_model"]:
        """Normalise rows as a layer's norm would."""
        return self.architecture.normalised(rows)
