"""The synthetic language: three tasks that need attention, among sentences that only fill the context.

    ioi         indirect objects: "When Mary and John went to the store, John gave a drink to Mary."
    sva         agreement past attractors of either number: "The cats near the dog with the boys are here."
    induction   a random sequence of words, then the same sequence again
    filler      sentences that mention names, cities, companies and so on, and repeat nothing

A context is a stream of such segments. A sentence stands before each segment. It introduces other names (before most
indirect-object sentences) or only fills. Half of the training windows start at a random word in the stream, so no
position is special. The other half start with <eos> and a whole segment, so the model also learns prompts that begin a
text. Position, distance and the set of names do not give the answer away, because both name orders, optional phrases,
and other names in earlier sentences occur. In half of the indirect-object sentences the giver asks the question, so the
last name before it is the giver. In the other half somebody else asks, and the last name is the giver's as often as the
receiver's: only the repetition tells them apart.

Some triples are held out: about a tenth of all word triples (`is_held_out`) never meet in training. They do not occur
as the two names and the object in an indirect-object sentence, as the subject, first attractor and verb in an agreement
sentence, or as three neighbours in a repeated sequence. Accuracy is measured on those triples only. Pairs would not do:
if a model trains for long, it learns which of a few hundred pairs never meet, and then answers with another word.

Everything is drawn from a `random.Random`, so a seed fixes every word.
"""

import itertools
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ovqk.tasks.prompts import variants
from ovqk.testing.language_words import SEQUENCE_WEIGHTS, WORDS

UNKNOWN, END_OF_TEXT = "<unk>", "<eos>"

# Slots are filled from the word sets; {A} is the receiver, named once, and {B} the name that is repeated.
SLOTS = {
    "A": "names", "B": "names", "X": "names", "Y": "names", "Z": "names", "C": "names", "D": "names",
    "city": "cities", "city2": "cities", "country": "countries", "country2": "countries",
    "surname": "surnames", "surname2": "surnames", "company": "companies", "company2": "companies",
    "state": "states", "state2": "states", "adjective2": "adjectives", "place": "places", "place2": "places", "object": "objects",
    "noun": "nouns_singular", "noun2": "nouns_singular", "adjective": "adjectives", "time": "times", "gave": "transfers",
    "preposition": "prepositions", "preposition2": "prepositions", "past": "pasts",
}  # fmt: skip

INDIRECT_OBJECT = [
    "When {A} and {B} went to the {place}[ in the {time}],[ after the {time},] {B} {gave} a[ {adjective}] {object} to",
    "After {A} and {B} met at the {place}[ near the {place2}], {B} {gave} a {object} to",
    "While {A} and {B} were at the {place}, the {noun} left and {B} {gave} a[ {adjective}] {object} to",
    "Then {A} and {B} walked to the[ {adjective}] {place}[ with a {noun}], and {B} {gave} a {object} to",
    "In the {time}, {A} met {B} at the {place}, and[ in the {place2}] {B} {gave} a[ {adjective}] {object} to",
    "Because {A} liked {B}[ and the {noun}], {B} {gave} a[ {adjective}] {object} to",
    "Before {A} went[ from the {place}] to the {place2} with {B}, {B} {gave} a {object} to",
    "{A} saw {B}[ near the {place}][ in the {time}]. Then {B} {gave} a[ {adjective}] {object} to",
    "{A} and {B} were at the {place}.[ The {place2} was {adjective}.] In the {time}, {B} {gave} a {object} to",
]

# {X} is the repeated name; {Y} and {Z} are the repeated name and the receiver, in either order.
SOMEBODY_ELSE_GIVES = [
    "{X} was at the {place}[ in the {time}]. {Y} met {Z} near the {place2}. "
    "The {noun} {gave} a[ {adjective}] {object} to",
    "{X} {past} the {noun2}. Then {Y} and {Z} walked to the {place}, and the {noun} {gave} a {object} to",
    "In the {time}, {X} was {adjective}. Because {Y} liked {Z}, the {noun} {gave} a {object} to",
    "{X} and the {noun2} were at the {place}. After {Y} saw {Z}[ in the {time}], "
    "the {noun} {gave} a[ {adjective}] {object} to",
    "When {X} went to the {place}, {Y} was with {Z}. In the {place2}, the {noun} {gave} a {object} to",
    "{Y} and {Z} were {adjective}. The {noun2} {past} {X}[ in the {time}]. Then they {gave} a {object} to",
    "Before {Y} met {Z} at the {place}, {X} {past} the {noun2}. They {gave} a[ {adjective}] {object} to",
]

