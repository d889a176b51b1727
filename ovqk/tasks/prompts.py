"""Task prompts: sentences drawn from a task's templates, with labels on the words that matter (definitions: section 7).

A task's `prompts:` entry is plain data. It has one of two forms. The first is a list of templates:

    templates:                      # text up to, not including, the answer; [...] is optional, and nests
      - "When {A} and {B} went to the {place}[ in the {time}], {B} gave a {object} to"
    slots: {A: names, B: names, place: places, time: times, object: objects}   # slot -> word set
    swap: [A, B]                    # half of the prompts exchange the first mentions of these slots
    answer: A                       # the slot whose word comes next
    foil: B                         # the slot whose word is the natural mistake
    labels: {IO: A, S1: B, S2: B.2} # further names of slot mentions; "B.2" is the second mention

A slot may have forms: index-aligned word sets, such as singular and plural. It may agree with another slot:

    slots:
      subject: {forms: [nouns_singular, nouns_plural]}
      verb: {forms: [verbs_singular, verbs_plural], agrees_with: subject}
    answer: verb
    foil: {other_form_of: verb}

Two slots may draw from one ordered set, so that one comes after the other, or not after it (`up_to`: it may be the same
word). A slot may be the first letter of another slot's word. Braces may stand inside a word:

    templates:
      - "The war lasted from the year 17{start} to the year 17"
    slots:
      start: years
      end: {set: years, after: start}
      early: {set: years, up_to: start}
    answer: end                     # or, with `letter: {initial_of: third}` among the slots, letter
    foil: early

The second form is a random sequence that is repeated, and cut anywhere in its second copy. The foil is another word in
the sequence:

    repeated: {words: content, lengths: [6, 8, 10]}

Slots with the same word set never take the same word, nor two forms of one word, unless one slot has `up_to`. A slot's
mentions are `slot`, `slot.2` and so on. END is the text's last word, from which the answer is predicted.

`counterfactual` gives each prompt a second version in which the computation is impossible. The words and places are the
same, except for the mentions that it names. Each of these gets another word:

    counterfactual:
      B.2: {draw: fresh}            # another word of its slot's set that the prompt does not hold
      third: {draw: other_initial}  # such a word with another first letter
      subject: {form: other}        # the same word in the slot's other form
      start: {word: "01"}           # this word

Under `repeated`, `counterfactual: fresh_first_copy` draws the first copy anew, from other words.

Statistics resample whole clusters of prompts. Prompts form a cluster if they share the template, the order of swapped
slots and the drawn forms. If a task with few templates says `clusters: [event]`, prompts form a cluster if they have
the same words in these slots.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ovqk.tasks.counterfactuals import SlotDraw, replacements
from ovqk.tasks.prompt_entry import (
    LEADING,
    ORDERED,
    WordSets,
    check_prompts,
    forms_of,
    replaced_slots,
    slot_entry,
    word_set,
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A text whose next word is `answer` rather than `foil`.

    Attributes:
        text: the text, without the answer.
        answer, foil: the word that comes next, and the natural wrong answer.
        spans: label -> the characters [start, stop) of the word that it marks.
        group: a name shared by all prompts with matching word positions: the same template and optional phrases, in
            either order of swapped slots. So a mean over a group is a mean at matching positions.
        forms: slot -> its form, by number, for slots that have forms.
        template: the template, before its optional phrases were chosen.
        cluster: the prompt's cluster, by name; clusters are resampled as a whole.
        counterfactual: the prompt in which the computation is impossible; None if the task says no `counterfactual`.
    """

    text: str
    answer: str
    foil: str
    spans: Mapping[str, Span]
    group: str
    forms: Mapping[str, int]
    template: str = ""
    cluster: str = ""
    counterfactual: "Prompt | None" = None


def variants(template: str) -> list[str]:
    """Return all texts that a template gives, with each optional phrase `[...]` left out and put in."""
    match = re.search(r"\[([^\[\]]*)\]", template)
    if match is None:
        return [template]
    before, after = template[: match.start()], template[match.end() :]
    texts = variants(before + after) + variants(before + match.group(1) + after)
    return list(dict.fromkeys(texts))


def slot_names(template: str) -> list[str]:
    """Return a template's slots, in order and with repeats."""
    return re.findall(r"\{(\w+)\}", template)


def sample_prompts(words: WordSets, prompts: Mapping[str, Any], count: int, seed: int) -> list[Prompt]:
    """Draw prompts. The same arguments give the same prompts.

    Swapped orders alternate, and so do the forms if other slots agree with a slot, so both are exactly balanced.
    Templates, optional phrases and words are drawn uniformly.

    Args:
        words: word set -> its words.
        prompts: the task's `prompts` entry, as the module's docstring describes it.
        count: how many prompts are drawn.
        seed: the seed for the draws.

    Raises:
        ValueError: a key, slot, mention or word set is unknown, or a word set is too small for its slots.
    """
    check_prompts(words, prompts)
    rng = random.Random(seed)
    if "repeated" in prompts:
        fresh = "counterfactual" in prompts
        return [
            _repeated(words, prompts["repeated"], rng, _own_rng(seed, index) if fresh else None)
            for index in range(count)
        ]
    drawn = [_from_template(words, prompts, index, rng, _own_rng(seed, index)) for index in range(count)]
    rng.shuffle(drawn)
    return drawn


