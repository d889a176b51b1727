"""Tokens that components read and write: a materialised float64 oracle, planted heads, invariances."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import compose
from support.models import BUNDLED, local, shared_model
from support.oracle import block0_rows, folded_embeddings, matrices
from support.token_tables import (
    assert_same,
    check,
    factored,
    ids,
    oracle,
    orthonormal,
    random,
    scores,
    table,
    table_of,
    values,
    vocabulary,
)

from ovqk.analyse import analyse
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import sides as effective_module
from ovqk.circuits.components import components
from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.factors import Factors
from ovqk.circuits.maps import Decomposition, decompose
from ovqk.circuits.sides import Block0Side, StoredSide
from ovqk.config.schema import Circuit
from ovqk.report.token_lists import describe
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.token_tables import COLUMNS, Directions, TokenSide
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.norms import normalise
from ovqk.weights.readers import open_weights
from ovqk.weights.types import Architecture, EmbeddingWeights, LayerWeights, OpenedModel

# --- oracle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("path", ["tiny_gpt2", "tiny_llama", "bundled", "stories260k"])
def test_every_head_matches_a_materialised_oracle(path, processing, request) -> None:
    """Multi-head and grouped-query attention, random and trained; M and M^T taken apart whole."""
    trained = {"bundled": lambda: BUNDLED, "stories260k": lambda: shared_model("stories260k")}
    path = trained[path]() if path in trained else request.getfixturevalue(path)
    checkpoint = open_checkpoint(local(path))
    source, tokenizer = open_weights(checkpoint, local(path)), load_tokenizer(checkpoint)
    cell = compose("task=none", "model=local", f"model.path={path}", f"processing={processing}")
    model = Model.read(OpenedModel(source, "test", tokenizer), cell)
    vocabulary = model.spectral_vocabulary
    assert vocabulary is not None and vocabulary.W_U_rows is not None
    directions, kinds = Directions(vocabulary, tokenizer), set()
    for index in range(source.architecture.n_layers):
        layer = Layer(model, index)
        weights = layer.processed
        for circuit, writes in ((Circuit.ov, vocabulary.W_U_rows), (Circuit.qk, vocabulary.W_E)):
            rows = table_of(directions, index, circuit, layer.decomposition(circuit, model.folds))
            assert list(rows.columns) == list(COLUMNS)
            assert set(rows["layer"]) == {index} and set(rows["circuit"]) == {circuit}
            assert set(rows["head"]) == set(range(source.architecture.n_heads))
            for head in range(source.architecture.n_heads):
                M = matrices(weights, source.architecture, head)[circuit is Circuit.qk]
                wanted = oracle(M, vocabulary.W_E, writes)
                check(rows, head, wanted)
                kinds |= {"pair" if value.imag else "real" for (k, _), (value, _) in wanted.items() if k == "eigen"}
    assert kinds == {"pair", "real"}


@pytest.mark.parametrize(("far", "tolerance"), [(1e3, 1e-5), (1e5, 1e-3)])
def test_float32_screening_far_from_the_origin_finds_what_float64_finds(far: float, tolerance: float) -> None:
    """A vocabulary whose mean is so far out that float32 projections cannot tell its tokens apart, in blocks."""
    W_E = (random(3000, 24, seed=0) + far * random(1, 24, seed=1)).float()
    W_U = (random(24, 3000, seed=2) + far * random(24, 1, seed=3)).float()
    left, right = random(24, 4, seed=4), random(4, 24, seed=5)
    rows = table(left, right, W_E, W_U, block=256)
    check(rows, 0, oracle(left @ right, W_E, W_U.T), tolerance)


# --- planted heads -------------------------------------------------------------------------------------------


def test_a_planted_head_reads_and_writes_its_tokens_with_its_values() -> None:
    """M = 5 e_2 f_7 - 2 e_4 f_1 with one-hot tokens: sides are not swapped, and the joint sign reaches both."""
    left, right = torch.zeros(12, 2).double(), torch.zeros(2, 12).double()
    left[2, 0], right[0, 7] = 5, 1
    left[4, 1], right[1, 1] = -2, 1
    rows = table(left, right, torch.eye(12).double(), torch.eye(12).double(), tokens=1)
    assert values(rows, "singular") == pytest.approx([5, 2])
    assert ids(rows, "singular", 0, "read") == [2] and ids(rows, "singular", 0, "write") == [7]
    assert scores(rows, "singular", 0, "read") == pytest.approx([11 / 12])
    assert ids(rows, "singular", 1, "read") == [4] and ids(rows, "singular", 1, "write", -1) == [1]
    assert scores(rows, "singular", 1, "write", -1) == pytest.approx([-11 / 12])
    assert (rows["kind"] == "singular").all()  # neither token is read again: nothing is eigen


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_the_write_side_of_one_circuit_is_the_read_side_of_its_transpose(seed: int) -> None:
    """With W_U = W_E^T. Fails where svd's Vh is taken for V, or a left eigenvector for a right one."""
    left, right, W_E = random(8, 3, seed=seed), random(3, 8, seed=seed + 1), random(40, 8, seed=seed + 2)
    one = table(left, right, W_E, W_E.T)
    two = table(right.T, left.T, W_E, W_E.T)
    assert values(one, "singular") == pytest.approx(values(two, "singular"))
    assert values(one, "eigen") == pytest.approx(values(two, "eigen"))
    for kind in ("singular", "eigen"):
        for k in range(len(values(one, kind))):
            lists = [{tuple(ids(rows, kind, k, side, s)) for s in (1, -1)} for rows, side in _crossed(one, two)]
            assert lists[0] == lists[1] and lists[2] == lists[3]
            assert lists[0] != lists[2]


