"""Records as DataFrames, and the one-liners of docs/results.md."""

import json
import re
import shutil
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
from support import ROOT
from support.commands import compose

import ovqk
from ovqk.cell import run_cell
from ovqk.records.results import COORDINATES, load_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of one model."""
    results = tmp_path_factory.mktemp("results") / "results"
    for task in ("ioi", "none"):
        run_cell(compose("tracking=none", "analysis=qk", "nulls.draws=19", f"task={task}", f"results_dir={results}"))
    return results


def folders(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("*/*/*/record.json"))


def test_one_frame_per_table_with_the_coordinates_first(results) -> None:
    found = ovqk.load_results(results)
    heads = found["heads"]
    assert tuple(heads.columns[:6]) == COORDINATES == ("model", "task", "analysis", "processing", "seed", "cell_id")
    assert heads.groupby("task").size().to_dict() == {"ioi": 32, "none": 32}
    assert found["verdicts"]["task"].unique().tolist() == ["ioi"]  # task=none makes none
    assert found["cells"][["model", "task", "n_layers"]].to_dict("list") == {
        "model": ["mini-attn"] * 2,
        "task": ["ioi", "none"],
        "n_layers": [4, 4],
    }


def test_values_and_types_are_those_of_the_files(results) -> None:
    for folder in folders(results):
        found = load_results(folder)
        for path in folder.glob("*.parquet"):
            pd.testing.assert_frame_equal(found[path.stem].drop(columns=list(COORDINATES)), pd.read_parquet(path))


def test_a_cell_a_model_or_several_places_are_read_and_a_cell_is_taken_once(results) -> None:
    first, second = folders(results)
    assert len(load_results(first)["cells"]) == 1
    assert len(load_results(results / "mini-attn")["cells"]) == 2
    both = load_results([first, str(second), results])
    assert both["cells"]["folder"].tolist() == [str(first), str(second)] and len(both["heads"]) == 64


def test_only_the_tables_that_were_asked_for(results) -> None:
    assert list(load_results(results, tables=["heads"])) == ["cells", "heads"]
    assert list(load_results(results, tables=[])) == ["cells"]
    with pytest.raises(ValueError, match=r"tables: head: in none of the 2 cells; there: .*heads"):
        load_results(results, tables=["head"])
    with pytest.raises(ValueError, match="must be a list of names"):
        load_results(results, tables="heads")


def test_places_without_results_are_named(results, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        load_results(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no results: no MODEL/TASK/ANALYSIS-ID folders"):
        load_results([results, tmp_path])
    failed = tmp_path / "mini-attn" / "ioi" / "qk-1"
    failed.mkdir(parents=True)
    (failed / "record.json").write_text('{"status": "failed"}')
    with pytest.raises(FileNotFoundError, match="no results: none of its 1 cells is done"):
        load_results(tmp_path)


def test_files_that_cannot_be_read_are_named(results, tmp_path) -> None:
    with pytest.raises(ValueError, match="places: none is given"):
        load_results([])
    damaged = shutil.copytree(results, tmp_path / "damaged")
    folder = folders(damaged)[0]
    (folder / "heads.parquet").write_bytes(b"PAR1 half")
    with pytest.warns(UserWarning, match=rf"{folder.name} is left out: heads.parquet cannot be read .*force=true"):
        assert len(load_results(damaged)["cells"]) == 1
    (folder / "record.json").write_text('{"status": "done"}')
    with pytest.warns(UserWarning, match=rf"{folder.name} is left out: its record.json has no model"):
        assert len(load_results(damaged)["cells"]) == 1


def test_cells_of_several_versions_are_told_of(results, tmp_path) -> None:
    mixed = shutil.copytree(results, tmp_path / "mixed")
    path = folders(mixed)[0] / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    with pytest.warns(UserWarning, match="cells of schema versions 1, "):
        load_results(mixed)


@pytest.mark.slow
def test_two_hundred_cells_are_read_in_seconds(results, tmp_path) -> None:
    cell = folders(results)[0]
    record = json.loads((cell / "record.json").read_text())
    for number in range(200):
        copy = shutil.copytree(cell, tmp_path / f"model{number % 20}" / "ioi" / f"qk-{number:012x}")
        (copy / "record.json").write_text(json.dumps(record | {"cell_id": f"{number:012x}"}))
    started = time.perf_counter()
    assert len(load_results(tmp_path, tables=["heads"])["heads"]) == 200 * 32
    assert time.perf_counter() - started < 20  # 1 s on a free machine


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    return re.findall(rf"```python\n# {language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("language", ["pandas", "duckdb", "polars"])
def test_the_documented_lines_run(results, tmp_path, monkeypatch, language) -> None:
    """In the folder above `results`, as the page says."""
    if language != "pandas":
        pytest.importorskip(language, reason=f"pip install {language}: it is not one of ovqk's dependencies")
    monkeypatch.chdir(results.parent)
    assert blocks(language)
    for block in blocks(language):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, "docs/results.md", "exec"), {})
