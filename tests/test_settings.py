"""config.json: settings that are read, that the model turns off, and that are refused, as numbers would be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    BESIDE_PICTURES,
    KINDS,
    TEXT,
    edited,
    make,
    make_llama,
    opened,
    randomise,
)
from support.recorded import check_scores, run_recorded

from ovqk.errors import UserError
from ovqk.weights.families import family_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own plans


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


@pytest.mark.parametrize("value", [0, None, "big", float("nan"), True])
def test_a_multiplier_that_is_no_number_is_named(tiny, tmp_path, value) -> None:
    with pytest.raises(UserError, match=r"config\.json.*residual_multiplier"):
        opened(edited(tiny, "granite", tmp_path / "m", residual_multiplier=value)).layer(0)


def test_a_window_that_the_model_type_does_not_read_is_none(tiny, tmp_path) -> None:
    assert opened(edited(tiny, "llama", tmp_path / "llama", sliding_window=4)).layer(0).sliding_window is None


# --- what config.json turns off, or gives wrongly ---------------------------------------------------------------


def with_settings(directory: Path, tmp_path: Path, **keys: object) -> Path:
    """A copy of a checkpoint with other settings."""

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
