"""A model hub on loopback, as far as huggingface_hub asks one: what was asked is kept, and it can be made to fail.

Large files (`.safetensors`) are answered as the hub does, by a redirect to another host that knows byte ranges.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


@dataclass
class Sent:
    """A body that was sent: the file, the first byte and how many."""

    name: str
    start: int
    size: int


@dataclass
class Hub:
    """A context manager: inside it the hub answers at `url` with one repository.

    Attributes:
        files: by name, what the repository holds.
        requests: METHOD and path, in order.
        sent: bodies of files, in order.
        answers: METHOD and path, as a pattern -> (HTTP status, X-Error-Code) to answer with instead.
        hang: METHOD and path, as a pattern, of requests that get no answer.
        cut: names of large files whose body ends after half of what was promised.
        short: names of large files of which half is promised, and sent.
        deaf: names of large files that are sent whole whatever the range.
        spared: bodies that begin before this byte are sent as they should be.
        pause: seconds before each body of a large file.
        revisions: revision -> its files, if the repository keeps some besides `main`; each is a commit of its own.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    hang: str | None = None
    cut: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    deaf: set[str] = field(default_factory=set)
    spared: int = 0
    pause: float = 0.0
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit; None if there is no such revision."""
        if revision in ("main", COMMIT):
            return COMMIT
        commits = {name: _commit(name) for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files_at(self, revision: str) -> dict[str, bytes]:
        """The files of a revision that there is."""
        return next((held for name, held in self.revisions.items() if revision in (name, _commit(name))), self.files)

    def __enter__(self) -> "Hub":
        self.closing, self.lock = threading.Event(), threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage = f"http://localhost:{self.server.server_address[1]}"  # another host to who looks at names
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def hold(self, directory: Path) -> None:
        """The files of a directory are the repository's."""
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}

    def forget(self) -> None:
        """What was asked and sent so far."""
        self.requests.clear()
        self.sent.clear()

    def bytes_of(self, name: str) -> int:
        """How many bytes of a file were sent in all."""
        return sum(sent.size for sent in self.sent if sent.name == name)


def _commit(revision: str) -> str:
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the hub."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # two small writes would wait for each other

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        if self.hub.hang is not None and re.search(self.hub.hang, request):
            self.hub.closing.wait(120)
            self.close_connection = True
            return
        for pattern, (status, code) in self.hub.answers.items():
            if re.search(pattern, request):
                self._fail(status, code)
                return
        if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/storage/(.+)", path):
            self._storage(match[1])
        elif match := re.fullmatch(rf"/api/models/{REPO}/(revision|tree)/([^/]+)", path):
            if self._known(match[2]):
                about = {"id": REPO, "sha": self.hub.commit(match[2])}
                self._json(about if match[1] == "revision" else self._tree(self.hub.files_at(match[2])))
        else:
            self._fail(401, "RepoNotFound")

    def _known(self, revision: str) -> bool:
        if self.hub.commit(revision) is not None:
            return True
        self._fail(404, "RevisionNotFound")
        return False

    def _resolve(self, revision: str, name: str) -> None:
        if not self._known(revision):
            return
        files, commit = self.hub.files_at(revision), str(self.hub.commit(revision))
        if name not in files:
            self._fail(404, "EntryNotFound")
            return
        data = files[name]
        headers = {"X-Repo-Commit": commit}
        if name.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            self._send(302, headers | {"Location": f"{self.hub.storage}/storage/{commit}/{name}"}, b"")
        else:
            self._note(name, 0, len(data))
            self._send(200, headers | {"ETag": f'"{_git_hash(data)}"'}, data)

    def _storage(self, name: str) -> None:
        commit, _, name = name.partition("/")
        data, start, status, headers = self.hub.files_at(commit)[name], 0, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not (name in self.hub.deaf and int(asked[1]) >= self.hub.spared):
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            status, headers = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            data = data[start:stop]
        touched = asked is None or int(asked[1]) >= self.hub.spared
        if name in self.hub.short and touched:
            data = data[: len(data) // 2]
        self.hub.closing.wait(self.hub.pause)
        if name in self.hub.cut and touched:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self._note(name, start, len(data))
        self._send(status, headers, data)

    def _tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "onnx"}]
        for name, data in files.items():
            entry = {"type": "file", "oid": _git_hash(data), "size": len(data), "path": name}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _note(self, name: str, start: int, size: int) -> None:
        if self.command == "GET":
            with self.hub.lock:
                self.hub.sent.append(Sent(name, start, size))

    def _json(self, content: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _fail(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Repo-Commit": COMMIT} if code else {}
        self._send(status, headers | ({"Retry-After": "300"} if status == 429 else {}), b"{}")

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
