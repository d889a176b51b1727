"""Scores of composition: against materialised float64 products, on planted pairs with known answers; their bounds."""

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.composed import Materialised, noise, of_factors, random_layer, random_layers, source_of
from support.models import shared_model
from support.oracle import block0_rows, folded_embeddings, regauge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ovqk.circuits import composition
from ovqk.circuits.composition import (
    MODES,
    LayerCircuits,
    composition_table,
    k_composed_matching,
    k_composition,
    matching,
    percentiles,
    q_composition,
    received,
    scores,
    virtual_factors,
    virtual_heads_table,
)
from ovqk.circuits.factors import Factors, ov_factors, qk_factors
from ovqk.circuits.grams import centred_gram
from ovqk.circuits.maps import decompose
from ovqk.config.schema import Circuit
from ovqk.weights.folding import fold_layer

KINDS = [
    "gpt2",
    "llama",
    "gptj",
    "qwen3",
]  # one KV head each; grouped and rotary; partial, interleaved; normalised q, k


def planted(W_OV: tuple[torch.Tensor, torch.Tensor], W_QK: tuple[torch.Tensor, torch.Tensor]) -> LayerCircuits:
    """One head; each map from its factors [d, k] and [d, k]: left right^T."""
    return of_factors(*(Factors(c, a[None], b.T[None]) for c, (a, b) in ((Circuit.ov, W_OV), (Circuit.qk, W_QK))))


def subspaces(n: int, d: int, k: int) -> list[torch.Tensor]:
    """n bases [d, k] of mutually orthogonal subspaces."""
    return list(torch.linalg.qr(noise(d, n * k, seed=3).double()).Q.split(k, dim=1))


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny) -> tuple[Materialised, torch.Tensor, torch.Tensor]:
    """The heads, the block0 embeddings and the plain ones."""
    source = source_of(tiny(request.param))
    embeddings = folded_embeddings(source)
    return Materialised(source), block0_rows(source, embeddings), embeddings.W_E.double()


# --- oracles ---------------------------------------------------------------------------------------------------


def test_scores_of_all_modes_match_materialised_products(model) -> None:
    whole, *_ = model
    found = {(layer, m): received(whole.layers, layer, m) for layer in range(1, whole.facts.n_layers) for m in MODES}
    assert len(whole.pairs) >= 16
    for mode, (s, r) in product(MODES, whole.pairs):
        score = float(found[r[0], mode][(*s, r[1])])
        assert score == pytest.approx(whole.score(mode, s, r), abs=1e-6), (mode, s, r)


def test_matching_matches_the_eigenvalues_of_the_vocabulary_matrix(model) -> None:
    whole, E, W_E = model
    found = matching(whole.layers, whole.pairs, centred_gram(E, E))
    wanted = [whole.matching(E, s, r) for s, r in whole.pairs]
    assert max(map(abs, wanted)) > 0.05
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    found = matching(whole.layers, whole.pairs, centred_gram(E, E), centred_gram(W_E, E))
    wanted = [whole.matching(E, s, r, W_E) for s, r in whole.pairs]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)


def test_the_rotation_is_the_mean_one_that_was_decomposed(tiny) -> None:
    """Q and K composition read a head through it; at D = 0 alone they would differ."""
    turned, still = (Materialised(source_of(tiny("llama")), rotated=rotated) for rotated in (True, False))
    for mode in ("q", "k"):
        moved = received(turned.layers, 1, mode) - received(still.layers, 1, mode)
        assert float(moved.abs().max()) > 1e-3
    assert torch.allclose(received(turned.layers, 1, "v"), received(still.layers, 1, "v"), atol=1e-7)


@pytest.mark.filterwarnings("ignore")  # transformer_lens and transformers warn about their own plans
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_equal_those_of_transformer_lens(tiny, kind) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    from ovqk.weights.bridge_loading import unused_tokenizer

    with unused_tokenizer() as tokenizer:
        bridge = TransformerBridge.boot_transformers(str(tiny(kind)), device="cpu", tokenizer=tokenizer)
    whole = Materialised(source_of(tiny(kind)), folded=False, rotated=False)
    for mode in MODES:
        theirs = bridge.all_composition_scores(mode.upper()).scores.detach()
        for layer in range(1, whole.facts.n_layers):
            mine = received(whole.layers, layer, mode)
            assert torch.allclose(mine, theirs[:layer, :, layer].double(), atol=1e-5), (mode, layer)


