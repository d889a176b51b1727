"""Embedding rows that stay in the checkpoint and are read when they are asked for."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StoredRows:
    """One row per token, left in the checkpoint and read when asked for: `rows[ids]`, `rows[start:stop]`.

    Attributes:
        read: gives rows start .. stop - 1 as they are stored, float32.
        shape: (tokens, d_model).
        gain: a factor for each component; None for 1.
        centred: whether each row is taken less its own mean.
    """

    read: Callable[[int, int], Float[Tensor, "token d_model"]]
    shape: tuple[int, int]
    gain: Float[Tensor, " d_model"] | None = None
    centred: bool = False
    device: torch.device = CPU

    GAP_TOKENS = 256  # gap between two requested tokens up to which they are read in one piece
    PIECE_TOKENS = 4096  # tokens read in one piece, at most

    def __getitem__(self, index: slice | Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """Return these tokens' rows: a slice with step 1, or ids in any order."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return self.fold(self.read(start, stop).to(self.device))
        ids, place = index.cpu().unique(return_inverse=True)
        ends = ((ids.diff() > self.GAP_TOKENS) | (ids // self.PIECE_TOKENS).diff().bool()).nonzero()[:, 0] + 1
        pieces = [
            self.read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in ids.tensor_split(ends) if run.numel()
        ]
        found = torch.cat(pieces) if pieces else torch.empty(0, self.shape[1])
        return self.fold(found.to(self.device))[place.to(self.device)]

    def folded(self, gain: Float[Tensor, " d_model"] | None, centred: bool) -> "StoredRows":
        """Return the same rows times a gain, then less their mean.

        Raises:
            ValueError: they are centred already, and a gain after that is not one before it.
        """
        if gain is not None and self.centred:
            raise ValueError("these rows are centred already; a gain must be applied before centring")
        if gain is not None and self.gain is not None:
            gain = self.gain * gain
        return dataclasses.replace(self, gain=self.gain if gain is None else gain, centred=self.centred or centred)

    def first(self, n_tokens: int | None) -> "StoredRows":
        """Keep the first tokens' rows alone; all if None, or if there are fewer."""
        n = self.shape[0] if n_tokens is None else min(n_tokens, self.shape[0])
        return dataclasses.replace(self, shape=(n, self.shape[1]))

    def to(self, device: torch.device) -> "StoredRows":
        """Return the same rows, handed out on a device."""
        return dataclasses.replace(self, device=device, gain=None if self.gain is None else self.gain.to(device))

    def fold(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Apply gain and centring, a linear map, to any rows with d_model components."""
        rows = rows if self.gain is None else rows * self.gain.to(rows)
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def fold_transposed(self, columns: Float[Tensor, "column d_model"]) -> Float[Tensor, "column d_model"]:
        """Apply the transpose of `fold`: row . fold_transposed(x) = fold(row) . x for columns x, given as rows."""
        columns = columns - columns.mean(-1, keepdim=True) if self.centred else columns
        return columns if self.gain is None else columns * self.gain.to(columns)


Rows = Float[Tensor, "token d_model"] | StoredRows
"""One row for each token, in memory or in the checkpoint."""


def times(rows: Rows | None, factor: float) -> Rows | None:
    """Multiply an embedding by a number; None stays None."""
    if rows is None or factor == 1:
        return rows
    return (
        rows.folded(torch.full((rows.shape[1],), factor), centred=False)
        if isinstance(rows, StoredRows)
        else rows * factor
    )
