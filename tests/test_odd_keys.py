"""Every key of a checkpoint's config.json with values that it cannot have: a message, or a model; never a traceback."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import compose
from support.models import local

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import Config
from ovqk.errors import UserError
from ovqk.structure.model import Model
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel

ODD = [{"a": 1}, [1], "x", -1, float("inf"), 10**30, True]
NOT_READ = ("architectures", "dtype", "transformers_version")


def keys(config: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a config, those of its groups among them."""
    for key, value in config.items():
        if key not in NOT_READ:
            yield (*at, key)
            yield from keys(value, (*at, key)) if isinstance(value, dict) else ()


def read(directory: Path, cell: Config) -> None:
    """Read whatever of a checkpoint depends on its config.json."""
    model = local(directory)
    source = open_weights(open_checkpoint(model, 60.0, tensors_read), model)
    source.layer(0)
    opened = Model.read(OpenedModel(source, "m", None), replace(cell, model=model))
    assert isinstance(opened.unavailable, dict)


@pytest.mark.parametrize("odd", [{"a": 1}, [1], 3])
def test_an_activation_that_is_no_text_is_one_message(tmp_path, tiny_gpt2, odd) -> None:
    directory = Path(shutil.copytree(tiny_gpt2, tmp_path / "m"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"activation_function": odd}))
    with pytest.raises(UserError, match=r"config\.json must give 'activation_function' as a text, not"):
        read(directory, compose("task=none", "analysis=qk", "tracking=none"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_no_value_of_a_key_is_a_traceback(tmp_path, tiny, kind) -> None:
    directory = Path(shutil.copytree(tiny(kind), tmp_path / "m"))
    config, cell = (directory / "config.json").read_text(), compose("task=none", "analysis=qk", "tracking=none")
    tried = 0
    for key in keys(json.loads(config)):
        for odd in ODD:
            changed = json.loads(config)
            place = changed
            for part in key[:-1]:
                place = place[part]
            place[key[-1]] = odd
            (directory / "config.json").write_text(json.dumps(changed))
            with suppress(UserError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of transformers, which reads the config too
                read(directory, cell)
            tried += 1
    assert tried > 100
