"""Hydra's composition of a choice, done once.

Hydra 1.3 composes a choice to see whether `hydra.mode` asks for a sweep, and then again to run it, or to report the
mistake in it. It composes every cell of a sweep to see whether that can be done, and then again to run it. For a help
text it copies all its sources for each list of names. Each costs a quarter of a second or more, a fifth of it for
reading YAML in Python.
"""

from collections.abc import Callable, Sequence
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, _utils

AS_RUN = "hydra.mode=RUN"  # what Hydra adds to the overrides of a single run
MAIN = "config"  # the name of ovqk's own choice, which is a single run
_composed: dict[tuple[str | None, tuple[str, ...]], DictConfig | Exception] = {}
"""The choice that was composed to see its mode, or the mistake that was met, by config name and overrides, until it is
run or reported."""
AHEAD = 100
"""How many cells of a sweep are kept from when they were checked until they are run: an eighth of a megabyte each."""
_cells: dict[tuple[str, ...], DictConfig] = {}
"""A sweep's cells that were composed to check them, by their overrides, until they are run."""


def compose_once() -> None:
    """Let Hydra run the choices that it composed to look at, list names without copying its sources, and read fast."""
    _wrap(_utils, "get_yaml_loader", _in_c)
    _wrap(Sweeper, "validate_batch_is_legal", _check_and_keep)
    _wrap(ConfigLoaderImpl, "load_sweep_config", _load_or_take_cell)
    _wrap(Hydra, "get_mode", _mode_and_keep)
    _wrap(ConfigLoaderImpl, "load_configuration", _load_or_take)
    _wrap(ConfigLoaderImpl, "get_group_options", _options_at_once)


def _wrap(of: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method, or a module's function, by a function of it, unless that was done before."""
    method = getattr(of, name)
    if getattr(method, "__module__", "") != __name__:
        setattr(of, name, made(method))


def _mode_and_keep(get_mode: Callable[..., Any]) -> Callable[..., Any]:
    def mode_and_keep(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Return `hydra.mode`, and keep the choice if it is composed as a single run; else do as Hydra does."""
        _composed.clear()
        try:
            config = hydra.compose_config(config_name, overrides, RunMode.RUN)
            mode = config.hydra.mode
        except Exception as error:  # a mistake, reported when the choice is run; or another file's choice of a sweep
            if config_name != MAIN or any("," in override for override in overrides):
                return get_mode(hydra, config_name, overrides)
            _composed[config_name, tuple(overrides)] = error
            return None
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
        """Return the choice that was kept, as if it had been composed with AS_RUN; compose any other.

        Raises:
            Exception: the mistake that was kept.
        """
        kept = _composed.pop((config_name, tuple(overrides[:-1])), None) if overrides[-1:] == [AS_RUN] else None
        if kept is None or run_mode is not RunMode.RUN:
            return load(loader, config_name, overrides, run_mode, *rest, **named)
        if isinstance(kept, Exception):
            raise kept
        kept.hydra.mode = RunMode.RUN
        kept.hydra.overrides.hydra.append(AS_RUN)
        return kept

    return load_or_take


def _check_and_keep(check: Callable[..., None]) -> Callable[..., None]:
    def check_and_keep(sweeper: Any, batch: Sequence[Sequence[str]]) -> None:
        """Compose the batch's cells, as Hydra does, and keep the first ones."""
        _cells.clear()
        load, master = sweeper.hydra_context.config_loader.load_sweep_config, sweeper.config
        _cells.update({tuple(cell): load(master, list(cell)) for cell in batch[:AHEAD]})
        check(sweeper, batch[AHEAD:])

    return check_and_keep


def _load_or_take_cell(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def load_or_take_cell(
        loader: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        """Return the cell that was kept, with what the sweep's choice has resolved since; compose any other."""
        kept = _cells.pop(tuple(sweep_overrides), None)
        if kept is None:
            return load(loader, master_config, sweep_overrides)
        OmegaConf.copy_cache(from_config=master_config, to_config=kept)
        return kept

    return load_or_take_cell


def _in_c(get_loader: Callable[[], Any]) -> Callable[[], Any]:
    python = get_loader()
    if not hasattr(yaml, "CSafeLoader"):  # PyYAML was built without its C library
        return get_loader

    class Parsed(yaml.CSafeLoader, python):  # type: ignore[misc, valid-type]
        """OmegaConf's values from PyYAML's parser in C."""

        def __init__(self, stream: Any) -> None:
            yaml.CSafeLoader.__init__(self, stream)

    class Loader:
        """Reads YAML as OmegaConf does; a mistake in it is told as OmegaConf tells it."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream
            self.text = stream if isinstance(stream, str) else stream.read()

        def get_single_data(self) -> Any:
            try:
                return Parsed(self.text).get_single_data()
            except yaml.YAMLError:
                if not isinstance(self.stream, str):
                    self.stream.seek(0)
                return python(self.stream).get_single_data()

        def dispose(self) -> None:
            pass

    return lambda: Loader


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
