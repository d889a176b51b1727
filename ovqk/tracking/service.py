"""W&B's service, the process that works for the wandb module. This is the only module that imports wandb.

The service is kept quiet, waited for within bounds, and checked against its own log.
"""

import contextlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from ovqk.errors import UserError, first_line
from ovqk.scratch import scratch_folder

INIT_SECONDS = 30.0  # the server must know the run by then; WANDB_INIT_TIMEOUT sets another time
FINISH_SECONDS = 60.0  # the server must have received it by then; WANDB_FINISH_TIMEOUT sets another time
LONGEST_SECONDS = 86_400.0  # the longest time that an environment variable may set
GRACE_SECONDS = 10.0  # if the service does not keep these times itself, it is killed this much later
WRITTEN_SECONDS = 5.0  # an offline run must be on disk this soon after W&B has finished it
LOG_MARK = b":W&B"  # W&B's log for an offline run begins like this
LOG_BLOCK, LOG_HEADER = 2**15, 7  # bytes; the file's own header is as long as a piece's
WHOLE, FIRST, LAST = 1, 2, 4  # kinds of record pieces in that log; 3 is a middle piece
SWITCH_SECONDS = 1e-4  # how long a thread runs Python before another may; torch asks for its turn after every call
STAGES = ("filestream:", "file transfer:", "runfiles:", "sender:")  # an upload's stages, in W&B's own log for a run

starting: list[threading.Thread] = []
"""Threads from `start_meanwhile` that nobody has waited for."""


class NotReceivedError(Exception):
    """The server did not take a whole run."""


@contextlib.contextmanager
def quiet_wandb() -> Iterator[tuple[Any, subprocess.Popen[bytes]]]:
    """Yield the wandb module and its service process.

    Inside, W&B prints nothing, asks for no key and reports no errors to its makers. After a failure the service is
    killed, so that nobody waits for it and the next cell starts another.
    """
    while starting:
        starting.pop().join()
    _settle_environment()
    import wandb

    session, service = _service(wandb)
    if service.poll() is not None:  # killed since it was started, for instance while a cell was computed
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()
        session, service = _service(wandb)
    wandb.termsetup(wandb.Settings(silent=True), None)
    try:
        yield wandb, service
    except BaseException:
        if wandb.run is None:  # else the caller has an open run
            service.kill()
            service.wait()
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()
        raise
    finally:
        wandb.termsetup(session.settings, None)


def _service(wandb: Any) -> tuple[Any, subprocess.Popen[bytes]]:
    session = wandb.setup()
    return session, session.ensure_service()._proc._process


def _settle_environment() -> None:
    """Set the environment variables that W&B reads when it is imported."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if "wandb" not in sys.modules:  # importing it makes temporary folders, which a killed process leaves behind
        tempfile.tempdir = str(scratch_folder())
    os.environ.pop("WANDB_SERVICE", None)  # a parent's service: this process has its own
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # an empty variable counts as not set, and W&B refuses some
    try:
        cache = os.environ.get("WANDB_CACHE_DIR") or platformdirs.user_cache_dir("wandb")
        Path(cache).expanduser().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # it cannot be written, and the service would complain about that at length
        os.environ["WANDB_CACHE_DIR"] = tempfile.mkdtemp(prefix="wandb-", dir=scratch_folder())


def start_meanwhile() -> None:
    """Import wandb and start its service in a thread, while a cell is computed; together they take a second."""

    def start() -> None:
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            with contextlib.suppress(Exception, SystemExit):  # the code that needs them will meet the error
                importlib.import_module("wandb").setup().ensure_service()
                importlib.import_module("wandb.sdk.launch.inputs.internal")  # a run's first step needs it
        finally:
            sys.setswitchinterval(before)

    if "wandb" not in sys.modules and not starting:
        _settle_environment()
        starting.append(threading.Thread(target=start, name="start wandb"))
        starting[-1].start()


def settings() -> dict[str, Any]:
    """Return settings for W&B: no console output, nothing about the machine or the code, and bounded waiting.

    Raises:
        UserError: a time in the environment is not a number.
    """
    return {
        "silent": True,
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "save_code": False,
        "symlink": False,
        "use_dot_wandb": False,
        "program": "run.py",
        "host": "",  # the machine's name is private
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,  # the record holds the versions
        "init_timeout": _seconds("WANDB_INIT_TIMEOUT", INIT_SECONDS),
        "finish_timeout": _seconds("WANDB_FINISH_TIMEOUT", FINISH_SECONDS),
        "finish_timeout_raises": True,
    }


def _seconds(name: str, default: float) -> float:
    value = os.environ.get(name) or default
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_SECONDS:
        raise UserError(f"{name}={value}: must be a number of seconds in 0 .. {LONGEST_SECONDS:.0f}")
    return seconds


@contextlib.contextmanager
def staged_in(directory: Path) -> Iterator[None]:
    """Stage tables beside the results and not in the home folder, unless the user chose a place."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(directory)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


