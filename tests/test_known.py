"""Files under the name of a model that published numbers or claims are about: are they that model's?"""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import ROOT
from support.models import BUNDLED, local, make_gpt2, shared_model

from ovqk import library
from ovqk.checkpoints.files import file_hash
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.published.statements import statements
from ovqk.published.table import Places, frame, rows
from ovqk.weights.known import OtherModelError, Sizes, check_files, identified_by, known_models, sizes_of_files
from ovqk.weights.readers import open_named, open_weights

MINIS = BUNDLED.parent
CONF = ROOT / "conf"


def tuned(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with one number changed, as training changes all of them."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + torch.eye(*tensors[name].shape) if tensors[name].ndim == 2 else tensors[name] + 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- what is known -----------------------------------------------------------------------------------------------


def test_every_model_that_statements_or_claims_are_about_is_known() -> None:
    tasks = [yaml.safe_load(path.read_text()) for path in (CONF / "task").glob("*.yaml")]
    claims = {name: each for task in tasks for name, each in (task.get("claims") or {}).items()}
    assert {each.subject.name for each in statements()} | set(claims) == set(known_models())
    for name, known in known_models().items():
        assert known.source and (known.sizes.tokens or 0) > 0
        path = CONF / "model" / f"{name}.yaml"
        content = yaml.safe_load(path.read_text()) if path.is_file() else {}
        assert content.get("repo", known.repo) == known.repo
        if name in claims and claims[name].get("shape"):
            assert claims[name]["shape"] == [known.sizes.layers, known.sizes.heads]


@pytest.mark.parametrize("name", ["mini-attn", "mini-gpt2", "mini-llama"])
def test_what_is_known_of_a_bundled_model_is_its_files(name) -> None:
    known, model = known_models()[name], ModelConfig(name=name, source=Source.bundled)
    checkpoint = open_checkpoint(model)
    assert sizes_of_files(checkpoint, open_weights(checkpoint, model).architecture) == known.sizes
    assert known.sha256 == file_hash(MINIS / name / "model.safetensors")


SHARED = {
    "gpt2": "gpt2-small-attention", "mod-113-grokked": "nanda-mod113-grokked/model.safetensors",
    "mod-59-l8k1hzciux": "modular-addition/l8k1hzciux.safetensors",
    "mod-59-q9rsl94xlv": "modular-addition/q9rsl94xlv.safetensors",
    "induction-2l": "nanda-induction-2l-infinite/model.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_is_known_of_a_model_fits_its_real_files(name) -> None:
    model = local(shared_model(SHARED[name]))
    checkpoint = open_checkpoint(model)
    assert sizes_of_files(checkpoint, open_weights(checkpoint, model).architecture).fits(known_models()[name].sizes)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True), ({"layers": 6}, False), ({"heads": 16}, False), ({"d_model": 1024}, False),
        ({"family": "gpt_neo"}, False),  # GPT-Neo 125M has GPT-2's sizes
        ({"tokens": 50304}, True), ({"tokens": 50258}, True), ({"tokens": 21128}, False), ({"tokens": 64000}, False),
        ({"tokens": 50257 + 1609}, True),  # a fine-tune with Whisper's special tokens
        ({"tokens": None, "family": None}, True), ({"kv_heads": 12}, True), ({"kv_heads": 4}, False),
    ],
)  # fmt: skip
def test_sizes_that_may_be_gpt2s(change, fits) -> None:
    found = {"layers": 12, "heads": 12, "d_model": 768, "tokens": 50257, "family": "gpt2"} | change
    assert Sizes(**found).fits(known_models()["gpt2"].sizes) is fits


@pytest.mark.parametrize(
    ("name", "tokens", "fits"),
    [
        ("phi-2", 50296, True),  # resized to its tokenizer, as fine-tunes of phi are, and a token more
        ("mod-113-grokked", 113, True), ("mod-113-grokked", 111, False), ("mod-59-q9rsl94xlv", 61, False),
    ],
)  # fmt: skip
def test_a_tasks_own_vocabulary_is_held_tighter_than_a_large_one(name, tokens, fits) -> None:
    sizes = known_models()[name].sizes
    assert dataclasses.replace(sizes, tokens=tokens).fits(sizes) is fits


