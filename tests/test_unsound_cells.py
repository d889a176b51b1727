"""Of several cells one is damaged or someone else's: it is named and left out, the others stand, no file is made
elsewhere, and it does not count as done."""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import compose
from support.reported import page_data

from ovqk import load_results
from ovqk.cell import run_cell
from ovqk.errors import UserError
from ovqk.records.cells import read_cells
from ovqk.records.record import fault, is_done, read_record
from ovqk.records.soundness import MOST_COLUMNS, NUMBERS, POSITIONS, TEXTS
from ovqk.report.write import write_report
from ovqk.tracking.__main__ import main as track
from ovqk.tracking.sweep_panels import read_sweeps

QUICK = ("analysis.components=1", "nulls.draws=19", "nulls.resamples=20", "nulls.subsamples=20", "tracking=none")


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """Two cells of one sweep."""
    results = tmp_path_factory.mktemp("computed")
    for task in ("ioi", "none"):
        run_cell(compose(f"task={task}", *QUICK, "sweep=both", f"results_dir={results}"))
    return results


@pytest.fixture
def results(computed, tmp_path) -> Path:
    return Path(shutil.copytree(computed, tmp_path / "results"))


def bad_cell(results: Path) -> Path:
    return next(results.glob("mini-attn/ioi/b03-*"))


def change_record(folder: Path, **changes: object) -> None:
    """Set keys of a record, with `__` between levels."""
    record = json.loads((folder / "record.json").read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        place = record
        for part in above:
            place = place[part]
        place[last] = value
    (folder / "record.json").write_text(json.dumps(record))


def change_table(folder: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = folder / f"{name}.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)


WRONG: list[object] = [None, True, 1.5, "x", [1], {"a": [1]}, -1]
RECORDS = [
    {key: value}
    for key in ("model", "task", "cell_id", "schema_version", "seed", "summary", "notes", "words", "processing",
                "provenance", "unavailable", "claims", "sweep", "tables", "provenance__wall_seconds",
                "provenance__config", "processing__applied", "summary__n_layers", "summary__n_heads",
                "provenance__weights_digest", "provenance__identity")
    for value in WRONG
]  # fmt: skip


def others_stand(results: Path, bad: Path) -> None:
    """Every reader leaves one cell out and keeps the other."""
    cells, failures = read_cells(results)
    assert len(cells) == 1 and len(failures) == 1, failures
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert set(load_results(results)["cells"]["task"]) == {"none"}
    assert any(bad.name in str(each.message) and "is left out" in str(each.message) for each in told)
    assert not is_done(bad)
    assert read_sweeps(results) == []  # of one cell


@pytest.mark.filterwarnings("ignore:cells of schema versions")
def test_wrong_values_of_a_record(results) -> None:
    """Each is either told, or such that all readers take it."""
    bad = bad_cell(results)
    sound = json.loads((bad / "record.json").read_text())
    told = 0
    for changes in RECORDS:
        (bad / "record.json").write_text(json.dumps(sound))
        change_record(bad, **changes)
        wrong = fault(bad, json.loads((bad / "record.json").read_text()))
        key = next(iter(changes))
        told += wrong is not None
        if wrong is not None:
            assert key.split("__")[-1] in wrong or "name its tables" in wrong, (changes, wrong)
        else:
            load_results(results, tables=["heads"])
    assert told > 110
    change_record(bad, seed="x")
    others_stand(results, bad)


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 10**400), ("seed", -1), ("seed", 2**32), ("schema_version", -(10**400)), ("summary__n_heads", 10**400),
    ("provenance__wall_seconds", 10**400), ("provenance__config__task__mine", [{"a": 2**63}]),
    ("provenance__config__tracking__project", 5), ("provenance__config__tracking__project", ["x"]),
    ("provenance__config__tracking__project", "a\x1b[2J"), ("provenance__config__tracking__entity", True),
    ("words__kept__a\x1b[2J\ud800", 10**30),
])  # fmt: skip
def test_a_value_that_would_cost_the_sweeps_run_is_told(results, key, value) -> None:
    bad = bad_cell(results)
    change_record(bad, **{key: value})
    said = fault(bad, read_record(bad) or {}) or ""
    named = key.replace("__", ".").replace("\x1b", "\\x1b").replace("\ud800", "\\ud800")
    assert said.startswith(f"its record.json gives {named}") and "; allowed: " in said and len(said) < 200
    others_stand(results, bad)


