"""Words become single tokens of the model, or are dropped and counted; never anything else."""

import pytest
import torch
from support.commands import compose
from support.models import BUNDLED, local, shared_model
from tokenizers import Tokenizer, models, pre_tokenizers

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import VariableConfig, VariableKind
from ovqk.errors import UserError
from ovqk.tasks.matches import matched_tokens, surface_form
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import resolve_task


@pytest.fixture(scope="module")
def mini_tokenizer() -> Tokenizer:
    return load_tokenizer(open_checkpoint(local(BUNDLED)))


def test_the_gpt2_vocabulary_and_merges_alone_are_a_tokenizer(gpt2_tokenizer) -> None:
    assert gpt2_tokenizer.encode("Hello world").ids == [15496, 995]


def test_words_take_the_leading_space_where_the_tokenizer_marks_it(gpt2_tokenizer, mini_tokenizer) -> None:
    task = compose("task=ioi").task
    for tokenizer, token in ((gpt2_tokenizer, "ĠMary"), (mini_tokenizer, "Mary")):
        resolved = resolve_task(task, tokenizer, tokenizer.get_vocab_size(), "test")
        words = resolved.variables[0].read[0]
        assert tokenizer.id_to_token(int(words.ids[words.words.index("Mary")])) == token


@pytest.mark.parametrize("task", ["ioi", "sva", "induction"])
def test_every_shipped_word_is_one_token_of_gpt2(gpt2_tokenizer, task) -> None:
    resolved = resolve_task(compose(f"task={task}").task, gpt2_tokenizer, 50257, "gpt2")
    assert not any(resolved.dropped.values())


def test_a_word_of_several_tokens_is_dropped_and_counted_never_cut(gpt2_tokenizer) -> None:
    task = compose("task=ioi").task
    task.words["names"] += ["Zanzibarina", "Mary"]
    resolved = resolve_task(task, gpt2_tokenizer, 50257, "gpt2")
    assert resolved.dropped["names"] == ["Zanzibarina"]
    assert resolved.kept["names"] == len(task.words["names"]) - 2  # a token comes once


def test_contrasts_stay_aligned_when_one_side_is_dropped(gpt2_tokenizer) -> None:
    task = compose("task=sva").task
    task.words["nouns_plural"][3] = "supercalifragilistics"
    resolved = resolve_task(task, gpt2_tokenizer, 50257, "gpt2")
    singular, plural = resolved.variables[0].read
    assert len(singular.ids) == len(plural.ids) == len(task.words["nouns_singular"]) - 1
    assert task.words["nouns_singular"][3] not in singular.words


def test_too_few_words_is_an_error_that_counts_them() -> None:
    tokenizer = load_tokenizer(open_checkpoint(local(shared_model("stories260k"))))
    with pytest.raises(
        UserError, match=r"task=ioi: only \d of the \d+ words of 'names' are one token in x; at least 8"
    ):
        resolve_task(compose("task=ioi").task, tokenizer, 512, "x")


def test_no_tokenizer_is_an_error_only_where_words_are_read() -> None:
    with pytest.raises(UserError, match="no tokenizer files"):
        resolve_task(compose("task=ioi").task, None, 100, "x")
    assert resolve_task(compose("task=none").task, None, 100, "x").variables == []


def test_every_dropped_word_has_its_own_reason(gpt2_tokenizer) -> None:
    task = compose("task=sva").task
    task.words["nouns_plural"][3] = "supercalifragilistics"
    task.words["nouns_singular"][5] = task.words["nouns_singular"][0]
    reasons = resolve_task(task, gpt2_tokenizer, 50257, "gpt2").reasons
    singular, plural = task.words["nouns_singular"], task.words["nouns_plural"]
    assert reasons["nouns_plural"] == {
        "supercalifragilistics": "not one token here",
        plural[5]: "in a pair with a word that is the same token as another",
    }
    assert reasons["nouns_singular"] == {singular[3]: "in a pair with a word that is not one token here"}


def test_too_few_words_of_which_none_is_dropped_are_too_few(mini_tokenizer) -> None:
    with pytest.raises(UserError, match=r"only 1 of the 1 words of 'names' .* at least 8 are needed\.$"):
        resolve_task(compose("task=ioi", "task.words.names=[Mary]").task, mini_tokenizer, 400, "x")


def test_a_second_variable_is_refused_and_not_passed_over(mini_tokenizer) -> None:
    task = compose("task=ioi").task
    task.variables["place"] = VariableConfig(VariableKind.set, words="places")
    with pytest.raises(UserError, match=r"task\.variables: name, place: a task has one causal variable"):
        resolve_task(task, mini_tokenizer, 400, "x")


def test_a_word_on_both_sides_of_a_contrast_is_refused(mini_tokenizer) -> None:
    task = compose("task=sva").task
    task.words["nouns_plural"][3] = task.words["nouns_singular"][4]
    with pytest.raises(
        UserError, match=rf"task\.variables\.number: '{task.words['nouns_singular'][4]}': a word of both"
    ):
        resolve_task(task, mini_tokenizer, 400, "x")
    task = compose("task=sva", "task.variables.number.write=[verbs_plural,verbs_plural]").task
    with pytest.raises(UserError, match="a word of both 'verbs_plural' and 'verbs_plural' is no contrast"):
        resolve_task(task, mini_tokenizer, 400, "x")


def test_sets_of_unequal_length_are_refused_with_their_lengths(mini_tokenizer) -> None:
    task = compose("task=sva").task
    n = len(task.words["nouns_plural"])
    task.words["nouns_plural"].pop()
    with pytest.raises(UserError, match=f"'nouns_singular' of {n} words and 'nouns_plural' of {n - 1} words"):
        resolve_task(task, mini_tokenizer, 400, "x")


