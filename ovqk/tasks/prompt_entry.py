"""The form of a task's `prompts` entry, which `ovqk/tasks/prompts.py` describes: its keys, slots and word sets."""

from collections.abc import Mapping, Sequence
from typing import Any

WordSets = Mapping[str, Sequence[str]]

TEMPLATE_KEYS = {"templates", "slots", "swap", "answer", "foil", "labels", "counterfactual", "clusters"}
REPEATED_KEYS = {"repeated", "counterfactual"}
REPEATED = {"words", "lengths"}
FRESH_FIRST_COPY = "fresh_first_copy"
SLOT_KEYS = ({"set"}, {"forms"}, {"forms", "agrees_with"}, {"set", "after"}, {"set", "up_to"}, {"initial_of"})
ORDERED = {"after", "up_to"}
LEADING = {"agrees_with", "initial_of", *ORDERED}
"""The keys of a slot that name another, its leader."""


def check_prompts(words: WordSets, prompts: Mapping[str, Any]) -> None:
    """Check the keys, slots and word sets in a `prompts` entry.

    Raises:
        ValueError: a key, slot or word set is unknown, or a key is missing.
    """
    if "repeated" in prompts:
        _refuse_unknown(prompts, REPEATED_KEYS)
        _refuse_other(prompts["repeated"], "repeated")
        _refuse_unknown(prompts["repeated"], REPEATED)
        _refuse_missing(prompts["repeated"], REPEATED)
        word_set(words, prompts["repeated"]["words"])
        if prompts.get("counterfactual", FRESH_FIRST_COPY) != FRESH_FIRST_COPY:
            raise ValueError(
                f"counterfactual: {prompts['counterfactual']!r}; allowed with repeated: {FRESH_FIRST_COPY}"
            )
        return
    _refuse_unknown(prompts, TEMPLATE_KEYS)
    _refuse_missing(prompts, {"templates", "slots", "answer", "foil"})
    _refuse_other(prompts["slots"], "slots")
    slots = {name: slot_entry(slot) for name, slot in prompts["slots"].items()}
    _check_slots(slots)
    for name in (name for slot in slots.values() for name in forms_of(slot)):
        word_set(words, name)
    _refuse_other(prompts.get("counterfactual", {}), "counterfactual")
    answer, foil, *replaced = map(str, replaced_slots(prompts))
    unknown = {answer, foil} - set(slots)
    if unknown:
        raise ValueError(f"answer or foil: unknown slots {sorted(unknown)}; known: {sorted(slots)}")
    for name in replaced:
        if name not in slots:
            raise ValueError(f"counterfactual: no mention {name!r} in every template; slots: {sorted(slots)}")


def _refuse_other(entry: Any, name: str) -> None:
    """Refuse an entry that is not a mapping."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: must be a mapping, not {entry!r}")


def _refuse_unknown(entry: Mapping[str, Any], known: set[str]) -> None:
    unknown = set(entry) - known
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in prompts; known: {sorted(known)}")


def _refuse_missing(entry: Mapping[str, Any], needed: set[str]) -> None:
    missing = needed - set(entry)
    if missing:
        raise ValueError(f"prompts lack {sorted(missing)}")


def word_set(words: WordSets, name: str) -> Sequence[str]:
    """Return a word set.

    Raises:
        ValueError: there is none with this name.
    """
    if str(name) not in words:
        raise ValueError(f"unknown word set {name!r}; known: {sorted(words)}")
    return words[name]


def slot_entry(slot: Any) -> Any:
    """Return a slot as a mapping; if the slot is only a name, it is its word set's name."""
    return {"set": slot} if isinstance(slot, str) else slot


def forms_of(slot: Any) -> list[str]:
    """Return a slot's word sets: one, or one for each form, or none if another slot's word determines it."""
    entry = slot_entry(slot)
    return [entry["set"]] if "set" in entry else list(entry.get("forms", []))


def _check_slots(slots: Mapping[str, Any]) -> None:
    for name, slot in slots.items():
        _refuse_other(slot, f"slot {name!r}")
        if set(slot) not in SLOT_KEYS:
            known = "; ".join(", ".join(sorted(keys)) for keys in SLOT_KEYS)
            raise ValueError(f"slot {name!r}: unknown keys {sorted(slot)}; known together: {known}")
        for key in set(slot) & LEADING:
            leader = slots.get(slot[key], {})
            if "set" in slot and leader != {"set": slot["set"]}:
                raise ValueError(f"slot {name!r}: {key} {slot[key]!r}, which is no plain slot of {slot['set']!r}")
            if not forms_of(leader):
                raise ValueError(f"slot {name!r}: {key} {slot[key]!r}, which is no slot with words of its own")


def replaced_slots(prompts: Mapping[str, Any]) -> list[Any]:
    """Return the slots for the answer, the foil and the mentions that a counterfactual replaces."""
    foil = prompts["foil"].get("other_form_of") if isinstance(prompts["foil"], Mapping) else prompts["foil"]
    return [prompts["answer"], foil, *(mention.partition(".")[0] for mention in prompts.get("counterfactual", {}))]
