"""Every native family against the model itself: its own queries and keys, its first block, its logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    BESIDE_PICTURES,
    BUNDLED,
    KINDS,
    TEXT,
    edited,
    local,
    make,
    make_llama,
    opened,
    randomise,
)

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.factors import qk_factors
from ovqk.errors import UserError
from ovqk.weights.bridge import BridgeWeights
from ovqk.weights.families import FAMILIES, WRAPPED, family_of
from ovqk.weights.folding import fold_embeddings, fold_layer, fold_mlp, fold_reads
from ovqk.weights.norms import apply_norm, normalise
from ovqk.weights.types import keys, queries, score_scale

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own plans

LENGTH = 11


@torch.no_grad()
def run_recorded(directory, whole=None):
    """The model's residual stream before each layer, and the scores it hands to each softmax, before any mask."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import repeat_kv

    scores = []

    def probe(module, query, key, value, attention_mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        found = query @ repeat_kv(key, groups).mT * scaling
        scores.append(found[0])
        mask = torch.ones(found.shape[-2:], dtype=torch.bool).tril()
        pattern = found.masked_fill(~mask, -torch.inf).softmax(-1)
        return (pattern @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), pattern

    AttentionInterface.register("probe", probe)
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    own_method = kind in ("gptj", "gpt_neo")
    implementation = "eager" if own_method or kind == "falcon" else "probe"
    model = (whole or AutoModelForCausalLM).from_pretrained(directory, attn_implementation=implementation).eval()
    if own_method:
        for module in model.modules():
            if hasattr(module, "_attn"):
                scale = getattr(module, "scale_attn", 1.0)

                def method(query, key, value, attention_mask=None, own=module._attn, scale=scale):
                    scores.append((query @ key.mT / scale)[0])
                    return own(query, key, value, attention_mask)

                module._attn = method
    if kind == "falcon":  # whose attention is a method without parts: queries and keys are taken where they are rotated
        from transformers.models.falcon import modeling_falcon

        rotate = modeling_falcon.apply_rotary_pos_emb

        def method(*arguments):
            query, key = rotate(*arguments)
            scores.append((query @ key.mT / query.shape[-1] ** 0.5)[0])
            return query, key

        modeling_falcon.apply_rotary_pos_emb = method
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (1, LENGTH))
    try:
        streams = model(tokens, output_hidden_states=True).hidden_states
    finally:
        if kind == "falcon":
            modeling_falcon.apply_rotary_pos_emb = rotate
    return tokens[0], [stream[0] for stream in streams], scores


@pytest.mark.parametrize("kind", [*KINDS, "mini-attn"])
def test_the_bilinear_form_reproduces_the_models_own_scores(tiny, kind) -> None:
    """(x_i W_Q + b_Q) R(i - j) (x_j W_K + b_K)^T of the folded weights, normalised where the model does so."""
    torch.manual_seed(1)
    directory = BUNDLED if kind == "mini-attn" else tiny(kind)
    source = opened(directory)
    assert source.loaded_by == "families"
    _, streams, scores = run_recorded(directory)
    check_scores(source, streams, scores)


def check_scores(source, streams, scores) -> None:
    facts = source.architecture
    for layer in range(facts.n_layers):
        weights = fold_layer(source.layer(layer), facts)
        x = normalise(streams[layer], facts.norm, facts.norm_eps)
        q, k = queries(weights, x), keys(weights, x)[facts.kv_of_head]
        for D in range(LENGTH):
            turned = q[:, D:]
            if weights.rotary is not None:
                turned = weights.rotary.rotate(turned, *weights.rotary.angles(torch.tensor([D])))
            mine = (turned * k[:, : LENGTH - D]).sum(-1) * score_scale(weights, facts)
            own = scores[layer].diagonal(-D, dim1=-2, dim2=-1)
            assert (mine - own).abs().max() < 1e-4 * max(1.0, own.abs().max().item()), (layer, D)


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


def test_a_setting_that_is_not_read_is_refused(tiny, tmp_path) -> None:
    for kind, key, value in (("phi", "qk_layernorm", True), ("olmo", "clip_qkv", 3.0)):
        config = json.loads((tiny(kind) / "config.json").read_text()) | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(load_file(tiny(kind) / "model.safetensors"), tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"{key}={value}, which ovqk does not read"):
            opened(tmp_path)


