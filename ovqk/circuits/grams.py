"""Gram matrices a^T C b between tokens' rows, centred over tokens, a block of tokens at a time.

C = I - 11^T/n subtracts the mean over the n tokens from each side. Products are summed in such a way that results stay
within the bounds given below, however many threads there are and however large the vocabulary is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits.threads import each
from ovqk.config.schema import Circuit
from ovqk.weights.stored_rows import Rows, StoredRows

BLOCK = 2048  # tokens handled at a time, fewer if rows are long
BLOCK_ELEMENTS = 2**22  # the most elements in a block of embedding rows
BLOCKS_PER_SUM = 8  # blocks whose products are summed before they are added in float64
SHIFT_TOKENS = 256  # tokens whose mean is subtracted from all rows before products are taken
STRIPE_COLUMNS = 128  # columns of a symmetric product taken at a time, at least
STRIPES_PER_THREAD = 2  # with fewer, threads would wait for the one with the longest stripe
FLOAT64_PRODUCTS_UP_TO = 10**10  # multiplications of one Gram; a larger Gram is multiplied in float32
FLOAT64_UP_TO = 512  # d_model up to which Grams and their products are float64
ROOT_STRIPE = 128  # rows of a triangular root that are multiplied at a time, at least

Matrix = Float[Tensor, "d_a d_b"]


@dataclass(frozen=True, eq=False)
class Root:
    """S F with (S F)^T S F = a Gram, for an upper triangular S. It takes half the products that the Gram takes.

    A basis Q goes through it once, as S F Q, and gives Q^T G Q; two bases that went through roots of the same S give
    R^T G Q. F is the fold of the rows that the Gram is about: gain and centring.

    Attributes:
        S: the Cholesky factor of the Gram of rows that are not folded, in the dtype that `precision` gives.
        folded: rows that are folded by F; None if F is the identity.
    """

    S: Float[Tensor, "d_model d_model"]
    folded: StoredRows | None = None

    def fold(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return x F for each row x."""
        return rows if self.folded is None else self.folded.fold(rows)

    def through(self, columns: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Return S F x for columns x, given and returned as rows. Only the stripes of S that are not 0 are read."""
        x = columns.flatten(0, -2)
        x = x if self.folded is None else self.folded.fold_transposed(x)
        found, width = torch.empty_like(x), len(self.S)
        for some in blocks(width, max(ROOT_STRIPE, -(-width // 4))):
            torch.mm(x[:, some.start :], self.S[some, some.start :].T, out=found[:, some])
        return found.view_as(columns)


@dataclass(frozen=True, eq=False)
class RootedGram:
    """A Gram a^T C b as the product of the roots for a and b, which share one S."""

    a: Root
    b: Root

    @cached_property
    def matrix(self) -> Matrix:
        """The Gram itself, in its root's dtype; made and kept only if it is asked for."""
        return self._made()

    def norm(self) -> float:
        """Return the Frobenius norm, which is kept and not the matrix."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        return float(torch.linalg.vector_norm(self._made(), dtype=torch.float64))

    def _made(self) -> Matrix:
        folded = self.a.fold((self.a.S.T @ self.a.S).T)
        return self.b.fold(folded.T)


Gram = Matrix | RootedGram
"""A Gram as it is, or through its root."""


def dense(gram: Gram) -> Matrix:
    """Return the Gram as a matrix."""
    return gram.matrix if isinstance(gram, RootedGram) else gram


def rooted(gram: Float[Tensor, "d_model d_model"]) -> Gram:
    """Return a symmetric float64 Gram through its root, if that is triangular, else as it is; see `precision`."""
    S = triangular_root(gram)
    if S is None:
        return kept(gram)
    root = Root(kept(S))
    return RootedGram(root, root)


def triangular_root(gram: Float[Tensor, "d_model d_model"]) -> Float[Tensor, "d_model d_model"] | None:
    """Return the upper triangular S with S^T S = gram, float64; None unless all but the last pivot are positive.

    The last pivot may be 0: rows that a LayerNorm centres have a Gram whose null vector is all ones.
    """
    S, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if failed.item() in (0, len(gram)):
        if failed.item():
            leading = torch.linalg.cholesky(gram[:-1, :-1], upper=True)
            S = torch.zeros_like(gram)
            S[:-1, :-1] = leading
            S[:-1, -1:] = torch.linalg.solve_triangular(leading.mT, gram[:-1, -1:], upper=False)
        return S
    return None


@dataclass(frozen=True, eq=False)
class FullCircuit:
    """The Grams that represent a full circuit A M B, which maps tokens to tokens through one head's M.

    A has a row for each token, and B a column. For QK, B is E^T, so one Gram serves three times; for OV, B is W_U.

    Attributes:
        read: A^T C A, for the tokens that are read.
        cross: B C A, whose product with M has the full circuit's eigenvalues.
        write: B C B^T, for the tokens that are written (QK: for the keys).
    """

    read: Gram
    cross: Gram
    write: Gram

    @classmethod
    def of(
        cls, circuit: Circuit, read: Callable[[], Gram], written: Callable[[], tuple[Gram | None, Gram | None]]
    ) -> "FullCircuit | None":
        """Return the Grams for OV or QK between tokens that heads read as the rows of E.

        Each function is called only if its Grams are needed, because they cost a pass over the vocabulary.

        Args:
            circuit: OV or QK.
            read: gives E^T C E.
            written: gives W_U C E and W_U C W_U^T for OV; None for each if there is no unembedding, and then there is
                no full circuit.
        """
        if circuit is Circuit.qk:
            return cls.qk(read())
        cross, unembed = written()
        return None if cross is None or unembed is None else cls.ov(read(), cross, unembed)

    @classmethod
    def qk(cls, gram: Gram) -> "FullCircuit":
        """Return the Grams of E W_QK E^T, given E^T C E."""
        return cls(gram, gram, gram)

    @classmethod
    def ov(cls, embed: Gram, cross: Gram, unembed: Gram) -> "FullCircuit":
        """Return the Grams of E W_OV W_U, given E^T C E, W_U C E and W_U C W_U^T."""
        return cls(embed, cross, unembed)


@dataclass(frozen=True, eq=False)
class Block0Grams:
    """Gram matrices for the block0 embeddings E, which later layers read.

    Attributes:
        embed: E^T C E.
        cross: W_U C E; None without an unembedding.
        with_plain: W_E^T C E, between plain embeddings, which layer 0 reads, and block0 ones.
    """

    embed: Matrix
    cross: Matrix | None
    with_plain: Matrix


def centred_gram(a: Rows, b: Rows) -> Matrix:
    """Return a^T C b, in the dtype that `precision` gives; see `centred_grams`."""
    (gram,) = centred_grams([a], [(0, 0)]) if a is b else centred_grams([a, b], [(0, 1)])
    return kept(gram)


def centred_grams(sides: Sequence[Rows], pairs: Sequence[tuple[int, int]]) -> list[Matrix]:
    """Return a^T C b for these pairs of sides, in one pass over the tokens, summed in float64 every few blocks.

    Up to FLOAT64_PRODUCTS_UP_TO products are taken in float64, because float32 would cost a small vocabulary 1e-3 on
    ratios. More of them are taken in float32, within 1e-6 relative to the norms. A row near the mean is first
    subtracted from every row; C removes it anyway.

    Args:
        sides: matrices with one row per token, all over the same n tokens.
        pairs: which side is a and which is b, by index.

    Returns:
        One float64 matrix per pair.
    """
    n, widths = sides[0].shape[0], [side.shape[1] for side in sides]
    exact = torch.float32 if n * max(widths) ** 2 > FLOAT64_PRODUCTS_UP_TO else torch.float64
    shifts = [side[:SHIFT_TOKENS].double().mean(0) for side in sides]
    sums = [torch.zeros_like(shift) for shift in shifts]
    totals = [shifts[a].new_zeros(widths[a], widths[b]) for a, b in pairs]
    parts = totals if exact == torch.float64 else [torch.zeros_like(total, dtype=exact) for total in totals]
    in_blocks = list(gram_blocks(n, max(widths)))
    size = max((some.stop - some.start for some in in_blocks), default=1)
    room = [shift.new_empty(size, len(shift), dtype=exact) for shift in shifts]  # new memory for each block costs more
    for number, tokens in enumerate(in_blocks, 1):
        x = [
            torch.sub(side[tokens].to(exact), shift.to(exact), out=into[: tokens.stop - tokens.start])
            for side, shift, into in zip(sides, shifts, room, strict=True)
        ]
        for total, rows in zip(sums, x, strict=True):
            total += rows.sum(0)  # pairwise; a product with ones adds up one after the other, and errs 50 times as much
        add_products(parts, x, pairs)
        if parts is not totals and (number % BLOCKS_PER_SUM == 0 or tokens.stop == n):
            for total, part in zip(totals, parts, strict=True):
                total += part
                part.zero_()
    for total, (a, b) in zip(totals, pairs, strict=True):
        for some in stripes_of(widths[a]) if a == b else ():
            total[: some.start, some] = total[some, : some.start].T
        total.addr_(sums[a], sums[b], alpha=-1 / n)
    return totals


def add_products(
    totals: Sequence[Float[Tensor, "d_a d_b"]],
    x: Sequence[Float[Tensor, "token d_x"]],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Add a^T b for these pairs of sides to the totals. If a is b, only the lower triangle is added.

    The columns are cut into stripes. If there are enough, each thread takes whole stripes; else all threads share one
    stripe after the other.
    """

    def add(stripe: tuple[int, slice, int]) -> None:
        number, some, lower = stripe
        a, b = pairs[number]
        totals[number][some, :lower].addmm_(x[a][:, some].T, x[b][:, :lower])

    stripes = [
        (number, some, some.stop if a == b else x[b].shape[1])
        for number, (a, b) in enumerate(pairs)
        for some in stripes_of(x[a].shape[1])
    ]
    if len(stripes) >= STRIPES_PER_THREAD * torch.get_num_threads():
        each(add, sorted(stripes, key=lambda stripe: -stripe[2]), x[0].device)  # the longest first
    else:
        for stripe in stripes:
            add(stripe)


def stripes_of(width: int) -> Iterator[slice]:
    """Yield the columns to take at a time: a product with few is slow, and one with many saves little by symmetry."""
    narrow = max(STRIPE_COLUMNS, width // 16)
    return blocks(width, narrow if width >= STRIPES_PER_THREAD * torch.get_num_threads() * narrow else 2 * narrow)


def precision(d_model: int) -> torch.dtype:
    """Return the dtype for Grams and their products (definitions: section 1): float64 if d_model <= FLOAT64_UP_TO.

    Float32 keeps ratios within 1e-4, and scales within 1e-4 relative to their size. The departure from normality is
    a difference's root: if it is 0, float32 keeps it within 2e-4.
    """
    return torch.float64 if d_model <= FLOAT64_UP_TO else torch.float32


def kept(gram: Matrix) -> Matrix:
    """Return a Gram in the dtype in which Grams are kept."""
    return gram.to(precision(max(gram.shape)))


def mean_row(x: Rows) -> Float[Tensor, " d_model"]:
    """Average over tokens, in float64; for large vocabularies within 1e-7 relative to the rows' size."""
    if x.shape[0] <= SHIFT_TOKENS:
        return x[:].double().mean(0)
    near = x[:SHIFT_TOKENS].mean(0)  # rounded: the same number is taken away and added
    total = torch.zeros_like(near, dtype=torch.float64)
    for rows in blocks(x.shape[0], max(1, min(BLOCK, BLOCK_ELEMENTS // x.shape[1]))):
        block = x[rows]
        total += (block - near).sum(0)
    return near.double() + total / x.shape[0]


def gram_blocks(n: int, width: int) -> Iterator[slice]:
    """Yield the slices of n tokens, with rows of this width, in which Grams read them."""
    return blocks(n, max(1, min(n, BLOCK, BLOCK_ELEMENTS // width)))


def blocks(n: int, size: int = BLOCK) -> Iterator[slice]:
    """Yield slices that cover range(n), `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
