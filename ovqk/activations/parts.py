"""The parts of running a model on prompts, in order, and how much each plans to run, for the estimate of the time left.

Work is counted in tokens that pass through all layers. A token takes as long in all parts of one kind.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ovqk.activations.batches import Prompts

Steps = Callable[[int, str], Iterable[int]]
"""(number of steps, their name) -> their indexes; a step counts as done when the next is asked for."""


class Part(NamedTuple):
    """A part's kind, and the work of all its steps together; None if that is not known yet."""

    kind: str
    work: float | None = None


Plan = Callable[[Mapping[str, Part]], None]
"""Takes parts by their steps' name, in order; a part that it knows already is planned anew."""

READ, REPLACE, RUN = "prompts", "replaced heads", "further runs"
"""Kinds of parts."""

PROMPTS = "batch of prompts"
REPEATS = "batch of random repeats"
REPLACED = "replacements in batch"
DEPENDENT = "dependent heads in batch"
TOGETHER = "heads together in batch"
OTHERWISE = "other values in batch"
SCORES = "scores of batch"
WORDS = "words of batch"
UNTRAINED = "untrained control in batch"
UNTRAINED_REPEATS = "untrained repeats in batch"


def first_plan(prompts: Prompts, repeats: int, dependent: bool, reads_words: bool) -> dict[str, Part]:
    """Return what is planned before the first run; how many heads are replaced is not known yet.

    Args:
        prompts: the prompts.
        repeats: the number of tokens in all random repeats; 0 if none are run.
        dependent: whether a role's effect depends on another role's heads.
        reads_words: whether words on prompts are compared with those that the task's readouts read.
    """
    whole, testing = tokens_of(prompts), tokens_of(prompts, testing=True)
    planned = {PROMPTS: Part(READ, whole)} | ({REPEATS: Part(RUN, float(repeats))} if repeats else {})
    planned |= dict.fromkeys([REPLACED, *([DEPENDENT] if dependent else []), TOGETHER, OTHERWISE], Part(REPLACE))
    planned |= {SCORES: Part(RUN, testing)} | ({WORDS: Part(RUN, whole)} if reads_words else {})
    planned |= {UNTRAINED: Part(RUN, 2 * testing)}
    return planned | ({UNTRAINED_REPEATS: Part(RUN, float(repeats))} if repeats else {})


def tokens_of(prompts: Prompts, testing: bool = False) -> float:
    """Return the number of tokens in the clean prompts, or in the testing half of them."""
    return float(sum(batch.tokens.numel() for batch in prompts.batches if batch.half == "testing" or not testing))


def replaced_tokens(prompts: Prompts, patches: Iterable[tuple[str, int]], n_layers: int, kinds: int = 1) -> Part:
    """Return the part that replaces heads: each run begins at the first replaced head's layer and at its label.

    Args:
        prompts: the prompts.
        patches: (label, the first layer with a replaced head) of each replacement.
        n_layers: the model's number of layers.
        kinds: how many replacements are made for each: of two, one runs on the counterfactual prompts.
    """
    patches = list(patches)
    found = tokens_of(prompts) * min(kinds, 2)  # the runs that are changed
    for batch in prompts.batches:
        rest = {label: batch.position(label) for label, _ in patches}
        for label, layer in patches:
            place = rest[label]
            if place is not None:
                later = batch.tokens.shape[1] - int(place.min())
                found += kinds * len(batch) * later * (n_layers - layer) / n_layers
    return Part(REPLACE, found)
