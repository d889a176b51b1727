"""A task's words as one model's tokens (definitions: section 5)."""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.circuits.relations import Pairs
from ovqk.config.schema import TaskConfig, VariableConfig, VariableKind
from ovqk.errors import UserError
from ovqk.tasks.lookup import WordLookup, WordSet, some_dropped
from ovqk.tasks.matches import MIN_WORDS, matched_tokens
from ovqk.tasks.relations import read_relation

MOST_WORDS = 10_000  # in a set; each is looked up, drawn for nulls, and listed in the record
MOST_LETTERS = 200  # in a word; a word that is a token has far fewer


@dataclass(frozen=True)
class Variable:
    """A causal variable in tokens.

    Attributes:
        name: its name in the task.
        kind: `set`, `contrast` or `relation`.
        read, write: its word sets on each side. A `set` has one, the same on both sides; a `contrast` has two that are
            index-aligned, (minus, plus); a `relation` has one on each side, its sources and their targets.
        band: ids for the tokens that match the words in surface form and log id rank, without the task's words.
        matches: word id -> ids for the tokens that match this word. They come from the band and, if the variable is a
            set, from its own words too: if surrogates could never hold a task word, they would be more like each other
            than like the task. A relation has none.
        pairs: a `relation`'s word pairs; None for other kinds.
    """

    name: str
    kind: VariableKind
    read: tuple[WordSet, ...]
    write: tuple[WordSet, ...]
    band: Int[Tensor, " token"]
    matches: dict[int, list[int]] = field(default_factory=dict)
    pairs: Pairs | None = None

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """All tokens that a readout may ask for: the words, the band and the matches, in rising order."""
        words = [words.ids for words in (*self.read, *self.write)]
        matched = torch.tensor([token for found in self.matches.values() for token in found], dtype=torch.long)
        return torch.cat([*words, self.band, matched]).unique()

    def thinned(self, most: int) -> "Variable":
        """Return the variable with at most `most` random matches for each word, and with only these in its band."""
        rng = random.Random(f"matches of {self.name}")
        matches = {word: sorted(rng.sample(found, min(most, len(found)))) for word, found in self.matches.items()}
        band = set(self.band.tolist()) & {token for found in matches.values() for token in found}
        return dataclasses.replace(self, matches=matches, band=torch.tensor(sorted(band), dtype=torch.long))

    @classmethod
    def stacked(cls, variables: "Sequence[Variable]") -> "Variable":
        """Join variables that differ only in their words into one variable, with ids [draw, word] and no words."""

        def stack(sides: Iterable[tuple[WordSet, ...]]) -> tuple[WordSet, ...]:
            return tuple(WordSet([], torch.stack([words.ids for words in sets])) for sets in zip(*sides, strict=True))

        read, write = stack(v.read for v in variables), stack(v.write for v in variables)
        return dataclasses.replace(variables[0], read=read, write=write)


@dataclass(frozen=True)
class TaskTokens:
    """A task's variable for one tokenizer, with the words that were kept and dropped.

    Attributes:
        variables: the variable, or nothing.
        kept: word set -> how many words were kept.
        dropped: word set -> the words dropped.
        notes: sentences about matched tokens for the record.
        reasons: word set -> dropped word -> why it was dropped.
    """

    variables: list[Variable]
    kept: dict[str, int]
    dropped: dict[str, list[str]]
    notes: list[str]
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)


def resolve_task(task: TaskConfig, tokenizer: Tokenizer | None, n_tokens: int, label: str) -> TaskTokens:
    """Turn a task's variable into token ids.

    Args:
        task: the task.
        tokenizer: the model's tokenizer; None if it has none.
        n_tokens: how many real tokens there are.
        label: the model's name in messages.

    Raises:
        UserError: `continuations` or a variable names an unknown word set; there is more than one variable, or one
            but no tokenizer; a contrast has one word on both sides; or fewer than 8 of its words are one token.
    """
    if len(task.variables) > 1:
        raise UserError(
            f"task.variables: {', '.join(task.variables)}: a task has one causal variable, which all of its readouts "
            "are of; make a task of each."
        )
    for key in task.continuations:
        _check_set(task, "task.continuations", key)
    if not task.variables:
        return TaskTokens([], {}, {}, [])
    if tokenizer is None:
        raise UserError(
            f"{label}: the directory holds no tokenizer files (tokenizer.json, or vocab.json and merges.txt), and "
            f"task={task.name} needs them to find its words. Add them, or use task=none."
        )
    lookup = WordLookup(tokenizer, n_tokens)
    kept: dict[str, int] = {}
    reasons: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    sides: dict[str, list[tuple[WordSet, ...]]] = {}
    for name, variable in task.variables.items():
        if variable.kind is VariableKind.relation:
            return _relation(task, name, lookup, label)
        sides[name] = []
        for sets in _named_sets(variable):
            _check_sets(task, name, sets)
            aligned, lost = lookup.aligned(task, sets)
            for key, words, why in zip(sets, aligned, lost, strict=True):
                kept[key], reasons[key] = len(words.words), why
                if len(words.words) < MIN_WORDS:
                    raise UserError(
                        f"task={task.name}: only {len(words.words)} of the {len(task.words[key])} words of "
                        f"'{key}' are one token in {label}; at least {MIN_WORDS} are needed.{some_dropped(why)}"
                    )
            sides[name].append(tuple(aligned))
    task_ids = torch.cat([words.ids for pair in sides.values() for side in pair for words in side]).unique()
    variables = []
    for name, config in task.variables.items():
        read, write = sides[name]
        ids = torch.cat([words.ids for words in (*read, *write)]).unique()
        own = ids if config.kind is VariableKind.set else ids[:0]
        matches, note = matched_tokens(ids, task_ids, tokenizer, n_tokens, own)
        drawn = {token for found in matches.values() for token in found} - set(task_ids.tolist())
        band = torch.tensor(sorted(drawn), dtype=torch.long)
        notes += [f"task {task.name}, variable {name}: {note}"] if note else []
        variables.append(Variable(name, config.kind, read, write, band, matches))
    return TaskTokens(variables, kept, {key: list(why) for key, why in reasons.items()}, notes, reasons)


