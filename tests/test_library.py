"""The door for notebooks says what the cells say, head by head, and refuses what there is not."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from support import ROOT
from support.commands import compose
from support.gguf_writing import write_gguf
from support.models import BUNDLED, make

import ovqk
from ovqk.cell import run_cell
from ovqk.circuits.factors import ov_factors, qk_factors
from ovqk.config.choices import model_choice
from ovqk.errors import UserError
from ovqk.library import LibraryModel
from ovqk.records.results import cell_folders, load_table
from ovqk.structure.stages import StructureTables


@pytest.fixture(scope="module")
def model() -> LibraryModel:
    return ovqk.open("mini-attn", "cache=false")


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, pd.DataFrame]:
    """The tables of a cell without a task."""
    results = tmp_path_factory.mktemp("door") / "results"
    run_cell(compose("task=none", "tracking=none", "cache=false", f"results_dir={results}"))
    (folder,) = cell_folders(results)
    return {name: load_table(folder, name) for name in ("heads", "spectra", "directions")}


def test_heads_are_those_of_a_cell_without_a_task(model, tables) -> None:
    heads = model.heads()
    assert len(heads) == model.n_layers * model.n_heads == 32
    pd.testing.assert_frame_equal(heads, tables["heads"][heads.columns.tolist()])
    filled = set(tables["heads"].dropna(axis=1, how="all"))
    assert "qk_composed_margin" in filled and filled <= set(heads), "the cache would hand a cell fewer columns"
    assert {"ov_copying", "qk_matching", "qk_symmetry", "qk_prev_auc", "unstable"} <= set(heads)


def test_a_head_is_computed_without_its_model_and_alike(tables, monkeypatch) -> None:
    visited, visit = [], StructureTables.visit
    monkeypatch.setattr(StructureTables, "visit", lambda self, layer: visit(self, layer) or visited.append(layer.index))
    head = ovqk.open("mini-attn", "cache=false").head(3, 4)
    row = tables["heads"].set_index(["layer", "head"]).loc[(3, 4)]
    assert head.ov.copying == row["ov_copying"] and head.qk.matching == row["qk_matching"]
    assert head.qk.symmetry == row["qk_symmetry"] and head.ov.symmetry == row["ov_symmetry"]
    assert head.ov.effective_rank == row["ov_effective_rank"]
    assert head.qk.effective_rank == row["qk_effective_rank"] and head.value("qk_prev_auc") == row["qk_prev_auc"]
    assert "tables" not in head.model.__dict__ and visited == [3]
    assert head.value("qk_composed_margin") == row["qk_composed_margin"] == head.metrics["qk_composed_margin"]
    assert visited == [3], "earlier layers are not taken apart for it"
    with pytest.raises(UserError, match="qk_composed_margin: heads in layer 0 have none"):
        head.model.head(0, 0).value("qk_composed_margin")


def test_a_circuit_is_its_materialised_matrix(model) -> None:
    layer = model.layer(2)
    for circuit, factors in ((model.head(2, 5).ov, ov_factors), (model.head(2, 5).qk, qk_factors)):
        whole = factors(layer.folded, model.model.architecture)
        matrix = (whole.left[5].double() @ whole.right[5].double()).numpy()
        assert np.allclose(circuit.matrix(), matrix, atol=1e-12) and circuit.left.shape == (128, 16)
        assert np.allclose(circuit.left @ circuit.right, matrix, atol=1e-12)
        sigma = np.linalg.svd(matrix, compute_uv=False)[:16]
        assert np.allclose(circuit.singular_values, sigma, rtol=1e-5)
        eigen = np.linalg.eigvals(matrix)
        leading = np.sort(np.abs(eigen))[::-1][:16]
        assert np.allclose(np.abs(circuit.eigenvalues), leading, atol=1e-5 * leading[0])
    copying = model.head(2, 5).ov.vocabulary_eigenvalues
    assert model.head(2, 5).ov.copying == pytest.approx(copying.real.sum() / np.abs(copying).sum())
    E, U = model.model.vocabulary.W_E.double(), model.model.vocabulary.W_U_rows[:].double()
    full = (E - E.mean(0)).numpy() @ model.head(2, 5).ov.matrix() @ (U - U.mean(0)).numpy().T
    found = model.head(2, 5).ov.vocabulary_singular_values
    assert np.allclose(found, np.linalg.svd(full, compute_uv=False)[:16], rtol=1e-4)


@pytest.mark.parametrize("name", ["mini-attn", "mini-llama"])
def test_compositions_are_the_norms_of_materialised_products(name) -> None:
    """Under rotary positions the receiver's W_QK has its mean rotation, which `qk.matrix()` has not."""
    model = ovqk.open(name, "cache=false")
    sender, receiver = model.head(1, 6), model.head(3, 3)
    layer = model.layer(3)
    mean = qk_factors(layer.folded, model.model.architecture, layer.span)
    qk, written = (mean.left[3].double() @ mean.right[3].double()).numpy(), sender.ov.matrix()
    norm = np.linalg.norm
    for mode, read in (("q", qk), ("k", qk.T), ("v", receiver.ov.matrix())):
        wanted = norm(written @ read) / norm(written) / norm(read)
        assert model.composition(mode, sender, receiver) == pytest.approx(wanted, rel=1e-5)
    plain = receiver.qk.matrix()
    unrotated = norm(written @ plain.T) / norm(written) / norm(plain)
    assert (abs(unrotated - model.composition("k", sender, receiver)) > 0.02) == (name == "mini-llama")
    for wrong, said in (
        (("K", sender, receiver), "no such mode; allowed: q, k, v"),
        (("k", receiver, sender), "allowed: an earlier layer"),
        (("k", ovqk.open(name, "cache=false").head(0, 0), receiver), "is no head of this model"),
    ):
        with pytest.raises(UserError, match=said):
            model.composition(*wrong)