@contextlib.contextmanager
def within(seconds: float, service: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill W&B's service if it takes much longer: its own limits fail if a server dies at a bad moment.

    Raises:
        TimeoutError: the service was killed.
    """
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        service.kill()  # every wait for it ends with an error

    timer = threading.Timer(seconds + GRACE_SECONDS, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if expired.is_set():
            raise TimeoutError(f"W&B did not answer within {seconds + GRACE_SECONDS:.0f} s") from error
        raise
    finally:
        timer.cancel()


def finish(run: Any) -> None:
    """Wait until the run is written (offline) or received (online).

    Raises:
        NotReceivedError: the server did not take the whole run in time, or refused a part.
    """
    log, offline = Path(run.settings.log_internal), run.settings._offline
    try:
        run.finish()
        if offline:
            wait_for_end(Path(run.settings.sync_file))
    except TimeoutError as error:
        raise NotReceivedError(": ".join([str(error).rstrip("."), *_errors(log)[:1]])) from error
    refused = [message for message in _errors(log) if message.startswith(STAGES)]
    if refused:
        raise NotReceivedError(refused[0])


def wait_for_end(log: Path) -> None:
    """Wait until an offline run's log has its exit record, which is written a little after W&B says it is finished.

    Raises:
        NotReceivedError: the record does not come, for instance because the service was killed at that moment.
    """
    deadline = time.monotonic() + WRITTEN_SECONDS
    while not reaches_its_exit(log):
        if time.monotonic() > deadline:
            raise NotReceivedError("W&B's service on this machine ended before the run was written")
        time.sleep(0.01)


def reaches_its_exit(log: Path) -> bool:
    """Say whether the last record in an offline run's log is its exit; True if the log has another format.

    The log has LevelDB's format: 32 kB blocks, and records in one or more pieces, each after its checksum, length and
    kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

    with log.open("rb") as file:
        if (mark := file.read(len(LOG_MARK))) != LOG_MARK:
            return len(mark) == len(LOG_MARK)
        size = file.seek(0, os.SEEK_END)
        at = max(0, (size - 1) // LOG_BLOCK - 1) * LOG_BLOCK  # the last record begins in one of the last two blocks
        file.seek(at)
        data = file.read()
    position, last, begun = LOG_HEADER if at == 0 else 0, b"", b""
    while position + LOG_HEADER <= len(data):
        if LOG_BLOCK - position % LOG_BLOCK < LOG_HEADER:  # the rest of a block is left empty
            position += LOG_BLOCK - position % LOG_BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        piece = data[position + LOG_HEADER : position + LOG_HEADER + length]
        begun = piece if kind in (WHOLE, FIRST) else begun + piece
        last = begun if kind in (WHOLE, LAST) else b""
        position += LOG_HEADER + length
    try:
        return bool(Record.FromString(last).HasField("exit"))
    except Exception:  # protobuf's DecodeError, if a record is cut short
        return False


def _errors(log: Path) -> list[str]:
    """Return the errors in W&B's own log for a run. Only this log mentions a refused file."""
    messages = []
    with contextlib.suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                entry = json.loads(line)
                if entry["level"].startswith("ERROR") and not entry["msg"].startswith("api:"):
                    text = re.sub(r"\?\S*", "", " ".join(entry["msg"].split()))  # leaves out signed addresses
                    messages.append(text[:300])
    return messages


def in_words(error: Exception) -> str:
    """Return an error in one line, without the values that it names, because one may be an API key."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "ValidationError":  # pydantic's, about values in W&B's environment or files
        refused = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]  # type: ignore[attr-defined]
        return f"W&B's setting {'; '.join(refused)}"
    text = first_line(error) or "W&B's service on this machine ended"
    return f"{type(error).__name__}: {text}"


def is_of_server(error: Exception) -> bool:
    """Say whether the server failed, so that the next cell would fail too; False if only the service was killed."""
    wandb = sys.modules.get("wandb")
    return wandb is not None and isinstance(error, (wandb.Error, TimeoutError, NotReceivedError))
