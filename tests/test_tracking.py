"""W&B runs made of records: what they hold, when and by which command they are made."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.commands import compose
from support.models import BUNDLED
from support.tracked import cell, track
from support.wandb_stub import ENTITY, KEY, Run, command, impatient, inspect, sent_tables, sync

from ovqk.config.resolve import tracking_mode
from ovqk.config.schema import TrackingMode
from ovqk.errors import UserError
from ovqk.records.record import claim, read_record, read_tracking, write_tracking
from ovqk.report.terminal import print_cell
from ovqk.tracking import environment, service
from ovqk.tracking import track as track_module
from ovqk.tracking.track import needs_tracking, run_id, track_cell

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_wandb")]
TABLES = {"heads", "tests", "verdicts", "nulls", "composition", "directions"}


# --- what a run holds ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_wandb_is_started_while_a_cell_is_computed_and_a_failure_of_that_is_for_later(results, monkeypatch) -> None:
    asked: list[str] = []

    def cannot(name: str) -> None:
        asked.append(name)
        raise ImportError(name)

    monkeypatch.setenv("WANDB_NOTES", "")
    with monkeypatch.context() as without:
        without.setattr(service.importlib, "import_module", cannot)
        without.delitem(sys.modules, "wandb", raising=False)
        service.start_meanwhile()
        service.starting[-1].join()
    assert asked == ["wandb"] and "WANDB_NOTES" not in os.environ
    assert track(results, "offline") is None and not service.starting


@pytest.mark.parametrize("name", ["HOME", "WANDB_CACHE_DIR"])
def test_a_home_or_cache_that_cannot_be_written_is_no_matter(results, tmp_path, name) -> None:
    (tmp_path / "file").touch()  # in which nobody can make a folder
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
    environment |= {name: str(tmp_path / "file"), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "ovqk.tracking", str(results)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.startswith("tracked ") and done.stderr == ""


def test_an_offline_run_holds_config_curves_tables_and_summary(results) -> None:
    assert track(results, "offline") is None
    state, record = read_tracking(cell(results)), read_record(cell(results))
    assert state["status"] == "done" and state["run_id"] == run_id(record)
    (log,) = (results / state["directory"]).glob("*.wandb")
    text = json.dumps(inspect(log))
    for wanted in (
        "layer/ov_copying",
        "depth/ov_copying",
        "relative_depth",
        "histograms/ov_copying",
        "eigenvalues/ov_vocab",
        "eigenvalues/qk_residual",
        *(f"tables/{name}" for name in TABLES),
        "mean/qk_matching",
        "quarter/4/ov_copying",
        "role/name_mover/verdict",
        "role/name_mover/p",
        "health/null_seconds",
        record["cell_id"],
    ):
        assert wanted in text, wanted
    assert str(BUNDLED.parent) not in text and str(Path.home()) not in text.replace(str(results), "")
    assert f'"{socket.gethostname()}"' not in text
    assert not any(f"head_{head}" in text or f"/{head}.0/" in text for head in range(8))  # no metric name per head


def test_variables_of_the_environment_are_followed_and_one_that_cannot_be_is_named(
    results, monkeypatch, capsys
) -> None:
    for name, value in {
        "PROJECT": "theirs",
        "NAME": "tuesday",
        "RUN_GROUP": "all",
        "TAGS": "a,b",
        "DIR": "/x",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    record = read_record(cell(results))
    assert track_cell(cell(results), results, TrackingMode.offline, "ovqk", None) is None
    (log,) = (results / read_tracking(cell(results))["directory"]).glob("*.wandb")
    run = next(line["run"] for line in inspect(log) if "run" in line)
    assert (run["project"], run["run_group"]) == ("theirs", "all")
    assert run["display_name"] == f"tuesday {record['model']} {record['task']} {record['analysis']}"
    assert run["tags"] == [record["model"], record["task"], record["analysis"], "a", "b"]
    assert environment.project_of("mine", environment.set_now()) == "mine"  # the config's own goes first
    assert command(monkeypatch, results, "--mode", "offline") == 0
    assert capsys.readouterr().err == ""  # it is said once for a results folder
    said = environment.not_followed(results.parent)
    assert said is not None and said.startswith("WANDB_DIR=/x is not followed: runs lie in results_dir/wandb")
    monkeypatch.setenv("WANDB_DIR", "")
    monkeypatch.setenv("WANDB_PROJECT", "")
    assert (
        environment.not_followed(results.parent) is None
        and environment.project_of("ovqk", environment.set_now()) == "ovqk"
    )


@pytest.mark.slow
@pytest.mark.wandb_server
def test_a_run_that_is_sent_later_from_another_shell_goes_where_it_was_meant_to(
    results, server, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as then:
        for name, value in {"PROJECT": "theirs", "RUN_GROUP": "all", "TAGS": "a,b", "ENTITY": "us"}.items():
            then.setenv(f"WANDB_{name}", value)
        assert track_cell(cell(results), results, TrackingMode.offline, "ovqk", None) is None
    assert command(monkeypatch, results, "--all") == 0
    (run,) = server.runs.values()
    assert (run.upsert["entity"], run.upsert["project"], run.upsert["groupName"]) == ("us", "theirs", "all")
    assert run.upsert["tags"][3:] == ["a", "b"]
    followed = "WANDB_PROJECT=theirs WANDB_ENTITY=us WANDB_RUN_GROUP=all WANDB_TAGS=a,b"
    said = "following W&B's variables as they were when the cells were tracked: "
    assert capsys.readouterr().out.startswith(f"{said}{followed}\ntracked ")
    monkeypatch.setenv("WANDB_PROJECT", "other")
    assert command(monkeypatch, results, "--all") == 0
    assert (run.upsert["project"], run.upsert["groupName"]) == ("other", "all")
    assert "WANDB_PROJECT=other is set now and goes before WANDB_PROJECT=theirs of then" in capsys.readouterr().out
    assert command(monkeypatch, results, "--all", "--project", "ovqk") == 0
    assert run.upsert["project"] == "ovqk"


def test_a_sweep_that_was_never_tracked_follows_what_its_cells_have_in_common(tmp_path) -> None:
    for name, project in {"a": "theirs", "b": "other"}.items():
        (tmp_path / name).mkdir()
        noted = {"run_id": name, "WANDB_PROJECT": project, "WANDB_TAGS": "x"}
        write_tracking(tmp_path / name, {"status": "done"} | noted)
    cells = [tmp_path / "a", tmp_path / "b"]
    assert track_module.noted_for(tmp_path, cells) == {"WANDB_TAGS": "x"}
    assert track_module.noted_for(tmp_path, cells[:1]) == {"WANDB_PROJECT": "theirs", "WANDB_TAGS": "x"}
    assert track_module.noted_for(tmp_path / "a", cells[1:])["WANDB_PROJECT"] == "theirs"


def test_what_is_offline_asks_no_server_and_prints_nothing(results, server, capfd) -> None:
    assert track(results, "offline") is None
    assert server.requests == [] and "".join(capfd.readouterr()) == ""


@pytest.mark.wandb_server
def test_an_online_run_arrives_whole_and_without_a_word(results, server, capfd) -> None:
    assert track(results, "online") is None
    assert "".join(capfd.readouterr()) == ""
    state, record = read_tracking(cell(results)), read_record(cell(results))
    run = server.runs[run_id(record)]
    assert state["status"] == "done" and state["url"].endswith(run_id(record))
    assert run.exit_code == 0 and run.upsert["displayName"] == "mini-attn ioi b03"
    assert run.upsert["tags"] == ["mini-attn", "ioi", "b03"]
    assert run.upsert["groupName"] == record["cell_id"] and run.upsert["jobType"] == "b03"
    assert (run.upsert["program"], run.upsert.get("host")) == ("run.py", None)
    flat = {
        key: run.config[key] for key in ("model", "task", "analysis", "seed", "processing", "embedding", "n_layers")
    }
    assert flat == {
        "model": "mini-attn",
        "task": "ioi",
        "analysis": "b03",
        "seed": 0,
        "processing": "folded",
        "embedding": "by_layer",
        "n_layers": 4,
    }
    assert "results_dir" not in run.config["cfg"] and run.config["cfg"]["nulls"]["draws"] == 19
    curves = [line for line in run.lines.values() if "layer" in line]
    assert [(line["layer"], line["depth/ov_copying"]) for line in curves] == [
        (line["layer"], line["layer/ov_copying"]) for line in curves
    ]
    assert [line["layer"] for line in curves] == [0, 1, 2, 3]
    assert curves[-1]["relative_depth"] == 1
    assert run.summary["status"] == "done" and "layer/ov_copying" not in run.summary  # not the last layer's alone
    assert sent_tables(server) >= TABLES
    heads = next(files for files in server.artifacts.values() if "tables/heads.table.json" in files)
    table = json.loads(heads["tables/heads.table.json"])
    assert table["columns"][:5] == ["model", "task", "analysis", "layer", "head"] and len(table["data"]) == 32
    assert not list((results / "wandb" / "data").glob("*"))  # nothing waits
    assert not [path for path in results.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.wandb_server
def test_an_offline_run_that_is_synced_is_the_online_run(results, server, monkeypatch) -> None:
    assert track(results, "offline") is None
    sync(results)
    (name, synced), tables = next(iter(server.runs.items())), sent_tables(server)
    server.runs, server.artifacts = {}, {}
    assert command(monkeypatch, results, "--all") == 0
    assert list(server.runs) == [name] and sent_tables(server) == tables >= TABLES
    assert numbers(server.runs[name]) == numbers(synced)


def numbers(run: Run) -> list[dict]:
    """What was logged, without W&B's own times and names of files."""
    rows = [run.config, *run.lines.values(), run.summary]
    return [{k: v for k, v in row.items() if k[0] != "_" and not (isinstance(v, dict) and "path" in v)} for row in rows]


