"""Prompts: orders and forms are balanced, the marked tokens are the right ones, nonsense is refused."""

from collections import Counter

import pytest

from ovqk.tasks.prompts import known_words, sample_prompts, token_positions, variants

WORDS = {
    "names": ["Mary", "John", "Tom", "James", "Anna"],
    "places": ["store", "park"],
    "nouns_singular": ["cat", "dog", "boy"],
    "nouns_plural": ["cats", "dogs", "boys"],
    "verbs_singular": ["is", "runs"],
    "verbs_plural": ["are", "run"],
    "content": ["Paris", "ring", "Texas", "blue", "map", "Ford", "cup"],
    "years": ["02", "07", "32", "33", "99"],
    "offices": ["Police", "Court", "Bank"],
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
YEARS = {
    "templates": ["From the year 17{start} to the year 17"],
    "slots": {"start": "years", "end": {"set": "years", "after": "start"}, "early": {"set": "years", "up_to": "start"}},
    "answer": "end",
    "foil": "early",
}
ACRONYM = {
    "templates": ["The {name} {noun} ({letter}"],
    "slots": {"name": "names", "noun": "offices", "letter": {"initial_of": "name"}, "last": {"initial_of": "noun"}},
    "answer": "last",
    "foil": "letter",
    "labels": {"A1": "letter"},
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


def test_an_ordered_slot_stands_after_its_leader_or_up_to_it():
    seen = set()
    for prompt in sample_prompts(WORDS, YEARS, 400, seed=0):
        start, answer, foil = (WORDS["years"].index(word) for word in (start_of(prompt), prompt.answer, prompt.foil))
        assert answer > start >= foil
        seen.add((start, answer, foil))
    assert {start for start, _, _ in seen} == set(range(4))  # the last year has none after it
    assert {(start, start) for start, _, foil in seen if start == foil} == {(i, i) for i in range(4)}
    assert len(seen) == sum((4 - start) * (start + 1) for start in range(4))


def start_of(prompt) -> str:
    return prompt.text[slice(*prompt.spans["start"])]


def test_a_leader_may_be_listed_after_its_follower_and_stand_in_no_text():
    slots = dict(reversed(YEARS["slots"].items()))
    for prompt in sample_prompts(WORDS, {**YEARS, "slots": slots}, 20, seed=0):
        assert prompt.answer > start_of(prompt) >= prompt.foil
    unsaid = {**YEARS, "templates": ["In the year 17"], "slots": slots}
    assert all(prompt.answer > prompt.foil for prompt in sample_prompts(WORDS, unsaid, 20, seed=0))


def test_a_slot_inside_a_word_is_marked_without_the_rest_of_it():
    prompt = sample_prompts(WORDS, YEARS, 1, seed=0)[0]
    assert prompt.text == f"From the year 17{start_of(prompt)} to the year 17"
    first, last = prompt.spans["start"]
    assert prompt.text[first - 2 : first] == "17" and last - first == 2
    assert prompt.spans["END"] == (len(prompt.text) - 2, len(prompt.text))
    tokens = [(0, 4), (4, 8), (8, 13), (13, 16), (16, 18), (18, 21), (21, 25), (25, 30), (30, 33)]
    places = token_positions(prompt, tokens)
    assert (places["start"], places["END"]) == (4, 8)


def test_a_slot_may_be_the_initial_of_another_slots_word():
    for prompt in sample_prompts(WORDS, ACRONYM, 50, seed=0):
        name, noun = prompt.text.removeprefix("The ").split()[:2]
        assert prompt.text == f"The {name} {noun} ({name[0]}"
        assert (prompt.answer, prompt.foil) == (noun[0], name[0])
        assert prompt.text[slice(*prompt.spans["A1"])] == name[0] and prompt.spans["END"] == prompt.spans["A1"]
    assert prompt.forms == {}


def test_an_answer_that_is_also_the_foil_is_refused():
    words = {**WORDS, "offices": ["Ministry"], "names": ["Mary"]}
    with pytest.raises(ValueError, match="answer and foil are both 'M'"):
        sample_prompts(words, ACRONYM, 1, seed=0)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"set": "years", "afer": "start"}, r"slot 'end': unknown keys \['afer', 'set'\]"),
        ({"forms": ["years"], "after": "start"}, "slot 'end': unknown keys"),
        ({"set": "years", "after": "begin"}, "slot 'end': after 'begin', which is no plain slot of 'years'"),
        ({"set": "names", "after": "start"}, "slot 'end': after 'start', which is no plain slot of 'names'"),
        ({"set": "years", "after": "early"}, "slot 'end': after 'early', which is no plain slot of 'years'"),
        ({"initial_of": "begin"}, "slot 'end': initial_of 'begin', which is no slot with words"),
        ({"initial_of": "end"}, "slot 'end': initial_of 'end', which is no slot with words"),
    ],
)
def test_a_slot_that_follows_nothing_is_refused_by_name(slot, message):
    with pytest.raises(ValueError, match=message):
        sample_prompts(WORDS, {**YEARS, "slots": {**YEARS["slots"], "end": slot}}, 1, seed=0)


def test_an_order_of_too_few_words_is_refused():
    with pytest.raises(ValueError, match="slot 'start': no word of"):
        sample_prompts({**WORDS, "years": ["02"]}, YEARS, 1, seed=0)


def test_unknown_words_leave_ordered_sets_in_order_and_initials_alone():
    kept = known_words(WORDS, YEARS, lambda word: word != "07")
    assert kept["years"] == ["02", "32", "33", "99"]
    assert known_words(WORDS, ACRONYM, lambda word: word != "Mary")["names"] == ["John", "Tom", "James", "Anna"]


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
        ({"slots": ["A", "B"]}, "slots: must be a mapping"),
        ({"slots": {**IOI["slots"], "A": None}}, "slot 'A': must be a mapping"),
        ({"foil": {"form": "B"}}, "unknown slots"),
        ({"counterfactual": "fresh_first_copy"}, "counterfactual: must be a mapping"),
        ({"counterfactual": {"Z": {"draw": "fresh"}}}, "counterfactual: no mention 'Z'"),
        ({"repeated": {"words": "names", "lengths": [4]}}, "unknown keys"),
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
