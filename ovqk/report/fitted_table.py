"""A table for the terminal that never cuts a value: texts are wrapped, and columns that do not fit are named below."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

GAP = 2  # spaces between two columns
UNBROKEN = "\u00a0"
"""A space in a cell's text at which no line is broken; it is printed as a plain space."""
CORE = 100
"""If a column's importance is at least this (and up to twice it), it is left out only after every text is wrapped."""
NARROWEST = 8  # a text's least width, in letters; longer words are broken


@dataclass(frozen=True)
class Column:
    """A table's column.

    Attributes:
        title: its heading.
        importance: the columns with the least importance are left out first; None if the column always stays.
        text: whether it holds words, which stand on the left and may be wrapped. Numbers stand on the right and are
            never wrapped.
        wraps_at: the width to which a text may be wrapped before any column is left out; None if it is wrapped last.
        place: whether it tells rows apart. If all rows have the same value, the column is left out first, and the value
            is named below the table.
    """

    title: str
    importance: int | None = 0
    text: bool = False
    wraps_at: int | None = None
    place: bool = False


@dataclass(frozen=True)
class Fit:
    """The columns that a table shows in a width, and those that it leaves out.

    Attributes:
        shown: (the column's index, its width).
        left_out: titles for the columns that are left out.
        alike: (title, value) for the columns that are left out because all rows have one value.
    """

    shown: list[tuple[int, int]]
    left_out: list[str]
    alike: list[tuple[str, str]]


class FittedTable:
    """Rows under titled columns, which rich prints in the terminal's width."""

    def __init__(self, columns: Sequence[Column], source: str = "") -> None:
        """Take the columns; `source` names the file that has the columns left out, such as `heads.parquet`."""
        self.columns, self.source = list(columns), source
        self.rows: list[list[Text]] = []

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def add_row(self, *cells: str | Text) -> None:
        """Add a row; cells that are not given are empty."""
        made = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self.rows.append(made + [Text("")] * (len(self.columns) - len(made)))

    def titles(self, width: int) -> list[str]:
        """Return the titles that are shown in this width."""
        return [self.columns[at].title for at, _ in self.fit(width).shown]

    def fit(self, width: int) -> Fit:
        """Choose the columns that are shown in this width, and how wide each one is.

        These steps are taken until the table fits: wrap headings and long texts; leave out empty columns, and those
        below CORE by importance; wrap the other texts; leave out core columns; break words.
        """
        shown = list(range(len(self.columns)))
        left_out: list[int] = []
        alike: list[tuple[str, str]] = []
        for below, hard in ((CORE, False), (2 * CORE, True)):
            while _total(widths := [self._least(at, hard) for at in shown]) > width:
                at = self._least_important(shown, below)
                if at is None:
                    break
                shown.remove(at)
                if (value := self._one_value(at)) is not None:
                    alike.append((self.columns[at].title, value))
                elif any(row[at].plain for row in self.rows):
                    left_out.append(at)
        if _total(widths) > width:
            widths = [self._least(at, hard=True, broken=True) for at in shown]
        return Fit(
            list(zip(shown, self._grown(shown, widths, width), strict=True)),
            [self.columns[at].title for at in sorted(left_out)],
            alike,
        )

    def _least_important(self, shown: Sequence[int], below: int) -> int | None:
        """Return the next column to leave out, among those below this importance; None if all others must stay."""
        for at in shown:
            empty = self.columns[at].importance is not None and not any(row[at].plain.strip() for row in self.rows)
            if empty or self._one_value(at) is not None:
                return at
        weights = {at: weight for at in shown if (weight := self.columns[at].importance) is not None and weight < below}
        return min(weights, key=weights.__getitem__, default=None)

    def _one_value(self, at: int) -> str | None:
        """Return a column's value if all rows have the same; None for other columns."""
        values = {row[at].plain for row in self.rows}
        return next(iter(values)) if self.columns[at].place and len(values) == 1 and len(self.rows) > 1 else None

    def _natural(self, at: int) -> int:
        cells = [Text(self.columns[at].title), *(row[at] for row in self.rows)]
        return max(cell_len(line) for cell in cells for line in cell.plain.split("\n"))

    def _least(self, at: int, hard: bool, broken: bool = False) -> int:
        """Return a column's least width. With `hard`, all texts may be wrapped; with `broken`, words may be broken."""
        column = self.columns[at]
        title = max(map(cell_len, column.title.split()), default=0)
        if not column.text:
            return max(title, *(cell_len(row[at].plain) for row in self.rows), 0)
        words = [word.rstrip(" \n") for row in self.rows for word in _words(row[at].plain)]
        longest = max([title, *map(cell_len, words)])
        if hard:
            return min(longest, NARROWEST) if broken else longest
        natural = self._natural(at)
        return natural if column.wraps_at is None else min(natural, max(longest, column.wraps_at))

    def _grown(self, shown: Sequence[int], widths: Sequence[int], width: int) -> list[int]:
        """Share out the space that is left, and return the widths; the most important columns grow first."""
        grown = list(widths)
        spare = width - _total(widths)
        order = sorted(
            range(len(shown)),
            key=lambda i: -(1000 if (weight := self.columns[shown[i]].importance) is None else weight),
        )
        for i in order:
            more = max(0, min(spare, self._natural(shown[i]) - grown[i]))
            grown[i] += more
            spare -= more
        return grown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, and the titles that it leaves out."""
        fit = self.fit(options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for at, wide in fit.shown:
            column = self.columns[at]
            table.add_column(
                wrapped(Text(column.title), wide),
                justify="left" if column.text else "right",
                width=wide,
            )
        for row in self.rows:
            table.add_row(*(wrapped(row[at], wide) for at, wide in fit.shown))
        yield table
        if fit.alike:
            yield Text("In all rows: " + ", ".join(f"{title} {value}" for title, value in fit.alike) + ".", style="dim")
        if fit.left_out:
            place = f" (see {self.source})" if self.source else ""
            names = ", ".join(fit.left_out)
            yield Text(f"Left out in {options.max_width} columns: {names}{place}.", style="dim")


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * max(0, len(widths) - 1)


def wrapped(text: Text, width: int) -> Text:
    """Break a text at spaces into lines that are at most this wide; a longer word is broken inside."""
    offsets: list[int] = []
    line = 0  # the line's width so far, with the space after its last word
    at = 0
    for word in _words(text.plain):
        if line and line + cell_len(word.rstrip(" \n")) > width:
            offsets.append(at)
            line = 0
        if cell_len(word.rstrip(" \n")) > width:
            for letter in word:
                if line + cell_len(letter) > width and letter not in " \n":
                    offsets.append(at)
                    line = 0
                line += cell_len(letter)
                at += len(letter)
        else:
            line += cell_len(word)
            at += len(word)
        if word.endswith("\n"):
            line = 0
    lines = text.divide(offsets) if offsets else [text.copy()]
    for piece in lines:
        piece.rstrip()
        piece.plain = piece.plain.replace(UNBROKEN, " ")
    return Text("\n").join(lines)


def _words(text: str) -> list[str]:
    """Split a text after every run of spaces and every line end; leading spaces stay with the first word."""
    words: list[str] = []
    word = ""
    for letter in text:
        ended = word.endswith("\n") or (word.endswith(" ") and word.strip(" ") and letter not in " \n")
        if ended:
            words.append(word)
            word = ""
        word += letter
    return [*words, word] if word else words
