"""Every native family against the model itself: its own queries and keys, its first block, its logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    BESIDE_PICTURES,
    BUNDLED,
    KINDS,
    edited,
    local,
    make,
    opened,
    randomise,
)
from support.recorded import check_scores, run_recorded

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.factors import qk_factors
from ovqk.errors import UserError
from ovqk.weights.bridge import BridgeWeights
from ovqk.weights.families import FAMILIES, WRAPPED, family_of
from ovqk.weights.folding import fold_embeddings, fold_layer, fold_mlp, fold_reads
from ovqk.weights.norms import apply_norm, normalise

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own plans


@pytest.mark.parametrize("kind", [*KINDS, "mini-attn"])
def test_the_bilinear_form_reproduces_the_models_own_scores(tiny, kind) -> None:
    """(x_i W_Q + b_Q) R(i - j) (x_j W_K + b_K)^T of the folded weights, normalised where the model does so."""
    torch.manual_seed(1)
    directory = BUNDLED if kind == "mini-attn" else tiny(kind)
    source = opened(directory)
    assert source.loaded_by == "families"
    _, streams, scores = run_recorded(directory)
    check_scores(source, streams, scores)


DENSE = [kind for kind in KINDS if "experts" not in str(KINDS[kind]) or kind == "qwen2_moe-dense_first"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*DENSE, "mini-attn"])
def test_block0_is_the_stream_of_a_lone_token_after_the_first_block(tiny, kind, tmp_path) -> None:
    """A token alone attends to itself; without positions and what the definition leaves out: b_V (with what the norm's
    bias adds to it when folded) and b_O."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED) if kind == "mini-attn" else make(kind, tmp_path)
    left_out = (
        "wpe.weight",
        "ln_1.bias",
        "input_layernorm.bias",
        "v_proj.bias",
        "out_proj.bias",
        "o_proj.bias",
        "attention.dense.bias",
        "self_attn.dense.bias",
        "self_attn_layer_norm.bias",
        "embed_positions.weight",
        "ln_attn.bias",
        "self_attention.dense.bias",
    )
    for name, parameter in model.named_parameters():
        if name.endswith((*left_out, "attn.c_proj.bias")):
            parameter.zero_()
        elif name.endswith("c_attn.bias"):
            parameter.view(3, -1)[2] = 0
        elif name.endswith("query_key_value.bias"):
            heads = {"falcon-grouped": 2}.get(kind, 4)  # of keys and values
            parameter.view(heads, -1, model.config.hidden_size // 4)[:, -1] = 0
    model.eval().save_pretrained(tmp_path)
    source = opened(tmp_path)
    facts, raw = source.architecture, source.embeddings()
    folded = fold_embeddings(raw, facts)
    block0 = Block0(fold_reads(source.layer(0), facts), fold_mlp(source.first_mlp(), facts), facts)
    mine = block0.rows(folded.W_E)
    tokens = torch.arange(folded.W_E.shape[0])[:, None]
    streams = model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(streams[0][:, 0], raw.W_E, atol=1e-5)
    own = streams[1][:, 0]
    if facts.norm == "layernorm":  # nobody reads the mean over d_model
        own, mine = own - own.mean(-1, keepdim=True), mine - mine.mean(-1, keepdim=True)
    assert (mine - own).abs().max() < 1e-4 * own.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_unembedding_reads_the_final_norm(tiny, kind) -> None:
    from transformers import AutoModelForCausalLM

    source = opened(tiny(kind))
    facts = source.architecture
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    kept = []
    norm = dict(model.named_modules())[f"{source.prefix}{source.family.tensors['final_norm']}".strip(".")] if (
        "final_norm" in source.family.tensors
    ) else model.model.norm  # fmt: skip
    norm.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))
    logits = model(torch.arange(9)[None]).logits[0]
    folded = fold_embeddings(source.embeddings(), facts)
    final = facts.norm if facts.norm != "none" else "rmsnorm"
    mine = normalise(kept[0][0], final, facts.norm_eps) @ folded.W_U
    difference = mine - logits
    assert (difference - difference.mean(0)).abs().max() < 1e-4 * logits.abs().max()  # but for a bias of the tokens


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "mini-attn"])
def test_a_head_writes_what_the_model_writes(tiny, kind) -> None:
    """Of a token alone in its text each head writes v W_O, with what stands behind W_O, into the stream."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    def values(module, query, key, value, *_, **__):  # a lone token's attention, without a sink
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    directory = BUNDLED if kind == "mini-attn" else tiny(kind)
    source = opened(directory)
    facts, family, tensors = source.architecture, source.family, load_file(directory / "model.safetensors")
    AttentionInterface.register("values", values)
    implementation = "eager" if kind.split("-")[0] in ("gptj", "gpt_neo", "falcon") else "values"
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=implementation, experts_implementation="eager"
    )
    model = model.eval().double()
    modules, kept = dict(model.named_modules()), {}

    def keep(name):
        def hook(module, arguments):
            kept[name] = arguments[0].reshape(40, -1)

        modules[name].register_forward_pre_hook(hook)

    after_attention = {
        "gpt2": "h.{layer}.ln_2", "gpt_neo": "h.{layer}.ln_2", "opt": "layers.{layer}.final_layer_norm",
        "gpt_neox-sequential": "layers.{layer}.post_attention_layernorm", "gemma2": "layers.{layer}.mlp",
        "olmo2": "layers.{layer}.mlp", "olmo3": "layers.{layer}.mlp", "exaone4": "layers.{layer}.mlp",
    }  # fmt: skip
    norms = kind.split("-")[0] in ("gemma2", "gemma3_text")
    reader = after_attention.get(
        kind, after_attention.get(kind.split("-")[0], "layers.{layer}.post_attention_layernorm")
    )
    reader = "layers.{layer}.pre_feedforward_layernorm" if norms else reader
    for layer in range(facts.n_layers):
        keep(source.tensor_name("output", layer).removesuffix(".weight"))
        if not facts.parallel and kind != "mini-attn":
            keep(source.prefix + reader.format(layer=layer))
    streams = model(torch.arange(40)[:, None], output_hidden_states=True).hidden_states
    for layer in range(facts.n_layers):
        weights = source.layer(layer)
        stream, z = streams[layer][:, 0], kept[source.tensor_name("output", layer).removesuffix(".weight")]
        x = apply_norm(weights.norm, stream, facts.norm_eps)
        own = z.unflatten(-1, (facts.n_heads, facts.d_head))
        v = torch.einsum("td,hdk->thk", x, weights.W_V.double()) + weights.b_V
        assert close(v[:, facts.kv_of_head], own), layer
        bias = tensors.get(source.tensor_name("output", layer, "bias"), torch.zeros(facts.d_model)).double()
        raw = tensors[source.tensor_name("output", layer)].double()
        output = own.flatten(1) @ (raw if family.linear == "in_out" else raw.T) + bias
        residual = model.config.residual_multiplier if kind == "granite" else 1.0
        heads = torch.einsum("thk,hkd->td", own, weights.W_O.double())
        assert close(heads, residual * (output - bias)), layer
        if not facts.parallel and kind != "mini-attn":
            written = apply_norm(weights.post_norm, heads + residual * bias, facts.norm_eps)
            assert close(stream + written, kept[source.prefix + reader.format(layer=layer)]), layer


def close(mine, own) -> bool:
    return bool((mine - own).abs().max() < 1e-5 * own.abs().max())


def test_a_mixture_of_experts_gives_its_reason(tiny) -> None:
    for kind in set(KINDS) - set(DENSE):
        assert opened(tiny(kind)).first_mlp() == "block 0 is a mixture of experts"


def test_neox_queries_keys_and_values_are_interleaved_head_by_head(tiny) -> None:
    source, facts = opened(tiny("gpt_neox")), opened(tiny("gpt_neox")).architecture
    fused = load_file(tiny("gpt_neox") / "model.safetensors")["gpt_neox.layers.1.attention.query_key_value.weight"]
    layer, d = source.layer(1), facts.d_head
    for head in range(facts.n_heads):
        for part, weight in enumerate((layer.W_Q, layer.W_K, layer.W_V)):
            start = (3 * head + part) * d
            assert torch.equal(weight[head], fused[start : start + d].T)
    assert not torch.equal(layer.W_K[0], fused[facts.n_heads * d : facts.n_heads * d + d].T)  # all queries first


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_gemmas_norms_multiply_by_one_plus_gamma(tiny, kind) -> None:
    stored = load_file(tiny(kind) / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    norm = opened(tiny(kind)).layer(0).norm
    assert stored.abs().max() > 0 and torch.equal(norm.weight, 1 + stored)


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen3", "gemma2", "olmo2", "phi3"])
def test_missing_and_misshapen_tensors_are_named(tiny, kind, tmp_path) -> None:
    source = opened(tiny(kind))
    tensors = load_file(tiny(kind) / "model.safetensors")
    part = "query_norm" if "query_norm" in source.family.tensors else "norm"
    name = source.tensor_name(part, 1)
    for change, message in ((None, f"missing from the checkpoint, the first of them '{name}'"), (7, "has shape")):
        altered = dict(tensors)
        altered.pop(name)
        if change:
            altered[name] = torch.zeros(change)
        (tmp_path / "config.json").write_text((tiny(kind) / "config.json").read_text())
        save_file(altered, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            opened(tmp_path)


def test_a_bias_that_one_layer_lacks_is_not_taken_for_zero(tiny, tmp_path) -> None:
    folder = edited(tiny, "gpt2", tmp_path / "altered")
    tensors = load_file(folder / "model.safetensors")
    name = opened(folder).tensor_name("qkv", 1, "bias")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"missing from the checkpoint, the first of them '{name}'"):
        opened(folder)


def test_windows_and_rotations_differ_by_layer(tiny) -> None:
    source = opened(tiny("gemma3_text"))
    windows = [source.layer(layer).sliding_window for layer in range(3)]
    assert windows == [5, None, 5]
    local_layer, global_layer = (source.layer(layer).rotary.inverse_frequencies for layer in (0, 1))
    assert local_layer[1] == pytest.approx(10000 ** (-2 / 8)) and global_layer[1] == pytest.approx(1e6 ** (-2 / 8))
    neo = opened(tiny("gpt_neo"))
    assert [neo.layer(layer).sliding_window for layer in range(2)] == [None, 4]


def test_a_text_model_beside_one_for_pictures_is_found(tiny, tmp_path) -> None:
    """Gemma 3's larger checkpoints keep the text model's keys and tensors one level down."""
    config = json.loads((tiny("gemma3_text") / "config.json").read_text())
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(tiny("gemma3_text") / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    one, two = opened(tiny("gemma3_text")), opened(tmp_path)
    assert torch.equal(qk_factors(one.layer(1), one.architecture).left, qk_factors(two.layer(1), two.architecture).left)
    assert torch.equal(one.embeddings().W_U, two.embeddings().W_U)


@pytest.mark.parametrize("kind", BESIDE_PICTURES)
def test_the_text_model_beside_one_for_pictures_has_its_own_scores(tmp_path, kind) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **json.loads(json.dumps(BESIDE_PICTURES[kind])))
    model = randomise(AutoModelForImageTextToText.from_config(config, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    source = opened(tmp_path)
    assert source.loaded_by == "families"
    _, streams, scores = run_recorded(tmp_path, AutoModelForImageTextToText)
    check_scores(source, streams, scores[-source.architecture.n_layers :])
    read = source.embeddings()
    assert torch.equal(read.W_E, model.get_input_embeddings().weight)
    assert torch.equal(read.W_U, model.get_output_embeddings().weight.T)


@torch.no_grad()
def test_the_unembedding_of_a_text_model_beside_pictures_has_the_name_that_its_wrapper_gives_it(tmp_path) -> None:
    """GPT-NeoX calls its own `embed_out`, and LLaVA calls any `lm_head`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {key: value for key, value in KINDS["gpt_neox"].items() if key != "pad_token_id"}
    config = BESIDE_PICTURES["llava"] | {"text_config": {"model_type": "gpt_neox", **text}}
    made = AutoConfig.for_model("llava", **json.loads(json.dumps(config)))
    model = randomise(AutoModelForImageTextToText.from_config(made))
    model.save_pretrained(tmp_path)
    assert torch.equal(opened(tmp_path).embeddings().W_U, model.lm_head.weight.T)


