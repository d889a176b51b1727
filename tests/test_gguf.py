"""GGUF files: the same weights, settings and tokenizer as the checkpoint that each was made from, or one message."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from support.gguf_writing import ARCHITECTURES, tokenizer_metadata, write_gguf
from support.models import KINDS, local, make, opened, shared_model

from ovqk.checkpoints.gguf_file import GGUFFile
from ovqk.checkpoints.gguf_tokenizer import SPLITS, tokenizer_of
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.factors import ov_factors, qk_factors
from ovqk.errors import UserError
from ovqk.tasks.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own plans

READ = [kind for kind in KINDS if kind.split("-")[0] in ARCHITECTURES and kind not in ("phi3-longrope", "llama-yarn")]
UNKNOWN_TO_TRANSFORMERS = ("gpt_neox", "gemma", "phi3", "mistral")
"""Model types of which its reader of GGUF files reads none, or none that is made here."""
Q4_1, Q8_0, F16 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16
TEXTS = ("Mary and John's 1732 apples,  they're new!\n\nYes", " the 12345 naïve 日本 words\t", "don't  stop  (ever)")


def same(a, b, tolerance: float = 1e-6) -> None:
    """Typed weights are equal, field by field."""
    assert type(a) is type(b)
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if torch.is_tensor(one):
            assert torch.allclose(one, other, atol=tolerance, rtol=tolerance), field.name
        elif dataclasses.is_dataclass(one):
            same(one, other, tolerance)
        elif field.name != "read":
            assert one == other, field.name


def architecture_of_gpt2_size(kind: str) -> dict[str, object]:
    """Rows of whole blocks, so that a tensor can be quantised."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    return {"n_embd": 64, "n_inner": 96} if kind == "gpt2" else wide


@pytest.mark.parametrize("kind", READ)
def test_weights_are_those_of_the_checkpoint_that_the_file_was_made_from(kind, tmp_path) -> None:
    """But for what a file does not tell: Gemma's scale of the scores, which is d_head's, and Mistral's window."""
    untold = {"gemma2": {"query_pre_attn_scalar": 8}, "gemma3_text": {"query_pre_attn_scalar": 8}}
    make(kind, tmp_path / "hf", **(untold | {"mistral": {"sliding_window": None}}).get(kind, {}))
    windows = {"attention.sliding_window_pattern": 2} if kind == "gemma3_text" else {}  # every sixth unless told
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", settings=windows)
    ours, theirs = opened(path), opened(tmp_path / "hf")
    same(ours.architecture, theirs.architecture)
    for index in range(theirs.architecture.n_layers):
        same(ours.layer(index), theirs.layer(index))
    same(ours.embeddings(), theirs.embeddings())
    same(ours.first_mlp(), theirs.first_mlp())


@pytest.mark.parametrize("kind", [kind for kind in READ if kind.split("-")[0] not in UNKNOWN_TO_TRANSFORMERS])
def test_transformers_reads_the_written_file_as_the_same_model(tiny, kind, tmp_path) -> None:
    """The writer of these tests is checked by a reader that is not ours."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tiny(kind), tmp_path / "model.gguf")
    checkpoint = open_checkpoint(local(path))
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny(kind)))
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    shared = set(found) & set(checkpoint.shapes)
    assert len(shared) > 10
    for name in shared:
        assert torch.allclose(checkpoint.tensor(name), found[name], atol=1e-6), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama-yarn", "phi3-longrope", "gemma3-linear", "llama3-factors"])
def test_scaled_rotations(kind, tmp_path) -> None:
    """The rotation of the file's settings is that of the model."""
    settings, extra = {}, {}
    if kind == "llama-yarn":
        make(kind, tmp_path / kind)
        settings = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        settings |= {"rope.scaling.original_context_length": 4}
    elif kind == "phi3-longrope":
        make(kind, tmp_path / kind)
        extra = {"rope_factors_short.weight": np.array([1.1, 1.3], np.float32)}
        extra |= {"rope_factors_long.weight": np.array([2.0, 3.0], np.float32)}
        settings = {"rope.scaling.original_context_length": 12}
    elif kind == "gemma3-linear":
        rotations = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
        local_ = {"rope_type": "default", "rope_theta": 10000.0}
        types = ["sliding_attention"] * 5 + ["full_attention"]
        make(
            "gemma3_text", tmp_path / kind, num_hidden_layers=6, layer_types=types, query_pre_attn_scalar=8,
            rope_parameters={"full_attention": rotations, "sliding_attention": local_},
        )  # fmt: skip
        settings = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    else:
        rotation = {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
        }  # fmt: skip
        model = make("llama", tmp_path / kind, rope_parameters=rotation)
        plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        extra = {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)}
    ours, theirs = (
        opened(write_gguf(tmp_path / kind, tmp_path / "x.gguf", None, None, settings, extra)),
        opened(tmp_path / kind),
    )
    for index in range(theirs.architecture.n_layers):
        a, b = ours.layer(index).rotary, theirs.layer(index).rotary
        assert torch.allclose(a.inverse_frequencies, b.inverse_frequencies, rtol=1e-5), index
        assert a.scale == pytest.approx(b.scale, rel=1e-6)
        assert ours.layer(index).sliding_window == theirs.layer(index).sliding_window