@pytest.mark.slow
@pytest.mark.wandb_server
def test_a_record_that_is_sent_again_is_one_run(results, server, monkeypatch) -> None:
    assert track(results, "online") is None
    (before,) = map(numbers, server.runs.values())
    assert command(monkeypatch, results) == 0  # nothing to do
    requests = len(server.requests)
    assert command(monkeypatch, results, "--all") == 0
    (after,) = map(numbers, server.runs.values())
    assert len(server.requests) > requests and after == before


@pytest.mark.slow
@pytest.mark.wandb_server
def test_tables_of_an_offline_run_stay_behind_when_the_results_move_and_the_command_sends_them(
    results, server, monkeypatch
) -> None:
    """W&B notes the place of each table when it is made: what docs/wandb.md says of moved results."""
    assert track(results, "offline") is None
    moved = results.rename(results.with_name("moved"))
    sync(moved)
    assert len(server.runs) == 1 and sent_tables(server) == set()
    assert command(monkeypatch, moved, "--all") == 0
    assert len(server.runs) == 1 and sent_tables(server) >= TABLES


# --- the command -----------------------------------------------------------------------------------------------


def test_records_are_tracked_later_and_elsewhere(computed, tmp_path, monkeypatch, capsys) -> None:
    moved = shutil.copytree(computed, tmp_path / "moved")
    arguments = [sys.executable, "-m", "ovqk.tracking", str(moved), "--mode", "offline"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert done.stdout == f"tracked {cell(moved)}\n" and done.stderr == ""
    assert read_tracking(cell(moved))["status"] == "done"
    assert command(monkeypatch, moved, "--mode", "offline") == 0
    assert "".join(capsys.readouterr()) == ""


def test_a_cell_that_another_process_holds_is_left_to_it(results, monkeypatch, capsys) -> None:
    with claim(results, read_record(cell(results))["cell_id"]):
        assert command(monkeypatch, results, "--mode", "offline") == 0
    assert "another process is at work on it" in capsys.readouterr().err
    assert read_tracking(cell(results)) == {"status": "pending"}


def test_records_that_cannot_be_read_or_failed_are_passed_over(results, monkeypatch, capsys) -> None:
    done = cell(results)
    for name, text in (("torn", '{"status": "do'), ("failed", '{"status": "failed", "cell_id": "f"}')):
        folder = shutil.copytree(done, results / "mini-attn" / "ioi" / name)
        (folder / "record.json").write_text(text)
    assert command(monkeypatch, results, "--mode", "offline") == 0
    printed = capsys.readouterr()
    assert printed.out.count("tracked") == 1 and printed.err.count("\n") == 1
    assert f"skipped {results / 'mini-attn' / 'ioi' / 'torn'}: its record cannot be read" in printed.err


@pytest.mark.wandb_server
def test_failures_of_the_command_are_a_line_each_and_status_1(results, server, monkeypatch, capsys) -> None:
    other = shutil.copytree(cell(results), results / "mini-attn" / "ioi" / "other")
    record = read_record(other) | {"cell_id": "0123456789ab"}
    (other / "record.json").write_text(json.dumps(record))
    server.answers = {"POST": 401}
    with impatient():
        assert command(monkeypatch, results) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].split()[:2] for line in lines] == [["not", "tracked"]] * 2
    assert "told to answer 401" in lines[0] and "not tried after" in lines[1]
    server.answers = {}
    monkeypatch.setattr(track_module, "pause", track_module.Pause())
    assert command(monkeypatch, results) == 0 and len(server.runs) == 2


