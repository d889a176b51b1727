"""What a process keeps between its cells: the same tables with it, everything read once, bounded in memory."""

from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from support.commands import compose

from ovqk.analyse import analyse
from ovqk.cell import KEPT, model_depends_on
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import effective_embeddings, vocabulary
from ovqk.circuits.composition import LayerCircuits
from ovqk.records.record import Analysis
from ovqk.structure.cache import StructureCache
from ovqk.structure.kept import KEPT_BYTES, Kept, once
from ovqk.tasks import task_readout
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import resolve_task
from ovqk.weights.native import NativeWeights
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel


def run(kept: Kept | None, *overrides: str, cache: Path | None = None) -> Analysis:
    cell = compose("model=mini-llama", "nulls.draws=19", "analysis.components=1", *overrides)
    checkpoint = open_checkpoint(cell.model)
    if kept is not None:
        kept.begin(model_depends_on(cell, checkpoint))
    opened = OpenedModel(open_weights(checkpoint, cell.model), "test", load_tokenizer(checkpoint))
    entries = None if cache is None else StructureCache(cache, 1.0, checkpoint.digest)
    return analyse(opened, cell, cache=entries, kept=kept)


@cache
def alone(*overrides: str) -> Analysis:
    """A cell of a process that keeps nothing, computed once."""
    return run(None, *overrides)


