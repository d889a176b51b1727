"""Planted heads with known answers, invariances, and the order of the rank measures."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import regauge

from ovqk.circuits.factors import Factors
from ovqk.circuits.grams import centred_gram, precision
from ovqk.circuits.maps import Basis, decompose
from ovqk.circuits.orthonormal import power_of_two
from ovqk.circuits.spectra import (
    eigenvalues,
    full_circuit_singular_values,
    spectrum_metrics,
    trace_ratio,
    vocabulary_symmetry,
)
from ovqk.circuits.summed_qk import directionality, layer_metrics
from ovqk.config.schema import Circuit
from ovqk.weights.types import Architecture, LayerWeights


def factors(left: torch.Tensor, right: torch.Tensor, circuit: Circuit = Circuit.ov) -> Factors:
    return Factors(circuit, left[None].float(), right[None].float())


def random_factors(d: int, h: int, seed: int, heads: int = 1) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        Circuit.ov, torch.randn(heads, d, h, generator=generator), torch.randn(heads, h, d, generator=generator)
    )


def orthonormal(d: int, h: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def copying(M: Factors) -> float:
    """ov_copying with an orthonormal vocabulary: embedding and unembedding are the identity."""
    decomposition = decompose(M, centred=False)
    return float(trace_ratio(eigenvalues(decomposition.core()), decomposition.sigma.sum(-1)))


def test_a_planted_copy_head_copies_and_its_negation_suppresses() -> None:
    Q = orthonormal(16, 4)
    assert copying(factors(Q, Q.T)) == pytest.approx(1, abs=1e-6)
    assert copying(factors(Q, -Q.T)) == pytest.approx(-1, abs=1e-6)


def test_a_rotation_by_90_degrees_neither_copies_nor_suppresses() -> None:
    Q = orthonormal(16, 4)
    turn = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]], dtype=torch.float64)
    metrics = spectrum_metrics(decompose(factors(Q @ turn, Q.T), centred=False))
    assert float(metrics["trace_ratio"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["skew_rotation"]) == pytest.approx(1, abs=1e-6)
    assert float(metrics["symmetry"]) == pytest.approx(-1, abs=1e-6)
    assert float(metrics["nonnormality"]) == pytest.approx(0, abs=1e-3)


def test_a_nilpotent_head_scores_zero_and_symmetrising_first_would_say_one_half() -> None:
    """e_1 -> e_2 -> 0: eigenvalues 0. (M + M^T)/2 would have +-1/2."""
    Q = orthonormal(16, 4)
    read, write = Q[:, :2], Q[:, 2:]
    metrics = spectrum_metrics(decompose(factors(read, write.T), centred=False))
    assert float(metrics["trace_ratio"]) == 0
    assert float(metrics["symmetry"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["nonnormality"]) == pytest.approx(1, abs=1e-6)


def test_same_token_matching_is_symmetric() -> None:
    Q = orthonormal(16, 4)
    metrics = spectrum_metrics(decompose(factors(Q, Q.T, Circuit.qk), centred=False))
    assert float(metrics["symmetry"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("w", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("D", [1, 3])
def test_a_planted_shift_has_symmetry_cos_2wd(w: float, D: int) -> None:
    """Keys turned by w D against queries: M = Q R(D) Q^T, tr(M M)/|M|^2 = cos(2 w D)."""
    Q = orthonormal(16, 2)
    c, s = math.cos(w * D), math.sin(w * D)
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    metrics = spectrum_metrics(decompose(factors(Q @ turn, Q.T, Circuit.qk), centred=False))
    assert float(metrics["symmetry"]) == pytest.approx(math.cos(2 * w * D), abs=1e-6)


def test_read_and_write_sides_are_not_swapped_and_vh_is_not_v() -> None:
    """M = a b^T reads along a and writes along b."""
    a, b = torch.zeros(8), torch.zeros(8)
    a[2], b[5] = 3.0, 2.0
    decomposition = decompose(factors(a[:, None], b[None]), centred=False)
    assert decomposition.read[0, :, 0].abs().argmax() == 2
    assert decomposition.write[0, :, 0].abs().argmax() == 5
    assert float(decomposition.sigma[0, 0]) == pytest.approx(6)
    M = random_factors(8, 3, seed=0)
    decomposition = decompose(M, centred=False)
    rebuilt = decomposition.read * decomposition.sigma[:, None] @ decomposition.write.mT
    assert torch.allclose(rebuilt, M.left.double() @ M.right.double(), atol=1e-5)
    assert torch.allclose(decomposition.balanced_left @ decomposition.balanced_right, rebuilt, atol=1e-6)


def test_a_head_of_zero_weights_scores_zero_everywhere() -> None:
    metrics = spectrum_metrics(decompose(factors(torch.zeros(8, 3), torch.zeros(3, 8)), centred=False))
    assert all(float(value) == 0 for value in metrics.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 10**6))
def test_a_gauge_of_the_head_changes_nothing(seed: int, h: int, gauge_seed: int) -> None:
    """W_V A, A^-1 W_O for any invertible A, and ovqk's own orthogonal gauge."""
    M = random_factors(12, h, seed)
    generator = torch.Generator().manual_seed(gauge_seed)
    A = torch.eye(h, dtype=torch.float64) + 0.3 * torch.randn(h, h, generator=generator, dtype=torch.float64)
    if torch.linalg.cond(A) > 50:
        return
    other = Factors(Circuit.ov, M.left.double() @ A, torch.linalg.inv(A) @ M.right.double())
    one = spectrum_metrics(decompose(M, centred=False))
    for same in (other, regauge(M, gauge_seed)):
        two = spectrum_metrics(decompose(same, centred=False))
        for name in set(one) - {"rank90"}:
            assert float(one[name]) == pytest.approx(float(two[name]), abs=2e-4, rel=2e-4), name


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0.0, 4.0))
def test_the_rank_measures_are_ordered(seed: int, h: int, decay: float) -> None:
    M = random_factors(12, h, seed)
    scales = torch.exp(-decay * torch.arange(h))
    M = Factors(Circuit.ov, M.left * scales, M.right)
    m = {name: float(value) for name, value in spectrum_metrics(decompose(M, centred=False)).items()}
    sigma = decompose(M, centred=False).sigma[0]
    middle = float(sigma.sum() ** 2 / sigma.square().sum())
    chain = [1, m["stable_rank"], m["participation_ratio"], m["effective_rank_energy"], middle, m["effective_rank"], h]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(chain))
    assert 0 <= m["flatness"] <= 1 + 1e-12
    assert 1 <= m["rank90"] <= h
    assert -1 <= m["trace_ratio"] <= 1 and -1 - 1e-12 <= m["symmetry"] <= 1 + 1e-12
    assert 0 <= m["skew_rotation"] <= 1 and 0 <= m["nonnormality"] <= 1