def test_real_gpt2_previous_token_and_s_inhibition_heads_stand_out() -> None:
    """4.11 is the strongest sender of its layer into induction head 5.5; 8.10 the strongest into name movers' queries.

    Wang et al. 2022 name these heads from activations.
    """
    source = source_of(shared_model("gpt2-small-attention"))
    facts, layers = source.architecture, []
    for index in range(facts.n_layers):
        weights = fold_layer(source.layer(index), facts)
        ov, qk = ov_factors(weights, facts), qk_factors(weights, facts)
        layers.append(LayerCircuits.of(decompose(ov, True), decompose(qk, True)))
    into_keys = k_composition(layers, [(5, 5)])
    assert into_keys[4, 11] == 1 and into_keys[2, 2] > 0.9
    into_queries = q_composition(layers, [(9, 9), (10, 0), (9, 6)])
    assert np.nanargmax(into_queries[8]) == 10
    assert np.isnan(into_keys[5:]).all() and np.isnan(into_queries[10:]).all()


# --- known answers ---------------------------------------------------------------------------------------------


def test_iid_heads_compose_at_one_over_root_d() -> None:
    d = 64
    sender, receiver = random_layers(2, heads=24, d=d, k=8)
    for mode in MODES:
        found = scores(sender, receiver, mode)
        assert float(found.square().mean() * d) == pytest.approx(1, rel=0.04)
        assert float(found.mean() * math.sqrt(d)) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("reader", MODES)
def test_what_is_written_into_one_read_side_composes_there_alone(k: int, reader: str) -> None:
    """Orthonormal frames, everything written is read: norm_F = sqrt(k), norms sqrt(k) each, so 1 / sqrt(k)."""
    A, B, C, D, F = subspaces(5, d=32, k=k)
    sender = planted(W_OV=(A, B), W_QK=(A, A))
    receiver = {
        "q": planted(W_OV=(D, F), W_QK=(B, C)),
        "k": planted(W_OV=(D, F), W_QK=(C, B)),
        "v": planted(W_OV=(B, F), W_QK=(C, D)),
    }[reader]
    for mode in MODES:
        wanted = 1 / math.sqrt(k) if mode == reader else 0
        assert float(scores(sender, receiver, mode)) == pytest.approx(wanted, abs=1e-6)


def test_a_planted_previous_token_and_induction_pair_matches_and_its_negation_avoids() -> None:
    """The sender moves token content from A to B; the receiver's query reads A and its key reads B."""
    A, B, _ = subspaces(3, d=24, k=4)
    E = noise(50, 24, seed=5).double()
    gram = centred_gram(E, E)
    turn = torch.block_diag(*[torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64)] * 2)
    mover = planted(W_OV=(A, B), W_QK=(A, A))
    for W_OV, W_QK, wanted in (
        ((A, B), (A, B), 1),
        ((-A, B), (A, B), -1),
        ((A, B), (-A, B), -1),
        ((A, B), (B, A), 0),  # query and key swapped: nothing is read of what was written
    ):
        pair = [planted(W_OV, W_QK=(A, A)), planted(W_OV=(A, A), W_QK=W_QK)]
        assert float(matching(pair, [((0, 0), (1, 0))], gram)) == pytest.approx(wanted, abs=1e-5)
    plain = A @ A.T + B @ B.T  # a Gram without preferred directions: the rotation's eigenvalues are imaginary
    turned = planted(W_OV=(A, A), W_QK=(A @ turn, B))
    assert float(matching([mover, turned], [((0, 0), (1, 0))], plain)) == pytest.approx(0, abs=1e-5)


