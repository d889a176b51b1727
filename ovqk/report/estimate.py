"""The time left for a cell that runs its model on prompts, by the parts that it plans."""

import time
from collections.abc import Mapping

Parts = Mapping[str, tuple[str, float | None]]
"""Name of a part's steps -> its kind and its work, None if that is not known yet."""
LAST = ("layers", "nulls")
"""Parts that follow those that are planned, and whose time no run on prompts foretells."""


class Estimate:
    """The time left for a cell's planned parts, from the time that parts of the same kind took.

    Reading prompts takes gradients, so no other part's time follows from it. As long as no other part has run, later
    parts are not counted, and are named instead.
    """

    def __init__(self) -> None:
        """Start without a plan."""
        self.parts: dict[str, tuple[str, float | None]] = {}
        self._spent: dict[str, tuple[float, float]] = {}
        self._now, self._began, self._done = "", 0.0, 0.0

    def plan(self, parts: Parts) -> None:
        """Take parts, in order: their steps' name -> their kind and work; a known part is planned anew."""
        self.parts |= parts

    def begin(self, what: str) -> None:
        """Begin a part."""
        self._now, self._began, self._done = what, time.monotonic(), 0.0

    def finish(self) -> None:
        """Keep what the part took; parts that fail are not kept."""
        if self._now in self.parts:
            self._done = 1.0
            self._spent[self.parts[self._now][0]] = self._of_kind()
            self._done = 0.0

    def number(self, what: str) -> str:
        """Return `part 3/12: ` for a part's steps; empty if nothing is planned, as in a cell that runs no prompts."""
        if not self.parts:
            return ""
        names = [*self.parts, "layer", "null draw"]
        place = names.index(what) + 1 if what in names else 0
        return f"part {place}/{len(names)}: " if place else ""

    def left(self, done: int, count: int) -> tuple[float | None, list[str]]:
        """Return the seconds left for this part and later ones, and what they leave out; None if nothing is known.

        Args:
            done: how many of this part's steps are done.
            count: how many it has.
        """
        self._done = done / count
        names = list(self.parts)
        found, without = 0.0, dict[str, None]()
        for name in names[names.index(self._now) :]:
            kind, work = self.parts[name]
            here = name == self._now
            if here and done:
                found += (time.monotonic() - self._began) * (count - done) / done
            elif work is not None and (rate := self._rate(kind)) is not None:
                found += rate * work
            elif here:
                return None, []
            else:
                without[kind] = None
        return found, [*without, *LAST]

    def _of_kind(self) -> tuple[float, float]:
        """Return work and seconds of all steps so far of this part's kind."""
        kind, work = self.parts[self._now]
        before = self._spent.get(kind, (0.0, 0.0))
        if not work or not self._done:
            return before
        return before[0] + work * self._done, before[1] + time.monotonic() - self._began

    def _rate(self, kind: str) -> float | None:
        """Return the seconds for a unit of work of this kind, or else of another that runs the model alike."""
        spent = self._spent | {self.parts[self._now][0]: self._of_kind()}
        first = next(iter(self.parts.values()))[0]  # reads prompts, and is like no other
        for other in (kind, *(each for each in spent if each != first and kind != first)):
            work, seconds = spent.get(other, (0.0, 0.0))
            if work:
                return seconds / work
        return None
