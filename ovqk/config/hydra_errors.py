"""One message for a mistake in a choice, made from Hydra's and OmegaConf's errors; mistyped keys are refused here."""

import difflib
import errno
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml

from ovqk.config import composing, lens_names, schema
from ovqk.config.command_line import TOOLS, program, quoted, tool
from ovqk.errors import UserError, first_line

LISTED, NEAREST = 20, 9
"""How many names of choices a message lists, and how many near ones if there are more."""
ASKS_FOR = dict.fromkeys(("papers", "publications", "literature", "statements", "reproduction"), "published")
"""A word that is no command -> the command that does what it asks for."""
ALIASES = {"gpt2-small": "gpt2"}
"""A name that TransformerLens also takes for a model -> its name here, if the two are not spelled alike."""


def check_keys(arguments: Iterable[str]) -> None:
    """Refuse a mistyped key on the command line, and name the keys that are allowed in its group.

    Raises:
        UserError: a key is not allowed.
    """
    for argument in arguments:
        match = re.fullmatch(r"\+{0,2}([A-Za-z_][\w./-]*)=(.*)", argument, flags=re.DOTALL)
        if match is None or re.split("[./]", match[1])[0] == "hydra":
            continue
        place: type = schema.Config
        parts = match[1].split(".")
        for depth, part in enumerate(parts):
            if not is_dataclass(place):
                break
            allowed = {field.name: field.type for field in fields(place)}
            if part not in allowed:
                near = difflib.get_close_matches(part, allowed, n=1)
                hint = f" Did you mean {'.'.join([*parts[:depth], *near])}?" if near else ""
                hint = hint or _tool_meant(match[2]) or _tool_meant(part)
                where = ".".join(parts[:depth])
                scope = f" under {where}" if where else ""
                raise UserError(f"{match[1]}: no such key.{hint} Allowed{scope}: {', '.join(sorted(allowed))}.")
            inner = allowed[part]
            if parts[depth + 1 :] and _is_value(inner):
                whole, joined = ".".join(parts[: depth + 1]), "_".join(parts[depth : depth + 2])
                hint = f" Did you mean {'.'.join([*parts[:depth], joined])}?" if joined in allowed else ""
                raise UserError(f"{match[1]}: no such key; {whole} is one value and has no keys.{hint}")
            place = inner if isinstance(inner, type) else object


