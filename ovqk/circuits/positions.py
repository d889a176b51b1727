"""Position or content: how much of a head's score variance over keys comes from where a key is, and how much from
what it is. A measured answer beside the common reading of symmetry (docs/definitions.md, section 4).

All on folded weights, for the head's bilinear form on its direct path: for layers >= 1 what earlier heads move into
the residual stream is not in it, and with learned positions the norm's joint scale of embedding and position is
ignored.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ovqk.circuits.spectra import Basis
from ovqk.circuits.vocabulary import BLOCK, Vocabulary, blocks, centred_gram, mean_row, precision
from ovqk.weights.types import Architecture, LayerWeights, QueryKeyNorm, Rotary, Rows, StoredRows, normalise

EXACT_POSITIONS = 256  # up to which scores between positions are float64
SAMPLE = 2**15  # tokens, at least, that moments of normalised queries and keys are taken over
SAMPLE_ELEMENTS = 2**26  # of their rows, at most (256 MB)
DEFAULT_SPAN = 128  # offsets averaged over under rotary positions, unless the context is shorter


@dataclass(frozen=True)
class Moments:
    """First and second moments of embedding rows.

    Attributes:
        mean: float64.
        gram: the sum over rows of (row - mean)^T (row - mean): n times their (population) covariance.
    """

    mean: Float[Tensor, " d_model"]
    gram: Float[Tensor, "d_model d_model"]
    n: int


def row_moments(rows: Float[Tensor, "row d_model"]) -> Moments:
    """Moments of rows in memory."""
    return Moments(mean_row(rows), centred_gram(rows, rows), len(rows))


def token_moments(vocabulary: Vocabulary) -> Moments:
    """Moments of the plain embedding rows, from the Gram that is there already."""
    return Moments(vocabulary.mean, vocabulary.gram_embed, vocabulary.size)


def normalised_moments(vocabulary: Vocabulary, architecture: Architecture) -> Moments:
    """Moments of embedding rows normalised as a layer's norm would, a block of tokens at a time."""

    def read(start: int, stop: int) -> Tensor:
        return normalise(vocabulary.W_E[start:stop], architecture.norm, architecture.norm_eps)

    rows = StoredRows(read, (vocabulary.size, vocabulary.d_model), device=vocabulary.W_E.device)
    return Moments(mean_row(rows), centred_gram(rows, rows), vocabulary.size)


@dataclass(frozen=True)
class HeadMoments:
    """Moments of the queries and keys of uniformly drawn tokens, before rotation, float64.

    Attributes:
        query_mean, query_second: mean and second moment of queries.
        key_mean, key_covariance: mean and covariance of keys.
    """

    query_mean: Float[Tensor, "head d_head"]
    query_second: Float[Tensor, "head d_head d_head"]
    key_mean: Float[Tensor, "head d_head"]
    key_covariance: Float[Tensor, "head d_head d_head"]


QueryKeyBases = tuple[Basis, Basis]
"""Of a layer's W_Q and W_K."""


def head_moments(
    weights: LayerWeights, architecture: Architecture, tokens: Moments, bases: QueryKeyBases | None = None
) -> HeadMoments:
    """Moments of q = x W_Q + b_Q and k = x W_K + b_K, from those of the rows x; `bases`, where they are known.

    Raises:
        ValueError: queries and keys are normalised, so that they are not linear in x.
    """
    if weights.qk_norm is not None:
        raise ValueError("normalised queries and keys are not linear in the rows: see normalised_head_moments")
    kv = architecture.kv_of_head.to(weights.W_K.device)
    query, key = (Basis(weights.W_Q), Basis(weights.W_K)) if bases is None else bases
    query_mean = _mean_through(tokens.mean, weights.W_Q) + weights.b_Q.double()
    key_mean = _mean_through(tokens.mean, weights.W_K) + weights.b_K.double()
    return HeadMoments(
        query_mean=query_mean,
        query_second=query.second_moment(tokens.gram) / tokens.n + _outer(query_mean),
        key_mean=key_mean[kv],
        key_covariance=key.second_moment(tokens.gram)[kv] / tokens.n,
    )