def test_a_config_that_transformers_cannot_read_is_one_message(tiny, tmp_path) -> None:
    config = json.loads((tiny("qwen3") / "config.json").read_text()) | {"num_hidden_layers": "two"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(tiny("qwen3") / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json"):
        opened(tmp_path)


def test_an_unknown_rotary_scaling_is_refused(tmp_path) -> None:
    make_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "invented", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'invented' is not supported; allowed: default, linear"):
        opened(tmp_path)


def test_configs_as_older_checkpoints_state_them_give_the_same_rotations(tiny, tmp_path) -> None:
    """What the hub's files hold: `rotary_pct`, `partial_rotary_factor`, `rope_local_base_freq`."""
    older = {
        "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
        "phi": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0},
        "gemma3_text": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2},
    }
    for kind, keys_ in older.items():
        config = json.loads((tiny(kind) / "config.json").read_text())
        config.pop("rope_parameters")
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | keys_))
        save_file(load_file(tiny(kind) / "model.safetensors"), folder / "model.safetensors")
        one, two = opened(tiny(kind)), opened(folder)
        for layer in range(one.architecture.n_layers):
            a, b = one.layer(layer).rotary, two.layer(layer).rotary
            assert torch.equal(a.inverse_frequencies, b.inverse_frequencies)


def test_windows_and_rotations_differ_by_layer(tiny) -> None:
    source = opened(tiny("gemma3_text"))
    windows = [source.layer(layer).sliding_window for layer in range(3)]
    assert windows == [5, None, 5]
    local_layer, global_layer = (source.layer(layer).rotary.inverse_frequencies for layer in (0, 1))
    assert local_layer[1] == pytest.approx(10000 ** (-2 / 8)) and global_layer[1] == pytest.approx(1e6 ** (-2 / 8))
    neo = opened(tiny("gpt_neo"))
    assert [neo.layer(layer).sliding_window for layer in range(2)] == [None, 4]


def test_a_window_that_the_config_does_not_turn_on_is_none(tiny, tmp_path) -> None:
    """Qwen2's files give a size and, in `use_sliding_window`, whether it is used: no, where the key is left out."""
    drop = ("use_sliding_window", "layer_types", "max_window_layers")
    off = edited(tiny, "qwen2", tmp_path / "off", drop, sliding_window=4)
    on = edited(tiny, "qwen2", tmp_path / "on", drop, sliding_window=4, use_sliding_window=True, max_window_layers=1)
    assert [opened(off).layer(layer).sliding_window for layer in range(2)] == [None, None]
    assert [opened(on).layer(layer).sliding_window for layer in range(2)] == [None, 4]
    left_out = edited(tiny, "mistral", tmp_path / "default", ("sliding_window",))
    assert opened(left_out).layer(0).sliding_window == 4096
    assert opened(edited(tiny, "mistral", tmp_path / "null", sliding_window=None)).layer(0).sliding_window is None


def test_layers_that_the_config_does_not_count_are_no_secret(tiny, tmp_path) -> None:
    with pytest.raises(UserError, match=r"'num_hidden_layers' as 1, but the checkpoint holds '.*layers\.1\..*o_proj"):
        opened(edited(tiny, "llama", tmp_path / "cut", num_hidden_layers=1))


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


def test_a_pattern_of_windows_in_letters_needs_a_kind_for_each_layer(tiny, tmp_path) -> None:
    """As EXAONE 4's own config.json has them; transformers adds an integer and a string."""
    path = with_settings(tiny("exaone4"), tmp_path, sliding_window_pattern="LLLG")
    assert opened(path).layer(0).sliding_window is not None
    config = json.loads((path / "config.json").read_text())
    config.pop("layer_types")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'sliding_window_pattern' as 'LLLG' and no 'layer_types'; allowed: an integer"):
        opened(path)


