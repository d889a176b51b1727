"""The embeddings of a model's real tokens, with the Gram matrices that serve every head.

A softmax cannot see a constant added to every token, so every Gram is centred over tokens: C = I - 11^T/V.
Token ids beyond the tokenizer's vocabulary (padding rows) are left out of C, the Grams and V.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits.grams import (
    FullCircuit,
    Gram,
    Root,
    RootedGram,
    blocks,
    centred_grams,
    dense,
    kept,
    mean_row,
    rooted,
)
from ovqk.config.schema import Circuit
from ovqk.errors import UserError
from ovqk.weights.stored_rows import Rows, StoredRows
from ovqk.weights.types import EmbeddingWeights

KEPT_UP_TO = 2**26
"""The most elements that an unembedding may have for a task's readouts to keep it in memory (256 MB)."""


@dataclass(frozen=True)
class Vocabulary:
    """The real tokens' embeddings, and the Grams that serve every head, each computed when first asked for.

    Attributes:
        W_E: embedding rows.
        W_U_rows: W_U's columns, as rows; None if the checkpoint holds none, or if it has one for some tokens alone:
            full circuits need one for each.
        some_W_U_rows: the columns, as rows, of the first tokens, if the others have none.
    """

    W_E: Rows
    W_U_rows: Rows | None
    some_W_U_rows: Float[Tensor, "some_token d_model"] | StoredRows | None = None

    @property
    def size(self) -> int:
        """V: how many real tokens there are."""
        return self.W_E.shape[0]

    @property
    def d_model(self) -> int:
        """How many components a row has."""
        return self.W_E.shape[1]

    @property
    def written(self) -> Rows | None:
        """W_U's columns, as rows, for as many tokens as there are."""
        return self.some_W_U_rows if self.W_U_rows is None else self.W_U_rows

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """W_E's mean row, float64."""
        return mean_row(self.W_E)

    @cached_property
    def unembedding(self) -> Rows | None:
        """W_U^T, for many passes: in memory if it has at most KEPT_UP_TO elements, else as the checkpoint has it."""
        rows = self.W_U_rows
        if not isinstance(rows, StoredRows) or math.prod(rows.shape) > KEPT_UP_TO:
            return rows
        in_memory = torch.empty(rows.shape, device=rows.device)
        for some in blocks(rows.shape[0]):
            in_memory[some] = rows[some]
        return in_memory

    @cached_property
    def gram_embed(self) -> Gram:
        """G_QK = W_E^T C W_E."""
        if self.stored_once is None:
            return rooted(centred_grams([self.W_E], [(0, 0)])[0])
        W_E, _, gram = self.stored_once
        if self._roots is not None:
            return RootedGram(self._roots[0], self._roots[0])
        return W_E.fold(W_E.fold(dense(gram)).T)

    @property
    def gram_cross(self) -> Gram | None:
        """G_OV = W_U C W_E."""
        return self._written[0]

    @property
    def gram_unembed(self) -> Gram | None:
        """W_U C W_U^T."""
        return self._written[1]

    def full_circuit(self, circuit: Circuit) -> FullCircuit | None:
        """Return the Grams for full circuits that read plain embeddings; None for OV without an unembedding."""
        return FullCircuit.of(circuit, lambda: self.gram_embed, lambda: self._written)

    @cached_property
    def _written(self) -> tuple[Gram | None, Gram | None]:
        """W_U C W_E and W_U C W_U^T, in one pass."""
        if self.W_U_rows is None:
            return None, None
        if self.stored_once is None:
            cross, unembed = centred_grams([self.W_U_rows, self.W_E], [(0, 1), (0, 0)])
            return kept(cross), rooted(unembed)
        if self._roots is not None:
            read, written = self._roots
            return RootedGram(written, read), RootedGram(written, written)
        W_E, W_U_rows, gram = self.stored_once
        once = W_U_rows.fold(dense(gram)).T
        return W_E.fold(once), W_U_rows.fold(once)

    @cached_property
    def _roots(self) -> tuple[Root, Root] | None:
        """The roots for W_E and for W_U, if both embeddings are one matrix whose Gram has one."""
        if self.stored_once is None:
            return None
        W_E, W_U_rows, gram = self.stored_once
        if not isinstance(gram, RootedGram):
            return None
        return dataclasses.replace(gram.a, folded=W_E), dataclasses.replace(gram.a, folded=W_U_rows)

    @cached_property
    def stored_once(self) -> tuple[StoredRows, StoredRows, Gram] | None:
        """Both embeddings, and the Gram of the one matrix behind them, if a tied checkpoint keeps it on disk.

        Gain and centring are linear in a row, so that this Gram, or its root, gives all three.
        """
        W_E, W_U_rows = self.W_E, self.W_U_rows
        if not isinstance(W_E, StoredRows) or not isinstance(W_U_rows, StoredRows) or W_E.read is not W_U_rows.read:
            return None
        bare = dataclasses.replace(W_E, gain=None, centred=False)
        return W_E, W_U_rows, rooted(centred_grams([bare], [(0, 0)])[0])


def read_vocabulary(embeddings: EmbeddingWeights, n_tokens: int | None, label: str = "the checkpoint") -> Vocabulary:
    """Take a model's embeddings over its first `n_tokens` ids (all if None).

    Raises:
        ValueError: there is no W_E.
        UserError: a row of one of these tokens holds NaN or infinity. Rows left in the checkpoint are checked when they
            are read; rows that belong to no token never are.
    """
    if embeddings.W_E is None:
        raise ValueError("a vocabulary needs W_E")

    W_U_rows = embeddings.W_U.T if isinstance(embeddings.W_U, Tensor) else embeddings.W_U
    W_E, W_U_rows = (
        rows.first(n_tokens) if isinstance(rows, StoredRows) else rows if rows is None else rows[:n_tokens]
        for rows in (embeddings.W_E, W_U_rows)
    )
    assert W_E is not None
    for name, rows in (("embedding", W_E), ("unembedding", W_U_rows)):
        if isinstance(rows, Tensor) and rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
            raise UserError(
                f"{label}: the {name} holds NaN or infinity in the row of a token; allowed: finite weights. Did its "
                "training or its conversion to 16 bits fail?"
            )
    if W_U_rows is not None and W_U_rows.shape[0] < W_E.shape[0]:  # an "=" that is read and never predicted
        return Vocabulary(W_E, None, W_U_rows)
    return Vocabulary(W_E, W_U_rows)
