"""What stands behind and before attention in architectures of the bridge, and which architectures are refused."""

import dataclasses
import json

import pytest
import torch
from support.bridge_models import LOCAL_EXPERTS, analysed, make
from support.models import SIZES, WIDE, bridged, opened

from ovqk.errors import UserError
from ovqk.weights.bridge import BridgeWeights

pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def copying(W_E, W_OV, W_U):
    """sum of the eigenvalues' real parts over the sum of their moduli, of the centred full circuit."""
    centred = [matrix - matrix.mean(0) for matrix in (W_E.double(), W_U.double().T)]
    eigenvalues = torch.linalg.eigvals(centred[0] @ W_OV.double() @ centred[1].T)
    return float(eigenvalues.real.sum() / eigenvalues.abs().sum())


@torch.no_grad()
def test_the_gain_of_a_norm_after_attention_is_in_ov_copying(tmp_path) -> None:
    model = make("glm4", tmp_path, **WIDE)
    result = analysed(tmp_path)
    assert any("a norm follows attention" in note for note in result.notes)
    W_U, W_E = (model.lm_head.weight * model.model.norm.weight).T, model.model.embed_tokens.weight
    without = []
    for row in result.tables["heads"].itertuples():
        block, kv = model.model.layers[row.layer], row.head // 2
        before, after = block.input_layernorm.weight, block.post_self_attn_layernorm.weight
        W_V = before[:, None] * block.self_attn.v_proj.weight[kv * 8 : kv * 8 + 8].T
        W_O = block.self_attn.o_proj.weight[:, row.head * 8 : row.head * 8 + 8].T
        assert row.ov_copying == pytest.approx(copying(W_E, W_V @ W_O * after, W_U), abs=1e-5)
        without.append(abs(copying(W_E, W_V @ W_O, W_U) - row.ov_copying))
    assert max(without) > 0.01  # the gain matters


@torch.no_grad()
def test_a_multiplier_behind_the_output_projection_is_in_w_o(tmp_path) -> None:
    multipliers = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.5}
    model = make("granitemoe", tmp_path, **SIZES, **LOCAL_EXPERTS, **multipliers)
    source = bridged(tmp_path)
    own = model.model.layers[1].self_attn.o_proj.weight.T.reshape(4, 6, 24)
    assert torch.allclose(source.layer(1).W_O, 0.22 * own, rtol=1e-4, atol=0)
    assert source.architecture.attention_scale == 0.5
    rows = model.model.embed_tokens.weight
    assert torch.allclose(source.embeddings().W_E, 12 * rows, rtol=1e-4)
    assert any("a multiplier follows the output projection" in note for note in source.notes)


