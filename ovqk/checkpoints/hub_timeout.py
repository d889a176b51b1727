"""How long the hub is waited for, and one message for whatever it or the disk refuses."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ovqk.errors import UserError, first_line

DEFAULT = 10.0  # seconds that huggingface_hub waits if nothing is set
CONNECT = 10.0  # seconds that making a connection may take
CONNECT_AGAIN = 3.0  # the same to a host that could not be reached before
ATTEMPTS = 4  # to connect: the library makes the second at once, the third after one and the fourth after two seconds

unreached: set[str] = set()
"""Hosts that this process could not reach when it last tried: one short attempt is enough for each request."""


class UnansweredError(UserError):
    """The hub could not be reached, or fell silent: asking again soon would only cost the same wait again."""


class Patience:
    """How long nothing new from the hub is borne: the library alone would try again for minutes, without a word.

    Attributes:
        status: HTTP status of the last answer, if the library tries again after it.
        failure: the host that could not be reached, and why.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.since = seconds, time.monotonic()
        self.status: int | None = None
        self.failure: str | None = None
        self._attempts = 0  # to connect that failed, one after the other

    @property
    def over(self) -> bool:
        return time.monotonic() - self.since >= self.seconds

    def renew(self) -> None:
        self.since = time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Limit every request of the library inside to this time, and begin none once it is over."""
        from huggingface_hub import constants, set_client_factory
        from huggingface_hub.utils import logging
        from huggingface_hub.utils._http import default_client_factory

        def client() -> Any:
            made = default_client_factory()
            made.event_hooks["request"].append(self.before_request)
            made.event_hooks["response"].append(self._after)
            made.send = self._connecting(made.send)  # type: ignore[method-assign]
            return made

        verbosity, xet = logging.get_verbosity(), constants.HF_HUB_DISABLE_XET
        logging.set_verbosity_error()  # its retries are told by the one message at the end
        constants.HF_HUB_DISABLE_XET = True  # its client heeds no timeout of ours; the hub serves plain HTTP as well
        set_client_factory(client)
        try:
            yield
        finally:
            set_client_factory(default_client_factory)
            constants.HF_HUB_DISABLE_XET = xet
            logging.set_verbosity(verbosity)

    def before_request(self, request: Any) -> None:
        """Give a request its timeouts; raise TimeoutError if nothing new has come for the whole time."""
        if self.over:
            raise TimeoutError(f"nothing new for {self.seconds:g} s")
        own = request.extensions.get("timeout", {}).get("read") or DEFAULT
        limit = self.seconds if own >= DEFAULT else min(own, self.seconds)  # a request that may fail has a short one
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), limit) | {
            "connect": min(limit, CONNECT_AGAIN if request.url.host in unreached else CONNECT)
        }

    def _connecting(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a client's `send`, so that a host that cannot be reached in ATTEMPTS is given up.

        The library alone makes six, with 23 s of pauses. From this error it goes on as in its offline mode, with what
        its cache holds. An attempt that took all of its time counts for two.
        """
        from huggingface_hub.errors import OfflineModeIsEnabled

        def sent(request: Any, **keys: Any) -> Any:
            try:
                return send(request, **keys)
            except Exception as error:
                if type(error).__name__ not in ("ConnectError", "ConnectTimeout"):
                    raise
                host = getattr(error, "request", request).url.host
                self._attempts += 2 if type(error).__name__ == "ConnectTimeout" else 1
                if self._attempts < ATTEMPTS and host not in unreached:
                    raise
                unreached.add(host)
                cause = re.sub(r"^\[.*?\] ?", "", first_line(error))  # without an error number
                self.failure = f"{host}: {cause or 'no connection in time'}"
                raise OfflineModeIsEnabled(self.failure) from error

        return sent

    def _after(self, response: Any) -> None:
        unreached.discard(response.request.url.host)
        self._attempts = 0
        self.status = response.status_code if response.status_code in (408, 429, *range(500, 600)) else None
        if response.request.method == "HEAD" and response.status_code < 400:
            self.renew()  # a response with a body counts when the body has come
        if response.status_code == 429:
            for name in ("ratelimit", "retry-after"):  # for as long the library would sleep
                response.headers.pop(name, None)


class Bar:
    """A stand-in that huggingface_hub takes for a progress bar."""

    def __init__(self, patience: Patience, advance: Callable[[int], None], **_: Any) -> None:
        self.patience, self.advance = patience, advance

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, size: int) -> None:
        self.patience.renew()
        self.advance(size)


@contextmanager
def one_message(label: str, revision: str, patience: Patience) -> Iterator[None]:
    """Turn any refusal by the hub or the disk inside into one message for the user."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{label}: the repository is gated. Accept its licence and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{label}: model.revision={revision} does not exist in the repository.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{label}: no such repository, or it is private and you are not logged in.") from error
    except (HTTPError, OSError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        reason, unanswered = _reason(cause, patience)
        raise (UnansweredError if unanswered else UserError)(f"{label}: {reason}") from error


def _reason(error: BaseException, patience: Patience) -> tuple[str, bool]:
    """Return the error and its remedy, and whether the hub was waited for in vain."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    number = getattr(error, "errno", None)
    status = getattr(getattr(error, "response", None), "status_code", patience.status)
    if isinstance(number, int):  # an error of the disk; network errors have no number
        what = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else "a cache cannot be written"
        moves = "HF_HOME moves the Hugging Face cache, OVQK_CACHE_DIR ovqk's own."
        return f"{what} ({os.strerror(number)}). {moves}", False
    if status in (401, 403):
        login = "Look at `hf auth whoami`; log in with `hf auth login`."
        return f"the hub refuses access (HTTP {status}). {login}", False
    if status == 429:
        wait = "Wait some minutes, or log in with `hf auth login`."
        return f"the hub asks for fewer requests (HTTP 429). {wait}", False
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) or type(error).__name__ == "ConnectError":
        offline = constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else patience.failure
        reached = "the hub could not be reached" + (f" ({why})" if why else "")
        advice = "Connect once, or use model=local model.path=DIR."
        return f"not in the Hugging Face cache, and {reached}. {advice}", not offline
    if patience.over:
        last = "" if status is None else f"; it last answered HTTP {status}"
        silent = f"the hub delivered nothing for {patience.seconds:g} s (hub_timeout{last})"
        return (
            f"not in a cache, and {silent}. Run it again, or use model=local model.path=DIR.",
            status is None,
        )
    return f"the hub did not deliver the files ({type(error).__name__}: {first_line(error)}). Run it again.", False