def test_key_value_heads_tell_llama_2_from_llama_3_although_its_vocabulary_is_no_reason() -> None:
    llama_3 = known_models()["llama-3.1-8b"].sizes
    llama_2 = Sizes(32, 32, 4096, 32000, "llama", 32)
    assert not llama_2.heads_fit(llama_3) and dataclasses.replace(llama_2, kv_heads=8).heads_fit(llama_3)
    assert "32 heads over 8 key-value heads" in str(llama_3) and "key-value" not in str(llama_2)


# --- cells and notebooks -------------------------------------------------------------------------------------------


def test_a_model_of_other_sizes_in_a_folder_with_a_known_name_is_refused_and_opens_under_another(tmp_path) -> None:
    make_gpt2(tmp_path / "gpt2")
    said = r"^model.name=gpt2: model.path=\S+ is not gpt2: it has 3 layers of 4 heads, 24 wide, 40 tokens, family gpt2"
    said += "; gpt2 has 12 layers of 12 heads, 768 wide, 50,257 tokens, family gpt2. Allowed: gpt2's files, or model="
    with pytest.raises(OtherModelError, match=said):
        library.open(tmp_path / "gpt2")
    with pytest.raises(OtherModelError, match=said):
        library.open("gpt2", "model.source=local", f"model.path={tmp_path / 'gpt2'}")
    (tmp_path / "gpt2").rename(tmp_path / "GPT2")
    with pytest.raises(OtherModelError, match="is not gpt2"):
        library.open(tmp_path / "GPT2")
    assert library.open(tmp_path / "GPT2", "model.name=mine").name == "mine"


def test_a_cell_on_another_models_files_is_refused_in_one_message(tmp_path, cli) -> None:
    make_gpt2(tmp_path / "small")
    for choice in (["model=gpt2", "model.source=local"], ["model=local", "model.claims=gpt2", "task=induction"]):
        status, said = cli(*choice, f"model.path={tmp_path / 'small'}", "tracking=none")
        assert status != 0 and said.count("is not gpt2: it has 3 layers of 4 heads") == 1 and "Traceback" not in said


@pytest.mark.parametrize("tokens", [400, 2600])
def test_a_vocabulary_cut_or_extended_opens_with_the_models_claims_under_another_name(
    tokens, tmp_path, monkeypatch
) -> None:
    """As a fine-tune of Phi with 18,856 tokens more, or GPT-2 without the tokens that a task never uses."""
    make_gpt2(tmp_path / "gpt2", vocab_size=tokens)
    known = dataclasses.replace(known_models()["gpt2"], sizes=Sizes(3, 4, 24, 2000, "gpt2", 4))
    monkeypatch.setattr("ovqk.weights.known.known_models", lambda: {"gpt2": known})
    with pytest.raises(OtherModelError, match=r"=LABEL.*, and model.claims=gpt2 beside it if gpt2's vocabulary"):
        library.open(tmp_path / "gpt2")
    notes = library.open(tmp_path / "gpt2", "model.name=mine", "model.claims=gpt2").notes
    (said,) = [note for note in notes if "cut or extended" in note]
    assert f"have {tokens:,} tokens, gpt2 2,000" in said
    assert [note for note in notes if "sizes alone" in note]
    make_gpt2(tmp_path / "wider", vocab_size=tokens, n_embd=32)
    with pytest.raises(OtherModelError, match=r"model.claims=null\.$"):
        library.open(tmp_path / "wider", "model.claims=gpt2")


def test_a_bundled_models_copy_does_not_pass_for_another_of_the_same_sizes(tmp_path) -> None:
    """Four layers of eight heads, 128 wide, are mini-attn's and mini-gpt2's alike."""
    shutil.copytree(MINIS / "mini-attn", tmp_path / "mini-gpt2")
    with pytest.raises(UserError, match=r"^model.name=mini-gpt2: .* holds mini-attn, as its SHA-256 says"):
        library.open(tmp_path / "mini-gpt2")
    shutil.copytree(MINIS / "mini-attn", tmp_path / "mine")
    with pytest.raises(UserError, match=r"^model.claims=mini-gpt2: .* holds mini-attn, .* or model.claims=null"):
        library.open(tmp_path / "mine", "model.claims=mini-gpt2")


