"""Failures of W&B: nothing of the results is lost, the failure is told once, and the run is sent later."""

import json
import os
import signal
import time

import pytest
from support.commands import compose
from support.tracked import cell, track
from support.wandb_stub import CLOSED, KEY, NEVER, command, impatient, inspect, sent_tables

from ovqk.config.resolve import tracking_mode
from ovqk.config.schema import TrackingMode
from ovqk.records.record import is_done, read_tracking
from ovqk.tracking import track as track_module

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_wandb")]
TABLES = {"heads", "tests", "verdicts", "nulls", "composition", "directions"}


# --- failures --------------------------------------------------------------------------------------------------


def test_a_failure_of_wandb_loses_nothing_and_is_recorded(results, monkeypatch) -> None:
    import wandb

    def refuse(**keys: object) -> None:
        raise ConnectionError("no route to the server\nsecond line")

    before = (cell(results) / "record.json").read_bytes()
    monkeypatch.setattr(wandb, "init", refuse)
    warning = track(results, "online")
    assert warning is not None and "computed and recorded, but not tracked (ConnectionError: no route" in warning
    state = read_tracking(cell(results))
    assert (state["status"], state["reason"]) == ("failed", "ConnectionError: no route to the server")
    assert is_done(cell(results)) and (cell(results) / "record.json").read_bytes() == before


@pytest.mark.wandb_server
@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"POST": 401}, "told to answer 401"),
        ({"POST UpsertBucket": NEVER}, "Timed out"),
        ({"POST /files": 403}, "403"),
        ({"PUT": 403}, "403"),
        pytest.param({"POST": CLOSED}, "EOF", marks=pytest.mark.slow),
        pytest.param({"POST /files": NEVER}, "Timed out", marks=pytest.mark.slow),
        pytest.param({"POST ArtifactType": NEVER}, "W&B did not", marks=pytest.mark.slow),
        pytest.param({"POST CreateArtifact": 402}, "402", marks=pytest.mark.slow),
        pytest.param({"POST CreateRunFiles": 403}, "403", marks=pytest.mark.slow),
        pytest.param({"PUT": 507}, "507", marks=pytest.mark.slow),
        pytest.param({"PUT": NEVER}, "Timed out", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_server_that_fails_is_recorded_told_once_and_soon(results, server, answers, reason, capfd) -> None:
    server.answers = answers
    started = time.monotonic()
    with impatient():
        warning = track(results, "online")
    assert time.monotonic() - started < 30
    state = read_tracking(cell(results))
    assert warning is not None and state["reason"] in warning and reason in state["reason"]
    assert state["status"] == "failed" and is_done(cell(results))
    assert "".join(capfd.readouterr()) == ""  # the caller prints the warning
    requests = len(server.requests)
    assert track(results, "online") is None  # the next cell does not wait for the same server
    state = read_tracking(cell(results))
    assert state["status"] == "pending" and "not tried after: " in state["reason"]
    assert len(server.requests) == requests
    assert KEY not in (cell(results) / "tracking.json").read_text()


@pytest.mark.slow
@pytest.mark.wandb_server
@pytest.mark.parametrize("request_", ["POST /files", "POST CommitArtifact", "PUT"])
def test_a_server_that_dies_half_way_gets_the_run_later(results, server, request_, monkeypatch) -> None:
    server.dies_at = request_
    with impatient():
        assert track(results, "online") is not None
    assert read_tracking(cell(results))["status"] == "failed"
    server.dies_at, server.answers = None, {}
    monkeypatch.setattr(track_module, "pause", track_module.Pause())
    assert command(monkeypatch, results) == 0
    (run,) = server.runs.values()
    assert run.exit_code == 0 and sent_tables(server) >= TABLES
    assert len(list((results / "wandb").glob("run-*"))) == 1  # nothing is left of the failure


def test_without_a_key_the_message_says_what_to_do_and_nobody_is_asked(results, monkeypatch) -> None:
    from wandb.errors import term

    monkeypatch.setattr(term, "_isatty", lambda stream: True)  # a person sits at a terminal
    warning = track(results, "online")
    assert warning is not None and "No API key configured. Use `wandb login` to log in." in warning
    assert read_tracking(cell(results))["status"] == "failed"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WANDB_CONSOLE", "a canary", "W&B's setting console: "),
        ("WANDB_BASE_URL", "a canary", "W&B's setting base_url: "),
        ("WANDB_INIT_TIMEOUT", "soon", "WANDB_INIT_TIMEOUT=soon: must be a number of seconds"),
    ],
)
def test_a_setting_of_the_environment_that_is_refused_is_named(results, monkeypatch, name, value, reason) -> None:
    monkeypatch.setenv(name, value)
    warning = track(results, "offline")
    assert warning is not None and reason in warning and "\n" not in warning
    assert "canary" not in (cell(results) / "tracking.json").read_text()  # it could have been a key


