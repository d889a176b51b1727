"""Where weights come from, and one clear message for every way in which they can be wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import BUNDLED, local, make_gpt2, make_llama, opened, shared_model

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.grams import dense
from ovqk.circuits.vocabulary import read_vocabulary
from ovqk.errors import UserError
from ovqk.weights.folding import fold_embeddings
from ovqk.weights.mlp import UNTOLD


def copy(tmp_path: Path, source: Path = BUNDLED) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def rewrite(directory: Path, change) -> Path:
    """Save the directory's tensors again after `change` has been at them."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def test_a_missing_path_and_one_that_is_no_checkpoint(tmp_path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*no such file or directory"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        opened(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{nonsense")
    with pytest.raises(UserError, match="not valid JSON"):
        opened(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(
        UserError, match=r"text\.txt: not a GGUF or safetensors file; allowed: a Hugging Face directory, "
    ):
        opened(tmp_path / "text.txt")
    (tmp_path / "text.txt").rename(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        opened(tmp_path / "text.safetensors")


def test_pickled_weights_are_refused_by_name(tmp_path) -> None:
    directory = copy(tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, which ovqk does not unpickle"):
        opened(directory)
    with pytest.raises(UserError, match="a pickled file, which ovqk does not unpickle; allowed: safetensors"):
        opened(directory / "pytorch_model.bin")
    (directory / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        opened(directory)


def test_a_truncated_file(tmp_path) -> None:
    directory = copy(tmp_path)
    data = (directory / "model.safetensors").read_bytes()
    for size in (len(data) // 2, 20, 0):
        (directory / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
            opened(directory)


def test_missing_tensors_are_named_and_never_filled_in(tmp_path) -> None:
    directory = rewrite(copy(tmp_path), lambda tensors: tensors.pop("transformer.h.2.attn.c_proj.weight"))
    with pytest.raises(UserError, match=r"'transformer\.h\.2\.attn\.c_proj\.weight'.*does not fill in missing weights"):
        opened(directory)
    directory = rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".attn." in name])
    with pytest.raises(UserError, match="is missing from the checkpoint"):
        opened(directory)


def test_a_tensor_of_the_wrong_shape(tmp_path) -> None:
    def cut(tensors) -> None:
        tensors["transformer.h.1.attn.c_attn.weight"] = tensors["transformer.h.1.attn.c_attn.weight"][:, :100]

    with pytest.raises(UserError, match=r"h\.1\.attn\.c_attn\.weight' has shape \[128, 100\].*promise \[128, 384\]"):
        opened(rewrite(copy(tmp_path), cut))


@pytest.mark.parametrize(
    "name",
    ["h.1.attn.c_attn.bias", "h.2.ln_1.bias", "ln_f.weight", "wpe.weight", "h.0.mlp.c_proj.weight", "h.0.ln_2.bias"],
)
def test_whatever_is_read_has_the_shape_it_should_have(tmp_path, name) -> None:
    make_gpt2(tmp_path / "m")

    def cut(tensors) -> None:
        tensors[f"transformer.{name}"] = tensors[f"transformer.{name}"][:-1]

    with pytest.raises(UserError, match=r"tensor 'transformer\..*' has shape .* promise \["):
        opened(rewrite(tmp_path / "m", cut))


def test_biases_of_an_mlp_without_its_matrices_are_left_alone(tmp_path) -> None:
    def drop(tensors) -> None:
        for name in [name for name in tensors if ".mlp." in name and name.endswith("weight")]:
            del tensors[name]

    make_gpt2(tmp_path / "m")
    source = opened(rewrite(tmp_path / "m", drop))
    assert source.layer(0).W_Q.shape == (4, 24, 6)
    assert "no MLP of block 0" in source.first_mlp()


def test_embeddings_of_another_number_of_tokens_are_refused(tmp_path) -> None:
    make_llama(tmp_path / "m")

    def cut(tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-3]

    with pytest.raises(UserError, match="embedding has 40 tokens and the unembedding 37"):
        opened(rewrite(tmp_path / "m", cut)).embeddings()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value) -> None:
    name = "transformer.h.1.attn.c_proj.weight"

    def spoil(tensors) -> None:
        tensors[name][3, 5] = value

    source = opened(rewrite(copy(tmp_path), spoil))
    source.layer(0)
    with pytest.raises(UserError, match=f"'{name}' holds NaN or infinity"):
        source.layer(1)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_rows_of_no_token_may_hold_anything_and_those_of_tokens_may_not(tmp_path, monkeypatch, name, small) -> None:
    """Of an embedding that is read at once as of one that stays in the checkpoint."""
    from ovqk.weights import native

    def spoil(tensors) -> None:
        tensors[name][35] = float("nan")

    if not small:
        monkeypatch.setattr(native, "KEEP_UP_TO", 0)
    make_llama(tmp_path / "m")
    source = opened(rewrite(tmp_path / "m", spoil))
    folded = fold_embeddings(source.embeddings(), source.architecture)
    vocabulary = read_vocabulary(folded, 35)
    assert all(dense(gram).isfinite().all() for gram in (vocabulary.gram_embed, vocabulary.gram_unembed))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        read_vocabulary(folded, 36).gram_cross  # noqa: B018 (computed when asked for)


@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_proj.weight", "transformer.wte.weight"])
def test_a_quantised_tensor_is_no_missing_one(tmp_path, name) -> None:
    def quantise(tensors) -> None:
        tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(UserError, match=f"'{name}' is stored as I8; allowed: F64, F32, F16, BF16"):
        opened(rewrite(copy(tmp_path), quantise)).embeddings()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_key_value_heads", 0, "'num_key_value_heads' as a positive integer, not 0"),
        ("num_key_value_heads", "two", "'num_key_value_heads' as a positive integer, not 'two'"),
        ("head_dim", "8", "'head_dim' as '8'; allowed: an integer above 0"),
        ("max_position_embeddings", "long", "'max_position_embeddings' as a positive integer"),
        ("rms_norm_eps", "small", "'rms_norm_eps' as a number"),
        ("rope_parameters", [1], r"'rope_parameters' as \[1\]; allowed: an object"),
        ("rope_parameters", {"rope_theta": "big"}, "'rope_parameters.rope_theta' as 'big'; allowed: a finite number"),
        (
            "rope_parameters",
            {"rope_theta": 1e4, "rope_type": "linear"},
            "rotary positions by 'linear' and does not give 'rope_parameters.factor'",
        ),
        (
            "rope_parameters",
            {"rope_theta": 0.0},
            "'rope_parameters.rope_theta' as 0.0; allowed: a finite number above 0",
        ),
        (
            "rope_parameters",
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 2.0},
            "rotary settings.*turn 16 components of 8.*all of a head",
        ),
    ],
)
def test_a_value_of_the_config_that_cannot_be_used_is_named(tmp_path, key, value, message) -> None:
    make_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_an_unusable_config(tmp_path) -> None:
    directory = copy(tmp_path)
    for change, message in (
        ({"n_head": None}, "'n_head' as a positive integer"),
        ({"model_type": None}, "gives no model_type"),
        (
            {"model_type": "perceptron", "architectures": ["Perceptron"]},
            "neither a family that ovqk reads itself nor",
        ),
        ({"model_type": "perceptron", "architectures": None}, "names no 'architectures'"),
    ):
        config = json.loads((BUNDLED / "config.json").read_text()) | change
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            opened(directory)