def _own_rng(seed: int, index: int) -> random.Random:
    """Return a random generator for one prompt's counterfactual alone, so that it changes no other draw."""
    return random.Random(f"counterfactual {seed} {index}")


def token_positions(prompt: Prompt, offsets: Iterable[Span]) -> dict[str, int]:
    """Return label -> the index of the last token that overlaps the label's characters.

    So if a word has several tokens, its last token is marked, because there the model has read the whole word.

    Args:
        prompt: the prompt.
        offsets: the tokenizer's character span for each token; special tokens have empty spans.

    Raises:
        ValueError: no token overlaps a label's characters.
    """
    tokens = [(index, start, stop) for index, (start, stop) in enumerate(offsets) if stop > start]
    positions = {}
    for label, (first, last) in prompt.spans.items():
        inside = [index for index, start, stop in tokens if start < last and stop > first]
        if not inside:
            raise ValueError(f"no token covers {label} {prompt.text[first:last]!r} of {prompt.text!r}")
        positions[label] = inside[-1]
    return positions


def _from_template(
    words: WordSets, prompts: Mapping[str, Any], index: int, rng: random.Random, own: random.Random
) -> Prompt:
    slots = {name: slot_entry(slot) for name, slot in prompts["slots"].items()}
    base = rng.choice(list(prompts["templates"]))
    template = rng.choice(variants(base))
    foil_of = prompts["foil"]["other_form_of"] if isinstance(prompts["foil"], Mapping) else None
    needed = {*slot_names(template), prompts["answer"], foil_of or prompts["foil"]}
    needed |= {slots[name][key] for name in needed & set(slots) for key in set(slots[name]) & LEADING}
    unknown = needed - set(slots)
    if unknown:
        raise ValueError(f"unknown slots {sorted(unknown)} in {template!r}; known: {sorted(slots)}")

    indices, forms = _draw(words, {name: slots[name] for name in slots if name in needed}, index, rng)
    values = {name: words[forms_of(slots[name])[forms[name]]][indices[name]] for name in indices}
    values |= {name: values[slots[name]["initial_of"]][0] for name in needed if "initial_of" in slots[name]}
    if foil_of is None:
        foil = values[prompts["foil"]]
    else:
        sets = forms_of(slots[foil_of])
        foil = words[sets[(forms[foil_of] + 1) % len(sets)]][indices[foil_of]]

    exchange = index // 2 % 2 == 1
    order = _swapped(slot_names(template), prompts.get("swap"), exchange)
    text, spans = _fill(template, order, values)
    answer = values[prompts["answer"]]
    if answer == foil:
        raise ValueError(f"answer and foil are both {answer!r} after {text!r}")
    labels = prompts.get("labels", {})
    for label, mention in labels.items():
        if mention not in spans:
            raise ValueError(f"label {label}: no mention {mention!r} in {template!r}")
        spans[label] = spans[mention]
    drawn_forms = {name: form for name, form in forms.items() if "forms" in slots[name]}
    unit = [base, *(["swapped"] if exchange and "swap" in prompts else []), *map(str, drawn_forms.values())]
    unit = [values[_known_slot(name, values)] for name in prompts.get("clusters", [])] or unit
    made = Prompt(text, answer, foil, spans, template, drawn_forms, base, " | ".join(unit))
    if "counterfactual" not in prompts:
        return made
    drawn = {
        name: SlotDraw(values[name], [words[key] for key in forms_of(slots[name])], indices[name], forms[name])
        for name in indices
    }
    replaced = replacements(prompts["counterfactual"], spans, drawn, values.values(), own)
    text, spans = _fill(template, order, values, replaced)
    spans |= {label: spans[mention] for label, mention in labels.items()}
    return replace(made, counterfactual=replace(made, text=text, spans=spans))


def _known_slot(name: str, values: Mapping[str, str]) -> str:
    if name not in values:
        raise ValueError(f"clusters: no slot {name!r} in every template; slots: {sorted(values)}")
    return name


