"""W&B from records alone: an offline run read back, and failures that lose nothing."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BUNDLED, compose, local

from ovqk.cell import run_cell
from ovqk.config import TrackingMode
from ovqk.errors import UserError
from ovqk.identity import tracking_mode
from ovqk.record import is_done, read_record, read_tracking
from ovqk.tracking import run_id, track_cell

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A results folder with one untracked cell."""
    results = tmp_path_factory.mktemp("tracked") / "results"
    run_cell(compose("tracking=none", f"results_dir={results}"))
    return results


def cell(results: Path) -> Path:
    (record,) = results.glob("*/*/*/record.json")
    return record.parent


def inspect(run: Path) -> list[dict]:
    """The run's own log, read with W&B's tool."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_an_offline_run_holds_config_curves_tables_and_summary(results, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(results / "wandb" / "data"))
    assert track_cell(cell(results), results, TrackingMode.offline, "ovqk-test", None) is None
    tracking = read_tracking(cell(results))
    record = read_record(cell(results))
    assert tracking["status"] == "done" and tracking["run_id"] == run_id(record)
    (log,) = (results / tracking["directory"]).glob("*.wandb")
    text = json.dumps(inspect(log))
    for wanted in (
        "layer/ov_copying",
        "layer/summed_qk_symmetry",
        "depth/ov_copying",
        "relative_depth",
        "quarter/4/ov_copying",
        "/verdict",
        "eigenvalues/ov_vocab",
        "eigenvalues/qk_residual",
        "tables/heads",
        "tables/verdicts",
        "mean/qk_matching",
        record["cell_id"],
    ):
        assert wanted in text, wanted
    assert str(BUNDLED.parent) not in text
    assert f'"host": "{socket.gethostname()}"' not in text
    assert not any(f"head_{head}" in text or f"/{head}.0/" in text for head in range(8))  # no metric name per head


def test_a_canary_key_reaches_no_file(results, monkeypatch) -> None:
    canary = "0123456789canary0123456789canary01234567"
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("WANDB_DATA_DIR", str(results / "wandb" / "data"))
    track_cell(cell(results), results, TrackingMode.offline, "ovqk-test", None)
    for path in results.rglob("*"):
        if path.is_file():
            assert canary.encode() not in path.read_bytes(), path


def test_a_failure_of_wandb_loses_nothing_and_is_recorded(results, monkeypatch) -> None:
    import wandb

    def refuse(**keys: object) -> None:
        raise ConnectionError("no route to the server\nsecond line")

    before = (cell(results) / "record.json").read_bytes()
    monkeypatch.setattr(wandb, "init", refuse)
    warning = track_cell(cell(results), results, TrackingMode.online, "ovqk-test", None)
    assert warning is not None and "computed and recorded, but not tracked (ConnectionError: no route" in warning
    tracking = read_tracking(cell(results))
    assert (tracking["status"], tracking["reason"]) == ("failed", "ConnectionError: no route to the server")
    assert is_done(cell(results)) and (cell(results) / "record.json").read_bytes() == before


def test_records_are_tracked_later_and_elsewhere(results, tmp_path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(results, moved, ignore=shutil.ignore_patterns("wandb", "tracking.json"))
    command = [sys.executable, "-m", "ovqk.tracking", str(moved), "--mode", "offline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("tracked ")
    assert read_tracking(cell(moved))["status"] == "done"
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert again.stdout == ""


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


def test_an_unknown_wandb_mode_is_refused() -> None:
    with pytest.raises(UserError, match="WANDB_MODE=onlin: allowed: online, offline"):
        tracking_mode(compose("tracking=offline"), "onlin")


def test_only_tracking_imports_wandb() -> None:
    root = Path(__file__).parent.parent
    importing = [path.name for path in (root / "ovqk").glob("*.py") if "import wandb" in path.read_text()]
    assert importing == ["tracking.py"]
    assert local(BUNDLED).name == "mini-attn"
