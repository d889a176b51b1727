"""Ranks of the full circuits' diagonals over vocabularies that pass in blocks: planted heads, properties, cells."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.models import BUNDLED, local
from support.oracle import block0_parts, folded_embeddings, matrices, query_key_scores
from support.scripts import script
from support.toy import run, toy_task, toy_tokenizer

from ovqk import library
from ovqk.circuits import diagonals, sides
from ovqk.circuits.diagonals import (
    OpenColumns,
    PlaceSearch,
    Reader,
    own_ranks,
    ranked_tokens,
    share_up_to,
    tokens_at_once,
)
from ovqk.circuits.sides import WrittenRows
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.errors import UserError
from ovqk.records.identity import cell_id, identity
from ovqk.structure import diagonal_ranks
from ovqk.structure.diagonal_ranks import farthest_first
from ovqk.weights.folding import fold_layer
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import normalise


def searched(tokens, W, right, own, count: int, signs=(1, -1), order=None) -> PlaceSearch:
    """A search through all tokens that each head reads through its W, for the columns `own` of `right`."""
    n = len(tokens)
    order = torch.arange(n) if order is None else order
    search = PlaceSearch(right[:, own], tokens[own] @ W.mT, count, signs)
    waiting = OpenColumns()
    for head in range(len(W)):
        waiting.add(search, [head], right[head : head + 1, own], Reader(W[head]))
    waiting.compare(lambda some: tokens[order[some]], n, order.argsort()[own])
    assert waiting.size == 0
    return search


@pytest.fixture
def small_blocks(monkeypatch):
    """Return a function that has tokens pass a few at a time."""

    def set_sizes(fewest: int, most: int, narrowing: float) -> None:
        monkeypatch.setattr(diagonals, "FEWEST_AT_ONCE", fewest)
        monkeypatch.setattr(diagonals, "MOST_AT_ONCE", most)
        monkeypatch.setattr(diagonals, "CLOSED_BEFORE_NARROWING", narrowing)

    return set_sizes


@pytest.mark.parametrize(("fewest", "most", "narrowing"), [(1, 1, 0.0), (2, 9, 0.5), (256, 4096, 1 / 8)])
@pytest.mark.parametrize("d_model", [2, 40])
def test_the_search_finds_the_places_of_the_whole_matrix(small_blocks, fewest, most, narrowing, d_model) -> None:
    """Vocabularies smaller and larger than a block, columns through a head's matrix and as vectors, any order."""
    small_blocks(fewest, most, narrowing)

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 300), n=st.integers(1, 60), count=st.integers(1, 12), ranked=st.floats(0.01, 1))
    def the_places_are_found(seed, n, count, ranked) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(n, d_model, generator=generator, dtype=torch.float64)
        W = torch.randn(3, 4, d_model, generator=generator, dtype=torch.float64)
        right = torch.randn(3, n, 4, generator=generator, dtype=torch.float64)
        own = torch.randperm(n, generator=generator)[: max(1, int(ranked * n))]
        search = searched(tokens, W, right, own, count, order=torch.randperm(n, generator=generator))
        ranks = own_ranks(tokens @ W.mT, right[:, own], own)
        assert torch.equal(search.share(1), share_up_to(ranks.from_largest, count))
        assert torch.equal(search.share(-1), share_up_to(ranks.from_smallest, count))
        largest = searched(tokens, W, right, own, count, signs=(1,))
        assert torch.equal(largest.share(1), search.share(1))

    the_places_are_found()


@given(n=st.integers(1, 30_000))
def test_ranked_tokens_are_spread_over_all(n) -> None:
    ids = ranked_tokens(n)
    assert len(ids) == len(ids.unique()) == min(n, diagonals.COLUMNS) and int(ids.min()) >= 0 and int(ids.max()) < n
    assert n == 1 or ids.diff().max() - ids.diff().min() <= 1


@given(n_rows=st.integers(1, 10**8))
def test_tokens_pass_in_whole_multiples_and_make_few_numbers(n_rows) -> None:
    tokens = tokens_at_once(n_rows)
    assert tokens % diagonals.FEWEST_AT_ONCE == 0 and diagonals.FEWEST_AT_ONCE <= tokens <= diagonals.MOST_AT_ONCE
    assert tokens == diagonals.FEWEST_AT_ONCE or tokens * n_rows <= diagonals.ENTRIES_AT_ONCE


