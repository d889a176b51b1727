"""A choice that holds a secret of the environment is refused: records, logs and W&B would show it."""

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovqk.errors import UserError, secrets, without_secrets

NOT_KEPT = "env_set"
"""Hydra's key for variables that a job's environment gets; no file holds them."""
SHOWN = "records, logs and W&B would show. Allowed: values without it; libraries read the variable themselves."
ASKED = re.compile(r"oc\.env:\s*[\"']?([^\s\"',}:]+)")
"""Matches an interpolation of an environment variable; its group is the variable's name."""


def refuse_secrets(config: DictConfig) -> None:
    """Refuse a choice in which a key or a value contains the value of a secret variable, or asks for the variable.

    What asks for it may show parts of the value, which are not known again: a list of its pieces, for instance.

    Raises:
        UserError: one does; the message names the key and the variable, not the value.
    """
    found = secrets()
    if not found:
        return
    for key, text in _texts(config, ""):
        name = next((name for name, value in found.items() if value in text), None)
        if name is not None:
            raise UserError(
                f"{without_secrets(key)}: it holds the value of the environment variable {name}, a secret, "
                f"which {SHOWN}"
            )
    for key, text in _unresolved(OmegaConf.to_container(config, resolve=False), ""):
        name = next((name for name in ASKED.findall(text) if name in found), None)
        if name is not None:
            raise UserError(
                f"{without_secrets(key)}: it asks for the environment variable {name}, a secret, which {SHOWN}"
            )


def _unresolved(node: Any, at: str) -> Iterator[tuple[str, str]]:
    """Yield each value of a choice as it was written, with its place."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key != NOT_KEPT:
                yield from _unresolved(value, f"{at}.{key}".lstrip("."))
    elif isinstance(node, str):
        yield at, node


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
