"""A cell's choice from code: the same names and values as on the command line."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ovqk.config.command_line import composable
from ovqk.config.hydra_errors import mistakes
from ovqk.config.place import CONF
from ovqk.config.resolve import resolve, user_path
from ovqk.config.schema import Config, register
from ovqk.config.sources import refuse_unread
from ovqk.errors import CONTROL, UserError


def chosen(model: str | Path, *choices: str) -> Config:
    """Return the resolved cell without a task for a model as `open` takes it.

    Raises:
        UserError: a choice is not allowed.
    """
    if not isinstance(model, str | Path):
        raise UserError(f"model={model!r}: must be a text or a path.")
    if wrong := [choice for choice in choices if not isinstance(choice, str)]:
        raise UserError(f"{wrong[0]!r}: a choice is a text, as 'processing=raw'.")
    return composed([*model_choice(model), "task=none", "tracking=none", *choices])


def composed(overrides: Sequence[str]) -> Config:
    """Return the resolved cell that these choices compose, as on the command line.

    Raises:
        UserError: a choice is not allowed.
    """
    register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = resolve(compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError("\n".join(mistakes(error, [CONF]))) from error
    refuse_unread(overrides, config.model)
    return config


def model_choice(model: str | Path) -> list[str]:
    """Return the choices that name a model: one in conf/model, a path, or a repository on the hub.

    Raises:
        UserError: the name is none of these.
    """
    name = str(model)
    if CONTROL.search(name):
        raise UserError(f"model={name!r}: it holds control characters; allowed: a name or a path without them.")
    if max(len(part.encode()) for part in name.split("/")) > LONGEST_NAME - len(".yaml"):
        raise UserError(f"model={name[:40]}...: no file has so long a name; allowed: up to {LONGEST_NAME} bytes.")
    if isinstance(model, str) and (CONF / "model" / f"{name}.yaml").is_file():
        return [f"model={name}"]
    path = user_path("model.path", name)
    if isinstance(model, Path) or path.exists() or name.startswith((".", "/", "~")) or path.suffix in WEIGHTS:
        return ["model=local", composable("model.path", name)]
    return ["model=hub", composable("model.repo", name)] if name.count("/") == 1 else [composable("model", name)]


WEIGHTS = (".gguf", ".safetensors")
"""File endings that hold a model."""
LONGEST_NAME = 255
"""The largest length of a file's name, in bytes."""
