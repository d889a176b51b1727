"""Position or content: how much of a head's score variance over keys comes from where a key is, and how much from
what it is. A measured answer beside the seed page's reading of symmetry (definitions: section 4).

All on folded weights, for the head's bilinear form on its direct path: for layers >= 1 what earlier heads move into
the residual stream is not in it, and with learned positions the norm's joint scale of embedding and position is
ignored.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.heads import keys, queries
from ovqk.vocabulary import BLOCK, Vocabulary, blocks
from ovqk.weights import Architecture, LayerWeights, Rotary, normalise

DEFAULT_SPAN = 128  # offsets averaged over under rotary positions, unless the context is shorter


@dataclass(frozen=True)
class Moments:
    """First and second moments of embedding rows, float64: mean [d_model], covariance [d_model, d_model]."""

    mean: Float[Tensor, " d_model"]
    covariance: Float[Tensor, "d_model d_model"]


def row_moments(rows: Float[Tensor, "row d_model"]) -> Moments:
    """Mean and (population) covariance of rows."""
    exact = rows.double()
    mean = exact.mean(0)
    centred = exact - mean
    return Moments(mean, centred.T @ centred / rows.shape[0])


def token_moments(vocabulary: Vocabulary) -> Moments:
    """Moments of the plain embedding rows, from the Gram that is there already."""
    return Moments(vocabulary.mean.double(), vocabulary.gram_embed / vocabulary.size)


def token_rows(
    vocabulary: Vocabulary, architecture: Architecture, normalised: bool
) -> Iterator[Float[Tensor, "token d_model"]]:
    """Embedding rows in blocks of tokens, float64: plain, or normalised as a layer's norm would."""
    for rows in blocks(vocabulary.size, BLOCK // 4):
        x = vocabulary.W_E[rows].double()
        yield normalise(x, architecture.norm, architecture.norm_eps) if normalised else x


def normalised_moments(vocabulary: Vocabulary, architecture: Architecture) -> Moments:
    """Moments of embedding rows normalised as a layer's norm would, a block of tokens at a time."""
    d_model = vocabulary.W_E.shape[1]
    total = torch.zeros(d_model, dtype=torch.float64, device=vocabulary.W_E.device)
    second = torch.zeros(d_model, d_model, dtype=torch.float64, device=vocabulary.W_E.device)
    for x in token_rows(vocabulary, architecture, normalised=True):
        total += x.sum(0)
        second += x.T @ x
    mean = total / vocabulary.size
    return Moments(mean, second / vocabulary.size - torch.outer(mean, mean))


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


def head_moments(weights: LayerWeights, architecture: Architecture, tokens: Moments) -> HeadMoments:
    """Moments of q = x W_Q + b_Q and k = x W_K + b_K, from those of the rows x.

    Raises:
        ValueError: queries and keys are normalised, so that they are not linear in x.
    """
    if weights.qk_norm is not None:
        raise ValueError("normalised queries and keys are not linear in the rows: see normalised_head_moments")
    kv = architecture.kv_of_head.to(weights.W_K.device)
    W_Q, W_K = weights.W_Q.double(), weights.W_K.double()[kv]
    query_mean = tokens.mean @ W_Q + weights.b_Q.double()
    return HeadMoments(
        query_mean=query_mean,
        query_second=W_Q.mT @ tokens.covariance @ W_Q + _outer(query_mean),
        key_mean=tokens.mean @ W_K + weights.b_K.double()[kv],
        key_covariance=W_K.mT @ tokens.covariance @ W_K,
    )


def normalised_head_moments(
    weights: LayerWeights, architecture: Architecture, rows: Iterable[Float[Tensor, "_ d_model"]]
) -> HeadMoments:
    """Moments of normalised queries and keys, token by token (blocks of rows of any size, as from `token_rows`)."""
    n, sums = 0, [torch.zeros((), dtype=torch.float64)] * 4
    for x in rows:
        q, k = queries(weights, x), keys(weights, x)
        n += x.shape[0]
        sums = [total + part for total, part in zip(sums, (q.sum(1), q.mT @ q, k.sum(1), k.mT @ k), strict=True)]
    query_mean, query_second, key_mean, key_second = (total / n for total in sums)
    kv = architecture.kv_of_head.to(key_mean.device)
    return HeadMoments(query_mean, query_second, key_mean[kv], (key_second - _outer(key_mean))[kv])


def _outer(x: Float[Tensor, "head d_head"]) -> Float[Tensor, "head d_head d_head"]:
    return x[:, :, None] * x[:, None, :]


def learned_shares(
    weights: LayerWeights, architecture: Architecture, tokens: Moments, positions: Moments
) -> dict[str, Float[Tensor, " head"]]:
    """The six shares of the score variance over keys, and their positional sum (learned positions).

    The query is q0 = mean token + mean position (with b_Q), plus centred content, plus centred position; the key is
    centred content plus centred position. Over independent uniform tokens and positions the variance of the score
    over keys, averaged over queries, is the sum of tr(A_a B_b), A_a = W_Q^T S_a W_Q, B_b = W_K^T Sigma_b W_K.

    Returns:
        `qk_share_{constant,content,position}_{content,position}` and `qk_positional_share`, each [head] in [0, 1].
    """
    W_Q, b_Q = weights.W_Q.double(), weights.b_Q.double()
    W_K = weights.W_K.double()[architecture.kv_of_head.to(weights.W_K.device)]
    constant = (tokens.mean + positions.mean) @ W_Q + b_Q  # [head, d_head]
    queries = {
        "constant": constant[:, :, None] * constant[:, None, :],
        "content": W_Q.mT @ tokens.covariance @ W_Q,
        "position": W_Q.mT @ positions.covariance @ W_Q,
    }
    keys = {
        "content": W_K.mT @ tokens.covariance @ W_K,
        "position": W_K.mT @ positions.covariance @ W_K,
    }
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
    offsets = torch.arange(rotary_span(weights, architecture))
    cos, sin = rotary.angles(offsets)
    mean_cos, mean_sin = cos.mean(0), sin.mean(0)

    turned_mean = rotary.rotate(mu[:, None, :], cos, -sin)  # mu R_D^T, [head, offset, d_head]
    mean_key = rotary.rotate(mu, mean_cos, -mean_sin)  # mu Rbar^T
    position = _quadratic(turned_mean, S[:, None]).mean(1) - _quadratic(mean_key, S)
    content = (S * _conjugate(rotary, sigma, mean_cos, mean_sin)).sum((-2, -1))
    both = torch.zeros_like(content)
    for rows in blocks(len(offsets), 16):  # [head, offset, d_head, d_head] is never held for all offsets
        turned = _conjugate(rotary, sigma[:, None], cos[rows, None], sin[rows, None])
        both += (S[:, None] * turned).sum((-3, -2, -1))
    interaction = both / len(offsets) - content
    total = position + content + interaction
    shares = {
        "qk_share_position": _share(position, total),
        "qk_share_content": _share(content, total),
        "qk_share_interaction": _share(interaction, total),
    }
    return {**shares, "qk_positional_share": shares["qk_share_position"]}


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
    positions = W_pos.double() - W_pos.double().mean(0)
    queries = positions @ weights.W_Q.double()  # [head, T, d_head]
    keys = (positions @ weights.W_K.double())[architecture.kv_of_head.to(W_pos.device)]
    solver = _offset_design(T).to(W_pos.device)
    counts = torch.arange(1, T + 1, dtype=torch.float64, device=W_pos.device)
    future = torch.ones(T, T, dtype=torch.bool, device=W_pos.device).triu(1)
    degrees = (T * (T + 1) // 2 - T) / (T * (T + 1) // 2 - 2 * T + 1)
    r2, auc, profiles = [], [], []
    for query, key in zip(queries, keys, strict=True):  # one head at a time: s is [T, T]
        scores = query @ key.T
        previous = scores.diagonal(-1)[1:, None]  # s(i, i-1) for i = 2..T-1
        seen = scores.masked_fill(future, math.inf)[2:]
        below = (seen < previous).sum(1) + 0.5 * ((seen == previous).sum(1) - 1)  # less the tie of i-1 with itself
        auc.append((below / counts[1:-1]).mean())

        lower = scores.masked_fill_(future, 0.0)
        row_sums, diagonals = lower.sum(1), _diagonal_sums(lower)
        row_means = row_sums / counts
        total = lower.square().sum() - row_sums @ row_means  # about the row means
        centred = diagonals - row_means.flip(0).cumsum(0).flip(0)  # diagonal sums of the scores less their row means
        explained = centred @ solver @ centred
        r2.append(1 - (1 - explained / total) * degrees if total > 0 else torch.zeros_like(total))
        profiles.append(diagonals / counts.flip(0))
    return PositionScores(torch.stack(r2), torch.stack(auc), torch.stack(profiles))


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


def _diagonal_sums(lower: Float[Tensor, "T T"]) -> Float[Tensor, " T"]:
    """Sum over each diagonal i - j = D of a lower triangular matrix."""
    T = lower.shape[0]
    # Rows of 2 T read as rows of 2 T - 1 move row i by i places, which turns diagonals into columns.
    padded = torch.nn.functional.pad(lower.flip(1), (0, T))
    sheared = padded.flatten()[: T * (2 * T - 1)].reshape(T, 2 * T - 1)
    return sheared.sum(0)[T - 1 :]


def _conjugate(
    rotary: Rotary,
    sigma: Float[Tensor, "... d_head d_head"],
    cos: Float[Tensor, "... pair"],
    sin: Float[Tensor, "... pair"],
) -> Float[Tensor, "... d_head d_head"]:
    """R Sigma R^T, for a symmetric Sigma; the rotations' leading axes broadcast against those of Sigma's rows."""
    half = rotary.rotate(sigma, cos, -sin)  # Sigma R^T
    return rotary.rotate(half.mT, cos, -sin)  # (R Sigma) R^T, as (Sigma R^T)^T = R Sigma


def _quadratic(x: Float[Tensor, "*batch d_head"], S: Float[Tensor, "*#batch d_head d_head"]) -> Float[Tensor, "*batch"]:
    return ((x[..., None, :] @ S)[..., 0, :] * x).sum(-1)


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