def _crossed(one: pd.DataFrame, two: pd.DataFrame) -> list[tuple[pd.DataFrame, str]]:
    return [(one, "read"), (two, "write"), (one, "write"), (two, "read")]


def test_the_sign_of_an_eigenvalue_is_the_sign_of_the_component() -> None:
    """A head that copies token 3 and suppresses token 6: both read and 'write' their own, lambda tells which."""
    E = torch.eye(10).double()
    left = torch.stack([E[3], E[6]], 1)
    right = torch.stack([4 * E[3], -2 * E[6]])
    rows = table(left, right, E, E, tokens=1)
    assert values(rows, "eigen") == pytest.approx([4, -2])
    for component, token in ((0, 3), (1, 6)):
        assert ids(rows, "eigen", component, "read") == ids(rows, "eigen", component, "write") == [token]
    assert ids(rows, "singular", 1, "write", -1) == [6]
    lines, space = describe(rows, 0, 0), "of the residual space"
    copies = "reads '#3' (3.0) | not '#0' (0.3) -> writes '#3' (3.0) | not '#0' (0.3)"
    suppresses = "reads '#6' (3.0) | not '#0' (0.3) -> suppresses '#6' (3.0) | not '#0' (0.3)"
    assert lines[2:4] == [f"OV eigen 0 {space} (lambda 4): {copies}", f"OV eigen 1 {space} (lambda -2): {suppresses}"]


def test_a_rotation_by_90_degrees_is_one_complex_pair_scored_in_its_plane() -> None:
    """Tokens 0 and 1 turn into each other: eigenvalues +-2i, and a token's score is its part in their plane."""
    W_E = torch.zeros(6, 8).double()
    W_E[0, 0], W_E[1, 1], W_E[2, 0], W_E[2, 1], W_E[3, 5] = 1, 2, 3, 4, 9
    W_E[4] = -W_E[:4].sum(0)  # the mean is 0
    E = torch.eye(8).double()
    rows = table(E[:, :2], torch.stack((2 * E[1], -2 * E[0])), W_E, W_E.T)
    eigen = rows[rows["kind"] == "eigen"]
    assert set(eigen["component"]) == {0} and set(eigen["sign"]) == {1}
    assert values(rows, "eigen") == pytest.approx([2j])
    for side in ("read", "write"):
        assert ids(rows, "eigen", 0, side) == [4, 2, 1, 0, 3, 5]
        assert scores(rows, "eigen", 0, side) == pytest.approx([52**0.5, 5, 2, 1, 0, 0])
    assert set(eigen["cluster_size"]) == {1}
    assert (
        describe(rows, 0, 0, shown=1)[-1]
        == "OV eigen 0 of the residual space (lambda 0 ± 2i, a plane): reads '#4' (1.0) -> writes '#4' (1.0)"
    )


