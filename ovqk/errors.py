"""Errors as a person reads them, and the one place where a user's mistake ends a command."""

import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ovqk.interrupts import end_with, importing_is_over, remembered, work_is_over

SECRET = re.compile(
    r"(^|_)(KEY|TOKEN|SECRET|PASSPHRASE|CREDENTIAL|PASS|PAT)S?(_|$)|_PWD(_|$)|^SSHPASS$|API_?KEY|PASSWORD|PASSWD",
    re.IGNORECASE,
)
"""Matches environment variables, by name, that hold a secret: PAT is a personal access token. PWD is a folder."""
PLACE = re.compile(r"_(PATH|FILE|DIR|HOME|URL)$", re.IGNORECASE)
"""Matches environment variables, by name, that hold a place in which a secret may lie."""
IN_ADDRESS = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
"""Matches an address with a user's password, such as a proxy's; its group is the password."""
SHORTEST_SECRET = 8
"""A secret's least length in letters: a shorter value, such as "true", is no secret, and other texts may contain it."""
SHOWS_TRACEBACK = "OVQK_TRACEBACK"
"""If this environment variable is 1, a user's mistake shows its traceback too; HYDRA_FULL_ERROR=1 sets it."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Matches characters that steer a terminal instead of being shown, and halves of characters, which no file or table
takes; it does not match tabs and line ends."""
CLOSED_PIPE = 141
"""The shell's exit status for a command whose reader went away."""
INTERRUPTED = 130
"""The shell's exit status for a command that Ctrl-C ended."""


class UserError(Exception):
    """A mistake in a config, a path, a checkpoint or a task.

    The message names the key, says what is wrong and what is allowed. It is shown without a traceback; every other
    error is a defect in ovqk and keeps its traceback.
    """


@contextmanager
def one_message() -> Iterator[None]:
    """End a tool with one message and no traceback at a user's mistake (status 1) and at Ctrl-C. Also a decorator.

    Raises:
        SystemExit: a UserError was raised inside, or Ctrl-C came.
    """
    importing_is_over()
    try:
        with one_mistake():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if not was_interrupted(error):
            raise
        end_command("interrupted.", INTERRUPTED)
    finally:
        work_is_over()


@contextmanager
def one_mistake() -> Iterator[None]:
    """End the command with one message, status 1 and no traceback if the user made a mistake. Also a decorator.

    Raises:
        SystemExit: a UserError was raised inside.
        KeyboardInterrupt: the error came from one.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        if os.environ.get(SHOWS_TRACEBACK) == "1":
            traceback.print_exception(error)
        end_command(str(error))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(CLOSED_PIPE) from None


def print_any_text() -> None:
    """Let standard output and error take any text: a letter that the terminal does not have becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def was_interrupted(error: BaseException | None) -> bool:
    """Say whether an error is Ctrl-C or came from it, because a library may turn Ctrl-C into its own error."""
    if remembered():
        return True
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def end_command(message: str, status: int = 1) -> NoReturn:
    """End the command with one message on standard error.

    Raises:
        SystemExit: always, with this status.
    """
    print(f"ovqk: {printable(without_secrets(message))}", file=sys.stderr)
    if status == INTERRUPTED:
        end_with(status)
    raise SystemExit(status)


def told(error: BaseException) -> str:
    """Return an error in words: a user's mistake by its message, anything else with its type."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return printable(without_secrets(said))


def printable(text: str) -> str:
    """Write each control character in a text as Python does, because the text may name someone else's file."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def secrets() -> dict[str, str]:
    """Return the secrets in environment variables, by name, the longest first: a value, or an address's password."""
    found = {}
    for name, value in os.environ.items():
        if SECRET.search(name) and not PLACE.search(name):
            found[name] = value
        elif password := IN_ADDRESS.search(value):
            found[name] = password[1]
    long = [item for item in found.items() if len(item[1]) >= SHORTEST_SECRET]
    return dict(sorted(long, key=lambda item: -len(item[1])))


def without_secrets(text: str) -> str:
    """Replace each secret environment variable's value in a text by `$NAME`."""
    for name, value in secrets().items():
        text = text.replace(value, f"${name}")
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the next if a colon announces it; empty if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the option that is spelled most like a name; empty if none is like it."""
    near = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.65)
    return f" Did you mean {near[0]}?" if near else ""
