"""The W&B workspace from code: its sections, and that it is saved."""

import json
import sys
from pathlib import Path

import pytest
from support.commands import compose
from support.wandb_stub import wandb_server

from ovqk.cell import run_cell
from ovqk.records.record import write_tracking
from ovqk.tracking import dashboard

pytest.importorskip("wandb_workspaces", reason="pip install -e '.[dashboard]'")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells with claims and without."""
    results = tmp_path_factory.mktemp("dashboard") / "results"
    for overrides in ([], ["model.claims=null", "task=sva"]):
        run_cell(compose("tracking=none", "nulls.draws=19", f"results_dir={results}", *overrides))
    return results


def sections(spec: str) -> dict[str, list[dict]]:
    """Each section's panels, by its name."""
    return {entry["name"]: entry["panels"] for entry in json.loads(spec)["section"]["panelBankConfig"]["sections"]}


def test_a_workspace_has_the_five_sections_with_what_the_records_hold(results) -> None:
    shown, places = dashboard.gathered_panels(results)
    assert places == {(None, "ovqk"): 2}
    model = dashboard.workspace("someone", "ovqk", "mine", shown, swept=True)._to_model()
    spec = model.spec.model_dump_json(by_alias=True, exclude_none=True)
    found = sections(spec)
    assert list(found) == ["Claims", "Spectra", "Symmetry and position", "Heads", "Health"]
    text = {name: json.dumps(panels) for name, panels in found.items()}
    assert "role/copy_suppression/p" in text["Claims"] and "tables/candidates" in text["Claims"]
    assert "figures/effects" in text["Claims"] and "comparison/roles" in text["Claims"]
    assert "eigenvalues/ov_vocab_table" in text["Spectra"] and "depth/ov_effective_rank" in text["Spectra"]
    assert "depth/qk_symmetry" in text["Symmetry and position"]
    assert "tables/directions" in text["Heads"] and "depth/ov_copying" in text["Heads"]
    assert "tables/virtual_heads" not in text["Heads"]  # no cell made one
    assert "health/null_seconds" in text["Health"]
    (runs,) = json.loads(spec)["section"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "model.value"}]
    plots = [panel for panels in found.values() for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert {panel["config"]["groupBy"] for panel in plots} == {"model.value"}
    assert {panel["config"]["xAxis"] for panel in plots} == {"relative_depth"}


@pytest.mark.wandb_server
def test_the_workspace_is_saved_where_the_cells_were_tracked(results, monkeypatch, capsys, tmp_path) -> None:
    import wandb

    (folder, *_) = (path.parent for path in results.glob("*/*/*/record.json"))
    write_tracking(folder, {"status": "done", "url": "https://wandb.example/us/my%20project/runs/1"})
    monkeypatch.setenv("WANDB_ENTITY", "others")  # the runs are where they are
    with wandb_server() as server:
        wandb.teardown()
        for name, value in {"BASE_URL": server.url, "API_KEY": 40 * "0", "CACHE_DIR": str(tmp_path)}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setattr(sys, "argv", ["ovqk.dashboard", str(results)])
        dashboard.main()
        wandb.teardown()
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (
        "us",
        "my project",
        dashboard.NAME,
    )
    assert len(sections(view["spec"])) == 5
    assert "saved http" in capsys.readouterr().out


def test_cells_in_several_projects_need_a_choice(tmp_path, monkeypatch, capsys) -> None:
    places = dashboard.Places({("us", "a"): 2, ("us", "b"): 1, ("them", "b"): 1})
    monkeypatch.setattr(dashboard, "gathered_panels", lambda folder: ([], places))
    saved = []
    monkeypatch.setattr(dashboard, "workspace", lambda *chosen: saved.append(chosen[:2]))
    for given in ([], ["--project", "b"], ["--entity", "us"]):
        with pytest.raises(SystemExit):
            dashboard.main([str(tmp_path), *given])
        assert "the cells are in several projects: us/a (2 cells), us/b (1 cell), them/b" in capsys.readouterr().err
    for given in (["--project", "a"], ["--entity", "them"], ["--project", "c", "--entity", "you"]):
        with pytest.raises(SystemExit):  # nothing was made that could be saved
            dashboard.main([str(tmp_path), *given])
    assert saved == [("us", "a"), ("them", "b"), ("you", "c")]


def test_mistakes_are_one_message(results, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ovqk.dashboard", str(tmp_path)])
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "no finished cells there" in capsys.readouterr().err
    monkeypatch.setattr(dashboard, "gathered_panels", lambda results: ([], dashboard.Places({(None, "ovqk"): 1})))
    monkeypatch.setattr(sys, "argv", ["ovqk.dashboard", str(results)])
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "--entity: not given, and no record names it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(SystemExit):
        dashboard.main()
    assert "pip install -c constraints.txt -e '.[dashboard]'" in capsys.readouterr().err