def test_singular_vectors_and_embeddings_are_those_of_the_circuit(model) -> None:
    for circuit in (model.head(2, 5).ov, model.head(2, 5).qk):
        U, V = circuit.left_singular_vectors, circuit.right_singular_vectors
        assert U.shape == V.shape == (128, 16) and np.allclose(U.T @ U, np.eye(16), atol=1e-5)
        assert np.allclose(U * circuit.singular_values @ V.T, circuit.matrix(), atol=1e-5)
    assert model.W_E.shape == model.W_U.T.shape == (model.model.vocabulary.size, 128)
    ov = model.head(2, 5).ov
    E, U = (model.W_E - model.W_E.mean(0)).astype(float), model.W_U.astype(float)
    found = np.linalg.eigvals(ov.right @ U @ E @ ov.left)
    assert found.sum().real / np.abs(found).sum() == pytest.approx(ov.copying, abs=1e-5)


def test_tokens_are_those_of_directions_and_more_components_can_be_had(model, tables) -> None:
    of_head = tables["directions"].query("layer == 3 and head == 0 and circuit == 'ov' and kind == 'singular'")
    found = model.head(3, 0).ov.tokens(5, shown=4)
    assert found.columns.tolist() == ["component", "sigma", "end", "reads", "writes"] and len(found) == 10
    for row in found[found["component"] < 3].to_dict("records"):
        for side, title in (("read", "reads"), ("write", "writes")):
            sign = 1 if row["end"] == "+" else -1
            wanted = of_head.query(f"component == {row['component']} and side == '{side}' and sign == {sign}")
            assert row[title] == wanted.sort_values("rank")["token"].tolist()[:4]
    assert found["sigma"].tolist()[::2] == pytest.approx(model.head(3, 0).ov.singular_values[:5].tolist())
    assert {"queries", "keys"} <= set(model.head(3, 0).qk.tokens(1))