def test_a_config_with_the_text_models_keys_at_the_top_is_read_alike(tmp_path) -> None:
    """As the hub has Qwen2-VL: one level of keys, `mrope`, and tensors named as those of a text model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model("qwen2_vl", **json.loads(json.dumps(BESIDE_PICTURES["qwen2_vl"])))
    randomise(AutoModelForImageTextToText.from_config(config)).save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    old = {"model_type": "qwen2_vl", **TEXT, "rope_theta": 300.0, "tie_word_embeddings": True}
    old["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    renamed = {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()}
    del renamed["lm_head.weight"]
    save_file(renamed, tmp_path / "old" / "model.safetensors")
    one, two = opened(tmp_path / "new"), opened(tmp_path / "old")
    assert torch.equal(one.layer(1).W_Q, two.layer(1).W_Q)
    assert torch.equal(one.layer(1).rotary.inverse_frequencies, two.layer(1).rotary.inverse_frequencies)
    assert not one.architecture.tied and two.architecture.tied
    assert torch.equal(two.embeddings().W_U, two.embeddings().W_E.T)


def test_a_wrapped_text_model_that_is_not_in_the_table_needs_the_bridge() -> None:
    assert family_of({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}) is None
    assert {family_of({"model_type": kind}).name for kind in WRAPPED} == {"llama"}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 12}),
        ("falcon", {"alibi": True}),
        ("falcon", {"parallel_attn": False}),
        ("falcon", {"multi_query": False}),
        ("stablelm", {"qk_layernorm": True}),
        ("cohere", {"use_qk_norm": True}),
    ],
)
def test_what_a_row_does_not_say_is_left_to_the_bridge(kind, keys) -> None:
    assert family_of({"model_type": kind, **KINDS[kind]}) is not None
    assert family_of({"model_type": kind, **KINDS[kind], **keys}) is None


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


@pytest.mark.parametrize("value", [0, None, "big", float("nan"), True])
def test_a_multiplier_that_is_no_number_is_named(tiny, tmp_path, value) -> None:
    with pytest.raises(UserError, match=r"config\.json.*residual_multiplier"):
        opened(edited(tiny, "granite", tmp_path / "m", residual_multiplier=value)).layer(0)


def test_a_window_that_the_model_type_does_not_read_is_none(tiny, tmp_path) -> None:
    assert opened(edited(tiny, "llama", tmp_path / "llama", sliding_window=4)).layer(0).sliding_window is None


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


# --- what config.json turns off, or gives wrongly ---------------------------------------------------------------


def with_settings(directory: Path, tmp_path: Path, **keys: object) -> Path:
    """A copy of a checkpoint with other settings."""
    import shutil

    copy = Path(shutil.copytree(directory, tmp_path / "edited"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | keys))
    return copy


@pytest.mark.parametrize(
    ("kind", "made", "turned_off"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"attention_bias": False, "mlp_bias": False}),
        ("llama", {"mlp_bias": True}, {"mlp_bias": False}),
        ("qwen3", {"attention_bias": True}, {"attention_bias": False}),
        ("starcoder2", {"use_bias": True}, {"use_bias": False}),
        ("opt", {"enable_bias": True}, {"enable_bias": False}),
    ],
)
def test_stored_biases_that_the_model_does_not_have_are_not_read(kind, made, turned_off, tmp_path) -> None:
    """As transformers does not read them; the record says so."""
    make(kind, tmp_path / "made", **made)
    without = with_settings(tmp_path / "made", tmp_path, **turned_off)
    stored = load_file(without / "model.safetensors")
    source = opened(without)
    assert any("are not read, as transformers does not read them" in note for note in source.notes)
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "c_fc", "c_proj",
             "fc1", "fc2")  # fmt: skip
    off = [name for name in stored if name.endswith(".bias") and name.split(".")[-2] in parts]
    if turned_off == {"mlp_bias": False}:
        off = [name for name in off if ".mlp." in name]
    assert off
    save_file({name: tensor for name, tensor in stored.items() if name not in off}, without / "model.safetensors")
    bare = opened(without)
    for mine, theirs in ((source.layer(0), bare.layer(0)), (source.first_mlp(), bare.first_mlp())):
        for name in ("b_Q", "b_K", "b_V", "b_in", "b_linear", "b_out"):
            one, other = getattr(mine, name, None), getattr(theirs, name, None)
            assert (one is None and other is None) or torch.equal(one, other), name


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("llama", {"is_causal": False}, "is_causal=false: attention looks both ways"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' as a positive number, not 0"),
        ("llama", {"tie_word_embeddings": "false"}, "'tie_word_embeddings' as true or false, not 'false'"),
        ("llama", {"rms_norm_eps": -1.0}, r"'rms_norm_eps' as a number that is finite and not negative, not -1\.0"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}},
            r"by kind of layer \('full_attention'\), but a model of model_type=llama has one rotation for all layers",
        ),
    ],
)
def test_settings_that_would_give_wrong_numbers_are_refused(tiny, kind, keys, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        opened(with_settings(tiny(kind), tmp_path, **keys))


def test_gemmas_activation_is_the_key_that_transformers_reads(tiny, tmp_path) -> None:
    assert opened(with_settings(tiny("gemma"), tmp_path, hidden_activation="silu")).first_mlp().activation != "silu"


def test_a_cap_on_scores_is_told(tiny, tmp_path) -> None:
    notes = opened(with_settings(tiny("gemma2"), tmp_path, attn_logit_softcapping=30.0)).notes
    assert any("scores are capped at 30 before the softmax" in note for note in notes)


@pytest.mark.parametrize(
    ("keys", "scale", "told"),
    [
        ({"scale_attn_weights": False}, 1.0, None),
        ({"scale_attn_by_inverse_layer_idx": True}, None, "divided by its number, counted from 1"),
        ({"reorder_and_upcast_attn": True}, None, None),
        ({"add_cross_attention": True}, None, "also has cross-attention, which is not read"),
    ],
)
def test_what_scales_gpt2s_scores_is_read_or_told(tmp_path, keys, scale, told) -> None:
    make("gpt2", tmp_path, **keys)
    source = opened(tmp_path)
    assert source.architecture.attention_scale == scale
    assert [told in note for note in source.notes] == ([True] if told else [])
    if "scale" in "".join(keys):
        _, streams, scores = run_recorded(tmp_path)
        check_scores(source, streams, scores)


def test_a_cap_on_logits_is_told(tiny, tmp_path) -> None:
    notes = opened(with_settings(tiny("gemma2"), tmp_path, final_logit_softcapping=20.0)).notes
    assert any("logits are capped at 20, which is not part of any metric" in note for note in notes)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gemma3", "llava around gemma2", "vaultgemma", "nanochat"])
def test_a_cap_on_logits_is_told_of_models_that_have_it_alone(kind, tmp_path) -> None:
    """Models for pictures leave out the cap that the text model within has when it stands alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(1)
    capped = {"final_logit_softcapping": 0.05, "attn_logit_softcapping": None}
    sizes = {key: value for key, value in TEXT.items() if key != "rope_parameters"} | {"head_dim": 8, **capped}
    config = {
        "gemma3": {**BESIDE_PICTURES["llava"], "text_config": sizes, "mm_tokens_per_image": 4},
        "llava around gemma2": BESIDE_PICTURES["llava"] | {"text_config": {"model_type": "gemma2", **sizes}},
    }.get(kind, sizes)
    if kind == "gemma3":
        config["vision_config"] = {**config["vision_config"], "model_type": "siglip_vision_model"}
    beside = kind in ("gemma3", "llava around gemma2")
    auto = AutoModelForImageTextToText if beside else AutoModelForCausalLM
    made = AutoConfig.for_model(kind.split()[0], **json.loads(json.dumps(config)))
    model = randomise(auto.from_config(made, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    logits = model(torch.arange(1, 11)[None]).logits
    told = "logits are capped at 0.05, which is not part of any metric" in opened(tmp_path).notes
    assert told == (not beside) == bool(logits.abs().max() <= 0.05)


def test_keys_that_transformers_does_not_have_for_a_model_type_are_not_read(tiny, tmp_path) -> None:
    """Mistral's window is that of every layer, whatever keys of Qwen2 stand beside it; OLMo's epsilon is fixed."""
    full = ["full_attention"] * 3
    source = opened(edited(tiny, "mistral", tmp_path / "m", use_sliding_window=False))
    assert source.layer(0).sliding_window == 5
    capped = opened(edited(tiny, "llama", tmp_path / "l", attn_logit_softcapping=30.0, layer_types=full))
    assert not capped.notes
    assert opened(edited(tiny, "olmo", tmp_path / "o", rms_norm_eps=0.1)).architecture.norm_eps == 1e-5


def test_attention_both_ways_of_a_text_model_beside_one_for_pictures_is_refused(tiny, tmp_path) -> None:
    text = json.loads((tiny("gemma3_text") / "config.json").read_text()) | {"is_causal": False}
    with pytest.raises(UserError, match="is_causal=false: attention looks both ways"):
        opened(edited(tiny, "gemma3_text", tmp_path / "m", model_type="gemma3", text_config=text))


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_attention_both_ways_is_refused(tiny, tmp_path, kind) -> None:
    with pytest.raises(UserError, match="use_bidirectional_attention=True, which ovqk does not read"):
        opened(edited(tiny, kind, tmp_path / "m", use_bidirectional_attention=True))


def test_a_mistral_whose_config_tells_its_layers_apart_is_read_as_ministral(tiny, tmp_path) -> None:
    """As transformers reads it: layers that see everything have no window."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    folder = edited(tiny, "mistral", tmp_path / "mistral", layer_types=kinds, sliding_window=3)
    source = opened(folder)
    assert [source.layer(index).sliding_window for index in range(3)] == [None, 3, None]
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(folder).model_type == "ministral"
    assert opened(tiny("mistral")).layer(0).sliding_window == 5  # without kinds every layer has the window


@pytest.mark.parametrize(("kind", "key"), [("llama", "rms_norm_eps"), ("qwen2", "rms_norm_eps")])
def test_a_norms_eps_that_is_null_is_refused(tiny, tmp_path, kind, key) -> None:
    with pytest.raises(UserError, match=key):
        opened(edited(tiny, kind, tmp_path / kind, **{key: None}))
