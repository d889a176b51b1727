"""The registry of metrics decides where each is shown: a new row is enough for page, figures, terminal and W&B."""

import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from support.reported import make_results

from ovqk import metrics
from ovqk.config.schema import Circuit
from ovqk.figures import portraits
from ovqk.figures.choice import sweep_figures
from ovqk.metrics import METRICS, Metric, Needs, Part, Place, Topic, ratios, shares, shown_in
from ovqk.records.cells import read_cells
from ovqk.records.record import read_record
from ovqk.report.page import page_data
from ovqk.report.terminal_tables import shown_columns
from ovqk.report.thinning import DETAILS
from ovqk.tracking import dashboard
from ovqk.tracking.cell_panels import read_panels

PLACES = get_args(Place)
NEW = "ov_made_up"


def test_rows_name_places_topics_and_parts_that_are_there() -> None:
    for metric in METRICS.values():
        assert metric.shown <= set(PLACES) and metric.topic in get_args(Topic)
        assert metric.share is None or metric.share[0] in get_args(Part)
        assert metric.shown & {"column", "residual column"} or not (metric.column or metric.legend)
        assert not metric.shown or metric.of != "pair"
    assert all(shown_in(place) for place in PLACES)


def test_shares_of_each_kind_of_positions_are_in_groups() -> None:
    found = shares()
    assert list(found["learned"]) == ["position", "content"] and list(found["rotary"]) == list(get_args(Part))
    for kind, parts in found.items():
        assert all(kind in METRICS[name].needs for part in parts.values() for name in part)


def test_each_spectrum_of_eigenvalues_has_one_ratio() -> None:
    assert set(ratios()) == {(circuit, space) for circuit in Circuit for space in ("vocab", "residual")}
    assert len(ratios()) == sum(metric.ratio_of is not None for metric in METRICS.values())


def made_up(circuit: Circuit, needs: Needs, **more: Any) -> Metric:
    return Metric(NEW, circuit, "Made up", "1", 0.0, 1.0, "", frozenset({needs}), column="made-up", **more)


@pytest.fixture
def cell(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A results folder with one cell, whose heads have a column that no registry knows."""
    source = next((make_results(tmp_path_factory) / "mini-attn" / "induction").glob("b03-*"))
    folder = tmp_path / "mini-attn" / "induction" / source.name
    shutil.copytree(source, folder)
    heads = pd.read_parquet(folder / "heads.parquet")
    heads.assign(**{NEW: np.linspace(0, 1, len(heads))}).to_parquet(folder / "heads.parquet")
    return folder


def showing(folder: Path) -> set[str]:
    """The places that show the made-up metric of a cell."""
    cells, _ = read_cells(folder.parents[2])
    heads = cells[0].tables["heads"]
    data = page_data(cells, [], folder.parents[2], DETAILS[0])
    panels = read_panels(folder, read_record(folder))
    without = heads.drop(columns=[name for name in shown_in("column") if name != NEW])
    found = {
        "depth": NEW in data["shown"]["depth"] and f"quarter/1/{NEW}" in panels.scalars,
        "curve": NEW in panels.curves and NEW in dashboard.curves_about("copying"),
        "histogram": NEW in panels.histograms,
        "atlas": f"atlas_induction_{NEW}" in [name for name, _ in sweep_figures(cells)],
        "column": ("made-up", NEW) in shown_columns(heads),
        "residual column": ("made-up", NEW) in shown_columns(without) and ("made-up", NEW) not in shown_columns(heads),
        "profile": NEW in data["shown"]["profile"]["ov"],
    }
    assert data["metrics"][NEW]["title"] == "Made up"
    return {place for place, there in found.items() if there}


@pytest.mark.parametrize("place", PLACES)
def test_a_new_row_is_shown_in_the_place_that_it_names_and_no_other(place, cell, monkeypatch) -> None:
    row = made_up(Circuit.ov, "weights", topic="copying", shown=frozenset({place}), order=metrics.SYMMETRY)
    monkeypatch.setitem(METRICS, NEW, row)
    assert showing(cell) == {place}


def test_a_new_share_is_a_bar_of_the_page_and_of_the_figure(monkeypatch) -> None:
    row = made_up(Circuit.qk, "rotary", topic="position", share=("both", "made up"))
    monkeypatch.setitem(METRICS, NEW, row)
    heads = pd.DataFrame({"layer": [0], "head": [0], "qk_symmetry": [0.1], "qk_positional_share": [0.5]})
    heads = heads.assign(qk_share_position=0.5, qk_share_content=0.2, qk_share_interaction=0.2, **{NEW: 0.1})
    _, bars, _ = portraits.position_or_content({"heads": heads}, 0, 0).axes
    assert [label.get_text() for label in bars.get_yticklabels()][-2:] == ["both together", "made up"]
    assert page_data([], [], Path(), DETAILS[0])["shown"]["shares"]["rotary"][-1]["metric"] == NEW


def test_metrics_of_one_place_stand_in_their_order() -> None:
    for place in PLACES:
        orders = [METRICS[name].order for name in shown_in(place)]
        assert orders == sorted(orders)
    assert shown_in("atlas")[-1] == "ov_copying_residual"
