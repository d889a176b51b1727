"""A choice that holds a secret of the environment is refused: records, logs and W&B would show it."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from ovqk.errors import UserError, secrets, without_secrets

NOT_KEPT = "env_set"
"""Hydra's key for variables that a job's environment gets; no file holds them."""


def refuse_secrets(config: DictConfig) -> None:
    """Refuse a choice in which a key or a value, after interpolation, contains the value of a secret variable.

    Raises:
        UserError: one does; the message names the key and the variable, not the value.
    """
    found = secrets()
    for key, text in _texts(config, "") if found else ():
        name = next((name for name, value in found.items() if value in text), None)
        if name is not None:
            raise UserError(
                f"{without_secrets(key)}: it holds the value of the environment variable {name}, a secret, which "
                "records, logs and W&B would show. Allowed: values without it; libraries read the variable themselves."
            )


def _texts(node: Any, at: str) -> Iterator[tuple[str, str]]:
    """Yield each key and each value of a choice as a text, with the key's place; values that cannot be had are left."""
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node) if isinstance(node, DictConfig) else None
    if keys is None:
        yield at, str(node)
        return
    for key in keys:
        place = f"{at}.{key}".lstrip(".")
        yield place, str(key)
        try:
            value = None if key == NOT_KEPT else node[key]
        except OmegaConfBaseException:  # it is not set, or Hydra sets it later
            continue
        yield from _texts(value, place)
