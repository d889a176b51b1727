"""First and second moments for embedding rows, and for the queries and keys that a layer computes from them.

Products between these moments have the traces that `positions` turns into position and content shares.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits.grams import BLOCK, Gram, blocks, centred_grams, mean_row, precision, rooted
from ovqk.circuits.maps import Basis
from ovqk.circuits.threads import each
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.weights.norms import QueryKeyNorm, inverse_scale, normalise
from ovqk.weights.stored_rows import Rows, StoredRows
from ovqk.weights.types import Architecture, LayerWeights

SAMPLE = 2**15  # least number of tokens for moments when queries and keys are normalised
SAMPLE_ELEMENTS = 2**26  # elements in their rows, at most (256 MB)


@dataclass(frozen=True)
class Moments:
    """First and second moments of embedding rows.

    Attributes:
        mean: float64.
        gram: the sum over rows of (row - mean)^T (row - mean): n times their (population) covariance.
    """

    mean: Float[Tensor, " d_model"]
    gram: Gram
    n: int


def row_moments(rows: Float[Tensor, "row d_model"]) -> Moments:
    """Return the moments of rows in memory."""
    return Moments(mean_row(rows), rooted(centred_grams([rows], [(0, 0)])[0]), len(rows))


def token_moments(vocabulary: Vocabulary) -> Moments:
    """Return the moments of the plain embedding rows, from the Gram that is there already."""
    return Moments(vocabulary.mean, vocabulary.gram_embed, vocabulary.size)


def normalised_moments(vocabulary: Vocabulary, architecture: Architecture) -> Moments:
    """Return the moments of embedding rows, normalised as a layer's norm would, in blocks of tokens."""

    def read(start: int, stop: int) -> Tensor:
        return architecture.normalised(vocabulary.W_E[start:stop])

    rows = StoredRows(read, (vocabulary.size, vocabulary.d_model), device=vocabulary.W_E.device)
    return Moments(mean_row(rows), rooted(centred_grams([rows], [(0, 0)])[0]), vocabulary.size)


@dataclass(frozen=True)
class HeadMoments:
    """Moments of the queries and keys for uniformly drawn tokens, before rotation, float64.

    Attributes:
        query_mean, query_second: mean and second moment of queries.
        key_mean, key_covariance: mean and covariance of keys.
    """

    query_mean: Float[Tensor, "head d_head"]
    query_second: Float[Tensor, "head d_head d_head"]
    key_mean: Float[Tensor, "head d_head"]
    key_covariance: Float[Tensor, "head d_head d_head"]


QueryKeyBases = tuple[Basis, Basis]
"""Bases of a layer's W_Q and W_K."""


def head_moments(
    weights: LayerWeights, architecture: Architecture, tokens: Moments, bases: QueryKeyBases | None = None
) -> HeadMoments:
    """Return the moments for q = x W_Q + b_Q and k = x W_K + b_K, given those for the rows x; `bases` if they are
    known.

    Raises:
        ValueError: queries and keys are normalised, so that they are not linear in x.
    """
    if weights.qk_norm is not None:
        raise ValueError("normalised queries and keys are not linear in the rows: see normalised_head_moments")
    kv = architecture.kv_of_head.to(weights.W_K.device)
    query, key = (Basis(weights.W_Q), Basis(weights.W_K)) if bases is None else bases
    query_mean = mean_through(tokens.mean, weights.W_Q) + weights.b_Q.double()
    key_mean = mean_through(tokens.mean, weights.W_K) + weights.b_K.double()
    return HeadMoments(
        query_mean=query_mean,
        query_second=query.second_moment(tokens.gram) / tokens.n + outer(query_mean),
        key_mean=key_mean[kv],
        key_covariance=key.second_moment(tokens.gram)[kv] / tokens.n,
    )


def mean_through(
    mean: Float[Tensor, " d_model"], weight: Float[Tensor, "n d_model d_head"]
) -> Float[Tensor, "n d_head"]:
    """Return mean @ weight per head, float64, without a float64 copy of all weights."""
    return torch.stack([mean @ each.double() for each in weight])


