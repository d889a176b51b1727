"""The keys of a model that only one source of weights reads, and the refusal of those that would be ignored."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from ovqk.config.command_line import quoted
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError

READ_BY = {
    "path": Source.local,
    "repo": Source.hub,
    "package": Source.package,
    "file": Source.package,
    "sha256": Source.package,
}
"""Key below `model` -> the only source that reads it."""
OF_ANY = {"path": "local", "repo": "hub"}
"""Key -> the name in conf/model that takes any value of it."""


def refuse_unread(model: ModelConfig) -> None:
    """Refuse a key that the model's source does not read: the numbers would be those of other weights.

    Raises:
        UserError: such a key is set.
    """
    for key, source in READ_BY.items():
        if (value := getattr(model, key)) is not None and model.source is not source:
            raise UserError(_message(key, value, f"model={model.name}"))
    if model.revision != "main" and model.source is not Source.hub and not model.trust_remote_code:
        raise UserError(
            f"model.revision={model.revision}: model={model.name} does not come from the hub, so it has no other "
            "revision; allowed: unset."
        )


def refuse_unread_in_sweep(overrides: Iterable[str], model: DictConfig, folders: Iterable[Path]) -> None:
    """Refuse a sweep's key if none of its models reads it. Those that read it may stand beside those that do not.

    Args:
        overrides: the sweep's choices, KEY=VALUE.
        model: the composed model, which is the cells' if the choices name none.
        folders: folders like conf/, those of -cd first.

    Raises:
        UserError: such a key is set.
    """
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    if "model" not in given:
        chosen, sources = OmegaConf.select(model, "name") or "local", {OmegaConf.select(model, "source")}
    else:
        chosen, folders = given["model"], list(folders)
        sources = {_source(name.strip(), folders) for name in chosen.split(",")}
    for key, source in READ_BY.items():
        value = given.get(f"model.{key}", "").strip("\"'")
        if value not in ("", "null") and not {None, source} & sources:
            raise UserError(_message(key, value, f"model={chosen}"))


def _source(name: str, folders: Iterable[Path]) -> Source | None:
    """Return a model's source, as its file says; None if there is no such file or it does not say."""
    for folder in folders:
        path = folder / "model" / f"{name}.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text("utf-8"))
            named = content.get("source") if isinstance(content, Mapping) else None
            return Source(named) if named in {source.value for source in Source} else None
    return None


def _message(key: str, value: str, chosen: str) -> str:
    """Return what is wrong with a key that the chosen model does not read."""
    allowed = f"model={OF_ANY[key]} {quoted(f'model.{key}', value)}" if key in OF_ANY else "unset"
    return f"model.{key}={value}: {chosen} does not read it; allowed: {allowed}."
