"""Position or content: how much of the variance that a head's scores have over keys comes from each.

These shares are a measured answer beside the common reading of symmetry (docs/definitions.md, section 4). They are
computed from folded weights, for the head's bilinear form on its direct path. In layers >= 1 this leaves out what
earlier heads write, and with learned positions it ignores that the norm scales embedding and position together.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ovqk.circuits.maps import Basis
from ovqk.circuits.moments import HeadMoments, Moments, QueryKeyBases, mean_through, outer
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture, LayerWeights

FLOAT64_POSITIONS_UP_TO = 256  # positions up to which their scores are float64
DEFAULT_SPAN = 128  # offsets averaged over under rotary positions, unless the context is shorter


def learned_shares(
    weights: LayerWeights,
    architecture: Architecture,
    tokens: Moments,
    positions: Moments,
    bases: QueryKeyBases | None = None,
) -> dict[str, Float[Tensor, " head"]]:
    """Split the score variance over keys into six shares, for learned positions (docs/definitions.md, section 4).

    The query is q0 = mean token + mean position (with b_Q), plus centred content, plus centred position; the key is
    centred content plus centred position. Tokens and positions are independent and uniform. Then the score's variance
    over keys, averaged over queries, is the sum of tr(A_a B_b), A_a = W_Q^T S_a W_Q, B_b = W_K^T Sigma_b W_K.

    Args:
        weights: folded.
        architecture: the model's.
        tokens: moments over the embedding rows.
        positions: moments over the rows of W_pos.
        bases: bases for the heads' queries and keys, if a caller has them.

    Returns:
        `qk_share_{query part}_{key part}`, which sum to 1, and `qk_positional_share`, the sum over the three whose key
        part is `position`; each [head] in [0, 1], and 0 for zero weights.
    """
    kv = architecture.kv_of_head.to(weights.W_K.device)
    query, key = (Basis(weights.W_Q), Basis(weights.W_K)) if bases is None else bases
    constant = mean_through(tokens.mean + positions.mean, weights.W_Q) + weights.b_Q.double()
    rows = {"content": tokens, "position": positions}
    queries = {name: query.second_moment(moments.gram) / moments.n for name, moments in rows.items()}
    queries = {"constant": outer(constant), **queries}
    keys = {name: key.second_moment(moments.gram)[kv] / moments.n for name, moments in rows.items()}
    parts = {(a, b): (queries[a] * keys[b]).sum((-2, -1)) for a in queries for b in keys}
    total = torch.stack(list(parts.values())).sum(0)
    shares = {f"qk_share_{a}_{b}": _share(value, total) for (a, b), value in parts.items()}
    positional = sum(value for (_, b), value in parts.items() if b == "position")
    return {**shares, "qk_positional_share": _share(torch.as_tensor(positional), total)}


def rotary_span(weights: LayerWeights, architecture: Architecture) -> int:
    """Return L, how many offsets 0..L-1 to average over: 128, or the context or the sliding window if it is shorter."""
    bounds = (DEFAULT_SPAN, architecture.n_ctx, weights.sliding_window)
    return min(bound for bound in bounds if bound)


def rotary_shares(
    weights: LayerWeights, architecture: Architecture, moments: HeadMoments
) -> dict[str, Float[Tensor, " head"]]:
    """Split the score variance over (key token, offset) into three shares, for rotary positions.

    Keys k = x W_K + b_K have mean mu and covariance Sigma; S is the second moment of q = x W_Q + b_Q (both normalised
    if the model does so); offsets are uniform on 0..L-1 and Rbar is their mean rotation. The variance is averaged over
    query tokens (docs/definitions.md, section 4).

    Returns:
        `qk_share_position`, `qk_share_content`, `qk_share_interaction`, each [head] in [0, 1] and summing to 1, and
        `qk_positional_share`, which is the first. All are 0 for zero weights.

    Raises:
        ValueError: the layer has no rotary positions.
    """
    rotary = _required(weights)
    S, mu, sigma = moments.query_second, moments.key_mean, moments.key_covariance
    turns = _turns(rotary, rotary_span(weights, architecture), S.shape[-1])
    mean_of_products = turns.conj().mT @ turns / len(turns), turns.mT @ turns / len(turns)
    mean = turns.mean(0)
    product_of_means = torch.outer(mean.conj(), mean), torch.outer(mean, mean)
    queries, keys, mean_key = (_pairs(rotary, matrix) for matrix in (S, sigma, outer(mu)))
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
"""A symmetric matrix E[x^T x] as E[conj(z_a) z_b] and E[z_a z_b], with each pair of dimensions as one complex z."""


def _turns(rotary: Rotary, span: int, d_head: int) -> Complex[Tensor, "offset pair"]:
    """Return R(D)^T as one complex factor per pair of dimensions, D = 0..span-1; 1 if a dimension does not rotate."""
    cos, sin = rotary.angles(torch.arange(span))
    still = torch.ones(span, (d_head - 2 * rotary.inverse_frequencies.numel() + 1) // 2, dtype=torch.complex128)
    return torch.cat((torch.complex(cos, -sin), still.to(cos.device)), 1)


def _pairs(rotary: Rotary, matrix: Float[Tensor, "head d_head d_head"]) -> Pairs:
    """Return a symmetric matrix by its pairs of dimensions, those that do not rotate last."""
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
    """Return tr(S Sigma'), Sigma' the second matrix with its pairs multiplied by `turned`."""
    products = (s.conj() * x * turn for s, x, turn in zip(S, sigma, turned, strict=True))
    return sum(product.real.sum((-2, -1)) for product in products) / 2  # type: ignore[return-value]


def rotary_offset_scores(
    weights: LayerWeights, architecture: Architecture, moments: HeadMoments
) -> Float[Tensor, "head offset"]:
    """Return mu_q R_D mu_k^T: the score that the mean query gives the mean key, by offset D = 0..L-1, unscaled.

    Raises:
        ValueError: the layer has no rotary positions.
    """
    rotary = _required(weights)
    cos, sin = rotary.angles(torch.arange(rotary_span(weights, architecture)))
    turned = rotary.rotate(moments.query_mean[:, None, :], cos, sin)
    return torch.einsum("hox,hx->ho", turned, moments.key_mean)


def previous_token_auc_rotary(scores: Float[Tensor, "head offset"]) -> Float[Tensor, " head"]:
    """Return `qk_prev_auc` for rotary positions, in [0, 1]: the share of offsets D != 1 that score below D = 1.

    Ties count half; 0.5 by chance.
    """
    others = torch.cat((scores[:, :1], scores[:, 2:]), dim=1)
    return _below(others, scores[:, 1:2])


@dataclass(frozen=True)
class PositionScores:
    """What a layer's scores s_ij between positions alone (query i, key j <= i) say about each head.

    Attributes:
        offset_r2: adjusted R^2 for s_ij = a_i + f(i - j), relative to row means: at most 1, 0 for zero weights.
        previous_auc: the share of j <= i, j != i - 1, with s_ij below s_{i,i-1}, averaged over i >= 2; in [0, 1], ties
            half, 0.5 by chance.
        by_offset: mean score at each offset 0..T-1, before the attention scale.
    """

    offset_r2: Float[Tensor, " head"]
    previous_auc: Float[Tensor, " head"]
    by_offset: Float[Tensor, "head offset"]


def learned_position_scores(
    weights: LayerWeights, architecture: Architecture, W_pos: Float[Tensor, "n_ctx d_model"]
) -> PositionScores:
    """Score centred position embeddings against each other, and say whether the offset explains the scores.

    See docs/definitions.md, section 4. Weights are folded, without biases.

    Raises:
        ValueError: fewer than 4 positions leave no degree of freedom for the fit.
    """
    T = W_pos.shape[0]
    if T < 4:
        raise ValueError(f"an offset fit needs at least 4 positions, not {T}")
    exact = torch.float64 if T <= FLOAT64_POSITIONS_UP_TO else torch.float32
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
    centred = diagonals - row_means.flip(1).cumsum(1).flip(1)  # sums along diagonals of scores less their row means
    explained = ((centred @ solver) * centred).sum(-1)
    alive = total > 0
    r2 = torch.where(alive, 1 - (1 - explained / torch.where(alive, total, 1.0)) * degrees, 0.0)
    return PositionScores(r2, auc, diagonals / counts.flip(0))


def _squares_and_previous_auc(
    queries: Float[Tensor, "head T d_head"], keys: Float[Tensor, "head T d_head"]
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Return the sum of s_ij^2 over j <= i, and `qk_prev_auc`: a key below s(i, i-1) counts 1, an equal one 1/2.

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
    """Invert the normal equations for f in s_ij = a_i + f(i - j), with the row effects eliminated."""
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
    """Sum q_i . k_j along each diagonal i - j = D: a correlation over positions, by Fourier transforms."""
    T = queries.shape[1]
    q, k = (torch.fft.rfft(x, 2 * T, dim=1) for x in (queries, keys))
    return torch.fft.irfft((q * k.conj()).sum(-1), 2 * T, dim=1)[:, :T].double()


def _share(part: Float[Tensor, " head"], total: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    return torch.where(total > 0, part / torch.where(total > 0, total, 1.0), 0.0)


def _below(values: Float[Tensor, "head n"], than: Float[Tensor, "head #n"]) -> Float[Tensor, " head"]:
    return ((values < than).double() + 0.5 * (values == than).double()).mean(1)


def _required(weights: LayerWeights) -> Rotary:
    """Return the layer's rotation, float64, on its weights' device."""
    if weights.rotary is None:
        raise ValueError("the layer has no rotary positions")
    frequencies = weights.rotary.inverse_frequencies.to(weights.W_Q.device, torch.float64)
    return dataclasses.replace(weights.rotary, inverse_frequencies=frequencies)
