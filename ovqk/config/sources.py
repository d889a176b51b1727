"""The keys of a model that only one source of weights reads, and the refusal of those that would be ignored."""

from collections.abc import Collection, Iterable, Mapping
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


def refuse_unread(overrides: Iterable[str], model: ModelConfig) -> None:
    """Refuse a key that was chosen and that the model's source does not read: the numbers would be of other weights.

    Keys in the model's own file may stay if another source is chosen: `model=gpt2 model.source=local model.path=DIR`.

    Args:
        overrides: the choices, KEY=VALUE.
        model: the composed model.

    Raises:
        UserError: such a key is set.
    """
    given, chosen = _given(overrides), f"model={model.name}"
    _refuse(given, {model.source}, chosen)
    other = given.get("model.revision", "main") not in ("main", "null")
    if other and model.source is not Source.hub and not model.trust_remote_code:
        raise UserError(
            f"model.revision={model.revision}: {chosen} does not come from the hub, so it has no other revision; "
            "allowed: unset."
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
    given = _given(overrides)
    if "model.source" in given:
        chosen, sources = f"model.source={given['model.source']}", set(map(_named, given["model.source"].split(",")))
    elif "model" in given:
        chosen, folders = f"model={given['model']}", list(folders)
        sources = {_source(name.strip(), folders) for name in given["model"].split(",")}
    else:
        chosen, sources = f"model={OmegaConf.select(model, 'name') or 'local'}", {OmegaConf.select(model, "source")}
    _refuse(given, sources, chosen)


def _given(overrides: Iterable[str]) -> dict[str, str]:
    """Return key -> value of the choices."""
    return {key: value.strip("\"'") for key, _, value in (each.lstrip("+").partition("=") for each in overrides)}


def _refuse(given: Mapping[str, str], sources: Collection[Source | None], chosen: str) -> None:
    """Refuse a key that is given and that none of these sources reads; None stands for any source."""
    for key, source in READ_BY.items():
        value = given.get(f"model.{key}", "")
        if value not in ("", "null") and None not in sources and source not in sources:
            allowed = f"model={OF_ANY[key]} {quoted(f'model.{key}', value)}" if key in OF_ANY else "unset"
            raise UserError(f"model.{key}={value}: {chosen} does not read it; allowed: {allowed}.")


def _named(value: str) -> Source | None:
    """Return the source with this name; None if it is no source's."""
    return next((source for source in Source if source.value == value.strip()), None)


def _source(name: str, folders: Iterable[Path]) -> Source | None:
    """Return a model's source, as its file says; None if there is no such file or it does not say."""
    for folder in folders:
        path = folder / "model" / f"{name}.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text("utf-8"))
            named = content.get("source") if isinstance(content, Mapping) else None
            return _named(str(named))
    return None
