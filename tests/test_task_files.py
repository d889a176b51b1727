"""The task files: words are single tokens, prompts ask what they say, claims are the heads of the papers."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.commands import compose
from support.models import BUNDLED, local

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.resolve import plain
from ovqk.config.schema import Direction, TaskConfig
from ovqk.errors import UserError
from ovqk.tasks.claims import RELIABILITIES, Claims, check_roles, parse_head, resolve_claims
from ovqk.tasks.lookup import WordLookup
from ovqk.tasks.matches import MIN_WORDS
from ovqk.tasks.prompts import Prompt, sample_prompts, token_positions
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import resolve_task
from ovqk.weights.types import Architecture

OTHERS = {"none", "modular_addition"}
"""Tasks without words."""


def is_relation(path: Path) -> bool:
    return "kind: relation" in path.read_text(encoding="utf-8")


TASKS = sorted(
    path.stem for path in (ROOT / "conf" / "task").glob("*.yaml") if path.stem not in OTHERS and not is_relation(path)
)
"""Those with prompts; relations are in test_relations.py."""
GPT2 = Architecture("gpt2", 12, 12, 12, 768, 64, 1024, "layernorm", 1e-5, "learned")
PUBLISHED = {  # definitions: section 8
    "greater_than": {"start_year_mover": ["5.1", "5.5", "6.9", "7.10", "8.8", "8.11", "9.1"]},
    "copy_suppression": {"copy_suppression": ["10.7", "11.10"]},
    "acronym": {
        "letter_mover": ["8.11", "9.9", "10.10", "11.4"],
        "previous_token": ["1.0", "2.2", "4.11"],
        "letter_mover_feeder": ["5.8"],
    },
}
DROPPED: dict[str, dict[str, list[str]]] = {task: {} for task in TASKS}
"""Words that are not one token of GPT-2: none."""


def task_of(name: str) -> TaskConfig:
    return compose(f"task={name}").task


def drawn(task: TaskConfig, count: int = 300) -> list[Prompt]:
    return sample_prompts(task.words, task.prompts, count, seed=0)


def test_the_task_files_are_these() -> None:
    assert TASKS == ["acronym", "copy_suppression", "greater_than", "induction", "ioi", "sva"]


# --- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_word_is_one_token_of_gpt2_in_the_form_that_it_has_in_a_text(gpt2_tokenizer, name) -> None:
    task, lookup = task_of(name), WordLookup(gpt2_tokenizer, 50257)
    for key, words in task.words.items():
        lost = [word for word in words if lookup.token(word, key in task.continuations) is None]
        assert lost == DROPPED[name].get(key, []), key
        assert len(set(words)) == len(words), key
    resolved = resolve_task(task, gpt2_tokenizer, 50257, "gpt2")
    assert not any(resolved.dropped.values())
    assert resolved.kept and min(resolved.kept.values()) >= MIN_WORDS


# --- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "digest"),
    [("ioi", "53c8538be52d737f"), ("sva", "cfe2e0c8f144d57b"), ("induction", "7e0f965fe891d912")],
)
def test_the_prompts_that_claims_were_measured_on_stay_as_they_were(name, digest) -> None:
    """Measured claims of the bundled model say: these prompts, this seed."""
    parts = ("text", "answer", "foil", "spans", "group", "forms")
    text = json.dumps(
        [{part: asdict(prompt)[part] for part in parts} for prompt in drawn(task_of(name), 60)], sort_keys=True
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_the_next_token_of_the_text_and_end_the_last(gpt2_tokenizer, name) -> None:
    """The text's tokens stay as they are when the answer is appended."""
    task = task_of(name)
    space = "" if task.continuations else " "
    for prompt in drawn(task):
        encoded = gpt2_tokenizer.encode(prompt.text)
        assert token_positions(prompt, encoded.offsets)["END"] == len(encoded.ids) - 1
        assert gpt2_tokenizer.encode(prompt.text + space + prompt.answer).ids[:-1] == encoded.ids, prompt
        assert prompt.answer != prompt.foil


def test_years_end_after_they_start_and_the_foil_does_not() -> None:
    task = task_of("greater_than")
    assert task.words["years"] == sorted(task.words["years"])
    prompts = drawn(task, 1500)
    starts = [prompt.text[slice(*prompt.spans["START"])] for prompt in prompts]
    for prompt, start in zip(prompts, starts, strict=True):
        assert int(prompt.answer) > int(start) >= int(prompt.foil)
        assert prompt.text.endswith(f" the year {prompt.text[slice(*prompt.spans['END'])]}")
    assert (min(starts), max(starts)) == ("02", "98")  # the paper's range
    assert max(prompt.answer for prompt in prompts) == "99"


def test_the_start_year_and_the_century_before_the_answer_are_tokens_of_their_own(gpt2_tokenizer) -> None:
    task = task_of("greater_than")
    for template in task.prompts["templates"]:
        task.prompts["templates"] = [template]
        seen = set()
        for prompt in drawn(task, 1200):
            encoded = gpt2_tokenizer.encode(prompt.text)
            places = token_positions(prompt, encoded.offsets)
            start = encoded.tokens[places["START"]]
            century = encoded.tokens[places["END"]]
            assert start == prompt.text[slice(*prompt.spans["START"])]
            assert century == encoded.tokens[places["START"] - 1] in ("Ġ16", "Ġ17")
            seen.add(start)
        assert seen == set(task.words["years"][:-1]), template


