"""Progress through a long cell or a sweep: a bar on a terminal, plain lines otherwise."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import Progress

from ovqk.interrupts import raise_if_remembered
from ovqk.records.outcomes import Outcomes
from ovqk.report import terminal
from ovqk.report.estimate import Estimate, Parts

AFTER = {"layer": "claims and nulls"}
"""Kind of step -> the work that follows the last such step, because the time left is for these steps alone."""
SHORT = 2.0  # seconds; a cell that takes no longer shows nothing
BETWEEN_LINES = 30.0  # seconds
LOOK_EVERY = 0.5  # seconds


class Steps(Protocol):
    """Counts off a cell's layers, its prompt batches and its nulls' draws."""

    def __call__(self, count: int, what: str) -> Iterator[int]:
        """Yield the indexes of `count` steps. A step counts as done when the next is asked for; `what` names a step."""
        ...

    def draws(self, done: int, most: int) -> None:
        """Take the number of null draws made so far, and the largest number that may be needed (usually fewer are)."""
        ...

    def plan(self, parts: Parts) -> None:
        """Take the parts that run the model on prompts, as far as they are known."""
        ...


@contextmanager
def steps_of(name: str, alone: bool) -> Iterator[Steps]:
    """Show a cell's progress if it takes longer than SHORT: its layers, its prompt batches, its nulls.

    Args:
        name: the cell's name in messages.
        alone: whether no other process computes for this terminal. Two bars in one terminal would overwrite each other.
    """
    out = terminal.progress_console()
    if not (alone and out.is_terminal):
        yield _Lines(name)
        return
    bar = terminal.cell_bar(out)
    later = threading.Timer(SHORT, bar.start)
    later.daemon = True
    later.start()
    try:
        yield _Bar(name, bar)
    finally:
        later.cancel()
        later.join()
        if bar.live.is_started:
            bar.stop()


class _Bar:
    """Steps as a bar, which begins anew for the nulls after the layers."""

    def __init__(self, name: str, bar: Progress) -> None:
        self.bar, self.task = bar, bar.add_task("reading the model", total=None, name=f"{name}:", left=None, without="")
        self.counting = False
        self.estimate = Estimate()
        self.plan = self.estimate.plan

    def __call__(self, count: int, what: str) -> Iterator[int]:
        self.counting = False
        self.estimate.begin(what)
        follows = f", then {AFTER[what]}" if what in AFTER else ""
        for index in range(count):
            raise_if_remembered()
            said = f"{self.estimate.number(what)}{what} {index + 1} of {count}{follows}"
            left, without = self.estimate.left(index, count) if what in self.estimate.parts else (None, [])
            told = " + " + ", ".join(without) if without else ""
            self.bar.update(self.task, description=said, completed=index, total=count, left=left, without=told)
            yield index
        self.estimate.finish()
        self.bar.update(self.task, left=None, without="")
        self.bar.reset(self.task, description=AFTER.get(what, what), total=None)

    def draws(self, done: int, most: int) -> None:
        if not self.counting:
            self.bar.reset(self.task)  # from here on the time left counts the draws
            self.counting = True
        said = f"{self.estimate.number('null draw')}null draw {done:,} of at most {most:,}"
        self.bar.update(self.task, description=said, completed=done, total=most)


class _Lines:
    """Steps as plain lines, at most one every BETWEEN_LINES."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = self.said = time.monotonic()
        self.counting = False
        self.estimate = Estimate()
        self.plan = self.estimate.plan

    def __call__(self, count: int, what: str) -> Iterator[int]:
        self.began = time.monotonic()
        self.counting = False
        self.estimate.begin(what)
        for index in range(count):
            raise_if_remembered()
            yield index
            if index + 1 < count:
                self._say(what, index + 1, count, f", then {AFTER[what]}" if what in AFTER else "")
        self.estimate.finish()

    def draws(self, done: int, most: int) -> None:
        if not self.counting:  # these draws are made, in a time that nobody took: they tell nothing of the time left
            self.began, self.counting = time.monotonic(), True
        elif done < most:
            self._say("null draw", done, most, "", at_most=True)

    def _say(self, what: str, done: int, count: int, follows: str, at_most: bool = False) -> None:
        now = time.monotonic()
        if now - self.said < BETWEEN_LINES:
            return
        self.said = now
        left, without = self.estimate.left(done, count) if what in self.estimate.parts else (None, [])
        follows = f" without {', '.join(without[:-1])} and {without[-1]}" if without else follows
        named = f"{self.name}: {self.estimate.number(what)}{what}"
        terminal.print_steps(named, done, count, now - self.began, follows, at_most, left)


class SweepProgress:
    """Prints a line for each cell of a sweep when it ends, on whichever machine it was computed."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes = outcomes
        self.expected = outcomes.expected()
        self.details = outcomes.details()
        self.started = self.first_ended = time.monotonic()
        self.ended = self.computed = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._printing = threading.Lock()

    def watch(self) -> None:
        """Begin to watch for new outcomes; needed if the cells run in other processes or on other machines."""
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
                if outcome.status != "cached":
                    self.computed += 1
                    self.first_ended = time.monotonic() if self.computed == 1 else self.first_ended
                count = None if self.expected is None else len(self.expected)
                name = " ".join(filter(None, (outcome.name, self.details.get(number))))
                terminal.print_cell_line(name, outcome, self.ended, count, self._seconds_left())

    def _seconds_left(self) -> float | None:
        """Return the seconds left, judged by the time that computed cells took; None if it cannot be known.

        If the cells run here one after the other, the first is left out as soon as there is a second, because only the
        first pays for imports and for results that later cells find in the cache.
        """
        if self.expected is None or not self.computed or self.ended >= len(self.expected):
            return None
        now, left = time.monotonic(), len(self.expected) - self.ended
        if self._thread is None and self.computed > 1:
            return (now - self.first_ended) * left / (self.computed - 1)
        return (now - self.started) * left / self.computed

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY):
            self.print_new()