def _is_value(kind: Any) -> bool:
    """Whether a key of this type holds one value, and is no group, list or mapping."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else [kind]
    return all(isinstance(each, type) and issubclass(each, str | int | float | Enum | type(None)) for each in kinds)


def mistakes(error: BaseException, folders: Iterable[Path]) -> list[str]:
    """Return the lines of a message about a mistaken choice: the key, what is wrong with it and what is allowed.

    Args:
        error: the error that Hydra or OmegaConf raised.
        folders: folders with config files, to say where in a file the mistake is.
    """
    if getattr(error, "missing_cfg_file", None):
        return [_unknown_choice(error, folders)]
    lines = [line for e in (error, error.__cause__) if e is not None for line in str(e).splitlines()]
    found = [match for line in lines if (match := re.fullmatch(r"\s*(\w+)[:=] ?(.*)", line))]
    facts = {match[1]: match[2] for match in found if match[1] in ("full_key", "object_type", "reference_type")}
    told = list(dict.fromkeys(line for line in lines if line.lstrip().split("=")[0].split(":")[0] not in facts))
    if match := re.match(r"Ambiguous value for argument '(.*)'$", lines[0] if lines else ""):
        return [f"{match[1]}: several values need -m, which computes a cell for each: {program()} -m {match[1]}"]
    if "override_grammar" in str(error) and (said := _unparsed(error, lines)):
        return [said]
    if "full_key" not in facts:
        override = getattr(error, "override", None)  # what could not be parsed
        return [f"{override}: {told[0]}", *told[1:]] if override and override not in told[0] else told
    key, place = facts["full_key"], getattr(schema, facts.get("object_type", ""), None)
    what = next((line for line in told if line.startswith(("Invalid value ", "Value ", "Key "))), told[-1])
    value = re.match(r"(?:Invalid value|Value) '(.*?)'", what)
    if (allowed := re.search(r"expected one of \[(.*)\]", what)) and value:
        what = f"{what}. {_meant(value[1], allowed[1].split(', '))}".rstrip(" .")
    group = next((field.type for field in fields(schema.Config) if field.name == key), None)
    if what.startswith("Invalid type assigned") and is_dataclass(group):
        keys = ", ".join(f"{key}.{one.name}" for one in fields(group))
        what = f"it has no value of its own, but keys; allowed: {keys}"
    if what.startswith("Key ") and is_dataclass(place):
        what = f"no such key; allowed: {', '.join(field.name for field in fields(place))}"
    if match := re.match(r"Error merging override (([^=]*)=.*)", told[0]):
        return [f"{match[1]}: {what}" + ("" if re.sub(r"\[(\d+)\]", r".\1", key) == match[2] else f" ({key})")]
    if match := re.match(r"In '([^']+)'", told[0]):
        files = [path for folder in folders if (path := folder / f"{match[1]}.yaml").is_file()]
        places = _places(yaml.safe_load(files[0].read_text("utf-8")), key, value and value[1]) if files else []
        return [f"{match[1]}.yaml: {', '.join(places) or key}: {what}"]
    return [f"{key}: {what}"]


def of_hydra(error: Exception) -> str | None:
    """Return the message for an error of another kind that Hydra ran into, as a failed assertion, over a choice.

    Returns:
        The override, if Hydra was at work on one, and the error; None if code of ovqk raised it.
    """
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # nobody reads the help any more
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    if "hydra.main" not in names:
        return None
    inside = len(names) - names[::-1].index("hydra.main")
    if any(name.split(".")[0] == "ovqk" and name != composing.__name__ for name in names[inside:]):
        return None
    return untold(error, "hydra")


def untold(error: BaseException, otherwise: str) -> str:
    """Return the message for an error about which nothing else is known: the override at hand, or else a key."""
    held = [frame.f_locals.get("override") for frame, _ in traceback.walk_tb(error.__traceback__)]
    overrides = [str(line) for each in held if (line := getattr(each, "input_line", None))]
    files = [frame.f_locals.get("full_path") for frame, _ in traceback.walk_tb(error.__traceback__)]
    at = next((text for text in [*overrides[::-1], *files[::-1]] if isinstance(text, str)), otherwise)
    hint = ""
    if at.lstrip("+~").startswith("hydra.sweeper.params"):
        hint = " A sweep's values are KEY=A,B behind -m, or KEY: A,B below hydra.sweeper.params in a config file."
    return f"{at}: Hydra does not take it ({type(error).__name__}: {first_line(error) or 'no more is said'}).{hint}"


def _unknown_choice(error: Any, folders: Iterable[Path]) -> str:
    """Say which model, task or other config file does not exist, which names are near, and how to see them all."""
    group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
    first, _, rest = group.partition("/")
    if first != "hydra" and rest:  # a name with a slash in it, as the hub has them
        group, name = first, f"{rest}/{name}"
    parent = re.match(r"In '([^']+)'", str(error))
    where = f"{parent[1]}.yaml: " if parent and parent[1] not in ("config", "hydra/config") else ""
    if group:
        options = list(error.options or ())
        said = f"{where}{group}={name}: there is no such {group.split('/')[-1]}."
    else:
        files = {path.stem for folder in folders for path in folder.glob("*.yaml")}
        options = sorted(files - {"config", "settings"})
        said = f"{where}-cn {name}: there is no {name}.yaml in conf/ or in a folder named by -cd."
    if len(options) <= LISTED:
        meant = _meant(name, options) or f"{_tool_meant(name)} ".lstrip()
        return f"{said} {meant}Allowed: {', '.join(options)}." if options else said
    near = close_names(name.rpartition("/")[2], options)
    hint = f" Did you mean {_either(near)}?" if near else _tool_meant(name)
    if group != "model":
        return f"{said}{hint} There are {len(options)}."
    hint = _of_transformer_lens(name, near, folders) or f"{hint}{_own_model(name)}"
    return f"{said}{hint} `{program()} --help` lists all {len(options)}."


def _of_transformer_lens(name: str, near: list[str], folders: Iterable[Path]) -> str:
    """Say which model has this name in TransformerLens, and how it is chosen here; empty if none has it."""
    repo = lens_names.repository(name)
    if repo is None:
        return ""
    if here := lens_names.names_here(repo, folders):
        return f" Did you mean {_either(here)}? TransformerLens calls it {name}."
    if "/" not in repo:  # weights that were never on the hub
        return ""
    other = f" {near[0]} is another model." if near and near[0].startswith(name.lower()) else ""
    return f" TransformerLens's {name} is model=hub {quoted('model.repo', repo)}.{other}"


def _own_model(name: str) -> str:
    """Say how a path, or a repository on the hub, is chosen, if the name looks like one."""
    if (
        name.startswith(("/", "./", "../", "~"))
        or Path(name).suffix in (".gguf", ".safetensors")
        or Path(name).exists()
    ):
        return f" A path is model=local {quoted('model.path', name)}."
    if name.count("/") == 1:
        return f" A repository on the hub is model=hub {quoted('model.repo', name)}."
    return (
        " A checkpoint of your own is model=local model.path=PATH; one on the hub is model=hub model.repo=OWNER/NAME."
    )


def _meant(name: str, options: Iterable[str]) -> str:
    """Return `Did you mean ...? ` for a name that is spelled like one of the options; empty for others."""
    options = list(options)
    begin = [option for option in options if name and option.startswith(name.lower())]
    near = begin[:1] or difflib.get_close_matches(name.lower(), options, n=1, cutoff=0.7)
    return f"Did you mean {near[0]}? " if near else ""


def _tool_meant(word: str) -> str:
    """Return ` Did you mean ...?` for a word that is spelled like a command or asks for what one does, else nothing."""
    near = difflib.get_close_matches(word.lower(), [*TOOLS, *ASKS_FOR], n=1, cutoff=0.7)
    return f" Did you mean the command {tool(ASKS_FOR.get(near[0], near[0]))}?" if near else ""


def _unparsed(error: BaseException, lines: list[str]) -> str | None:
    """Say how to quote a value that Hydra's grammar does not take as it is; None if that is not what is wrong."""
    found = re.search(r"(?:Error parsing override '|LexerNoViableAltException: )([^'\n]*)", "\n".join(lines))
    override = getattr(error, "override", None) or (found[1] if found else None)
    if override is None:
        return None
    key, equal, value = override.partition("=")
    if not equal:
        meant = _tool_meant(override)
        return f"{override}: no choice, which is KEY=VALUE.{meant} A value with a space in it is quoted: 'KEY=\"a b\"'."
    return f"{override}: the value has signs with a meaning of their own. Quote it: {quoted(key, value)}"


def close_names(name: str, options: Iterable[str]) -> list[str]:
    """Return at most NEAREST options: those that begin with the name, then those that are spelled like it."""
    options = sorted(options)
    alias = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.9)
    if alias and ALIASES[alias[0]] in options:
        return [ALIASES[alias[0]]]
    begin = [option for option in options if option.lower().startswith(name.lower())] if name else []
    like = difflib.get_close_matches(name.lower(), options, n=4, cutoff=0.65)
    return list(dict.fromkeys([*begin, *like]))[:NEAREST]


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _places(content: Any, key: str, value: str | None, at: str = "") -> Iterator[str]:
    """Yield the places in a file that hold this value (any, if None) under a key that ends like this one."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, inner in pairs:
        place = f"{at}.{name}".lstrip(".")
        if f".{place}".endswith(f".{key.split('.')[-1]}") and value in (None, str(inner)):
            yield place
        yield from _places(inner, key, value, place)