@pytest.mark.wandb_server
def test_project_and_entity_are_the_configs_unless_given(results, server, monkeypatch) -> None:
    path = cell(results) / "record.json"
    record = json.loads(path.read_text())
    record["provenance"]["config"]["tracking"] = {"mode": "none", "project": "mine", "entity": "us"}
    record |= {"model": 90 * "m", "sweep": 200 * "s"}  # longer than W&B takes for tags and groups
    path.write_text(json.dumps(record))
    assert command(monkeypatch, results) == 0
    (run,) = server.runs.values()
    assert (run.upsert["project"], run.upsert["entity"]) == ("mine", "us")
    assert (run.upsert["tags"][0], run.upsert["groupName"]) == (64 * "m", 128 * "s")
    assert command(monkeypatch, results, "--all", "--project", "other", "--entity", "them") == 0
    assert (run.upsert["project"], run.upsert["entity"]) == ("other", "them")


def test_what_waits_offline_is_told(results, monkeypatch, capsys) -> None:
    assert track(results, "offline") is None
    assert command(monkeypatch, results) == 0
    printed = capsys.readouterr().out
    assert "1 wait offline; this sends them: " in printed and f"-m ovqk.tracking --all {results}\n" in printed


def test_where_wandb_mode_keeps_runs_here_the_command_that_sends_them_says_so(results, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command(monkeypatch, results, "--all") == 0
    tracked, waiting = capsys.readouterr().out.splitlines()
    assert tracked == f"tracked offline {cell(results)}"
    assert waiting.startswith("1 wait offline, because WANDB_MODE=offline is set; this sends them: ")
    assert waiting.endswith(f"-m ovqk.tracking --mode online --all {results}")
    print_cell(cell(results), cached=True)  # its `next:` lines
    assert f"-m ovqk.tracking --mode online --all {results}" in capsys.readouterr().out


def test_mistakes_of_the_command_are_one_message(results, tmp_path, monkeypatch, capsys) -> None:
    assert command(monkeypatch, tmp_path / "none") == 1 and "no such results folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command(monkeypatch, tmp_path / "file") == 1 and "a file, not a results folder" in capsys.readouterr().err
    assert command(monkeypatch, tmp_path) == 1 and "no cells there" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert command(monkeypatch, results) == 1
    assert "ovqk: WANDB_MODE=disabled: with it nothing is sent" in capsys.readouterr().err


# --- when a cell is tracked ------------------------------------------------------------------------------------


def test_a_record_that_was_computed_again_is_tracked_again(results) -> None:
    assert needs_tracking(cell(results))
    assert track(results, "offline") is None and not needs_tracking(cell(results))
    path = cell(results) / "record.json"
    record = json.loads(path.read_text())
    record["provenance"]["wall_seconds"] += 1
    path.write_text(json.dumps(record))
    assert needs_tracking(cell(results))


def test_an_unknown_wandb_mode_is_refused() -> None:
    with pytest.raises(UserError, match="WANDB_MODE=onlin: allowed: online, offline"):
        tracking_mode(compose("tracking=offline"), "onlin")


def test_one_module_imports_wandb() -> None:
    importing = [path.name for path in (ROOT / "ovqk").rglob("*.py") if "import wandb\n" in path.read_text()]
    assert importing == ["service.py"]


# --- W&B's own sweeps ------------------------------------------------------------------------------------------


@pytest.mark.wandb_server
def test_in_an_agent_the_cell_is_the_agents_run(results, server, monkeypatch) -> None:
    import wandb

    assert track(results, "offline") is None
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agents-run")
    wandb.teardown()  # an agent starts a process for each run
    assert needs_tracking(cell(results))  # although it was tracked
    assert track_cell(cell(results), results, TrackingMode.online, "ovqk-test", None, "wandb_grid") is None
    (run,) = server.runs.values()
    assert list(server.runs) == ["agents-run"] and run.upsert["sweep"] == "sweep1" and run.exit_code == 0
    assert run.config["sweep"] == run.upsert["groupName"] == "wandb_grid"  # the record names no sweep
    assert read_tracking(cell(results))["run_id"] == "agents-run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_SWEEP_ID")
        assert not needs_tracking(cell(results))  # outside of agents it counts as tracked
    other = shutil.copytree(cell(results), results / "mini-attn" / "ioi" / "other")
    record = read_record(other) | {"cell_id": "0123456789ab"}
    (other / "record.json").write_text(json.dumps(record))
    warning = track_cell(other, results, TrackingMode.online, "ovqk-test", None)
    assert warning is not None and "the run of a W&B agent holds one cell" in warning


