"""A cell's own config file, which is computed again and may be someone else's: it holds a choice, and names no code."""

import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from ovqk.config.expansion import refuse_expanding
from ovqk.config.schema import Config, TrackingMode
from ovqk.errors import UserError, first_line

CELL = "cell"
"""The config's name."""
HELD = {"defaults", *(field.name for field in fields(Config))}
SHADOWING = ("schema.yaml", "settings.yaml", "tracking", "hydra")
"""Names in a folder of configs that Hydra would read in place of ovqk's schema and settings and of its own."""


def refuse_foreign_files(arguments: list[str]) -> None:
    """Refuse a folder of config files that expand without bounds, and a cell's file that holds more than its choice.

    Hydra would make the objects that `hydra.callbacks` and other keys of its own name, and run whatever code that is.

    Raises:
        UserError: it does.
    """
    from hydra._internal.utils import get_args_parser

    asked = get_args_parser().parse_known_args(arguments)[0]
    folders = [*_folders(asked.config_dir), *_folders(asked.config_path)]
    for folder in [*folders, *_searched(arguments)]:
        refuse_expanding(folder)
    name = str(asked.config_name or "").removesuffix(".yaml")
    for path in {folder / f"{name}.yaml": None for folder in folders}:
        if path.stem == CELL and path.exists():
            _refuse_foreign(path)
            _refuse_shadowing(folders)


def _folders(asked: str | None) -> list[Path]:
    """Return the folders that -cd or -cp may mean: from here, and from where run.py is."""
    return [] if not asked else [Path(asked), Path(sys.argv[0]).parent / asked]


def _searched(arguments: list[str]) -> list[Path]:
    """Return the folders that the command line adds to Hydra's search path."""
    added = [argument for argument in arguments if argument.lstrip("+").startswith("hydra.searchpath")]
    return [Path(found) for argument in added for found in re.findall(r"file://([^],'\"\s]+)", argument)]


def _refuse_foreign(path: Path) -> None:
    """Refuse a cell's file that holds more than its choice, or that cannot be read as Hydra will read it."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a cell's choice: it cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a cell's choice: it holds no keys.")
    for key in content:
        if key not in HELD:
            raise UserError(f"{path}: a cell's choice has no key {key!r}. {_remedy(path)}")
    tracking = [{"tracking": mode.value} for mode in TrackingMode]
    defaults = content.get("defaults") or []
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry not in ("schema", "settings", "_self_", *tracking):
            raise UserError(f"{path}: defaults: a cell's choice does not extend {entry!r}. {_remedy(path)}")
    try:
        place = _target(content, "")
    except RecursionError:
        raise UserError(f"{path}: not a cell's choice: a part of it contains itself.") from None
    if place is not None:
        raise UserError(f"{path}: {place} names code to run. {_remedy(path)}")


def _refuse_shadowing(folders: list[Path]) -> None:
    """Refuse files beside a cell's own by which it would extend something else: they may name code."""
    for path in (folder / name for folder in folders for name in SHADOWING):
        if os.path.lexists(path):
            raise UserError(
                f"{path}: Hydra would read it in place of a part of ovqk. Allowed with a cell's choice: a folder "
                f"without {', '.join(SHADOWING)}; give one that holds {CELL}.yaml alone."
            )


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
