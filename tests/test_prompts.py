"""Prompts: orders and forms are balanced, the marked tokens are the right ones, nonsense is refused."""

from collections import Counter

import pytest

from ovqk.prompts import known_words, sample_prompts, token_positions, variants

WORDS = {
    "names": ["Mary", "John", "Tom", "James", "Anna"],
    "places": ["store", "park"],
    "nouns_singular": ["cat", "dog", "boy"],
    "nouns_plural": ["cats", "dogs", "boys"],
    "verbs_singular": ["is", "runs"],
    "verbs_plural": ["are", "run"],
    "content": ["Paris", "ring", "Texas", "blue", "map", "Ford", "cup"],
}
IOI = {
    "templates": ["{C} left. When {A} and {B} went to the {place}[ at noon], {B} gave a drink to"],
    "slots": {"A": "names", "B": "names", "C": "names", "place": "places"},
    "swap": ["A", "B"],
    "answer": "A",
    "foil": "B",
    "labels": {"IO": "A", "S1": "B", "S2": "B.2"},
}
SVA = {
    "templates": ["The {subject} near the {attractor}"],
    "slots": {
        "subject": {"forms": ["nouns_singular", "nouns_plural"]},
        "attractor": {"forms": ["nouns_singular", "nouns_plural"]},
        "verb": {"forms": ["verbs_singular", "verbs_plural"], "agrees_with": "subject"},
    },
    "answer": "verb",
    "foil": {"other_form_of": "verb"},
}
INDUCTION = {"repeated": {"words": "content", "lengths": [4, 6]}}


def test_optional_phrases_nest():
    assert set(variants("a[ b[ c]] d")) == {"a d", "a b d", "a b c d"}


def test_same_seed_same_prompts():
    assert sample_prompts(WORDS, IOI, 20, seed=3) == sample_prompts(WORDS, IOI, 20, seed=3)
    assert sample_prompts(WORDS, IOI, 20, seed=3) != sample_prompts(WORDS, IOI, 20, seed=4)


def test_names_differ_and_both_orders_are_equally_frequent():
    prompts = sample_prompts(WORDS, IOI, 200, seed=0)
    orders = Counter(prompt.spans["IO"] < prompt.spans["S1"] for prompt in prompts)
    assert orders == {True: 100, False: 100}
    for prompt in prompts:
        marked = {label: prompt.text[slice(*span)] for label, span in prompt.spans.items()}
        assert marked["IO"] == prompt.answer and marked["S1"] == marked["S2"] == prompt.foil
        assert len({marked["IO"], marked["S1"], marked["C"]}) == 3
        assert marked["END"] == "to" and prompt.spans["S1"] < prompt.spans["S2"] < prompt.spans["END"]


def test_a_group_has_one_length_and_both_orders():
    prompts = sample_prompts(WORDS, IOI, 200, seed=0)
    for group in {prompt.group for prompt in prompts}:
        members = [prompt for prompt in prompts if prompt.group == group]
        assert len({len(prompt.text.split()) for prompt in members}) == 1
        assert len({prompt.spans["IO"] < prompt.spans["S1"] for prompt in members}) == 2


def test_verb_agrees_with_the_subject_and_not_with_the_attractor():
    prompts = sample_prompts(WORDS, SVA, 400, seed=0)
    assert Counter(prompt.forms["subject"] for prompt in prompts) == {0: 200, 1: 200}
    for prompt in prompts:
        number = prompt.forms["subject"]
        right, wrong = ("verbs_singular", "verbs_plural")[:: 1 - 2 * number]
        assert WORDS[right].index(prompt.answer) == WORDS[wrong].index(prompt.foil)
    agreeing = sum(prompt.forms["attractor"] == prompt.forms["subject"] for prompt in prompts)
    assert 150 < agreeing < 250


def test_repeated_sequence_continues_its_first_copy():
    for prompt in sample_prompts(WORDS, INDUCTION, 100, seed=0):
        words, length = prompt.text.split(), int(prompt.group.split()[1])
        assert len(set(words[:length])) == length and words[length:] == words[: len(words) - length]
        assert prompt.answer == words[len(words) - length] == prompt.text[slice(*prompt.spans["SOURCE"])]
        assert prompt.foil in words[:length] and prompt.foil not in (prompt.answer, words[-1])


def test_token_positions_takes_the_last_token_of_a_word_and_skips_special_tokens():
    prompt = sample_prompts(WORDS, {**SVA, "templates": ["The {subject}"]}, 1, seed=0)[0]
    offsets = [(0, 0), (0, 3), (4, 6), (6, len(prompt.text))]
    assert token_positions(prompt, offsets)["subject"] == 3
    with pytest.raises(ValueError, match="no token covers"):
        token_positions(prompt, offsets[:2])


def test_unknown_words_are_dropped_in_pairs():
    kept = known_words(WORDS, SVA, lambda word: word not in ("cats", "is"))
    assert kept["nouns_singular"] == ["dog", "boy"] and kept["nouns_plural"] == ["dogs", "boys"]
    assert kept["verbs_singular"] == ["runs"] and kept["verbs_plural"] == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anser": "A"}, "unknown keys"),
        ({"answer": "Z"}, "unknown slots"),
        ({"labels": {"S3": "B.3"}}, "no mention"),
        ({"slots": {**IOI["slots"], "place": "cities"}}, "unknown word set"),
        ({"slots": {**IOI["slots"], "place": "nobody"}, "answer": "place"}, "unknown word set"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sample_prompts(WORDS, {**IOI, **change}, 1, seed=0)


def test_a_set_too_small_for_its_slots_is_refused():
    with pytest.raises(ValueError, match="no word"):
        sample_prompts({**WORDS, "names": ["Mary", "John"]}, IOI, 1, seed=0)
    with pytest.raises(ValueError, match="index-aligned"):
        sample_prompts({**WORDS, "nouns_plural": ["cats"]}, SVA, 1, seed=0)