def test_a_sender_of_a_first_layer_that_turns_tokens_around_reads_the_plain_embedding() -> None:
    """Block 0 writes -2 W_E beside W_E, so E = -W_E: E on both sides would give a sender of block 0 the wrong sign."""
    A, B = subspaces(2, d=16, k=4)
    W_E = noise(40, 16, seed=7).double()
    E = -W_E
    layers = [planted(W_OV=(-A, B), W_QK=(A, A)), planted(W_OV=(-A, B), W_QK=(A, B)), planted((A, A), W_QK=(A, B))]
    pairs = [((0, 0), (2, 0)), ((1, 0), (2, 0))]
    same, apart = centred_gram(E, E), centred_gram(W_E, E)
    assert matching(layers, pairs, same).tolist() == pytest.approx([-1, -1], abs=1e-5)
    assert matching(layers, pairs, same, apart).tolist() == pytest.approx([1, -1], abs=1e-5)
    table = composition_table(layers, gram=same, first_gram=apart).query("mode == 'k' and receiver_layer == 2")
    assert table.set_index("sender_layer")["matching"][[0, 1]].tolist() == pytest.approx([1, -1], abs=1e-5)
    best = k_composed_matching(layers, [(0, 0), (1, 0)], same, apart)
    assert best[2, 0] == pytest.approx(1, abs=1e-5)


def test_a_pair_that_does_not_compose_matches_at_exactly_zero_not_at_noise() -> None:
    A, B, C, D = subspaces(4, d=32, k=4)
    layers = [planted(W_OV=(A, B), W_QK=(A, A)), planted(W_OV=(A, A), W_QK=(C, D))]
    E = noise(60, 32, seed=6).double()
    assert float(matching(layers, [((0, 0), (1, 0))], centred_gram(E, E))) == 0


def test_heads_of_zero_weights_score_zero() -> None:
    left, right = noise(3, 12, 4, seed=0), noise(3, 4, 12, seed=1)
    left[1] = 0
    layers = [of_factors(Factors(Circuit.ov, left, right), Factors(Circuit.qk, left, right))] * 2
    for mode in MODES:
        found = scores(*layers, mode)
        dead = torch.zeros(3, 3, dtype=torch.bool)
        dead[1], dead[:, 1] = True, True
        assert (found[dead] == 0).all() and (found[~dead] > 0.01).all()
    pairs = [((0, s), (1, r)) for s in range(3) for r in range(3)]
    matched = matching(layers, pairs, torch.eye(12)).view(3, 3)
    assert (matched[dead] == 0).all() and (matched[~dead] != 0).all()
    table = virtual_heads_table(layers, composition_table(layers))
    assert table[["score", "frobenius_norm"]].notna().all(axis=None)


