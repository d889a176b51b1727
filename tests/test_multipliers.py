"""Numbers that multiply what attention reads, scores and writes: measured on the model, and put where the rule says."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.bridge_models import LOCAL_EXPERTS, analysed, make
from support.models import SIZES, bridged, make_gpt2, opened

from ovqk.weights import agreement, seen_rotations
from ovqk.weights.multipliers import SAME_NUMBER, agrees, fit_multiplier, nearest_known
from ovqk.weights.rotary import Rotary
from ovqk.weights.seen_rotations import cosine_tables, find_rotations, measured_scale

pytestmark = pytest.mark.filterwarnings("ignore")

YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "attention_factor": 1.3,
}  # fmt: skip
ROW = 10


def turned(frequencies: torch.Tensor, factor: float, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as a model's module gives them, [1, position, component]."""
    angles = torch.arange(ROW)[:, None] * frequencies
    both = {"half": angles, "twice": torch.cat((angles, angles), -1), "neighbours": angles.repeat_interleave(2, -1)}
    return both[layout].cos()[None] * factor, both[layout].sin()[None] * factor


@given(
    st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=6),
    st.floats(0.3, 3.0),
    st.sampled_from(["half", "twice", "neighbours"]),
    st.booleans(),
)
def test_a_factor_on_cosines_is_measured_whatever_their_layout(frequencies, factor, layout, whole) -> None:
    own = torch.tensor(frequencies)
    cos, sin = turned(own, factor, layout)
    given_ = {"position_embeddings": torch.complex(cos, sin) if whole else (cos, sin), "rows": torch.randn(1, ROW, 4)}
    tables = list(cosine_tables(((), given_), ROW))
    assert measured_scale(Rotary(own), tables) == pytest.approx(factor**2, rel=1e-5)
    assert measured_scale(Rotary(-own), tables) == pytest.approx(factor**2, rel=1e-5)
    assert measured_scale(Rotary(own + 1.0), tables) is None
    two = [*tables, *cosine_tables(turned(own, factor + 0.1, layout), ROW)]
    assert measured_scale(Rotary(own), two) is None  # nobody can say which of the factors a head has


