"""Simulated attention and margins: heads planted with a known answer, properties, and the attention of a real model."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import BUNDLED
from support.toy import run

from ovqk.circuits.alignment import margin_by_source
from ovqk.circuits.factors import Factors
from ovqk.circuits.simulated import SENDERS, Senders, Simulated, attention
from ovqk.circuits.vocabulary import read_vocabulary
from ovqk.config.schema import Circuit
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture, EmbeddingWeights, LayerWeights

N, D_MODEL, D_HEAD = 12, 64, 32


def facts(positions: str = "learned", n_heads: int = 2, n_kv_heads: int = 2, **more) -> Architecture:
    return Architecture("test", 2, n_heads, n_kv_heads, D_MODEL, D_HEAD, 2 * N, "none", 1e-5, positions, **more)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(architecture: Architecture, seed: int = 0, **more) -> LayerWeights:
    q, kv = architecture.n_heads, architecture.n_kv_heads
    scale = D_MODEL**-0.5
    parts = [scale * drawn(10 * seed + i, heads, D_MODEL, D_HEAD) for i, heads in enumerate((q, kv, kv), start=1)]
    zeros = torch.zeros(q, D_HEAD), torch.zeros(kv, D_HEAD), torch.zeros(kv, D_HEAD)
    return LayerWeights(0, *parts, scale * drawn(10 * seed + 4, q, D_HEAD, D_MODEL), *zeros, norm=None, **more)


def inputs(architecture: Architecture) -> Simulated:
    vocabulary = read_vocabulary(EmbeddingWeights(drawn(5, N, D_MODEL), None, None, None), None)
    W_pos = drawn(6, 2 * N, D_MODEL) if architecture.positions == "learned" else None
    found = Simulated.of(vocabulary, W_pos, None, architecture)
    assert found is not None and found.sequences["token"].shape == (8, 2 * N, D_MODEL)
    return found


# --- planted heads -------------------------------------------------------------------------------------------


def test_a_head_planted_to_look_at_the_place_before_does_so_with_learned_positions() -> None:
    """Head 0's query at place i is the key of place i - 1; head 1 is random."""
    architecture = facts()
    layer, W_pos, places = weights(architecture), drawn(6, 2 * N, D_MODEL), drawn(7, 2 * N, D_HEAD)
    layer.W_K[0] = torch.linalg.pinv(W_pos) @ places
    layer.W_Q[0] = 5 * torch.linalg.pinv(W_pos) @ places.roll(1, 0)
    found = attention(layer, architecture, inputs(architecture).sequences["token"])["qk_simulated_previous"]
    assert found[0] > 0.5 and found[1] < 0.2


