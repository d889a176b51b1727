"""A mistaken value, on the command line or in a file, is told by its key and with what is allowed; no more."""

import re
import shlex
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from support import ROOT

from ovqk.config.command_line import program, tool
from ovqk.config.hydra_errors import NEAREST, check_keys, close_names, mistakes
from ovqk.config.schema import register
from ovqk.errors import UserError


def told(folder, *overrides: str) -> str:
    """What a choice that cannot be composed is told, with the task files of `folder` beside those of conf/."""
    register()
    search = f"hydra.searchpath=[file://{folder}]"
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        pytest.raises((HydraException, OmegaConfBaseException)) as found,
    ):
        compose("config", overrides=[search, *overrides])
    return "\n".join(mistakes(found.value, [folder, ROOT / "conf"]))


@pytest.mark.parametrize(("override", "message"), [
    ("nulls.draws=abc", "nulls.draws=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    ("processing=half", "processing=half: Invalid value 'half', expected one of [folded, raw]"),
    ("processing=fold", "processing=fold: Invalid value 'fold', expected one of [folded, raw]. Did you mean folded?"),
    ("task.roles.induction.predictions.0.direction=up",
     "task.roles.induction.predictions.0.direction=up: Invalid value 'up', expected one of [high, low]"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_one_line(override, message, tmp_path) -> None:
    assert told(tmp_path, override) == message


@pytest.mark.parametrize(("old", "new", "place", "what"), [
    ("{metric: qk_task_auc, direction: high}", "{metric: qk_task_auc, direction: positive}", "direction",
     "Invalid value 'positive', expected one of [high, low]"),
    ("{metric: qk_task_auc, direction: high}", "{metrc: qk_task_auc}", "metrc",
     "no such key; allowed: metric, direction, first_layer, direct_only, exploratory, ranks, partners"),
])  # fmt: skip
def test_a_mistake_in_a_task_file_is_told_with_its_role(old, new, place, what, tmp_path) -> None:
    (tmp_path / "task").mkdir()
    text = (ROOT / "conf" / "task" / "ioi.yaml").read_text().replace(old, new, 1)
    (tmp_path / "task" / "mine.yaml").write_text(text)
    assert told(tmp_path, "task=mine") == f"task/mine.yaml: roles.duplicate_token.predictions.0.{place}: {what}"


def test_a_list_of_values_without_m_is_told_what_it_needs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "task=ioi,sva"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    said = f"task=ioi,sva: several values need -m, which computes a cell for each: {program()} -m task=ioi,sva"
    assert told(tmp_path, "task=ioi,sva") == said


@pytest.mark.parametrize("value", ["a=1", "a b(", "~/models/x", "/tmp/a(b)", "[1", 'a\\b"c('])
def test_what_cannot_be_parsed_is_told_how_to_quote_it_and_that_helps(value, tmp_path) -> None:
    said = told(tmp_path, f"model.path={value}")
    assert said.startswith(f"model.path={value}: the value has signs with a meaning of their own. Quote it: ")
    (quoted,) = shlex.split(said.rpartition("Quote it: ")[2])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", overrides=["model=local", quoted]).model.path == value


def test_a_word_without_a_value_is_told_what_a_choice_is(tmp_path) -> None:
    assert told(tmp_path, "b").startswith("b: no choice, which is KEY=VALUE. A value with a space in it is quoted")
    assert "KEY=VALUE. Did you mean " in (said := told(tmp_path, "repot")) and "report? A value with" in said


PUBLISHED = f" Did you mean the command {tool('published')}? "


@pytest.mark.parametrize(
    "argument", [f"experiment={word}" for word in ("published", "publish", "papers")] + ["papers=x"]
)
def test_a_key_that_asks_for_what_a_command_does_is_told_the_command(argument) -> None:
    with pytest.raises(UserError, match=rf"no such key\.{re.escape(PUBLISHED)}Allowed"):
        check_keys([argument])


@pytest.mark.parametrize("argument", ["publisehd", "papers", "analysis=published", "task=publish", "model=papers"])
def test_a_word_or_a_choice_that_asks_for_what_a_command_does_is_told_the_command(argument, tmp_path) -> None:
    assert PUBLISHED in told(tmp_path, argument)


@pytest.mark.parametrize(("argument", "said"), [("tracking.moed=none", "tracking.mode"), ("taks=published", "task")])
def test_a_key_that_is_spelled_like_another_is_told_that_one(argument, said) -> None:
    with pytest.raises(UserError, match=rf"Did you mean {re.escape(said)}\? Allowed"):
        check_keys([argument])


def test_a_group_of_keys_that_is_given_a_value_is_told_its_keys(tmp_path) -> None:
    keys = "nulls.draws, nulls.resamples, nulls.subsamples"
    assert told(tmp_path, "nulls=0") == f"nulls=0: it has no value of its own, but keys; allowed: {keys}"


@pytest.mark.parametrize(("override", "message"), [
    ("task=ioii", "task=ioii: there is no such task. Did you mean ioi? Allowed: acronym, comparative, "
     "copy_suppression, country_capital, country_language, first_letter, greater_than, induction, ioi, "
     "modular_addition, name_copying, none, past_tense, pronoun, succession, sva, year_following."),
    ("analysis=b3", "analysis=b3: there is no such analysis. Did you mean b03? Allowed: activations, b03, composition, "
     "full, ov, qk."),
    ("tracking=on", "tracking=on: there is no such tracking. Did you mean online? Allowed: none, offline, online."),
    ("model=gtp2", "model=gtp2: there is no such model. Did you mean gpt2? A checkpoint of your own is model=local "),
    ("model=gpt2-small", "model=gpt2-small: there is no such model. Did you mean gpt2? "),
    ("model=gpt2-smal", "model=gpt2-smal: there is no such model. Did you mean gpt2? "),
    ("model=gpt3", "model=gpt3: there is no such model. Did you mean gpt2? "),
    ("model=LLAMA-3.2", "model=LLAMA-3.2: there is no such model. Did you mean llama-3.2-"),
    ("model=gpt2_medium", "model=gpt2_medium: there is no such model. Did you mean gpt2-medium? "),
    ("model=meta-llama/Llama-3.2-1B", "model=meta-llama/Llama-3.2-1B: there is no such model. Did you mean "
     "llama-3.2-1b"),
    ("model=zzz", "model=zzz: there is no such model. A checkpoint of your own is model=local model.path=PATH; one on "
     "the hub is model=hub model.repo=OWNER/NAME. `"),
    ("model=/some/path", "model=/some/path: there is no such model. A path is model=local model.path=/some/path. `"),
    ("model=x.gguf", "model=x.gguf: there is no such model. A path is model=local model.path=x.gguf. `"),
    ("model=zz/zz", "model=zz/zz: there is no such model. A repository on the hub is model=hub model.repo=zz/zz. `"),
])  # fmt: skip
def test_an_unknown_choice_is_told_with_the_nearest_names(override, message, tmp_path) -> None:
    said = told(tmp_path, override)
    assert said.startswith(message) and "\n" not in said


@pytest.mark.slow
def test_every_name_that_transformer_lens_gives_a_model_leads_to_its_weights(tmp_path) -> None:
    """Its short names of a repository that conf/model has lead there; the others to the repository on the hub."""
    from transformer_lens.supported_models import MODEL_ALIASES

    here = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "model").glob("*.yaml")}
    of_repo = {str(model.get("repo")).lower(): name for name, model in here.items()}
    of_repo |= {"gpt2": "gpt2", "distilgpt2": "distilgpt2"}  # without their owner
    known = 0
    for repo, names in MODEL_ALIASES.items():
        for name in names:
            if name in here or "/" in name:
                continue
            (said,) = mistakes(unknown_model(name), [ROOT / "conf"])
            if repo.lower() in of_repo:
                known += 1
                meant = f" Did you mean {of_repo[repo.lower()]}? TransformerLens calls it {name}."
            elif "/" in repo:
                meant = f" TransformerLens's {name} is model=hub model.repo={repo}."
            else:  # weights that were never on the hub
                meant = ""
            assert said.startswith(f"model={name}: there is no such model.{meant}"), said
    assert known >= 25


def unknown_model(name: str) -> HydraException:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(HydraException) as found:
        compose("config", overrides=[f"model={name}"])
    return found.value


def test_the_beginning_of_a_name_is_told_with_those_that_begin_so(tmp_path) -> None:
    names = [path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")]
    near = close_names("qwen", names)
    assert len(near) == NEAREST and all(name.startswith("qwen") for name in near)
    assert close_names("qwen3-4b", names)[0] == "qwen3-4b-base"
    assert close_names("", names) == []


def test_an_unknown_choice_in_a_file_is_told_with_the_file(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults:\n  - config\n  - override task: iio\n  - _self_\n")
    register()
    with initialize_config_dir(str(tmp_path), version_base="1.3"), pytest.raises(HydraException) as found:
        compose("mine", overrides=[f"hydra.searchpath=[file://{ROOT / 'conf'}]"])
    assert mistakes(found.value, [tmp_path, ROOT / "conf"])[0].startswith(("task=iio:", "mine.yaml: task=iio:"))


def test_an_unknown_config_is_told_with_those_of_the_folder_given(tmp_path) -> None:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(HydraException) as found:
        compose("cros_model")
    assert mistakes(found.value, [ROOT / "sweeps", ROOT / "conf"]) == [
        "-cn cros_model: there is no cros_model.yaml in conf/ or in a folder named by -cd. Did you mean "
        "cross_model? Allowed: behaviour, cross_model, gpt2_family, scale, sensitivity, smoke, training, wandb_grid."
    ]


def test_an_unknown_launcher_is_told_with_those_that_are_installed(tmp_path) -> None:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(HydraException) as found:
        compose("config", overrides=["hydra/launcher=slrum"], return_hydra_config=True)
    (said,) = mistakes(found.value, [ROOT / "conf"])
    assert said.startswith("hydra/launcher=slrum: there is no such launcher. Allowed: basic, cluster, ")


def test_a_group_that_is_not_there_is_no_key() -> None:
    check_keys(["hydra/launcher=laptop", "+hydra/launcher=laptop", "model.path=a/b"])
    with pytest.raises(UserError, match="foo/bar: no such key"):
        check_keys(["+foo/bar=1"])


@pytest.mark.parametrize(("argument", "message"), [
    ("cache.dir=x", "cache.dir: no such key; cache is one value and has no keys. Did you mean cache_dir?"),
    ("model.path.x=1", "model.path.x: no such key; model.path is one value and has no keys."),
    ("device.name=cuda", "device.name: no such key; device is one value and has no keys."),
])  # fmt: skip
def test_a_key_below_a_value_is_none(argument, message) -> None:
    with pytest.raises(UserError) as found:
        check_keys([argument])
    assert str(found.value) == message


@pytest.mark.parametrize(
    "argument", ["task.words.names=[a]", "analysis.offsets=[1]", "analysis.offsets.0=1", "task.claims.gpt2.of=x"]
)
def test_keys_below_groups_lists_and_mappings_are_for_the_schema_to_judge(argument) -> None:
    check_keys([argument])
