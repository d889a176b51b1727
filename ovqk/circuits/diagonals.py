"""The diagonal of full circuits: how a token's own entry ranks in its column (definitions: section 2).

A full circuit's matrix over tokens is rows @ columns^T of head size, and is formed a block of columns at a time. Ranks
in a row are those in a column of the transposed matrix. Nothing here sees a constant added to a column.
"""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.grams import blocks

AT_ONCE = 2**24
"""Entries that are compared together."""


class Ranks(NamedTuple):
    """The place of each column's own entry among all entries of the column, from both ends; 1 is the end itself.

    Ties count against it: in a column of equal entries both are the number of entries.

    Attributes:
        from_largest: entries that are at least as large.
        from_smallest: entries that are at most as large.
    """

    from_largest: Int[Tensor, "head column"]
    from_smallest: Int[Tensor, "head column"]


def own_ranks(
    rows: Float[Tensor, "head token d_head"],
    columns: Float[Tensor, "head column d_head"],
    own: Int[Tensor, " column"],
) -> Ranks:
    """Rank each column's own entry, that of row own[i], among all rows.

    Args:
        rows: one side of the circuit, for every token.
        columns: the other side, for the tokens whose columns are looked at.
        own: the token of each column, its place among the rows.
    """
    shape = columns.shape[:2]
    found = Ranks(*(torch.zeros(shape, dtype=torch.long, device=rows.device) for _ in range(2)))
    for head in range(len(rows)):
        for some in blocks(shape[1], max(1, AT_ONCE // rows.shape[1])):
            entries = columns[head, some] @ rows[head].T  # [column, token]
            mine = entries.gather(1, own[some, None])
            found.from_largest[head, some] = (entries >= mine).sum(1)
            found.from_smallest[head, some] = (entries <= mine).sum(1)
    return found


def share_up_to(places: Int[Tensor, "head column"], count: int) -> Float[Tensor, " head"]:
    """Return the share of columns whose own entry is at one of the first `count` places from an end, in [0, 1]."""
    return (places <= count).double().mean(-1)


def first_mlp_output(block0: Block0, W_E: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """Return what block 0's MLP writes for rows of the folded embedding, each token attending to itself alone.

    It is the effective embedding of McDougall et al. 2023 (arXiv:2310.04625), which leaves the residual stream out.

    Raises:
        ValueError: the model has no MLP.
    """
    if block0.mlp is None:
        raise ValueError("the model has no MLP")
    before = copy.copy(block0)
    before.mlp = None
    return block0.rows(W_E) - before.rows(W_E)