def test_a_head_planted_to_look_one_token_back_does_so_under_rotary_positions() -> None:
    """Query bias q and key bias q R(1): the score is largest at an offset of 1, whatever the tokens are."""
    architecture = facts("rotary", 4, 2)
    rotary = Rotary(torch.linspace(0.3, 3, D_HEAD // 2))
    layer, query = weights(architecture, rotary=rotary), 4 * drawn(8, D_HEAD)
    cos, sin = rotary.angles(torch.tensor([1]))
    layer.b_Q[2], layer.b_K[1] = query, rotary.rotate(query[None], cos, sin)[0]
    found = attention(layer, architecture, inputs(architecture).sequences["token"])["qk_simulated_previous"]
    assert found[2] > 0.9 and found[[0, 1]].max() < 0.3


def test_a_head_planted_to_match_its_own_token_sees_both_of_its_places_alike() -> None:
    architecture = facts("rotary", 2, 1)
    layer = weights(architecture, rotary=Rotary(torch.full((1,), 1e-6)))  # as good as no positions
    layer.W_Q[0] = 4 * layer.W_K[0]
    found = attention(layer, architecture, inputs(architecture).sequences["token"])
    assert found["qk_simulated_duplicate"][0] > 0.45 and found["qk_simulated_self"][0] > 0.45
    assert found["qk_simulated_duplicate"][1] < 0.2


def test_a_window_hides_the_first_copy() -> None:
    architecture = facts("rotary", 1, 1)
    layer = weights(architecture, rotary=Rotary(torch.ones(1)), sliding_window=N)
    found = attention(layer, architecture, inputs(architecture).sequences["token"])
    assert float(found["qk_simulated_duplicate"]) == 0 and float(found["qk_simulated_self"]) > 0


def test_the_attention_scale_is_the_models_own() -> None:
    """A scale of zero looks everywhere alike: the mean over queries i of 1 / (i + 1)."""
    architecture = dataclasses.replace(facts(), attention_scale=1e-9)
    found = attention(weights(architecture), architecture, inputs(architecture).sequences["token"])
    everywhere = np.mean([1 / (i + 1) for i in range(N, 2 * N)])
    assert all(torch.allclose(value, torch.tensor(everywhere).float(), atol=1e-6) for value in found.values())


def test_a_head_planted_to_read_what_a_sender_moved_has_a_large_margin_and_others_have_not() -> None:
    """Keys read what sender 1 writes, queries what its values read: the score is (e_t W_V) . (e_u W_V)."""
    architecture = facts()
    tokens, sender, layer = inputs(architecture).tokens["token"], weights(architecture, 1), weights(architecture, 2)
    layer.W_K[0], layer.W_Q[0] = torch.linalg.pinv(sender.W_O[1]), sender.W_V[1]
    senders = Senders()
    assert senders.margins(layer, architecture, tokens, (0,)) is None
    senders.add(Factors(Circuit.ov, sender.W_V, sender.W_O), tokens, torch.tensor([0.1, 0.2]))
    found = senders.margins(layer, architecture, tokens, (0,))
    assert found is not None and found[0] > 4 and abs(float(found[1])) < 1
    alone = Senders()
    alone.add(Factors(Circuit.ov, sender.W_V[:1], sender.W_O[:1]), tokens, torch.tensor([0.1]))
    without = alone.margins(layer, architecture, tokens, (0,))
    assert without is not None and abs(float(without[0])) < 1


def test_no_more_senders_are_kept_than_fit_and_those_are_the_ones_that_look_back_most() -> None:
    architecture, tokens = facts(n_heads=40, n_kv_heads=40), drawn(3, N, D_MODEL)
    kept, all_at_once = Senders(), Senders()
    layers = [weights(architecture, seed) for seed in (1, 2, 3)]
    previous = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    for layer, ranks in zip(layers, previous, strict=True):
        kept.add(Factors(Circuit.ov, layer.W_V, layer.W_O), tokens, ranks)
    best = previous.flatten().topk(SENDERS).indices.sort().values
    factors = Factors(Circuit.ov, torch.cat([x.W_V for x in layers])[best], torch.cat([x.W_O for x in layers])[best])
    all_at_once.add(factors, tokens, previous.flatten()[best])
    found, wanted = (of.margins(layers[0], architecture, tokens, (0,)) for of in (kept, all_at_once))
    assert found is not None and wanted is not None and torch.allclose(found, wanted, atol=1e-5)


# --- properties ----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.floats(0.01, 100), st.floats(-50, 50))
def test_a_margin_ignores_scale_and_what_is_added_to_a_column_and_turns_with_the_sign(seed, n, scale, shift) -> None:
    L = drawn(seed, 2, n, n).double()
    column = shift * drawn(seed + 1, n).double()
    found, order = margin_by_source(L), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(margin_by_source(scale * L + column), found, atol=1e-7, rtol=1e-7)
    assert torch.allclose(margin_by_source(-L), -found)
    assert torch.allclose(margin_by_source(L[:, order][:, :, order]), found[:, order])


def test_a_margin_of_nothing_is_zero_and_of_a_perfect_head_large_and_finite() -> None:
    assert (margin_by_source(torch.zeros(1, 4, 4)) == 0).all()
    perfect = margin_by_source(torch.eye(5)[None])
    assert torch.isfinite(perfect).all() and (perfect > 1e5).all()
    with pytest.raises(ValueError, match="at least 3 tokens"):
        margin_by_source(torch.eye(2)[None])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**5))
def test_simulated_attention_is_a_distribution_and_keeps_when_the_heads_gauge_is_changed(seed: int) -> None:
    architecture = facts("learned", 4, 2)
    layer, rows = weights(architecture, seed), inputs(architecture).sequences["token"]
    found = attention(layer, architecture, rows)
    places = torch.stack([found[f"qk_simulated_{name}"] for name in ("previous", "duplicate", "self")])
    assert (places >= 0).all() and (places.sum(0) <= 1 + 1e-6).all()
    A = torch.linalg.qr(drawn(seed + 9, D_HEAD, D_HEAD))[0]
    turned = dataclasses.replace(layer, W_Q=layer.W_Q @ A, W_K=layer.W_K @ A)
    for name, value in attention(turned, architecture, rows).items():
        assert torch.allclose(value, found[name], atol=1e-4), name


def test_too_few_tokens_or_places_give_no_inputs() -> None:
    architecture = facts()
    vocabulary = read_vocabulary(EmbeddingWeights(drawn(5, N, D_MODEL), None, None, None), None)
    assert Simulated.of(vocabulary, drawn(6, 5, D_MODEL), None, architecture) is None


# --- a real model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mini-llama", "mini-gpt2"])
@pytest.mark.slow
def test_simulated_attention_of_layer_0_is_the_attention_of_the_running_model(name) -> None:
    """Layer 0 reads nothing but embeddings: simulation and transformers' own model must agree."""
    from transformers import AutoModelForCausalLM

    path = BUNDLED.parent / name
    source, _, _, n_tokens, result = run(path, "none")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    n = min(50, source.architecture.n_ctx // 2)
    generator, found = torch.Generator().manual_seed(0), []
    ids = torch.stack([torch.randperm(n_tokens, generator=generator)[:n] for _ in range(9)])[1:]
    with torch.no_grad():
        pattern = model(torch.cat([ids, ids], 1), output_attentions=True).attentions[0].mean(0)
    for at in (lambda i: i - 1, lambda i: i - n):
        found.append(torch.stack([pattern[:, i, at(i)] for i in range(n, 2 * n)]).mean(0).numpy())
    heads = result.tables["heads"].query("layer == 0")
    assert np.allclose(heads["qk_simulated_previous"], found[0], atol=1e-5)
    assert np.allclose(heads["qk_simulated_duplicate"], found[1], atol=1e-5)
