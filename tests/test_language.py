"""The synthetic language: nothing but the relation that a task is about gives its answer."""

import itertools
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import language
import words

LENGTH = 64


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


def test_the_receiver_comes_first_in_half_of_the_sentences(training):
    sentences = training["ioi"]
    first = share(s.tokens.index(s.tokens[s.answer_at]) < s.tokens.index(s.foil) for s in sentences)
    assert 0.47 < first < 0.53


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


@pytest.mark.parametrize("task", ["ioi", "sva"])
def test_held_out_pairs_are_not_in_training(training, task):
    marker = {"ioi": None, "sva": "attractor"}[task]
    for segment in training[task]:
        nouns = {*words.WORDS["nouns_singular"], *words.WORDS["nouns_plural"]}
        if marker is None or sum(token in nouns for token in segment.tokens) > 1:
            assert not language.is_held_out(*segment.pair)


def test_held_out_neighbours_are_not_in_training(training):
    for segment in training["induction"]:
        assert not any(language.is_held_out(*pair) for pair in itertools.pairwise(segment.tokens[:-1]))


@pytest.mark.parametrize("task", list(language.TASKS))
def test_held_out_examples_ask_about_held_out_pairs(task):
    rng = random.Random(0)
    for _ in range(100):
        assert language.is_held_out(*language.TASKS[task](rng, held_out=True).pair)
    for context, answer, foil in language.held_out_examples(task, 100, 0, LENGTH):
        assert len(context) <= LENGTH and answer != foil