def test_raw_circuits_of_a_quantised_file_against_a_naive_computation(tmp_path) -> None:
    """W_QK and W_OV of every head, by hand from the dequantised numbers in the file's own layout, float64."""
    make("llama", tmp_path / "hf", **architecture_of_gpt2_size("llama"))
    path = write_gguf(
        tmp_path / "hf", tmp_path / "m.gguf", {"attn_q.weight": Q4_1, "attn_k.weight": Q8_0, "attn_v.weight": F16}
    )
    source, stored = opened(path), GGUFFile(path, "file")
    facts = source.architecture
    for layer in range(facts.n_layers):
        weights = source.layer(layer)
        ov, qk = ov_factors(weights, facts), qk_factors(weights, facts)
        q, k, v, o = (
            stored.read(f"blk.{layer}.attn_{part}.weight").astype(np.float64) for part in ("q", "k", "v", "output")
        )
        for head in range(facts.n_heads):
            mine, group = slice(head * 16, head * 16 + 16), slice(head // 2 * 16, head // 2 * 16 + 16)
            for own, naive in ((qk, q[mine].T @ k[group]), (ov, v[group].T @ o[:, mine].T)):
                found = own.left[head].double() @ own.right[head].double()
                assert np.abs(found.numpy() - naive).max() < 1e-6 * np.abs(naive).max()
    notes = " ".join(source.notes)
    assert "values are of dequantised weights (Q8_0: attn_k; Q4_1: attn_q)" in notes  # float16 is no quantisation


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_rows_are_the_rows_of_the_whole_tensor(quantisation, tmp_path) -> None:
    make("llama", tmp_path / "hf", vocab_size=5000, **architecture_of_gpt2_size("llama"))
    kind = GGMLQuantizationType[quantisation]
    checkpoint = open_checkpoint(local(write_gguf(tmp_path / "hf", tmp_path / "m.gguf", {"token_embd.weight": kind})))
    whole = checkpoint.tensor("model.embed_tokens.weight")
    original = open_checkpoint(local(tmp_path / "hf")).tensor("model.embed_tokens.weight").numpy()
    assert np.array_equal(whole.numpy(), quants.dequantize(quants.quantize(original, kind), kind))
    for start, stop in ((0, 1), (2047, 2049), (4999, 5000), (3, 3), (4000, 9000)):
        assert torch.equal(checkpoint.rows("model.embed_tokens.weight", start, stop), whole[start:stop])
    assert checkpoint.quantisation["token_embd"] == quantisation


# --- tokenizers -----------------------------------------------------------------------------------------------


def byte_level(directory: Path, split) -> Path:
    """A trained byte-level tokenizer with a special token, saved as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt2", "digits"))
    first = {"gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}.get(split)
    if first is None:
        from tokenizers import Regex

        first = [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([*first, by_bytes]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "Mary gave 17 apples to John", "the store and the words"] * 9, trainer)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_tokenizers(pre, tmp_path) -> None:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(byte_level(tmp_path / "hf", SPLITS[pre]) / "tokenizer.json"))
    content = tokenizer_metadata(tmp_path / "hf", pre)
    built = tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in content.items()}, "file")
    assert built.get_vocab_size() == own.get_vocab_size()
    for text in TEXTS:
        assert built.encode(text).ids == own.encode(text).ids
        assert built.decode(built.encode(text).ids) == text
    assert built.encode("<|end|>").ids == [own.token_to_id("<|end|>")]


def test_the_tokenizer_of_gpt2() -> None:
    """Against the checkpoint's own reading of vocab.json and merges.txt."""
    from tokenizers import models

    from ovqk.checkpoints.checkpoint import Checkpoint
    from ovqk.checkpoints.tensors import SafetensorsFiles

    directory = shared_model("gpt2-tokenizer")
    own = load_tokenizer(Checkpoint("x", directory, {"model_type": "gpt2"}, SafetensorsFiles({}, {}, {}), ""))
    vocabulary, merges = models.BPE.read_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [" ".join(pair) for pair in merges]
    content = {"model": "gpt2", "tokens": tokens, "merges": merges}
    content = {f"tokenizer.ggml.{key}": value for key, value in content.items()}
    built = tokenizer_of({"general.architecture": "gpt2"} | content, "file")
    assert built.encode("Hello world").ids == [15496, 995]
    for text in TEXTS:
        assert built.encode(text).ids == own.encode(text).ids


def sentencepiece_metadata(directory: Path) -> dict[str, object]:
    content = json.loads((directory / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    return {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "bos_token_id": 1}


def test_a_sentencepiece_tokenizer_with_its_start_token() -> None:
    from tokenizers import Tokenizer

    directory = shared_model("stories260k")
    own = Tokenizer.from_file(str(directory / "tokenizer.json"))
    content = {f"tokenizer.ggml.{key}": value for key, value in sentencepiece_metadata(directory).items()}
    built = tokenizer_of(content, "file")
    for text in ("Once upon a time, there was a girl named Lily.", "She said: 日本 naïve\n\n  ok", *TEXTS):
        assert built.encode(text).ids == own.encode(text).ids
        assert built.decode(built.encode(text).ids) == own.decode(own.encode(text).ids)
    without = tokenizer_of(content | {"tokenizer.ggml.add_bos_token": False}, "file")
    assert without.encode("a girl").ids == own.encode("a girl", add_special_tokens=False).ids


def test_padding_tokens_at_the_end_are_no_tokens() -> None:
    tokens = ["a", "b", "[PAD7]", "[PAD2]", "[PAD3]"]
    content = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens}
    built = tokenizer_of(content | {"tokenizer.ggml.token_type": [1, 1, 1, 5, 5]}, "file")
    assert built.get_vocab_size() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "klingon"}, "tokenizer.ggml.pre is 'klingon'.*allowed: .*smollm"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'.*allowed: gpt2"),
        ({"tokens": ["a", "a", "b"]}, "1 tokens occur twice in the file's vocabulary"),
        ({"token_type": [1]}, "the file has 3 tokens but gives the kinds for 1"),
        ({"merges": ["a zz"]}, "cannot be built"),
        ({"tokens": ["a", "b", "c"]}, "cannot be built"),  # its merge makes a token that is not there: a panic
        ({"model": "llama"}, "has no score for each token"),
    ],
)
def test_tokenizers_that_are_refused(change, message) -> None:
    content = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | change
    with pytest.raises(UserError, match=rf"(?s)the label: .*{message}"):
        tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in content.items()}, "the label")
    assert tokenizer_of({}, "the label") is None


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count=8.*not read"),
        ({"rope.dimension_count": 4}, "rotates 4 of a head's 8 components"),
        ({"attention.value_length": 4}, "each head has 8 components for keys and 4 for values"),
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "scales its rotary positions by 'dynamic'"),
        ({"attention.head_count_kv": [2, 1]}, "head_count_kv holds a list"),
        ({"attention.layer_norm_rms_epsilon": "small"}, r"gives 'small' for llama\.attention\.layer_norm_rms_epsilon"),
        ({"attention.key_length": 8.0}, r"gives 8\.0 for llama\.attention\.key_length; allowed: a whole number"),
        (
            {"attention.layer_norm_rms_epsilon": float("nan")},
            r"gives nan for .*epsilon; allowed: a number that is finite",
        ),
        ({"attention.layer_norm_rms_epsilon": -1.0}, r"gives -1\.0 for .*not negative"),
        ({"attention.head_count": 0}, "its metadata, as a config.json, must give 'num_attention_heads' as a positive"),
        ({"block_count": 5}, "tensors are missing"),
        ({"block_count": 1}, "of a layer after those"),
        ({"attention.head_count": 3}, "has shape|which does not divide|promise"),
    ],
)
def test_settings_that_are_refused(tiny, settings, message, tmp_path) -> None:
    path = write_gguf(tiny("llama"), tmp_path / "m.gguf", settings=settings)
    with pytest.raises(UserError, match=message):
        opened(path)


