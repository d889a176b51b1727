"""YAML files that are small and stand for much: aliases of aliases, and nesting without end."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from ovqk.errors import UserError

MOST_VALUES = 200_000
"""Values of one file, each alias counted as what it stands for; the largest file in conf/ has some thousands."""
DEEPEST = 50
"""Levels of one file."""
LARGEST = 2**23
"""Bytes of one file."""


def refuse_expanding(folder: Path) -> None:
    """Refuse a folder of config files if one of them stands for more values than memory should hold.

    Raises:
        UserError: one does; the message names it.
    """
    for path in sorted(folder.rglob("*.yaml")):
        if not path.is_file():
            continue
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: it is larger than {LARGEST} bytes, which no config file is.")
        try:
            _check(path, yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):  # Hydra tells, if it is one that it reads
            continue


def _check(path: Path, events: Iterable[yaml.Event]) -> None:
    """Count a file's values without making them.

    Raises:
        UserError: they are too many, or nested too deeply.
    """
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # each collection's anchor, and the values before it
    count = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if count > MOST_VALUES:
            raise UserError(f"{path}: its aliases make more than {MOST_VALUES} values of it, which no config file has.")
        if len(opened) > DEEPEST:
            raise UserError(f"{path}: it is nested more than {DEEPEST} levels deep, which no config file is.")
