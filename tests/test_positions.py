"""Shares against a brute-force variance, and position heads with known answers."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import rotation
from support.small import Random, run, task

from ovqk.circuits import grams, moments
from ovqk.circuits.moments import head_moments, normalised_head_moments, row_moments, sample_rows, sample_step
from ovqk.circuits.positions import (
    learned_position_scores,
    learned_shares,
    previous_token_auc_rotary,
    rotary_offset_scores,
    rotary_shares,
    rotary_span,
)
from ovqk.weights.norms import QueryKeyNorm, normalise
from ovqk.weights.rotary import Rotary
from ovqk.weights.stored_rows import StoredRows
from ovqk.weights.types import Architecture, LayerWeights, keys, queries


def facts(**changes) -> Architecture:
    base = {
        "family": "test",
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_model": 8,
        "d_head": 4,
        "n_ctx": 7,
        "norm": "none",
        "norm_eps": 1e-5,
        "positions": "learned",
    }
    return Architecture(**base | changes)


def layer(architecture: Architecture, seed: int) -> LayerWeights:
    g = torch.Generator().manual_seed(seed)
    H, K, d, h = architecture.n_heads, architecture.n_kv_heads, architecture.d_model, architecture.d_head
    shapes = [(H, d, h), (K, d, h), (K, d, h), (H, h, d), (H, h), (K, h), (K, h)]
    return LayerWeights(0, *(torch.randn(shape, generator=g) for shape in shapes), norm=None)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_the_six_learned_shares_sum_to_one_and_match_a_brute_force_variance(seed: int) -> None:
    architecture = facts(n_kv_heads=1)
    weights = layer(architecture, seed)
    g = torch.Generator().manual_seed(seed + 1)
    W_E, W_pos = torch.randn(6, 8, generator=g), torch.randn(7, 8, generator=g)
    shares = learned_shares(weights, architecture, row_moments(W_E), row_moments(W_pos))
    six = [name for name in shares if name != "qk_positional_share"]
    assert len(six) == 6
    assert torch.allclose(sum(shares[name] for name in six), torch.ones(2, dtype=torch.float64))
    positional = sum(shares[name] for name in six if name.endswith("_position"))
    assert torch.allclose(shares["qk_positional_share"], positional)

    E, P = W_E.double(), W_pos.double()
    for head in range(2):
        queries = (E[:, None] + P[None]).reshape(-1, 8) @ weights.W_Q[head].double() + weights.b_Q[head].double()
        k_content, k_position = (E - E.mean(0)) @ weights.W_K[0].double(), (P - P.mean(0)) @ weights.W_K[0].double()
        keys = (k_content[:, None] + k_position[None]).reshape(-1, 4)
        total = (queries @ keys.T).var(1, unbiased=False).mean()
        by_position = (queries @ k_position.T).var(1, unbiased=False).mean()
        assert float(shares["qk_positional_share"][head]) == pytest.approx(float(by_position / total), abs=1e-9)
        constant = (E.mean(0) + P.mean(0)) @ weights.W_Q[head].double() + weights.b_Q[head].double()
        alone = (constant @ k_content.T).var(unbiased=False) / total
        assert float(shares["qk_share_constant_content"][head]) == pytest.approx(float(alone), abs=1e-9)
        content = (((E - E.mean(0)) @ weights.W_Q[head].double()) @ k_position.T).var(1, unbiased=False).mean() / total
        assert float(shares["qk_share_content_position"][head]) == pytest.approx(float(content), abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([None, "per_head", "over_heads"]))
def test_the_three_rotary_shares_sum_to_one_and_match_a_brute_force_variance(seed, partial, grouped, norm) -> None:
    frequencies = torch.tensor([1.0]) if partial else torch.tensor([1.0, 0.1])
    architecture = facts(positions="rotary", n_kv_heads=1 if grouped else 2)
    weights = dataclasses.replace(layer(architecture, seed), rotary=Rotary(frequencies))
    W_E = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed + 1))
    if norm is None:
        moments = head_moments(weights, architecture, row_moments(W_E))
    else:
        g = torch.Generator().manual_seed(seed + 2)
        gains = torch.rand(2, 4, generator=g) + 0.5, torch.rand(architecture.n_kv_heads, 4, generator=g) + 0.5
        weights = dataclasses.replace(weights, qk_norm=QueryKeyNorm(*gains, 1e-6, over_heads=norm == "over_heads"))
        with pytest.raises(ValueError, match="not linear in the rows"):
            head_moments(weights, architecture, row_moments(W_E))
        moments, _ = normalised_head_moments(weights, architecture, W_E.double())
    shares = rotary_shares(weights, architecture, moments)
    three = ["qk_share_position", "qk_share_content", "qk_share_interaction"]
    assert torch.allclose(sum(shares[name] for name in three), torch.ones(2, dtype=torch.float64))
    assert torch.equal(shares["qk_positional_share"], shares["qk_share_position"])

    L = rotary_span(weights, architecture)
    assert L == 7
    profile = rotary_offset_scores(weights, architecture, moments)
    for head in range(2):
        kv = 0 if grouped else head
        q = W_E.double() @ weights.W_Q[head].double() + weights.b_Q[head].double()
        k = W_E.double() @ weights.W_K[kv].double() + weights.b_K[kv].double()
        if norm is not None:
            every_q = torch.cat([W_E.double() @ weights.W_Q[i].double() + weights.b_Q[i].double() for i in range(2)], 1)
            kv_heads = range(architecture.n_kv_heads)
            every_k = torch.cat([W_E.double() @ weights.W_K[i].double() + weights.b_K[i].double() for i in kv_heads], 1)
            joint = norm == "over_heads"
            q = q / ((every_q if joint else q).square().mean(1, keepdim=True) + 1e-6).sqrt() * gains[0][head].double()
            k = k / ((every_k if joint else k).square().mean(1, keepdim=True) + 1e-6).sqrt() * gains[1][kv].double()
        R = [rotation(weights.rotary, 4, D) for D in range(L)]
        scores = torch.stack([q @ R[D] @ k.T for D in range(L)])  # [D, query, key]
        total = scores.permute(1, 0, 2).reshape(6, -1).var(1, unbiased=False).mean()
        position = scores.mean(2).var(0, unbiased=False).mean()  # over D, of the mean over keys
        content = scores.mean(0).var(1, unbiased=False).mean()  # over keys, of the mean over D
        assert float(shares["qk_share_position"][head]) == pytest.approx(float(position / total), abs=1e-9)
        assert float(shares["qk_share_content"][head]) == pytest.approx(float(content / total), abs=1e-9)
        mean_scores = [float(q.mean(0) @ R[D] @ k.mean(0)) for D in range(L)]
        assert profile[head].tolist() == pytest.approx(mean_scores)
        wanted = sum(mean_scores[D] < mean_scores[1] for D in range(L) if D != 1) / (L - 1)
        assert float(previous_token_auc_rotary(profile)[head]) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["none", "rmsnorm", "layernorm"])
@pytest.mark.parametrize("over_heads", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("eps", [1e-14, 0.1])
def test_moments_of_normalised_queries_are_those_of_every_token(kind, over_heads, biased, eps, monkeypatch) -> None:
    """In one pass for plain and normalised rows; with a small eps both have the same queries under an RMS norm."""
    architecture = facts(positions="rotary", norm=kind, n_kv_heads=1)
    weights, g = layer(architecture, 3), torch.Generator().manual_seed(4)
    if not biased:
        weights = dataclasses.replace(weights, b_Q=torch.zeros(2, 4), b_K=torch.zeros(1, 4))
    norm = QueryKeyNorm(torch.rand(2, 4, generator=g), torch.rand(1, 4, generator=g), eps, over_heads)
    weights, W_E = dataclasses.replace(weights, qk_norm=norm), 3 * torch.randn(50, 8, generator=g).double()
    monkeypatch.setattr(grams, "BLOCK", 16)
    both = normalised_head_moments(weights, architecture, W_E)
    for found, rows in zip(both, (W_E, normalise(W_E, kind, architecture.norm_eps)), strict=True):
        q, k = queries(weights, rows), keys(weights, rows).expand(2, -1, -1)
        assert torch.allclose(found.query_mean, q.mean(1), rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.query_second, q.mT @ q / 50, rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.key_mean, k.mean(1), rtol=1e-9, atol=1e-12)
        centred = k - k.mean(1, keepdim=True)
        assert torch.allclose(found.key_covariance, centred.mT @ centred / 50, rtol=1e-9, atol=1e-12)
    same = torch.allclose(both[0].query_second, both[1].query_second, rtol=1e-6)
    assert same == (kind == "none" or (kind == "rmsnorm" and not biased and eps < 0.1))


def test_a_large_vocabulary_is_sampled_in_even_steps_and_a_small_one_is_read_whole(monkeypatch) -> None:
    assert [sample_step(n, 640) for n in (100, 49152, 65535, 65536, 262144)] == [1, 1, 1, 2, 8]
    assert sample_step(262144, 8192) == 32  # long rows: 8,192 tokens
    W_E = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(moments, "BLOCK", 16)
    assert torch.equal(sample_rows(W_E), W_E)
    monkeypatch.setattr(moments, "SAMPLE", 30)
    for rows in (W_E, StoredRows(lambda start, stop: W_E[start:stop], (100, 8))):
        assert torch.equal(sample_rows(rows), W_E[::3])


def test_shares_of_a_sample_are_near_those_of_all_tokens_and_the_record_says_so(monkeypatch) -> None:
    source, made = Random("qk-norm"), task()
    whole = run(source, made)
    assert not any("moments are taken over" in note for note in whole.notes)
    monkeypatch.setattr(moments, "SAMPLE", 60)
    sampled = run(source, made)
    assert any("taken over one in 2 of 120 tokens" in note for note in sampled.notes)
    names = ["qk_share_position", "qk_share_content", "qk_share_interaction"]
    gap = (whole.tables["heads"][names] - sampled.tables["heads"][names]).abs()
    assert 0 < gap.to_numpy().max() < 0.15
    assert sampled.tables["heads"][names].sum(axis=1).to_numpy() == pytest.approx(1)


def one_hot_layer(score: torch.Tensor) -> tuple[LayerWeights, Architecture, torch.Tensor]:
    """A head whose position-position score is (the double centring of) a given [T, T] matrix."""
    T = len(score)
    architecture = facts(n_heads=1, n_kv_heads=1, d_model=T, d_head=T, n_ctx=T)
    zeros = torch.zeros(1, T)
    W = torch.zeros(1, T, T)
    weights = LayerWeights(0, score[None].float(), torch.eye(T)[None], W, W, zeros, zeros, zeros, norm=None)
    return weights, architecture, torch.eye(T)


def test_a_previous_token_head_has_auc_one_and_its_mirror_zero() -> None:
    score = torch.diag(torch.ones(11), -1)
    found = learned_position_scores(*one_hot_layer(score))
    assert float(found.previous_auc) == 1
    assert float(learned_position_scores(*one_hot_layer(-score)).previous_auc) == 0


def test_a_pure_offset_head_has_offset_r2_one_whatever_the_profile() -> None:
    """s_ij = f(i - j) survives centring only up to row and column effects, so the raw scores are handed over."""
    T = 12
    g = torch.Generator().manual_seed(0)
    f = torch.randn(T, generator=g, dtype=torch.float64)
    i, j = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    toeplitz = f[(i - j).abs()]
    circulant = f[(i - j) % T]  # double centring of a circulant matrix is a circulant matrix
    found = learned_position_scores(*one_hot_layer(circulant))
    assert float(found.offset_r2) == pytest.approx(1, abs=1e-6)
    assert float(learned_position_scores(*one_hot_layer(toeplitz)).offset_r2) < 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 9))
def test_offset_r2_is_the_adjusted_r2_of_the_two_way_regression(seed: int, T: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weights, architecture, W_pos = one_hot_layer(torch.randn(T, T, generator=g))
    found = learned_position_scores(weights, architecture, W_pos)
    centred = torch.eye(T, dtype=torch.float64) - 1 / T
    s = centred @ weights.W_Q[0].double() @ centred
    cells = [(i, j) for i in range(T) for j in range(i + 1)]
    y = torch.stack([s[i, j] for i, j in cells])
    X = torch.zeros(len(cells), 2 * T, dtype=torch.float64)
    for row, (i, j) in enumerate(cells):
        X[row, i] = X[row, T + i - j] = 1
    residual = y - X @ torch.linalg.pinv(X) @ y
    rows = X[:, :T]
    total = y - rows @ torch.linalg.pinv(rows) @ y
    N = len(cells)
    r2 = 1 - (residual.square().sum() / (N - 2 * T + 1)) / (total.square().sum() / (N - T))
    assert float(found.offset_r2) == pytest.approx(float(r2), abs=1e-8)
    means = [float(torch.stack([s[i, i - D] for i in range(D, T)]).mean()) for D in range(T)]
    assert found.by_offset[0].tolist() == pytest.approx(means)
    auc = [sum(float(s[i, j] < s[i, i - 1]) for j in range(i + 1) if j != i - 1) / i for i in range(2, T)]
    assert float(found.previous_auc) == pytest.approx(sum(auc) / len(auc))


def test_previous_token_over_orthogonal_positions_is_positional_with_symmetry_zero() -> None:
    """Why symmetry does not tell position from content: this head is all position, and has symmetry 0."""
    from ovqk.circuits.factors import qk_factors
    from ovqk.circuits.maps import decompose
    from ovqk.circuits.spectra import spectrum_metrics

    weights, architecture, W_pos = one_hot_layer(torch.diag(torch.ones(11), -1))
    symmetry = spectrum_metrics(decompose(qk_factors(weights, architecture), centred=False))["symmetry"]
    assert float(symmetry) == pytest.approx(0, abs=1e-9)
    tokens = row_moments(torch.zeros(5, 12))
    assert float(learned_shares(weights, architecture, tokens, row_moments(W_pos))["qk_positional_share"]) == 1


def test_the_span_of_rotary_offsets_is_bounded_by_context_and_window() -> None:
    def span(n_ctx, window):
        architecture = facts(positions="rotary", n_ctx=n_ctx)
        weights = dataclasses.replace(layer(architecture, 0), sliding_window=window)
        return rotary_span(weights, architecture)

    assert span(4096, None) == 128
    assert span(4096, 32) == 32
    assert span(None, None) == 128
    assert span(16, None) == 16
