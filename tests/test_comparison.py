"""Models side by side: the order of the rows, where heads lie, and the quarters of the depth."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from support.commands import compose
from support.models import BUNDLED

from ovqk.cell import run_cell
from ovqk.records import comparison
from ovqk.records.results import cell_folders, load_table
from ovqk.report import sweep_tables, terminal


def test_relative_depth_runs_from_the_first_layer_to_the_last() -> None:
    assert comparison.relative_depth(pd.Series([0, 1, 2, 4]), 5).tolist() == [0, 0.25, 0.5, 1]
    assert comparison.relative_depth(pd.Series([0]), 1).tolist() == [0]


def test_quarters_hold_each_layer_once_and_the_last_layer_is_in_the_last() -> None:
    heads = pd.DataFrame({"layer": [0, 0, 1, 2, 3, 4], "ov_copying": [0.0, 1.0, 0.2, 0.3, 0.4, 0.6]})
    means = comparison.quarter_means(heads, 5)["ov_copying"]
    assert list(means.index) == list(comparison.QUARTERS)
    assert means.tolist() == pytest.approx([0.5, 0.2, 0.3, 0.5])
    few = comparison.quarter_means(heads[heads["layer"] < 2], 2)["ov_copying"]
    assert few.iloc[0] == 0.5 and few.iloc[3] == 0.2 and few.iloc[1:3].isna().all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    results = tmp_path_factory.mktemp("compared") / "results"
    for overrides in (
        ["task=sva"],
        ["task=sva", "model=local", f"model.path={BUNDLED}", "model.name=twin", "model.claims=mini-attn"],
        ["task=none"],
        ["task=none", "processing=raw"],
    ):
        run_cell(compose("tracking=none", f"results_dir={results}", *overrides))
    return list(cell_folders(results))


def test_models_stand_beside_each_other_under_each_role(folders) -> None:
    table = comparison.roles(folders)
    claimed = table[table["role"] != ""]
    assert claimed["role"].tolist() == ["agreement_output"] * 2 + ["agreement_reader"] * 2
    assert claimed["model"].tolist() == ["mini-attn", "twin"] * 2
    for row in claimed.to_dict("records"):
        assert 0 <= row["depth"] <= 1 and sum(row["of_its_heads"].values()) == row["heads"]
    assert table[table["role"] == ""]["verdict"].unique().tolist() == ["no claims"]


def test_cells_of_one_model_task_and_analysis_are_told_apart_by_what_they_differ_in(folders) -> None:
    table = comparison.roles(folders)
    assert sorted(table[table["task"] == "none"]["cell"]) == ["processing=folded", "processing=raw"]
    assert set(table[table["task"] == "sva"]["cell"]) == {""}

    def record(**choice: object) -> dict:
        place = {"model": "m", "task": "t", "analysis": "a"}
        return place | {"provenance": {"identity": {"processing": "raw"} | choice}}

    made = [record(analysis={"embedding": "token", "n": 1}, weights=64 * "0", seed=0),
            record(analysis={"embedding": "block0", "n": 1}, weights=64 * "1", seed=0)]  # fmt: skip
    told = comparison.differences(made)
    assert [text.split()[0] for text in told] == ["embedding=token", "embedding=block0"]
    assert all(re.fullmatch(r"\S+ weights=[0-9a-f]{8}", text) for text in told) and told[0][-8:] != told[1][-8:]

    left_out = [record(analysis={"n": 1}), record(analysis={"n": 1, "diagonals": True})]  # as a default is
    assert comparison.differences(left_out) == ["", "diagonals=true"]


def test_other_weights_of_the_same_name_are_not_taken_for_the_same(folders, tmp_path) -> None:
    twin = shutil.copytree(folders[-1], tmp_path / "x" / "y" / "z")
    record = json.loads((twin / "record.json").read_text())
    own = record["provenance"]["weights_digest"][:8]
    record["provenance"]["weights_digest"] = 64 * "f"
    (twin / "record.json").write_text(json.dumps(record))
    table = comparison.depths([folders[-1], twin])
    assert set(table["weights"]) == {"ffffffff", own}
    out = terminal.output_console()
    with out.capture() as captured:
        out.print(sweep_tables.depth_table([folders[-1], twin]))
    assert "(ffffffff)" in captured.get()


def test_each_model_has_its_depth_profile_once_for_each_processing(folders) -> None:
    table = comparison.depths(folders)
    copying = table[table["metric"] == "ov_copying"]
    assert sorted(zip(copying["model"], copying["processing"], strict=True)) == [
        ("mini-attn", "folded"), ("mini-attn", "raw"), ("twin", "folded"),
    ]  # fmt: skip
    twin = copying[copying["model"] == "twin"].iloc[0]
    same = copying[(copying["model"] == "mini-attn") & (copying["processing"] == "folded")].iloc[0]
    assert np.allclose([twin[name] for name in comparison.QUARTERS], [same[name] for name in comparison.QUARTERS])


def test_effective_ranks_are_shares_of_the_rank_that_a_head_could_have(folders) -> None:
    table = comparison.depths(folders)
    assert not table["metric"].str.endswith("_effective_rank").any()
    for circuit in ("ov", "qk"):
        shares = table[table["metric"] == f"{circuit}_effective_rank / d_head"][list(comparison.QUARTERS)].to_numpy()
        assert (shares > 0).all() and (shares <= 1).all()
    heads = load_table(folders[-1], "heads")
    first = heads[heads["layer"] == 0]["ov_effective_rank"].mean() / 16  # d_head of mini-attn
    (twin,) = table[(table["model"] == "twin") & (table["metric"] == "ov_effective_rank / d_head")]["first quarter"]
    assert twin == pytest.approx(first)


def test_the_printed_tables_name_models_and_processing(folders) -> None:
    out = terminal.output_console()
    with out.capture() as captured:
        out.print(sweep_tables.role_table(folders))
        out.print(sweep_tables.depth_table(folders))
    text = captured.get()
    assert "mini-attn (raw)" in text and "twin (folded)" in text and "last quarter" in text
    assert "agreement output" in text and "no claims" in text
    assert "processing=raw" in text