@pytest.mark.parametrize("value", [None, "", "mine"])
def test_a_project_and_an_entity_may_be_left_open(results, value) -> None:
    bad = bad_cell(results)
    change_record(bad, provenance__config__tracking={"project": value, "entity": value})
    assert is_done(bad)
    change_record(bad, provenance__config__tracking={}, seed=2**32 - 1, summary__mine=2**63 - 1)
    assert is_done(bad)


@pytest.mark.parametrize("table", sorted(POSITIONS))
def test_wrong_columns_of_a_table(results, table) -> None:
    bad = bad_cell(results)
    if not (bad / f"{table}.parquet").exists():
        return
    before = (bad / f"{table}.parquet").read_bytes()
    columns = (*POSITIONS[table], *NUMBERS.get(table, ()), *TEXTS.get(table, ()))
    for column in columns:
        for wrong in ("lost", "kind"):

            def spoil(frame: pd.DataFrame, column: str = column, wrong: str = wrong) -> pd.DataFrame:
                if wrong == "lost":
                    return frame.drop(columns=column)
                return frame.assign(**{column: ["x"] * len(frame) if column not in TEXTS.get(table, ()) else 1.0})

            change_table(bad, table, spoil)
            said = fault(bad, read_record(bad) or {})
            assert said is not None and f"{table}.parquet" in said and column in said
            (bad / f"{table}.parquet").write_bytes(before)
    change_table(bad, table, lambda frame: frame.assign(**{POSITIONS[table][0]: 10**9}))
    others_stand(results, bad)


@pytest.mark.parametrize("statistics", [True, False, ["head"]])
@pytest.mark.parametrize(("column", "value"), [("layer", 2 * 10**8), ("layer", -1), ("head", 99), ("head", 10**12)])
def test_a_position_beyond_the_model_is_told_with_and_without_statistics(results, column, value, statistics) -> None:
    bad = bad_cell(results)
    table = pq.read_table(bad / "tests.parquet").to_pandas()
    table.loc[len(table) - 1, column] = value
    pq.write_table(
        pa.Table.from_pandas(table, preserve_index=False),
        bad / "tests.parquet",
        write_statistics=statistics,
        row_group_size=3,
    )
    said = fault(bad, read_record(bad) or {}) or ""
    assert said.startswith(f"tests.parquet has {column} ") and f"{value:,}".replace(",", "") in said
    assert not is_done(bad)


def test_sound_tables_without_statistics_are_sound(results) -> None:
    """Also those whose rows of roles have no head."""
    bad = bad_cell(results)
    assert pd.read_parquet(bad / "tests.parquet")["head"].isna().any()
    for path in bad.glob("*.parquet"):
        pq.write_table(pq.read_table(path), path, write_statistics=False, row_group_size=20)
    assert fault(bad, read_record(bad) or {}) is None


def test_a_table_of_very_many_columns_is_refused_in_a_moment(results) -> None:
    bad = bad_cell(results)
    heads = pd.read_parquet(bad / "heads.parquet")
    more = pd.DataFrame(
        np.zeros((len(heads), 20_000), dtype="int8"), columns=[f"c{number}" for number in range(20_000)]
    )
    pd.concat([heads, more], axis=1).to_parquet(bad / "heads.parquet", index=False)
    started = time.process_time()
    said = fault(bad, read_record(bad) or {})
    assert said == f"heads.parquet has {heads.shape[1] + 20_000} columns; allowed: up to {MOST_COLUMNS}"
    assert time.process_time() - started < 2
    others_stand(results, bad)
    assert 10 * heads.shape[1] < MOST_COLUMNS