def _mean_through(
    mean: Float[Tensor, " d_model"], weight: Float[Tensor, "n d_model d_head"]
) -> Float[Tensor, "n d_head"]:
    """mean @ weight of each head, float64, with no copy of all weights in float64."""
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
    """Return moments of normalised queries and keys, of plain rows and of rows normalised as a layer's norm would.

    A norm between the factors leaves no Gram to take them through: each token's queries and keys are computed, for
    both kinds of rows in one pass, in the precision that `vocabulary.precision` gives. The sums are float64.

    Args:
        weights: the layer.
        architecture: of the model.
        W_E: embedding rows: all of them, or a sample (see `sample_rows`).

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
    for some in blocks(n):
        x = W_E[some].to(dtype)
        for side in sides:
            side.add(x)
    kv = architecture.kv_of_head.to(W_E.device)
    both = []
    for (query_mean, query_second), (key_mean, key_second) in zip(*(side.means(n) for side in sides), strict=True):
        key_covariance = key_second - _outer(key_mean)
        both.append(HeadMoments(query_mean, query_second, key_mean[kv], key_covariance[kv]))
    return both[0], both[1]


class _NormalisedSide:
    """Sums over tokens of normalised queries (or keys) and of their outer products, of plain and of normalised rows."""

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

    def add(self, x: Float[Tensor, "token d_model"]) -> None:
        """Add the queries of these rows.

        A root-mean-square norm multiplies a row by a number, and so its queries if they have no bias. The norm of
        queries takes that number out again up to its eps: mostly both kinds of rows have the same queries.
        """
        if self.kind != "rmsnorm" or self.bias.any():
            for sums, rows in zip(self.sums, (x, normalise(x, self.kind, self.eps)), strict=True):
                self._add(sums, self._divided(rows @ self.weight + self.bias))
            return
        y, scale = x @ self.weight, torch.rsqrt(x.square().mean(-1) + self.eps)[:, None]
        square = torch.linalg.vector_norm(y, dim=(0, 2) if self.norm.over_heads else 2, keepdim=True).square()
        square = square / (y.shape[0] * y.shape[2] if self.norm.over_heads else y.shape[2])
        plain = torch.rsqrt(square + self.norm.eps)
        normalised = scale * torch.rsqrt(scale.square() * square + self.norm.eps)
        ratio = normalised / plain
        found = self._add(self.sums[0], y.mul_(plain))
        if (ratio - 1).abs().max() <= 4 * torch.finfo(y.dtype).eps:
            for into, part in zip(self.sums[1], found, strict=True):
                into += part
        else:
            self._add(self.sums[1], y.mul_(ratio))

    def means(self, n: int) -> list[tuple[Float[Tensor, "n d_head"], Float[Tensor, "n d_head d_head"]]]:
        """Return mean and second moment with the gain of the norm, of plain and of normalised rows."""
        return [(self.gain * first / n, _outer(self.gain) * second / n) for first, second in self.sums]

    def _divided(self, y: Float[Tensor, "n token d_head"]) -> Float[Tensor, "n token d_head"]:
        return self.norm.apply(y, torch.ones_like(self.bias[:, 0]))

    @staticmethod
    def _add(sums: list[Tensor], y: Float[Tensor, "n token d_head"]) -> tuple[Tensor, Tensor]:
        found = y.sum(1).double(), (y.mT @ y).double()
        for into, part in zip(sums, found, strict=True):
            into += part
        return found


def _outer(x: Float[Tensor, "head d_head"]) -> Float[Tensor, "head d_head d_head"]:
    return x[:, :, None] * x[:, None, :]


def learned_shares(
    weights: LayerWeights,
    architecture: Architecture,
    tokens: Moments,
    positions: Moments,
    bases: QueryKeyBases | None = None,
) -> dict[str, Float[Tensor, " head"]]:
    """The six shares of the score variance over keys, and their positional sum (learned positions).

    The query is q0 = mean token + mean position (with b_Q), plus centred content, plus centred position; the key is
    centred content plus centred position. Over independent uniform tokens and positions the variance of the score
    over keys, averaged over queries, is the sum of tr(A_a B_b), A_a = W_Q^T S_a W_Q, B_b = W_K^T Sigma_b W_K.

    Returns:
        `qk_share_{constant,content,position}_{content,position}` and `qk_positional_share`, each [head] in [0, 1].
    """
    kv = architecture.kv_of_head.to(weights.W_K.device)
    query, key = (Basis(weights.W_Q), Basis(weights.W_K)) if bases is None else bases
    constant = _mean_through(tokens.mean + positions.mean, weights.W_Q) + weights.b_Q.double()
    rows = {"content": tokens, "position": positions}
    queries = {name: query.second_moment(moments.gram) / moments.n for name, moments in rows.items()}
    queries = {"constant": _outer(constant), **queries}
    keys = {name: key.second_moment(moments.gram)[kv] / moments.n for name, moments in rows.items()}
    parts = {f"{a}_{b}": (queries[a] * keys[b]).sum((-2, -1)) for a in queries for b in keys}
    total = torch.stack(list(parts.values())).sum(0)
    shares = {f"qk_share_{name}": _share(value, total) for name, value in parts.items()}
    positional = sum(value for name, value in parts.items() if name.endswith("_position"))
    return {**shares, "qk_positional_share": _share(torch.as_tensor(positional), total)}


def rotary_span(weights: LayerWeights, architecture: Architecture) -> int:
    """L: how many offsets 0..L-1 are averaged over; bounded by the context and by the layer's sliding window."""
    bounds = (DEFAULT_SPAN, architecture.n_ctx, weights.sliding_window)
    return min(bound for bound in bounds if bound)


