"""Checkpoints, task files, cells and records made by someone else: no code in them runs, and no file is believed that
the digest is not of."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.models import local, make_gpt2, opened

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.errors import UserError
from ovqk.tasks.words import load_tokenizer

FROM_DISK = ("from_pretrained", "from_config")
"""Names of transformers' calls that may read files or run code."""


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def make_opt(directory: Path, seed: int = 0) -> Path:
    """A tiny model of a family that goes through the bridge when its activations are asked for."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(seed)
    BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=24, n_layer=2, n_head=4)).save_pretrained(directory)
    return directory


def test_a_pickled_file_beside_safetensors_is_never_the_one_that_is_read(tmp_path) -> None:
    directory, mark = make_opt(tmp_path / "m"), tmp_path / "ran"
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


@pytest.mark.parametrize("name", ["other.safetensors", "adapter_model.bin", "../other.safetensors"])
def test_a_config_cannot_name_other_weights_than_those_of_the_digest(tmp_path, name) -> None:
    directory = make_opt(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    shutil.copy(make_opt(tmp_path / "n", seed=1) / "model.safetensors", directory / name)
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
        assert keys.get("local_files_only") == "True", f"{path}:{call.lineno}"