# --- invariances ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(Circuit))
def test_a_gauge_of_the_head_changes_nothing_not_even_a_sign(seed: int, gauge_seed: int, circuit: str) -> None:
    left, right = random(8, 3, seed=seed), random(3, 8, seed=seed + 1)
    A = torch.eye(3).double() + 0.3 * random(3, 3, seed=gauge_seed)
    if torch.linalg.cond(A) > 50:
        return
    W_E, W_U = random(40, 8, seed=seed + 2), random(8, 40, seed=seed + 3)
    one = table(left, right, W_E, W_U, circuit)
    assert_same(one, table(left @ A, torch.linalg.solve(A, right), W_E, W_U, circuit))
    best, worst = (
        one[(one["rank"] == 1) & (one["side"] == "read")].groupby("sign")["score"].apply(np.array).loc[[1, -1]]
    )
    signed = one[(one["rank"] == 1) & (one["side"] == "read") & (one["sign"] == 1)]
    assert len(best) == len(signed)
    assert (worst < 0).all() and (best > 0).all()
    real = signed["value_im"].to_numpy() == 0
    assert (best[real] >= -worst).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from([1.0, -1.0]), min_size=3, max_size=3))
def test_only_the_joint_sign_is_chosen(seed: int, signs: list[float]) -> None:
    """(u, v) and (-u, -v) give one table; (u, -v) gives the other sign of what is written."""
    left, right, turn = random(8, 3, seed=seed), random(3, 8, seed=seed + 1), torch.tensor(signs).double()
    found = factored(left, right)
    directions = Directions(vocabulary(random(40, 8, seed=seed + 2), random(8, 40, seed=seed + 3)), None)
    one = table_of(directions, 0, Circuit.ov, found)
    both = Decomposition(found.read * turn, found.sigma, found.write * turn, found.rank)
    assert_same(one, table_of(directions, 0, Circuit.ov, both))
    other = table_of(directions, 0, Circuit.ov, Decomposition(found.read, found.sigma, found.write * turn, found.rank))
    for k, sign in enumerate(signs):
        assert ids(other, "singular", k, "read") == ids(one, "singular", k, "read")
        assert ids(other, "singular", k, "write", int(sign)) == ids(one, "singular", k, "write", 1)
        assert scores(other, "singular", k, "write", int(sign)) == pytest.approx(
            [sign * score for score in scores(one, "singular", k, "write", 1)]
        )


def test_a_tie_of_largest_magnitudes_makes_the_lowest_token_id_positive() -> None:
    """Two opposite tokens: whichever comes first is read positively, whatever sign the decomposition had."""
    a = torch.tensor([1.0, 2.0, 2.0]).double()
    for order in (1, -1):
        W_E = torch.stack([order * a, -order * a])
        for turn in (1.0, -1.0):
            rows = table(turn * a[:, None] / 3, a[None] / 3, W_E, W_E.T)
            assert ids(rows, "singular", 0, "read", 1) == [0, 1]
            assert scores(rows, "singular", 0, "read", 1) == pytest.approx([3, -3])
            assert ids(rows, "singular", 0, "read", -1) == [1, 0]
            assert ids(rows, "singular", 0, "write", 1) == ([0, 1] if turn == 1 else [1, 0])