def rotary_shares(
    weights: LayerWeights, architecture: Architecture, moments: HeadMoments
) -> dict[str, Float[Tensor, " head"]]:
    """The three shares of the score variance over (key token, offset), averaged over query tokens (rotary).

    Keys k = x W_K + b_K have mean mu and covariance Sigma; S is the second moment of q = x W_Q + b_Q (both normalised
    where the model does so); offsets are uniform on 0..L-1 and Rbar is their mean rotation.

    Returns:
        `qk_share_position`, `qk_share_content`, `qk_share_interaction`, each [head] in [0, 1] and summing to 1, and
        `qk_positional_share`, which is the first.
    """
    rotary = _required(weights)
    S, mu, sigma = moments.query_second, moments.key_mean, moments.key_covariance
    turns = _turns(rotary, rotary_span(weights, architecture), S.shape[-1])
    mean_of_products = turns.conj().mT @ turns / len(turns), turns.mT @ turns / len(turns)
    mean = turns.mean(0)
    product_of_means = torch.outer(mean.conj(), mean), torch.outer(mean, mean)
    queries, keys, mean_key = (_pairs(rotary, matrix) for matrix in (S, sigma, _outer(mu)))
    position = _trace(queries, mean_key, mean_of_products) - _trace(queries, mean_key, product_of_means)
    content = _trace(queries, keys, product_of_means)
    interaction = _trace(queries, keys, mean_of_products) - content
    total = position + content + interaction
    shares = {
        "qk_share_position": _share(position, total),
        "qk_share_content": _share(content, total),
        "qk_share_interaction": _share(interaction, total),
    }
    return {**shares, "qk_positional_share": shares["qk_share_position"]}


Pairs = tuple[Complex[Tensor, "*#head pair pair"], Complex[Tensor, "*#head pair pair"]]
"""Of a symmetric matrix E[x^T x], with two dimensions of x as one complex z: E[conj(z_a) z_b] and E[z_a z_b]."""


