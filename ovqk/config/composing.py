"""Hydra's composition of a choice, done once.

Hydra 1.3 composes a choice to see whether `hydra.mode` asks for a sweep, and then again to run it. For a help text it
copies all its sources for each list of names. Either costs a quarter of a second or more.
"""

from collections.abc import Callable
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


def compose_once() -> None:
    """Let Hydra run the choice that it composed to see its mode, and list names without copying its sources."""
    _wrap(Hydra, "get_mode", _mode_and_keep)
    _wrap(ConfigLoaderImpl, "load_configuration", _load_or_take)
    _wrap(ConfigLoaderImpl, "get_group_options", _options_at_once)


def _wrap(of: type, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by a function of it, unless that was done before."""
    method = getattr(of, name)
    if getattr(method, "__module__", "") != __name__:
        setattr(of, name, made(method))


def _mode_and_keep(get_mode: Callable[..., Any]) -> Callable[..., Any]:
    def mode_and_keep(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Return `hydra.mode`, and keep the choice if it is composed as a single run; else do as Hydra does."""
        try:
            config = hydra.compose_config(config_name, overrides, RunMode.RUN)
            mode = config.hydra.mode
        except Exception:  # a mistake, which Hydra reports when it composes again; or another file's choice of a sweep
            alone = config_name == MAIN and not any("," in override for override in overrides)
            return None if alone else get_mode(hydra, config_name, overrides)
        _composed.clear()
        if mode is None:
            _composed[config_name, tuple(overrides)] = config
        return mode

    return mode_and_keep


def _load_or_take(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def load_or_take(
        loader: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        *rest: Any,
        **named: Any,
    ) -> DictConfig:
        """Return the choice that was kept, as if it had been composed with AS_RUN; compose any other."""
        kept = _composed.pop((config_name, tuple(overrides[:-1])), None) if overrides[-1:] == [AS_RUN] else None
        if kept is None or run_mode is not RunMode.RUN:
            return load(loader, config_name, overrides, run_mode, *rest, **named)
        kept.hydra.mode = RunMode.RUN
        kept.hydra.overrides.hydra.append(AS_RUN)
        return kept

    return load_or_take


def _options_at_once(options: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def options_at_once(
        loader: ConfigLoaderImpl,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """List a group's names. Without overrides there is no other search path, and Hydra's own sources tell."""
        if config_name is None and not overrides:
            return loader.repository.get_group_options(group_name, results_filter)
        return options(loader, group_name, results_filter, config_name, overrides)

    return options_at_once