def _draw(
    words: WordSets, slots: Mapping[str, Mapping[str, Any]], index: int, rng: random.Random
) -> tuple[dict[str, int], dict[str, int]]:
    """Draw a word index and a form for each slot with words; slots that others agree with alternate with `index`."""
    slots = {name: slot for name, slot in slots.items() if forms_of(slot)}
    leaders = {slot["agrees_with"] for slot in slots.values() if "agrees_with" in slot}
    forms: dict[str, int] = {}
    for name, slot in slots.items():
        n_forms = len(forms_of(slot))
        forms[name] = index % n_forms if name in leaders else rng.randrange(n_forms)
    for name, slot in slots.items():
        if "agrees_with" in slot:
            forms[name] = forms[slot["agrees_with"]]

    followed = {slot["after"] for slot in slots.values() if "after" in slot}
    taken: dict[tuple[str, ...], set[int]] = {}
    indices: dict[str, int] = {}
    for name, slot in sorted(slots.items(), key=lambda item: bool(set(item[1]) & ORDERED)):  # leaders first
        sets = forms_of(slot)
        sizes = {len(word_set(words, name_of_set)) for name_of_set in sets}
        if len(sizes) > 1:
            raise ValueError(f"slot {name!r}: the sets {sets} differ in length and cannot be index-aligned")
        used = taken.setdefault(tuple(sets), set())
        start, stop = 0, sizes.pop() - (name in followed)  # the last word has none after it
        if "after" in slot:
            start = indices[slot["after"]] + 1
        if "up_to" in slot:
            stop, used = indices[slot["up_to"]] + 1, set()
        free = [i for i in range(start, stop) if i not in used]
        if not free:
            raise ValueError(f"slot {name!r}: no word of {sets} is left")
        indices[name] = rng.choice(free)
        used.add(indices[name])
    return indices, forms


def _swapped(mentions: list[str], swap: Sequence[str] | None, exchange: bool) -> list[str]:
    """Return the slot at each mention, with the two swapped slots' first mentions exchanged."""
    if swap is None or not exchange:
        return mentions
    first, second = (mentions.index(name) for name in swap)
    order = list(mentions)
    order[first], order[second] = order[second], order[first]
    return order


def _fill(
    template: str, order: Sequence[str], values: Mapping[str, str], replaced: Mapping[str, str] | None = None
) -> tuple[str, dict[str, Span]]:
    """Fill slots in `order`, or mentions with their replacements; return the text, and spans for mentions and END."""
    literals = re.split(r"\{\w+\}", template)
    text, spans, seen = literals[0], {}, dict.fromkeys(order, 0)
    for name, literal in zip(order, literals[1:], strict=True):
        seen[name] += 1
        mention = name if seen[name] == 1 else f"{name}.{seen[name]}"
        word = (replaced or {}).get(mention, values[name])
        spans[mention] = (len(text), len(text) + len(word))
        text += word + literal
    text = text.rstrip()
    spans["END"] = _last_word(text)
    return text, spans


def _last_word(text: str) -> Span:
    *_, match = re.finditer(r"\w+", text)
    return match.span()


def _repeated(
    words: WordSets, repeated: Mapping[str, Any], rng: random.Random, own: random.Random | None = None
) -> Prompt:
    """Return a random sequence and the start of its second copy, which ends on the word labelled END.

    PREVIOUS marks END's word in the first copy, and SOURCE the word after it, which is the answer. If `own` is given,
    the prompt has a counterfactual, whose first copy has other words. The cluster is the word at END.
    """
    length = rng.choice(list(repeated["lengths"]))
    pool = list(word_set(words, repeated["words"]))
    if len(pool) < length:
        raise ValueError(f"a sequence of {length} different words needs more than the {len(pool)} given")
    sequence = rng.sample(pool, length)
    kept = rng.randrange(1, length)
    answer = sequence[kept]
    foil = rng.choice([word for word in sequence if word not in (sequence[kept - 1], answer)])

    def laid_out(tokens: list[str]) -> tuple[str, dict[str, Span]]:
        starts = [sum(len(word) + 1 for word in tokens[:i]) for i in range(len(tokens))]
        places = {"PREVIOUS": kept - 1, "SOURCE": kept, "END": length + kept - 1}
        spans = {label: (starts[i], starts[i] + len(tokens[i])) for label, i in places.items()}
        return " ".join(tokens), spans

    group = f"repeated {length} cut {kept}"
    text, spans = laid_out(sequence + sequence[:kept])
    made = Prompt(text, answer, foil, spans, group, {}, "repeated", sequence[kept - 1])
    if own is None:
        return made
    others = [word for word in pool if word not in sequence]
    if len(others) < length:
        raise ValueError(f"counterfactual: a first copy of {length} other words needs more than the {len(pool)} given")
    text, spans = laid_out(own.sample(others, length) + sequence[:kept])
    return replace(made, counterfactual=replace(made, text=text, spans=spans))


def known_words(words: WordSets, prompts: Mapping[str, Any], known: Callable[[str], bool]) -> dict[str, list[str]]:
    """Return the word sets without the words that a vocabulary lacks; a word's forms stay or go together."""
    aligned = [forms_of(slot) for slot in prompts.get("slots", {}).values()]
    kept = {name: list(filter(known, content)) for name, content in words.items()}
    for sets in aligned:
        rows = [row for row in zip(*(word_set(words, name) for name in sets), strict=True) if all(map(known, row))]
        for column, name in enumerate(sets):
            kept[name] = [row[column] for row in rows]
    return kept


def word_sets_of(prompts: Mapping[str, Any]) -> list[str]:
    """Name the word sets that hold answers, foils and the words that a counterfactual replaces."""
    if "repeated" in prompts:
        return [prompts["repeated"]["words"]]
    return list(dict.fromkeys(name for slot in replaced_slots(prompts) for name in forms_of(prompts["slots"][slot])))