def test_iid_heads_have_symmetry_mean_1_over_d_and_sd_sqrt_2_over_d() -> None:
    """A full-rank iid matrix of d x d: tr(M M)/|M|^2 has mean 1/d and sd sqrt(2)/d."""
    d, n = 24, 4000
    M = torch.randn(n, d, d, generator=torch.Generator().manual_seed(0))
    identity = torch.eye(d).expand(n, d, d)
    symmetry = spectrum_metrics(decompose(Factors(Circuit.qk, M, identity), centred=False))["symmetry"]
    assert float(symmetry.mean()) == pytest.approx(1 / d, abs=4 * math.sqrt(2) / d / math.sqrt(n))
    assert float(symmetry.std()) == pytest.approx(math.sqrt(2) / d, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_full_circuits_through_cores_equal_the_vocabulary_matrix(seed: int, V: int) -> None:
    """Also for a vocabulary smaller than d_head, whose full circuits are rank-deficient."""
    d, h = 10, 4
    generator = torch.Generator().manual_seed(seed)
    W_E = torch.randn(V, d, generator=generator)
    W_U = torch.randn(d, V, generator=generator)
    M = random_factors(d, h, seed + 1)
    C = torch.eye(V, dtype=torch.float64) - 1 / V
    matrix = C @ W_E.double() @ (M.left[0].double() @ M.right[0].double()) @ W_U.double() @ C
    decomposition = decompose(M, centred=False)
    gram_in, gram_out = centred_gram(W_E, W_E), centred_gram(W_U.T.contiguous(), W_U.T.contiguous())
    sigma = full_circuit_singular_values(decomposition, gram_in, gram_out)[0]
    wanted = torch.linalg.svdvals(matrix)
    k = min(h, V)
    assert torch.allclose(sigma[:k], wanted[:k], atol=1e-3 * float(wanted[0]))
    found = eigenvalues(decomposition.core(centred_gram(W_U.T.contiguous(), W_E)))[0].abs()
    eigen = torch.linalg.eigvals(matrix).abs().sort(descending=True).values[:h]
    assert torch.allclose(found[: V - 1], eigen[: V - 1], atol=1e-3 * float(wanted[0]))
    full = C @ W_E.double() @ (M.left[0].double() @ M.right[0].double()) @ W_E.T.double() @ C
    symmetry = torch.trace(full @ full) / full.square().sum()
    assert float(vocabulary_symmetry(decomposition, gram_in)) == pytest.approx(float(symmetry), abs=1e-4)


def test_a_constant_on_every_token_is_invisible() -> None:
    """Adding one vector to all embeddings or unembeddings moves no Gram."""
    generator = torch.Generator().manual_seed(0)
    W_E, W_U = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)
    shift = torch.randn(8, generator=generator)
    assert torch.allclose(centred_gram(W_U, W_E), centred_gram(W_U + shift, W_E - shift), atol=1e-4)