# --- invariances and precision ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_gauge_of_either_head_changes_nothing(seed: int, k: int) -> None:
    """W_V A, A^-1 W_O and W_Q A, W_K A^-T for invertible A; and ovqk's own orthogonal gauge."""
    d, heads = 12, 3
    E = noise(20, d, seed=seed + 1)
    gram = centred_gram(E, E)
    maps = [
        Factors(circuit, noise(heads, d, k, seed=seed + 2 + i).double(), noise(heads, k, d, seed=seed + 9 + i).double())
        for i, circuit in enumerate([*Circuit, *Circuit])
    ]

    def gauged(factors: Factors) -> Factors:
        A = torch.eye(k).double() + 0.3 * torch.linalg.qr(noise(heads, k, k, seed=seed + 20).double()).Q
        return Factors(factors.circuit, factors.left @ A, torch.linalg.inv(A) @ factors.right)

    pairs = [((0, s), (1, r)) for s in range(heads) for r in range(heads)]
    plain = [of_factors(*maps[i : i + 2], dtype=torch.float64) for i in (0, 2)]
    for change in (gauged, lambda factors: regauge(factors, seed)):
        changed = [change(factors) for factors in maps]
        layers = [of_factors(*changed[i : i + 2], dtype=torch.float64) for i in (0, 2)]
        for mode in MODES:
            assert torch.allclose(scores(*layers, mode), scores(*plain, mode), atol=1e-12)
        one, two = (virtual_factors(x, pairs) for x in (plain, layers))
        assert torch.allclose(one.left @ one.right, two.left @ two.right, atol=1e-9)
        assert torch.allclose(matching(layers, pairs, gram), matching(plain, pairs, gram), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_scores_and_matching_stay_in_range_and_ignore_scale(seed: int, k: int, scale: float) -> None:
    layers = [random_layer(3, 8, k, seed), random_layer(3, 8, k, seed + 1)]
    larger = [dataclasses.replace(x, ov=dataclasses.replace(x.ov, sigma=scale * x.ov.sigma)) for x in layers]
    for mode in MODES:
        found = scores(*layers, mode)
        assert (found >= 0).all() and (found <= 1 + 1e-6).all()
        assert torch.allclose(found, scores(*larger, mode), atol=1e-6)
    E = noise(12, 8, seed=seed)
    pairs = [((0, s), (1, r)) for s in range(3) for r in range(3)]
    matched = matching(layers, pairs, centred_gram(E, E))
    assert (matched.abs() <= 1 + 1e-12).all()
    assert torch.allclose(matched, matching(larger, pairs, centred_gram(E, E)), atol=1e-9)


def test_float32_vectors_move_scores_by_less_than_1e_6() -> None:
    single, double = (
        [random_layer(4, 256, 64, seed=seed, dtype=dtype) for seed in (1, 2)]
        for dtype in (torch.float32, torch.float64)
    )
    E = noise(400, 256, seed=0)
    pairs = [((0, s), (1, r)) for s in range(4) for r in range(4)]
    for mode in MODES:
        gap = (scores(*single, mode) - scores(*double, mode)).abs().max()
        assert 0 < float(gap) < 1e-6
    gap = matching(single, pairs, centred_gram(E, E)) - matching(double, pairs, centred_gram(E, E))
    assert float(gap.abs().max()) < 1e-4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=2, max_size=7))
def test_percentiles_are_shares_of_the_other_senders_ties_half(rows: list[list[int]]) -> None:
    found = torch.tensor(rows).double()
    percentile = percentiles(found)
    for s, r in product(range(len(rows)), range(2)):
        others = [rows[i][r] for i in range(len(rows)) if i != s]
        wanted = np.mean([float(x < rows[s][r]) + 0.5 * float(x == rows[s][r]) for x in others])
        assert float(percentile[s, r]) == pytest.approx(wanted)
    assert torch.equal(percentiles(torch.stack([found, -found]))[1], percentiles(-found))


def test_a_lone_sender_has_no_percentile() -> None:
    assert percentiles(torch.ones(2, 1, 3).double()).isnan().all()


# --- bounds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 40, 16 * 16, 1000])
def test_the_size_of_tiles_does_not_change_the_result(tile: int, monkeypatch) -> None:
    sender, receiver = random_layer(7, 24, 4, 0), random_layer(5, 24, 4, 1)
    whole = {mode: scores(sender, receiver, mode) for mode in MODES}
    monkeypatch.setattr(composition, "TILE", tile)
    for mode in MODES:
        assert torch.allclose(scores(sender, receiver, mode), whole[mode], atol=1e-7)


class Largest(TorchDispatchMode):
    """The largest storage, in elements, of any tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


def test_an_all_pairs_pass_holds_no_more_than_a_tile_or_the_sides_of_a_layer(monkeypatch) -> None:
    d, k, n_layers, heads = 32, 16, 3, 24
    layers = random_layers(n_layers, heads, d, k)
    sides, square = heads * k * d, (heads * k) ** 2
    for tile, bound in ((2000, sides), (20_000, 20_000), (10**9, None)):
        monkeypatch.setattr(composition, "TILE", tile)
        with Largest() as largest:
            for layer, mode in product(range(1, n_layers), MODES):
                percentiles(received(layers, layer, mode))
        if bound is None:  # what the bound is for
            assert largest.elements == square > 10 * sides
        else:
            assert largest.elements <= bound