@torch.no_grad()
def test_one_attention_gives_the_same_numbers_natively_and_through_the_bridge(tmp_path) -> None:
    """Qwen3 is read natively and Qwen3-MoE through the bridge; their attention is the same."""
    from safetensors.torch import load_file, save_file

    make("qwen3_moe", tmp_path / "moe", **WIDE, **EXPERTS)
    make("qwen3", tmp_path / "dense", **WIDE)
    own, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "dense"))
    shared = {
        name: own[name] if name in own and own[name].shape == dense[name].shape else dense[name] for name in dense
    }
    save_file(shared, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    bridge, native = analysed(tmp_path / "moe"), analysed(tmp_path / "dense", opened)
    assert (
        bridge.unavailable.items()
        >= {name: reason for name, reason in native.unavailable.items() if "block0" not in name}.items()
    )
    mine, theirs = native.tables["heads"], bridge.tables["heads"]
    for metric in ("qk_matching", "qk_symmetry", "qk_effective_rank", "qk_share_position", "ov_copying"):
        assert (mine[metric] - theirs[metric]).abs().max() < 1e-5, metric


@torch.no_grad()
def test_a_weight_that_is_not_what_the_block_writes_leaves_the_model_raw(tmp_path, monkeypatch) -> None:
    make("mixtral", tmp_path, **WIDE, **LOCAL_EXPERTS)
    own = BridgeWeights.raw_layer

    def wrong(self, index):
        weights = own(self, index)
        one_head = torch.tensor([1.0, 1.0, 1.1, 1.0])[:, None, None]
        return dataclasses.replace(weights, W_O=weights.W_O * one_head) if index == 1 else weights

    assert bridged(tmp_path).foldable
    monkeypatch.setattr(BridgeWeights, "raw_layer", wrong)
    source = bridged(tmp_path)
    assert not source.foldable and source.no_vocabulary is not None
    assert any(note.startswith("layer 1: attention adds something other than z W_O + b_O") for note in source.notes)


@pytest.mark.slow
def test_values_that_are_normalised_leave_the_model_raw_with_the_reason(tmp_path) -> None:
    make("gemma4_text", tmp_path, **WIDE, sliding_window=8, global_head_dim=8)
    source = bridged(tmp_path)
    assert not source.foldable
    assert "layer 0: its values are not those of the residual stream" in str(source.no_vocabulary)


def test_what_attention_holds_beyond_the_form_is_in_the_notes(tmp_path) -> None:
    sinks = make("gpt_oss", tmp_path / "sinks", **WIDE, **LOCAL_EXPERTS, sliding_window=8)
    assert sinks.model.layers[0].self_attn.sinks.abs().max() > 0
    source = bridged(tmp_path / "sinks")
    assert any("a sink takes part of each head's attention" in note for note in source.notes)
    assert [source.layer(layer).sliding_window for layer in range(3)] == [8, None, 8]
    keys = WIDE | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True, "num_local_experts": 2}
    make("llama4_text", tmp_path / "mixed", **keys, intermediate_size_mlp=48, attention_chunk_size=8)
    source = bridged(tmp_path / "mixed")
    assert "layers 3: no positions reach the scores" in source.notes
    assert any("attn_temperature_tuning" in note for note in source.notes)
    assert source.layer(0).qk_norm is not None and source.layer(3).qk_norm is None
    x = torch.randn(1, 2, 8)
    rotary = source.layer(3).rotary
    assert rotary is not None and torch.equal(rotary.rotate(x, *rotary.angles(torch.tensor([5]))), x)


