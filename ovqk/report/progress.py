"""The progress of a long cell and of a sweep: a bar on a terminal, plain lines otherwise."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ovqk.records.outcomes import Outcomes
from ovqk.report import terminal

Steps = Callable[[int, str], Iterator[int]]
"""Number of steps and what one is -> their indexes in order, each counted as done when the next is asked for."""

AFTER = {"layer": "claims and nulls"}
"""What follows the last step of a kind."""
SHORT = 2.0  # seconds; a cell that takes no longer shows nothing
BETWEEN_LINES = 30.0  # seconds
LOOK_EVERY = 0.5  # seconds


@contextmanager
def steps_of(name: str, alone: bool) -> Iterator[Steps]:
    """Show how many of a cell's layers, or batches of prompts, are done, if it takes longer than a moment.

    Args:
        name: how messages name the cell.
        alone: whether no other process computes for this terminal; two bars on one would overwrite each other.
    """
    out = terminal.progress_console()
    if not (alone and out.is_terminal):
        yield lambda count, what: _with_lines(f"{name}: {what}", count)
        return
    bar = terminal.cell_bar(out)
    task = bar.add_task(name, total=None)
    later = threading.Timer(SHORT, bar.start)
    later.daemon = True
    later.start()

    def steps(count: int, what: str) -> Iterator[int]:
        for index in range(count):
            bar.update(task, description=f"{name}: {what} {index + 1} of {count}", completed=index, total=count)
            yield index
        bar.reset(task, description=f"{name}: {AFTER.get(what, what)}", total=None)

    try:
        yield steps
    finally:
        later.cancel()
        later.join()
        if bar.live.is_started:
            bar.stop()


def _with_lines(name: str, count: int) -> Iterator[int]:
    started = said = time.monotonic()
    for index in range(count):
        yield index
        now = time.monotonic()
        if now - said >= BETWEEN_LINES and index + 1 < count:
            said = now
            terminal.print_steps(name, index + 1, count, now - started)


class SweepProgress:
    """Prints a line for each cell of a sweep as it ends, wherever it was computed."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes = outcomes
        self.expected = outcomes.expected()
        self.details = outcomes.details()
        self.started = time.monotonic()
        self.ended = self.computed = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._printing = threading.Lock()

    def watch(self) -> None:
        """Watch for new outcomes from now on, if the cells run in other processes or on other machines."""
        self._thread = threading.Thread(target=self._watch, name="ovqk-sweep-progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Print the remaining lines and stop watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.print_new()

    def print_new(self) -> None:
        """Print a line for each cell that has ended since the last call."""
        with self._printing:
            for number, outcome in self.outcomes.new().items():
                self.ended += 1
                self.computed += outcome.status != "cached"
                count = None if self.expected is None else len(self.expected)
                name = " ".join(filter(None, (outcome.name, self.details.get(number))))
                terminal.print_cell_line(name, outcome, self.ended, count, self._seconds_left())

    def _seconds_left(self) -> float | None:
        """Return the time left, from the pace of the computed cells; cells that are done already take none."""
        if self.expected is None or not self.computed or self.ended >= len(self.expected):
            return None
        return (time.monotonic() - self.started) * (len(self.expected) - self.ended) / self.computed

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY):
            self.print_new()