def sample_step(n: int, d_model: int) -> int:
    """Return s if every s-th of n tokens is enough for moments: SAMPLE of them, fewer if their rows are very long."""
    return max(1, n // min(SAMPLE, max(1, SAMPLE_ELEMENTS // d_model)))


def sample_rows(W_E: Rows) -> Float[Tensor, "sampled d_model"]:
    """Return the rows of every `sample_step`-th token, in memory.

    Token ids run from frequent to rare, so that even steps give each frequency its share.
    """
    n, d_model = W_E.shape
    step = sample_step(n, d_model)
    size = step * max(1, BLOCK // step)
    return torch.cat([W_E[some][::step].clone() for some in blocks(n, size)])


def normalised_head_moments(
    weights: LayerWeights, architecture: Architecture, W_E: Float[Tensor, "token d_model"]
) -> tuple[HeadMoments, HeadMoments]:
    """Return the moments of normalised queries and keys, once for plain rows and once for normalised ones.

    A norm lies between the factors, so no Gram gives the moments. Each token's queries and keys are computed instead,
    for both kinds of rows in one pass, in the precision that `grams.precision` gives. Each thread takes a block of
    tokens. Sums are float64.

    Args:
        weights: the layer's weights.
        architecture: the model's architecture.
        W_E: embedding rows: all of them, or a sample (`sample_rows`).

    Raises:
        ValueError: queries and keys are not normalised (see `head_moments`).
    """
    norm, dtype, n = weights.qk_norm, precision(W_E.shape[1]), W_E.shape[0]
    if norm is None:
        raise ValueError("queries and keys that are not normalised have moments through a Gram: see head_moments")
    sides = [
        _NormalisedSide(weights.W_Q.to(dtype), weights.b_Q.to(dtype), norm.query_gain, norm, architecture),
        _NormalisedSide(weights.W_K.to(dtype), weights.b_K.to(dtype), norm.key_gain, norm, architecture),
    ]
    for found in each(lambda some: [side.of(W_E[some].to(dtype)) for side in sides], blocks(n), W_E.device):
        for side, sums in zip(sides, found, strict=True):
            side.add(sums)
    kv = architecture.kv_of_head.to(W_E.device)
    both = []
    for (query_mean, query_second), (key_mean, key_second) in zip(*(side.means(n) for side in sides), strict=True):
        key_covariance = key_second - outer(key_mean)
        both.append(HeadMoments(query_mean, query_second, key_mean[kv], key_covariance[kv]))
    return both[0], both[1]


class _NormalisedSide:
    """Sums over tokens of normalised queries (or keys) and their outer products, for plain and for normalised rows."""

    def __init__(
        self,
        weight: Float[Tensor, "n d_model d_head"],
        bias: Float[Tensor, "n d_head"],
        gain: Float[Tensor, "n d_head"],
        norm: QueryKeyNorm,
        architecture: Architecture,
    ) -> None:
        n, _, d_head = weight.shape
        self.weight, self.bias, self.gain, self.norm = weight, bias[:, None], gain.double(), norm
        self.kind, self.eps = architecture.norm, architecture.norm_eps
        self.sums = [
            [weight.new_zeros(n, d_head, dtype=torch.float64), weight.new_zeros(n, d_head, d_head, dtype=torch.float64)]
            for _ in range(2)
        ]

    def of(self, x: Float[Tensor, "token d_model"]) -> list[tuple[Tensor, Tensor]]:
        """Return the sums over the queries of these rows, as they are and normalised (see `_sums`).

        A root-mean-square norm multiplies a row by a number, and so its queries if they have no bias. The norm of
        queries takes that number out again up to its eps: mostly both kinds of rows have the same queries.
        """
        if self.kind != "rmsnorm" or self.bias.any():
            both = x, normalise(x, self.kind, self.eps)
            return [self._sums(self._divided(rows @ self.weight + self.bias)) for rows in both]
        y, scale = x @ self.weight, inverse_scale(x, self.kind, self.eps)
        square = torch.linalg.vector_norm(y, dim=(0, 2) if self.norm.over_heads else 2, keepdim=True).square()
        square = square / (y.shape[0] * y.shape[2] if self.norm.over_heads else y.shape[2])
        plain = torch.rsqrt(square + self.norm.eps)
        normalised = scale * torch.rsqrt(scale.square() * square + self.norm.eps)
        ratio = normalised / plain
        found = self._sums(y.mul_(plain))
        same = (ratio - 1).abs().max() <= 4 * torch.finfo(y.dtype).eps
        return [found, found if same else self._sums(y.mul_(ratio))]

    def add(self, both: list[tuple[Tensor, Tensor]]) -> None:
        """Add sums that `of` has found."""
        for sums, found in zip(self.sums, both, strict=True):
            for into, part in zip(sums, found, strict=True):
                into += part

    def means(self, n: int) -> list[tuple[Float[Tensor, "n d_head"], Float[Tensor, "n d_head d_head"]]]:
        """Return mean and second moment with the norm's gain, for plain and for normalised rows."""
        return [(self.gain * first / n, outer(self.gain) * second / n) for first, second in self.sums]

    def _divided(self, y: Float[Tensor, "n token d_head"]) -> Float[Tensor, "n token d_head"]:
        return self.norm.apply(y, torch.ones_like(self.bias[:, 0]))

    @staticmethod
    def _sums(y: Float[Tensor, "n token d_head"]) -> tuple[Float[Tensor, "n d_head"], Float[Tensor, "n d_head d_head"]]:
        """Return two sums over tokens: y, and its outer products, whose upper right quarter is the lower left."""
        half = y.shape[-1] // 2
        second = y.new_empty(len(y), y.shape[-1], y.shape[-1])
        second[:, half:] = y[..., half:].mT @ y
        second[:, :half, :half] = y[..., :half].mT @ y[..., :half]
        second[:, :half, half:] = second[:, half:, :half].mT
        return y.sum(1).double(), second.double()


def outer(x: Float[Tensor, "head d_head"]) -> Float[Tensor, "head d_head d_head"]:
    return x[:, :, None] * x[:, None, :]
