"""Embeddings that stay in the checkpoint, float32 where the model is large, memory that does not grow with depth."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from support.models import local
from support.scripts import script
from support.toy import RATIO, SCALE, run, toy_task, toy_tokenizer

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import grams
from ovqk.circuits.factors import Factors
from ovqk.circuits.grams import centred_gram, dense, mean_row
from ovqk.circuits.maps import decompose
from ovqk.circuits.spectra import eigenvalues, full_circuit_singular_values, trace_ratio
from ovqk.circuits.vocabulary import read_vocabulary
from ovqk.config.schema import Circuit
from ovqk.metrics import HEAD_METRICS
from ovqk.structure import stages
from ovqk.testing import random_checkpoints
from ovqk.weights import native
from ovqk.weights.folding import fold_embeddings
from ovqk.weights.norms import Norm
from ovqk.weights.readers import open_weights
from ovqk.weights.stored_rows import StoredRows
from ovqk.weights.types import EmbeddingWeights

bench, operations = script("bench"), script("bench_operations")


def rows(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def stored(matrix: torch.Tensor) -> StoredRows:
    return StoredRows(lambda start, stop: matrix[start:stop].clone(), tuple(matrix.shape))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=20), st.integers(0, 300), st.integers(0, 300))
def test_rows_in_the_checkpoint_are_those_of_the_matrix(ids, start, stop) -> None:
    matrix = rows(300, 5)
    assert torch.equal(stored(matrix)[torch.tensor(ids, dtype=torch.long)], matrix[ids])
    assert torch.equal(stored(matrix)[start:stop], matrix[start:stop])
    assert torch.equal(stored(matrix).first(17)[:], matrix[:17])


def test_only_what_is_near_the_ids_is_read() -> None:
    matrix, asked = rows(100_000, 3), []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return matrix[start:stop]

    found = StoredRows(read, tuple(matrix.shape))[torch.tensor([70_000, 5, 9, 70_000, 99_999])]
    assert torch.equal(found, matrix[[70_000, 5, 9, 70_000, 99_999]])
    assert asked == [(5, 10), (70_000, 70_001), (99_999, 100_000)]


def test_gain_and_centring_are_those_of_the_whole_matrix() -> None:
    matrix, gain = rows(50, 6), 1 + rows(1, 6, 1)[0]
    found = stored(matrix).folded(gain, centred=True)[torch.arange(50)]
    wanted = matrix * gain
    assert torch.allclose(found, wanted - wanted.mean(1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="a gain must be applied before centring"):
        stored(matrix).folded(None, centred=True).folded(gain, centred=False)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_grams_of_a_stored_vocabulary_are_those_of_one_in_memory(tiny_gpt2, kind, tied) -> None:
    """Tied: one Gram of the matrix as it is stored, with gain and centring applied to the Gram."""
    facts = open_weights(open_checkpoint(local(tiny_gpt2)), local(tiny_gpt2)).architecture
    facts = dataclasses.replace(facts, norm=kind)
    matrix, other = rows(700, 24, 2, shift=3.0), rows(700, 24, 3)
    norm = Norm(kind, 1 + 0.3 * rows(1, 24, 4)[0], rows(1, 24, 5)[0] if kind == "layernorm" else None)
    head = matrix if tied else other
    W_E = stored(matrix)
    W_U = W_E if tied else stored(other)
    lazy = read_vocabulary(fold_embeddings(EmbeddingWeights(W_E, None, W_U, norm), facts), 650)
    held = read_vocabulary(fold_embeddings(EmbeddingWeights(matrix, None, head.T, norm), facts), 650)
    assert (lazy.stored_once is not None) == tied
    for name in ("gram_embed", "gram_cross", "gram_unembed", "mean"):
        one, other = (x if name == "mean" else dense(x) for x in (getattr(lazy, name), getattr(held, name)))
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-3), name
    assert torch.allclose(lazy.W_U_rows[torch.arange(650)], held.W_U_rows, atol=1e-5)


def test_a_gram_is_the_same_in_whatever_blocks_and_stripes(monkeypatch) -> None:
    a, b = rows(500, 12, 6, shift=5.0), rows(500, 12, 7, shift=-2.0)
    centred = a.double() - a.double().mean(0)
    for block, stripe in ((4096, 256), (7, 5), (1, 1)):
        monkeypatch.setattr(grams, "BLOCK", block)
        monkeypatch.setattr(grams, "STRIPE_COLUMNS", stripe)
        assert torch.allclose(centred_gram(a, a), centred.T @ centred, rtol=1e-9, atol=1e-8)
        assert torch.allclose(centred_gram(b, a), b.double().T @ centred, rtol=1e-9, atol=1e-8)
        assert torch.allclose(mean_row(a), a.double().mean(0), atol=1e-6)


@pytest.mark.parametrize("path", ["tiny_gpt2", "tiny_llama", "gemma3_text", "qwen3"])
def test_a_cell_from_stored_embeddings_is_that_of_embeddings_in_memory(path, request, tiny, monkeypatch) -> None:
    folder = request.getfixturevalue(path) if path.startswith("tiny") else tiny(path)
    held = run(folder, toy_task("set"), tokenizer=toy_tokenizer())[-1].tables
    monkeypatch.setattr(native, "KEEP_UP_TO", 0)
    source = open_weights(open_checkpoint(local(folder)), local(folder))
    assert isinstance(source.embeddings().W_E, StoredRows)
    lazy = run(folder, toy_task("set"), tokenizer=toy_tokenizer())[-1].tables
    for name in HEAD_METRICS:
        one, two = held["heads"][name].to_numpy(), lazy["heads"][name].to_numpy()
        assert np.allclose(one, two, rtol=1e-5, atol=1e-5, equal_nan=True), name
    assert held["directions"]["token_id"].equals(lazy["directions"]["token_id"])


@pytest.mark.parametrize("path", ["tiny_gpt2", "tiny_llama", "olmo2"])
def test_float32_keeps_ratios_and_scales_within_what_the_definitions_allow(path, request, tiny, monkeypatch) -> None:
    """As large models are computed, against float64: 1e-4 on ratios, 1e-4 of their size on scales."""
    folder = request.getfixturevalue(path) if path.startswith("tiny") else tiny(path)
    exact = run(folder, toy_task("set"), tokenizer=toy_tokenizer())[-1].tables
    monkeypatch.setattr(grams, "FLOAT64_UP_TO", 0)
    monkeypatch.setattr(grams, "FLOAT64_PRODUCTS_UP_TO", 0)
    rough = run(folder, toy_task("set"), tokenizer=toy_tokenizer())[-1].tables
    moved = False
    for name, metric in HEAD_METRICS.items():
        one, two = exact["heads"][name].to_numpy(), rough["heads"][name].to_numpy()
        bounded = metric.high is not None and metric.high <= 1
        assert np.allclose(one, two, rtol=0 if bounded else SCALE, atol=RATIO, equal_nan=True), name
        moved |= not np.allclose(one, two, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert moved  # it was another precision
    one, two = (t["spectra"].query("kind == 'singular'") for t in (exact, rough))
    assert np.allclose(one["re"], two["re"], rtol=1e-4, atol=1e-4 * one["re"].max())


def test_float32_suffices_where_embeddings_and_weights_are_far_from_isotropic(monkeypatch) -> None:
    """A spectrum over three decades and a large common vector, at the width of a real model."""
    d, k, n = 576, 32, 4000
    scales = torch.logspace(0, -3, d)
    W_E = rows(n, d, 8) * scales + 5 * rows(1, d, 9)
    left, right = rows(d, k, 10)[None] * scales[:, None], (rows(d, k, 11)[None] * scales.flip(0)[:, None]).mT
    found = []
    for exact in (512, 10**6):
        monkeypatch.setattr(grams, "FLOAT64_UP_TO", exact)
        monkeypatch.setattr(grams, "FLOAT64_PRODUCTS_UP_TO", 0 if exact == 512 else 10**15)
        gram = centred_gram(W_E, W_E)
        assert gram.dtype == (torch.float32 if exact == 512 else torch.float64)
        maps = decompose(Factors(Circuit.qk, left, right), centred=False)
        sigma = full_circuit_singular_values(maps, gram, gram)
        found.append((trace_ratio(eigenvalues(maps.core(gram)), sigma.sum(-1)), sigma))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-4 * float(found[1][1].max()))


SHAPE = random_checkpoints.Shape("llama", 2, 16, 2048, 128, 8000, tied=False)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth_and_keeps_to_its_bound(tmp_path) -> None:
    """Three times a layer's attention weights in float32 and the Grams, block 0's MLP and 150 MB, above the imports."""
    above = {}
    for n_layers in (2, 6):
        shape = dataclasses.replace(SHAPE, n_layers=n_layers)
        folder = tmp_path / str(n_layers)
        random_checkpoints.make_checkpoint(shape, folder)
        above[n_layers] = bench.child("cell", folder, threads=1, device="cpu", hoard=False)["above_mb"]
    sizes = 4 * SHAPE.d_model * SHAPE.width, SHAPE.d_model**2, 3 * SHAPE.d_model * SHAPE.mlp_width
    layer, gram, mlp = (4 * size / 2**20 for size in sizes)
    assert above[6] < above[2] + layer  # four more layers, and not one of them kept
    assert above[6] < 3 * (layer + 4 * gram) + mlp + 150


def test_the_benchmark_runs_and_counts_what_it_says(tmp_path) -> None:
    """On a toy shape: a checkpoint that opens, the two ways of ovqk, and operations by hand."""
    shape = random_checkpoints.Shape("gpt2", 2, 2, 16, 8, 40, tied=True)
    random_checkpoints.make_checkpoint(shape, tmp_path)
    config = bench.cell_config(tmp_path)
    assert bench.whole_cell(config) == 4
    assert bench.spectra_alone(config) == 2 * 2 * 2 * 4 * 8  # layers, circuits, heads, spectra, values
    per_head = 4 * 16 * 16 * 8 + 8 * 2 * 16 * 8 * 8  # four products with a triangle, and eight of d x k
    sizes = bench.sizes_of_shape(shape)
    assert bench.spectra_operations(sizes) == 40 * 16 * 16 + 4 * per_head
    needed = bench.plan_of(sizes).operations
    triangle = 16 * 16 * 8
    block0 = 2 * 2 * 2 * triangle  # in layer 1, for two heads and two circuits, with a whole matrix
    assert needed["Grams times heads"] == 4 * (4 + 2) * triangle + block0
    assert bench.products_done(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
    assert bench.products_done(lambda: torch.ones(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5))) == 2 * 3 * 4 * 5
    assert bench.products_done(lambda: bench.whole_cell(config)) > sum(needed.values())
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), "--child", "cell", "--folder", str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["seconds"] > 0


@pytest.mark.parametrize(("family", "n_kv_heads"), [("gpt2", 4), ("llama", 2)])
def test_the_floor_counts_what_a_plan_leaves_out(tmp_path, monkeypatch, family, n_kv_heads) -> None:
    """By hand; simulated attention also beside the products that are made for it."""
    shape = random_checkpoints.Shape(family, 3, 4, 64, 16, 200, tied=True, n_kv_heads=n_kv_heads)
    random_checkpoints.make_checkpoint(shape, tmp_path)
    config, made = bench.cell_config(tmp_path, components=3), []
    simulated = stages.simulated_metrics

    def recounted(layer, senders):
        assert layer.model.simulated is not None  # its inputs are made before the count
        found = []
        made.append(bench.products_done(lambda: found.append(simulated(layer, senders))))
        return found[0]

    monkeypatch.setattr(stages, "simulated_metrics", recounted)
    pairs = bench.counted(config)["pairs"]
    assert 0 < pairs <= 3 * 2 * 3 * 4  # components, circuits, layers, heads
    sizes, n_ctx = bench.sizes_of_model(config, 3)
    needed = operations.cell_operations(sizes, n_ctx, pairs)
    assert needed["second directions of complex pairs"] == pairs * 2 * 2 * 200 * 64
    learned, weight = family == "gpt2", 2 * 64 * 16
    projected, scored = 1024 * weight * (4 + 4), 1024 * 1024 * 16 * 4  # half of the scores are in sight
    assert needed["scores between positions"] == learned * 3 * (projected + scored) and (n_ctx == 1024 or not learned)
    # Each layer: 8 sequences of twice 50 tokens. Layers 1 and 2: what 4 and 8 earlier heads wrote for 50 tokens.
    sequences = 3 * 8 * 50 * (weight * (4 + (4 * 2 if learned else 2)) + 2 * 75 * 16 * 4)
    met = sum(weight * 50 * 4 + weight * n * n_kv_heads + 2 * 50 * n * 16 * 4 for n in (4 * 50, 8 * 50))
    assert needed["simulated attention"] == sequences + met + 2 * weight * 50 * 8
    assert len(made) == 3 and 1 <= sum(made) / needed["simulated attention"] < 1.5
    planned = bench.plan_of(sizes).operations
    assert {name: needed[name] for name in planned} == planned and len(needed) == len(planned) + 3