@pytest.mark.parametrize("seed", range(3))
def test_scores_that_differ_by_rounding_alone_are_a_tie(seed: int) -> None:
    """Tokens 0, 2, ..., 10 of an orthonormal vocabulary are read alike, by a direction that is no token's."""
    Q = orthonormal(16, 16, seed)
    rows = table(Q[:, 0:12:2].sum(1, keepdim=True), Q[:, [15]].T, Q.T.contiguous(), Q)
    assert ids(rows, "singular", 0, "read") == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7]
    assert ids(rows, "singular", 0, "read", -1) == [1, 3, 5, 7, 9, 11, 12, 13, 14, 15]


def test_a_constant_on_every_token_is_invisible() -> None:
    left, right = random(8, 3, seed=0), random(3, 8, seed=1)
    W_E, W_U = random(40, 8, seed=2), random(8, 40, seed=3)
    one = table(left, right, W_E, W_U)
    assert_same(one, table(left, right, W_E + 7 * random(1, 8, seed=4), W_U - 5 * random(8, 1, seed=5)))
    assert_same(
        table(left, right, W_E, circuit=Circuit.qk), table(left, right, W_E + random(1, 8, seed=4), circuit=Circuit.qk)
    )


@pytest.mark.parametrize("block", [1, 7, 64, 499, 500])
def test_the_size_of_blocks_changes_nothing(block: int) -> None:
    """Float32, with many equal tokens that come before others of equal score by their id alone."""
    left, right = random(12, 4, seed=0), random(4, 12, seed=1)
    W_E, W_U = random(500, 12, seed=2).float(), random(12, 500, seed=3).float()
    same = torch.arange(100, 480, 3)
    W_E[same], W_U[:, same] = 5 * W_E[same[0]], 5 * W_U[:, same[:1]]
    whole = table(left, right, W_E, W_U)
    ties = [
        found
        for kind in ("singular", "eigen")
        for k in range(len(values(whole, kind)))
        for side in ("read", "write")
        for sign in (1, -1)
        if same[0] in (found := ids(whole, kind, k, side, sign))
    ]
    assert ties and all(set(same[:3].tolist()) <= set(found) for found in ties)
    assert same[:10].tolist() in ties
    pd.testing.assert_frame_equal(table(left, right, W_E, W_U, block=block), whole)


def test_circuits_of_several_layers_in_one_pass_get_the_tables_that_each_gets_alone() -> None:
    """OV and QK, heads of rank 0 and complex pairs among them, with an unembedding and without."""
    heads = [(random(12, 4, seed=n), random(4, 12, seed=n + 10)) for n in range(3)]
    heads.append((torch.zeros(12, 4).double(), heads[0][1]))
    found = [
        (layer, circuit, components(factored(*pair, circuit)))
        for layer, pair in enumerate(heads)
        for circuit in reversed(Circuit)
    ]
    for W_U in (random(12, 60, seed=30), None):
        directions = Directions(vocabulary(random(60, 12, seed=20), W_U), None, 16)
        together = directions.tables(found, tokens=5)
        for one, rows in zip(found, together, strict=True):
            pd.testing.assert_frame_equal(rows, directions.tables([one], tokens=5)[0])
        assert [len(rows) > 0 for rows in together] == [True] * 6 + [False] * 2


def test_layers_wait_for_each_other_and_the_table_is_the_same(tiny_gpt2, monkeypatch) -> None:
    found, passes = [], []
    original = Directions.tables
    monkeypatch.setattr(
        Directions, "tables", lambda self, found, *rest: (passes.append(len(found)), original(self, found, *rest))[1]
    )
    for waiting in (1, 2**20):
        monkeypatch.setattr("ovqk.structure.stages.WAITING", waiting)
        checkpoint = open_checkpoint(local(tiny_gpt2))
        cell = compose("task=none", "model=local", f"model.path={tiny_gpt2}")
        analysis = analyse(OpenedModel(open_weights(checkpoint, local(tiny_gpt2)), "test"), cell)
        found.append(analysis.tables["directions"])
    assert passes[-1] == sum(passes[:-1]) and set(passes[:-1]) == {2}  # two circuits of each layer, or of all
    pd.testing.assert_frame_equal(*found)