@pytest.mark.slow
@pytest.mark.wandb_server
def test_an_agent_runs_the_grid(tmp_path, server, monkeypatch) -> None:
    """`wandb sweep` and `wandb agent` on sweeps/wandb_grid.yaml: what is handed out is composed, computed and sent."""
    wandb = str(Path(sys.executable).parent / "wandb")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    made = subprocess.run([wandb, "sweep", "sweeps/wandb_grid.yaml"], capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0 and f"wandb agent {ENTITY}/ovqk/sweep1" in made.stderr
    values = {"model": "mini-gpt2", "task": "induction", "analysis": "b03", "results_dir": str(tmp_path / "results")}
    for name in ("run1", "run2"):  # the same cell twice: computed once, sent as both runs
        arguments = {key: {"value": value} for key, value in values.items()}
        server.commands.append({"type": "run", "run_id": name, "program": "run.py", "args": arguments})
    agent = [wandb, "agent", f"{ENTITY}/ovqk/sweep1"]
    done = subprocess.run(agent, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(server.runs) == ["run1", "run2"]
    for run in server.runs.values():
        assert run.exit_code == 0 and run.upsert["sweep"] == "sweep1" and run.upsert["groupName"] == "wandb_grid"
        assert (run.config["model"], run.config["task"]) == ("mini-gpt2", "induction")
    assert len(list((tmp_path / "results").glob("*/*/*/record.json"))) == 1
