"""Rows of the vocabulary that readouts ask for again are read once, and the shortcuts of nulls give the same values."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.commands import compose
from support.models import local
from support.scripts import script
from support.small import DRAWS, Random, cell, run, task, tokenizer
from support.top import in_top_by_source

from ovqk.analyse import analyse
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import alignment, effective_embeddings, spectra, vocabulary
from ovqk.circuits.alignment import TopSearch, settle
from ovqk.circuits.effective_embeddings import EffectiveRows
from ovqk.circuits.factors import Factors
from ovqk.circuits.grams import FullCircuit
from ovqk.circuits.maps import Decomposition
from ovqk.circuits.spectra import full_circuit_ratio
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.config.schema import Circuit, VariableKind
from ovqk.errors import UserError
from ovqk.metrics import METRICS
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.tasks.readouts import TOP_METRICS
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.testing import random_checkpoints
from ovqk.verdicts import surrogates
from ovqk.verdicts.claim_tests import ClaimTests
from ovqk.verdicts.statistics import monte_carlo
from ovqk.weights.readers import open_weights
from ovqk.weights.stored_rows import StoredRows
from ovqk.weights.types import Architecture, EmbeddingWeights, OpenedModel

bench = script("bench")

FACTS = Architecture("test", 1, 1, 1, 6, 3, 7, "rmsnorm", 1e-6, "learned")


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def counting(matrix: torch.Tensor) -> tuple[StoredRows, list[int]]:
    """The matrix as one that is left in a checkpoint, and how often each row of it was read."""
    reads = [0] * len(matrix)

    def read(start: int, stop: int) -> torch.Tensor:
        for row in range(start, stop):
            reads[row] += 1
        return matrix[start:stop].clone()

    return StoredRows(read, tuple(matrix.shape)), reads


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_a_layer_is_read_once_for_what_is_folded_and_what_is_raw(processing, tiny_llama, monkeypatch) -> None:
    """Metrics of layers are of raw weights, readouts and shares of folded ones; raw processing reads once more."""
    read, reads = Layer.read, list[int]()
    monkeypatch.setattr(Layer, "read", lambda self: (reads.append(self.index), read(self))[1])
    config = compose("task=none", f"processing={processing}", "analysis.components=0", f'model.path="{tiny_llama}"')
    analyse(OpenedModel(open_weights(open_checkpoint(local(tiny_llama)), local(tiny_llama)), "toy"), config)
    times = 1 if processing == "folded" else 2
    assert reads == sorted([*range(max(reads) + 1)] * times)


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_are_restricted_within_a_context_and_computed_once_there() -> None:
    W_E, reads = counting(normal(40, 6))
    effective = EffectiveRows(Vocabulary(W_E, None), None, FACTS)
    wanted = effective(torch.arange(40), "token")
    reads[:] = [0] * 40
    with effective.only(torch.tensor([30, 3, 9, 3])):
        for ids in ([3], [9, 30], [[3, 9], [30, 30]]):
            assert torch.equal(effective(torch.tensor(ids), "token"), wanted[torch.tensor(ids)])
        assert max(reads) == 1
        for absent in (4, 0, 39):  # between those that are kept, before and after them
            with pytest.raises(ValueError, match="not among those"):
                effective(torch.tensor([3, absent]), "token")
    assert torch.equal(effective(torch.tensor([4]), "token"), wanted[[4]])
    with pytest.raises(RuntimeError, match="stop"), effective.only(torch.tensor([1])):
        raise RuntimeError("stop")
    assert torch.equal(effective(torch.tensor([4]), "token"), wanted[[4]])


def test_a_piece_that_is_read_has_a_bound(monkeypatch) -> None:
    asked = []
    matrix = normal(100, 3)

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return matrix[start:stop]

    monkeypatch.setattr(StoredRows, "PIECE_TOKENS", 16)
    assert torch.equal(StoredRows(read, (100, 3))[torch.arange(1, 99, 2)], matrix[1:99:2])
    assert max(asked) <= 16


def stored(model: Random) -> tuple[Random, list[int]]:
    """The same model with its unembedding left in a checkpoint."""
    given = model.embeddings()
    rows, reads = counting(given.W_U.T.contiguous())
    model.embeddings = lambda: EmbeddingWeights(given.W_E, given.W_pos, rows, given.final_norm)
    return model, reads


@pytest.mark.slow
@pytest.mark.parametrize("kept", [2**26, 0])
def test_an_unembedding_is_not_read_anew_for_every_surrogate(kept, monkeypatch) -> None:
    """In memory where it is small; otherwise passed once for each layer, and once for each stage of the draws."""
    wanted = run(Random(), task(), "model.claims=null").tables["candidates"]
    monkeypatch.setattr(vocabulary, "KEPT_UP_TO", kept)
    monkeypatch.setattr(effective_embeddings, "SCREEN", 16)
    monkeypatch.setattr(surrogates, "PART_ELEMENTS", 1)  # one draw at a time
    model, reads = stored(Random())
    found = analyse(OpenedModel(model, "toy", tokenizer()), cell(task(), "model.claims=null")).tables["candidates"]
    for name in ("value", "p_spectrum", "p_words"):
        assert np.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-9, equal_nan=True), name
    assert max(reads) < (12 if kept else DRAWS)


def test_finite_rows_are_checked_once_and_others_always_refused(tmp_path, monkeypatch) -> None:
    shape = random_checkpoints.Shape("gpt2", 1, 2, 16, 8, 40, tied=True)
    random_checkpoints.make_checkpoint(shape, tmp_path)
    path = tmp_path / "embeddings.safetensors"
    tensors = load_file(path)
    tensors["transformer.wte.weight"][30, 2] = math.nan
    save_file(tensors, path)
    checkpoint, checked = open_checkpoint(local(tmp_path)), []
    module = sys.modules["ovqk.checkpoints.checkpoint"]
    check = module.check_finite
    monkeypatch.setattr(module, "check_finite", lambda *given: (checked.append(given[1]), check(*given)))
    for start, stop in ((0, 10), (2, 7), (5, 12), (5, 12)):
        checkpoint.rows("transformer.wte.weight", start, stop)
    assert len(checked) == 2
    for _ in range(2):
        with pytest.raises(UserError, match="NaN or infinity"):
            checkpoint.rows("transformer.wte.weight", 20, 35)


# --- ranking words together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", [1, 30, 300])
def test_searches_settled_together_find_what_each_finds_alone(screen, monkeypatch) -> None:
    monkeypatch.setattr(alignment, "TOP_BLOCK", 64)
    W_U_rows, ids = normal(300, 8, seed=1), torch.tensor([3, 250, 40, 299, 0])
    cases = [
        (Factors(Circuit.ov, normal(4, 8, 3, seed=s), normal(4, 3, 8, seed=s + 50)), normal(5, 8, seed=9))
        for s in range(6)
    ]
    rows = W_U_rows[ids]
    cases.append((Factors(Circuit.ov, torch.eye(8)[None], torch.eye(8)[None]), rows))  # copies: words that stay open
    searches = [TopSearch((x @ factors.left) @ factors.right, ids, rows) for factors, x in cases]
    for search in searches:
        settle([search], W_U_rows[:screen])
    assert any(not search.done for search in searches)
    settle(searches, W_U_rows)
    for search, (factors, x) in zip(searches, cases, strict=True):
        for found, wanted in zip(search.found(), in_top_by_source(factors, x, ids, W_U_rows), strict=True):
            assert torch.equal(found, wanted)
    assert searches[-1].found()[0].any()


def test_searches_that_have_passed_different_tokens_are_not_settled_together() -> None:
    W_U_rows, ids = normal(50, 4), torch.tensor([1, 2])
    some = [TopSearch(W_U_rows[ids][None], ids, W_U_rows[ids]) for _ in range(2)]
    settle([some[0]], W_U_rows[:10])
    with pytest.raises(ValueError, match="passed the same tokens"):
        settle(some, W_U_rows)


# --- bounds of trace ratios --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-2, 2), st.booleans())
def test_a_trace_ratio_lies_within_its_bounds(seed, k, shift, singular) -> None:
    cores = normal(5, k, k, seed=seed).double() + shift * torch.eye(k).double()
    if singular:
        cores[:, 0] = 0
    eigen = torch.linalg.eigvals(cores)
    exact = spectra.trace_ratio(eigen, torch.zeros(5).double())
    for sharp in (False, True):
        low, high = spectra.trace_ratio_bounds(cores, torch.ones(5).double(), sharp)
        assert (low <= exact + 1e-12).all() and (exact <= high + 1e-12).all()


@pytest.mark.parametrize(("d", "k"), [(12, 3), (64, 16), (160, 64), (16, 16)])
@pytest.mark.parametrize("decay", [0.0, 6.0])
def test_float32_eigenvalues_of_surrogates_give_their_ratios_far_within_what_is_allowed(d, k, decay) -> None:
    """Cores between random frames, with even singular values and with some that fall to 1e-6 of the largest."""
    frames = torch.linalg.qr(normal(2 * 200, d, k).double()).Q
    sigma = (10.0 ** torch.linspace(0, -decay, k).double()).expand(200, k)
    gram = normal(d, d, seed=3).double()
    cores = Decomposition(frames[:200], 1e-20 * sigma, frames[200:], k).core(gram @ gram.T)
    exact = spectra.trace_ratio(torch.linalg.eigvals(cores), torch.zeros(200).double())
    low, high = spectra.trace_ratio_intervals(cores, torch.zeros(200).double())
    told = high - low < 1
    assert told.double().mean() > (0.9 if k > 3 else 0.4)
    middle, width = (low + high)[told] / 2, spectra.FLOAT32_EIGENVALUES * exact[told].abs()
    assert ((middle - exact[told]).abs() < 0.01 * width).all()
    assert (low[~told] == -1).all() and (high[~told] == 1).all()
    low, high = spectra.trace_ratio_intervals(cores, 1e9 * cores.norm(dim=(-2, -1)))  # any sum may count as 0
    assert (low == -1).all() and (high == 1).all()


def test_a_bound_for_a_ratio_lies_on_the_ratios_side_of_what_was_observed(monkeypatch) -> None:
    d, k, n = 12, 5, 400
    frames = torch.linalg.qr(normal(2 * n, d, k).double()).Q
    maps = Decomposition(frames[:n], torch.rand(n, k).double() + 0.1, frames[n:], k)
    gram = torch.eye(d).double() + 0.1 * torch.ones(d, d).double()
    exact, decomposed = full_circuit_ratio(maps, FullCircuit.qk(gram)), []
    eigenvalues = spectra.eigenvalues
    monkeypatch.setattr(spectra, "eigenvalues", lambda cores: (decomposed.append(len(cores)), eigenvalues(cores))[1])
    for observed in (-0.5, -0.01, 0.0, 0.2, 0.7, 1.0, float(exact[7])):
        found = full_circuit_ratio(maps, FullCircuit.qk(gram), observed)
        for sign in (1, -1):
            assert monte_carlo(sign * observed, sign * found.numpy()) == monte_carlo(
                sign * observed, sign * exact.numpy()
            )
    assert sum(decomposed) < 7 * n / 2  # most were told by their bounds


# --- candidates --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_candidates_have_the_p_of_all_their_draws(monkeypatch) -> None:
    """Drawn until the p is counted no further, by bounds where these tell: as with every draw made and exact."""
    drawn: dict[tuple[int, int], int] = {}
    original = ClaimTests.spectrum_ps

    def spectrum_ps(self, asked):
        found = original(self, asked)
        for (head, name, sign), p in found.items():
            if self.has_spectrum_null(name):
                fresh = ClaimTests(self.task, self.claims, sigma=self.sigma, forms=self.forms)
                fresh.observed = {head: {name: math.nan}}  # on no side of which a bound can tell
                values = fresh.frame(head, name).first(DRAWS)[name]
                assert p == monte_carlo(sign * self.observed[head][name], sign * values).p, (head, name)
                drawn[head] = self.frame(head, name).count
        return found

    monkeypatch.setattr(ClaimTests, "spectrum_ps", spectrum_ps)
    table = run(Random(), task(), "model.claims=null").tables["candidates"]
    assert table["p_spectrum"].notna().sum() > 20
    assert min(drawn.values()) < DRAWS == max(drawn.values())


# --- the checkpoint that is measured with ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_a_random_checkpoint_has_words_block_0_and_both_cells(family, tmp_path) -> None:
    words = random_checkpoints.task_words()
    n_vocab = 256 + 3 * len(words)
    shape = random_checkpoints.Shape(
        family, 2, 2, 16, 8, n_vocab, tied=True, n_kv_heads=2 if family == "gpt2" else 1, d_mlp=24
    )
    random_checkpoints.make_checkpoint(shape, tmp_path)
    read = load_tokenizer(open_checkpoint(local(tmp_path)))
    assert read.get_vocab_size() == n_vocab
    assert len(read.encode(" Mary").ids) == 1 and read.decode(read.encode("Bob, (x)\n").ids) == "Bob, (x)\n"
    for name in ("none", "ioi"):
        config = bench.cell_config(tmp_path, task=name)
        config.nulls.draws = 30
        assert bench.whole_cell_with_words(config) == 4
    source = bench.open_model(config)
    task = TaskReadout.read(Model.read(OpenedModel(source, "toy", read), config))
    assert not isinstance(task.model.block0, str) and task.readout is not None
    of_a_set = {name for name in TOP_METRICS if METRICS[name].variable is VariableKind.set}
    assert len(of_a_set) == 2 and of_a_set <= set(task.readout.metrics(0, task.maps(Layer(task.model, 0), Circuit.ov)))
