"""A relation's word pairs as one model's tokens (definitions: section 5)."""

from dataclasses import dataclass

import torch

from ovqk.circuits.relations import Pairs
from ovqk.config.schema import TaskConfig
from ovqk.errors import UserError
from ovqk.tasks.lookup import WordLookup, WordSet, some_dropped
from ovqk.tasks.matches import MIN_WORDS


@dataclass(frozen=True)
class Relation:
    """A relation's pairs, all kinds together.

    Attributes:
        sources, targets: the words of each pair, index-aligned.
        pairs: the same pairs, as places among the relation's words.
        kept: word set -> how many words were kept.
        reasons: word set -> dropped word -> why it was dropped.
    """

    sources: WordSet
    targets: WordSet
    pairs: Pairs
    kept: dict[str, int]
    reasons: dict[str, dict[str, str]]


def read_relation(task: TaskConfig, name: str, lookup: WordLookup, label: str) -> Relation:
    """Look up the pairs for a task's variable.

    Args:
        task: the task, which holds the variable's word sets.
        name: the variable.
        lookup: finds words as tokens.
        label: the model's name in messages.

    Raises:
        UserError: the sets are not pairs of equal length; fewer than 8 pairs are two single tokens; or all pairs have
            one target.
    """
    variable, key = task.variables[name], f"task.variables.{name}"
    sizes = [[len(task.words[each]) for each in side] for side in (variable.read, variable.write)]
    if not variable.read or sizes[0] != sizes[1]:
        given = [", ".join(f"'{each}' of {len(task.words[each])} words" for each in side) or "none" for side in
                 (variable.read, variable.write)]  # fmt: skip
        raise UserError(
            f"{key}: a relation needs a set of targets in `write` for each set of sources in `read`, as long as that, "
            f"not {given[0]} and {given[1]}."
        )
    kinds: list[int] = []
    kept: dict[str, int] = {}
    reasons: dict[str, dict[str, str]] = {}
    sides: tuple[list[WordSet], list[WordSet]] = [], []
    for kind, keys in enumerate(zip(variable.read, variable.write, strict=True)):
        found, lost = lookup.pairs(task, *keys)
        for each, words, why in zip(keys, found, lost, strict=True):
            kept[each] = len(words.words)
            reasons.setdefault(each, {}).update(why)
        sides[0].append(found[0])
        sides[1].append(found[1])
        kinds += [kind] * len(found[0].words)
    sources, targets = (
        WordSet([word for part in side for word in part.words], torch.cat([part.ids for part in side]))
        for side in sides
    )
    if len(kinds) < MIN_WORDS:
        dropped = {word: why for each in reasons.values() for word, why in each.items()}
        raise UserError(
            f"task={task.name}: only {len(kinds)} of the {sum(sizes[0])} pairs of '{name}' are two single tokens in "
            f"{label}; at least {MIN_WORDS} are needed.{some_dropped(dropped)}"
        )
    if len(targets.ids.unique()) < 2:
        raise UserError(f"{key}: all pairs have the target '{targets.words[0]}'; allowed: two targets and more.")
    return Relation(sources, targets, Pairs.of(sources.ids, targets.ids, torch.tensor(kinds)), kept, reasons)