def test_a_wrapped_text_model_that_is_not_in_the_table_needs_the_bridge() -> None:
    assert family_of({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}) is None
    assert {family_of({"model_type": kind}).name for kind in WRAPPED} == {"llama"}


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "model.", "module._orig_mod."])
def test_what_wraps_a_model_in_the_names_of_its_tensors_is_taken_off(tiny, tmp_path, wrapper) -> None:
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    tensors = load_file(tiny("llama") / "model.safetensors")
    save_file({wrapper + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    one, two = opened(tiny("llama")), opened(tmp_path)
    assert torch.equal(one.layer(1).W_O, two.layer(1).W_O)
    assert torch.equal(one.embeddings().W_U, two.embeddings().W_U)
    assert any(f"begin with '{wrapper}'" in note for note in two.notes) and not one.notes
    assert two.family.reads(f"{wrapper}model.layers.1.self_attn.q_proj.weight")


def test_layers_without_positions_do_not_turn(tiny) -> None:
    for kind, still in (("smollm3", [1]), ("cohere2", [1]), ("exaone4", [1]), ("exaone4-without_windows", [])):
        source = opened(tiny(kind))
        for layer in range(source.architecture.n_layers):
            frequencies = source.layer(layer).rotary.inverse_frequencies
            assert (frequencies == 0).all() == (layer in still), (kind, layer)
        assert any("layers without positions: 1;" in note for note in source.notes) == bool(still)


def test_an_attention_sink_is_told_of(tiny) -> None:
    assert any("attention sink" in note for note in opened(tiny("gpt_oss")).notes)


def test_multipliers_are_told_of(tiny) -> None:
    told = "raw or folded: embedding_multiplier=3, residual_multiplier=0.22"
    assert any(told in note for note in opened(tiny("granite")).notes)
    assert opened(tiny("granite")).architecture.attention_scale == 0.3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "qwen2"])
