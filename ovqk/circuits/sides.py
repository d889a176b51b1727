"""The whole vocabulary as one side of a circuit sees it, in blocks of tokens.

Blocks come in the precision of the weights, to be screened; single tokens in float64, to be reported.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.grams import BLOCK, SHIFT_TOKENS, blocks, gram_blocks
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.weights.stored_rows import Rows
from ovqk.weights.types import Architecture

KEEP_UP_TO = 2**28  # bytes of block0 embeddings that are kept in memory, so that they are computed once
RECOMPUTED_WITHIN = 1e-4  # relative to the longest row: above the float32 rounding of a block0 embedding

Read = Callable[[int, int], Float[Tensor, "token d_model"]]
"""Gives the rows of tokens start .. stop - 1."""


@runtime_checkable
class Side(Protocol):
    """All tokens' rows on one side of a circuit."""

    @property
    def rounding(self) -> float:
        """How far a row by `blocks` may lie from the same row by `exact`, relative to the longest row."""
        ...

    def __len__(self) -> int:
        """Count the tokens."""
        ...

    def blocks(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "token d_model"]]]:
        """Go through all rows in order, at most `size` at a time."""
        ...

    def exact(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """Return these tokens' rows, float64."""
        ...

    def moments(self, listed: Bool[Tensor, " token"]) -> tuple[Float[Tensor, " d_model"], float]:
        """Return the listed rows' mean, float64, and their largest norm."""
        ...


class StoredSide:
    """Rows as they are, for the columns of W_U."""

    def __init__(self, rows: Rows) -> None:
        """Take the rows."""
        self.rows = rows

    @property
    def rounding(self) -> float:
        """See `Side`."""
        return 0.0

    def __len__(self) -> int:
        return self.rows.shape[0]

    def blocks(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "token d_model"]]]:
        """See `Side`."""
        for part in blocks(len(self), size):
            yield part, self.rows[part]

    def exact(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """See `Side`."""
        return self.rows[ids].double()

    def moments(self, listed: Bool[Tensor, " token"]) -> tuple[Float[Tensor, " d_model"], float]:
        """See `Side`."""
        moments = ListedRows(self.rows.shape[1], listed)
        for part, rows in self.blocks(BLOCK):
            moments.add(part, rows)
        return moments.mean, moments.longest


class NormalisedSide(StoredSide):
    """Plain embeddings as layer 0's norm leaves them, but for its gain."""

    def __init__(self, W_E: Rows, architecture: Architecture) -> None:
        """Take the folded embedding."""
        super().__init__(W_E)
        self.architecture = architecture

    def blocks(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "token d_model"]]]:
        """See `Side`."""
        for part, rows in super().blocks(size):
            yield part, self.normalised(rows)

    def exact(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """See `Side`."""
        return self.normalised(super().exact(ids))

    def normalised(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Return rows as the layers' norm leaves them."""
        return self.architecture.normalised(rows)


class Block0Side(NormalisedSide):
    """Block0 embeddings as a later layer's norm leaves them, but for its gain.

    They are computed once if they fit in KEEP_UP_TO bytes, else in each pass. The first pass leaves the moments.

    Attributes:
        passed: how many tokens, counted from id 0, were read so far.
    """

    def __init__(self, vocabulary: Vocabulary, block0: Block0, listed: Bool[Tensor, " token"]) -> None:
        """Compute nothing yet."""
        super().__init__(vocabulary.W_E, block0.architecture)
        self.block0, self._listed = block0, listed
        self._moments, self.passed = ListedRows(vocabulary.d_model, listed), 0
        self._kept: Tensor | None = None

    @property
    def rounding(self) -> float:
        """See `Side`; `exact` computes rows again that are not kept."""
        return 0.0 if self._is_kept else RECOMPUTED_WITHIN

    @property
    def _is_kept(self) -> bool:
        return self._kept is not None and self.passed == len(self)

    def read(self, start: int, stop: int) -> Float[Tensor, "token d_model"]:
        """Return the embeddings for tokens start .. stop - 1, not normalised."""
        if self._kept is not None and stop <= self.passed:
            return self._kept[start:stop]
        rows = self.block0.rows(self.rows[start:stop])
        if start <= self.passed < stop:
            if self.passed == 0 and len(self) * rows.shape[1] * rows.element_size() <= KEEP_UP_TO:
                self._kept = rows.new_empty(len(self), rows.shape[1])
            new = rows[self.passed - start :]
            if self._kept is not None:
                self._kept[self.passed : stop] = new
            self._moments.add(slice(self.passed, stop), self.normalised(new))
            self.passed = stop
        return rows

    def forget(self) -> None:
        """Give the memory of kept rows back; they are computed again if they are asked for."""
        self._kept = None

    def blocks(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "token d_model"]]]:
        """See `Side`."""
        for part in blocks(len(self), size):
            yield part, self.normalised(self.read(part.start, part.stop))

    def exact(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """See `Side`."""
        if self._kept is not None and self._is_kept:
            return self.normalised(self._kept[ids]).double()
        return self.normalised(self.block0.rows(self.rows[ids].double()))

    def moments(self, listed: Bool[Tensor, " token"]) -> tuple[Float[Tensor, " d_model"], float]:
        """See `Side`; the listed tokens are those it was made for."""
        if not torch.equal(listed, self._listed):
            raise ValueError(
                "moments are kept only for the tokens that this side was made with; `listed` must be those"
            )
        for part in blocks(len(self), BLOCK):
            if self.passed < part.stop:
                self.read(max(part.start, self.passed), part.stop)
        return self._moments.mean, self._moments.longest


class WrittenRows:
    """What block 0's MLP writes for each token, as a later layer's norm leaves it; plain rows if it writes nothing.

    Tokens are read as rows are: `rows[start:stop]`, `rows[ids]`. Rows are kept if they fit in KEEP_UP_TO bytes. If a
    caller needs block0 embeddings of all tokens as well, `read` hands them out and keeps these rows beside them, so
    that the MLP runs once for both.

    Attributes:
        passed: how many tokens' rows are kept, counted from id 0.
    """

    def __init__(self, vocabulary: Vocabulary, block0: Block0, embeddings: Read | None = None) -> None:
        """Compute nothing yet; `embeddings` gives block0 embeddings, if a caller has them."""
        self.W_E, self.block0, self.passed = vocabulary.W_E, block0, 0
        self.shape, self.device = (vocabulary.size, vocabulary.d_model), vocabulary.W_E.device
        self._embeddings, self._kept = embeddings, torch.empty(0)
        bytes_each = self.W_E[:1].element_size()
        self._keeps = block0.mlp_writes and math.prod(self.shape) * bytes_each <= KEEP_UP_TO

    def read(self, start: int, stop: int) -> Float[Tensor, "token d_model"]:
        """Return the block0 embeddings of tokens start .. stop - 1, not normalised, and keep what the MLP wrote."""
        W_E = self.W_E[start:stop]
        if self._embeddings is None:
            before, after = self.block0.parts(W_E)
        else:
            before, after = self.block0.stream(W_E), self._embeddings(start, stop)
        if self._keeps and start <= self.passed < stop:
            new = slice(self.passed - start, None)
            self._kept = self._kept if self.passed else after.new_empty(self.shape)
            self._kept[self.passed : stop] = self.block0.architecture.normalised(after[new] - before[new])
            self.passed = stop
        return after

    def __getitem__(self, index: slice | Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """Return these tokens' rows: a slice with step 1, or ids in any order, whose rows are computed anew."""
        if not self._keeps or not isinstance(index, slice):
            return self.block0.architecture.normalised(self.block0.mlp_output(self.W_E[index]))
        _, stop, _ = index.indices(self.shape[0])
        if self.passed == 0:
            self.read(0, min(self.shape[0], SHIFT_TOKENS))
        for some in gram_blocks(*self.shape):  # as Grams read them: rounding depends on the blocks
            if some.stop > self.passed and some.start < stop:
                self.read(some.start, some.stop)
        return self._kept[index]


class ListedRows:
    """The listed rows' mean and largest norm, summed up block by block."""

    def __init__(self, d_model: int, listed: Bool[Tensor, " token"]) -> None:
        """Start without rows."""
        self.listed, self.longest = listed, 0.0
        self._sum = torch.zeros(d_model, dtype=torch.float64, device=listed.device)
        self._near: Tensor | None = None  # a row near the mean is subtracted before summing, so that float32 suffices

    def add(self, part: slice, rows: Float[Tensor, "token d_model"]) -> None:
        """Take these tokens' rows."""
        there = self.listed[part].to(rows)
        if self._near is None:
            self._near = rows.mean(0)
        self.longest = max(self.longest, float((torch.linalg.vector_norm(rows, dim=1) * there).max()))
        self._sum += there @ (rows - self._near)

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean of all listed rows."""
        mean = self._sum / int(self.listed.sum())
        return mean if self._near is None else mean + self._near.double()
