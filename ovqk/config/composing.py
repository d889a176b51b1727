"""Hydra's composition of a choice, done once.

Hydra 1.3 composes a choice to see whether `hydra.mode` asks for a sweep, and then again to run it. For a help text it
copies all its sources for each list of names. Either costs a quarter of a second or more.
"""

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig

AS_RUN = "hydra.mode=RUN"  # what Hydra adds to the overrides of a single run
MAIN = "config"  # the name of ovqk's own choice, which is a single run
_composed: dict[tuple[str | None, tuple[str, ...]], DictConfig] = {}
"""The choice that was composed to see its mode, by config name and overrides, until it is run."""
_mode, _load, _options = Hydra.get_mode, ConfigLoaderImpl.load_configuration, ConfigLoaderImpl.get_group_options


def compose_once() -> None:
    """Let Hydra run the choice that it composed to see its mode, and list names without copying its sources."""
    Hydra.get_mode = _mode_and_keep  # type: ignore[method-assign, assignment]
    ConfigLoaderImpl.load_configuration = _load_or_take  # type: ignore[method-assign, assignment]
    ConfigLoaderImpl.get_group_options = _options_at_once  # type: ignore[method-assign, assignment]


def _mode_and_keep(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return `hydra.mode`, and keep the choice if it is composed as a single run; else do as Hydra does."""
    try:
        config = hydra.compose_config(config_name, overrides, RunMode.RUN)
        mode = config.hydra.mode
    except Exception:  # a mistake, which Hydra reports when it composes again; or another file's choice of a sweep
        alone = config_name == MAIN and not any("," in override for override in overrides)
        return None if alone else _mode(hydra, config_name, overrides)
    _composed.clear()
    if mode is None:
        _composed[config_name, tuple(overrides)] = config
    return mode


def _load_or_take(
    loader: ConfigLoaderImpl, config_name: str | None, overrides: list[str], run_mode: RunMode, *rest: Any, **named: Any
) -> DictConfig:
    """Return the choice that was kept, as if it had been composed with AS_RUN; compose any other."""
    kept = _composed.pop((config_name, tuple(overrides[:-1])), None) if overrides[-1:] == [AS_RUN] else None
    if kept is None or run_mode is not RunMode.RUN:
        return _load(loader, config_name, overrides, run_mode, *rest, **named)
    kept.hydra.mode = RunMode.RUN
    kept.hydra.overrides.hydra.append(AS_RUN)
    return kept


def _options_at_once(
    loader: ConfigLoaderImpl,
    group_name: str,
    results_filter: ObjectType | None = ObjectType.CONFIG,
    config_name: str | None = None,
    overrides: list[str] | None = None,
) -> list[str]:
    """List a group's names. Without overrides there is no other search path, and Hydra's own sources tell."""
    if config_name is None and not overrides:
        return loader.repository.get_group_options(group_name, results_filter)
    return _options(loader, group_name, results_filter, config_name, overrides)
