"""A task's prompts as tokens, each with its counterfactual (definitions: section 7).

Prompts with the same length form a batch, so no prompt is padded. If the tokenizer splits a word that must be one
token, the prompt is left out and counted.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.config.schema import RoleActivationsConfig, TaskConfig
from ovqk.errors import UserError
from ovqk.tasks.lookup import WordLookup
from ovqk.tasks.prompt_entry import check_prompts
from ovqk.tasks.prompts import Prompt, known_words, sample_prompts, token_positions, word_sets_of

NEW_LINE = "\n"
"""The text before every prompt if the model has no start token.

Heads look at the first token because it is first, so a name there could not serve as a control for another name.
"""
Half = Literal["choosing", "testing"]
FEW_TEMPLATES = 4
"""If a task has fewer templates, its clusters are split into halves instead."""
LEAST_CLUSTERS = 4
"""The least number of clusters in each half."""


@dataclass(frozen=True)
class Batch:
    """Prompts from one half, all with the same length.

    Attributes:
        half: `choosing` or `testing`.
        tokens, counterfactual: the token ids for the prompts and for their counterfactuals, [prompt, position].
        at: label -> its token's position in each prompt.
        answers: each prompt's answer, the token id that should come next.
        foils: each prompt's natural wrong answer, a token id.
        clusters: each prompt's cluster, by number.
        templates: each prompt's template.
    """

    half: Half
    tokens: Int[Tensor, "prompt position"]
    counterfactual: Int[Tensor, "prompt position"]
    at: Mapping[str, Int[Tensor, " prompt"]]
    answers: Int[Tensor, " prompt"]
    foils: Int[Tensor, " prompt"]
    clusters: Int[Tensor, " prompt"]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def position(self, label: str) -> Int[Tensor, " prompt"] | None:
        """Return the positions for a label such as "S1", "S1+1" or "S1-1"; None if one lies outside its prompt."""
        name, step = split_label(label)
        places = self.at[name] + step
        inside = (places >= 0) & (places < self.tokens.shape[1])
        return places if bool(inside.all()) else None

    def words(self, name: str) -> Int[Tensor, " prompt"]:
        """Return each prompt's token id for ANSWER, FOIL or a label.

        Raises:
            UserError: the label lies outside a prompt.
        """
        if name == "ANSWER":
            return self.answers
        if name == "FOIL":
            return self.foils
        place = self.position(name)
        if place is None:
            raise UserError(f"task.roles: activations write the word at {name!r}, which is outside of a prompt.")
        return self.tokens.gather(1, place[:, None])[:, 0]


@dataclass(frozen=True)
class Prompts:
    """All prompts in a cell, as tokens.

    Attributes:
        batches: the batches from both halves.
        clusters: the clusters' names, in the order of their numbers.
        start: the token ids before each text: the model's own start token, or a new line if it has none.
        left_out: reason -> how many prompts were left out for it.
        words_left_out: word set -> how many of its words this tokenizer cannot read as the prompts need them.
    """

    batches: list[Batch]
    clusters: list[str]
    start: list[int]
    left_out: dict[str, int]
    words_left_out: dict[str, int] = field(default_factory=dict)


def split_label(label: str) -> tuple[str, int]:
    """Return "S1+1" as ("S1", 1), and "S1" as ("S1", 0).

    Raises:
        UserError: the text is no label.
    """
    match = re.fullmatch(r"(\w+?)([+-]\d+)?", label)
    if match is None:
        raise UserError(f"{label!r} is not a label; allowed: a label of the task's prompts, as S1, S1+1 or S1-1.")
    return match[1], int(match[2] or 0)


def labels_of(config: RoleActivationsConfig) -> set[str]:
    """Return the labels that a role's `activations` names, without ANSWER and FOIL."""
    found = {"END"}
    if config.attention is not None:
        found |= {config.attention.query, config.attention.source, config.attention.control}
    if config.write is not None:
        found |= {config.write.answer, config.write.other} - {"ANSWER", "FOIL"}
    if config.effect is not None:
        found |= {label for label in (config.effect.source, config.effect.control) if label is not None}
    return found