def test_a_variable_names_word_sets_that_exist(mini_tokenizer) -> None:
    task = compose("task=ioi").task
    task.variables["name"].words = "nmaes"
    with pytest.raises(UserError, match=r"task\.variables\.name.*'nmaes'.*allowed: names"):
        resolve_task(task, mini_tokenizer, 400, "x")
    task = compose("task=sva").task
    task.variables["number"] = VariableConfig(VariableKind.contrast, read=["nouns_singular"], write=["verbs_singular"])
    with pytest.raises(UserError, match="needs 2 word set"):
        resolve_task(task, mini_tokenizer, 400, "x")


@pytest.mark.parametrize(("task", "key", "word"), [("greater_than", "years", "32"), ("acronym", "letters", "Q")])
def test_a_continuation_is_looked_up_without_a_space_and_never_with_one(gpt2_tokenizer, task, key, word) -> None:
    config = compose(f"task={task}").task
    assert config.continuations == [key]
    variable = resolve_task(config, gpt2_tokenizer, 50257, "gpt2").variables[0]
    tokens = [gpt2_tokenizer.id_to_token(i) for i in variable.read[0].ids.tolist()]
    assert tokens == config.words[key] and word in tokens
    assert gpt2_tokenizer.token_to_id(f"Ġ{word}") is not None  # so that the other form could have been taken
    assert {surface_form(gpt2_tokenizer.id_to_token(i))[0] for i in variable.band.tolist()} == {False}
    config.continuations = []
    spaced = resolve_task(config, gpt2_tokenizer, 50257, "gpt2").variables[0]
    assert [gpt2_tokenizer.id_to_token(i) for i in spaced.read[0].ids.tolist()] == [f"Ġ{w}" for w in config.words[key]]
    assert {surface_form(gpt2_tokenizer.id_to_token(i))[0] for i in spaced.band.tolist()} == {True}


def test_a_continuation_that_is_one_token_only_after_a_space_is_dropped(gpt2_tokenizer) -> None:
    task = compose("task=acronym").task
    task.words["letters"] += ["Quarter", "Good"]
    assert [len(gpt2_tokenizer.encode(text).ids) for text in (" Quarter", "Quarter", "Good")] == [1, 2, 1]
    assert resolve_task(task, gpt2_tokenizer, 50257, "gpt2").dropped == {"letters": ["Quarter"]}


def test_a_tokenizer_that_puts_a_space_before_every_text_has_continuations_too() -> None:
    tokenizer = load_tokenizer(open_checkpoint(local(shared_model("stories260k"))))
    assert tokenizer.encode("A", add_special_tokens=False).tokens[0].startswith("▁")
    variable = resolve_task(compose("task=acronym").task, tokenizer, tokenizer.get_vocab_size(), "x").variables[0]
    words = variable.read[0]
    assert len(words.words) >= 20
    assert [tokenizer.id_to_token(i) for i in words.ids.tolist()] == words.words


def test_a_continuation_of_words_without_spaces_is_the_word(mini_tokenizer) -> None:
    task = compose("task=ioi").task
    plain = resolve_task(task, mini_tokenizer, mini_tokenizer.get_vocab_size(), "x").variables[0].read[0]
    task.continuations = ["names"]
    continued = resolve_task(task, mini_tokenizer, mini_tokenizer.get_vocab_size(), "x").variables[0].read[0]
    assert continued.ids.tolist() == plain.ids.tolist()


def test_continuations_name_word_sets_that_exist(gpt2_tokenizer) -> None:
    task = compose("task=greater_than", "task.continuations=[yaers]").task
    for tokenizer in (gpt2_tokenizer, None):
        with pytest.raises(UserError, match=r"task\.continuations: .*'yaers'.*allowed: years, events"):
            resolve_task(task, tokenizer, 50257, "gpt2")


def test_surface_forms() -> None:
    assert surface_form("ĠMary") == (True, "title", True, 1)
    assert surface_form("the") == (False, "lower", True, 1)
    assert surface_form("▁USA") == (True, "upper", True, 1)
    assert surface_form("Ġ42") == (True, "lower", False, 0)


def test_the_band_is_matched_in_form_and_rank_and_holds_no_task_word(mini_tokenizer) -> None:
    resolved = resolve_task(compose("task=ioi").task, mini_tokenizer, mini_tokenizer.get_vocab_size(), "x")
    variable = resolved.variables[0]
    assert resolved.notes == []
    assert not set(variable.band.tolist()) & set(variable.read[0].ids.tolist())
    forms = {surface_form(mini_tokenizer.id_to_token(i)) for i in variable.read[0].ids.tolist()}
    assert {surface_form(mini_tokenizer.id_to_token(i)) for i in variable.band.tolist()} <= forms
    assert len(variable.band) >= 32


def test_a_band_that_must_be_relaxed_says_so() -> None:
    words = [f"Name{chr(97 + i)}" for i in range(8)] + [f"thing{chr(97 + i)}" for i in range(12)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="thinga"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = torch.arange(8)
    matches, note = matched_tokens(ids, ids, tokenizer, 20)
    assert {token for found in matches.values() for token in found} == set(range(8, 20))
    assert set(matches) == set(range(8)) and "all other tokens" in note


def test_a_damaged_tokenizer_is_one_message(tmp_path) -> None:
    import shutil

    shutil.copytree(BUNDLED, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer files cannot be read"):
        load_tokenizer(open_checkpoint(local(tmp_path / "m")))
