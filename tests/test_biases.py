"""Biases: each row of the table against transformers' own modules, and checkpoints that lack or add some."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gguf_writing import write_gguf
from support.models import BESIDE_PICTURES, KINDS, PICTURES, edited, opened, shared_model

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.tensors import SafetensorsFiles
from ovqk.errors import UserError
from ovqk.weights.families import FAMILIES, WRAPPED, family_of
from ovqk.weights.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own plans

KEYS = ("attention_bias", "qkv_bias", "use_qkv_bias", "mlp_bias", "use_bias", "enable_bias", "bias")
"""Every key by which one of the families turns biases on or off: in the config of another it means nothing."""
TEXT_MODELS = {f"{kind}_text": BESIDE_PICTURES[kind]["text_config"] for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
BESIDE = BESIDE_PICTURES | {
    "gemma3": {
        "text_config": KINDS["gemma3_text"],
        "vision_config": {"model_type": "siglip_vision_model", **PICTURES, "image_size": 8, "patch_size": 4},
    }
}
CONFIGS = KINDS | TEXT_MODELS | BESIDE
ELSEWHERE = r"experts|\.router\.|lm_head|\.gate\."
"""Biases of parts that no row names: mixtures of experts and unembeddings."""


def build(kind: str, keys: dict[str, bool]):
    """The config with these keys and the names in the model's state_dict; none of its numbers are made."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    own = json.loads(json.dumps(CONFIGS[kind]))
    own.get("text_config", own).update(keys)
    whole = AutoModelForImageTextToText if kind in BESIDE else AutoModelForCausalLM
    config = AutoConfig.for_model(kind.split("-")[0], **own)
    with torch.device("meta"):
        model = (AutoModel if kind in TEXT_MODELS else whole).from_config(config)
    return json.loads(json.dumps(config.to_dict())), set(model.state_dict())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_says_which_biases_the_model_has(kind) -> None:
    choices = [{}, *({key: on} for key, on in product(KEYS, (True, False)))]
    choices += [dict.fromkeys(KEYS, True), dict.fromkeys(KEYS, False)]
    for keys in choices:
        config, names = build(kind, keys)
        family = family_of(config)
        checkpoint = Checkpoint("a config", Path(), config, SafetensorsFiles({}, {}, {}), "")
        settings = Settings(checkpoint, family)
        probe = family.tensors["output"].format(layer=0) + ".weight"
        prefix = next(prefix for prefix in family.prefixes if prefix + probe in names)
        layers = range(settings.architecture.n_layers)
        mine, read = set(), set()
        for part, name in family.tensors.items():
            dense = range(1) if part.startswith("mlp_") else layers  # of block 0 alone
            bias = {f"{prefix}{name.format(layer=layer)}.bias" for layer in dense}
            read |= bias
            mine |= bias if settings.has_bias(part) else set()
        later = re.compile(rf"{re.escape(prefix)}(h|layers)\.[1-9]")
        attention = {name for name in names if name.startswith(prefix) and name.endswith(".bias")}
        own = {name for name in attention if name in read or not (later.match(name) or re.search(ELSEWHERE, name))}
        own = {name for name in own if "vision" not in name and "visual" not in name and "projector" not in name}
        assert mine == own, keys


def test_no_row_is_left_out() -> None:
    assert {kind.split("-")[0] for kind in CONFIGS} == FAMILIES.keys() | WRAPPED.keys()


