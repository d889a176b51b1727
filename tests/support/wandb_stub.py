"""A W&B server on loopback, just large enough to receive runs and to hand out a sweep; it can be made to fail.

It answers the private operations that W&B 0.31 asks for, by their names: what uses it is marked `wandb_server`, since
another W&B may ask for others.
"""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ovqk.tracking import __main__ as tracking_command
from ovqk.tracking import run, service

ENTITY = "someone"
KEY = "0123456789canary0123456789canary01234567"
NEVER, CLOSED = 0, -1
"""Instead of an HTTP status: no answer, and a closed connection."""


@dataclass
class Run:
    """What arrived of one run."""

    upsert: dict[str, Any] = field(default_factory=dict)
    """What made the run: project, displayName, groupName, jobType, tags, sweep, program, host."""
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """History by place: a run that is sent again overwrites its own."""
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None


@dataclass
class Server:
    """The server's state.

    Attributes:
        runs, artifacts: by name, what arrived; an artifact is its files.
        requests: `METHOD OPERATION-or-path`, in order.
        answers: beginning of a request -> the HTTP status to answer it with (or NEVER, CLOSED).
        dies_at: the beginning of a request at which every connection closes, and stays so.
        commands: what an agent is told, one at a time, before it is told to stop.
        sweep: the sweep's own configuration, as YAML.
        views: workspaces that were saved.
    """

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    dies_at: str | None = None
    commands: list[dict[str, Any]] = field(default_factory=list)
    sweep: str = ""
    views: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, tuple[dict[str, bytes], str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def answer_to(self, request: str) -> int | None:
        """The failure to answer a request with, if any."""
        with self.lock:
            self.requests.append(request)
            if self.dies_at is not None and request.startswith(self.dies_at):
                self.answers = {"": CLOSED}
            return next((status for start, status in self.answers.items() if request.startswith(start)), None)

    def upload(self, files: dict[str, bytes], name: str) -> str:
        """The address at which one file is to arrive."""
        with self.lock:
            place = f"/storage/{len(self.uploads)}/{name}"
            self.uploads[place] = (files, name)
        return self.url + place


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server that answers at its `url` until the context ends."""
    state = Server()
    handler = type("Handler", (_Handler,), {"state": state})
    with _Quiet(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield state
        finally:
            state.over.set()
            server.shutdown()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing to print."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/graphql":
            request = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = named[1] if named else "?"
            if not self._fails(f"POST {name}"):
                operation = getattr(self, f"do_{name}", None)
                self._reply({"data": operation(request.get("variables") or {}) if operation else {}})
        elif not self._fails(f"POST {self.path}"):
            if self.path.endswith("/file_stream"):
                self._stream(self.state.runs[self.path.split("/")[-2]], json.loads(body))
            self._reply({})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._fails(f"PUT {self.path}"):
            files, name = self.state.uploads[self.path]
            files[name] = body
            self._reply({})

    def _fails(self, request: str) -> bool:
        status = self.state.answer_to(request)
        if status is None:
            return False
        if status > 0:
            self._reply({"errors": [{"message": f"told to answer {status}"}]}, status)
            return True
        if status == NEVER:
            self.state.over.wait(60)
        self.close_connection = True
        return True

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, run: Run, request: dict[str, Any]) -> None:
        with self.state.lock:
            for name, part in (request.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    run.lines |= {part["offset"] + i: json.loads(line) for i, line in enumerate(part["content"])}
                elif name == "wandb-summary.json":
                    run.summary = json.loads(part["content"][-1])
            if request.get("complete"):
                run.exit_code = request["exitcode"]

    # --- runs ---------------------------------------------------------------------------------------------------

    def do_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def do_ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def do_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        with self.state.lock:
            inserted = name not in self.state.runs
            run = self.state.runs.setdefault(name, Run())
            run.upsert |= {key: value for key, value in variables.items() if value is not None}
            if variables.get("config"):
                run.config = {key: entry["value"] for key, entry in json.loads(variables["config"]).items()}
        entity = {"id": "1", "name": variables.get("entity") or ENTITY}
        project = {"id": "1", "name": variables["project"], "entity": entity}
        bucket = {"id": name, "name": name, "project": project, "historyLineCount": 0}
        names = {"displayName": variables.get("displayName"), "sweepName": variables.get("sweep")}
        return {"upsertBucket": {"bucket": bucket | names, "inserted": inserted}}

    def do_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = self.state.runs[variables["run"]].files
        made = [{"name": name, "uploadUrl": self.state.upload(files, name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": made}}

    # --- artifacts: each table is one ---------------------------------------------------------------------------

    def do_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def do_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["input"]["artifactCollectionName"]
        self.state.artifacts[name] = {}
        return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": {}}}}

    def do_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["artifactID"]
        place = self.state.upload(self.state.artifacts[name], "manifest.json")
        file = {"id": name, "uploadUrl": place, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": name, "file": file}}}

    def do_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in variables["input"]["artifactFiles"]:
            place = self.state.upload(self.state.artifacts[file["artifactID"]], file["name"])
            node = {"storagePath": place, "uploadUrl": place, "uploadHeaders": []}
            nodes.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def do_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}

    # --- a sweep and its agent ----------------------------------------------------------------------------------

    def do_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.state.sweep = variables["config"]
        project = {"id": "1", "name": variables["projectName"], "entity": {"id": "1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}

    def do_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "1", "name": variables["sweep"], "config": self.state.sweep, "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def do_CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def do_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        told: list[dict[str, Any]] = []
        if not json.loads(variables["runState"]):  # the agent is free
            told = [self.state.commands.pop(0)] if self.state.commands else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(told)}}

    # --- a workspace --------------------------------------------------------------------------------------------

    def do_UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.state.views.append(variables)
        return {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}


# --- what tests do with it -----------------------------------------------------------------------------------------


@contextmanager
def impatient() -> Iterator[None]:
    """Short times to wait for a server that fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_INIT_TIMEOUT", "2")
        patch.setenv("WANDB_FINISH_TIMEOUT", "2")
        patch.setattr(run, "LOG_SECONDS", 4.0)
        patch.setattr(service, "GRACE_SECONDS", 2.0)
        yield


def inspect(run: Path) -> list[dict]:
    """The run's own log, read with W&B's tool."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def sync(results: Path) -> None:
    command = [str(Path(sys.executable).parent / "wandb"), "sync", str(results / "wandb")]
    subprocess.run(command, capture_output=True, timeout=60, check=True, cwd=results.parent)  # it leaves a log there


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`python -m ovqk.tracking ARGUMENTS`: its exit status."""
    monkeypatch.setattr(sys, "argv", ["ovqk.tracking", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        tracking_command.main()
    return stop.value.code


def sent_tables(server: Server) -> set[str]:
    """The tables whose rows arrived."""
    names = {name for files in server.artifacts.values() for name in files if name.startswith("tables/")}
    return {name.removeprefix("tables/").removesuffix(".table.json") for name in names}
