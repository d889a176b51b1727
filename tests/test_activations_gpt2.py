"""Prompts as batches, against the token ids and attention patterns that GPT-2 itself had on five texts."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support.commands import compose
from support.models import shared_model

from ovqk.activations.batches import read_prompts
from ovqk.activations.forward import Run
from ovqk.activations.quantities import attention_values
from ovqk.config.schema import AttentionConfig, RoleActivationsConfig, RoleConfig

TEMPLATES = [
    "Data visualization empowers {A} to",
    "Artificial Intelligence is {A} the",
    "As the spaceship was {A} the",
    "On the deserted planet they {A} a",
    "IEEE VIS conference {A} the",
]
LAST = AttentionConfig("END", "END-1", "END-2")


def task_of_the_texts():
    """A task whose prompts are the five texts, with the words before the last exchanged among them."""
    task = compose("task=induction", "model=mini-attn").task
    task.words = {
        "verbs": [
            "users",
            "transforming",
            "approaching",
            "discovered",
            "highlights",
            "watching",
            "leaving",
            "finding",
            "seeing",
        ]
    }
    task.continuations = []
    task.prompts = {
        "templates": TEMPLATES,
        "slots": {"A": "verbs", "B": "verbs"},
        "clusters": ["A"],
        "answer": "A",
        "foil": "B",
        "labels": {"VERB": "A"},
        "counterfactual": {"A": {"draw": "fresh"}},
    }
    task.roles = {"previous_token": RoleConfig([], RoleActivationsConfig(attention=LAST, decides=["attention"]))}
    return task


def kept_run(patterns: torch.Tensor) -> Run:
    """A run of which only attention probabilities are known, [layer, prompt, head, query, key]."""
    n_layers, n_prompts, n_heads = patterns.shape[:3]
    rows = torch.zeros(n_prompts, 1)
    outputs = torch.zeros(n_layers, n_prompts, 1, n_heads, 1)
    return Run(rows, rows, patterns, outputs, outputs, outputs[..., 0, 0])


def test_prompts_are_gpt2s_own_tokens_and_head_4_11_looks_at_the_token_before(gpt2_tokenizer) -> None:
    folder = shared_model("gpt2-attention-patterns")
    saved = json.loads((folder / "prompts.json").read_text())
    batches = read_prompts(task_of_the_texts(), gpt2_tokenizer, [50256], 200, 0, 32).batches
    found = set()
    for batch in batches:
        assert (batch.tokens[:, 0] == 50256).all()
        for row, (ids, template) in enumerate(zip(batch.tokens[:, 1:].tolist(), batch.templates, strict=True)):
            index = TEMPLATES.index(template)
            if ids != saved[index]["ids"]:
                assert len(ids) >= 4 and ids[-1] == saved[index]["ids"][-1]
                continue
            found.add(index)
            end = batch.at["END"][row : row + 1]
            assert int(end) == len(ids) and int(batch.position("END-1")[row]) == len(ids) - 1
            pattern = load_file(folder / f"prompt{index}.safetensors")["pattern"].float()
            whole = torch.nn.functional.pad(pattern, (1, 0))  # that run had no start token
            kept = kept_run(whole[:, None, :, -1:])
            part = type(batch)(
                batch.half, batch.tokens[row : row + 1], batch.counterfactual[row : row + 1], {"END": end},
                batch.answers[row : row + 1], batch.foils[row : row + 1], batch.clusters[row : row + 1], (template,),
            )  # fmt: skip
            values = attention_values(LAST, part, kept, kept, 0)
            assert torch.equal(values["attention"][0], pattern[:, :, -1, -2])
            assert torch.equal(values["control"][0], pattern[:, :, -1, -3])
            assert float(values["attention"][0, 4, 11]) > 0.999
    assert found == set(range(len(TEMPLATES)))


def test_a_label_outside_of_a_text_has_no_value(gpt2_tokenizer) -> None:
    batch = read_prompts(task_of_the_texts(), gpt2_tokenizer, [50256], 200, 0, 32).batches[0]
    kept = kept_run(torch.ones(2, len(batch), 3, 1, batch.tokens.shape[1]))
    far = AttentionConfig("END", "END-40", "END-1")
    values = attention_values(far, batch, kept, kept, 0)
    assert all(math.isnan(float(value.flatten()[0])) and value.isnan().all() for value in values.values())
    assert values["attention"].shape == (len(batch), 2, 3)


@pytest.mark.parametrize("words", [["users", "visualization"], ["users"]])
def test_too_few_words_are_said_so(gpt2_tokenizer, words) -> None:
    from ovqk.errors import UserError

    task = task_of_the_texts()
    task.words = {"verbs": words}
    with pytest.raises(UserError):
        read_prompts(task, gpt2_tokenizer, [50256], 200, 0, 32)


def test_acronyms_are_read_by_gpt2s_tokenizer(gpt2_tokenizer) -> None:
    """A doubled letter is one token there: a foil that cannot be written after the text is still compared with."""
    task = compose("task=acronym", "model=mini-attn").task
    prompts = read_prompts(task, gpt2_tokenizer, [], 256, 0, 32)
    assert sum(map(len, prompts.batches)) > 200
    foils = {token for batch in prompts.batches for token in batch.foils.tolist()}
    assert len(foils) == len({word[0] for word in task.words["seconds"]}) == 3


def test_words_that_a_tokenizer_cannot_read_are_counted(gpt2_tokenizer) -> None:
    task = compose("task=induction", "model=mini-attn").task
    prompts = read_prompts(task, gpt2_tokenizer, [], 64, 0, 32)
    assert set(prompts.words_left_out) <= set(task.words)
    assert 0 < sum(prompts.words_left_out.values()) < sum(map(len, task.words.values()))
