"""The synthetic language: nothing but the relation that a task is about gives its answer."""

import itertools
import random
from collections import Counter

import pytest

from ovqk.testing import language
from ovqk.testing import language_words as words

LENGTH = 48


@pytest.fixture(scope="module")
def training() -> dict[str, list[language.Segment]]:
    stream = itertools.islice(language.segments(random.Random(0)), 12_000)
    by_kind: dict[str, list[language.Segment]] = {}
    for segment in stream:
        by_kind.setdefault(segment.kind, []).append(segment)
    return by_kind


def share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def test_same_seed_same_text():
    first, again, other = (
        list(itertools.islice(language.windows(random.Random(seed), LENGTH), 20)) for seed in (0, 0, 1)
    )
    assert first == again and first != other


def test_every_word_is_in_one_set_and_the_text_uses_all_of_them(training):
    listed = Counter(word for content in words.WORDS.values() for word in content)
    assert set(listed.values()) == {1}
    seen = {token for segments in training.values() for segment in segments for token in segment.tokens}
    assert set(listed) <= seen


def test_at_least_four_other_classes_are_as_frequent_as_the_names(training):
    counts = Counter(token for segments in training.values() for segment in segments for token in segment.tokens)
    totals = {name: sum(counts[word] for word in content) for name, content in words.CAPITALISED.items()}
    names = totals.pop("names")
    assert sum(0.7 * names < total < 1.4 * names for total in totals.values()) >= 4
    assert {len(content) for content in words.CAPITALISED.values()} == {32}


def test_windows_start_anywhere():
    starts = Counter(window.tokens[0] for window in itertools.islice(language.windows(random.Random(0), LENGTH), 2000))
    assert 800 < starts[language.END_OF_TEXT] < 1200
    assert len(starts) > 200


def test_neither_the_first_nor_the_last_name_gives_the_receiver(training):
    """Only the repetition tells the two names apart: each rule by order is wrong in most sentences."""
    first_is_receiver, last_is_receiver = [], []
    for segment in training["ioi"]:
        receiver, giver = segment.tokens[segment.answer_at], segment.foil
        mentions = [token for token in segment.tokens[: segment.answer_at] if token in (receiver, giver)]
        assert mentions.count(receiver) == 1 and mentions.count(giver) == 2
        first_is_receiver.append(mentions[0] == receiver)
        last_is_receiver.append(mentions[-1] == receiver)
    assert 0.2 < share(first_is_receiver) < 0.5
    assert 0.1 < share(last_is_receiver) < 0.5


def test_no_distance_gives_the_receiver(training):
    """Copying the token at the best fixed distance from the question is right in few sentences."""
    distances = Counter(
        s.answer_at - s.tokens.index(s.tokens[s.answer_at]) for s in training["ioi"] if s.answer_at is not None
    )
    assert max(distances.values()) / distances.total() < 0.2


def test_a_bag_of_names_leaves_the_receiver_open():
    """Of the names in a context, once or more often seen, the receiver is one of several."""
    names = set(words.WORDS["names"])
    examples = list(language.held_out_examples("ioi", 500, 0, LENGTH))
    once = [[n for n in names if context.count(n) == 1] for context, _, _ in examples]
    guess = share(1 / len(n) if answer in n else 0 for n, (_, answer, _) in zip(once, examples, strict=True))
    assert guess < 0.6


def test_attractors_of_both_numbers_stand_between_subject_and_verb(training):
    singular, plural = (set(words.WORDS[f"nouns_{number}"]) for number in ("singular", "plural"))
    last_agrees, subjects = [], Counter()
    for sentence in training["sva"]:
        nouns = [token for token in sentence.tokens[: sentence.answer_at] if token in singular | plural]
        is_plural = sentence.tokens[sentence.answer_at] in words.WORDS["verbs_plural"]
        assert (nouns[0] in plural) == is_plural
        subjects[is_plural] += 1
        if len(nouns) > 1:
            last_agrees.append((nouns[-1] in plural) == is_plural)
    assert 0.46 < share(last_agrees) < 0.54
    assert 0.46 < subjects[True] / subjects.total() < 0.54
    assert len(last_agrees) > 0.5 * len(training["sva"])


def test_a_sequence_repeats_after_different_lengths(training):
    lengths = Counter()
    for segment in training["induction"]:
        half = len(segment.tokens) // 2
        assert segment.tokens[:half] == segment.tokens[half:-1] and len(set(segment.tokens[:half])) == half
        lengths[half] += 1
    assert max(lengths.values()) / lengths.total() < 0.25


@pytest.mark.parametrize("task", list(language.TASKS))
def test_held_out_triples_are_not_in_training(training, task):
    nouns = {*words.WORDS["nouns_singular"], *words.WORDS["nouns_plural"]}
    held_out = []
    for segment in training[task]:
        has_attractor = sum(token in nouns for token in segment.tokens) > 1
        if task == "induction":
            tokens = segment.tokens[:-1]
            triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
            held_out += [language.is_held_out(*triple) for triple in triples]
        elif task == "ioi" or has_attractor:
            held_out.append(language.is_held_out(*segment.meeting))
    assert len(held_out) > 1000 and not any(held_out)


def test_a_tenth_of_all_triples_is_held_out():
    triples = itertools.combinations(words.WORDS["names"][:20], 3)
    assert 0.08 < share(language.is_held_out(*triple) for triple in triples) < 0.12


@pytest.mark.parametrize("task", list(language.TASKS))
def test_held_out_examples_ask_about_held_out_triples(task):
    rng = random.Random(0)
    for _ in range(100):
        segment = language.TASKS[task](rng, held_out=True)
        assert language.is_held_out(*segment.meeting)
    starts = Counter()
    for context, answer, foil in language.held_out_examples(task, 200, 0, LENGTH):
        assert len(context) <= LENGTH and answer != foil
        starts[context[0] == language.END_OF_TEXT] += 1
    assert 70 < starts[True] < 130  # as in training


def test_a_held_out_sequence_repeats_a_triple_never_seen():
    rng = random.Random(1)
    for _ in range(200):
        segment = language.repeated_sequence(rng, held_out=True)
        before = segment.tokens[segment.answer_at - 2 : segment.answer_at]
        assert (*before, segment.tokens[segment.answer_at]) == segment.meeting
        assert segment.meeting[1:] in set(itertools.pairwise(segment.tokens[: len(segment.tokens) // 2]))
