"""Layers that a process keeps between its cells: the same tables with them, each layer read once, bounded in memory."""

from pathlib import Path

import pandas as pd
import pytest
from support.commands import compose

from ovqk.analyse import analyse
from ovqk.cell import KEPT, layers_depend_on
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.records.record import Analysis
from ovqk.structure.cache import StructureCache
from ovqk.structure.kept_layers import KeptLayers
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.native import NativeWeights
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel


def run(kept: KeptLayers | None, *overrides: str, cache: Path | None = None) -> Analysis:
    cell = compose("model=mini-llama", "nulls.draws=19", "analysis.components=1", *overrides)
    checkpoint = open_checkpoint(cell.model)
    if kept is not None:
        kept.begin(layers_depend_on(cell, checkpoint))
    opened = OpenedModel(open_weights(checkpoint, cell.model), "test", load_tokenizer(checkpoint))
    entries = None if cache is None else StructureCache(cache, 1.0, checkpoint.digest)
    return analyse(opened, cell, cache=entries, kept=kept)


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
    kept, second = KeptLayers(), ("task=sva", "analysis=composition", "model.claims=null")
    without = run(None, *second)
    run(kept, "task=induction", cache=tmp_path)
    del read[:]
    same(run(kept, *second, cache=tmp_path), without)
    assert set(read) == {0}  # block 0, whose attention and MLP make block0 embeddings
    assert 0 < kept.used <= kept.most


@pytest.mark.slow
def test_without_room_nothing_is_kept_and_a_part_of_the_layers_serves_too(read, tmp_path) -> None:
    whole, none = KeptLayers(), KeptLayers(0)
    for kept in (whole, none):
        run(kept, "task=sva", cache=tmp_path)
    half = KeptLayers(int(whole.used * 0.6))
    expected = run(half, "task=sva", cache=tmp_path)
    assert none.used == 0 < half.used <= half.most
    del read[:]
    same(run(half, "task=sva", cache=tmp_path), expected)
    assert 1 not in read and 3 in read  # the first layers are kept


@pytest.mark.slow
@pytest.mark.parametrize("other", ["processing=raw", "model=mini-gpt2"])
def test_layers_of_other_weights_are_not_taken(other) -> None:
    kept, without = KeptLayers(), run(None, "task=none", other)
    run(kept, "task=none")
    same(run(kept, "task=none", other), without)


def test_products_with_grams_are_not_kept() -> None:
    kept = KeptLayers()
    for _ in range(2):
        run(kept, "task=none")
        parts = [kept.parts(index) for index in range(4)]
        assert all(part.maps for part in parts)
        assert not any(products for part in parts for products in part.across.values())
    assert kept.used == sum(part.size for part in parts)


@pytest.mark.slow
def test_a_sweep_in_one_process_keeps_layers_and_a_single_run_does_not(cli, tmp_path) -> None:
    KEPT.begin("")
    cell = ["model=mini-attn", "task=none", "tracking=none", f"results_dir={tmp_path / 'r'}", "analysis.components=0"]
    assert cli(*cell)[0] == 0 and KEPT.used == 0
    assert cli("-m", *cell, "seed=1,2")[0] == 0 and KEPT.used > 0
    KEPT.begin("")
    assert KEPT.used == 0 and not KEPT.parts(0).maps