def test_the_farthest_tokens_are_the_first() -> None:
    rows = torch.tensor([[0.0, 1.0], [9.0, 0.0], [0.0, 0.0], [-9.0, 0.0], [0.0, -4.0]])
    assert farthest_first(rows).tolist() == [1, 3, 4, 0, 2]


def planted(n: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with random unit rows, and four heads that see them whole."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n, 32, generator=generator, dtype=dtype), dim=-1)
    return rows, torch.eye(32, dtype=dtype).expand(4, -1, -1)


def test_planted_heads_are_found_among_many_tokens() -> None:
    """A copying head, a suppressing one, one of zeros, and one that copies every second token."""
    n = 3000
    rows, W = planted(n)
    halves = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()[:, None]
    search = searched(rows, W, torch.stack([rows, -rows, 0 * rows, halves * rows]), ranked_tokens(n), 10)
    even = float((ranked_tokens(n) % 2 == 0).double().mean())
    assert search.share(1).tolist() == pytest.approx([1, 0, 0, even])
    assert search.share(-1).tolist() == pytest.approx([0, 1, 0, 1 - even])


def test_a_column_of_equal_entries_has_its_own_at_no_end() -> None:
    ones = torch.ones(40, 1, dtype=torch.float64)
    search = searched(ones, ones[None, :1], ones[None], torch.arange(40), 10)
    assert search.share(1).tolist() == [0] and search.share(-1).tolist() == [0] and not search.open.any()


@pytest.mark.parametrize("d_model", [16, 1024])
def test_tokens_with_one_row_tie_in_32_bits(d_model) -> None:
    """Each token is there twice, far apart, and its copy comes before it; whole numbers leave nothing to rounding."""
    n, generator = 3000, torch.Generator().manual_seed(1)
    half = torch.randint(-2, 3, (n // 2, d_model), generator=generator).float()
    tokens, W = torch.cat([half, half]), torch.randint(-1, 2, (2, 16, d_model), generator=generator).float()
    right = torch.stack([tokens @ W[0].T, -tokens @ W[1].T])  # its own entry is a sum of squares, or less than 0
    own = ranked_tokens(n)
    once, twice = (searched(tokens, W, right, own, count) for count in (1, 2))
    assert once.share(1).tolist() == once.share(-1).tolist() == [0, 0]
    assert twice.share(1)[0] > 0.1 and twice.share(-1)[1] > 0.1


def test_untrained_tokens_are_ranked_like_others_and_tie_with_one_another() -> None:
    """A sixth of the tokens have one row, as tokens that training never moved: no list has them, but ranks do."""
    n = 3000
    rows, W = planted(n, torch.float32)
    rows = (100 * rows).round()
    untrained = torch.arange(n) % 6 == 5
    rows[untrained] = rows[5].clone()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    own = ranked_tokens(n)
    search = searched(rows, W[:1], (2**12 * unit).round()[None], own, 10)
    assert search.share(1).tolist() == pytest.approx([1 - float(untrained[own].double().mean())])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_entries_that_are_no_numbers_are_refused(wrong) -> None:
    rows = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    broken = rows.clone()
    broken[0, 7, 2] = wrong
    with pytest.raises(ValueError, match="finite"):
        PlaceSearch(broken, rows, 10)
    with pytest.raises(ValueError, match="finite"):
        PlaceSearch(rows, broken, 10)


@pytest.mark.parametrize("name", ["W_V", "W_O", "W_Q", "W_K"])
def test_weights_that_are_no_numbers_are_refused_with_their_layer(name) -> None:
    model = library.open("mini-attn", "analysis.diagonals=true").model
    layer = library.Layer(model, 2)
    broken = getattr(layer.folded, name).clone()
    broken[-1, 3, 3] = torch.nan
    layer.parts.weights["folded"] = dataclasses.replace(layer.folded, **{name: broken})
    circuit = "OV" if name in ("W_V", "W_O") else "QK"
    with pytest.raises(UserError, match=f"layer 2's {circuit} circuit are NaN or infinite.*allowed:"):
        diagonal_ranks.DiagonalRanks(model).visit(layer)


def materialised(source, n_tokens: int, ids) -> dict[str, list[float]]:
    """Every head's shares over some ranked tokens, from whole float64 matrices over all tokens."""
    facts, E = source.architecture, folded_embeddings(source)
    W_U, plain, (_, written) = E.W_U[:, :n_tokens].double(), E.W_E[:n_tokens].double(), block0_parts(source, E)
    found: dict[str, list[float]] = {"ov_diagonal_top10": [], "ov_diagonal_bottom10": [], "qk_diagonal_first": []}
    for layer in range(facts.n_layers):
        weights = fold_layer(source.layer(layer), facts)
        x = normalise(written[:n_tokens] if layer > 0 else plain, facts.norm, facts.norm_eps)
        for head in range(facts.n_heads):
            L = (x @ matrices(weights, facts, head)[0] @ W_U)[ids]
            S = query_key_scores(weights, facts, head, torch.eye(facts.d_head, dtype=torch.float64), W_U.T, x)[ids]
            own, mine = (M[torch.arange(len(ids)), ids][:, None] for M in (L, S))
            found["ov_diagonal_top10"].append(float(((own <= L).sum(1) <= 10).double().mean()))
            found["ov_diagonal_bottom10"].append(float(((own >= L).sum(1) <= 10).double().mean()))
            found["qk_diagonal_first"].append(float(((mine <= S).sum(1) <= 1).double().mean()))
    return found


@pytest.mark.parametrize("waiting", [1, diagonal_ranks.WAITING])
@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "qwen3", "olmo2", "gemma3_text"])
def test_ranks_among_tokens_that_are_not_ranked_match_an_oracle(tiny, monkeypatch, small_blocks, kind, waiting) -> None:
    """Plain, parallel and gated blocks, shared keys, keys with a norm for each head or for all; passes few and many."""
    monkeypatch.setattr(diagonals, "COLUMNS", 15)
    monkeypatch.setattr(diagonal_ranks, "WAITING", waiting)
    small_blocks(4, 8, 0.0)
    source, _, _, n, result = run(tiny(kind), toy_task("set"), "analysis.diagonals=true", tokenizer=toy_tokenizer())
    ids = ranked_tokens(n)
    assert len(ids) == 15 < n
    wanted = materialised(source, n, ids)
    for name, values in wanted.items():
        assert max(values) > 0, name
        assert result.tables["heads"][name].tolist() == pytest.approx(values, abs=1e-12), name


def test_block0s_mlp_runs_once_for_grams_and_ranks(tiny, monkeypatch) -> None:
    """With ranks, the MLP reads the ranked tokens besides, and no other token a second time."""
    tokens, apply = [], MLPWeights.apply
    monkeypatch.setattr(MLPWeights, "apply", lambda self, x: tokens.append(len(x)) or apply(self, x))
    monkeypatch.setattr(diagonals, "COLUMNS", 15)
    passed, tables = [], []
    for choice in ("false", "true"):
        tokens.clear()
        *_, result = run(tiny("llama"), "none", f"analysis.diagonals={choice}", tokenizer=toy_tokenizer())
        passed.append(sum(tokens))
        tables.append(result.tables["heads"])
    assert passed[1] == passed[0] + 15
    ranks = ["ov_diagonal_top10", "ov_diagonal_bottom10", "qk_diagonal_first"]
    assert tables[0][ranks].isna().all(axis=None) and not tables[1][ranks].isna().any(axis=None)
    assert tables[0].drop(columns=ranks).equals(tables[1].drop(columns=ranks))


@pytest.mark.parametrize("listed", [False, True])
def test_written_rows_are_the_same_however_they_are_read(tiny, monkeypatch, listed) -> None:
    """As Grams read them, when they are asked for, from lists' rows, or each time anew if they do not fit."""
    choices = ("analysis.directions_embedding=block0",) if listed else ()
    model = library.open(tiny("llama"), *choices).model
    vocabulary, block0 = model.vocabulary, model.block0
    wanted = model.architecture.normalised(block0.mlp_output(vocabulary.W_E[:].double())).float()
    reader = model.block0_side.read if listed else None
    asked, read = (WrittenRows(vocabulary, block0, reader) for _ in range(2))
    monkeypatch.setattr(sides, "KEEP_UP_TO", 0)
    anew = WrittenRows(vocabulary, block0, reader)
    assert torch.equal(read.read(0, 7), block0.rows(vocabulary.W_E[0:7]))
    read.read(0, vocabulary.size)
    assert read.passed == vocabulary.size and asked.passed == 0
    ids = torch.tensor([5, 0, 5])
    for rows in (asked, read, anew):
        assert torch.allclose(rows[3:9], wanted[3:9], atol=1e-5)
        assert torch.allclose(rows[0 : vocabulary.size], wanted, atol=1e-5)
        assert torch.allclose(rows[ids], wanted[ids], atol=1e-5)


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


def test_a_cell_without_ranks_takes_no_unembedding_into_memory(monkeypatch) -> None:
    """113 MB on SmolLM2."""
    read = []
    monkeypatch.setattr(diagonals, "COLUMNS", 100)
    monkeypatch.setattr(Vocabulary, "unembedding", property(lambda self: read.append(self) or self.W_U_rows))
    for choice, times in (("false", 0), ("true", 1)):
        model = library.open("mini-attn", f"analysis.diagonals={choice}").model
        ranks = diagonal_ranks.DiagonalRanks(model)
        ranks.visit(library.Layer(model, 3))
        assert bool(ranks.columns()) is bool(times) and len(read) == times


@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_an_analysis_of_one_circuit_ranks_that_one_and_only_if_asked(circuit) -> None:
    found = {}
    for choice in ("false", "true"):
        model = library.open("mini-attn", f"analysis={circuit}", f"analysis.diagonals={choice}").model
        ranks = diagonal_ranks.DiagonalRanks(model)
        ranks.visit(library.Layer(model, 3))
        found[choice] = ranks.columns()
    assert found["false"] == {} and list(found["true"]) == [3]
    assert all(name.startswith(circuit) and values.max() > 0 for name, values in found["true"][3].items())


def test_the_benchmark_measures_ranks_beside_spectra(tiny, capsys) -> None:
    bench, measure = script("bench"), script("bench_diagonals")
    config = bench.cell_config(tiny("gpt2"))
    found = measure.measure_diagonals(config, 1)
    assert set(found) == {"spectra", "grams", "keeping", "ranks"} and all(wall > 0 for wall, _ in found.values())
    measure.report_diagonals("tiny", config, 1)
    assert capsys.readouterr().out.count("ranks of diagonals, seconds") == 2


def test_larger_vocabularies_are_sampled_and_the_record_says_so(monkeypatch) -> None:
    *_, every = run(BUNDLED, "none", "analysis.diagonals=true")
    assert not any("are ranked" in note for note in every.notes)
    monkeypatch.setattr(diagonals, "COLUMNS", 100)
    *_, some = run(BUNDLED, "none", "analysis.diagonals=true")
    assert any("the entries of 100 of 459 tokens are ranked, among all tokens" in note for note in some.notes)
    a, b = (result.tables["heads"]["ov_diagonal_top10"] for result in (every, some))
    assert 0 < (a - b).abs().max() < 0.2 and local(BUNDLED).name == "mini-attn"


@pytest.mark.parametrize(("read", "predicted"), [(40, 39), (1600, 1500)])
def test_a_model_that_predicts_fewer_tokens_than_it_reads_has_no_ranks_and_says_why(tmp_path, read, predicted) -> None:
    """As one that reads "=" and never predicts it; the two sides' ranked tokens would be different ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"blocks.{layer}.attn.W_{part}": (2, 16, 8) for layer in (0, 1) for part in "QKV"}
    shapes |= {f"blocks.{layer}.attn.W_O": (2, 8, 16) for layer in (0, 1)}
    shapes |= {"embed.W_E": (read, 16), "unembed.W_U": (16, predicted)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "equals.safetensors")
    *_, result = run(tmp_path / "equals.safetensors", "none", "analysis.diagonals=true")
    why = f"the unembedding has columns for {predicted:,} of {read:,} tokens"
    for name in ("ov_diagonal_top10", "qk_diagonal_first", "ov_copying", "ov_copying_block0"):
        assert result.unavailable[name] == why and name not in result.tables["heads"].dropna(axis=1), name
    assert result.tables["heads"]["qk_matching"].notna().all()
    model = library.open(tmp_path / "equals.safetensors")
    assert model.W_U.shape == (16, predicted)
