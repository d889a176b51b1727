"""TransformerLens's short names for models, as the installed package lists them, for messages about unknown names."""

import json
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

LISTED = Path("tools", "model_registry", "data", "model_aliases.json")
"""TransformerLens's file of short names, below its own folder."""


def repository(name: str) -> str | None:
    """Return the repository that TransformerLens means by a short name; None if it has no such name.

    Upper and lower case are the same. Nothing of TransformerLens is imported.
    """
    return _repositories().get(name.lower())


def names_here(repo: str, folders: Iterable[Path]) -> list[str]:
    """Return the models in `model/` below these folders whose weights are this repository's main revision.

    Args:
        repo: the repository; without an owner, as TransformerLens calls GPT-2, any owner's.
        folders: folders like conf/.
    """
    found = []
    for path in sorted(path for folder in folders for path in (folder / "model").glob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        own = str(content.get("repo") or "").lower() if isinstance(content, dict) else ""
        own = own if "/" in repo else own.rpartition("/")[2]
        if own == repo.lower() and content.get("revision", "main") == "main":
            found.append(path.stem)
    return found


@cache
def _repositories() -> dict[str, str]:
    """Return short name, in lower case -> repository; empty if this TransformerLens keeps its names elsewhere."""
    package = find_spec("transformer_lens")
    places = [] if package is None else package.submodule_search_locations or []
    for place in places:
        try:
            listed = json.loads((Path(place) / LISTED).read_text("utf-8"))["aliases"]
            return {short.lower(): repo for repo, names in listed.items() for short in names}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return {}