def test_settings_that_are_empty_are_as_good_as_not_set(results, monkeypatch) -> None:
    for name in ("MODE", "SILENT", "BASE_URL", "INIT_TIMEOUT", "DATA_DIR", "DIR", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", "")
    assert track(results, "offline") is None
    assert read_tracking(cell(results))["status"] == "done"


def test_the_command_in_a_warning_can_be_pasted(results, monkeypatch) -> None:
    odd = results.rename(results.with_name("my results"))
    monkeypatch.setattr(track_module, "make_run", lambda *arguments: 1 / 0)
    warning = track(odd, "offline")
    assert warning is not None and warning.endswith(f"python -m ovqk.tracking '{odd}'`")


@pytest.mark.parametrize("when", ["idle", "half-way"])
def test_a_killed_wandb_service_fails_the_cell_it_was_at_work_on_and_no_other(results, monkeypatch, when) -> None:
    log_panels = track_module.log_panels

    def kill_and_log(run: object, wandb: object, panels: object) -> None:
        log_panels(run, wandb, panels)
        kill_service()

    assert track(results, "offline") is None
    if when == "idle":
        kill_service()
    else:
        monkeypatch.setattr(track_module, "log_panels", kill_and_log)
    assert (track(results, "offline") is not None) == (when == "half-way")
    monkeypatch.setattr(track_module, "log_panels", log_panels)
    assert track(results, "offline") is None
    assert read_tracking(cell(results))["status"] == "done"
    assert len(list((results / "wandb").glob("offline-run-*"))) == 1


def kill_service() -> None:
    import wandb

    service = wandb.setup().ensure_service()._proc._process
    os.kill(service.pid, signal.SIGKILL)
    time.sleep(0.2)


def test_a_run_of_the_callers_own_goes_on(results, monkeypatch, tmp_path) -> None:
    import wandb

    own = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    assert track(results, "offline") is None
    monkeypatch.setattr(track_module, "log_panels", lambda *arguments: 1 / 0)
    assert track(results, "offline") is not None
    assert wandb.run is own
    own.log({"x": 1})
    own.finish()
    assert "x" in json.dumps(inspect(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))))


# --- when a cell is tracked ------------------------------------------------------------------------------------


def test_a_failure_to_send_leaves_the_offline_run(results, server) -> None:
    assert track(results, "offline") is None
    before = read_tracking(cell(results))
    server.answers = {"POST": 401}
    with impatient():
        assert track(results, "online") is not None
    assert read_tracking(cell(results)) == before and (results / before["directory"]).is_dir()


@pytest.mark.parametrize(
    ("config", "environment", "wanted"),
    [
        ("none", "online", TrackingMode.none),
        ("offline", None, TrackingMode.offline),
        ("offline", "online", TrackingMode.online),
        ("online", "disabled", TrackingMode.none),
        ("online", "offline", TrackingMode.offline),
    ],
)
def test_none_always_wins_then_the_environment_then_the_config(config, environment, wanted) -> None:
    assert tracking_mode(compose(f"tracking={config}"), environment) is wanted