def test_two_columns_of_one_name_are_told(results) -> None:
    bad = bad_cell(results)
    table = pq.read_table(bad / "heads.parquet")
    pq.write_table(table.append_column("layer", table["layer"]), bad / "heads.parquet")
    assert fault(bad, read_record(bad) or {}) == "heads.parquet has several columns of one name, 'layer'"
    others_stand(results, bad)


@pytest.mark.parametrize("break_it", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1 half"),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: pd.read_parquet(path).head(3).to_parquet(path, index=False),
])  # fmt: skip
def test_a_cell_whose_tables_are_gone_is_not_done(results, break_it) -> None:
    bad = bad_cell(results)
    break_it(bad / "tests.parquet")
    assert not is_done(bad)
    others_stand(results, bad)


def test_a_cell_that_is_not_sound_is_computed_again(results) -> None:
    bad = bad_cell(results)
    (bad / "tests.parquet").unlink()
    again = run_cell(compose("task=ioi", *QUICK, f"results_dir={results}"))
    assert again.status == "done" and again.folder == str(bad)
    assert fault(bad, read_record(bad) or {}) is None
    assert run_cell(compose("task=ioi", *QUICK, f"results_dir={results}")).status == "cached"


@pytest.mark.parametrize(("change", "said"), [
    (lambda folder: change_record(folder, summary__n_heads=10**9), "gives summary.n_heads as 1000000000"),
    (lambda folder: change_table(folder, "heads", lambda frame: frame.iloc[:3]), "heads.parquet has 3 rows"),
    (lambda folder: change_record(folder, words={"kept": 1}), "gives words.kept as 1"),
    (lambda folder: change_table(folder, "heads", lambda frame: frame.assign(ov_copying="x")), "in ov_copying; all"),
])  # fmt: skip
def test_the_page_names_a_bad_cell_and_shows_the_others(results, change, said) -> None:
    bad = bad_cell(results)
    change(bad)
    lines = write_report(results, with_figures=False)
    data = page_data((results / "report.html").read_text())
    assert {cell["task"] for cell in data["cells"]} == {"none"}
    (line,) = (line for line in lines if line.startswith("without results: mini-attn / ioi / b03"))
    assert said in line


@pytest.mark.slow
def test_the_figures_of_other_cells_are_made(results) -> None:
    bad = bad_cell(results)
    change_table(bad, "verdicts", lambda frame: frame.assign(primary=[["x"]] * len(frame)))
    write_report(results)
    assert list((results / "figures").glob("*.svg"))
    (results / "report.html").unlink()


@pytest.mark.parametrize("name", ["../../evil", "*", "x" * 12, "ABCDEF012345", "", "0123456789ab/.."])
def test_tracking_takes_no_cell_id_of_another_form(results, tmp_path, monkeypatch, capsys, name, own_wandb) -> None:
    other = results / "wandb" / "offline-run-1-0123456789ab-012345"
    other.mkdir(parents=True)
    bad = bad_cell(results)
    change_record(bad, cell_id=name)
    good = next(results.glob("mini-attn/none/b03-*"))
    change_record(good, status="failed")  # so that W&B need not be started
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(results / ".locks")}
    monkeypatch.setattr(sys, "argv", ["tracking", str(results), "--mode", "offline"])
    with pytest.raises(SystemExit):
        track()
    assert "skipped" in (said := capsys.readouterr().err) and "gives cell_id as" in said
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(results / ".locks")} == before


def test_a_column_of_another_kind_leaves_its_cell_out_of_that_table(results, tmp_path) -> None:
    bad = bad_cell(results)
    change_table(bad, "tests", lambda frame: frame.assign(note=1.0))
    twins = [Path(shutil.copytree(results, tmp_path / name)) for name in "ab"]
    for number, twin in enumerate(twins):
        change_record(bad_cell(twin), cell_id=f"{number:012x}")
    change_table(bad_cell(twins[1]), "tests", lambda frame: frame.assign(note="x"))
    with pytest.warns(UserWarning, match=r"tests\.parquet of cell 0{11}1 is left out: note holds texts"):
        found = load_results([results, *twins])
    assert found["tests"]["cell_id"].nunique() == 2 and found["heads"]["cell_id"].nunique() == 4