def same(one: Analysis, two: Analysis) -> None:
    assert one.tables.keys() == two.tables.keys() and one.summary == two.summary and one.notes == two.notes
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, two.tables[name], check_exact=True, obj=name)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The layers that were read from the checkpoint."""
    seen: list[int] = []
    whole = NativeWeights.layer
    monkeypatch.setattr(NativeWeights, "layer", lambda source, index: (seen.append(index), whole(source, index))[1])
    return seen


def test_a_second_cell_finds_the_layers_of_the_first_and_writes_the_same_tables(read, tmp_path) -> None:
    """The cache has the structure, which reads raw weights."""
    kept, second = Kept(), ("task=sva", "analysis=composition", "model.claims=null")
    without = run(None, *second)
    run(kept, "task=induction", cache=tmp_path)
    del read[:]
    same(run(kept, *second, cache=tmp_path), without)
    assert not read
    assert 0 < kept.used <= kept.most


@pytest.mark.slow
def test_without_room_nothing_is_kept_and_a_part_of_the_layers_serves_too(read, tmp_path) -> None:
    whole, none = Kept(), Kept(0)
    for kept in (whole, none):
        run(kept, "task=sva", cache=tmp_path)
    half = Kept(int(whole.used * 0.6))
    expected = run(half, "task=sva", cache=tmp_path)
    assert none.used == 0 < half.used <= half.most
    del read[:]
    same(run(half, "task=sva", cache=tmp_path), expected)
    assert 1 not in read and 3 in read  # the first layers are kept


@pytest.mark.slow
@pytest.mark.parametrize("other", ["processing=raw", "model=mini-gpt2"])
def test_layers_of_other_weights_are_not_taken(other) -> None:
    kept, without = Kept(), run(None, "task=none", other)
    run(kept, "task=none")
    same(run(kept, "task=none", other), without)


def test_products_with_grams_are_not_kept() -> None:
    kept = Kept()
    for _ in range(2):
        run(kept, "task=none")
        parts = [kept.parts(index) for index in range(4)]
        assert all(part.maps for part in parts)
        assert not any(products for part in parts for products in part.across.values())
    assert kept.used == sum(part.size for part in parts)


CELLS = [
    (f"task={task}", f"analysis={analysis}", "model.claims=null", "nulls.draws=120")
    for task in ("sva", "induction")
    for analysis in ("b03", "composition")
]
"""Two analyses of two tasks, whose candidates need one, two or all stages of draws."""


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)], ids=["as a sweep", "another order"])
@pytest.mark.parametrize("most", [KEPT_BYTES, 2**21], ids=["all layers", "some layers"])
def test_cells_write_the_tables_that_they_write_alone_in_any_order(order, most, tmp_path) -> None:
    kept = Kept(most)
    for index in order:
        same(run(kept, *CELLS[index], cache=tmp_path), alone(*CELLS[index]))
        assert 0 < kept.used <= most


def test_a_process_keeps_no_more_layers_than_it_may_though_they_grow() -> None:
    """A cell with all pairs asks for decompositions that the cell before did not need."""
    whole = Kept()
    run(whole, "task=none", "analysis=ov")
    least = whole.used
    kept = Kept(least)
    run(kept, "task=none", "analysis=ov")
    assert kept.used == least
    run(kept, "task=none", "analysis=composition")
    assert kept.used <= least and kept.used == sum(kept.parts(index).size for index in range(4))


def test_a_second_task_takes_no_gram_and_a_second_analysis_reads_no_word(monkeypatch, tmp_path) -> None:
    kept, passes, read = Kept(), list[int](), list[str]()
    for module in (vocabulary, effective_embeddings):
        whole = module.centred_grams
        monkeypatch.setattr(
            module, "centred_grams", lambda sides, pairs, of=whole: passes.append(1) or of(sides, pairs)
        )
    monkeypatch.setattr(
        task_readout, "resolve_task", lambda task, *more: read.append(task.name) or resolve_task(task, *more)
    )
    for cell in CELLS:
        run(kept, *cell, cache=tmp_path)
        if cell is CELLS[0]:
            first = len(passes)
    assert first == len(passes) > 0 and read == ["sva", "induction"]


@pytest.mark.slow
def test_later_tasks_read_no_table_of_the_cache_again_and_decompose_nothing_for_pairs_in_it(
    monkeypatch, tmp_path
) -> None:
    kept, read, decomposed = Kept(), list[Path](), list[int]()
    table, both = pd.read_parquet, LayerCircuits.of
    monkeypatch.setattr(pd, "read_parquet", lambda *given: (read.append(given[0]), table(*given))[1])
    monkeypatch.setattr(LayerCircuits, "of", lambda *given: (decomposed.append(1), both(*given))[1])
    every = [(f"task={task}", "analysis=composition", "model.claims=null") for task in ("sva", "induction", "sva")]
    made = [run(kept, *cell, cache=tmp_path) for cell in every[:2]]
    assert len(read) == 7  # structure's 4 tables, token lists, composition's 2
    assert len(decomposed) == 4  # the layers, by the cell that composed them
    made.append(run(kept, *every[2], cache=tmp_path))
    assert len(read) == 7 and len(decomposed) == 4
    for cell, found in zip(every, made, strict=True):
        same(found, alone(*cell))


def test_a_value_is_made_again_if_what_it_depends_on_differs() -> None:
    kept = Kept()
    kept.begin("one model")
    assert kept.value("words", ["a"], lambda: 1) == 1 and kept.has("words", ["a"])
    assert kept.value("words", ["a"], lambda: 2) == 1
    assert kept.value("words", ["b"], lambda: 3) == 3 and not kept.has("words", ["a"])
    kept.begin("one model")
    assert kept.has("words", ["b"])
    kept.begin("another model")
    assert not kept.has("words", ["b"])
    with pytest.raises(ZeroDivisionError):
        kept.value("words", ["c"], lambda: 1 // 0)
    assert not kept.has("words", ["c"]) and once(None, "words", ["b"], lambda: 4) == 4


@pytest.mark.slow
def test_a_sweep_in_one_process_keeps_layers_and_a_single_run_does_not(cli, tmp_path) -> None:
    KEPT.begin("")
    cell = ["model=mini-attn", "task=none", "tracking=none", f"results_dir={tmp_path / 'r'}", "analysis.components=0"]
    assert cli(*cell)[0] == 0 and KEPT.used == 0
    assert cli("-m", *cell, "seed=1,2")[0] == 0 and KEPT.used > 0
    KEPT.begin("")
    assert KEPT.used == 0 and not KEPT.parts(0).maps
