"""Counterfactual prompts: the same words at the same places, without the computation."""

import pytest
from support.commands import compose

from ovqk.config.schema import TaskConfig
from ovqk.tasks.prompts import sample_prompts

TASKS = ("ioi", "sva", "induction", "greater_than", "copy_suppression", "acronym")


def task(name: str) -> TaskConfig:
    return compose(f"task={name}").task


@pytest.mark.parametrize("name", TASKS)
def test_only_the_words_named_differ_and_stand_at_the_same_places(name) -> None:
    config = task(name)
    for prompt in sample_prompts(config.words, config.prompts, 60, seed=1):
        other = prompt.counterfactual
        assert other is not None and other.answer == prompt.answer and other.foil == prompt.foil
        assert (other.cluster, other.template, set(other.spans)) == (prompt.cluster, prompt.template, set(prompt.spans))
        one, two = prompt.text.split(" "), other.text.split(" ")
        assert len(one) == len(two)
        differing = sum(a != b for a, b in zip(one, two, strict=True))
        assert differing == (prompt.text.split().index(prompt.text.split()[0], 1) if name == "induction" else 1)


def test_no_name_is_twice_in_the_counterfactual_of_ioi() -> None:
    config = task("ioi")
    for prompt in sample_prompts(config.words, config.prompts, 60, seed=0):
        words = [word.strip(".,") for word in prompt.counterfactual.text.split()]
        names = [word for word in words if word in config.words["names"]]
        assert len(names) == len(set(names)) == 4


def test_the_subject_has_the_other_number() -> None:
    config = task("sva")
    singular, plural = config.words["nouns_singular"], config.words["nouns_plural"]
    for prompt in sample_prompts(config.words, config.prompts, 40, seed=0):
        subject, other = (p.text[slice(*p.spans["SUBJECT"])] for p in (prompt, prompt.counterfactual))
        assert (subject in singular) != (other in singular)
        assert {subject, other} <= {*singular, *plural}
        assert len({subject, other} & set(singular)) == 1


def test_nothing_of_the_second_copy_occurred_before() -> None:
    config = task("induction")
    for prompt in sample_prompts(config.words, config.prompts, 40, seed=0):
        words = prompt.counterfactual.text.split(" ")
        assert len(words) == len(set(words))


def test_a_counterfactual_changes_no_other_draw() -> None:
    config = task("ioi")
    without = {key: value for key, value in config.prompts.items() if key != "counterfactual"}
    texts = [[p.text for p in sample_prompts(config.words, prompts, 30, 2)] for prompts in (config.prompts, without)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("counterfactual", "message"),
    [
        ({"D": {"draw": "fresh"}}, "no mention 'D'"),
        ({"B.2": {"draw": "other"}}, "allowed"),
        ({"B.2": {"form": "other"}}, "one form"),
        ("fresh_first_copy", "must be a mapping"),
    ],
)
def test_what_cannot_be_replaced_is_refused(counterfactual, message) -> None:
    config = task("ioi")
    with pytest.raises(ValueError, match=message):
        sample_prompts(config.words, {**config.prompts, "counterfactual": counterfactual}, 4, 0)


def test_clusters_are_templates_orders_and_named_words() -> None:
    config = task("ioi")
    prompts = sample_prompts(config.words, config.prompts, 400, 0)
    assert len({prompt.cluster for prompt in prompts}) == 2 * len(config.prompts["templates"])
    greater = task("greater_than")
    prompts = sample_prompts(greater.words, greater.prompts, 400, 0)
    assert {prompt.cluster for prompt in prompts} <= set(greater.words["events"])
    with pytest.raises(ValueError, match="clusters: no slot 'place2'"):
        sample_prompts(config.words, {**config.prompts, "clusters": ["place2"]}, 4, 0)
