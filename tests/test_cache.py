"""The cache of structure: the same tables from it as without it; shared, bounded, and never poisoned."""

import errno
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from support import ROOT
from support.commands import compose
from support.models import local

from ovqk.analyse import analyse
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.errors import UserError
from ovqk.records.record import Analysis
from ovqk.structure import stages
from ovqk.structure.cache import ENTRY, StructureCache
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel


def run(cache: StructureCache | None, *overrides: str, digest: str | None = None) -> Analysis:
    """A cell of the bundled model; of `digest`, where the cache is to take it for another model."""
    cell = compose("model=mini-attn", "nulls.draws=19", *overrides)
    checkpoint = open_checkpoint(cell.model)
    if cache is not None:
        cache.digest = digest or checkpoint.digest
    source, tokenizer = open_weights(checkpoint, cell.model), load_tokenizer(checkpoint)
    return analyse(OpenedModel(source, "test", tokenizer), cell, cache=cache)


@pytest.fixture
def cache(tmp_path) -> StructureCache:
    return StructureCache(tmp_path / "cache", 1.0, "")


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[StructureCache, Analysis]:
    """A cache after one cell without a task, and the cell."""
    used = StructureCache(tmp_path_factory.mktemp("first"), 1.0, "")
    return used, run(used, "task=none")


