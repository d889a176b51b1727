"""Every per-head metric the naive way: everything materialised, float64, one head at a time, formula by formula.

Only the loading and folding of weights is ovqk's own (and is tested against TransformerLens elsewhere).
"""

import math

import numpy as np
import torch
from torch import Tensor

from ovqk.circuits.factors import Factors
from ovqk.weights.folding import fold_embeddings, fold_mlp, fold_reads
from ovqk.weights.norms import normalise
from ovqk.weights.types import EmbeddingWeights, LayerWeights, WeightSource


def rotation(rotary, d_head: int, D: int) -> Tensor:
    """R(D) as a matrix, float64, row convention: one 2 x 2 rotation for each pair of dimensions."""
    R = torch.eye(d_head, dtype=torch.float64)
    if rotary is None:
        return R
    frequencies = rotary.inverse_frequencies.double()
    n = len(frequencies)
    for k, w in enumerate(frequencies.tolist()):
        a, b = (2 * k, 2 * k + 1) if rotary.interleaved else (k, k + n)
        R[a, a], R[a, b], R[b, a], R[b, b] = math.cos(w * D), math.sin(w * D), -math.sin(w * D), math.cos(w * D)
        R[[a, b]] *= rotary.scale
    return R


def matrices(weights: LayerWeights, facts, head: int, R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W_OV and W_QK of one head, [d, d]; the gains of a norm of queries and keys are in W_QK."""
    kv = head // (facts.n_heads // facts.n_kv_heads)
    R = rotation(weights.rotary, facts.d_head, 0) if R is None else R
    W_OV = weights.W_V[kv].double() @ weights.W_O[head].double()
    W_Q, W_K = weights.W_Q[head].double(), weights.W_K[kv].double()
    if weights.qk_norm is not None:
        W_Q = W_Q @ torch.diag(weights.qk_norm.query_gain[head].double())
        W_K = W_K @ torch.diag(weights.qk_norm.key_gain[kv].double())
    return W_OV, W_Q @ R @ W_K.T


def query_key_scores(weights: LayerWeights, facts, head: int, R: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """e_t W_QK e_u^T; where the model normalises queries and keys, of the normalised ones, token by token."""
    if weights.qk_norm is None:
        return queries @ matrices(weights, facts, head, R)[1] @ keys.T
    norm, kv = weights.qk_norm, head // (facts.n_heads // facts.n_kv_heads)

    def own(x, W, b, gains, mine):
        rows = []
        for token in x.double():
            every = torch.stack([token @ W[i].double() + b[i].double() for i in range(len(W))])
            square = every.square().mean() if norm.over_heads else every[mine].square().mean()
            rows.append(every[mine] / torch.sqrt(square + norm.eps) * gains[mine].double())
        return torch.stack(rows)

    q = own(queries, weights.W_Q, weights.b_Q, norm.query_gain, head)
    k = own(keys, weights.W_K, weights.b_K, norm.key_gain, kv)
    return q @ R @ k.T


def spectral(M: Tensor, rank: int, structural: int) -> dict[str, float]:
    sigma = torch.linalg.svdvals(M)[:rank].numpy()
    lam = torch.linalg.eigvals(M).numpy()
    total, energy = sigma.sum(), sigma**2
    p, e = sigma / total, energy / energy.sum()
    fro2 = (M**2).sum().item()
    return {
        "trace_ratio": lam.sum().real / np.abs(lam).sum(),
        "symmetry": torch.trace(M @ M).item() / fro2,
        "skew_rotation": np.abs(lam.imag).sum() / np.abs(lam).sum(),
        "nonnormality": math.sqrt(max(0.0, fro2 - (np.abs(lam) ** 2).sum())) / math.sqrt(fro2),
        "frobenius_norm": math.sqrt(fro2),
        "spectral_norm": sigma[0],
        "stable_rank": energy.sum() / energy[0],
        "participation_ratio": energy.sum() ** 2 / (energy**2).sum(),
        "effective_rank_energy": math.exp(-(e * np.log(np.maximum(e, 1e-300))).sum()),
        "effective_rank": math.exp(-(p * np.log(np.maximum(p, 1e-300))).sum()),
        "rank90": int(np.searchsorted(e.cumsum(), 0.9 - 1e-12) + 1),
        "top_share": e[0],
        "flatness": math.exp(np.log(energy[:structural]).mean()) / energy[:structural].mean(),
    }


def centre_tokens(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)


def ratio(M: Tensor) -> float:
    lam = torch.linalg.eigvals(M).numpy()
    return lam.sum().real / np.abs(lam).sum()


ACTIVATIONS = {
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def after(norm, x: Tensor, eps: float) -> Tensor:
    """A norm after attention or MLP: root mean square and gain."""
    if norm is None:
        return x
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * norm.weight.double()


def block0_rows(source: WeightSource, E: EmbeddingWeights) -> Tensor:
    """r + MLP0(ln2(r)), r = W_E + sum over heads of ln1(W_E) W_V W_O, token by token, float64."""
    r, written = block0_parts(source, E)
    return r + written


def block0_parts(source: WeightSource, E: EmbeddingWeights) -> tuple[Tensor, Tensor]:
    """r = W_E + sum over heads of ln1(W_E) W_V W_O, and MLP0(ln2(r)), 0 without an MLP."""
    facts = source.architecture
    weights = fold_reads(source.layer(0), facts)
    W_E = E.W_E.double()
    x = normalise(W_E, facts.norm, facts.norm_eps)
    written = torch.zeros_like(W_E)
    for head in range(facts.n_heads):
        written += x @ matrices(weights, facts, head)[0]
    r = W_E + after(weights.post_norm, written, facts.norm_eps)
    mlp = source.first_mlp()
    if isinstance(mlp, str):
        return r, torch.zeros_like(r)
    folded = fold_mlp(mlp, facts)
    y = normalise(W_E if facts.parallel else r, facts.norm, facts.norm_eps)
    hidden = ACTIVATIONS[folded.activation](y @ folded.W_in.double() + folded.b_in.double())
    if folded.W_linear is not None:
        bias = 0.0 if folded.b_linear is None else folded.b_linear.double()
        hidden = hidden * (y @ folded.W_linear.double() + bias)
    return r, after(folded.post_norm, hidden @ folded.W_out.double() + folded.b_out.double(), facts.norm_eps)


def auc(L: Tensor, centred: bool) -> float:
    """Mean over t of the share of u != t with L_tu < L_tt (ties half), columns less their mean over the other rows."""
    L = L.double().numpy()
    if centred:
        L = L - np.stack([np.delete(L, t, axis=0).mean(axis=0) for t in range(len(L))])
    shares = []
    for t, row in enumerate(L):
        rest = np.delete(row, t)
        shares.append(np.mean((rest < row[t]) + 0.5 * (rest == row[t])))
    return float(np.mean(shares))


def margin(L: Tensor) -> float:
    """The mean over t of how many standard deviations L_tt stands above the other entries of its column."""
    found, L = [], L.double().numpy()
    for t in range(len(L)):
        others = np.delete(L[:, t], t)
        found.append((L[t, t] - others.mean()) / others.std(ddof=1))
    return float(np.mean(found))


def probes(n_tokens: int, n: int) -> Tensor:
    """Random tokens, none twice: row 0 those of composed margins, the others those of simulated attention."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(n_tokens, generator=generator)[:n] for _ in range(9)])


def simulated(weights: LayerWeights, facts, head: int, x: Tensor) -> dict[str, float]:
    """A head's attention on 2 n rows, query by query and key by key, at the places of the registry's metrics."""
    kv, norm, length = head // (facts.n_heads // facts.n_kv_heads), weights.qk_norm, len(x)

    def own(row: Tensor, W: Tensor, b: Tensor, gains, mine: int) -> Tensor:
        every = torch.stack([row @ W[i].double() + b[i].double() for i in range(len(W))])
        if norm is None:
            return every[mine]
        square = every.square().mean() if norm.over_heads else every[mine].square().mean()
        return every[mine] / torch.sqrt(square + norm.eps) * gains[mine].double()

    gains = (None, None) if norm is None else (norm.query_gain, norm.key_gain)
    k = [own(row, weights.W_K, weights.b_K, gains[1], kv) for row in x.double()]
    turn = [rotation(weights.rotary, facts.d_head, back) for back in range(length)]
    n, found = length // 2, dict.fromkeys(("previous", "duplicate", "induction", "self", "first"), 0.0)
    for i in range(n, length):
        q = own(x[i].double(), weights.W_Q, weights.b_Q, gains[0], head)
        scores = []
        for j in range(i + 1):
            hidden = weights.sliding_window is not None and i - j >= weights.sliding_window
            score = float(q @ turn[i - j] @ k[j])
            scores.append(-math.inf if hidden else score * (facts.attention_scale or facts.d_head**-0.5))
        p = torch.tensor(scores, dtype=torch.float64).softmax(0)
        at = {"previous": i - 1, "duplicate": i - n, "induction": i - n + 1, "self": i, "first": 0}
        found = {name: found[name] + float(p[place]) / n for name, place in at.items()}
    return found


def projector(rows: Tensor) -> Tensor:
    """Orthogonal projector on the span of rows."""
    Q = torch.linalg.qr(rows.T).Q
    return Q @ Q.T


def task_subspace(rows: Tensor, band: Tensor) -> tuple[Tensor, int]:
    """Projector on the leading directions of 90 % of the energy, and their number."""
    centred = rows.double() - band.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values, vectors = values.flip(0), vectors.flip(1)
    r = int((values.cumsum(0) / values.sum() < 0.9).sum()) + 1
    return vectors[:, :r] @ vectors[:, :r].T, r


def folded_embeddings(source: WeightSource) -> EmbeddingWeights:
    return fold_embeddings(source.embeddings(), source.architecture)


def regauge(factors: Factors, seed: int) -> Factors:
    """The same maps through a random orthogonal gauge of each head: left A, A^T right, rounded as the weights are.

    In exact arithmetic nothing changes; what does change is decided by rounding and not by the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, _, d_head = factors.left.shape
    noise = torch.randn(heads, d_head, d_head, generator=generator, dtype=torch.float64)
    gauge = torch.linalg.qr(noise).Q.to(factors.left.device)
    left = (factors.left.double() @ gauge).to(factors.left.dtype)
    right = (gauge.mT @ factors.right.double()).to(factors.right.dtype)
    return Factors(factors.circuit, left, right)
