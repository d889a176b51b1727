"""Grams through triangular roots: which have one, and that heads see the same Gram through it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovqk.circuits import grams
from ovqk.circuits.grams import RootedGram, dense, rooted, triangular_root
from ovqk.circuits.maps import Basis, FactoredMaps
from ovqk.circuits.spectra import eigenvalues, full_circuit_singular_values, vocabulary_symmetry
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.config.schema import Circuit
from ovqk.weights.stored_rows import StoredRows

HEADS, KV_HEADS, D_HEAD, TOKENS = 4, 2, 3, 90


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tied_vocabulary(d_model: int, centred: bool) -> Vocabulary:
    """Return embeddings that are one matrix in the checkpoint, W_U with a gain, as folding leaves them."""
    matrix = normal(TOKENS, d_model, seed=1) * torch.logspace(0, -2, d_model) + 2
    rows = StoredRows(lambda start, stop: matrix[start:stop].clone(), (TOKENS, d_model))
    gain = 1 + 0.3 * normal(d_model, seed=2)
    return Vocabulary(rows.folded(None, centred), rows.folded(gain, centred))


def grouped_maps(d_model: int, shared_left: bool) -> FactoredMaps:
    """Return heads that share their bases on one side by two, as W_K and W_V are under grouped queries."""
    few, many = Basis(normal(KV_HEADS, d_model, D_HEAD, seed=3)), Basis(normal(HEADS, d_model, D_HEAD, seed=4))
    kv, every = torch.arange(HEADS) // 2, torch.arange(HEADS)
    left, right, left_of, right_of = (few, many, kv, every) if shared_left else (many, few, every, kv)
    inner = left.coordinates[left_of] @ right.coordinates[right_of].mT
    return FactoredMaps(left, right, left_of, right_of, inner, D_HEAD)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([5, 130, 300]))
def test_a_root_gives_the_gram_back_and_only_its_lower_triangle_is_0(seed: int, extra: int, d_model: int) -> None:
    x = normal(d_model + extra, d_model, seed=seed).double()
    x = x - x.mean(0)
    gram = x.T @ x
    found = rooted(gram)
    assert isinstance(found, RootedGram)
    assert torch.equal(found.a.S, found.a.S.triu())
    assert torch.allclose(dense(found), gram, atol=1e-12 * float(gram.norm()))
    assert float(found.norm()) == pytest.approx(float(gram.norm()))
    columns = normal(2, 3, d_model, seed=seed + 1).double()
    assert torch.allclose(found.a.through(columns), columns @ found.a.S.T, atol=1e-10 * float(gram.norm()))


def test_rows_that_a_layernorm_centres_have_a_root_and_rows_of_lower_rank_have_none() -> None:
    """A null vector of all ones leaves the last pivot 0; two null vectors leave a pivot before it 0 or rounding."""
    x = normal(60, 20).double()
    x = x - x.mean(0)
    centred = x - x.mean(1, keepdim=True)
    root = triangular_root(centred.T @ centred)
    assert root is not None and root[-1, -1] < 1e-6 * root[0, 0]
    assert torch.allclose(root.T @ root, centred.T @ centred, atol=1e-10)
    few = x[:10] - x[:10].mean(0)
    assert isinstance(rooted(few.T @ few - 1e-9 * torch.eye(20)), torch.Tensor)
    assert isinstance(rooted(torch.zeros(20, 20).double()), torch.Tensor)


@pytest.mark.parametrize("d_model", [24, 520])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("circuit", [Circuit.qk, Circuit.ov])
@pytest.mark.parametrize("shared_left", [False, True])
def test_heads_see_a_tied_vocabulary_through_its_root_as_the_token_matrix_says(
    d_model, centred, circuit, shared_left, monkeypatch
) -> None:
    """Against singular values and eigenvalues of the materialised circuits, at widths of float64 and float32 Grams."""
    monkeypatch.setattr("ovqk.circuits.grams.ROOT_STRIPE", 7)
    vocabulary = tied_vocabulary(d_model, centred)
    full = vocabulary.full_circuit(circuit)
    assert full is not None
    assert isinstance(full.cross, RootedGram) == (d_model < TOKENS)  # 90 rows span no more dimensions
    maps = grouped_maps(d_model, shared_left)
    assert vocabulary.W_U_rows is not None
    E, U = vocabulary.W_E[:].double(), vocabulary.W_U_rows[:].double()
    E, U = E - E.mean(0), U - U.mean(0)
    U = E if circuit is Circuit.qk else U
    left = maps.left.rows[maps.left_of].mT.double()
    right = maps.right.rows[maps.right_of].double()
    matrices = E @ left @ maps.inner @ right @ U.T
    sigma = torch.linalg.svdvals(matrices)[:, :D_HEAD]
    found = full_circuit_singular_values(maps, full.read, full.write)
    assert torch.allclose(found, sigma, rtol=1e-4, atol=1e-5 * float(sigma.max()))
    eigen = torch.linalg.eigvals(matrices)
    largest = eigen.abs().sort(descending=True).values[:, :D_HEAD]
    assert torch.allclose(eigenvalues(maps.core(full.cross)).abs(), largest, atol=1e-4 * float(sigma.max()))
    if circuit is Circuit.qk:
        wanted = torch.stack([torch.trace(m @ m) / m.square().sum() for m in matrices])
        assert torch.allclose(vocabulary_symmetry(maps, full.read), wanted, atol=1e-4)
    for gram, a, b in ((full.read, E, E), (full.cross, U, E), (full.write, U, U)):
        assert torch.allclose(dense(gram).double(), a.T @ b, atol=1e-5 * float((a.T @ b).norm()))
        assert float(gram.norm()) == pytest.approx(float((a.T @ b).norm()), rel=1e-4)


def test_each_basis_goes_through_a_root_once_for_all_that_is_asked(monkeypatch) -> None:
    """Cores, both Grams and the symmetry take one product for each side, and layer moments take none besides."""
    vocabulary, passes = tied_vocabulary(24, centred=True), []
    through = Basis.through
    monkeypatch.setattr(Basis, "through", lambda self, root: (passes.append(self), through(self, root))[1])
    queries = grouped_maps(24, shared_left=False)
    values = grouped_maps(24, shared_left=True)
    for maps, circuit in ((queries, Circuit.qk), (values, Circuit.ov)):
        full = vocabulary.full_circuit(circuit)
        assert full is not None
        maps.core(full.cross)
        full_circuit_singular_values(maps, full.read, full.write)
        maps.rounded(0).core(full.cross)
        if circuit is Circuit.qk:
            vocabulary_symmetry(maps, full.read)
            maps.left.second_moment(vocabulary.gram_embed)
    assert passes == [queries.left, queries.right, values.left, values.right]


@pytest.mark.parametrize("shared_left", [True, False])
def test_a_matrix_goes_to_the_side_with_fewer_heads(shared_left, monkeypatch) -> None:
    gram, maps, passes = normal(24, 24, seed=7).double(), grouped_maps(24, shared_left), []
    times = Basis.times
    monkeypatch.setattr(Basis, "times", lambda self, *g, **how: (passes.append(self), times(self, *g, **how))[1])
    core = maps.core(gram)
    assert passes == [maps.left if shared_left else maps.right]
    left, right = maps.left.rows[maps.left_of].mT, maps.right.rows[maps.right_of]
    assert torch.allclose(core, maps.inner @ right @ gram @ left, atol=1e-12)


def test_a_large_gram_of_few_bits_far_from_its_first_tokens_is_exact_within_its_bound(monkeypatch) -> None:
    """Weights of 4 bits whose first tokens are unlike the rest: the shift misses the mean, and sums are large."""
    monkeypatch.setattr(grams, "FLOAT64_PRODUCTS_UP_TO", 0)
    x = (3 * normal(50_000, 40)).round().clamp(-8, 7) * 0.0317 + 0.35 * 0.0317
    x[: grams.SHIFT_TOKENS] -= 0.0317
    exact = (x.double() - x.double().mean(0)).T @ (x.double() - x.double().mean(0))
    assert float((grams.centred_gram(x, x) - exact).norm()) < 1e-6 * float(exact.norm())
    assert float((grams.mean_row(x) - x.double().mean(0)).norm()) < 1e-7 * float(x.double().norm(dim=1).mean())
