"""Published statements as data: `statements.yaml`, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from ovqk.errors import UserError

FILE = Path(__file__).with_name("statements.yaml")
Relation = Literal["equals", "above", "below", "set"]
"""How a value is compared with the published one: within its rounding, as a bound, or as a set of integers."""
Kind = Literal["published", "checked"]
"""`published` if a publication says so; `checked` if none does and a separate script computed it from the weights."""
Needs = Literal["attention", "embedding", "unembedding", "block0", "forward pass"]


@dataclass(frozen=True)
class Subject:
    """A model that statements are about.

    Attributes:
        name: its name in statements.
        choice: its file in conf/model, for the hub; None if ovqk knows no place on the hub.
        local: files or folders below the local weights folder; the first that exists counts.
        choices: further choices with which it is opened, such as `model.causal=false`.
        origin: where its weights come from, for readers.
    """

    name: str
    choice: str | None
    local: tuple[str, ...]
    choices: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Statement:
    """A published value, and how ovqk computes it.

    Attributes:
        name: its name.
        subject: the model.
        quantity: the title.
        definition: the formula in words.
        value: the value as the source prints it; its last digit decides the tolerance.
        relation: how ours is compared with it.
        source, place: the publication, and the section or table in it, or that it was not found; no place if the
            `kind` is `checked`.
        kind: whether a publication says so.
        needs: the model parts that it takes.
        function: a name in `quantities.QUANTITIES`; None if ovqk does not compute it.
        options: the function's arguments.
        reason: why ovqk does not compute it, or computes it in another way than the source.
        spread: a standard error that the source states, in place of the rounding; None if it states none.
    """

    name: str
    subject: Subject
    quantity: str
    definition: str
    value: str
    relation: Relation
    source: str
    place: str
    kind: Kind
    needs: tuple[Needs, ...]
    function: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    spread: str | None = None

    @property
    def tolerance(self) -> float | None:
        """Half a unit of the last printed digit, or the spread that the source states; None for bounds and sets."""
        if self.relation != "equals":
            return None
        return float(self.spread) if self.spread is not None else half_a_unit(self.value)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The published value as a number, or a set's members."""
        return tuple(float(part) for part in self.value.split())


def half_a_unit(value: str) -> float:
    """Return half a unit of a printed number's last digit: 0.005 for "0.15", 0.5 for "3"."""
    exponent = Decimal(value).as_tuple().exponent
    return float(Decimal(5).scaleb(int(exponent) - 1))


@cache
def statements() -> tuple[Statement, ...]:
    """Return all statements, in the file's order."""
    return read_statements(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def read_statements(data: Mapping[str, Any]) -> tuple[Statement, ...]:
    """Return the statements that a file holds.

    Raises:
        UserError: an entry is wrong; the message names it.
    """
    subjects = {name: _subject(name, each) for name, each in data["models"].items()}
    found: list[Statement] = []
    for entry in data["statements"]:
        base = {key: value for key, value in entry.items() if key != "of"}
        for one in entry.get("of") or [{}]:
            found.append(_statement(base | one, subjects, data["sources"]))
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"statements: two are named {', '.join(twice)}; allowed: one of each name.")
    return tuple(found)


def _subject(name: str, entry: Mapping[str, Any]) -> Subject:
    local, choices = tuple(entry.get("local", ())), tuple(entry.get("choices", ()))
    return Subject(name, entry.get("choice"), local, choices, entry.get("origin", ""))


def _statement(entry: Mapping[str, Any], subjects: Mapping[str, Subject], sources: Mapping[str, str]) -> Statement:
    entry = dict(entry)
    model, source = str(entry.pop("model", "")), str(entry.pop("source", ""))
    key = f"statement {entry.get('name', model)}"
    for what, value, allowed in (("model", model, subjects), ("source", source, sources)):
        if value not in allowed:
            raise UserError(f"{key}: {what}={value}: allowed: {', '.join(allowed)}.")
    entry["name"] = f"{model}/{entry['name']}"
    entry["value"] = str(entry["value"])
    entry["needs"] = tuple(entry["needs"])
    relation, kind = entry.setdefault("relation", "equals"), entry.setdefault("kind", "published")
    for what, value, some in (("relation", relation, Relation), ("kind", kind, Kind)):
        if value not in get_args(some):
            raise UserError(f"{key}: {what}={value}: allowed: {', '.join(get_args(some))}.")
    entry.setdefault("place", "")
    function = entry.setdefault("function", None)
    if function is None and not entry.get("reason"):
        raise UserError(f"{key}: has neither `function` nor `reason`; allowed: one of them at least.")
    try:
        [Decimal(part) for part in entry["value"].split()]
        found = Statement(subject=subjects[model], source=sources[source], **entry)
    except (TypeError, InvalidOperation) as error:
        raise UserError(f"{key}: {error}; allowed: the fields of Statement, and numbers as values.") from error
    return found
