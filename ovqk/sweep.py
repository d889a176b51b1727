"""The start and the end of a sweep: how many cells to expect, and what became of them."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepCallback(Callback):
    """Hydra calls this around a run or a sweep, in the process that was started."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse an unusable results folder before Hydra makes folders in it."""
        _check_results_dir(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same, and note how many cells the overrides expand to."""
        _check_results_dir(config)
        sweep_dir = Path(config.hydra.sweep.dir)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        (sweep_dir / "expected.json").write_text(json.dumps({"cells": expected_cells(config)}), encoding="utf-8")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison and the count.

        Raises:
            SystemExit: (status 1) where a cell failed or is missing.
        """
        from ovqk import console

        sweep_dir = Path(config.hydra.sweep.dir)
        outcomes = read_outcomes(sweep_dir)
        expected = json.loads((sweep_dir / "expected.json").read_text(encoding="utf-8"))["cells"]
        console.print_sweep(outcomes, expected, Path(config.results_dir))
        finished = [outcome for outcome in outcomes if outcome["status"] != "failed"]
        if len(finished) < max(expected or 0, len(outcomes)):
            raise SystemExit(1)


def expected_cells(config: DictConfig) -> int | None:
    """Into how many cells the sweep's overrides expand; None for a sweeper that decides as it goes."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides(parameters + list(config.hydra.overrides.task))
    return len(BasicSweeper.split_arguments(overrides, max_batch_size=None)[0])


def read_outcomes(sweep_dir: Path) -> list[dict[str, Any]]:
    """What the sweep's cells left, in the order of their numbers."""
    found = []
    for path in sweep_dir.glob("*/outcome.json"):
        try:
            found.append((int(path.parent.name), json.loads(path.read_text(encoding="utf-8"))))
        except ValueError:
            continue
    return [outcome for _, outcome in sorted(found, key=lambda pair: pair[0])]


def _check_results_dir(config: DictConfig) -> None:
    from ovqk.cell import check_results_dir
    from ovqk.errors import UserError

    try:
        check_results_dir(Path(str(config.results_dir)))
    except UserError as error:
        raise SystemExit(f"ovqk: {error}") from None