def read_prompts(task: TaskConfig, tokenizer: Tokenizer, start: list[int], count: int, seed: int, size: int) -> Prompts:
    """Draw a task's prompts and turn them into batches.

    Args:
        task: the task.
        tokenizer: the model's tokenizer.
        start: the model's start token, or nothing.
        count: how many prompts are drawn.
        seed: the seed that draws the prompts and splits them into halves.
        size: the largest number of prompts in a batch.

    Raises:
        UserError: the task has no prompts or no counterfactual, its roles name unknown labels, or the tokenizer leaves
            too few prompts.
    """
    if not task.prompts or "counterfactual" not in task.prompts:
        raise UserError(f"task.prompts: task {task.name} says no counterfactual, without which nothing is measured.")
    lookup = WordLookup(tokenizer, tokenizer.get_vocab_size())
    start = start or lookup.encode(NEW_LINE).ids
    try:
        check_prompts(task.words, task.prompts)
    except ValueError as error:
        raise UserError(f"task.prompts: {error}.") from error
    words = _readable_words(task, lookup)
    try:
        drawn = sample_prompts(words, task.prompts, count, seed)
    except ValueError as error:
        raise UserError(f"task.prompts: {error}, of the words that this tokenizer can read.") from error
    asked = sorted({label for role in task.roles.values() if role.activations for label in labels_of(role.activations)})
    wanted = {split_label(label)[0] for label in asked}
    left_out: Counter[str] = Counter()
    read: list[tuple[Prompt, _Tokens]] = []
    for prompt in drawn:
        tokens = _tokens(prompt, lookup, start, wanted, task)
        if isinstance(tokens, str):
            left_out[tokens] += 1
        else:
            read.append((prompt, tokens))
    names = sorted({prompt.cluster for prompt, _ in read})
    halves = _halves([prompt for prompt, _ in read], bool(task.prompts.get("clusters")), seed)
    for half in ("choosing", "testing"):
        n_clusters = len({prompt.cluster for prompt, _ in read if halves[prompt.cluster] == half})
        if n_clusters < LEAST_CLUSTERS:
            said = "; ".join(f"{n} with {why}" for why, n in left_out.items())
            raise UserError(
                f"task {task.name}, activations.prompts={count}: the {half} half has {n_clusters} clusters of prompts, "
                f"and needs {LEAST_CLUSTERS}"
                + (f" ({sum(left_out.values())} of {count} prompts were left out: {said})." if said else ".")
            )
    groups: dict[object, list[tuple[Prompt, _Tokens]]] = {}
    for prompt, tokens in read:
        places = ((label, tokens.at[name] + step) for label in asked for name, step in [split_label(label)])
        outside = tuple(label for label, place in places if not 0 <= place < len(tokens.clean))
        groups.setdefault((halves[prompt.cluster], len(tokens.clean), outside), []).append((prompt, tokens))
    batches = []
    for found in groups.values():
        for first in range(0, len(found), size):
            part = found[first : first + size]
            batches.append(
                Batch(
                    half=halves[part[0][0].cluster],
                    tokens=torch.tensor([tokens.clean for _, tokens in part]),
                    counterfactual=torch.tensor([tokens.counterfactual for _, tokens in part]),
                    at={label: torch.tensor([tokens.at[label] for _, tokens in part]) for label in part[0][1].at},
                    answers=torch.tensor([tokens.answer for _, tokens in part]),
                    foils=torch.tensor([tokens.foil for _, tokens in part]),
                    clusters=torch.tensor([names.index(prompt.cluster) for prompt, _ in part]),
                    templates=tuple(prompt.template for prompt, _ in part),
                )
            )
    lost = {name: len(task.words[name]) - len(words[name]) for name in word_sets_of(task.prompts)}
    return Prompts(batches, names, start, dict(left_out), {name: n for name, n in lost.items() if n})


@dataclass(frozen=True)
class _Tokens:
    clean: list[int]
    counterfactual: list[int]
    at: dict[str, int]
    answer: int
    foil: int


def _readable_words(task: TaskConfig, lookup: WordLookup) -> dict[str, list[str]]:
    """Return the word sets without the words that this tokenizer cannot read; a word's forms stay or go together.

    Answers, foils and words that a counterfactual replaces must be one token each; others must be known.
    """
    known = known_words(task.words, task.prompts, lambda word: not lookup.holds_unknown(lookup.encode(f" {word}").ids))
    single = known_words(task.words, task.prompts, lambda word: lookup.token(word) is not None)
    continuing = known_words(task.words, task.prompts, lambda word: lookup.token(word, continues=True) is not None)
    for name in word_sets_of(task.prompts):
        known[name] = continuing[name] if name in task.continuations else single[name]
        if "repeated" in task.prompts:  # any of them may begin a text
            known[name] = [word for word in known[name] if len(lookup.encode(word).ids) == 1]
    return known


def _tokens(
    prompt: Prompt, lookup: WordLookup, start: list[int], wanted: set[str], task: TaskConfig
) -> "_Tokens | str":
    """Return a prompt's tokens, or the reason why it is left out."""
    other = prompt.counterfactual
    assert other is not None
    encoded = []
    for each in (prompt, other):
        found = lookup.encode(each.text)
        if lookup.holds_unknown(found.ids):
            return "a word that this tokenizer does not know"
        offsets = [(0, 0)] * len(start) + list(found.offsets)
        try:
            at = token_positions(each, offsets)
        except ValueError:
            return "a label that no token covers"
        encoded.append((start + found.ids, at))
    (clean, at), (counterfactual, other_at) = encoded
    missing = sorted(wanted - set(at))
    if missing:
        raise UserError(
            f"task.roles: activations name the label {missing[0]!r}, which {prompt.template!r} does not hold; known: "
            f"{', '.join(sorted(at))}."
        )
    if len(clean) != len(counterfactual) or any(at[label] != other_at[label] for label in at):
        return "a counterfactual of other length"
    if at["END"] != len(clean) - 1:
        return "tokens after END"
    continuing = {word for name in task.continuations for word in task.words[name]}
    answer, foil = (
        lookup.next_token(prompt.text, word, continues=word in continuing) for word in (prompt.answer, prompt.foil)
    )
    if foil is None and prompt.foil in continuing:  # "QQ" may be one token: the foil is not written, but compared with
        foil = lookup.token(prompt.foil, continues=True)
    if answer is None or foil is None:
        return "an answer or foil of several tokens"
    if answer == foil:
        return "one token for answer and foil"
    return _Tokens(clean, counterfactual, {label: at[label] for label in sorted(wanted | {"END"})}, answer, foil)


def _halves(prompts: Sequence[Prompt], named: bool, seed: int) -> dict[str, Half]:
    """Return cluster -> half.

    Templates are split at random. If there are few templates, or if clusters are words (`named`), clusters are split.
    """
    templates = sorted({prompt.template for prompt in prompts})
    by_template = len(templates) >= FEW_TEMPLATES and not named
    units = templates if by_template else sorted({prompt.cluster for prompt in prompts})
    random.Random(f"halves {seed}").shuffle(units)
    choosing = set(units[: len(units) // 2])
    return {
        prompt.cluster: "choosing" if (prompt.template if by_template else prompt.cluster) in choosing else "testing"
        for prompt in prompts
    }