def sharded(directory: Path, tensors: dict) -> None:
    """Save tensors as two shards and their index."""
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_of_two_checkpoints_in_a_folder_the_one_that_transformers_reads_is_read(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    make_llama(tmp_path / "m")
    other = {name: tensor + 1 for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items()}

    def reads_as_transformers() -> list[str]:
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        source = opened(tmp_path / "m")
        heads = own.model.layers[1].self_attn.q_proj.weight.T.reshape(24, 4, 8).transpose(0, 1)
        assert torch.equal(source.layer(1).W_Q, heads)
        return source.notes

    assert not reads_as_transformers()
    sharded(tmp_path / "m", other)
    told = "the directory holds more than one checkpoint: model.safetensors was read, and model-00001-of-00002"
    assert any(note.startswith(told) for note in reads_as_transformers())
    (tmp_path / "m" / "model.safetensors").unlink()
    assert not reads_as_transformers()
    save_file(load_file(BUNDLED / "model.safetensors"), tmp_path / "m" / "training_copy.safetensors")
    told = "the shards of model.safetensors.index.json was read, and training_copy.safetensors was not"
    assert any(told in note for note in reads_as_transformers())


def test_a_file_of_another_name_is_no_checkpoint(tmp_path) -> None:
    directory = copy(tmp_path)
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"holds model-00001-of-00002\.safetensors, but neither model\.safetensors nor"):
        opened(directory)


def test_a_gguf_file_beside_a_config_alone_is_named(tiny, tmp_path) -> None:
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds no \.safetensors file\. It holds m\.gguf: give that file's path"):
        opened(tmp_path)


