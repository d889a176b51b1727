"""Predictions about a role that are tested as its one head with a value: which rows they are, and where told."""

import json

import pandas as pd
import pytest
from support.commands import compose

from ovqk.cell import run_cell
from ovqk.records.cells import read_cells
from ovqk.records.record import read_record
from ovqk.records.role_tests import about_roles, further_predictions
from ovqk.report.page import make_page
from ovqk.report.terminal import print_cell

PREDICTIONS = [
    {"metric": "ov_copying", "direction": "high", "exploratory": False, "first_layer": None},
    {"metric": "qk_matching_block0", "direction": "high", "exploratory": False, "first_layer": "qk_matching"},
    {"metric": "k_composition", "direction": "high", "exploratory": False, "first_layer": None},
    {"metric": "qk_prev_auc", "direction": "low", "exploratory": True, "first_layer": None},
]
RECORD = {"provenance": {"config": {"task": {"roles": {"mover": {"predictions": PREDICTIONS}}}}}}


def rows_of(*rows: tuple[object, ...]) -> pd.DataFrame:
    """Rows of tests.parquet: metric, direction, layer, head."""
    made = pd.DataFrame(rows, columns=["metric", "prediction", "layer", "head"])
    return made.assign(role="mover", layer=made["layer"].astype("Int64"), head=made["head"].astype("Int64"))


def test_a_secondary_prediction_with_one_valued_head_is_about_the_role() -> None:
    table = rows_of(
        ("ov_copying", "high", None, None), ("ov_copying", "high", 1, 2), ("ov_copying", "high", 3, 0),
        ("qk_matching_block0", "high", 3, 0), ("k_composition", "high", 1, 2), ("qk_prev_auc", "low", 1, 2),
        ("qk_prev_auc", "high", 3, 0),
    )  # fmt: skip
    assert about_roles(table, RECORD).tolist() == [True, False, False, True, False, True, False]
    (line,) = further_predictions(table, RECORD)
    assert line == (
        "mover: qk_matching_block0 ↑ (secondary, by its one head 3.0), qk_prev_auc ↓ (exploratory, by its one head 1.2)"
    )


def test_a_heads_other_metric_in_layer_0_does_not_stand_for_a_role_that_is_tested() -> None:
    together = ("qk_matching_block0", "high", None, None)
    rows = (("qk_matching", "high", 0, 1), ("qk_matching_block0", "high", 3, 0))
    assert about_roles(rows_of(together, *rows), RECORD).tolist() == [True, False, False]
    assert about_roles(rows_of(*rows), RECORD).tolist() == [False, False]  # of two heads neither stands for the role
    assert about_roles(rows_of(rows[0]), RECORD).tolist() == [True]


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """mini-gpt2 claims one previous-token head, and two induction heads."""
    results = tmp_path_factory.mktemp("roles")
    choices = ("model=mini-gpt2", "task=induction", "tracking=none", "nulls.draws=39", f"results_dir={results}")
    return results, results / run_cell(compose(*choices)).folder


def test_the_terminal_names_every_further_prediction_and_its_place(cell, capsys) -> None:
    print_cell(cell[1], cached=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Further predictions, in tests.parquet" in printed
    assert "qk_prev_auc ↑ (exploratory, by its one head 0.5)" in printed and "k_composition ↑ (secondary)," in printed


def test_the_page_shows_a_roles_own_primary_beside_what_is_tested_for_the_role(cell) -> None:
    results, folder = cell
    table = pd.read_parquet(folder / "tests.parquet")
    shown = table[about_roles(table, read_record(folder)) & (table["role"] == "previous_token")]
    assert set(shown["metric"]) == {"qk_simulated_previous", "k_composition", "qk_prev_auc"}
    assert shown[shown["metric"] == "k_composition"]["layer"].isna().all()
    assert "of_role" in json.dumps(make_page(*read_cells(results), results).html)
