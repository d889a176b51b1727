"""The diagonal of full circuits: how a token's own entry ranks among all entries of one side (definitions: section 2).

A full circuit's matrix over tokens is rows @ columns^T, where both factors are as wide as a head. It is formed a block
of columns at a time, and ranked within columns. To rank within the rows of a circuit, as its metrics do, give its two
sides the other way round. Adding a constant to a column changes nothing here.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovqk.circuits.grams import blocks

AT_ONCE = 2**24
"""Entries that are compared together."""


class Ranks(NamedTuple):
    """The place of each column's own entry among all its entries, from both ends; 1 is the end itself.

    Ties count against it: if all entries in a column are equal, both numbers are the column's length.

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
    """Return the share of columns whose own entry is among the first `count` from an end, in [0, 1]."""
    return (places <= count).double().mean(-1)


# --- over large vocabularies -----------------------------------------------------------------------------------

COLUMNS = 1024
"""Tokens whose own entries are ranked, at most: the share then has a standard error below .016."""
FEWEST_AT_ONCE, MOST_AT_ONCE = 256, 4096
"""How many tokens they are compared with at a time: few at first, because most columns are closed after few."""


def growing_blocks(n_tokens: int) -> Iterator[slice]:
    """Yield slices that cover range(n_tokens), each twice as long as the one before, up to MOST_AT_ONCE."""
    start, length = 0, FEWEST_AT_ONCE
    while start < n_tokens:
        yield slice(start, min(start + length, n_tokens))
        start, length = start + length, min(2 * length, MOST_AT_ONCE)


def ranked_tokens(n_tokens: int) -> Int[Tensor, " column"]:
    """Return the tokens whose own entries are ranked: all, or COLUMNS tokens with evenly spaced ids."""
    count = min(n_tokens, COLUMNS)
    return torch.arange(count) * n_tokens // count


class PlaceSearch:
    """A search for columns whose own entry is among the first `count` from an end.

    Tokens pass in blocks (`compare`). A column is closed at an end once `count` tokens come before its own entry, which
    for most columns happens after few tokens; ties come before it.
    """

    def __init__(
        self,
        columns: Float[Tensor, "head column d_head"],
        own_rows: Float[Tensor, "head column d_head"],
        own: Int[Tensor, " column"],
        count: int,
        signs: tuple[int, ...] = (1, -1),
    ) -> None:
        """Take each column's side of the circuit, its own token's row on the other side, and that token.

        Args:
            columns: the side that is ranked by column.
            own_rows: the rows of these columns' own tokens.
            own: the columns' tokens.
            count: how many places from the end are looked at.
            signs: 1 for the largest entries, -1 for the smallest.
        """
        self.columns, self.own, self.count, self.signs = columns, own.to(columns.device), count, signs
        self._mine = (columns * own_rows).sum(-1)
        self._before = {sign: torch.zeros_like(self._mine, dtype=torch.long) for sign in signs}

    @property
    def open_heads(self) -> list[int]:
        """The heads with a column that is not closed at each end."""
        found: list[int] = torch.stack([self._open(sign).any(1) for sign in self.signs]).any(0).nonzero()[:, 0].tolist()
        return found

    def compare(self, start: int, rows: Mapping[int, Float[Tensor, "token d_head"]]) -> None:
        """Count, from id `start` on, the tokens that come before the own entries of open columns.

        Args:
            start: the first token.
            rows: open head -> its rows for the tokens from `start` on.
        """
        for sign in self.signs:
            is_open = self._open(sign)
            for head in is_open.any(1).nonzero()[:, 0].tolist():
                some, stop = is_open[head].nonzero()[:, 0], start + len(rows[head])
                entries = sign * (self.columns[head, some] @ rows[head].T)
                before = entries >= sign * self._mine[head, some, None]
                here = (self.own[some] >= start) & (self.own[some] < stop)
                before[here.nonzero()[:, 0], self.own[some][here] - start] = False
                self._before[sign][head, some] += before.sum(1)

    def share(self, sign: int) -> Float[Tensor, " head"]:
        """Return the share of columns whose own entry is there, once all tokens have passed."""
        return self._open(sign).double().mean(-1)

    def _open(self, sign: int) -> Bool[Tensor, "head column"]:
        return self._before[sign] < self.count
