"""Counterfactual prompts: the same words at the same places, except the words that make the computation possible.

See docs/definitions.md, section 7.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

REPLACEMENTS = ({"draw": "fresh"}, {"draw": "other_initial"}, {"form": "other"})
"""The replacements that a mention may ask for, besides {"word": WORD}."""


class SlotDraw(NamedTuple):
    """A slot's word in one prompt.

    Attributes:
        word: the word.
        forms: the slot's word sets, one for each form.
        place: the word's index in its set.
        form: the word's form, by number.
    """

    word: str
    forms: Sequence[Sequence[str]]
    place: int
    form: int


def replacements(
    asked: Any, mentions: Iterable[str], slots: Mapping[str, SlotDraw], held: Iterable[str], rng: random.Random
) -> dict[str, str]:
    """Choose a counterfactual's words: mention -> the word that replaces it.

    Args:
        asked: the task's `counterfactual`: mention -> {draw: fresh}, {draw: other_initial}, {form: other} or {word: W}.
        mentions: the prompt's mentions.
        slots: the prompt's slots with words of their own.
        held: all words in the prompt, which are not drawn.
        rng: the random generator.

    Raises:
        ValueError: a mention or replacement is unknown, or no word is left to draw.
    """
    if not isinstance(asked, Mapping):
        raise ValueError(f"counterfactual: must be a mapping of mentions to replacements, not {asked!r}")
    found: dict[str, str] = {}
    for mention, what in asked.items():
        slot = slots.get(mention.partition(".")[0])
        if slot is None or mention not in mentions:
            raise ValueError(f"counterfactual: no mention {mention!r} in every template; known: {sorted(mentions)}")
        if isinstance(what, Mapping) and set(what) == {"word"} and isinstance(what["word"], str):
            found[mention] = what["word"]
        elif what not in REPLACEMENTS:
            raise ValueError(f"counterfactual {mention}: {what!r}; allowed: {REPLACEMENTS} or {{'word': WORD}}")
        elif "form" in what:
            if len(slot.forms) < 2:
                raise ValueError(f"counterfactual {mention}: its slot has one form")
            found[mention] = slot.forms[(slot.form + 1) % len(slot.forms)][slot.place]
        else:
            barred = {*held, *found.values()}
            pool = [word for word in slot.forms[slot.form] if word not in barred]
            if what["draw"] == "other_initial":
                pool = [word for word in pool if word[0] != slot.word[0]]
            if not pool:
                raise ValueError(f"counterfactual {mention}: no other word is left in its set")
            found[mention] = rng.choice(pool)
    return found
