"""Singular and eigen components of a head's map: planted heads, chains, equal values, clusters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import regauge
from support.token_tables import factored, ids, orthonormal, random, table, values

from ovqk.circuits import components as components_module
from ovqk.circuits.components import clusters, components, eigen_components
from ovqk.circuits.factors import Factors
from ovqk.circuits.maps import decompose
from ovqk.circuits.spectra import eigenvalues
from ovqk.config.schema import Circuit
from ovqk.report.token_lists import describe


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_eigen_components_add_up_to_the_head(seed: int, h: int, equal: bool) -> None:
    """sum lambda r l / (l . r) = M for a head with real eigenvalues, also where two of them are equal."""
    lam = torch.linspace(3, 1, h).double() * (-1.0) ** torch.arange(h)
    if equal and h > 1:
        lam[1] = lam[0]
    R = random(12, h, seed=seed)
    L = torch.linalg.pinv(R)
    M = (R * lam) @ L
    found = eigen_components(factored(R * lam, L), count=h)
    if (found.value.imag != 0).any():  # equal ones may be rounded to a pair
        assert equal and found.value.imag.max() < 1e-6
        return
    read, write, value = found.read[:, 0], found.write[:, 0], found.value.real
    overlap = (read * write).sum(-1)
    assert len(overlap) == h and (overlap > 0).all()
    assert torch.allclose(read @ M.T, value[:, None] * read, atol=1e-6)
    assert torch.allclose(write @ M, value[:, None] * write, atol=1e-6)
    assert torch.allclose(torch.stack([read.norm(dim=-1), write.norm(dim=-1)]), torch.ones(2, h).double())
    if not equal:
        assert torch.allclose((read.T * value / overlap) @ write, M, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_head_that_copies_all_it_reads_alike_writes_what_each_component_reads(seed: int) -> None:
    """Q Q^T: any basis will do (and pairs, by rounding), but what a component writes is what it reads."""
    Q = orthonormal(16, 5, seed)
    found = eigen_components(factored(Q, Q.T), count=5)
    assert found.cluster_size[0] == len(found.value) > 1
    assert torch.allclose(found.value, torch.ones_like(found.value))
    assert torch.allclose(found.read.mT @ found.read, found.write.mT @ found.write, atol=1e-7)
    assert ((found.read[:, 0] * found.write[:, 0]).sum(-1) > 0)[found.value.imag == 0].all()


@pytest.mark.parametrize("seed", range(4))
def test_of_equal_pairs_each_writes_in_the_plane_that_it_reads(seed: int) -> None:
    """Two rotations by 90 degrees."""
    Q = orthonormal(16, 4, seed)
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    found = eigen_components(factored(Q @ torch.block_diag(quarter, quarter), Q.T), count=3)
    assert torch.allclose(found.value, torch.full((2,), 1j, dtype=torch.complex128))
    assert torch.allclose(found.read.mT @ found.read, found.write.mT @ found.write, atol=1e-6)


def heads_of_every_kind() -> dict[str, torch.Tensor]:
    """[head, 24, 24] matrices: random ones, and those whose eigenvalues lie together or are rounding."""
    plain = torch.stack([random(24, 24, seed=seed) for seed in range(40)])
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    close = torch.diag(torch.linspace(1, 24, 24).double())
    close[23, 23] = close[22, 22] + 1e-9
    return {
        "random": plain,
        "symmetric": plain + plain.mT,
        "equal": torch.stack([torch.eye(24).double(), torch.block_diag(*[rotation] * 12), close]),
        "chain": torch.stack([torch.diag(torch.ones(23).double(), 1), torch.zeros(24, 24).double(), plain[0] * 1e-30]),
    }


@pytest.mark.parametrize("kind", heads_of_every_kind())
def test_components_from_eigenvalues_that_are_nearly_known_are_those_of_the_whole_decomposition(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, from eigenvalues of a core that is rounded to float32."""
    M = heads_of_every_kind()[kind]
    heads = decompose(Factors(Circuit.ov, M, torch.eye(24).double().expand_as(M)), centred=False)
    wanted, near = eigen_components(heads, 3), eigenvalues(heads.core().float().double())
    taken_apart, whole = [], components_module.eigen_parts
    monkeypatch.setattr(
        components_module, "eigen_parts", lambda cores, *rest: (taken_apart.append(len(cores)), whole(cores, *rest))[1]
    )
    found = eigen_components(heads, 3, near)
    for name in ("head", "kind", "component", "cluster", "cluster_size"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.allclose(found.value, wanted.value, rtol=1e-9, atol=0)
    for name in ("read", "write"):
        planes = [getattr(some, name).mT @ getattr(some, name) for some in (found, wanted)]
        assert torch.allclose(*planes, atol=1e-9), name
    if kind == "random":  # a few have moduli that float32 cannot tell apart
        assert sum(taken_apart) < 5
    if kind in ("equal", "chain"):
        assert taken_apart == [len(M) - (kind == "chain")]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_nilpotent_head_has_no_eigen_components(length: int, rounded: bool) -> None:
    """e_1 -> ... -> e_n -> 0; in float32 its eigenvalues come out near 1e-8^(1/n), far above 1e-6 of sum sigma."""
    Q = orthonormal(16, length + 1, seed=length)
    left, right = Q[:, :-1], Q[:, 1:].T
    if rounded:
        A = random(length, length, seed=9)
        left, right = (left @ A).float(), torch.linalg.solve(A, right).float()
    rows = table(left, right, torch.eye(16).double(), torch.eye(16).double())
    assert len(values(rows, "singular")) == min(3, length)
    assert values(rows, "eigen") == []


def test_what_a_head_keeps_is_found_beside_a_chain_that_ends() -> None:
    Q = orthonormal(16, 4)
    kept, chain = Q[:, :1], Q[:, 1:]
    left, right = torch.cat((kept, chain[:, :2]), 1), torch.cat((-0.5 * kept.T, 3 * chain[:, 1:].T))
    rows = table(left, right, Q.T.contiguous(), Q, tokens=1)
    assert values(rows, "eigen") == pytest.approx([-0.5])
    assert ids(rows, "eigen", 0, "read") == ids(rows, "eigen", 0, "write") == [0]


def test_values_below_a_millionth_of_the_head_are_left_out_though_they_are_like_each_other() -> None:
    Q = orthonormal(16, 3)
    rows = table(Q * torch.tensor([1, 1e-8, 1.01e-8]).double(), Q.T, random(30, 16, seed=1), random(16, 30, seed=2))
    assert values(rows, "singular") == pytest.approx([1]) and values(rows, "eigen") == pytest.approx([1])


@pytest.mark.parametrize("lower", [0.0, 1e-14, -1e-14])
def test_an_eigenvalue_that_is_nearly_defective_but_not_zero_is_kept(lower: float) -> None:
    """[[1, 1], [lower, 1]]: l . r is about sqrt(lower), and no rounding brings its eigenvalues to 0."""
    Q = orthonormal(16, 2)
    decomposition = factored(Q @ torch.tensor([[1.0, 1.0], [lower, 1.0]]).double(), Q.T)
    found = eigen_components(decomposition, count=3)
    assert found.value.real.tolist() == pytest.approx([1] * len(found.value), abs=1e-3)
    assert torch.isfinite(found.read).all() and torch.isfinite(found.write).all()
    if lower < 0:  # 1 +- 1e-7 i: its plane is well defined
        assert found.value.tolist() == [pytest.approx(1 + 1e-7j, abs=1e-8)]
        for side in (found.read, found.write):
            assert torch.allclose(side.mT @ side, Q @ Q.T, atol=1e-6)
    if lower > 0:  # 1 +- 1e-7
        assert found.cluster.tolist() == [0, 0] and found.cluster_size.tolist() == [2, 2]


def test_clusters_are_chains_and_eigenvalues_are_compared_as_complex_numbers() -> None:
    first, size = clusters(torch.tensor([[10.0, 9.05, 8.5, 5.0, 0.0], [10.0, 8.9, 8.1, 8.0, 7.95]]))
    assert first.tolist() == [[0, 0, 0, 3, 4], [0, 1, 1, 1, 1]] and size.tolist() == [[3, 3, 3, 1, 1], [1, 4, 4, 4, 4]]
    nan = complex(float("nan"), float("nan"))
    first, size = clusters(torch.tensor([[1 + 0j, -0.99, 0.98, 0.97j, nan]]))
    assert first.tolist() == [[0, 1, 0, 3, 4]] and size.tolist() == [[2, 1, 2, 1, 1]]
    long = 1.05 ** -torch.arange(200.0)
    first, size = clusters(long[None])
    assert (first == 0).all() and (size == 200).all()


def test_a_cluster_counts_components_that_are_not_reported() -> None:
    Q, P = orthonormal(16, 5, seed=0), orthonormal(16, 5, seed=1)
    sigma = torch.tensor([9.0, 5.0, 3.0, 2.9, 2.8]).double()
    rows = table(Q * sigma, P.T, random(30, 16, seed=2), random(16, 30, seed=3))
    singular = rows[rows["kind"] == "singular"].drop_duplicates("component")
    assert singular["component"].tolist() == [0, 1, 2]
    assert singular["cluster"].tolist() == [0, 1, 2]
    assert singular["cluster_size"].tolist() == [1, 1, 3]
    lines = describe(rows, 0, 0)
    assert "cluster" not in lines[0] + lines[1]
    assert "cluster of 3: only their span means something" in lines[2]


def test_of_equal_singular_values_only_the_span_survives_a_change_of_gauge() -> None:
    Q, P = orthonormal(16, 3, seed=0), orthonormal(16, 3, seed=1)
    M = Factors(Circuit.ov, (Q * torch.tensor([4.0, 4.0, 1.0]).double())[None], P.T[None])
    one, two = (components(decompose(x, centred=False), 3) for x in (M, regauge(M, seed=5)))
    assert one.cluster.tolist()[:3] == [0, 0, 2] and one.cluster_size.tolist()[:3] == [2, 2, 1]
    for side in ("read", "write"):
        a, b = getattr(one, side)[:3, 0], getattr(two, side)[:3, 0]
        assert float((a[0] @ b[0]).abs()) < 0.999  # the component itself has turned
        assert torch.allclose(a[:2].T @ a[:2], b[:2].T @ b[:2], atol=1e-9)
        assert torch.allclose(a[2:].T @ a[2:], b[2:].T @ b[2:], atol=1e-9)