def _relation(task: TaskConfig, name: str, lookup: WordLookup, label: str) -> TaskTokens:
    """Read a relation's pairs as tokens.

    Raises:
        UserError: its word sets are not pairs, or too few pairs are two single tokens (`relations.read_relation`).
    """
    variable = task.variables[name]
    for key in (*variable.read, *variable.write):
        _check_set(task, f"task.variables.{name}", key)
    found = read_relation(task, name, lookup, label)
    nothing = torch.tensor([], dtype=torch.long)
    made = Variable(name, variable.kind, (found.sources,), (found.targets,), nothing, pairs=found.pairs)
    return TaskTokens([made], found.kept, {key: list(why) for key, why in found.reasons.items()}, [], found.reasons)


def readable_tasks(tasks: Iterable[TaskConfig], tokenizer: Tokenizer) -> list[str]:
    """Name the tasks that keep enough words with this tokenizer, in the order given."""
    lookup = WordLookup(tokenizer, tokenizer.get_vocab_size())

    def keeps_enough(task: TaskConfig) -> bool:
        for name, variable in task.variables.items():
            if variable.kind is VariableKind.relation:
                try:
                    _relation(task, name, lookup, "")
                except UserError:
                    return False
                continue
            for sets in _named_sets(variable):
                try:
                    _check_sets(task, name, sets)
                except UserError:
                    return False
                if any(len(words.words) < MIN_WORDS for words in lookup.aligned(task, sets)[0]):
                    return False
        return bool(task.variables)

    return [task.name for task in tasks if keeps_enough(task)]


def _named_sets(variable: VariableConfig) -> tuple[list[str], list[str]]:
    """Name the word sets that a variable reads, and those that it writes."""
    if variable.kind is VariableKind.set:
        return [variable.words or ""], [variable.words or ""]
    return list(variable.read), list(variable.write)


def _check_set(task: TaskConfig, where: str, key: str) -> None:
    if key not in task.words:
        raise UserError(
            f"{where}: names the word set '{key}', which task.words does not hold; allowed: "
            f"{', '.join(task.words) or 'none'}."
        )
    if len(task.words[key]) > MOST_WORDS:
        raise UserError(f"task.words.{key}: holds {len(task.words[key])} words; allowed: up to {MOST_WORDS}.")
    if (long := max(map(len, task.words[key]), default=0)) > MOST_LETTERS:
        raise UserError(f"task.words.{key}: holds a word of {long} letters; allowed: up to {MOST_LETTERS}.")


def _check_sets(task: TaskConfig, variable: str, sets: list[str]) -> None:
    for key in sets:
        _check_set(task, f"task.variables.{variable}", key)
    kind = task.variables[variable].kind
    wanted = 1 if kind is VariableKind.set else 2
    if len(sets) != wanted or len({len(task.words[key]) for key in sets}) != 1:
        given = " and ".join(f"'{key}' of {len(task.words[key])} words" for key in sets) or "none"
        raise UserError(
            f"task.variables.{variable}: a {kind.value} needs {wanted} word set(s) of equal length on each side, not "
            f"{given}."
        )
    others = set(task.words[sets[-1]])
    twice = [word for word in task.words[sets[0]] if word in others] if wanted == 2 else []
    if twice:
        raise UserError(
            f"task.variables.{variable}: {', '.join(map(repr, twice[:6]))}{', ...' if len(twice) > 6 else ''}: a word "
            f"of both '{sets[0]}' and '{sets[1]}' is no contrast between them; take it out."
        )
