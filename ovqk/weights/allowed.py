"""The values that config.json's keys may have, checked before transformers reads them: it says less, or nothing."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ovqk.errors import UserError
from ovqk.weights.family import Family

Rule = tuple[Callable[[Any], bool], str]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_integer(value: Any) -> bool:
    return is_integer(value) and value > 0


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


POSITIVE: Rule = (_positive, "a finite number above 0")
POSITIVE_INTEGER: Rule = (_positive_integer, "an integer above 0")
SHARE: Rule = (lambda value: _positive(value) and value <= 1, "a number above 0 and up to 1")
FACTORS: Rule = (
    lambda value: isinstance(value, list) and bool(value) and all(map(_positive, value)),
    "a list of finite numbers above 0",
)
OBJECT: Rule = (lambda value: value is None or isinstance(value, Mapping), "an object, or null")
NAME: Rule = (lambda value: isinstance(value, str), "a string")

LAYERS: dict[str, Rule] = {
    "head_dim": _or_null(POSITIVE_INTEGER),
    "sliding_window": (
        lambda value: value is None or (is_integer(value) and value >= 0),
        "an integer of 0 or more, or null",
    ),
    "layer_types": _or_null((lambda value: isinstance(value, list) and all(map(NAME[0], value)), "a list of strings")),
    "no_rope_layers": _or_null(
        (lambda value: isinstance(value, list) and all(map(is_integer, value)), "a list of 0 and 1")
    ),
}
"""Rules for keys about heads and layers."""
TOP: dict[str, Rule] = {
    "rope_theta": POSITIVE,
    "rope_local_base_freq": POSITIVE,
    "rotary_emb_base": POSITIVE,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "original_max_position_embeddings": _or_null(POSITIVE_INTEGER),
}
"""Rules for keys about rotary positions."""
SHARES: dict[str, Rule] = {"partial_rotary_factor": _or_null(SHARE), "rotary_pct": _or_null(SHARE)}
"""Rules for keys that say which share of a head is rotated, in families that read them."""
INSIDE: dict[str, Rule] = {
    "rope_type": NAME,
    "type": NAME,
    "rope_theta": POSITIVE,
    "factor": _or_null(POSITIVE),
    "attention_factor": _or_null(POSITIVE),
    "beta_fast": _or_null(POSITIVE),
    "beta_slow": _or_null(POSITIVE),
    "mscale": _or_null((lambda value: is_number(value) and value >= 0, "a finite number of 0 or more")),
    "mscale_all_dim": _or_null((lambda value: is_number(value) and value >= 0, "a finite number of 0 or more")),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "original_max_position_embeddings": _or_null(POSITIVE_INTEGER),
}
"""Rules for keys in `rope_scaling` and `rope_parameters`."""
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""Rotary scaling -> the keys that it cannot do without."""


def refuse_wrong_values(label: str, config: Mapping[str, Any], family: Family) -> None:
    """Refuse a config.json in which a value has the wrong type or is out of range.

    Raises:
        UserError: there is one; the message names it, and what is allowed.
    """
    text = config.get("text_config")
    for path, place in (("", config), *([("text_config.", text)] if isinstance(text, Mapping) else [])):
        _check(label, path, place, LAYERS)
        for key in ("layer_types", "no_rope_layers"):
            layers, given = place.get("num_hidden_layers"), place.get(key)
            if given and is_integer(layers) and len(given) != layers:
                raise UserError(
                    f"{label}: config.json gives '{path}{key}' {len(given)} long; allowed: an entry for each of the "
                    f"{layers} layers."
                )
        pattern = place.get("sliding_window_pattern")
        if "window" in family.keys and not place.get("layer_types") and not _or_null(POSITIVE_INTEGER)[0](pattern):
            raise UserError(
                f"{label}: config.json gives '{path}sliding_window_pattern' as {pattern!r} and no '{path}layer_types'; "
                "allowed: an integer above 0, or 'layer_types', a kind for each layer."
            )
        if family.positions == "rotary":
            _check_rotations(label, path, place, SHARES if family.partial_rotary else {})


def _check_rotations(label: str, path: str, place: Mapping[str, Any], shares: Mapping[str, Rule]) -> None:
    _check(label, path, place, {**TOP, **shares})
    for key in ("rope_scaling", "rope_parameters"):
        for where, parameters in _settings(f"{path}{key}", place.get(key) or {}):
            _check(label, f"{where}.", parameters, {**INSIDE, **shares})
            name = parameters.get("rope_type", parameters.get("type"))
            missing = [needed for needed in NEEDED.get(name, ()) if parameters.get(needed) is None]
            if missing:
                raise UserError(
                    f"{label}: config.json scales rotary positions by '{name}' and does not give "
                    f"'{where}.{missing[0]}'; allowed: {INSIDE[missing[0]][1].removesuffix(', or null')}."
                )


def _settings(path: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return the settings for all layers, or those for each layer kind."""
    yield path, settings
    for kind, inner in settings.items():
        if isinstance(inner, Mapping):
            yield f"{path}.{kind}", inner


def _check(label: str, path: str, place: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for key, (fits, allowed) in rules.items():
        if key in place and not fits(place[key]):
            raise UserError(f"{label}: config.json gives '{path}{key}' as {place[key]!r}; allowed: {allowed}.")


# --- what transformers says ---------------------------------------------------------------------------------------

KINDS = {
    "int": "an integer",
    "float": "a number with a decimal point",
    "str": "a string",
    "bool": "true or false",
    "list": "a list",
    "dict": "an object",
    "NoneType": "null",
}


def reworded(error: Exception) -> str:
    """Say why transformers does not read a config, without the words that Python's own exceptions add."""
    told = " ".join(str(error).split())
    field = re.search(r"error for field '(\w+)'.*\(value: (.*)\)", told)
    if field is not None:
        types = re.search(r"doesn't match any type in \((.*?)\)\. Errors", told)
        named = re.findall(r"\w+", types[1]) if types else re.findall(r"expected (\w+), got", told)
        allowed = dict.fromkeys(KINDS[name] for name in named if name in KINDS)
        return f"'{field[1]}' is {field[2]}" + (f"; allowed: {' or '.join(allowed)}" if allowed else "")
    if isinstance(error, KeyError) and len(error.args) == 1:
        said = str(error.args[0])  # a key, or transformers' sentence on several
        return said if " " in said else f"'{said}' is missing"
    kind, _, reason = told.rpartition("Error: ")
    if isinstance(error, TypeError | AttributeError | KeyError | IndexError) or kind.endswith(("Type", "Attribute")):
        return "a key has a value of a kind that transformers does not take"
    return reason or "transformers gives no reason"
