"""A cell's own config file, which is computed again and may be someone else's: it holds a choice, and names no code."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ovqk.config.expansion import refuse_expanding
from ovqk.config.schema import Config, TrackingMode
from ovqk.errors import UserError

CELL = "cell"
"""The config's name."""
HELD = {"defaults", *(field.name for field in fields(Config))}


def refuse_foreign_files(arguments: list[str]) -> None:
    """Refuse a folder of config files that expand without bounds, and a cell's file that holds more than its choice.

    Hydra would make the objects that `hydra.callbacks` and other keys of its own name, and run whatever code that is.

    Raises:
        UserError: it does.
    """
    from hydra._internal.utils import get_args_parser

    asked = get_args_parser().parse_known_args(arguments)[0]
    if asked.config_dir is not None:
        refuse_expanding(Path(asked.config_dir))
    if asked.config_dir is None or Path(asked.config_name or "").stem != CELL:
        return
    path = Path(asked.config_dir) / f"{CELL}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # which Hydra tells
        return
    if not isinstance(content, dict):
        raise UserError(f"{path}: no cell's choice; it holds no keys.")
    for key in content:
        if key not in HELD:
            raise UserError(f"{path}: the key {key!r} is not one of a cell's choice. {_remedy(path)}")
    tracking = [{"tracking": mode.value} for mode in TrackingMode]
    for entry in content.get("defaults") or ():
        if entry not in ("schema", "settings", "_self_", *tracking):
            raise UserError(f"{path}: defaults: {entry!r} is not what a cell's choice extends. {_remedy(path)}")
    place = _target(content, "")
    if place is not None:
        raise UserError(f"{path}: {place} names code to run. {_remedy(path)}")


def _remedy(path: Path) -> str:
    return (
        f"ovqk has not written this file so; if it is your own and you trust it, give it another name than {path.name}."
    )


def _target(content: Any, at: str) -> str | None:
    """Return the place of a `_target_`, by which Hydra knows code, if there is one."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in pairs:
        place = f"{at}.{key}".lstrip(".")
        found = place if key == "_target_" else _target(inner, place)
        if found is not None:
            return found
    return None
