"""The diagonal of full circuits: how a token's own entry ranks among all entries of one side (definitions: section 2).

A full circuit's matrix over tokens is rows @ columns^T, where both factors are as wide as a head. It is formed a block
of columns at a time, and ranked within columns. To rank within the rows of a circuit, as its metrics do, give its two
sides the other way round. Adding a constant to a column changes nothing here.

`own_ranks` ranks each column among all tokens. For large vocabularies there is a search that asks only if the own entry
is among the first few: `PlaceSearch` compares the ranked tokens with one another, which closes most columns, and
`OpenColumns` lets all other tokens pass once, for the open columns of many heads and layers together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
PARTS = 4
"""The ranked tokens are compared with one another in this many parts: the first closes most columns."""
FEWEST_AT_ONCE, MOST_AT_ONCE, ENTRIES_AT_ONCE = 256, 4096, 2**22
"""How many tokens pass at a time, at least and at most, and how many numbers their product may have."""
CLOSED_BEFORE_NARROWING = 1 / 8
"""The share of columns that must have closed before the others are gathered again."""


def ranked_tokens(n_tokens: int) -> Int[Tensor, " column"]:
    """Return the tokens whose own entries are ranked: all, or COLUMNS tokens with evenly spaced ids."""
    count = min(n_tokens, COLUMNS)
    return torch.arange(count) * n_tokens // count


class PlaceSearch:
    """A search for columns whose own entry is among the first `count` from an end.

    A column is closed at an end once `count` tokens come before its own entry; ties come before it. Here the ranked
    tokens are compared with one another. The columns that stay open wait until all other tokens pass (`OpenColumns`).
    Entries that agree within the rounding of a product fall on either side.

    Attributes:
        thresholds: the own entries, with their signs changed for the smallest.
        before: tokens that were found to come before the own entry, for each end; where a column is closed, at least
            `count`.
    """

    before: Int[Tensor, "end head column"]

    def __init__(
        self,
        columns: Float[Tensor, "head column d_head"],
        own_rows: Float[Tensor, "head column d_head"],
        count: int,
        signs: tuple[int, ...] = (1, -1),
    ) -> None:
        """Take each ranked token's column and its row on the other side, and compare them with one another.

        Args:
            columns: the side that is ranked by column.
            own_rows: the other side, for the same tokens in the same order.
            count: how many places from the end are looked at.
            signs: the ends: 1 for the largest entries, -1 for the smallest.

        Raises:
            ValueError: an own entry is NaN or infinite.
        """
        self.count, self.signs = count, signs
        mine = (columns * own_rows).sum(-1)
        if not bool(mine.isfinite().all()):
            raise ValueError("each token's own entry must be a finite number")
        self.thresholds = torch.stack([sign * mine for sign in signs])
        self.before = torch.zeros(self.thresholds.shape, dtype=torch.int32, device=columns.device)
        for head in range(len(columns)):
            for part in range(PARTS):
                self._compare(head, part, columns[head], own_rows[head, part::PARTS])

    def _compare(
        self, head: int, part: int, columns: Float[Tensor, "column d_head"], rows: Float[Tensor, "token d_head"]
    ) -> None:
        """Count the tokens that come before, among those in places part, part + PARTS, ..."""
        some = self.open[:, head].any(0).nonzero()[:, 0]
        entries = columns[some] @ rows.T
        here = (some % PARTS == part).nonzero()[:, 0]
        entries[here, some[here] // PARTS] = torch.nan  # which is neither more nor less: a token's own entry
        for end, sign in enumerate(self.signs):
            least = sign * self.thresholds[end, head, some, None]
            self.before[end, head, some] += true_in_rows(torch.ge if sign == 1 else torch.le, entries, least)

    @property
    def open(self) -> Bool[Tensor, "end head column"]:
        """The columns that are not closed at an end."""
        return self.before < self.count

    def share(self, sign: int) -> Float[Tensor, " head"]:
        """Return the share of columns whose own entry is there, once all tokens have passed; in [0, 1]."""
        return self.open[self.signs.index(sign)].double().mean(-1)


@dataclass(frozen=True)
class Reader:
    """How one head, or all heads of a layer that share a norm, read a token's row.

    Attributes:
        matrix: maps a row to the head's side of the circuit.
        bias: is added after it; None for 0.
        inverse_scale: gives what each row [token, width] is then multiplied by; None if nothing is normalised.
    """

    matrix: Float[Tensor, "width d_model"]
    bias: Float[Tensor, " width"] | None = None
    inverse_scale: Callable[[Float[Tensor, "token width"]], Float[Tensor, "token one"]] | None = None

    def applied(self, product: Float[Tensor, "width token"]) -> Float[Tensor, "width token"]:
        """Complete what the matrix made of rows."""
        x = product if self.bias is None else product + self.bias.to(product)[:, None]
        return x if self.inverse_scale is None else x * self.inverse_scale(x.T).T


@dataclass(frozen=True)
class _Set:
    """Open columns that share a reader; without one, each column is a vector that meets token rows themselves.

    A few columns are cheaper as such vectors, and many are cheaper through the head's matrix.
    """

    vectors: Float[Tensor, "open width"]
    number: Int[Tensor, " open"]
    reader: Reader | None

    @property
    def matrix(self) -> Float[Tensor, "width d_model"]:
        """What token rows are multiplied with."""
        return self.vectors if self.reader is None else self.reader.matrix

    def only(self, kept: Bool[Tensor, " open"]) -> "_Set":
        """Keep some of the columns, as vectors if that is cheaper."""
        found = replace(self, vectors=self.vectors[kept], number=self.number[kept])
        reader = self.reader
        if reader is None or reader.inverse_scale is not None or reader.bias is not None:
            return found
        width, d_model = reader.matrix.shape
        if len(found.number) * d_model > width * (d_model + len(found.number)):
            return found
        return replace(found, vectors=found.vectors @ reader.matrix, reader=None)


class OpenColumns:
    """Columns of many heads that are open after their searches, and wait for all tokens' rows on the other side."""

    def __init__(self) -> None:
        """Start without columns."""
        self._forget()

    def _forget(self) -> None:
        self._sets = list[_Set]()
        self._searches = list[tuple[PlaceSearch, Tensor]]()  # the columns' places among all of a search
        self._thresholds = list[Tensor]()
        self._count = 0

    @property
    def size(self) -> int:
        """How many numbers wait."""
        return sum(x.vectors.numel() + (0 if x.reader is None else x.reader.matrix.numel()) for x in self._sets)

    def add(
        self,
        search: PlaceSearch,
        heads: Sequence[int],
        columns: Float[Tensor, "head column width"],
        reader: Reader,
    ) -> None:
        """Take the columns that are open in some of a search's heads.

        Args:
            search: what was found so far; it is told what is found later.
            heads: those of its heads that read token rows through this reader.
            columns: these heads' columns, as they meet what is read.
            reader: how they read tokens.
        """
        end, head, column = search.open[:, list(heads)].nonzero().unbind(1)
        if not len(end):
            return
        signs = torch.tensor(search.signs, device=end.device).to(columns)
        whole = torch.tensor(heads, device=end.device)[head]
        number = self._count + torch.arange(len(end), device=end.device)
        self._count += len(end)
        _, n_heads, n_columns = search.before.shape
        self._searches.append((search, (end * n_heads + whole) * n_columns + column))
        self._thresholds.append(search.thresholds[end, whole, column])
        every = torch.ones_like(end, dtype=torch.bool)
        found = _Set(signs[end, None] * columns[head, column], number, reader).only(every)
        if found.reader is not None:  # else the whole layer would stay in memory
            found = replace(found, reader=replace(found.reader, matrix=found.reader.matrix.clone()))
        self._sets.append(found)

    def compare(
        self, rows: Callable[[slice], Float[Tensor, "token d_model"]], n_tokens: int, ranked: Int[Tensor, " column"]
    ) -> None:
        """Let all tokens pass, until every column is closed, tell the searches, and start again without columns.

        Tokens may pass in any order; columns close sooner if those that often come before others are the first.

        Args:
            rows: gives some tokens' rows on the side that is not ranked: a slice of the order in which they pass.
            n_tokens: how many tokens there are.
            ranked: the places in that order of the tokens that the searches compared with one another; they are left
                out here.
        """
        if not self._sets:
            return
        least = torch.cat(self._thresholds)
        before = torch.cat([search.before.flatten()[places] for search, places in self._searches])
        count = torch.cat([torch.full_like(places, search.count) for search, places in self._searches])
        ranked, start, matrix = ranked.to(least.device), 0, None
        sets, waiting = self._sets, len(least)
        while start < n_tokens and waiting:
            if matrix is None:
                sets = _gathered(sets)
                matrix = torch.cat([some.matrix for some in sets])
            stop = min(start + tokens_at_once(len(matrix)), n_tokens)
            x = rows(slice(start, stop))
            made, first = matrix.to(x) @ x.T, 0
            made[:, ranked[(ranked >= start) & (ranked < stop)] - start] = torch.nan  # neither more nor less
            for some in sets:
                part = made[first : first + len(some.matrix)]
                entries = part if some.reader is None else some.vectors.to(x) @ some.reader.applied(part)
                before[some.number] += true_in_rows(torch.ge, entries, least[some.number, None].to(x))
                first += len(some.matrix)
            is_open, start = before < count, stop
            now = sum(int(is_open[some.number].sum()) for some in sets)
            if now <= (1 - CLOSED_BEFORE_NARROWING) * waiting:
                sets = [some.only(is_open[some.number]) for some in sets if is_open[some.number].any()]
                matrix, waiting = None, now
        of_searches = before.split([len(places) for _, places in self._searches])
        for (search, places), found in zip(self._searches, of_searches, strict=True):
            search.before.view(-1)[places] = found
        self._forget()


def tokens_at_once(n_rows: int) -> int:
    """Return how many tokens pass together if each makes `n_rows` numbers: a multiple of FEWEST_AT_ONCE.

    Products whose rows are no multiple of 16 numbers long take up to half as long again.
    """
    return FEWEST_AT_ONCE * max(1, min(MOST_AT_ONCE, ENTRIES_AT_ONCE // n_rows) // FEWEST_AT_ONCE)


def _gathered(sets: Sequence[_Set]) -> list[_Set]:
    """Join the sets without a reader, whose columns all are vectors of token rows."""
    alone = [each for each in sets if each.reader is None]
    rest = [each for each in sets if each.reader is not None]
    if len(alone) < 2:
        return [*alone, *rest]
    vectors, number = (torch.cat([getattr(each, name) for each in alone]) for name in ("vectors", "number"))
    return [_Set(vectors, number, None), *rest]


def true_in_rows(
    compare: Callable[..., Tensor], entries: Float[Tensor, "column token"], limits: Float[Tensor, "column one"]
) -> Int[Tensor, " column"]:
    """Count in each row the entries that compare with its limit, in a fifth of the time that sums of bools take."""
    return compare(entries, limits, out=torch.empty_like(entries)).sum(1).int()