@pytest.mark.parametrize("block", [50, 1000, 5000])
def test_few_tokens_are_projected_a_second_time(block) -> None:
    side = TokenSide(StoredSide(random(5000, 16, seed=0).float()), block=block)
    planes = torch.stack((random(20, 16, seed=1), torch.zeros(20, 16).double()), 1)
    lists, tokens, _ = side.screened(planes, torch.zeros(20, dtype=torch.bool), 10)
    assert 400 <= len(lists) < 480  # of 40 lists: ten and what is within rounding of them
    assert len(set(zip(lists.tolist(), tokens.tolist(), strict=True))) == len(lists)


# --- what may be missing -------------------------------------------------------------------------------------


def test_without_an_unembedding_only_the_reads_of_ov_are_there() -> None:
    left, right, W_E = random(8, 3, seed=0), random(3, 8, seed=1), random(40, 8, seed=2)
    without, with_ = table(left, right, W_E), table(left, right, W_E, random(8, 40, seed=3))
    assert set(without["side"]) == {"read"}
    pd.testing.assert_frame_equal(without, with_[with_["side"] == "read"].reset_index(drop=True))
    assert all(" -> " not in line and "reads" in line for line in describe(without, 0, 0))
    assert set(table(left, right, W_E, circuit=Circuit.qk)["side"]) == {"read", "write"}