def altered(directory: Path, folder: Path, drop: str = "", add: str = "") -> Path:
    """A copy of a checkpoint without the tensors whose names match, or with biases beside the weights that do."""
    folder.mkdir()
    (folder / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not (drop and re.search(drop, name))}
    assert (len(kept) < len(tensors)) == bool(drop)
    for name in [name for name in kept if add and re.search(add, name) and name.endswith(".weight")]:
        kept[name.removesuffix("weight") + "bias"] = torch.ones(len(kept[name]))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "drop", "first"),
    [
        ("gpt2", r"attn\.c_attn\.bias", "transformer.h.0.attn.c_attn.bias"),
        ("gpt2", r"attn\.c_proj\.bias", "transformer.h.0.attn.c_proj.bias"),
        ("gpt2", r"ln_1\.bias", "transformer.h.0.ln_1.bias"),
        ("gpt2", r"h\.2\.ln_1\.bias", "transformer.h.2.ln_1.bias"),
        ("qwen2", r"q_proj\.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("llama-biases", r"layers\.1.*v_proj\.bias", "model.layers.1.self_attn.v_proj.bias"),
        ("gpt_neox", r"query_key_value\.bias", "gpt_neox.layers.0.attention.query_key_value.bias"),
        ("qwen2_moe", r"k_proj\.bias", "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_bias_that_the_model_has_and_the_checkpoint_lacks_is_missing(tiny, tmp_path, kind, drop, first) -> None:
    """It was taken as zero if no layer had it."""
    with pytest.raises(UserError, match=rf"missing from the checkpoint, the first of them '{re.escape(first)}'"):
        opened(altered(tiny(kind), tmp_path / "m", drop))


def test_the_final_norms_bias_is_missing_if_the_norm_is_read(tiny, tmp_path) -> None:
    source = opened(altered(tiny("gpt2"), tmp_path / "m", r"ln_f\.bias"))
    with pytest.raises(UserError, match=r"tensor 'transformer\.ln_f\.bias' is missing from the checkpoint"):
        source.embeddings()


@pytest.mark.parametrize("part", ["mlp.c_fc", "mlp.c_proj", "ln_2"])
def test_block_0_has_no_mlp_if_one_of_its_biases_is_missing(tiny, tmp_path, part) -> None:
    source = opened(altered(tiny("gpt2"), tmp_path / "m", rf"h\.0\.{part}\.bias"))
    assert source.first_mlp() == f"the checkpoint has no MLP of block 0 (transformer.h.0.{part}.bias)"


@pytest.mark.parametrize(
    ("kind", "add", "first", "n"),
    [
        ("mistral", r"_proj\.", "model.layers.0.self_attn.q_proj.bias", 21),
        ("qwen2", r"(o|gate|up|down)_proj\.", "model.layers.0.self_attn.o_proj.bias", 12),
        ("phi3", r"qkv_proj\.", "model.layers.0.self_attn.qkv_proj.bias", 3),
        ("gptj", r"[qkv]_proj\.", "transformer.h.0.attn.q_proj.bias", 6),
        ("cohere", r"norm\.", "model.norm.bias", 4),
        ("gemma", r"norm\.", "model.norm.bias", 7),
    ],
)
def test_stored_biases_that_the_model_type_never_has_are_not_read(tiny, tmp_path, kind, add, first, n) -> None:
    plain, stored = opened(tiny(kind)), opened(altered(tiny(kind), tmp_path / "m", add=add))
    told = f"the checkpoint stores {n} biases that the model of its config.json does not have; they are not read"
    assert [note for note in stored.notes if note.startswith(told) and note.endswith(f": {first}, ...")]
    assert not any("biases" in note for note in plain.notes)
    for layer in range(plain.architecture.n_layers):
        for name in ("b_Q", "b_K", "b_V"):
            assert torch.equal(getattr(plain.layer(layer), name), getattr(stored.layer(layer), name))
        assert stored.layer(layer).norm.bias is None or kind == "gptj"
    one, two = plain.first_mlp(), stored.first_mlp()
    assert torch.equal(one.b_in, two.b_in) and torch.equal(one.b_out, two.b_out)


@pytest.mark.parametrize(("value", "read"), [(None, False), (True, True), ("false", None), (1, None)])
def test_a_key_of_biases_is_true_or_false(tiny, tmp_path, value, read) -> None:
    folder = edited(tiny, "llama-biases", tmp_path / "m", attention_bias=value)
    if read is None:
        with pytest.raises(UserError, match=r"'attention_bias' as true or false, not"):
            opened(folder)
    else:
        assert bool(opened(folder).layer(0).b_Q.any()) == read


def test_llamas_biases_are_off_if_config_json_says_nothing(tiny, tmp_path) -> None:
    """As in transformers; it is read without transformers' defaults."""
    folder = edited(tiny, "llama-biases", tmp_path / "m", ("attention_bias", "mlp_bias"))
    source = opened(folder)
    assert not source.layer(0).b_Q.any() and any("does not have" in note for note in source.notes)


def test_a_checkpoint_of_attention_alone_is_read(tiny, tmp_path) -> None:
    source = opened(altered(tiny("gpt2"), tmp_path / "m", r"mlp\.|wte|lm_head"))
    assert source.layer(0).b_Q.any() and source.embeddings().W_E is None
    assert source.first_mlp().startswith("the checkpoint has no MLP of block 0")
    assert opened(shared_model("gpt2-small-attention")).layer(0).b_Q.any()


def test_a_single_files_parts_are_in_every_layer_or_in_none(tmp_path) -> None:
    """The shapes tell the architecture, and a part that is not there would be taken for one the model has not."""
    whole = {f"blocks.{layer}.attn.W_{part}": torch.ones(2, 6, 3) for layer in (0, 1) for part in "QKV"}
    whole |= {f"blocks.{layer}.attn.W_O": torch.ones(2, 3, 6) for layer in (0, 1)}
    bare = dict(whole)
    whole |= {f"blocks.{layer}.attn.b_{part}": torch.ones(2, 3) for layer in (0, 1) for part in "QKV"}
    for name in ("blocks.0.ln1", "blocks.1.ln1", "ln_final"):
        whole |= {f"{name}.w": torch.ones(6), f"{name}.b": torch.ones(6)}
    whole["unembed.W_U"] = torch.ones(6, 5)
    path = tmp_path / "model.safetensors"
    save_file(whole, path)
    assert opened(path).layer(1).b_Q.all() and opened(path).embeddings().final_norm.bias is not None
    dropped = ("blocks.0.attn.b_K", "blocks.1.attn.b_Q", "blocks.1.ln1.w", "blocks.0.ln1.w", "blocks.1.ln1.b")
    for name in (*dropped, "blocks.0.ln1.b", "ln_final.w", "ln_final.b"):
        save_file({key: value for key, value in whole.items() if key != name}, path)
        with pytest.raises(UserError, match=rf"tensor '{re.escape(name)}' is missing from the checkpoint"):
            opened(path).embeddings()
    save_file(bare, path)
    assert any("the file holds no biases of attention: taken to have none" in note for note in opened(path).notes)


@pytest.mark.parametrize(
    ("kind", "drop", "first"),
    [
        ("qwen2", r"q_proj\.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("gpt2", r"c_attn\.bias", "transformer.h.0.attn.c_attn.bias"),
        ("llama-biases", r"layers\.0.*q_proj\.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("llama-biases", r"o_proj\.bias", "model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_a_bias_that_a_gguf_file_lacks_is_missing(tiny, tmp_path, kind, drop, first) -> None:
    """A file of Llama's architecture shows by one of its biases that it has them."""
    path = write_gguf(altered(tiny(kind), tmp_path / "m", drop), tmp_path / "model.gguf")
    with pytest.raises(UserError, match=rf"missing from the checkpoint, the first of them '{re.escape(first)}'"):
        opened(path)


def test_a_gguf_file_of_qwen2_with_a_bias_that_qwen2_has_not_is_read_without_it(tiny, tmp_path) -> None:
    path = write_gguf(altered(tiny("qwen2"), tmp_path / "m", add=r"o_proj\."), tmp_path / "model.gguf")
    assert any("stores 3 biases that the model of its config.json does not have" in note for note in opened(path).notes)