AGREEMENT = [
    "The[ {adjective}] {subject}[ {preposition} the {attractor}[ and the {attractor2}]]",
    "The {subject} {preposition} the[ {adjective}] {attractor}[ {preposition2} the {attractor2}]",
    "In the {time}, the {subject}[ {preposition} the {attractor}]",
    "The {subject} that {past} the {attractor}[ {preposition} the {attractor2}]",
    "The {subject} that the {attractor} {past}[ in the {place}]",
]

FILLER = [
    "The {surname} family of {city} moved to {country}[ in the {time}].",
    "{company} bought {company2}[ from {country}].",
    "The train from {city} to {city2} was {adjective}.",
    "The plane flew[ in the {time}] from {country} to {country2}.",
    "They lived in {city}, {state}, and worked for {company}.",
    "{state} and {state2} are near {country}.",
    "{company} sold the {place} in {city}.",
    "{surname} and {surname2} drove from {state} to {state2}.",
    "The {place} was {adjective} and the {place2} was {adjective2}.",
    "They made a {object} for {surname} at {company}.",
    "{C} worked for {company} in {state}.",
]

# Other names, each mentioned once, in the sentence before: the receiver is not the only such name.
INTRODUCTIONS = [
    "{C} {past} the {noun} at the {place} with {D}.",
    "Then {C} and {D} walked to the {place}[ in the {time}].",
    "In the {time}, {C} was {adjective} and {D} was {adjective2}.",
    "{C} and {D} were at the {place}.",
    "The {place} was {adjective} and {C} liked {D}.",
    "{C} worked for {company}[ in {city}], and {D} lived in {state}.",
]
INTRODUCED = 0.85  # of the indirect-object sentences
GIVER_ASKS = 0.5  # of the indirect-object sentences

TASK_WEIGHTS = {"ioi": 4, "sva": 3, "induction": 6}
SEQUENCE_LENGTHS = range(5, 13)


def tokenize(text: str) -> list[str]:
    """Split a text into words and punctuation marks, as the model's tokenizer does."""
    return re.findall(r"<\w+>|\w+|[^\w\s]", text)


def is_held_out(*words: str) -> bool:
    """Say whether this unordered word triple is kept from training (about one in ten is)."""
    return zlib.crc32(" ".join(sorted(words)).encode()) % 10 == 0


@dataclass(frozen=True)
class Segment:
    """One segment in the stream: tokens, and the place of the task's answer (None for a filler).

    `meeting` holds the three words whose meeting is held out or not; `foil` is the natural wrong answer.
    """

    kind: str
    tokens: list[str]
    answer_at: int | None = None
    foil: str | None = None
    meeting: tuple[str, ...] | None = None


class Weighted:
    """Draws words from one set; the first is three times as frequent as the last.

    Frequencies differ within a class as much as between classes. So the classes mix in the vocabulary's frequency
    order, and a word's rank does not give its class away.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.cumulative = list(itertools.accumulate(1 / (1 + 2 * i / len(words)) for i in range(len(words))))

    def index(self, rng: random.Random) -> int:
        return rng.choices(range(len(self.words)), cum_weights=self.cumulative)[0]

    def draw(self, rng: random.Random) -> str:
        return self.words[self.index(rng)]


SETS = {name: Weighted(words) for name, words in WORDS.items()}


def compiled(templates: list[str]) -> list[list[list[str]]]:
    """Return each template's variants, each as a list of words and {slots}."""
    return [[re.findall(r"\{\w+\}|\w+|[^\w\s]", text) for text in variants(template)] for template in templates]