@pytest.fixture
def filled(first, cache) -> Analysis:
    """The cell whose structure is in the test's cache already."""
    shutil.copytree(first[0].folder, cache.folder, dirs_exist_ok=True)
    return first[1]


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The layers whose structure was computed."""
    seen: list[int] = []
    whole = stages.layer_structure

    def counting(layer):
        seen.append(layer.index)
        return whole(layer)

    monkeypatch.setattr(stages, "layer_structure", counting)
    return seen


def entries(cache: StructureCache, table: str = "heads") -> list:
    """The marks of the entries that hold this table."""
    return sorted(path.parent / ENTRY for path in cache.folder.glob(f"*/{table}.parquet"))


def same(one: Analysis, two: Analysis) -> None:
    assert one.tables.keys() == two.tables.keys()
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, two.tables[name], check_dtype=False, check_exact=True, obj=name)
    assert one.summary == two.summary and one.unavailable == two.unavailable


@pytest.mark.parametrize("task", ["sva", "none"])
def test_another_task_takes_the_structure_from_the_cache_and_gets_the_same_tables(cache, computed, task) -> None:
    """A task without words too: its heads are read through block 0 all the same."""
    without = run(None, f"task={task}")
    assert without.tables["heads"]["ov_copying_block0"].notna().any()
    run(cache, "task=ioi")
    del computed[:]
    same(run(cache, f"task={task}"), without)
    assert computed == [] and len(entries(cache)) == 1


@pytest.mark.parametrize(
    "override",
    ["processing=raw", "seed=1", "analysis.directions_embedding=block0", "analysis=qk", "analysis.diagonals=true"],
)
def test_what_the_tables_depend_on_has_an_entry_of_its_own(cache, filled, computed, override) -> None:
    run(cache, "task=none", override)
    assert computed == [0, 1, 2, 3] and len(entries(cache)) == 2


@pytest.mark.parametrize("override", ["analysis.components=2", "analysis.rare_tokens=true"])
@pytest.mark.parametrize("embedding", ["token", "block0"])
def test_other_lists_of_tokens_share_the_rest_of_the_structure(
    cache, computed, embedding, override, monkeypatch
) -> None:
    """Block0 rows are read in the same blocks, whether their Grams were computed before or not."""
    monkeypatch.setattr("ovqk.circuits.grams.BLOCK_ELEMENTS", 3000)
    cell = ["model=mini-llama", "task=none", f"analysis.directions_embedding={embedding}"]
    without = run(None, *cell, override)
    run(cache, *cell)
    del computed[:]
    same(run(cache, *cell, override), without)
    assert computed == [] and len(entries(cache)) == 1 and len(entries(cache, "directions")) == 2


@pytest.mark.slow
def test_all_pairs_are_composed_once_for_all_tasks(cache, computed, monkeypatch) -> None:
    """And another analysis finds the structure that it shares with them."""
    cell = ["model=mini-llama", "model.claims=null", "analysis=composition"]
    tasks = ["sva", "none"]
    without = [run(None, *cell, f"task={task}") for task in tasks]
    run(cache, *cell[:2], "task=sva", "analysis=b03")
    run(cache, *cell, "task=induction")
    del computed[:]

    def again(*_: object, **__: object) -> None:
        raise AssertionError("composed again")

    monkeypatch.setattr("ovqk.analyse.composition_table", again)
    for task, expected in zip(tasks, without, strict=True):
        found = run(cache, *cell, f"task={task}")
        same(found, expected)
        assert found.notes == expected.notes and len(found.tables["virtual_heads"])
    assert computed == [] and len(entries(cache)) == len(entries(cache, "composition")) == 1


@pytest.mark.slow
def test_pairs_that_claims_name_have_an_entry_of_their_own(cache) -> None:
    cell = ["model=mini-llama", "task=induction"]
    without = [run(None, *cell, f"analysis={name}") for name in ("b03", "composition")]
    for _ in range(2):
        for name, expected in zip(("b03", "composition"), without, strict=True):
            found = run(cache, *cell, f"analysis={name}")
            same(found, expected)
            assert found.notes == expected.notes
    assert len(entries(cache, "composition")) == 2


def test_other_weights_and_other_code_have_entries_of_their_own(cache, computed, monkeypatch) -> None:
    run(cache, "task=none")
    run(cache, "task=none", digest="of other weights")
    monkeypatch.setattr("ovqk.structure.cache.code_digest", lambda: "changed")
    run(cache, "task=none")
    assert computed == [0, 1, 2, 3] * 3 and len(entries(cache)) == 3


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _flip(folder / "heads.parquet"),
        lambda folder: (folder / "spectra.parquet").write_bytes((folder / "spectra.parquet").read_bytes()[:-9]),
        lambda folder: (folder / "layers.parquet").unlink(),
        lambda folder: (folder / ENTRY).write_text("{"),
        lambda folder: (folder / ENTRY).write_text("[]"),
        lambda folder: (folder / ENTRY).unlink(),
    ],
    ids=["a flipped bit", "cut short", "a table missing", "no json", "other json", "no mark"],
)
def test_a_damaged_entry_is_computed_again(cache, filled, computed, damage) -> None:
    folder = entries(cache)[0].parent
    damage(folder)
    same(run(cache, "task=none"), filled)
    assert computed == [0, 1, 2, 3]
    del computed[:]
    same(run(cache, "task=none"), filled)
    assert computed == [] and len(entries(cache)) == 1


def test_a_full_disk_costs_the_keeping_and_leaves_nothing_behind(cache, monkeypatch) -> None:
    def full(self, path, **keys):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        found = run(cache, "task=none")
    assert len(found.tables["heads"]) == 32
    assert [path.name for path in cache.folder.iterdir() if not path.name.endswith(".lock")] == []
    same(run(cache, "task=none"), found)


def test_a_home_that_cannot_be_written_means_no_cache(tmp_path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    assert len(run(StructureCache(tmp_path / "cache", 1.0, ""), "task=none").tables["heads"]) == 32


def test_the_longest_unused_entries_go_first(cache, computed) -> None:
    cell = "task=none", "analysis.components=0"
    for seed in range(3):
        run(cache, *cell, f"seed={seed}")
    sizes = [sum(path.stat().st_size for path in mark.parent.iterdir()) for mark in entries(cache)]
    run(cache, *cell, "seed=0")  # used again: no longer the oldest
    cache.most = 3.5 * max(sizes)
    run(cache, *cell, "seed=3")
    assert len(entries(cache)) == 3
    del computed[:]
    run(cache, *cell, "seed=0")
    assert computed == []  # it was still there
    run(cache, *cell, "seed=1")
    assert computed == [0, 1, 2, 3] and len(entries(cache)) == 3


def test_what_a_killed_process_left_is_thrown_away_first(cache) -> None:
    left = cache.folder / ".0123.4567.tmp"
    left.mkdir(parents=True)
    (left / "heads.parquet").write_bytes(bytes(10**6))
    for path in (left / "heads.parquet", left):
        os.utime(path, (0, 0))
    cache.most = 1e6
    run(cache, "task=none")
    assert not left.exists() and len(entries(cache)) == 1


def test_an_entry_that_another_process_throws_away_while_it_is_read_is_still_read(
    cache, filled, computed, monkeypatch
) -> None:
    def gone(path) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("ovqk.structure.cache.os.utime", gone)
    same(run(cache, "task=none"), filled)
    assert computed == []


def test_processes_that_need_the_same_compute_it_once(tmp_path) -> None:
    code = (
        "from pathlib import Path; import test_cache as t; from ovqk.structure import stages\n"
        "whole = stages.layer_structure\n"
        "stages.layer_structure = lambda layer: (print('computed', layer.index), whole(layer))[1]\n"
        f"t.run(t.StructureCache(Path({str(tmp_path)!r}), 1.0, ''), 'task=none')\n"
    )
    call, path = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": os.pathsep.join(("tests", "."))}
    both = [subprocess.Popen(call, cwd=ROOT, env=path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("computed") for text in said) == [0, 4]


def test_the_cache_can_be_turned_off_moved_and_bounded(cli, tmp_path) -> None:
    cell = ["model=mini-attn", "task=none", "tracking=none", f"cache_dir={tmp_path / 'mine'}"]
    assert cli(*cell, "cache=off", f"results_dir={tmp_path / 'off'}")[0] == 0
    assert not (tmp_path / "mine").exists()
    assert cli(*cell, f"results_dir={tmp_path / 'on'}")[0] == 0
    assert len(list((tmp_path / "mine" / "structure").glob(f"*/{ENTRY}"))) == 2  # structure, directions
    written = next((tmp_path / "on").glob("mini-attn/none/*/cell.yaml")).read_text()
    assert "cache" not in written  # a machine's own matter
    with pytest.raises(UserError, match=r"cache_gb=0.0: must be a positive number"):
        compose("model=mini-attn", "cache_gb=0")


def test_a_cell_of_a_local_model_is_cached_by_its_weights(tiny_gpt2, tmp_path, computed) -> None:
    for place in ("one", "two"):
        folder = tmp_path / place
        folder.mkdir()
        for path in tiny_gpt2.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        cell = compose("task=none", "model=local", f"model.path={folder}")
        checkpoint = open_checkpoint(local(folder))
        found = StructureCache(tmp_path / "cache", 1.0, checkpoint.digest)
        analyse(OpenedModel(open_weights(checkpoint, cell.model), "test"), cell, cache=found)
    assert len(entries(found)) == 1 and computed == [0, 1, 2]


def test_an_entry_belongs_to_the_code_of_every_module_of_every_folder(tmp_path, monkeypatch) -> None:
    """A changed file in any folder of the package, or a file that moved, is other code."""
    from ovqk.structure import cache as module

    def code(*names: str) -> str:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        module.code_digest.cache_clear()
        return module.code_digest()

    assert module.PACKAGE == ROOT / "ovqk"
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    seen = [code("top.py"), code("folder/inner.py"), code("folder/deeper/last.py")]
    assert len(set(seen)) == 3
    (tmp_path / "folder" / "inner.py").rename(tmp_path / "folder" / "other.py")
    module.code_digest.cache_clear()
    assert module.code_digest() not in seen
    module.code_digest.cache_clear()