@given(st.integers(0, 1000))
def test_no_activations_are_taken_for_cosines(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = tuple(torch.randn(1, ROW, 4, generator=generator) for _ in range(2))
    assert not list(cosine_tables(pair, ROW))
    assert not list(cosine_tables((torch.zeros(1, ROW, 4), torch.zeros(1, ROW, 4)), ROW))


@given(st.floats(-3, 3).filter(lambda scale: abs(scale) > 1e-3), st.integers(0, 1000))
def test_a_fitted_multiplier_is_the_planted_one(scale, seed) -> None:
    rows = torch.randn(12, 24, generator=torch.Generator().manual_seed(seed))
    assert fit_multiplier(rows, rows * scale) == pytest.approx(scale, rel=SAME_NUMBER)
    assert fit_multiplier(rows, rows * (1 + 1e-8)) == 1.0
    assert nearest_known(scale, scale * (1 + 5 * SAME_NUMBER), scale * (1 + 0.1 * SAME_NUMBER)) != scale
    assert nearest_known(scale, scale * (1 + 5 * SAME_NUMBER), None) == scale
    assert not agrees(rows * 1.0006, rows)


@torch.no_grad()
def test_w_qk_has_the_factor_that_the_model_puts_on_its_cosines(tmp_path) -> None:
    """Phi-3.5-MoE multiplies cosines by short_mscale, and not by the scaling that its module stores."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    rope = longrope | {"short_mscale": 1.3, "long_mscale": 1.7, "original_max_position_embeddings": 16}
    model = make("phimoe", tmp_path, **SIZES | lengths, **LOCAL_EXPERTS, rope_parameters=rope)
    assert abs(model.model.rotary_emb.attention_scaling - 1.3) > 0.05
    source = bridged(tmp_path)
    assert source.layer(0).rotary.scale == pytest.approx(1.69, rel=1e-6)
    assert source.architecture.attention_scale is None
    heads = analysed(tmp_path).tables["heads"]
    for row in heads.itertuples():
        block = model.model.layers[row.layer]
        W_Q, W_K = (
            (block.input_layernorm.weight * getattr(block.self_attn, f"{part}_proj").weight[6 * head : 6 * head + 6])
            .double()
            .T
            for part, head in (("q", row.head), ("k", row.head // 2))
        )
        W_QK = 1.69 * (W_Q - W_Q.mean(0)) @ (W_K - W_K.mean(0)).T
        assert row.qk_frobenius_norm == pytest.approx(float(W_QK.norm()), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("near", [0.9993, 1.00002])
def test_a_multiplier_near_one_is_read_and_told(tmp_path, near) -> None:
    scale = 6**-0.5 * near
    multipliers = {"residual_multiplier": near, "attention_multiplier": scale, "embedding_multiplier": near}
    model = make("granitemoe", tmp_path, **SIZES, **LOCAL_EXPERTS, **multipliers, logits_scaling=near)
    source = bridged(tmp_path)
    own = model.model.layers[1].self_attn.o_proj.weight.T.reshape(4, 6, 24)
    assert torch.allclose(source.layer(1).W_O, near * own, rtol=2e-6, atol=0)
    assert source.architecture.attention_scale == pytest.approx(scale, rel=1e-9)
    embeddings = source.embeddings()
    assert torch.allclose(embeddings.W_E, near * model.model.embed_tokens.weight, rtol=2e-6, atol=0)
    assert torch.allclose(embeddings.W_U, model.lm_head.weight.T / near, rtol=2e-6, atol=0)
    assert any("a multiplier follows the output projection" in note for note in source.notes)


@torch.no_grad()
def test_a_number_on_keys_is_the_scale_of_the_scores_and_not_in_w_qk(tmp_path) -> None:
    mamba = {"mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_head": 6, "mamba_d_state": 8}
    make("falcon_h1", tmp_path, **SIZES, **mamba, key_multiplier=0.7)
    source = bridged(tmp_path)
    assert source.layer(0).rotary.scale == 1.0
    assert source.architecture.attention_scale == pytest.approx(0.7 * 6**-0.5, rel=SAME_NUMBER)
    assert agreement.BESIDE_THE_SCALE in source.notes


@torch.no_grad()
def test_a_multiplier_before_attention_is_in_every_weight_that_reads(tmp_path) -> None:
    mamba = {"mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_head": 6, "mamba_d_state": 8}
    numbers = {"attention_in_multiplier": 1.1, "attention_out_multiplier": 0.8, "key_multiplier": 0.7}
    model = make("falcon_h1", tmp_path, **SIZES, **mamba, **numbers)
    source = bridged(tmp_path)
    assert any("a multiplier stands between the norm and attention" in note for note in source.notes)
    for index, block in enumerate(model.model.layers):
        weights, own = source.layer(index), block.self_attn
        assert torch.allclose(weights.norm.weight, 1.1 * block.input_layernorm.weight, rtol=2e-6)
        assert torch.equal(weights.W_V, own.v_proj.weight.reshape(2, 6, 24).mT)
        assert torch.allclose(weights.W_O, 0.8 * own.o_proj.weight.T.reshape(4, 6, 24), rtol=2e-6, atol=0)
    assert source.architecture.attention_scale == pytest.approx(0.7 * 6**-0.5, rel=SAME_NUMBER)


@torch.no_grad()
def test_norms_whose_epsilons_differ_leave_the_model_raw(tmp_path, monkeypatch) -> None:
    """One epsilon is all that later layers' rows are normalised with."""
    own = agreement.measure_norm

    def other(module, width):
        found = own(module, width)
        return dataclasses.replace(found, eps=2e-6) if found is not None and module is second[0] else found

    second = [None]
    make("arcee", tmp_path, **SIZES)
    read = agreement.read_block

    def noting(block, module, *rest):
        second[0] = rest[4] if rest[0].layer == 1 else None
        return read(block, module, *rest)

    monkeypatch.setattr(agreement, "measure_norm", other)
    monkeypatch.setattr("ovqk.weights.bridge.read_block", noting)
    source = bridged(tmp_path)
    assert not source.foldable
    assert any("norms before attention have different epsilons" in note for note in source.notes)


@torch.no_grad()
def test_a_factor_that_cannot_be_seen_is_the_scale_of_the_scores(tmp_path, monkeypatch) -> None:
    make("arcee", tmp_path, **SIZES, rope_parameters=YARN)
    seen = bridged(tmp_path)
    assert seen.layer(0).rotary.scale == pytest.approx(1.69, rel=1e-6) and seen.architecture.attention_scale is None
    assert any("the factor is in W_QK" in note for note in seen.notes)
    monkeypatch.setattr(agreement, "measured_scale", lambda rotary, tables: None)
    source = bridged(tmp_path)
    assert source.foldable and source.layer(0).rotary.scale == 1.0
    assert source.architecture.attention_scale == pytest.approx(1.69 * 6**-0.5, rel=SAME_NUMBER)
    assert agreement.UNSEEN_COSINES in source.notes


@torch.no_grad()
def test_a_factor_on_a_part_of_each_head_that_cannot_be_seen_leaves_the_model_raw(tmp_path, monkeypatch) -> None:
    """Then it is no scale of the scores."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    keys = SIZES | {"head_dim": 8} | experts | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    make("glm4_moe", tmp_path, **keys, rope_parameters=YARN | {"partial_rotary_factor": 0.5})
    assert bridged(tmp_path).foldable
    monkeypatch.setattr(agreement, "measured_scale", lambda rotary, tables: None)
    assert not bridged(tmp_path).foldable


@torch.no_grad()
def test_a_scale_for_each_layer_is_read_alike_by_both_readers(tmp_path) -> None:
    make_gpt2(tmp_path, scale_attn_by_inverse_layer_idx=True)
    native, bridge = opened(tmp_path), bridged(tmp_path)
    for layer in range(3):
        expected = 6**-0.5 / (layer + 1)
        assert native.layer(layer).attention_scale == pytest.approx(expected, rel=1e-12)
        assert bridge.layer(layer).attention_scale == pytest.approx(expected, rel=2e-6)


def test_rotations_that_a_model_holds_twice_are_tried_once() -> None:
    class Turning(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("inv_freq", "full_attention_inv_freq", "full_attention_original_inv_freq"):
                self.register_buffer(name, torch.tensor([1.0, 0.1]))

    assert len(find_rotations(Turning())) == 4  # two layouts, two directions
    assert seen_rotations.SAME_ANGLES < 1