def test_directionality_is_positive_when_keys_dominate() -> None:
    """Columns (keys) with outlying norms: positive; the transpose: the negative."""
    matrix = torch.eye(40, dtype=torch.float64)
    matrix[:, 0] = 5.0
    assert directionality(matrix) > 0.5
    assert directionality(matrix.T) == pytest.approx(-directionality(matrix))
    assert directionality(torch.eye(40, dtype=torch.float64)) == 0


@pytest.mark.parametrize("scale", [1e-20, 1e-42])
@pytest.mark.parametrize("d_model", [64, 520])
def test_a_head_of_tiny_weights_has_the_metrics_of_its_weights(scale, d_model) -> None:
    """Subnormal weights, at widths on both sides of where products are float32: neither an error nor zeros."""
    weights = torch.randn(3, d_model, 8, generator=torch.Generator().manual_seed(0))
    tiny = (weights.double() * scale).float()  # rounded to the few bits that a subnormal has
    back = (tiny.double() / scale).float()
    rows = torch.randn(30, d_model, generator=torch.Generator().manual_seed(1))
    gram = (rows - rows.mean(0)).T.double() @ (rows - rows.mean(0)).double()
    gram = gram.to(precision(d_model))
    one, two = (decompose(Factors(Circuit.ov, x, x.roll(1, 0).mT.contiguous()), centred=False) for x in (tiny, back))
    mine, own = spectrum_metrics(one), spectrum_metrics(two)
    for name, value in own.items():
        size = scale**2 if name in ("frobenius_norm", "spectral_norm") else 1.0
        assert torch.allclose(mine[name] / size, value, rtol=1e-4, atol=1e-6), name
    sigma, expected = (full_circuit_singular_values(maps, gram, gram) for maps in (one, two))
    assert torch.allclose(sigma / scale**2, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_powers_of_two_change_no_digit() -> None:
    weights = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    one, two = Basis(weights), Basis(weights * 2.0**-40)
    assert torch.equal(one.rows, two.rows) and torch.equal(one.coordinates * 2.0**-40, two.coordinates)
    assert power_of_two(torch.tensor([0.0, 1.0, 3.0, 2.0**-149])).tolist() == [1.0, 2.0, 4.0, 2.0**-148]


@pytest.mark.parametrize("d_model", [64, 520])
def test_a_layer_of_tiny_weights_has_the_metrics_of_its_weights(d_model) -> None:
    facts = Architecture("test", 1, 2, 2, d_model, 8, None, "none", 1e-5, "none")

    def metrics(exponent: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        W = [torch.randint(-8, 9, (2, d_model, 8), generator=generator) * 2.0**exponent for _ in range(4)]
        weights = LayerWeights(0, W[0], W[1], W[2], W[3].mT, *(torch.zeros(2, 8) for _ in range(3)), norm=None)
        return layer_metrics(weights, weights, facts)

    assert metrics(0) == metrics(-149) and any(metrics(0).values())
