"""The table of published statements: ovqk's value beside each published one, and whether they agree."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from ovqk.config.choices import chosen
from ovqk.errors import UserError
from ovqk.published.quantities import Found, Opened, compute
from ovqk.published.statements import Statement
from ovqk.weights.known import OtherModelError, digests_of, identified_by, known_models, sizes_of_files

Outcome = Literal["reproduced", "differs", "not runnable here"]
ROUNDING = 1e-9
"""How far a value may lie beyond its tolerance, because fractions are binary."""
HUB = "weights are not here: name their folder with --weights, or add --hub to fetch them"


@dataclass(frozen=True)
class Row:
    """One statement and its result.

    Attributes:
        value: ovqk's value; None if it could not be computed.
        result: whether it agrees with the published one.
        reason: why not, if it could not be computed or is not computed as the source does.
        weights: where the weights came from: below the local folder, or `hub`; empty if nothing was computed.
        identified: what shows that they are the statement's model's; empty likewise.
        sha256: the SHA-256 of each of the weights' files; empty likewise.
    """

    statement: Statement
    value: Found | None
    result: Outcome
    reason: str = ""
    weights: str = ""
    identified: str = ""
    sha256: str = ""


class Places:
    """Where models are found: below a local weights folder, else on the hub if that is allowed.

    A local model that lacks a part which a statement needs gives way to the one on the hub, if that is allowed.
    """

    def __init__(self, weights: Path | None, hub: bool) -> None:
        """Take the folder, and whether weights may be fetched.

        Raises:
            UserError: there is no such folder.
        """
        if weights is not None and not weights.is_dir():
            raise UserError(f"--weights {weights}: no such folder.")
        self.weights, self.hub = weights, hub
        self._opened: dict[tuple[str, str], Opened] = {}  # by subject and place

    def find(self, statement: Statement) -> tuple[Opened, str]:
        """Return a statement's model, and where it is.

        Raises:
            UserError: it is not here; the message says what is missing.
        """
        subject = statement.subject
        there = [name for name in subject.local if self.weights is not None and (self.weights / name).exists()]
        on_hub = self.hub and subject.choice is not None
        if there and self.weights is not None:
            choices = (*subject.choices, f"model.name={subject.name}")  # so files of another model are refused
            local = self._open(subject.name, there[0], self.weights / there[0], choices)
            if not (on_hub and missing(statement, local)):
                return local, there[0]
        elif subject.choice is None:
            raise UserError(f"no {' or '.join(subject.local)} below --weights, and no place on the hub")
        elif not self.hub:
            raise UserError(HUB)
        assert subject.choice is not None
        chosen(subject.choice, *subject.choices)
        return self._open(subject.name, "hub", subject.choice, subject.choices), "hub"

    def _open(self, name: str, place: str, source: str | Path, choices: tuple[str, ...]) -> Opened:
        """Return a subject's model at a place; models of one subject at a time stay open."""
        if any(other != name for other, _ in self._opened):
            self._opened = {}
        return self._opened.setdefault((name, place), Opened(source, choices))


def rows(statements: Iterable[Statement], places: Places, told: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Compute every statement that can be computed, model by model, and return the rows in the statements' order.

    Args:
        statements: the statements to compute.
        places: where their models are.
        told: takes each row when it is made.
    """
    asked = list(statements)
    order = {name: place for place, name in enumerate(dict.fromkeys(each.subject.name for each in asked))}
    found = {}
    for statement in sorted(asked, key=lambda each: order[each.subject.name]):
        found[statement.name] = row(statement, places)
        told(found[statement.name])
    return [found[statement.name] for statement in asked]


def row(statement: Statement, places: Places) -> Row:
    """Compute one statement, or say why not."""
    if statement.function is None:
        return Row(statement, None, "not runnable here", statement.reason)
    try:
        opened, weights = places.find(statement)
        lacking(statement, opened, weights)
        value = compute(statement.function, opened, statement.options)
    except OtherModelError as error:
        return Row(statement, None, "not runnable here", error.said)
    except UserError as error:
        return Row(statement, None, "not runnable here", str(error).rstrip("."))
    if isinstance(value, float) and not math.isfinite(value):
        return Row(statement, None, "not runnable here", "the model has no such value", weights)
    result: Outcome = "reproduced" if agrees(statement, value) else "differs"
    return Row(statement, value, result, statement.reason, weights, *identity(statement, opened))


def identity(statement: Statement, opened: Opened) -> tuple[str, str]:
    """Return what shows that a model's files are the statement's model's, and their SHA-256."""
    model, checkpoint = opened.library.model, opened.library.checkpoint
    found, known = identified_by(model.config.model, checkpoint, statement.subject.name), known_models()
    if found == "sizes alone":
        here, wanted = (sizes_of_files(checkpoint, model.architecture), known[statement.subject.name].sizes)
        if here.tokens is not None and here.tokens != wanted.tokens:
            return f"{found}, with {here.tokens:,} tokens for {wanted.tokens:,}", digests_of(checkpoint)
    return found or "", digests_of(checkpoint)


TITLES = {"block0": "first MLP"}
"""Model parts as messages name them."""


def lacking(statement: Statement, opened: Opened, weights: str) -> None:
    """Refuse a model that lacks a part which the statement needs.

    Raises:
        UserError: the model lacks a part; the message names it.
    """
    if parts := missing(statement, opened):
        raise UserError(f"{weights} holds no {' and no '.join(parts)}")


def missing(statement: Statement, opened: Opened) -> list[str]:
    """Return the parts that a statement needs and a model lacks, as messages name them."""
    model = opened.model
    vocabulary = model.vocabulary
    parts = {
        "embedding": vocabulary is not None,
        "unembedding": vocabulary is not None and vocabulary.written is not None,
        "block0": vocabulary is not None and not isinstance(model.block0, str),
    }
    return [TITLES.get(part, part) for part in statement.needs if not parts.get(part, True)]


def agrees(statement: Statement, value: Found) -> bool:
    """Say whether a value is the published one, as the statement's relation says."""
    if statement.relation == "set" or isinstance(value, frozenset):
        return value == frozenset(int(each) for each in statement.numbers)
    (published,) = statement.numbers
    if statement.relation == "above":
        return value > published
    if statement.relation == "below":
        return value < published
    assert statement.tolerance is not None
    return abs(value - published) <= statement.tolerance + ROUNDING


def printed(row: Row) -> str:
    """Return ovqk's value, with one digit more than the published one; empty if there is no value."""
    if row.value is None:
        return ""
    if isinstance(row.value, frozenset):
        return " ".join(map(str, sorted(row.value)))
    digits = len(row.statement.value.partition(".")[2])
    return f"{row.value:.{digits + 1}f}"


BOUNDS = {"above": "> ", "below": "< ", "equals": "", "set": ""}


def frame(found: Sequence[Row]) -> pd.DataFrame:
    """Return the table: a row for each statement."""
    return pd.DataFrame(
        [
            {
                "model": each.statement.subject.name,
                "statement": each.statement.name.partition("/")[2],
                "quantity": each.statement.quantity,
                "definition": each.statement.definition,
                "published": BOUNDS[each.statement.relation] + each.statement.value,
                "tolerance": each.statement.tolerance,
                "source": each.statement.source,
                "place": each.statement.place,
                "kind": each.statement.kind,
                "needs": ", ".join(each.statement.needs),
                "value": printed(each),
                "result": each.result,
                "reason": each.reason,
                "weights": each.weights,
                "identified": each.identified,
                "sha256": each.sha256,
            }
            for each in found
        ]
    )
