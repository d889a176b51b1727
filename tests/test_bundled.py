"""The bundled models are what their cards say: complete, small, and right on held-out sentences."""

import json

import pytest
import torch
import yaml
from support import ROOT
from support.commands import computed
from support.scripts import script

from ovqk.testing import language
from ovqk.testing import language_words as words

accuracy = script("accuracy")
measured_claims = script("measured_claims")

BUNDLED = ROOT / "ovqk" / "bundled"
MODELS = ("mini-attn", "mini-gpt2", "mini-llama")
LEAST = {"ioi": 0.97, "sva": 0.98, "induction": 0.98}  # of 300; the cards state 2,000
SPECIAL = ["<unk>", "<eos>", ".", ","]


@pytest.fixture(scope="module", params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(name):
    return accuracy.load(BUNDLED / name)


@pytest.fixture(scope="module")
def counts(name) -> dict[str, int]:
    return json.loads((BUNDLED / name / "token_counts.json").read_text())


def test_directory_is_complete(name):
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (BUNDLED / name).iterdir()} == names | {"token_counts.json"}


def test_all_bundled_models_are_small():
    assert {path.name for path in BUNDLED.iterdir() if path.is_dir() and path.name[0] != "_"} == set(MODELS)
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 15_000_000


def test_weights_are_float32_in_four_layers_of_eight_heads(loaded):
    model, _ = loaded
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (4, 8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_mlps_of_mini_attn_write_nothing():
    model, _ = accuracy.load(BUNDLED / "mini-attn")
    for block in model.transformer.h:
        assert not block.mlp.c_proj.weight.any() and not block.mlp.c_proj.bias.any()


@pytest.mark.parametrize("task", list(language.TASKS))
def test_accuracy_on_held_out_triples(loaded, task):
    assert accuracy.measure(*loaded, task, count=300, seed=7).right >= LEAST[task]


@pytest.mark.parametrize("task", list(language.TASKS))
def test_the_claims_are_those_of_the_card(name, task):
    """Every measured role of the card's table is claimed, head by head, and no other."""
    card = (BUNDLED / name / "README.md").read_text()
    rows = [line.strip("| \n").split(" | ") for line in card.splitlines() if line.startswith(f"| {task} | ")]
    told = {role.replace(" ", "_"): heads.split(", ") for _, role, heads in rows}
    claims = yaml.safe_load((ROOT / "conf" / "task" / f"{task}.yaml").read_text())["claims"]
    assert told == claims.get(name, {"roles": {}})["roles"]


def test_tokenizer_splits_an_ordinary_string(loaded):
    model, tokenizer = loaded
    text = "When Mary and John went to the store, John gave a drink to"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == language.tokenize(text)
    assert [text[start:stop] for start, stop in encoded.offsets] == encoded.tokens
    assert tokenizer.encode("Zanzibar").tokens == ["<unk>"]
    assert tokenizer.get_vocab_size() == model.config.vocab_size


def test_transformers_finds_the_same_tokenizer(name, loaded):
    from transformers import AutoTokenizer

    automatic = AutoTokenizer.from_pretrained(BUNDLED / name)
    text = "The cats near the dog, and the boys are here."
    assert automatic(text)["input_ids"] == loaded[1].encode(text).ids
    assert automatic.bos_token == language.END_OF_TEXT


def test_token_counts_match_the_vocabulary_and_order_it(loaded, counts):
    _, tokenizer = loaded
    assert counts.keys() == tokenizer.get_vocab().keys()
    assert [tokenizer.token_to_id(word) for word in counts] == list(range(len(counts)))
    ordered = [count for word, count in counts.items() if word not in SPECIAL]
    assert list(counts)[: len(SPECIAL)] == SPECIAL and ordered == sorted(ordered, reverse=True)


def test_every_listed_word_was_trained_on(counts):
    assert all(counts[word] > 500 for content in words.WORDS.values() for word in content)


def test_each_name_has_other_words_of_about_its_frequency_rank(loaded):
    """Random sets alike in log id rank need words of other capitalised classes around every name."""
    _, tokenizer = loaded
    others = [word for name, content in words.CAPITALISED.items() if name != "names" for word in content]
    ranks = torch.tensor([tokenizer.token_to_id(word) for word in others]).log()
    for name in words.WORDS["names"]:
        near = (ranks - torch.tensor(tokenizer.token_to_id(name)).log()).abs() < 0.25
        assert near.sum() >= 4, name


@pytest.mark.slow
@pytest.mark.parametrize(("model", "task"), [("mini-attn", "ioi"), ("mini-gpt2", "induction"), ("mini-llama", "sva")])
def test_roles_measured_again_are_the_shipped_claims(model, task, tmp_path):
    """Slow: 1,024 prompts. Each model by one task."""
    shipped = yaml.safe_load((ROOT / "conf" / "task" / f"{task}.yaml").read_text())["claims"][model]
    _, record, tables = computed(
        tmp_path, f"model={model}", "model.claims=measured", f"task={task}", "analysis=activations",
        "activations.prompts=1024", "nulls.draws=19",
    )  # fmt: skip
    again = yaml.safe_load(measured_claims.claims_block(record, tables["roles"]))[model]
    assert again["roles"] == shipped["roles"] and again["source"] == shipped["source"]
    for role, heads in again["evidence"].items():
        for head, evidence in heads.items():
            assert shipped["evidence"][role][head] == pytest.approx(evidence, abs=0.01)
