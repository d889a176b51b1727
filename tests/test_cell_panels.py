"""What a W&B run shows, as plain data."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import ROOT
from support.commands import compose

from ovqk.cell import run_cell
from ovqk.metrics import shown_in
from ovqk.records.record import read_record
from ovqk.tracking import cell_panels
from ovqk.tracking.cell_panels import plain_table, read_panels


def cell(results: Path, *overrides: str) -> Path:
    run_cell(compose("tracking=none", "nulls.draws=19", f"results_dir={results}", *overrides))
    (record,) = results.glob("*/*/*/record.json")
    return record.parent


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cell(tmp_path_factory.mktemp("panels") / "results")


def test_the_documented_panels_exist(claimed) -> None:
    """Every key of the dashboard in docs/wandb.md is one that runs have."""
    recipe = (ROOT / "docs" / "wandb.md").read_text(encoding="utf-8").split("## A dashboard")[1]
    shown = read_panels(claimed, read_record(claimed))
    known = {
        "depth": {*shown_in("curve"), *shown.curves.columns},
        "histograms": set(shown_in("histogram")),
        "eigenvalues": set(shown.eigenvalues),
        "tables": set(cell_panels.TABLES),
        "health": {name.removeprefix("health/") for name in shown.scalars},
    }
    keys = re.findall(rf"`({'|'.join(known)})/(\w+)`", recipe)
    assert len(keys) > 25 and {kind for kind, _ in keys} == set(known)
    assert [f"{kind}/{name}" for kind, name in keys if name not in known[kind]] == []


def test_curves_are_means_over_the_heads_of_a_layer(claimed) -> None:
    shown = read_panels(claimed, read_record(claimed))
    heads = pd.read_parquet(claimed / "heads.parquet")
    assert shown.curves["layer"].tolist() == [0, 1, 2, 3]
    assert shown.curves["relative_depth"].tolist() == [0, 1 / 3, 2 / 3, 1]
    mean = heads[heads["layer"] == 2]["ov_copying"].mean()
    assert shown.curves.set_index("layer").at[2, "ov_copying"] == pytest.approx(mean)


def test_histograms_have_the_metrics_own_bins_and_all_heads(claimed) -> None:
    shown = read_panels(claimed, read_record(claimed))
    counts, edges = shown.histograms["ov_copying"]
    assert (edges[0], edges[-1]) == (-1, 1) and counts.sum() == 32
    assert set(shown.histograms) <= set(shown_in("histogram"))


def test_eigenvalues_are_of_the_claimed_heads(claimed) -> None:
    shown = read_panels(claimed, read_record(claimed)).eigenvalues
    assert {"ov_residual", "ov_vocab", "qk_residual", "qk_vocab"} <= set(shown)
    lines = shown["ov_vocab"]
    verdicts = pd.read_parquet(claimed / "verdicts.parquet").query("kind == 'head'")
    labels = {f"{int(row.layer)}.{int(row.head)}" for row in verdicts.itertuples()}
    assert {label.split()[0] for label in lines["lineKey"]} == labels
    spectra = pd.read_parquet(claimed / "spectra.parquet").query(
        "circuit == 'ov' and space == 'vocab' and kind == 'eigen'"
    )
    some = verdicts.iloc[0]
    own = spectra.query(f"layer == {some['layer']} and head == {some['head']}").sort_values("index")["re"]
    first = lines[lines["lineKey"].str.startswith(f"{int(some['layer'])}.{int(some['head'])} ")].sort_values("step")
    assert first["lineVal"].tolist() == own.tolist()


def test_tables_bear_the_coordinates_and_nulls_are_a_row_each(claimed) -> None:
    shown = read_panels(claimed, read_record(claimed)).tables
    for table in shown.values():
        assert table.columns[:3].tolist() == ["model", "task", "analysis"] and set(table["model"]) == {"mini-attn"}
    nulls = pd.read_parquet(claimed / "nulls.parquet")
    keys = ["role", "layer", "head", "metric", "null"]
    assert len(shown["nulls"]) == len(nulls[keys].drop_duplicates())
    last = nulls.iloc[-1]
    assert shown["nulls"].iloc[-1][f"q{100 * last['quantile']:g}"] == last["value"]


def test_directions_are_a_row_per_component_with_the_tokens_of_both_ends(claimed) -> None:
    shown = read_panels(claimed, read_record(claimed)).tables["directions"]
    rows = pd.read_parquet(claimed / "directions.parquet").query(
        "layer == 3 and head == 0 and circuit == 'ov' and kind == 'singular' and component == 0"
    )
    found = shown.query("layer == 3 and head == 0 and circuit == 'ov' and kind == 'singular' and component == 0")
    assert len(found) == 1
    for column, side, sign in (("read", "read", 1), ("write_opposite", "write", -1)):
        tokens = rows[(rows["side"] == side) & (rows["sign"] == sign)].sort_values("rank")["token"].head(5)
        assert found.iloc[0][column] == " ".join(map(repr, tokens))


def test_a_long_table_is_cut_to_its_leading_rows_and_the_summary_says_so(claimed, monkeypatch) -> None:
    monkeypatch.setattr(cell_panels, "MAX_ROWS", 40)
    shown = read_panels(claimed, read_record(claimed))
    components = len(pd.read_parquet(claimed / "directions.parquet").drop_duplicates(cell_panels.COMPONENT))
    assert len(shown.tables["directions"]) == 40 and set(shown.tables["directions"]["component"]) == {0}
    assert shown.scalars["rows_left_out/directions"] == components - 40
    assert "rows_left_out/heads" not in shown.scalars


def test_scalars_are_plain_and_say_how_the_cell_is(claimed) -> None:
    scalars = read_panels(claimed, read_record(claimed)).scalars
    assert all(isinstance(value, int | float | str) or value is None for value in scalars.values())
    json.dumps(scalars, allow_nan=False)
    assert scalars["status"] == "done" and scalars["health/words_kept"] > 0
    assert scalars["health/unavailable_metrics"] == len(read_record(claimed)["unavailable"])
    assert 0 < scalars["health/null_seconds"] < scalars["health/wall_seconds"]


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["model.claims=null", "analysis=ov"], "name mover"),  # candidates
        (["task=none", "analysis=qk"], ""),
        (["task=none", "analysis=composition"], ""),
    ],
    ids=["candidates", "structure", "composition"],
)
def test_a_cell_without_claims_shows_other_heads(tmp_path, overrides, label) -> None:
    folder = cell(tmp_path / "results", *overrides)
    shown = read_panels(folder, read_record(folder))
    assert "verdicts" not in shown.tables and not shown.curves.empty
    for lines in shown.eigenvalues.values():
        assert 1 <= lines["lineKey"].nunique() <= 32 and any(label in name for name in lines["lineKey"])


def test_columns_have_one_type_and_what_is_missing_is_none() -> None:
    frame = pd.DataFrame(
        {
            "number": [1.5, np.nan, np.inf],
            "count": [1, 2, 3],
            "flag": [True, False, None],
            "text": ["a", None, "b"],
            "layer": pd.array([1, None, 3], dtype="Int64"),
            "mixed": ["a", 1, None],
        }
    )
    kinds, rows = plain_table(frame)
    assert kinds == [float, float, bool, str, float, str]
    assert rows == [[1.5, 1, True, "a", 1, "a"], [None, 2, False, None, None, "1"], [None, 3, None, "b", 3, None]]
    assert frame["number"].isna().sum() == 1  # the caller's table is left alone