def test_a_fine_tune_opens_under_its_models_name_with_a_note_and_a_copy_without(tmp_path) -> None:
    shutil.copytree(MINIS / "mini-llama", tmp_path / "copy" / "mini-llama")
    assert not [note for note in library.open(tmp_path / "copy" / "mini-llama").notes if "sizes alone" in note]
    folder = tuned(MINIS / "mini-llama", tmp_path / "tuned" / "mini-llama")
    for choices, key in (
        ([], "model.name=mini-llama"),
        (["model.name=mine", "model.claims=mini-llama"], "model.claims=mini-llama"),
    ):
        model = library.open(folder, *choices)
        (note,) = [note for note in model.notes if "sizes alone" in note]
        assert note.startswith(f"{key}: ") and file_hash(folder / "model.safetensors") in note
        assert str(known_models()["mini-llama"].sha256) in note
    assert not [note for note in library.open(folder, "model.name=mine").notes if "sizes alone" in note]


def test_files_from_a_models_own_repository_need_no_note() -> None:
    checkpoint = open_checkpoint(local(MINIS / "mini-attn"))
    own = ModelConfig(name="gpt2", source=Source.hub, repo="openai-community/gpt2")
    other = ModelConfig(name="gpt2", source=Source.hub, repo="someone/gpt2")
    assert identified_by(own, checkpoint, "gpt2") == "repository"
    assert identified_by(other, checkpoint, "gpt2") == "sizes alone"
    assert identified_by(own, checkpoint, "mini-attn") == "SHA-256" and identified_by(own, checkpoint, "mine") is None
    bundled = ModelConfig(name="mini-attn", source=Source.bundled)
    assert check_files(bundled, checkpoint, open_named(checkpoint, bundled).architecture) == []


# --- published statements --------------------------------------------------------------------------------------------


def test_no_statement_is_computed_on_another_models_files(tmp_path) -> None:
    make_gpt2(tmp_path / "gpt2", n_layer=12, n_head=12, n_embd=48)  # every head that statements name is there
    make_gpt2(tmp_path / "distilgpt2")
    some = [each for each in statements() if each.subject.name in ("gpt2", "distilgpt2")]
    found = rows(some, Places(tmp_path, hub=False))
    assert len(found) > 20
    for row in found:
        assert row.value is None and row.result == "not runnable here"
        assert row.reason.startswith(f"model.path={tmp_path}") and "Allowed" not in row.reason
        assert f"is not {row.statement.subject.name}: it has " in row.reason


def test_a_row_says_what_shows_that_the_weights_are_the_models(tmp_path) -> None:
    generator, path = torch.Generator().manual_seed(0), tmp_path / "modular-addition" / "l8k1hzciux.safetensors"
    shapes = {f"blocks.0.attn.W_{part}": (4, 128, 32) for part in "QKV"} | {"blocks.0.attn.W_O": (4, 32, 128)}
    shapes |= {"embed.W_E": (59, 128), "unembed.W_U": (128, 59)}
    path.parent.mkdir()
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    (some,) = [each for each in statements() if each.name == "mod-59-l8k1hzciux/share of frequency 13"]
    (row,) = rows([some], Places(tmp_path, hub=False))
    assert row.result == "differs" and row.identified == "sizes alone"
    assert row.sha256 == f"l8k1hzciux.safetensors {file_hash(path)}"
    assert frame([row])[["identified", "sha256"]].iloc[0].tolist() == [row.identified, row.sha256]


def test_a_row_says_if_the_vocabulary_is_another(tmp_path, monkeypatch) -> None:
    make_gpt2(tmp_path / "gpt2", vocab_size=2040)
    known = dataclasses.replace(known_models()["gpt2"], sizes=Sizes(3, 4, 24, 2000, "gpt2", 4))
    for place in ("ovqk.weights.known", "ovqk.published.table"):
        monkeypatch.setattr(f"{place}.known_models", lambda: {"gpt2": known})
    (some,) = [each for each in statements() if each.name == "gpt2/symmetry"]
    (row,) = rows([some], Places(tmp_path, hub=False))
    assert row.identified == "sizes alone, with 2,040 tokens for 2,000"
