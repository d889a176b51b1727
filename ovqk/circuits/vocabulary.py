"""What the vocabulary contributes to every head: Gram matrices, computed once per model, and effective embeddings.

A softmax cannot see a constant added to every token, so all of it is centred over tokens: C = I - 11^T/V.
Token ids beyond the tokenizer's vocabulary (padding rows) are left out of C, of the Grams and of V.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits.factors import ov_factors
from ovqk.circuits.threads import each
from ovqk.config.schema import Circuit
from ovqk.errors import UserError
from ovqk.weights.types import (
    ACTIVATIONS,
    Architecture,
    EmbeddingWeights,
    LayerWeights,
    MLPWeights,
    Rows,
    StoredRows,
    apply_norm,
    normalise,
)

BLOCK = 2048  # tokens handled at a time, fewer where rows are long
ELEMENTS = 2**22  # of a block of embedding rows
TOGETHER = 8  # blocks whose products are summed before they are added in float64
NEAR_MEAN = 256  # tokens whose mean rows are taken less
HIDDEN_ELEMENTS = 2**21  # of block 0's hidden activations at a time
STRIPE = 128  # columns of a symmetric product taken at a time, at least
ENOUGH = 2  # stripes for each thread: with fewer the longest would be waited for
LARGE = 10**10  # products of a Gram beyond which they are float32
EXACT = 512  # d_model up to which Grams and their products are float64


Gram = Float[Tensor, "d_model d_model"]


@dataclass(frozen=True, eq=False)
class FullCircuit:
    """The Grams of a full circuit A M B, a map from tokens to tokens through one head's M (A, B: token matrices).

    QK and OV differ in B: for QK it is E^T, so that one Gram serves three times; for OV it is W_U.

    Attributes:
        read: A^T C A, of the tokens that are read.
        cross: B C A, whose product with M has the eigenvalues of the full circuit.
        write: B C B^T, of the tokens that are written (QK: of the keys).
    """

    read: Gram
    cross: Gram
    write: Gram

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
    """Grams of the block0 embeddings E, which later layers read.

    Attributes:
        embed: E^T C E.
        cross: W_U C E; None without an unembedding.
        with_plain: W_E^T C E, between plain embeddings, which layer 0 reads, and block0 ones.
    """

    embed: Gram
    cross: Gram | None
    with_plain: Gram


@dataclass(frozen=True)
class Vocabulary:
    """Embeddings of the real tokens, and the Grams that serve every head, each computed when first asked for.

    Attributes:
        W_E: embedding rows.
        W_U_rows: the columns of W_U, as rows; None where the checkpoint holds none.
    """

    W_E: Rows
    W_U_rows: Rows | None

    @property
    def size(self) -> int:
        """V: the number of real tokens."""
        return self.W_E.shape[0]

    @property
    def d_model(self) -> int:
        """Components of a row."""
        return self.W_E.shape[1]

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean row of W_E, float64."""
        return mean_row(self.W_E)

    @cached_property
    def gram_embed(self) -> Float[Tensor, "d_model d_model"]:
        """G_QK = W_E^T C W_E."""
        if self.stored_once is None:
            return centred_gram(self.W_E, self.W_E)
        W_E, _, gram = self.stored_once
        return W_E.fold(W_E.fold(gram).T)

    @property
    def gram_cross(self) -> Float[Tensor, "d_model d_model"] | None:
        """G_OV = W_U C W_E."""
        return self._written[0]

    @property
    def gram_unembed(self) -> Float[Tensor, "d_model d_model"] | None:
        """W_U C W_U^T."""
        return self._written[1]

    def full_circuit(self, circuit: Circuit) -> FullCircuit | None:
        """Return the Grams of the full circuits of plain embeddings; None for OV without an unembedding."""
        if circuit == "qk":
            return FullCircuit.qk(self.gram_embed)
        if self.gram_cross is None or self.gram_unembed is None:
            return None
        return FullCircuit.ov(self.gram_embed, self.gram_cross, self.gram_unembed)

    @cached_property
    def _written(self) -> tuple[Float[Tensor, "d_model d_model"] | None, Float[Tensor, "d_model d_model"] | None]:
        """W_U C W_E and W_U C W_U^T, in one pass."""
        if self.W_U_rows is None:
            return None, None
        if self.stored_once is None:
            cross, unembed = centred_grams([self.W_U_rows, self.W_E], [(0, 1), (0, 0)])
            return cross, unembed
        W_E, W_U_rows, gram = self.stored_once
        written = W_U_rows.fold(gram).T
        return W_E.fold(written), W_U_rows.fold(written)

    @cached_property
    def stored_once(self) -> tuple[StoredRows, StoredRows, Float[Tensor, "d_model d_model"]] | None:
        """Both embeddings and the Gram of the matrix they are one of, where a tied checkpoint keeps it on disk.

        Gain and centring are linear in a row, so that this Gram gives all three.
        """
        W_E, W_U_rows = self.W_E, self.W_U_rows
        if not isinstance(W_E, StoredRows) or not isinstance(W_U_rows, StoredRows) or W_E.read is not W_U_rows.read:
            return None
        bare = dataclasses.replace(W_E, gain=None, centred=False)
        return W_E, W_U_rows, centred_gram(bare, bare)


