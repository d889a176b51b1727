"""Checkpoints, task files, cells and records made by someone else: no code in them runs, and no file is believed that
the digest is not of."""

import ast
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT
from support.models import local, make_gpt2, opened
from tokenizers import Tokenizer, models

from ovqk.checkpoints import tensors as module
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.checkpoints.shards import read_header
from ovqk.checkpoints.tensors import SafetensorsFiles, index_files
from ovqk.config import expansion
from ovqk.config.expansion import refuse_expanding
from ovqk.config.rerun import refuse_foreign_files
from ovqk.config.schema import TaskConfig, VariableConfig, VariableKind
from ovqk.errors import UserError
from ovqk.records.record import read_record
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import resolve_task
from ovqk.whole_files import read_json

FROM_DISK = ("from_pretrained", "from_config")
"""Names of transformers' calls that may read files or run code."""


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def make_bloom(directory: Path, seed: int = 0) -> Path:
    """A tiny model of a family that goes through the bridge when its activations are asked for."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(seed)
    BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=24, n_layer=2, n_head=4)).save_pretrained(directory)
    return directory


def test_a_pickled_file_beside_safetensors_is_never_the_one_that_is_read(tmp_path) -> None:
    directory, mark = make_bloom(tmp_path / "m"), tmp_path / "ran"
    digest = open_checkpoint(local(directory)).digest
    weights = opened(directory).layer(0).W_Q
    torch.save({"x": Trap(mark)}, directory / "pytorch_model.bin")
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    assert open_checkpoint(local(directory)).digest == digest
    assert torch.equal(opened(directory).layer(0).W_Q, weights)
    (directory / "model.safetensors").rename(directory / "decoy.safetensors")
    with pytest.raises(UserError, match=r"holds decoy\.safetensors, but neither model\.safetensors nor"):
        opened(directory)
    assert not mark.exists()


def test_a_link_named_like_a_blob_of_the_hub_does_not_say_what_a_folder_holds(tmp_path) -> None:
    directory, other = make_bloom(tmp_path / "m"), make_bloom(tmp_path / "n", seed=1) / "model.safetensors"
    digest = open_checkpoint(local(directory)).digest
    blob = tmp_path / "m" / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to(Path("blobs") / blob.name)
    assert open_checkpoint(local(directory)).digest == digest
    shutil.copy(other, blob)
    assert open_checkpoint(local(directory)).digest != digest


def test_a_file_that_takes_anothers_place_with_its_size_and_time_is_hashed_again(tmp_path) -> None:
    directory, other = make_bloom(tmp_path / "m"), make_bloom(tmp_path / "n", seed=1) / "model.safetensors"
    weights = directory / "model.safetensors"
    os.utime(weights, (1, 1))
    digest, size = open_checkpoint(local(directory)).digest, weights.stat().st_size
    assert open_checkpoint(local(directory)).digest == digest
    shutil.copy(other, weights)
    os.utime(weights, (1, 1))
    assert weights.stat().st_size == size and open_checkpoint(local(directory)).digest != digest


@pytest.mark.parametrize("name", ["other.safetensors", "adapter_model.bin", "../other.safetensors"])
def test_a_config_cannot_name_other_weights_than_those_of_the_digest(tmp_path, name) -> None:
    directory = make_bloom(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    shutil.copy(make_bloom(tmp_path / "n", seed=1) / "model.safetensors", directory / name)
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    with pytest.raises(UserError, match="transformers cannot load BloomForCausalLM"):
        opened(directory)


def test_the_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch) -> None:
    make_gpt2(tmp_path / "m")
    mark, directory = tmp_path / "ran", tmp_path / "m"
    (directory / "tokenizer.model").write_bytes(b"\n\x05\n\x01a\x15\x00")
    (directory / "tokenization_mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
    (directory / "config.json").write_text(json.dumps({"model_type": "mine"}))
    auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Mine"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"its tokenizer files cannot be read .*code builds, which ovqk does not run"):
        load_tokenizer(open_checkpoint(local(directory)))
    assert not mark.exists()


def test_every_call_into_transformers_says_that_no_code_runs_and_nothing_is_fetched() -> None:
    calls = [
        (path.relative_to(ROOT), node)
        for path in sorted((ROOT / "ovqk").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FROM_DISK
    ]
    assert len(calls) >= 3  # a model, its tokenizer, and one that is not used
    for path, call in calls:
        keys = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keys.get("trust_remote_code") in ("False", "trust_remote_code"), f"{path}:{call.lineno}"
        reads = isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
        assert not reads or keys.get("local_files_only") == "True", f"{path}:{call.lineno}"


KEYS = [
    ("gpt2", "n_layer"), ("gpt2", "n_head"), ("gpt2", "n_embd"), ("llama", "num_hidden_layers"), ("llama", "head_dim"),
    ("llama", "num_attention_heads"), ("llama", "num_key_value_heads"), ("gpt_neo", "attention_types"),
    ("bloom", "n_layer"), ("bloom", "hidden_size"), ("bloom", "vocab_size"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_a_size_that_the_tensors_cannot_have_is_refused_before_anything_is_made(tmp_path, tiny, kind, key) -> None:
    directory = make_bloom(tmp_path / "m") if kind == "bloom" else Path(shutil.copytree(tiny(kind), tmp_path / "m"))
    config = json.loads((directory / "config.json").read_text())
    number = [[["global", "local"], 10**9]] if key == "attention_types" else 10**9
    (directory / "config.json").write_text(json.dumps(config | {key: number}))
    started = time.monotonic()
    with pytest.raises(UserError, match=f"config.json gives '{key}' as 1000000000, but .* tensors have sides up to"):
        opened(directory)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("number", ["999999999", "9" * 5000])
def test_a_name_of_a_layer_far_beyond_the_others_makes_no_list_of_them(tmp_path, number) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"blocks.{layer}.attn.W_Q": torch.ones(1, 2, 2) for layer in ("0", number)}, path)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"tensor 'blocks\.\d\.attn\.W_.' is missing from the checkpoint"):
        opened(path)
    assert time.monotonic() - started < 5


def test_a_model_with_many_more_numbers_than_its_checkpoint_is_not_made(tmp_path) -> None:
    directory = make_bloom(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors") | {"flat": torch.zeros(60_000)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": 48_000, "n_layer": 2}))
    with pytest.raises(UserError, match=r"config\.json describes a model with \d+ numbers, but the checkpoint holds"):
        opened(directory)


def test_a_tokenizer_that_pads_and_cuts_does_neither(tmp_path, tiny_gpt2) -> None:
    from support.toy import toy_tokenizer

    directory = Path(shutil.copytree(tiny_gpt2, tmp_path / "m"))
    tokenizer = toy_tokenizer(40)
    plain = tokenizer.encode("w1 w2 w3").ids
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode("w1 w2 w3").ids != plain
    found = load_tokenizer(open_checkpoint(local(directory)))
    assert found is not None and found.encode("w1 w2 w3").ids == plain


def test_a_tokenizer_that_leaves_out_merges_at_random_does_not(tmp_path, tiny_gpt2) -> None:
    directory = Path(shutil.copytree(tiny_gpt2, tmp_path / "m"))
    letters = "abcdefgh"
    parts = [letters[:end] for end in range(1, len(letters) + 1)]
    vocab = {text: number for number, text in enumerate([*parts, *letters[1:]])}
    model = models.BPE(vocab, [*zip(parts, letters[1:], strict=False)], dropout=0.5)
    Tokenizer(model).save(str(directory / "tokenizer.json"))
    assert any(len(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(letters).ids) > 1 for _ in range(50))
    found = load_tokenizer(open_checkpoint(local(directory)))
    assert found is not None
    assert all(found.encode(letters).ids == [vocab[letters]] for _ in range(50))


FORMATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_are_read_as_the_safetensors_library_reads_them(tmp_path, data) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    kind = data.draw(st.sampled_from(FORMATS))
    start, stop = data.draw(st.integers(0, 7)), data.draw(st.one_of(st.none(), st.integers(-3, 7)))
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(3).half(), "b": torch.randn(shape).to(kind), "mask": torch.ones(2).bool()}, path)
    files, shapes, unread = index_files([path])
    assert shapes["b"] == tuple(shape) and unread == {"mask": "BOOL"}
    tensors = SafetensorsFiles(files, shapes, unread)
    with safe_open(path, "pt") as file:
        assert torch.equal(tensors.read("b"), file.get_tensor("b").float())
        if shape:
            assert torch.equal(tensors.read("b", start, stop), file.get_tensor("b")[start:stop].float())


def header_file(path: Path, header: object, size: int = 0) -> Path:
    """A safetensors file with this header, which may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.mark.parametrize(("header", "size"), [
    ({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, 4),
    ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
    ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4),
    ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, 0),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [10**18, 10**18 + 4]}}, 4),
    ({"a": 3}, 0), ([], 0), (b"[" * 10_000, 0), (b"\xff\xfe", 0), (b" " * (2**25 + 8), 0),
])  # fmt: skip
def test_a_header_that_lies_is_one_message(tmp_path, header, size) -> None:
    path = header_file(tmp_path / "a.safetensors", header, size)
    with pytest.raises(UserError, match=r"a\.safetensors: not a complete safetensors file"):
        index_files([path])