def test_an_acronym_goes_on_with_the_initial_of_the_third_word(gpt2_tokenizer) -> None:
    task = task_of("acronym")
    initials = [{word[0] for word in task.words[key]} for key in ("firsts", "seconds", "thirds")]
    assert not (initials[0] & initials[1] or initials[1] & initials[2] or initials[0] & initials[2])
    assert set.union(*initials) <= set(task.words["letters"])
    prompts = drawn(task, 800)
    for prompt in prompts:
        *_, first, second, third, acronym = prompt.text.split()
        assert acronym == f"({first[0]}{second[0]}"
        assert (prompt.answer, prompt.foil) == (third[0], second[0])
        assert prompt.text[slice(*prompt.spans["SOURCE"])] == third
        assert gpt2_tokenizer.encode(f" {acronym}{prompt.answer}").tokens == ["Ġ(", first[0], second[0], third[0]]
    assert {prompt.answer for prompt in prompts} == initials[2] and len(set.union(*initials)) >= 20


def test_copy_suppression_asks_for_the_other_topic_where_the_last_one_would_be_copied() -> None:
    for prompt in drawn(task_of("copy_suppression")):
        assert prompt.text.endswith(f" {prompt.foil} and")
        assert prompt.text.split().count(prompt.foil) == 2
        assert f"{prompt.foil} and {prompt.answer}" in prompt.text
        marked = {label: prompt.text[slice(*span)] for label, span in prompt.spans.items()}
        assert marked["COPY"] == prompt.foil and prompt.spans["COPY"] > prompt.spans["B"]
        assert marked["OTHER"] not in (prompt.answer, prompt.foil)


# --- claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_claim_names_heads_of_gpt2_and_roles_of_the_task_with_a_source(name) -> None:
    task = task_of(name)
    check_roles(task)
    claims = task.claims["gpt2"]
    assert claims.source and claims.reliability in RELIABILITIES
    assert set(claims.roles) <= set(task.roles)
    for role, heads in claims.roles.items():
        assert len({parse_head(head, role, GPT2) for head in heads}) == len(heads) > 0
    resolved = resolve_claims(task, compose("model=gpt2").model, GPT2)
    assert isinstance(resolved, Claims) and resolved.heads


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_claimed_heads_are_the_published_ones(name) -> None:
    claims = task_of(name).claims
    assert list(claims) == ["gpt2"] and claims["gpt2"].reliability == "published"
    assert claims["gpt2"].roles == PUBLISHED[name]
    assert set(task_of(name).roles) == set(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("model", ["gpt2-medium", "distilgpt2", "mini-attn"])
def test_no_other_model_is_judged_by_gpt2s_heads(name, model) -> None:
    cell = compose(f"model={model}", f"task={name}")
    assert isinstance(resolve_claims(cell.task, cell.model, GPT2), str)


def test_only_gpt2_has_the_claims_of_gpt2() -> None:
    models = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert [name for name, model in models.items() if model.get("claims") == "gpt2"] == ["gpt2"]


def test_what_the_roles_predict() -> None:
    """A change here is a change of what is tested: bump the task's version."""

    def predicted(name: str) -> dict[str, list[tuple[str, Direction, bool]]]:
        roles = task_of(name).roles.items()
        return {role: [(p.metric, p.direction, p.exploratory) for p in config.predictions] for role, config in roles}

    high, low = Direction.high, Direction.low
    margin = {direction: ("ov_task_margin", direction, True) for direction in (high, low)}
    assert predicted("greater_than") == {"start_year_mover": [("ov_task_auc", high, False), margin[high]]}
    assert predicted("copy_suppression") == {
        "copy_suppression": [
            ("ov_task_auc", low, False),
            ("ov_task_suppress", high, False),
            margin[low],
            ("qk_task_auc_unembed", high, True),
        ]
    }
    assert predicted("copy_suppression")["copy_suppression"] == predicted("ioi")["copy_suppression"]
    assert predicted("acronym") == {
        "letter_mover": [("ov_task_auc", high, False), ("ov_task_copy", high, False), margin[high]],
        "previous_token": [("qk_simulated_previous", high, False), ("qk_prev_auc", high, True)],
        "letter_mover_feeder": [],
    }


def test_which_words_continue_a_text_is_part_of_a_tasks_identity() -> None:
    task = task_of("greater_than")
    assert plain(task)["continuations"] == ["years"]
    assert plain(task_of("ioi"))["continuations"] == []


def test_a_model_without_the_words_is_refused_with_their_number() -> None:
    tokenizer = load_tokenizer(open_checkpoint(local(BUNDLED)))
    with pytest.raises(UserError, match="task=greater_than: only 0 of the 98 words of 'years' are one token in x"):
        resolve_task(task_of("greater_than"), tokenizer, tokenizer.get_vocab_size(), "x")
