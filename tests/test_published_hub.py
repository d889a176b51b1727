"""Statements about models on the hub, on random models of their shapes: every quantity with every family."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from support import hub_stub
from support.models import randomise

from ovqk.published import quantities, table
from ovqk.published.quantities import Opened
from ovqk.published.statements import Statement, statements
from ovqk.published.table import Places
from ovqk.testing.random_checkpoints import SPACE, synthetic_tokenizer, task_words
from ovqk.weights import known

SHAPES = {
    "gpt2": ("gpt2", 12, 12), "gpt2-medium": ("gpt2", 24, 16), "gpt2-large": ("gpt2", 36, 20),
    "gpt2-xl": ("gpt2", 48, 25), "distilgpt2": ("gpt2", 6, 12), "gpt-neo-125m": ("gpt_neo", 12, 12),
    "gpt-neo-1.3b": ("gpt_neo", 24, 16), "gpt-j-6b": ("gptj", 28, 16), "phi-1": ("phi", 24, 32),
    "phi-1.5": ("phi", 24, 32), "phi-2": ("phi", 32, 32), "llama-3.1-8b": ("llama", 32, 32),
    "pythia-6.9b": ("gpt_neox", 32, 32), "pythia-12b": ("gpt_neox", 36, 40), "pythia-1.4b": ("gpt_neox", 24, 16),
}  # fmt: skip
"""Model -> its family, layers and heads: those of its statements. Heads are four wide."""
WIDTH, TOKENS, POSITIONS = 4, 8192, 128
"""Of a head; of the vocabulary, in which each word of the tasks is a token; and the longest prompt."""
KEYS = {
    "gpt2": ("n_embd", "n_layer", "n_head", "n_positions"),
    "gptj": ("n_embd", "n_layer", "n_head", "n_positions"),
    "gpt_neo": ("hidden_size", "num_layers", "num_heads", "max_position_embeddings"),
    **dict.fromkeys(
        ("phi", "llama", "gpt_neox"),
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    ),
}
OWN = {
    "gpt2": {},
    "gptj": {"rotary_dim": WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 6]], "window_size": 16},
    "phi": {"partial_rotary_factor": 0.5, "intermediate_size": 64},
    "llama": {"num_key_value_heads": 8, "head_dim": WIDTH, "intermediate_size": 64},
    "gpt_neox": {"rotary_pct": 0.5, "intermediate_size": 64},
}
ON_HUB = [each for each in statements() if each.subject.choice is not None]


def make(name: str, folder: Path) -> Path:
    """Save a random model of a subject's shape as the hub holds it, with a tokenizer, unless it is there."""
    family, layers, heads = SHAPES[name]
    if folder.exists():
        return folder
    values = (heads * WIDTH, layers, heads, POSITIONS)
    settings = dict(zip(KEYS[family], values, strict=True)) | OWN[family]
    settings |= {"vocab_size": TOKENS, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt_neo":
        settings["attention_types"] = [[["global", "local"], layers // 2]]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    randomise(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tokenizer = synthetic_tokenizer(TOKENS, task_words())
    vocabulary = tokenizer["model"]["vocab"]  # years take the places of its last tokens
    years = [f"{SPACE}{word}" for word in task_words() if word.isdecimal()]
    for token, year in zip(list(vocabulary)[-len(years) :], years, strict=True):
        vocabulary[year] = vocabulary.pop(token)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_sizes_known(monkeypatch) -> None:
    """Heads here are four wide, so these are not the models that they stand for; else they would be refused."""
    monkeypatch.setattr(known, "known_models", dict)


def test_every_model_on_the_hub_has_a_shape() -> None:
    assert {each.subject.name for each in ON_HUB} == set(SHAPES)


class RandomHub(Places):
    """Statements find their models as on the hub, except that the files are random ones on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, hub=True)
        self.folder, self.kept = folder, {}

    def find(self, statement: Statement) -> tuple[Opened, str]:
        subject = statement.subject
        if subject.name not in self.kept:
            path = make(subject.name, self.folder / subject.name)
            choices = (*subject.choices, "model.source=local", f"model.path={path}")
            named = str(subject.choice)  # of conf/model, or OWNER/NAME
            self.kept = {subject.name: Opened(path, subject.choices) if "/" in named else Opened(named, choices)}
        return self.kept[subject.name], "hub"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> RandomHub:
    return RandomHub(tmp_path_factory.mktemp("hub"))


def firsts() -> list[Statement]:
    """One statement of each quantity with each family: the first, and of ranks one for each kind of rows."""
    found: dict[tuple[object, ...], Statement] = {}
    for each in ON_HUB:
        options = each.options
        kind = options.get("circuit"), options.get("rows"), options.get("queries"), "heads" in options
        found.setdefault((each.function, SHAPES[each.subject.name][0], *kind), each)
    return list(found.values())


def computed(statement: Statement, places: RandomHub) -> table.Row:
    row = table.row(statement, places)
    assert row.value is not None, row.reason
    assert row.weights == "hub" and row.result in ("differs", "reproduced")
    return row


def quick(statement: Statement) -> bool:
    """Whether its quantity takes neither whole cells nor runs on prompts; those are among the slow tests."""
    return not str(statement.function).startswith("cell_") and not str(statement.function).endswith("on_prompts")


@pytest.mark.parametrize("statement", filter(quick, firsts()), ids=lambda each: each.name)
def test_each_quantity_is_computed_with_each_family(statement, places) -> None:
    computed(statement, places)


@pytest.mark.slow
@pytest.mark.parametrize("statement", ON_HUB, ids=lambda each: each.name)
def test_every_statement_about_a_model_on_the_hub_is_computed(statement, places) -> None:
    computed(statement, places)


def test_a_row_is_computed_on_files_that_the_hub_serves(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hub_stub, "REPO", "distilbert/distilgpt2")
    hub.hold(make("distilgpt2", tmp_path / "m"))
    (statement,) = [each for each in ON_HUB if each.name == "distilgpt2/symmetry"]
    found = table.row(statement, Places(None, hub=True))
    here = quantities.compute(str(statement.function), Opened(tmp_path / "m"), statement.options)
    assert found.weights == "hub" and found.value == here and found.result == "differs"
    assert any("distilbert/distilgpt2" in each for each in hub.requests)
