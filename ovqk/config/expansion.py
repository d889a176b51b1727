"""YAML files that are small and stand for much: aliases of aliases, and nesting without end."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from ovqk.errors import UserError

MOST_VALUES = 200_000
"""Values of one file, each alias counted as what it stands for; the largest file in conf/ has some thousands."""
DEEPEST = 50
"""Levels of one file."""
LARGEST = 2**23
"""Bytes of one file."""
MOST_FILES, MOST_FOLDERS = 10_000, 10_000
"""Of one place given by -cd, -cp or hydra.searchpath."""


def refuse_expanding(folder: Path) -> None:
    """Refuse a config folder if one file in it stands for more values than memory should hold.

    Raises:
        UserError: one does; the message names it.
    """
    for number, path in enumerate(_config_files(folder)):
        if number == MOST_FILES:
            raise UserError(
                f"{folder}: it holds more than {MOST_FILES} config files; give a folder that holds only yours."
            )
        try:
            if not path.is_file():
                continue
            if path.stat().st_size > LARGEST:
                raise UserError(f"{path}: it is larger than {LARGEST} bytes; allowed: up to that.")
            _check(path, yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):  # Hydra tells, if it is one that it reads
            continue


def _config_files(folder: Path) -> Iterator[Path]:
    """Yield the config files below a folder, through links too, each folder once."""
    seen: set[str] = set()
    walked = 0
    for place, inside, files in os.walk(folder, followlinks=True):
        real, walked = os.path.realpath(place), walked + 1
        if real in seen:
            inside.clear()
            continue
        if walked > MOST_FOLDERS:
            raise UserError(
                f"{folder}: it holds more than {MOST_FOLDERS} folders; give a folder that holds only your configs."
            )
        seen.add(real)
        inside.sort()
        yield from (Path(place) / name for name in sorted(files) if name.endswith((".yaml", ".yml")))


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
            if any(anchor == event.anchor for anchor, _ in opened):
                raise UserError(f"{path}: its alias *{event.anchor} stands for a part that contains it.")
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
            raise UserError(f"{path}: its aliases expand to more than {MOST_VALUES} values; allowed: up to that.")
        if len(opened) > DEEPEST:
            raise UserError(f"{path}: it is nested more than {DEEPEST} levels deep; allowed: up to that.")
