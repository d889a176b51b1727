"""Many cells of a statistical test, in a process that checks no types: they take half the time there."""

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any


class ManyCells:
    """Maps a function of an importable module over cells."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would bring the checks along
        self.process = ProcessPoolExecutor(1, context, initializer=warnings_are_errors)

    def __call__(self, function: Callable[[Any], Any], cells: Sequence[Any]) -> list[Any]:
        """What the function returns for each cell; for the first one in this process, where types are checked."""
        others = self.process.map(function, cells[1:])
        return [function(cells[0]), *others]


def warnings_are_errors() -> None:
    """As pyproject.toml says for the tests."""
    warnings.simplefilter("error")
    for ignored in (DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", ignored)
