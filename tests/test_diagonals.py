"""Ranks of the full circuits' diagonals over vocabularies that pass in blocks: planted heads, properties, cells."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import BUNDLED, local
from support.toy import run

from ovqk import library
from ovqk.circuits import diagonals
from ovqk.circuits.diagonals import PlaceSearch, growing_blocks, own_ranks, ranked_tokens, share_up_to
from ovqk.records.identity import cell_id, identity


def searched(left, right, own, count: int, signs=(1, -1)) -> PlaceSearch:
    """A search through all rows of `left`, for the columns `own` of `right`."""
    search = PlaceSearch(right[:, own], left[:, own], own, count, signs)
    for some in growing_blocks(left.shape[1]):
        search.compare(some.start, {head: left[head, some] for head in search.open_heads})
    return search


@given(seed=st.integers(0, 300), n=st.integers(3, 60), count=st.integers(1, 12), first=st.integers(1, 9))
def test_the_search_finds_the_places_of_the_whole_matrix(seed, n, count, first) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(3, n, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    own = torch.randperm(n, generator=generator)[: n // 2 + 1]
    before = diagonals.FEWEST_AT_ONCE
    diagonals.FEWEST_AT_ONCE = first
    try:
        search = searched(left, right, own, count)
    finally:
        diagonals.FEWEST_AT_ONCE = before
    ranks = own_ranks(left, right[:, own], own)
    assert torch.equal(search.share(1), share_up_to(ranks.from_largest, count))
    assert torch.equal(search.share(-1), share_up_to(ranks.from_smallest, count))


@given(n=st.integers(1, 30_000))
def test_blocks_cover_every_token_once_and_ranked_tokens_are_spread_over_them(n) -> None:
    covered = [(some.start, some.stop) for some in growing_blocks(n)]
    assert covered[0][0] == 0 and covered[-1][1] == n
    assert all(stop == start for (_, stop), (start, _) in pairwise(covered))
    ids = ranked_tokens(n)
    assert len(ids) == len(ids.unique()) == min(n, diagonals.COLUMNS) and int(ids.min()) >= 0 and int(ids.max()) < n
    assert n == 1 or ids.diff().max() - ids.diff().min() <= 1


def test_planted_heads_are_found_among_many_tokens() -> None:
    """A copying head, a suppressing one, one of zeros, and one that copies every second token."""
    n = 3000
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n, 32, generator=generator, dtype=torch.float64), dim=-1)
    halves = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()[:, None]
    left = torch.stack([rows, -rows, 0 * rows, rows])
    right = torch.stack([rows, rows, rows, halves * rows])
    search = searched(left, right, ranked_tokens(n), 10)
    even = float((ranked_tokens(n) % 2 == 0).double().mean())
    assert search.share(1).tolist() == pytest.approx([1, 0, 0, even])
    assert search.share(-1).tolist() == pytest.approx([0, 1, 0, 1 - even])


def test_a_column_of_equal_entries_has_its_own_at_no_end() -> None:
    ones = torch.ones(1, 40, 1, dtype=torch.float64)
    search = searched(ones, ones, torch.arange(40), 10)
    assert search.share(1).tolist() == [0] and search.share(-1).tolist() == [0] and search.open_heads == []


def test_cells_rank_diagonals_only_if_asked_and_keep_their_ids() -> None:
    names = ["ov_diagonal_top10", "ov_diagonal_bottom10", "qk_diagonal_first"]
    model = library.open("mini-attn")
    assert all("analysis.diagonals is false" in model.unavailable[name] for name in names)
    asked = library.open("mini-attn", "analysis.diagonals=true")
    assert not set(names) & set(asked.unavailable)
    head = asked.head(3, 0)
    assert head.value("ov_diagonal_top10") > 0.5 > head.value("ov_diagonal_bottom10")
    assert "diagonals" not in identity(model.model.config, "0")["analysis"]
    assert cell_id(identity(model.model.config, "0")) != cell_id(identity(asked.model.config, "0"))


def test_larger_vocabularies_are_sampled_and_the_record_says_so(monkeypatch) -> None:
    *_, every = run(BUNDLED, "none", "analysis.diagonals=true")
    assert not any("are ranked" in note for note in every.notes)
    monkeypatch.setattr(diagonals, "COLUMNS", 100)
    *_, some = run(BUNDLED, "none", "analysis.diagonals=true")
    assert any("the entries of 100 of 459 tokens are ranked, among all tokens" in note for note in some.notes)
    a, b = (result.tables["heads"]["ov_diagonal_top10"] for result in (every, some))
    assert 0 < (a - b).abs().max() < 0.2 and local(BUNDLED).name == "mini-attn"