def read_vocabulary(embeddings: EmbeddingWeights, n_tokens: int | None, label: str = "the checkpoint") -> Vocabulary:
    """A model's embeddings over its first `n_tokens` ids (all, where None).

    Raises:
        ValueError: there is no W_E.
        UserError: the row of one of these tokens holds NaN or infinity. Rows left in the checkpoint are checked when
            they are read; those of no token never are.
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
    return Vocabulary(W_E, W_U_rows)


def centred_gram(a: Rows, b: Rows) -> Float[Tensor, "d_a d_b"]:
    """a^T C b: see `centred_grams`."""
    return centred_grams([a], [(0, 0)])[0] if a is b else centred_grams([a, b], [(0, 1)])[0]


def centred_grams(sides: Sequence[Rows], pairs: Sequence[tuple[int, int]]) -> list[Float[Tensor, "d_a d_b"]]:
    """a^T C b for these pairs of sides, in one pass over blocks of tokens, summed in float64 every few blocks.

    The products are float32 where there are LARGE many of them (within 1e-6 of the norms of a and b) and float64
    where there are fewer: of small vocabularies float32 would cost 1e-3 on ratios. Rows are first taken less one near
    their mean, which C does not see.
    """
    n, widths = sides[0].shape[0], [side.shape[1] for side in sides]
    exact = torch.float32 if n * max(widths) ** 2 > LARGE else torch.float64
    shifts = [side[:NEAR_MEAN].double().mean(0) for side in sides]
    sums = [torch.zeros_like(shift) for shift in shifts]
    totals = [shifts[a].new_zeros(widths[a], widths[b]) for a, b in pairs]
    parts = totals if exact == torch.float64 else [torch.zeros_like(total, dtype=exact) for total in totals]
    size = max(1, min(n, BLOCK, ELEMENTS // max(widths)))
    room = [shift.new_empty(size, len(shift), dtype=exact) for shift in shifts]  # new memory for each block costs more
    for number, tokens in enumerate(blocks(n, size), 1):
        x = [
            torch.sub(side[tokens].to(exact), shift.to(exact), out=into[: tokens.stop - tokens.start])
            for side, shift, into in zip(sides, shifts, room, strict=True)
        ]
        for total, rows in zip(sums, x, strict=True):
            total += torch.ones(len(rows)).to(rows) @ rows
        add_products(parts, x, pairs)
        if parts is not totals and (number % TOGETHER == 0 or tokens.stop == n):
            for total, part in zip(totals, parts, strict=True):
                total += part
                part.zero_()
    for total, (a, b) in zip(totals, pairs, strict=True):
        for some in stripes_of(widths[a]) if a == b else ():
            total[: some.start, some] = total[some, : some.start].T
        total.addr_(sums[a], sums[b], alpha=-1 / n)
    return [total.to(precision(max(widths))) for total in totals]


def add_products(
    totals: Sequence[Float[Tensor, "d_a d_b"]],
    x: Sequence[Float[Tensor, "token d_x"]],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Add a^T b for these pairs of sides to the totals; of a product with itself the lower triangle alone.

    In stripes of columns: a thread to each where there are enough of them, else all threads to one after the other.
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
    if len(stripes) >= ENOUGH * torch.get_num_threads():
        each(add, sorted(stripes, key=lambda stripe: -stripe[2]), x[0].device)  # the longest first
    else:
        for stripe in stripes:
            add(stripe)


def stripes_of(width: int) -> Iterator[slice]:
    """Columns of a symmetric product taken at a time: of few a product is slow, of many little is saved."""
    narrow = max(STRIPE, width // 16)
    return blocks(width, narrow if width >= ENOUGH * torch.get_num_threads() * narrow else 2 * narrow)


def precision(d_model: int) -> torch.dtype:
    """The dtype of Grams and of what is multiplied by them: float64 where that is cheap (definitions: section 1).

    Float32 keeps ratios within 1e-4 and scales within 1e-4 of their size; the departure from normality, a root of a
    difference, within 2e-4 where it is 0.
    """
    return torch.float64 if d_model <= EXACT else torch.float32


def mean_row(x: Rows) -> Float[Tensor, " d_model"]:
    """The mean over tokens, float64; of large vocabularies within 1e-7 of the rows."""
    if x.shape[0] <= NEAR_MEAN:
        return x[:].double().mean(0)
    near = x[:NEAR_MEAN].mean(0)  # rounded: the same number is taken away and added
    total = torch.zeros_like(near, dtype=torch.float64)
    for rows in blocks(x.shape[0], max(1, min(BLOCK, ELEMENTS // x.shape[1]))):
        block = x[rows]
        total += torch.ones(len(block)).to(block) @ (block - near)  # a product is faster than a sum
    return near.double() + total / x.shape[0]


def blocks(n: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover range(n), `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class Block0:
    """The `block0` effective embedding: what later layers see of a token that attended only to itself.

        E = r + MLP0(ln2(r)),   r = W_E + sum over heads of ln1(W_E) W_V W_O   (block 0)

    Without positions, b_V and b_O; MLP biases kept. An attention-only model has E = r. In a parallel block the MLP
    reads W_E too; a norm after attention or MLP is applied to what it writes.
    """

    def __init__(self, layer0: LayerWeights, mlp: MLPWeights | None, architecture: Architecture) -> None:
        """Take block 0's attention and MLP weights, their reads folded (`fold_reads`, `fold_mlp`)."""
        factors, self.post_norm = ov_factors(layer0, architecture), layer0.post_norm
        heads, d_model, d_head = factors.left.shape
        joint = factors.left.transpose(0, 1).reshape(d_model, -1), factors.right.reshape(-1, d_model)
        # All heads together map a row to a row: in one product where they have more dimensions than the row has.
        self.attention = (joint[0] @ joint[1],) if 2 * heads * d_head > d_model else joint
        self.mlp, self.architecture = mlp, architecture

    def rows(self, W_E: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """E for these rows of the folded embedding, in their precision."""
        kind, eps = self.architecture.norm, self.architecture.norm_eps
        written = normalise(W_E, kind, eps)
        for weight in self.attention:
            written = written @ weight.to(W_E)
        stream = W_E + apply_norm(self.post_norm, written, eps)
        if self.mlp is None:
            return stream
        x = normalise(W_E if self.architecture.parallel else stream, kind, eps)
        tokens = max(1, HIDDEN_ELEMENTS // self.mlp.W_in.shape[1])
        written = torch.cat([self._mlp(self.mlp, some) for some in x.split(tokens)])
        return stream + apply_norm(self.mlp.post_norm, written, eps)

    @staticmethod
    def _mlp(mlp: MLPWeights, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        hidden = torch.addmm(mlp.b_in.to(x), x, mlp.W_in.to(x))
        hidden = ACTIVATIONS[mlp.activation](hidden)
        if mlp.W_linear is not None:
            linear = x @ mlp.W_linear.to(x)
            hidden *= linear if mlp.b_linear is None else linear.add_(mlp.b_linear.to(x))
        return torch.addmm(mlp.b_out.to(x), hidden, mlp.W_out.to(x))

    def grams(
        self, vocabulary: Vocabulary, read: Callable[[int, int], Float[Tensor, "token d_model"]] | None = None
    ) -> Block0Grams:
        """Return the Grams of the block0 embeddings, in one pass over the tokens.

        `read` gives E of tokens start .. stop - 1, if a caller has them.
        """
        read = read or (lambda start, stop: self.rows(vocabulary.W_E[start:stop]))
        E = StoredRows(read, (vocabulary.size, vocabulary.d_model))
        sides: list[Rows] = [E, vocabulary.W_E]
        if vocabulary.W_U_rows is None:
            second, plain = centred_grams(sides, [(0, 0), (1, 0)])
            return Block0Grams(second, None, plain)
        second, plain, cross = centred_grams([*sides, vocabulary.W_U_rows], [(0, 0), (1, 0), (2, 0)])
        return Block0Grams(second, cross, plain)