def test_a_tensor_in_two_files_is_refused(tmp_path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors: it holds 'x', and so does a\.safetensors"):
        index_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_header_is_read_once_however_many_tensors_are_read(tmp_path, monkeypatch) -> None:
    make_gpt2(tmp_path / "m")
    headers = []
    monkeypatch.setattr(module, "read_header", lambda *_: headers.append(1) or read_header(*_))
    source = opened(tmp_path / "m")
    source.layer(0)
    source.embeddings()
    assert headers == [1]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1, 2", "3", '"x"', "\x00", "NaN"])
def test_a_config_of_another_kind_is_one_message(tmp_path, text) -> None:
    make_gpt2(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json (is not valid JSON|must hold keys)"):
        opened(tmp_path / "m")


def test_a_pipe_is_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "record.json")
    assert read_record(tmp_path) is None
    with pytest.raises(ValueError, match="no regular file"):
        read_json(Path("/dev/zero"))


def test_a_task_of_very_many_words_is_refused_and_many_are_read_in_a_moment() -> None:
    from support.toy import toy_tokenizer

    words = [f"w{number % 120}" if number < 120 else f"no{number}" for number in range(10_000)]
    task = TaskConfig("x", "x", words={"a": words}, variables={"v": VariableConfig(VariableKind.set, words="a")})
    started = time.monotonic()
    found = resolve_task(task, toy_tokenizer(240), 240, "x")
    assert found.kept["a"] == 120 and len(found.dropped["a"]) == 9_880
    assert time.monotonic() - started < 5
    task.words["a"] = words * 10
    with pytest.raises(UserError, match=r"task\.words\.a: holds 100000 words; allowed: up to 10000"):
        resolve_task(task, toy_tokenizer(240), 240, "x")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(("text", "message"), [
    (BOMB, "aliases expand to more than 200000 values"), ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels"),
    ("[" * 5000, "nested more than 50 levels"), ("a: " + "x" * 2**23, "is larger than"),
])  # fmt: skip
def test_a_config_file_that_expands_without_bounds_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "theirs.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"theirs\.yaml: .*{message}"):
        refuse_expanding(tmp_path)


def test_config_files_are_looked_at_through_links_and_wherever_the_search_path_leads(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "theirs.yaml").write_text(BOMB)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "task").symlink_to(tmp_path / "real")
    (tmp_path / "given" / "loop").symlink_to(tmp_path / "given")
    with pytest.raises(UserError, match="aliases expand to more"):
        refuse_expanding(tmp_path / "given")
    with pytest.raises(UserError, match="aliases expand to more"):
        refuse_foreign_files([f"hydra.searchpath=[file://{tmp_path / 'real'}]"])


def test_a_folder_that_is_no_folder_of_configs_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(expansion, "MOST_FOLDERS", 3)
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(UserError, match="holds more than 3 folders"):
        refuse_expanding(tmp_path)
    refuse_expanding(tmp_path / "nowhere")  # Hydra tells


def test_config_files_of_this_repository_are_far_from_those_bounds() -> None:
    for folder in ("conf", "sweeps"):
        refuse_expanding(ROOT / folder)