def test_an_unembedding_stored_beside_a_tied_config_is_read_as_transformers_reads_it(tmp_path, kind) -> None:
    """Of other values than the embedding, it is the unembedding; of the same, the two are one."""
    from transformers import AutoModelForCausalLM

    make(kind, tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    source = opened(tmp_path)
    assert torch.equal(source.embeddings().W_U, model.lm_head.weight.T)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert not source.architecture.tied and any("stored with other values" in note for note in source.notes)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors[embedding].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same = opened(tmp_path)
    assert same.architecture.tied and not any("other values" in note for note in same.notes)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2"])
def test_the_bridge_reads_the_same_weights(tiny, kind) -> None:
    native = opened(tiny(kind))
    bridged = BridgeWeights(open_checkpoint(local(tiny(kind))), local(tiny(kind)))
    for layer in range(native.architecture.n_layers):
        one, two = (fold_layer(source.layer(layer), source.architecture) for source in (native, bridged))
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            assert torch.allclose(getattr(one, name), getattr(two, name), atol=1e-5), (layer, name)


def test_every_row_of_the_table_is_tried() -> None:
    tried = {FAMILIES[kind.split("-")[0]].name for kind in KINDS} | {
        FAMILIES[kind].name for kind in BESIDE_PICTURES.keys() & FAMILIES.keys()
    }
    assert tried == {family.name for family in FAMILIES.values()}