@pytest.mark.parametrize("put", [
    lambda path: shutil.copy(path.with_name("heads.parquet"), path),
    lambda path: path.write_bytes(b"x"),
    lambda path: os.mkfifo(path),
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("/dev/zero"),
])  # fmt: skip
def test_a_table_that_the_record_does_not_name_is_not_believed(results, put) -> None:
    bad = bad_cell(results)
    put(bad / "joint.parquet")
    assert fault(bad, read_record(bad) or {}) == "joint.parquet is there, and its record.json does not name it"
    others_stand(results, bad)


@pytest.mark.parametrize("key", ["model", "task", "analysis", "sweep", "claims__of"])
def test_control_characters_of_a_record_are_not_shown(results, key) -> None:
    bad = bad_cell(results)
    change_record(bad, **{key: "a\x1b[2Jb"})
    said = fault(bad, read_record(bad) or {}) or ""
    assert said.startswith("its record.json gives ") and "\x1b" not in said


@pytest.mark.parametrize("key", ["sweep", "provenance__weights_digest", "processing__applied"])
def test_half_a_character_in_a_record_leaves_the_other_cells(results, key) -> None:
    bad = bad_cell(results)
    change_record(bad, **{key: "a\ud800"})
    others_stand(results, bad)


def test_a_folder_with_a_temporary_name_is_left_alone(results) -> None:
    bad = bad_cell(results)
    (bad / ".heads.parquet.77.tmp").mkdir()
    (bad / "tests.parquet").unlink()
    assert run_cell(compose("task=ioi", *QUICK, f"results_dir={results}")).status == "done"
    assert (bad / ".heads.parquet.77.tmp").is_dir()


def test_the_cell_of_another_id_in_a_folder_is_not_the_folders(results) -> None:
    bad = bad_cell(results)
    change_record(bad, cell_id="0123456789ab")
    again = run_cell(compose("task=ioi", *QUICK, f"results_dir={results}"))
    assert again.status == "done" and again.folder == str(bad)
    assert (read_record(bad) or {})["cell_id"] in bad.name


@pytest.mark.parametrize("changes", [
    {"words__reasons": [1]}, {"words__reasons": {"names": 3}}, {"words": {}}, {"claims": {}},
    {"processing__applied": "[/x]"}, {"notes": ["a\x1b[2Jb"]}, {"unavailable": {"qk_match": "a\x1b[2Jb"}},
])  # fmt: skip
def test_a_record_that_cannot_be_shown_is_one_message_and_what_is_shown_steers_no_terminal(
    cli, results, changes
) -> None:
    change_record(bad_cell(results), **changes)
    code, printed = cli("task=ioi", *QUICK, f"results_dir={results}")
    assert "Traceback" not in printed and "\x1b[2J" not in printed
    assert ("done before" if code == 0 else "its record cannot be shown") in printed


def test_other_files_in_a_cells_folder_are_left_alone(results) -> None:
    bad = bad_cell(results)
    os.mkfifo(bad / "mine.parquet")
    (bad / "notes.txt").touch()
    assert is_done(bad) and "mine" not in load_results(results)


@pytest.mark.parametrize(("place", "said"), [
    (".locks", "no cell can be locked (File exists: "),
    ("mini-attn", "the results cannot be written (Not a directory: "),
    ("mini-attn/none", "the results cannot be written (Not a directory: "),
])  # fmt: skip
def test_a_file_in_a_folders_place_is_one_message(tmp_path, place, said) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    choice = ("task=none", "analysis=qk", "analysis.components=0", "tracking=none", f"results_dir={tmp_path}")
    with pytest.raises(UserError) as found:
        run_cell(compose(*choice))
    assert f"results_dir={tmp_path}: {said}{tmp_path}" in str(found.value)