def test_a_portrait_is_a_figure_of_that_head(model) -> None:
    figure = model.head(3, 4).portrait()
    said = " ".join(text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text")))
    assert "3.4" in said and "mini-attn" in said


def test_a_portrait_is_shown_by_a_notebook_that_did_not_ask_for_matplotlib(model) -> None:
    shown, _ = DisplayFormatter().format(model.head(3, 4).portrait())
    assert shown["image/png"].startswith(b"\x89PNG")


def test_a_path_a_file_and_the_hub_are_told_apart(tmp_path) -> None:
    assert model_choice("gpt2") == ["model=gpt2"]
    assert model_choice("Qwen/Qwen3-0.6B") == ["model=hub", "model.repo=Qwen/Qwen3-0.6B"]
    odd = tmp_path / "my (model) = 1"
    odd.mkdir()
    assert model_choice(odd) == ["model=local", f'model.path="{odd}"']
    assert model_choice("missing/x.gguf") == ["model=local", "model.path=missing/x.gguf"]
    assert model_choice("~/none")[0] == model_choice("./none")[0] == "model=local"


def test_a_directory_and_a_gguf_file_of_one_model_say_the_same(tmp_path) -> None:
    directory = tmp_path / "a (b) = c"
    make("llama", directory)
    plain, packed = ovqk.open(directory), ovqk.open(str(write_gguf(directory, tmp_path / "x.gguf")))
    assert plain.name == "a-b-c" and packed.name == "x" and plain.d_head == packed.d_head
    assert np.allclose(plain.head(1, 0).qk.singular_values, packed.head(1, 0).qk.singular_values, rtol=1e-4)


def test_what_there_is_not_is_said_in_one_message(model, tmp_path) -> None:
    with pytest.raises(UserError, match=r"head\(4, 0\): mini-attn has layers and heads 0 to 3, 0 to 7"):
        model.head(4, 0)
    with pytest.raises(UserError, match=r"model=mini-atn: there is no such model. Did you mean mini-attn"):
        ovqk.open("mini-atn")
    with pytest.raises(UserError, match="no such file or directory"):
        ovqk.open(tmp_path / "none")
    with pytest.raises(UserError, match="processing"):
        ovqk.open("mini-attn", "processing=cooked")
    with pytest.raises(UserError, match=r"ov_nothing: not a metric that a head has.*ov_copying"):
        model.head(0, 0).value("ov_nothing")
    with pytest.raises(UserError, match=r"copying: .* Did you mean ov_copying\? Allowed: "):
        model.head(0, 0).value("copying")
    unavailable = next(iter(model.unavailable))
    with pytest.raises(UserError, match=rf"{unavailable}: mini-attn has none"):
        model.head(0, 0).value(unavailable)


def test_raw_weights_are_what_the_checkpoint_holds() -> None:
    raw = ovqk.open("mini-gpt2", "processing=raw", "cache=false")
    weights = raw.model.source.layer(1)
    W_V = weights.W_V[raw.model.architecture.kv_of_head][3]
    assert torch.equal(torch.from_numpy(raw.head(1, 3).ov.left), W_V.double())
    assert "weights raw" in repr(raw) and math.isfinite(raw.head(1, 3).ov.copying)


def test_what_a_cell_left_in_the_cache_is_taken(tmp_path) -> None:
    choices = (f"cache_dir={tmp_path / 'cache'}", "analysis=b03")
    run_cell(compose("task=none", "tracking=none", f"results_dir={tmp_path / 'r'}", *choices))
    again = ovqk.open("mini-attn", *choices)
    again.of_layer = None  # type: ignore[method-assign]  # nothing is computed
    assert len(again.heads()) == 32


def test_the_bundled_directory_is_a_model_like_any_other() -> None:
    assert ovqk.open(BUNDLED, "cache=false").head(0, 0).ov.copying == pytest.approx(
        ovqk.open("mini-attn", "cache=false").head(0, 0).ov.copying
    )


@pytest.mark.parametrize(("model", "said"), [
    ("a\0b", "holds control characters"),
    ("a\nb", "there is no such model"),
    ("x" * 300, "no file has so long a name"),
    ("~nobody9/x", "model.path=~nobody9/x: "),
])  # fmt: skip
def test_what_is_no_name_of_a_model_is_a_users_mistake(model, said) -> None:
    with pytest.raises(UserError, match=said):
        ovqk.open(model)


def test_what_is_no_number_of_tokens_is_a_users_mistake() -> None:
    head = ovqk.open("mini-attn").head(0, 0)
    for choice in ({"components": -1}, {"components": 0}, {"shown": 0}):
        with pytest.raises(UserError, match="must be a whole number from 1 to"):
            head.ov.tokens(**choice)
    with pytest.raises(UserError, match=r"tokens\(components=17\): must be a whole number from 1 to 16\."):
        head.ov.tokens(17)
    with pytest.raises(UserError, match=r"tokens\(shown=11\): must be a whole number from 1 to 10\."):
        head.ov.tokens(1, shown=11)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "said"), [
    ("ovqk.open(None)", "model=None: must be a text or a path"),
    ("ovqk.open('mini-attn', 3)", "3: a choice is a text"),
    ("ovqk.open('mini-attn').head('1', 0)", "head('1', 0): mini-attn has layers and heads 0 to 3"),
    ("ovqk.open('mini-attn').head(1.5, 0)", "head(1.5, 0): mini-attn has layers and heads 0 to 3"),
    ("ovqk.open('mini-attn').head(0, 0).ov.tokens('x')", "tokens(components='x'): must be a whole number from 1 to 16"),
])  # fmt: skip
def test_what_is_of_another_type_is_a_users_mistake(call, said) -> None:
    """In a process of its own: here, types are checked before the call."""
    done = subprocess.run([sys.executable, "-c", f"import ovqk; {call}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ovqk.errors.UserError: ") and said in done.stderr