def _turns(rotary: Rotary, span: int, d_head: int) -> Complex[Tensor, "offset pair"]:
    """What R(D)^T multiplies each pair of dimensions by, D = 0..span-1; 1 where a dimension does not rotate."""
    cos, sin = rotary.angles(torch.arange(span))
    still = torch.ones(span, (d_head - 2 * rotary.inverse_frequencies.numel() + 1) // 2, dtype=torch.complex128)
    return torch.cat((torch.complex(cos, -sin), still.to(cos.device)), 1)


def _pairs(rotary: Rotary, matrix: Float[Tensor, "head d_head d_head"]) -> Pairs:
    """A symmetric matrix by its pairs of dimensions, those that do not rotate last."""
    n, d_head = 2 * rotary.inverse_frequencies.numel(), matrix.shape[-1]
    matrix = torch.nn.functional.pad(matrix, (0, (d_head - n) % 2) * 2)  # an odd dimension is paired with zeros
    order = torch.arange(matrix.shape[-1])
    if not rotary.interleaved:  # as (0, n/2), (1, n/2 + 1), ...
        order[:n] = order[:n].view(2, -1).T.flatten()
    first, second = order[0::2], order[1::2]
    rows = matrix[:, first], matrix[:, second]
    (aa, ab), (ba, bb) = ((x[..., first], x[..., second]) for x in rows)
    return torch.complex(aa + bb, ab - ba), torch.complex(aa - bb, ab + ba)


def _trace(S: Pairs, sigma: Pairs, turned: Pairs) -> Float[Tensor, " head"]:
    """tr(S Sigma'), Sigma' the second matrix with its pairs multiplied so."""
    products = (s.conj() * x * turn for s, x, turn in zip(S, sigma, turned, strict=True))
    return sum(product.real.sum((-2, -1)) for product in products) / 2  # type: ignore[return-value]


def rotary_offset_scores(
    weights: LayerWeights, architecture: Architecture, moments: HeadMoments
) -> Float[Tensor, "head offset"]:
    """mu_q R_D mu_k^T: the score that the mean query gives the mean key, by offset D = 0..L-1."""
    rotary = _required(weights)
    cos, sin = rotary.angles(torch.arange(rotary_span(weights, architecture)))
    turned = rotary.rotate(moments.query_mean[:, None, :], cos, sin)
    return torch.einsum("hox,hx->ho", turned, moments.key_mean)


def previous_token_auc_rotary(scores: Float[Tensor, "head offset"]) -> Float[Tensor, " head"]:
    """`qk_prev_auc`, rotary: the share of offsets D != 1 whose mean score lies below that of D = 1."""
    others = torch.cat((scores[:, :1], scores[:, 2:]), dim=1)
    return _below(others, scores[:, 1:2])


@dataclass(frozen=True)
class PositionScores:
    """What the position-position scores s_ij (query i, key j <= i) of a layer say, per head.

    Attributes:
        offset_r2: adjusted R^2 of s_ij = a_i + f(i - j), relative to row means.
        previous_auc: mean over i >= 2 of the share of j <= i, j != i - 1, with s_ij below s_{i,i-1}.
        by_offset: mean score at each offset 0..T-1.
    """

    offset_r2: Float[Tensor, " head"]
    previous_auc: Float[Tensor, " head"]
    by_offset: Float[Tensor, "head offset"]


def learned_position_scores(
    weights: LayerWeights, architecture: Architecture, W_pos: Float[Tensor, "n_ctx d_model"]
) -> PositionScores:
    """Offset profile, offset R^2 and previous-token AUC of the scores between centred position embeddings.

    Raises:
        ValueError: fewer than 4 positions leave no degree of freedom for the fit.
    """
    T = W_pos.shape[0]
    if T < 4:
        raise ValueError(f"an offset fit needs at least 4 positions, not {T}")
    exact = torch.float64 if T <= EXACT_POSITIONS else torch.float32
    positions = (W_pos.double() - W_pos.double().mean(0)).to(exact)
    queries = positions @ weights.W_Q.to(exact)  # [head, T, d_head]
    keys = (positions @ weights.W_K.to(exact))[architecture.kv_of_head.to(W_pos.device)]
    solver = _offset_design(T).to(W_pos.device)
    counts = torch.arange(1, T + 1, dtype=torch.float64, device=W_pos.device)
    degrees = (T * (T + 1) // 2 - T) / (T * (T + 1) // 2 - 2 * T + 1)
    squares, auc = _squares_and_previous_auc(queries, keys)
    row_means = (queries * keys.double().cumsum(1)).sum(-1) / counts
    diagonals = _diagonal_sums(queries, keys)
    total = squares - (row_means.square() * counts).sum(-1)  # about the row means
    centred = diagonals - row_means.flip(1).cumsum(1).flip(1)  # diagonal sums of the scores less their row means
    explained = ((centred @ solver) * centred).sum(-1)
    alive = total > 0
    r2 = torch.where(alive, 1 - (1 - explained / torch.where(alive, total, 1.0)) * degrees, 0.0)
    return PositionScores(r2, auc, diagonals / counts.flip(0))


def _squares_and_previous_auc(
    queries: Float[Tensor, "head T d_head"], keys: Float[Tensor, "head T d_head"]
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """The sum of s_ij^2 over j <= i, and `qk_prev_auc`: a key below s(i, i-1) counts 1, an equal one 1/2.

    One head at a time: s is [T, T].
    """
    others = torch.arange(2, queries.shape[1], device=queries.device)  # keys that i = 2.. sees besides i - 1
    squares, auc = [], []
    for query, key in zip(queries, keys, strict=True):
        scores = query @ key.T
        signs = (scores.diagonal(-1)[1:, None] - scores[2:]).sign_().tril_(2)
        auc.append(((others + signs.sum(1).double()) / (2 * others)).mean())
        squares.append(scores.tril_().norm().double().square())
    return torch.stack(squares), torch.stack(auc)


@lru_cache(maxsize=2)
def _offset_design(T: int) -> Float[Tensor, "offset offset"]:
    """Pseudo-inverse of the normal equations for f in s_ij = a_i + f(i - j), the row effects eliminated."""
    offsets = torch.arange(T)
    reciprocal = 1.0 / torch.arange(1, T + 1, dtype=torch.float64)
    tail = reciprocal.flip(0).cumsum(0).flip(0)  # sum over i >= D of 1 / (i + 1)
    shared = tail[torch.maximum(offsets[:, None], offsets[None, :])]
    normal = torch.diag((T - offsets).double()) - shared
    # f is known up to a constant: adding the constant's projector makes the matrix invertible without moving f'rhs.
    return torch.linalg.inv(normal + 1.0 / T)


def _diagonal_sums(
    queries: Float[Tensor, "head T d_head"], keys: Float[Tensor, "head T d_head"]
) -> Float[Tensor, "head T"]:
    """The sum over each diagonal i - j = D of q_i . k_j: a correlation over positions, by Fourier transforms."""
    T = queries.shape[1]
    q, k = (torch.fft.rfft(x, 2 * T, dim=1) for x in (queries, keys))
    return torch.fft.irfft((q * k.conj()).sum(-1), 2 * T, dim=1)[:, :T].double()


def _share(part: Float[Tensor, " head"], total: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    return torch.where(total > 0, part / torch.where(total > 0, total, 1.0), 0.0)


def _below(values: Float[Tensor, "head n"], than: Float[Tensor, "head #n"]) -> Float[Tensor, " head"]:
    return ((values < than).double() + 0.5 * (values == than).double()).mean(1)


def _required(weights: LayerWeights) -> Rotary:
    """The layer's rotation, float64, where its weights are."""
    if weights.rotary is None:
        raise ValueError("the layer has no rotary positions")
    frequencies = weights.rotary.inverse_frequencies.to(weights.W_Q.device, torch.float64)
    return dataclasses.replace(weights.rotary, inverse_frequencies=frequencies)
