"""The W&B run of a whole sweep: which cells it shows and how, made once, and failures that lose nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.commands import compose
from support.wandb_stub import command, impatient, inspect, sent_tables

from ovqk.cell import run_cell
from ovqk.config.schema import TrackingMode
from ovqk.records.record import claim, read_record, read_tracking
from ovqk.records.results import cell_folders
from ovqk.records.sweeps import remember_cells, sweep_folder
from ovqk.tracking import sweep_panels
from ovqk.tracking import track as track_module
from ovqk.tracking.run import Destination
from ovqk.tracking.sweep_panels import draw, overview_config, overview_tables, read_sweeps
from ovqk.tracking.track import track_sweep
from ovqk.whole_files import write_json

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_wandb")]
NAME = "two models"
SMALL = ("task=induction", "analysis=b03", "nulls.draws=9", "analysis.components=0")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' cells of one sweep, and one of no sweep, none of them tracked."""
    results = tmp_path_factory.mktemp("computed") / "results"
    for overrides in ([f"sweep='{NAME}'"], [f"sweep='{NAME}'", "model=mini-llama"], ["seed=1"]):
        run_cell(compose("tracking=none", f"results_dir={results}", *SMALL, *overrides))
    return results


@pytest.fixture
def results(computed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(computed, tmp_path / "results")


def track(results: Path, mode: str, name: str = NAME, cells: list[Path] | None = None) -> str | None:
    return track_sweep(name, cells or [], Destination(results, TrackingMode(mode), "ovqk-test", None))


def state(results: Path, name: str = NAME) -> dict:
    return read_tracking(sweep_folder(results, name))


# --- which cells -------------------------------------------------------------------------------------------------


def test_a_sweep_is_known_by_the_records_that_bear_its_name_and_the_cells_it_found_done(results) -> None:
    (sweep,) = read_sweeps(results)
    assert sweep.name == NAME and [record["sweep"] for record in sweep.records] == [NAME, NAME]
    (alone,) = [folder for folder in cell_folders(results) if folder not in sweep.cells]
    remember_cells(results, NAME, [alone, results.parent / "elsewhere"])
    remember_cells(results, NAME, sweep.cells[:1])  # a later call adds to what was there
    (sweep,) = read_sweeps(results)
    assert sweep.cells == list(cell_folders(results))
    record = read_record(alone)
    write_json(alone / "record.json", record | {"status": "failed"})
    assert len(read_sweeps(results)[0].cells) == 2  # only what is done


def test_cells_that_a_sweeps_run_shows_need_no_other_run(results) -> None:
    (sweep,) = read_sweeps(results)
    assert track_module.shown_by(results, sweep.cells) is None  # it was never made
    sweep.folder.mkdir(parents=True)
    write_json(sweep.folder / "tracking.json", {"status": "done", "record": track_module.TrackedSweep(sweep).made_of})
    assert track_module.shown_by(results, sweep.cells[:1]) == NAME
    assert track_module.shown_by(results, cell_folders(results)) is None  # one of them is not its cell


def test_names_that_lead_elsewhere_do_not(tmp_path) -> None:
    for name in ("../../up", "/up", "", "ü ☃", "x" * 5000):
        folder = sweep_folder(tmp_path, name)
        assert folder.parent == tmp_path / ".sweeps" and folder.name.startswith("sweep-") and len(folder.name) == 18


def test_a_single_cell_is_no_sweep(results) -> None:
    assert track(results, "offline", "alone", list(cell_folders(results))[:1]) is None
    assert state(results, "alone") == {"status": "pending"} and not (results / "wandb").exists()


# --- what it shows -----------------------------------------------------------------------------------------------


def test_it_shows_models_beside_each_other(results, tmp_path) -> None:
    (sweep,) = read_sweeps(results)
    tables = overview_tables(sweep)
    assert list(dict.fromkeys(tables["roles"]["model"])) == ["mini-attn", "mini-llama"]
    assert all(isinstance(text, str) for text in tables["roles"]["of_its_heads"])
    assert set(tables["depths"]["model"]) == {"mini-attn", "mini-llama"}
    assert tables["cells"]["cell_id"].tolist() == [record["cell_id"] for record in sweep.records]
    config = overview_config(sweep)
    assert config["models"] == ["mini-attn", "mini-llama"] and config["cells"] == 2 and "model" not in config
    figures = dict(draw(sweep, tmp_path))
    assert {"verdicts", "effects", "depth", "atlas_induction_ov_copying"} <= figures.keys()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures.values())


def test_no_figure_is_begun_when_the_time_is_over(results, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweep_panels, "FIGURE_SECONDS", 0.0)
    (sweep,) = read_sweeps(results)
    assert [name for name, _ in draw(sweep, tmp_path)] == ["verdicts"]


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, ovqk.cell, ovqk.tracking, ovqk.sweep; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