def test_opening_and_reading_a_layer_touches_no_stack_of_all_layers(tmp_path, monkeypatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def refused(self, *_):
        raise AssertionError("all layers were stacked")

    make("mixtral", tmp_path, **WIDE, **LOCAL_EXPERTS)
    monkeypatch.setattr(TransformerBridge, "_stack_block_params", refused)
    source = bridged(tmp_path)
    source.layer(1), source.embeddings(), source.first_mlp()


def test_what_a_few_tokens_do_not_show_is_told_from_the_config(tmp_path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    make("ministral3", tmp_path / "grows", **WIDE, rope_parameters=rope | {"llama_4_scaling_beta": 0.1, **ORIGINAL})
    assert any(
        "(llama_4_scaling_beta); this is not part of any metric" in note for note in bridged(tmp_path / "grows").notes
    )
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    make("mixtral", tmp_path / "long", **WIDE, **LOCAL_EXPERTS, rope_parameters=rope)
    assert any("changes with the length of the text (dynamic)" in note for note in bridged(tmp_path / "long").notes)


ORIGINAL = {"original_max_position_embeddings": 16}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
REFUSED = {
    "linear attention": (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"] * 2},
        r"layers without attention heads \(linear_attention: 0, 2\)",
    ),
    "linear attention by default": (
        {"model_type": "qwen3_next", "num_hidden_layers": 4, **LINEAR},
        r"layers without attention heads \(linear_attention: 0, 1, 2\)",
    ),
    "convolutions": (
        {"model_type": "lfm2", "layer_types": ["full_attention", "conv"]},
        r"layers without attention heads \(conv: 1\)",
    ),
    "state spaces by period": (
        {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 0},
        r"layers without attention heads \(mamba: 1, 3\)",
    ),
    "state spaces alone": ({"model_type": "mamba", "hidden_size": 24}, "layers without attention heads"),
    "several stacks": (
        {"model_type": "blt"},
        r"several stacks of layers \(patcher_config, encoder_config, decoder_config, global_config\)",
    ),
    "recurrent": (
        {"model_type": "recurrent_gemma", "block_types": ["recurrent", "recurrent", "attention"]},
        r"layers without attention heads \(recurrent: 0, 1\)",
    ),
    "latent attention": ({"model_type": "deepseek_v3", "kv_lora_rank": 12}, "multi-head latent attention"),
    "latent attention by default": ({"model_type": "deepseek_v2"}, "multi-head latent attention"),
    "projected embeddings": (
        {"model_type": "opt", "word_embed_proj_dim": 16, "hidden_size": 24},
        "word_embed_proj_dim=16 to hidden_size=24",
    ),
    "an encoder-decoder": ({"model_type": "bart", "is_encoder_decoder": True}, "an encoder-decoder model"),
    "an encoder-decoder by default": ({"model_type": "t5"}, "an encoder-decoder model"),
    "shared keys and values": ({"model_type": "gemma3n_text", "num_kv_shared_layers": 2}, "keys and values of earlier"),
    "two shapes of heads": (
        {"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 8},
        r"heads of another shape in layer 5 \(head_dim=512",
    ),
    "heads by layer": ({"model_type": "openelm", "num_query_heads": [4, 8]}, r"another num_query_heads in each layer"),
    "cross-attention": ({"model_type": "mllama", "cross_attention_layers": [1]}, r"attend to pictures \(1\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_an_architecture_without_alike_heads_is_refused_from_its_config(case, tmp_path, monkeypatch) -> None:
    """In one message that says what is allowed, before the bridge is imported or a weight is read."""
    import sys

    from safetensors.torch import save_file

    config, message = REFUSED[case]
    monkeypatch.setitem(sys.modules, "ovqk.weights.bridge", None)  # an import of it raises
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["SomeForCausalLM"]}))
    save_file({f"x{i}": torch.zeros(32) for i in range(8)}, tmp_path / "model.safetensors")  # as large as it says
    with pytest.raises(UserError, match=f"SomeForCausalLM.*{message}.*allowed: "):
        opened(tmp_path)


def test_an_architecture_that_transformer_lens_spells_otherwise_is_read(tmp_path) -> None:
    make("phimoe", tmp_path, **SIZES, **LOCAL_EXPERTS)
    assert bridged(tmp_path).foldable


def test_an_architecture_without_an_adapter_is_one_short_message(tmp_path) -> None:
    make("persimmon", tmp_path, **SIZES)
    with pytest.raises(UserError, match="PersimmonForCausalLM is neither a family") as told:
        bridged(tmp_path)
    assert len(str(told.value)) < 400


def test_whatever_transformer_lens_raises_is_one_whole_message(tmp_path, monkeypatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    make("mixtral", tmp_path, **WIDE, **LOCAL_EXPERTS)
    reason = "the reason " * 100 + "ends here"

    def fails(*_, **__):
        raise KeyError(reason)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", fails)
    with pytest.raises(UserError, match=r"TransformerLens cannot read this MixtralForCausalLM.*ends here"):
        bridged(tmp_path)


@torch.no_grad()
def test_clipped_queries_keys_and_values_are_told(tmp_path) -> None:
    """No form of ovqk's clips them."""
    sizes = {"vocab_size": 40, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 16, "expansion_ratio": 2}
    for clip in (None, 6.0):
        make("mpt", tmp_path / str(clip), **sizes, attn_config={"clip_qkv": clip})
        told = "queries, keys and values are clipped at 6 either way, which is not part of any metric"
        assert (told in opened(tmp_path / str(clip)).notes) == (clip is not None)


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_what_training_tools_put_before_names_is_taken_off(tmp_path, wrapper) -> None:
    from safetensors.torch import load_file, save_file

    sizes = {"vocab_size": 40, "hidden_size": 24, "n_head": 4, "n_layer": 2}
    make("bloom", tmp_path, **sizes)
    plain = opened(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wrapped = {f"{wrapper}{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = opened(tmp_path)
    assert source.loaded_by == "bridge" and torch.equal(source.layer(1).W_Q, plain.layer(1).W_Q)
    told = f"the names of the tensors begin with '{wrapper}', which was taken off"
    assert told in source.notes and told not in plain.notes


def test_a_window_that_only_the_mask_knows_is_found(tmp_path) -> None:
    """PhiMoE hands no window to its attention: that its queries see no further shows with a short one."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    make("phimoe", tmp_path / "windowed", **SIZES, **experts, sliding_window=40)
    assert {bridged(tmp_path / "windowed").layer(index).sliding_window for index in range(2)} == {40}
    make("phimoe", tmp_path / "whole", **SIZES, **experts, sliding_window=None)
    assert bridged(tmp_path / "whole").layer(0).sliding_window is None


def test_a_window_that_cannot_be_seen_is_told(tmp_path, monkeypatch) -> None:
    """Without patterns to look at, nobody can say which layers have the config's window."""
    from ovqk.weights import bridge

    own = bridge.record_activations

    def blind(*given):
        recorded = own(*given)
        for block in recorded.blocks:
            block.pattern = None
        return recorded

    make("phimoe", tmp_path, **SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=40)
    monkeypatch.setattr(bridge, "record_activations", blind)
    assert any(
        "sliding_window=40, and it cannot be seen which layers have it" in note for note in bridged(tmp_path).notes
    )


def test_a_scale_of_scores_that_is_fitted_in_each_layer_is_one_scale(tmp_path) -> None:
    make(
        "mpt",
        tmp_path,
        vocab_size=40,
        d_model=24,
        n_heads=4,
        n_layers=3,
        max_seq_len=16,
        attn_config={"softmax_scale": 0.7},
    )
    assert bridged(tmp_path).architecture.attention_scale == pytest.approx(0.7, rel=1e-3)


def test_a_checkpoint_of_more_layers_or_other_shapes_than_its_config_is_refused(tmp_path) -> None:
    make("arcee", tmp_path, **SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(
        UserError, match=r"gives 'num_hidden_layers' as 1, but the checkpoint holds 'model.layers.1\..*"
    ):
        bridged(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2, "head_dim": 6}))
    with pytest.raises(UserError, match=r"tensor '.*' has shape \[.*\], but config.json"):
        bridged(tmp_path)


def test_no_scale_is_given_for_queries_that_are_normalised_in_a_form_that_is_not_read(tmp_path) -> None:
    make("hunyuan_v1_dense", tmp_path, **SIZES, head_dim=6)
    source = bridged(tmp_path)
    assert source.architecture.qk_norm
    found = analysed(tmp_path)
    assert "no scale of the weights reaches a score" in found.unavailable["qk_frobenius_norm"]


@torch.no_grad()
def test_experts_of_any_width_are_run(tmp_path) -> None:
    """transformers' fast experts demand rows of a multiple of 16 bytes."""
    sizes = SIZES | {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 18}
    make("phimoe", tmp_path, **sizes, **LOCAL_EXPERTS)
    assert bridged(tmp_path).foldable


@torch.no_grad()
def test_stored_layers_that_predict_further_tokens_are_no_layers_of_the_model(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    make("glm4_moe", tmp_path, **WIDE, **experts, n_group=1, topk_group=1, num_nextn_predict_layers=1)
    assert not any("num_nextn_predict_layers" in note for note in bridged(tmp_path).notes)
    tensors = load_file(tmp_path / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    for number, fails in ((3, False), (4, True)):
        further = {name.replace(".layers.2.", f".layers.{number}."): tensor.clone() for name, tensor in last.items()}
        save_file(tensors | further, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if fails:
            with pytest.raises(UserError, match=r"holds 'model\.layers\.4\..*of a layer after those"):
                bridged(tmp_path)
            continue
        source = bridged(tmp_path)
        assert source.architecture.n_layers == 3
        assert any("(num_nextn_predict_layers=1): they are not part of" in note for note in source.notes)


def test_a_package_that_transformer_lens_asks_for_is_one_plain_message(tmp_path, monkeypatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def fails(*_, **__):
        raise ImportError("Adapter needs the optional torchvision library from the 'multimodal' group. Install `x`.")

    make("mixtral", tmp_path, **WIDE, **LOCAL_EXPERTS)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", fails)
    told = "with the help of the package torchvision, which is not installed; allowed: an environment with torchvision"
    with pytest.raises(UserError, match=told):
        bridged(tmp_path)