INDIRECT_OBJECT_PIECES = compiled(INDIRECT_OBJECT)
SOMEBODY_ELSE_GIVES_PIECES = compiled(SOMEBODY_ELSE_GIVES)
AGREEMENT_PIECES = compiled(AGREEMENT)
FILLER_PIECES = compiled(FILLER)
INTRODUCTION_PIECES = compiled(INTRODUCTIONS)


def fill(pieces: list[str], values: dict[str, str], rng: random.Random) -> list[str]:
    """Fill a template's slots from `values`; if a slot has no value, draw an unused word from its set."""
    tokens, used = [], set(values.values())
    for piece in pieces:
        if piece[0] != "{":
            tokens.append(piece)
            continue
        slot = piece[1:-1]
        word = values.get(slot)
        while word is None or (slot not in values and word in used):
            word = SETS[SLOTS[slot]].draw(rng)
        used.add(word)
        tokens.append(word)
    return tokens


def indirect_object(rng: random.Random, held_out: bool = False) -> Segment:
    """Draw an indirect-object sentence, mostly after an introduction; a fair coin decides which name comes first."""
    while True:
        receiver, giver, given = SETS["names"].draw(rng), SETS["names"].draw(rng), SETS["objects"].draw(rng)
        if receiver != giver and is_held_out(receiver, giver, given) == held_out:
            break
    first, second = (receiver, giver) if rng.random() < 0.5 else (giver, receiver)
    if rng.random() < GIVER_ASKS:
        pieces = list(rng.choice(rng.choice(INDIRECT_OBJECT_PIECES)))
        names = {"A": receiver, "B": giver}
        if first == giver:
            a, b = pieces.index("{A}"), pieces.index("{B}")
            pieces[a], pieces[b] = pieces[b], pieces[a]
    else:
        pieces = rng.choice(rng.choice(SOMEBODY_ELSE_GIVES_PIECES))
        names = {"X": giver, "Y": first, "Z": second}
    if rng.random() < INTRODUCED:
        pieces = rng.choice(rng.choice(INTRODUCTION_PIECES)) + pieces
    tokens = fill(pieces, {**names, "object": given}, rng)
    return Segment("ioi", [*tokens, receiver, "."], len(tokens), giver, (receiver, giver, given))


def agreement(rng: random.Random, held_out: bool = False) -> Segment:
    """Draw an agreement sentence; fair coins decide the grammatical number of the subject and every attractor."""
    while True:
        lemmas = [SETS["nouns_singular"].index(rng) for _ in range(3)]
        verb = SETS["verbs_singular"].index(rng)
        meeting = *(WORDS["nouns_singular"][lemma] for lemma in lemmas[:2]), WORDS["verbs_singular"][verb]
        pieces = rng.choice(rng.choice(AGREEMENT_PIECES))
        if len(set(lemmas)) == 3 and (is_held_out(*meeting) and "{attractor}" in pieces) == held_out:
            break
    numbers = [rng.choice(("singular", "plural")) for _ in lemmas]
    nouns = [WORDS[f"nouns_{number}"][lemma] for number, lemma in zip(numbers, lemmas, strict=True)]
    tokens = fill(pieces, dict(zip(("subject", "attractor", "attractor2"), nouns, strict=True)), rng)
    right, wrong = WORDS[f"verbs_{numbers[0]}"][verb], WORDS[f"verbs_{_other(numbers[0])}"][verb]
    tail = ["a", SETS["objects"].draw(rng)] if right in ("has", "have") else [SETS["adverbs"].draw(rng)]
    return Segment("sva", [*tokens, right, *tail, "."], len(tokens), wrong, meeting)


def _other(number: str) -> str:
    return "plural" if number == "singular" else "singular"


SEQUENCE_CLASSES = list(SEQUENCE_WEIGHTS)
SEQUENCE_CUMULATIVE = list(itertools.accumulate(SEQUENCE_WEIGHTS.values()))