# --- its run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_offline_run_holds_figures_and_tables_and_is_made_once(results) -> None:
    assert track(results, "offline") is None
    made = state(results)
    assert made["status"] == "done" and made["run_id"] == sweep_folder(results, NAME).name
    (log,) = (results / made["directory"]).glob("*.wandb")
    lines = inspect(log)
    run = next(line["run"] for line in lines if "run" in line)
    assert (run["run_group"], run["job_type"], run["run_id"]) == (NAME, "sweep", made["run_id"])
    text = json.dumps(lines)
    for name in ("figures/verdicts", "figures/depth", "comparison/roles", "comparison/depths", "comparison/cells"):
        assert name in text, name
    assert len(list((results / made["directory"]).glob("files/media/images/figures/*.png"))) >= 5
    assert track(results, "offline") is None and state(results) == made  # nothing new
    alone = [folder for folder in cell_folders(results) if read_record(folder)["sweep"] is None]
    assert track(results, "offline", cells=alone) is None  # the sweep has grown: another run in the place of the first
    assert state(results)["record"] != made["record"] and state(results)["run_id"] == made["run_id"]
    assert len(list((results / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.wandb_server
def test_an_online_run_arrives_with_its_pictures(results, server, capfd) -> None:
    assert track(results, "online") is None
    assert "".join(capfd.readouterr()) == ""
    (run,) = server.runs.values()
    assert run.exit_code == 0 and run.upsert["jobType"] == "sweep" and run.upsert["groupName"] == NAME
    assert state(results)["url"].endswith(sweep_folder(results, NAME).name)
    pictures = [name for name in run.files if name.startswith("media/images/figures/")]
    assert len(pictures) >= 5 and all(run.files[name].startswith(b"\x89PNG") for name in pictures)
    assert {name for files in server.artifacts.values() for name in files} >= {"comparison/roles.table.json"}
    assert run.summary["figures/verdicts"]["_type"] == "image-file"
    assert sent_tables(server) == set()  # those of cells


@pytest.mark.slow
@pytest.mark.wandb_server
def test_a_failure_is_one_warning_and_the_command_sends_it_later(results, server, monkeypatch, capsys) -> None:
    server.answers = {"POST": 401}
    with impatient():
        warning = track(results, "online")
    assert warning is not None and "the sweep's own run, of all its cells, was not made" in warning
    assert "401" in warning and f"python -m ovqk.tracking {results}" in warning
    assert state(results)["status"] == "failed" and "401" in state(results)["reason"]
    server.answers = {}
    monkeypatch.setattr(track_module, "pause", track_module.Pause())
    assert command(monkeypatch, results) == 0
    assert f"tracked the sweep {NAME} http" in capsys.readouterr().out
    assert len(server.runs) == 4 and state(results)["status"] == "done"
    requests = len(server.requests)
    assert command(monkeypatch, results) == 0 and len(server.requests) == requests


def test_what_cannot_be_drawn_is_a_failure_and_no_more(results, monkeypatch) -> None:
    monkeypatch.setattr(sweep_panels, "load_table", lambda folder, name: 1 / 0)
    warning = track(results, "offline")
    assert warning is not None and "ZeroDivisionError" in warning
    assert state(results)["status"] == "failed"


def test_the_command_makes_the_runs_of_sweeps_from_records_alone(results, monkeypatch, capsys) -> None:
    with claim(results, sweep_folder(results, NAME).name):
        assert command(monkeypatch, results, "--mode", "offline") == 0
    printed = capsys.readouterr()
    assert printed.out.count("tracked") == 3 and "skipped the sweep two models: another process" in printed.err
    assert command(monkeypatch, results, "--mode", "offline") == 0
    assert capsys.readouterr().out == f"tracked the sweep {NAME}\n"
    assert command(monkeypatch, results) == 0
    assert "4 wait offline" in capsys.readouterr().out


# --- at the end of a sweep ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_command_goes_on_with_the_same_sweep(cli, tmp_path, monkeypatch) -> None:
    results = tmp_path / "results"
    call = ("-m", *SMALL, "model=mini-attn,mini-llama", "hydra.job.chdir=false")
    name = "task=induction analysis=b03 nulls.draws=9 analysis.components=0 model=mini-attn,mini-llama"
    code, printed = cli(*call, "tracking=none")
    assert code == 0 and not (results / ".sweeps").exists()
    assert {read_record(folder)["sweep"] for folder in cell_folders(results)} == {name}
    code, printed = cli(*call, "force=false")
    assert code == 0 and "0 done, 2 cached" in printed and "warning" not in printed
    assert "W&B: making the sweep's own run, with figures over all its cells" in printed
    code, other = cli("-m", *SMALL, "model=mini-llama,mini-attn", "hydra.job.chdir=false")  # another name, nothing new
    assert code == 0 and f"W&B: no new run for the sweep: the run of the sweep '{name}' shows all its cells" in other
    assert len(list((results / ".sweeps").iterdir())) == 1
    made = state(results, name)
    assert made["status"] == "done" and f"W&B: the sweep's own run: results/{made['directory']}" in printed
    code, printed = cli(*call, "model=mini-attn")  # narrowed: another sweep, of one cell
    assert code == 0 and "own run" not in printed and len(list((results / ".sweeps").iterdir())) <= 2
    monkeypatch.setattr(track_module, "make_run", lambda *arguments: 1 / 0)
    code, printed = cli(*call, "sweep=mine")
    assert code == 0 and printed.count("warning: W&B: the sweep's own run") == 1  # its cells were tracked before
    assert state(results, "mine")["status"] == "failed"


def test_cells_that_are_tracked_in_different_ways_have_no_run_in_common(cli, tmp_path) -> None:
    code, _ = cli("-m", *SMALL, "tracking=none,offline")
    assert code == 0 and not (tmp_path / "results" / ".sweeps").exists()


@pytest.mark.slow
def test_keys_of_the_environment_are_in_no_file(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 7)
    code, _ = cli("-m", *SMALL, "model=mini-attn,mini-llama")
    assert code == 0 and list((tmp_path / "results" / ".sweeps").iterdir())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