def test_a_vocabulary_smaller_than_the_head_lists_all_its_tokens() -> None:
    left, right, W_E, W_U = random(8, 5, seed=0), random(5, 8, seed=1), random(3, 8, seed=2), random(8, 3, seed=3)
    rows = table(left, right, W_E, W_U)
    assert rows["rank"].tolist() == [1, 2, 3] * (len(rows) // 3)
    first = rows[rows["rank"] == 1][["kind", "component", "side", "sign"]].to_numpy().tolist()
    assert first[:4] == [["singular", 0, "read", 1], ["singular", 0, "read", -1], ["singular", 0, "write", 1],
                         ["singular", 0, "write", -1]]  # fmt: skip
    assert first[4][:2] == ["singular", 1] and first[-1][0] == "eigen"
    check(rows, 0, oracle(left @ right, W_E, W_U.T))
    for component in range(3):
        assert ids(rows, "singular", component, "read", 1) == ids(rows, "singular", component, "read", -1)[::-1]


@pytest.mark.parametrize("row", [0.0, 3.0])
@pytest.mark.parametrize("size", [1, 20])
def test_tokens_that_are_all_alike_score_zero_in_the_order_of_their_ids(row: float, size: int) -> None:
    W_E = torch.full((size, 8), row).double()
    rows = table(random(8, 3, seed=0), random(3, 8, seed=1), W_E, W_E.T)
    assert set(rows["score"]) == {0.0} and len(values(rows, "singular")) == 3
    assert (rows["token_id"] == rows["rank"] - 1).all() and rows["rank"].max() == min(10, size)


def test_a_head_of_fewer_components_and_one_of_zero_weights() -> None:
    """Beside a head of rank 2, the zero head has no rows; alone, the table is empty and has its columns."""
    left, right = random(2, 8, 4, seed=0), random(2, 4, 8, seed=1)
    left[0], left[1, :, 2:] = 0, 0
    directions = Directions(vocabulary(random(40, 8, seed=2), random(8, 40, seed=3)), None)
    rows = table_of(directions, 4, Circuit.qk, decompose(Factors(Circuit.qk, left, right), centred=False))
    assert set(rows["head"]) == {1} and len(values(rows, "singular", head=1)) == 2
    nothing = table_of(directions, 4, Circuit.qk, decompose(Factors(Circuit.qk, left[:1], right[:1]), centred=False))
    assert len(nothing) == 0 and list(nothing.columns) == list(COLUMNS)
    assert pd.concat([nothing, rows], ignore_index=True)["layer"].dtype == np.int32
    assert describe(rows, 4, 0) == []


# --- what a layer sees ---------------------------------------------------------------------------------------


def effective(source, embedding: str, layer: int, E: EmbeddingWeights, gain: torch.Tensor | None) -> torch.Tensor:
    """Rows of all tokens as a layer reads them, float64: block0 or plain embeddings, normalised, with its gain."""
    plain = embedding == "token" or (embedding == "by_layer" and layer == 0)
    rows = normalise(
        E.W_E.double() if plain else block0_rows(source, E), source.architecture.norm, source.architecture.norm_eps
    )
    return rows if gain is None else rows * gain.double()


@pytest.mark.parametrize("embedding", ["by_layer", "token", "block0"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("path", "processing"),
    [("tiny_gpt2", "raw"), ("tiny_llama", "folded"), ("tiny_llama", "raw"), ("bundled", "folded")],
)
def test_every_layer_is_read_through_its_effective_embedding(
    path, processing, embedding, kept, request, monkeypatch
) -> None:
    """The whole cell against materialised float64 rows; block0 rows kept in memory or computed in each pass."""
    monkeypatch.setattr(effective_module, "KEEP_UP_TO", 2**28 if kept else 0)
    path = BUNDLED if path == "bundled" else request.getfixturevalue(path)
    checkpoint = open_checkpoint(local(path))
    source, tokenizer = open_weights(checkpoint, local(path)), load_tokenizer(checkpoint)
    n_tokens = None if tokenizer is None else tokenizer.get_vocab_size()
    choices = [f"processing={processing}", f"analysis.directions_embedding={embedding}", "analysis.rare_tokens=true"]
    cell = compose("task=none", "model=local", f"model.path={path}", *choices)
    model = Model.read(OpenedModel(source, "test", tokenizer), cell)
    tables = analyse(OpenedModel(source, "test", tokenizer), cell).tables
    rows = tables["directions"]
    assert {type(circuit) for name in ("directions", "spectra") for circuit in tables[name]["circuit"]} == {str}
    E = folded_embeddings(source)
    E = EmbeddingWeights(E.W_E[:n_tokens], None, E.W_U[:, :n_tokens], None)
    for index in range(source.architecture.n_layers):
        layer = Layer(model, index)
        norm = layer.processed.norm
        reads = effective(source, embedding, index, E, None if norm is None else norm.weight)
        for circuit, writes in ((Circuit.ov, E.W_U.T), (Circuit.qk, reads)):
            mine = rows[(rows["layer"] == index) & (rows["circuit"] == circuit)]
            for head in range(source.architecture.n_heads):
                M = matrices(layer.processed, source.architecture, head)[circuit is Circuit.qk]
                check(mine, head, oracle(M, reads, writes), 2e-4)


def test_a_planted_head_behind_block_0_reads_what_block_0_makes_of_a_token() -> None:
    """Block 0 turns token t into the row of its neighbour: a later head that looks for row 3 reads token 2."""
    n = 12
    W_E, turn = torch.eye(n), torch.eye(n).roll(1, 1)
    facts = Architecture("planted", 2, 1, 1, n, n, None, "none", 0.0, "none")
    zero = torch.zeros(1, n)
    block0 = Block0(
        LayerWeights(0, *[torch.zeros(1, n, n)] * 2, 3 * turn[None], torch.eye(n)[None], *[zero] * 3, None), None, facts
    )
    tokens = vocabulary(W_E, W_E.T)
    every = torch.ones(n, dtype=torch.bool)
    found = components(factored(W_E[:, [3]].double(), W_E[[7]].double(), Circuit.ov), 1)
    made = Directions(tokens, None, architecture=facts, later=Block0Side(tokens, block0, every))
    first, second = made.tables([(0, Circuit.ov, found), (1, Circuit.ov, found)], tokens=2)
    assert ids(first, "singular", 0, "read")[0] == 3 and ids(second, "singular", 0, "read") == [2, 3]
    assert scores(second, "singular", 0, "read") == pytest.approx([3 - 4 / n, 1 - 4 / n])
    assert ids(first, "singular", 0, "write")[0] == ids(second, "singular", 0, "write")[0] == 7
    assert second["contrast"].iloc[0] == pytest.approx((2 - 4 / n) / np.std([3, 1] + [0] * 10))


def test_contrast_is_the_mean_of_a_list_over_the_spread_of_all_scores() -> None:
    """Of lines and of planes, from scores of every token taken one by one."""
    W_E, turn, planes = random(500, 8, seed=2), torch.tensor([[1.0, 2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 4.0]]), 0
    Q = orthonormal(8, 3)
    left, right = Q @ turn.double(), (Q + 0.1 * random(8, 3, seed=1)).T
    rows = table(left, right, W_E, W_E.T)
    wanted = oracle(left @ right, W_E, W_E)
    for (kind, k, side, sign), found in rows.groupby(["kind", "component", "side", "sign"]):
        everyone = wanted[kind, k][1][side, sign]
        pair = wanted[kind, k][0].imag > 0
        spread = np.sqrt(np.mean(everyone**2) / 2) if pair else np.std(everyone)
        assert found["contrast"].to_numpy() == pytest.approx(np.sort(everyone)[-10:].mean() / spread)
        planes += pair
    assert planes > 0


# --- tokens left out -----------------------------------------------------------------------------------------


def test_lists_hold_no_token_that_is_left_out_and_are_centred_over_the_others() -> None:
    left, right, W_E, W_U = random(8, 3, seed=0), random(3, 8, seed=1), random(60, 8, seed=2), random(8, 60, seed=3)
    out = torch.tensor([4, 5, 40])
    W_E[out] += 100 * random(1, 8, seed=4)
    listed = torch.ones(60, dtype=torch.bool)
    listed[out] = False
    made = Directions(vocabulary(W_E, W_U), None, 7, listed=listed)
    rows = table_of(made, 0, Circuit.ov, factored(left, right))
    alone = table(left, right, W_E[listed], W_U[:, listed])
    assert not set(rows["token_id"]) & set(out.tolist())
    renamed = listed.nonzero()[:, 0].numpy()[alone["token_id"]]
    assert rows["token_id"].tolist() == renamed.tolist()
    for name in ("score", "contrast", "value"):
        assert rows[name].to_numpy() == pytest.approx(alone[name].to_numpy(), rel=1e-6, abs=1e-9)


def test_the_record_says_which_tokens_are_left_out_and_that_block_0_could_not_be_had(tiny_gpt2, monkeypatch) -> None:
    checkpoint = open_checkpoint(local(BUNDLED))
    source, tokenizer = open_weights(checkpoint, local(BUNDLED)), load_tokenizer(checkpoint)

    def analysis(*overrides: str):
        cell = compose("task=none", "model=local", f"model.path={BUNDLED}", *overrides)
        return analyse(OpenedModel(source, "test", tokenizer), cell)

    plain, every = analysis(), analysis("analysis.rare_tokens=true")
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    assert special and f"directions: {len(special)} of" in " ".join(plain.notes)
    assert not any("left out" in note for note in every.notes)
    assert not special & set(plain.tables["directions"]["token_id"]) and special & set(
        every.tables["directions"]["token_id"]
    )
    same = [name for name in plain.tables if name != "directions"]
    for name in same:  # spectra, heads and all else know nothing of it
        pd.testing.assert_frame_equal(plain.tables[name], every.tables[name])
    monkeypatch.setattr("ovqk.structure.model.read_block0", lambda *_: "no MLP is known")
    lost, token = analysis("analysis.directions_embedding=by_layer"), analysis()
    assert not any("for want of block0" in note for note in token.notes)
    assert (
        "directions: all layers are read through token embeddings, for want of block0 ones: no MLP is known"
        in lost.notes
    )
    pd.testing.assert_frame_equal(lost.tables["directions"], token.tables["directions"])