def repeated_sequence(rng: random.Random, held_out: bool = False) -> Segment:
    """Draw different random words and repeat them. In a held-out segment the answer ends a new triple."""
    length = rng.choice(SEQUENCE_LENGTHS)
    answer_at = rng.randrange(1, length)
    while True:
        words: list[str] = []
        while len(words) < length:
            word = SETS[rng.choices(SEQUENCE_CLASSES, cum_weights=SEQUENCE_CUMULATIVE)[0]].draw(rng)
            if word not in words and (held_out or len(words) < 2 or not is_held_out(*words[-2:], word)):
                words.append(word)
        meeting = words[answer_at - 2], words[answer_at - 1], words[answer_at]  # the second copy follows the first
        across = is_held_out(words[-2], words[-1], words[0]) or is_held_out(words[-1], words[0], words[1])
        if is_held_out(*meeting) if held_out else not across:
            break
    foil = rng.choice([word for word in words if word not in meeting[1:]])
    return Segment("induction", [*words, *words, "."], length + answer_at, foil, meeting)


def filler(rng: random.Random) -> Segment:
    return Segment("filler", fill(rng.choice(rng.choice(FILLER_PIECES)), {}, rng))


TASKS = {"ioi": indirect_object, "sva": agreement, "induction": repeated_sequence}


def segments(rng: random.Random) -> Iterator[Segment]:
    """Yield training segments without end; a filler comes before a task's segment unless it has an introduction."""
    kinds, weights = list(TASK_WEIGHTS), list(itertools.accumulate(TASK_WEIGHTS.values()))
    while True:
        kind = rng.choices(kinds, cum_weights=weights)[0]
        before = introduction(kind, rng)
        if before:
            yield Segment("filler", before)
        yield TASKS[kind](rng)


def introduction(kind: str, rng: random.Random) -> list[str]:
    """Return the tokens before a segment: a filler, or nothing if the segment has its own introduction."""
    return [] if kind == "ioi" else filler(rng).tokens


@dataclass(frozen=True)
class Window:
    """A training window. `tasks` says for each token which task determines it: an index into TASKS, or -1."""

    tokens: list[str]
    tasks: list[int]


def given_by(segment: Segment) -> list[int]:
    """Return which task determines each token in a segment; in a sequence, the second copy except its first word."""
    tasks = [-1] * len(segment.tokens)
    if segment.answer_at is not None:
        number, copy = list(TASKS).index(segment.kind), len(segment.tokens) // 2
        is_sequence = segment.kind == "induction"
        for place in range(copy + 1, 2 * copy) if is_sequence else [segment.answer_at]:
            tasks[place] = number
    return tasks


def windows(rng: random.Random, length: int) -> Iterator[Window]:
    """Yield training windows of `length` tokens: half begin at a random word in the stream, half at <eos>."""
    stream = segments(rng)
    while True:
        first = next(stream)
        tokens, tasks = list(first.tokens), given_by(first)
        if rng.random() < 0.5:
            tokens, tasks = [END_OF_TEXT, *tokens], [-1, *tasks]
        else:
            start = rng.randrange(len(tokens))
            tokens, tasks = tokens[start:], [-1] * (len(tokens) - start)  # the words that determine them may be cut off
        while len(tokens) < length:
            segment = next(stream)
            tokens += segment.tokens
            tasks += given_by(segment)
        yield Window(tokens[:length], tasks[:length])


def held_out_examples(task: str, count: int, seed: int, length: int) -> Iterator[tuple[list[str], str, str]]:
    """Yield contexts of at most `length` tokens, each with the answer that comes next and its foil.

    A sentence with a held-out triple stands after as much of the stream as there is room for, or less. As in training
    windows, half of the contexts start with <eos> and a whole segment, half at a random word.
    """
    rng = random.Random(f"held out {task} {seed}")
    for _ in range(count):
        segment = TASKS[task](rng, held_out=True)
        assert segment.answer_at is not None and segment.foil is not None
        question = [*introduction(segment.kind, rng), *segment.tokens[: segment.answer_at]]
        room = rng.randrange(length - len(question))
        earlier = [piece.tokens for piece in itertools.islice(segments(rng), length // 4)]
        if rng.random() < 0.5:
            sizes = itertools.accumulate(len(tokens) for tokens in earlier)
            whole = sum(size < room for size in sizes)
            before = [END_OF_TEXT, *itertools.chain(*earlier[:whole])]
        else:
            before = list(itertools.chain(*earlier))[-room:] if room else []
        yield before + question, segment.tokens[segment.answer_at], segment.foil
