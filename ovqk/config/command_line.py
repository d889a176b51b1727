"""The command as a person types it from where they stand, for messages that name the next one."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Tool(NamedTuple):
    """A command beside the one that computes cells.

    Attributes:
        module: what `python -m` runs.
        command: the module whose `main` that is.
    """

    module: str
    command: str


TOOLS = {
    "report": Tool("ovqk.report", "ovqk.report.__main__"),
    "track": Tool("ovqk.tracking", "ovqk.tracking.__main__"),
    "fetch": Tool("ovqk.fetch", "ovqk.fetch"),
    "plan": Tool("ovqk.plan", "ovqk.plan"),
    "dashboard": Tool("ovqk.dashboard", "ovqk.dashboard"),
    "published": Tool("ovqk.published", "ovqk.published.__main__"),
}
"""Word after `ovqk` -> the tool."""


def program() -> str:
    """Return the command that computes cells, as it was started: `python run.py`, `ovqk` or `python -m ovqk`."""
    started = Path(sys.argv[0])
    if started.name == "run.py":
        return f"{python()} {shlex.quote(_near(started))}"
    return _installed() or f"{python()} -m ovqk"


def tool(name: str) -> str:
    """Return the command for one of TOOLS, as `program` was started."""
    installed = _installed()
    return f"{python()} -m {TOOLS[name].module}" if installed is None else f"{installed} {name}"


def send_command(results_dir: Path) -> str:
    """Return the command that sends a results folder's offline runs to W&B, also if WANDB_MODE keeps runs here."""
    online = "" if os.environ.get("WANDB_MODE", "online") in ("", "online") else "--mode online "
    return f"{tool('track')} {online}--all {shlex.quote(str(results_dir))}"


def python() -> str:
    """Return the interpreter as one types it here.

    It is a path if its virtual environment is below this folder, or if `python` and `python3` are other ones here.
    """
    executable = Path(sys.executable)
    if executable.is_relative_to(Path.cwd()):
        return shlex.quote(str(executable.relative_to(Path.cwd())))
    names = (name for name in ("python", "python3") if (found := shutil.which(name)) and _is_same(found, executable))
    return next(names, None) or shlex.quote(str(executable))


def _is_same(found: str, executable: Path) -> bool:
    """Say whether two paths are one interpreter with one environment, whose folder decides what is installed."""
    return Path(found).absolute().parent == executable.parent and executable.samefile(found)


def _installed() -> str | None:
    """Return the installed command `ovqk` as one types it here; None if this process was started otherwise."""
    started = Path(sys.argv[0])
    if started.name not in ("ovqk", "ovqk.exe"):
        return None
    return "ovqk" if shutil.which("ovqk") else shlex.quote(_near(started))


def _near(path: Path) -> str:
    """Return a path relative to this folder if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def config_folders(arguments: Sequence[str] | None = None) -> list[str]:
    """Return the folders that `-cd` names on a command line, this process's unless one is given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    found: list[str] = []
    for place, argument in enumerate(arguments):
        if argument in ("-cd", "--config-dir"):
            found += arguments[place + 1 : place + 2]
        elif argument.startswith("--config-dir="):
            found.append(argument.partition("=")[2])
    return found


MODEL_KEYS = ("model", "model.path", "model.repo")
"""Keys of which one names a model by its value alone."""


def choices_together(arguments: Sequence[str]) -> list[str]:
    """Return a command line with its choices, KEY=VALUE, before its options, each in their order.

    Hydra's argparse takes choices only in one run: with an option between them it calls the later ones unrecognized.
    """
    choices: list[str] = []
    others: list[str] = []
    before = ""
    for argument in arguments:
        plain = before not in WITH_VALUE and not argument.startswith("-") and ("=" in argument or argument[:1] == "~")
        (choices if plain else others).append(argument)
        before = argument
    return [*choices, *others]


WITH_VALUE = {
    "-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path", "-c", "--cfg", "-p", "--package",
    "--experimental-rerun",
}  # fmt: skip
"""Hydra's options that take the next word as their value."""
PLAIN = re.compile(r"[\w./+-]+")
"""Values that neither Hydra nor a shell takes for anything but text."""


def composable(key: str, value: str) -> str:
    """Return KEY=VALUE for Hydra: a value with odd characters is quoted."""
    if PLAIN.fullmatch(value):
        return f"{key}={value}"
    from hydra.core.override_parser.types import Quote, QuotedString

    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def model_argument(text: str) -> str:
    """Return the model that a tool's first argument names: as it stands, or as `model.path="PATH"` and so on name it.

    Errors and `--help` teach these choices for cells, so a tool takes them as well, in Hydra's quotes or bare.
    """
    key, equals, value = text.partition("=")
    if not equals or key not in MODEL_KEYS:
        return text
    quote = value[:1]
    if quote in ("'", '"') and len(value) > 1 and value.endswith(quote):
        value = value[1:-1].replace(f"\\{quote}", quote)
    return value


def quoted(key: str, value: str) -> str:
    """Return KEY=VALUE for Hydra in a shell: a value with odd characters is quoted for both."""
    return composable(key, value) if PLAIN.fullmatch(value) else shlex.quote(composable(key, value))