def test_files_that_are_refused(tiny, tmp_path) -> None:
    path = write_gguf(tiny("llama"), tmp_path / "m.gguf")
    data = path.read_bytes()

    def message(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            opened(path)
        assert str(caught.value).startswith(f"model.path={path}: ")
        return str(caught.value)

    assert "not a complete GGUF file (it does not begin with 'GGUF')" in message(b"x" + data[1:])
    assert "allowed: little-endian files of version 2 or 3" in message(data[:4] + struct.pack("<I", 1) + data[8:])
    assert "of the other byte order" in message(data[:4] + struct.pack(">I", 3) + data[8:])
    assert "cannot mmap an empty file" in message(b"")
    begins = data[:8] + struct.pack("<QQ", 0, 1) + struct.pack("<Q1sI", 1, b"k", 9)  # a key whose value is a list
    stub = begins + struct.pack("<IQ", 8, 49152)
    assert f"a list of 49,152 values in its metadata goes beyond the file's {len(stub)} bytes" in message(stub)
    assert f"its header goes beyond the file's {len(begins)} bytes" in message(begins)
    for size in (5, 30, 200, len(data) // 2, len(data) - 40):
        assert "not a complete GGUF file" in message(data[:size])
    other = data.replace(b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama",
                         b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llamo")  # fmt: skip
    assert "general.architecture is 'llamo'" in message(other) and "gptneox" in message(other)


def test_no_damage_to_a_header_is_more_than_one_message(tiny, tmp_path) -> None:
    """Bytes changed at random: the file is read, or refused in a message."""
    tokenizer = {"model": "gpt2", "pre": "gpt-2", "tokens": [chr(97 + i) for i in range(26)], "bos_token_id": 1}
    path = write_gguf(tiny("llama"), tmp_path / "m.gguf", tokenizer=tokenizer)
    data, generator = path.read_bytes(), np.random.default_rng(0)
    end, refused = data.index(b"blk.0.attn_v.weight") + 40, 0
    for _ in range(400):
        content = bytearray(data)
        for at in generator.integers(0, end, size=generator.integers(1, 4)):
            content[at] = generator.integers(0, 256)
        path.write_bytes(bytes(content))
        try:
            source = opened(path)
            source.layer(0), source.embeddings(), source.first_mlp(), load_tokenizer(open_checkpoint(local(path)))
        except UserError:
            refused += 1
    assert refused > 100


def test_a_part_of_a_split_file(tiny, tmp_path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "m-00001-of-00003.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of the 3 parts of a split GGUF file"):
        opened(path)


def test_an_unknown_quantisation_is_named_with_its_tensor(tiny, tmp_path) -> None:
    path = write_gguf(tiny("llama"), tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.attn_k.weight") + len("blk.1.attn_k.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 4242)
    path.write_bytes(bytes(data))
    with pytest.raises(
        UserError, match=r"'model\.layers\.1\.self_attn\.k_proj\.weight' is stored as type 4242; allowed: any"
    ):
        opened(path)


def test_nan_in_a_file_is_refused(tiny, tmp_path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "hf")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=r"q_proj\.weight' holds NaN"):
        opened(write_gguf(tmp_path / "hf", tmp_path / "m.gguf")).layer(0)


def test_a_cell_of_a_file_names_its_quantisation_and_needs_no_other_file(cli, tmp_path) -> None:
    make("llama", tmp_path / "hf", vocab_size=420, **architecture_of_gpt2_size("llama"))
    tokenizer = tokenizer_metadata(byte_level(tmp_path / "hf", SPLITS["smollm"]), "smollm")
    path = write_gguf(tmp_path / "hf", tmp_path / "tiny model.gguf", {"attn_q.weight": Q4_1}, tokenizer)
    code, printed = cli("model=local", f"model.path='{path}'", "task=none", "tracking=none", "analysis.components=1")
    assert code == 0, printed
    assert "values are of dequantised weights (Q4_1: attn_q)" in printed
    (record,) = (tmp_path / "results" / "tiny-model" / "none").glob("*/record.json")
    content = json.loads(record.read_text())
    assert content["provenance"]["quantisation"]["attn_q"] == "Q4_1"
    assert content["provenance"]["quantisation"]["attn_k"] == "F32"
    assert content["loaded_by"] == "families"
