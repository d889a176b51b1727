"""A mistaken value, on the command line or in a file, is told by its key and with what is allowed; no more."""

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ovqk.config import check_keys, mistakes, register


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
    ("task.roles.induction.predictions.0.direction=up",
     "task.roles.induction.predictions.0.direction=up: Invalid value 'up', expected one of [high, low]"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_one_line(override, message, tmp_path) -> None:
    assert told(tmp_path, override) == message


@pytest.mark.parametrize(("old", "new", "place", "what"), [
    ("{metric: qk_task_auc, direction: high}", "{metric: qk_task_auc, direction: positive}", "direction",
     "Invalid value 'positive', expected one of [high, low]"),
    ("{metric: qk_task_auc, direction: high}", "{metrc: qk_task_auc}", "metrc",
     "no such key; allowed: metric, direction, first_layer, direct_only, exploratory, partners"),
])  # fmt: skip
def test_a_mistake_in_a_task_file_is_told_with_its_role(old, new, place, what, tmp_path) -> None:
    (tmp_path / "task").mkdir()
    text = (ROOT / "conf" / "task" / "ioi.yaml").read_text().replace(old, new, 1)
    (tmp_path / "task" / "mine.yaml").write_text(text)
    assert told(tmp_path, "task=mine") == f"task/mine.yaml: roles.duplicate_token.predictions.0.{place}: {what}"


def test_what_cannot_be_parsed_is_told_with_its_override(tmp_path) -> None:
    assert told(tmp_path, "results_dir=a=1").startswith("results_dir=a=1: mismatched input '='")
    assert told(tmp_path, "model.path=a b(").startswith("Error parsing override 'model.path=a b('")


def test_what_is_no_mistake_of_a_value_is_told_as_it_is(tmp_path) -> None:
    assert "Could not find 'model/gpt3'" in told(tmp_path, "model=gpt3")


@pytest.mark.parametrize(("argument", "message"), [
    ("cache.dir=x", "cache.dir: no such key; cache is one value and has no keys. Did you mean cache_dir?"),
    ("model.path.x=1", "model.path.x: no such key; model.path is one value and has no keys."),
    ("device.name=cuda", "device.name: no such key; device is one value and has no keys."),
])  # fmt: skip
def test_a_key_below_a_value_is_none(argument, message) -> None:
    with pytest.raises(SystemExit) as found:
        check_keys([argument])
    assert str(found.value) == f"ovqk: {message}"


@pytest.mark.parametrize(
    "argument", ["task.words.names=[a]", "analysis.offsets=[1]", "analysis.offsets.0=1", "task.claims.gpt2.of=x"]
)
def test_keys_below_groups_lists_and_mappings_are_for_the_schema_to_judge(argument) -> None:
    check_keys([argument])