def test_an_adapter_is_told_of_beside_its_base_model_and_refused_alone(tmp_path) -> None:
    make_llama(tmp_path / "m")
    lora = {"base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": torch.ones(2, 24)}
    save_file(lora, tmp_path / "m" / "adapter_model.safetensors")
    assert any("an adapter (LoRA or the like), which was not applied" in note for note in opened(tmp_path / "m").notes)
    assert not any("more than one checkpoint" in note for note in opened(tmp_path / "m").notes)
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    (tmp_path / "m" / "model.safetensors").unlink()
    alone = r"an adapter \(LoRA or the like\) of someone/base, without the weights that it adapts"
    with pytest.raises(UserError, match=alone):
        opened(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(UserError, match=alone):
        opened(tmp_path / "m")


QUANTISED = {
    "GPTQ or AWQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
    "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.float16, "weight_shape": torch.int64},
    "FP8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "bitsandbytes": {"weight": torch.uint8, "weight.absmax": torch.float32},
    "MLX": {"weight": torch.uint32, "scales": torch.float16, "biases": torch.float16},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("said", [True, False])
def test_a_quantised_checkpoint_is_called_so(tmp_path, method, said) -> None:
    """By the method that config.json names, or by what the parts of its tensors are called."""

    def quantise(tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            del tensors[name]
            for part, dtype in QUANTISED[method].items():
                tensors[name.removesuffix("weight") + part] = torch.zeros(4, 4).to(dtype)

    make_llama(tmp_path / "m")
    directory = rewrite(tmp_path / "m", quantise)
    if said:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq"}
        (directory / "config.json").write_text(json.dumps(config))
    told = r"quantization_config\.quant_method=gptq" if said else rf"\({method}\): it holds"
    with pytest.raises(
        UserError, match=rf"The checkpoint is quantised.*{told}.*Give a checkpoint that is not quantised"
    ):
        opened(directory)


def test_a_quantised_checkpoint_does_not_reach_the_bridge(tmp_path) -> None:
    directory = copy(tmp_path)
    keys = {"model_type": "bloom", "quantization_config": {"quant_method": "bitsandbytes"}}
    config = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"quantised: config\.json gives quantization_config\.quant_method=bitsandbytes"
    ):
        opened(directory)


def test_a_missing_tensor_is_told_with_the_names_nearest_to_it(tmp_path) -> None:
    def unmerged(tensors) -> None:
        for name in [name for name in tensors if "q_proj" in name]:
            tensors[name.replace("q_proj.weight", "q_proj.inner.weight")] = tensors.pop(name)

    make_llama(tmp_path / "m")
    with pytest.raises(UserError, match=r"q_proj\.weight'.*nearest by name: .*layers\.0\.self_attn\.q_proj\.inner"):
        opened(rewrite(tmp_path / "m", unmerged))


def test_shards_and_a_shard_that_is_missing(tmp_path) -> None:
    directory = copy(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    assert torch.equal(opened(directory).layer(3).W_Q, opened(BUNDLED).layer(3).W_Q)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"the index names model-00002-of-00002\.safetensors"):
        opened(directory)


def test_a_tied_checkpoint_may_store_either_of_embedding_and_unembedding(tmp_path) -> None:
    make_gpt2(tmp_path / "m", tie_word_embeddings=True)
    whole = opened(tmp_path / "m").embeddings()

    def rename(tensors) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    other = opened(rewrite(tmp_path / "m", rename)).embeddings()
    assert torch.equal(other.W_E, whole.W_E) and torch.equal(other.W_U, whole.W_U)


def test_an_untied_checkpoint_without_unembedding_has_none(tmp_path) -> None:
    make_gpt2(tmp_path / "m", tie_word_embeddings=False)
    directory = rewrite(tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight"))
    embeddings = opened(directory).embeddings()
    assert embeddings.W_E is not None and embeddings.W_U is None


def test_names_with_and_without_the_transformer_prefix(tmp_path) -> None:
    def strip(tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    assert torch.equal(opened(rewrite(copy(tmp_path), strip)).layer(0).W_V, opened(BUNDLED).layer(0).W_V)


def test_grouped_keys_are_indexed_not_tiled(tmp_path) -> None:
    """Query head j reads KV head j // group; tiling would pair head 1 with KV head 1."""
    from ovqk.circuits.factors import ov_factors, qk_factors

    model = make_llama(tmp_path / "m")
    source = opened(tmp_path / "m")
    weights, facts = source.layer(0), source.architecture
    assert facts.kv_of_head.tolist() == [0, 0, 1, 1]
    own = model.model.layers[0].self_attn.k_proj.weight.detach()
    assert torch.equal(weights.W_K[1], own[8:16].T)
    keys = qk_factors(weights, facts).right
    assert torch.equal(keys[1], weights.W_K[0].T) and torch.equal(keys[2], weights.W_K[1].T)
    assert torch.equal(ov_factors(weights, facts).left[3], weights.W_V[1])


def test_single_files_of_transformer_lens_names() -> None:
    source = opened(shared_model("max-of-two") / "layernorm.safetensors")
    assert source.architecture.norm == "layernorm" and source.architecture.n_ctx == 2
    assert any("model.causal" in note for note in source.notes)
    plain = opened(shared_model("max-of-two") / "simple.safetensors", causal=True)
    assert plain.architecture.norm == "none" and len(plain.notes) == 1
    modular = opened(shared_model("modular-addition") / "l8k1hzciux.safetensors", causal=False)
    assert (modular.architecture.n_heads, modular.architecture.causal) == (4, False)
    assert modular.first_mlp().activation == UNTOLD


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.attn.W_Q", (32, 32)),
        ("blocks.0.attn.W_K", (2, 32, 32)),
        ("blocks.0.attn.W_O", (1, 32, 31)),
        ("blocks.0.attn.b_Q", (3,)),
        ("blocks.0.ln1.w", (31,)),
        ("embed.W_E", ()),
        ("embed.W_E", (64, 31)),
        ("pos_embed.W_pos", (2, 31)),
        ("unembed.W_U", (32, 70)),
        ("unembed.W_U", (32,)),
    ],
)
def test_tensors_of_a_single_file_fit_one_another(tmp_path, name, shape) -> None:
    tensors = load_file(shared_model("max-of-two") / "layernorm.safetensors")
    save_file(tensors | {name: torch.ones(shape)}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=f"'{name}'.* has shape|' {re.escape(str(list(shape)))};"):
        opened(tmp_path / "one.safetensors")


def test_an_unembedding_may_lack_tokens_that_are_never_predicted(tmp_path) -> None:
    tensors = load_file(shared_model("max-of-two") / "layernorm.safetensors")
    tensors["unembed.W_U"] = tensors["unembed.W_U"][:, :-1].contiguous()
    save_file(tensors | {"blocks.x.attn.W_Q": torch.ones(2)}, tmp_path / "one.safetensors")
    assert opened(tmp_path / "one.safetensors").embeddings().W_U.shape == (32, 63)


def test_a_single_file_of_other_names_is_refused() -> None:
    with pytest.raises(UserError, match="must hold TransformerLens names"):
        opened(BUNDLED / "model.safetensors")


def test_the_digest_covers_weights_config_and_tokenizer(tmp_path) -> None:
    directory = copy(tmp_path)
    before = open_checkpoint(local(directory)).digest
    assert before == open_checkpoint(local(BUNDLED)).digest  # a copy is the same model
    (directory / "tokenizer.json").write_text((directory / "tokenizer.json").read_text().replace("Mary", "Maria"))
    assert open_checkpoint(local(directory)).digest != before
    changed = rewrite(copy(tmp_path / "other"), lambda tensors: tensors["transformer.ln_f.bias"].add_(1e-3))
    assert open_checkpoint(local(changed)).digest != before


def test_weights_with_their_own_scales_beside_them_are_refused(tiny, tmp_path) -> None:
    directory = copy(tmp_path, tiny("llama"))
    rewrite(directory, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight_scale": torch.ones(1)}))
    with pytest.raises(UserError, match=r"k_proj\.weight' is quantised: .*weight_scale. lies beside it"):
        opened(directory)


def test_an_adapter_within_the_checkpoint_is_called_so(tiny, tmp_path) -> None:
    def adapt(tensors) -> None:
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        tensors[f"{name}.lora_A.default.weight"] = torch.ones(2, 24)

    with pytest.raises(UserError, match=r"q_proj\.weight'\. It holds an adapter .*merge_and_unload"):
        opened(rewrite(copy(tmp_path, tiny("llama")), adapt))


def test_an_unembedding_outside_of_what_was_wrapped_is_found(tiny, tmp_path) -> None:
    def wrap(tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    source = opened(rewrite(copy(tmp_path, tiny("llama")), wrap))
    assert source.embeddings().W_U is not None


def test_what_is_wrong_with_a_config_is_told_whole(tiny, tmp_path) -> None:
    directory = copy(tmp_path, tiny("mistral"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": "wide"}))
    with pytest.raises(UserError, match=r"config\.json cannot be read \('vocab_size' is 'wide'; allowed: an integer\)"):
        opened(directory)
