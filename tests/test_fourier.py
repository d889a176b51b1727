"""Cycles by frequency: against the transform as a matrix, on heads built by hand, and on published models."""

import base64
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.commands import compose
from support.models import BUNDLED, local, shared_model

from ovqk import wording
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import fourier
from ovqk.errors import UserError
from ovqk.figures.choice import cycle_figure
from ovqk.figures.cycles import frequencies
from ovqk.records.cells import Cell, read_cells
from ovqk.records.identity import cell_id, identity
from ovqk.records.results import load_table
from ovqk.report.cycle_image import cycle_image
from ovqk.report.page import page_data
from ovqk.report.thinning import DETAILS
from ovqk.structure.model import Model
from ovqk.tasks.cycle import Cycle, read_cycle
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.verdicts.cycles import cycle_verdict
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel, mixed

moduli = st.sampled_from([5, 6, 7, 8, 11, 13, 16])


def transform(p: int) -> tuple[np.ndarray, list[int]]:
    """The real transform as an orthonormal matrix [row, residue], and the frequency of each row."""
    a = np.arange(p)
    rows, of = [np.ones(p)], [0]
    for k in range(1, p // 2 + 1):
        rows.append(np.cos(2 * np.pi * k * a / p))
        of.append(k)
        if 2 * k != p:
            rows.append(np.sin(2 * np.pi * k * a / p))
            of.append(k)
    F = np.stack(rows)
    return F / np.linalg.norm(F, axis=1, keepdims=True), of


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(p=moduli, seed=st.integers(0, 1000))
def test_power_is_that_of_the_transforms_rows(p, seed) -> None:
    rows = drawn(seed, p, 3)
    F, of = transform(p)
    assert np.allclose(F @ F.T, np.eye(p))
    squares = np.square(F @ rows.numpy()).sum(1)
    expected = np.array(
        [sum(s for s, k in zip(squares, of, strict=True) if k == want) for want in range(1, p // 2 + 1)]
    )
    assert np.allclose(fourier.power(rows), expected / expected.sum())


@given(p=moduli, seed=st.integers(0, 1000))
def test_blocks_are_those_of_the_transformed_matrix(p, seed) -> None:
    matrix = drawn(seed, p, p)
    F, of = transform(p)
    squares = np.square(F @ matrix.numpy() @ F.T)[1:, 1:]
    of = np.array(of[1:])
    expected = [squares[np.ix_(of == k, of == k)].sum() / squares.sum() for k in range(1, p // 2 + 1)]
    assert np.allclose(fourier.blocks(matrix), expected)


@given(p=st.sampled_from([5, 7, 11, 13]), g=st.integers(1, 12), seed=st.integers(0, 1000))
def test_multiplying_residues_renames_frequencies_and_changes_nothing_else(p, g, seed) -> None:
    if g % p == 0:
        return
    matrix, rows = drawn(seed, p, p), drawn(seed + 1, p, 2)
    order = torch.arange(p) * g % p  # residue a now stands where g a stood
    renamed = [min(g * k % p, -g * k % p) for k in range(1, p // 2 + 1)]
    places = torch.tensor(renamed) - 1
    assert torch.allclose(fourier.power(rows[order])[places], fourier.power(rows))
    assert torch.allclose(fourier.blocks(matrix[order][:, order])[places], fourier.blocks(matrix))


@given(p=moduli, seed=st.integers(0, 1000))
def test_a_circulant_matrix_moves_within_frequencies(p, seed) -> None:
    column = drawn(seed, p)
    matrix = torch.stack([column.roll(shift) for shift in range(p)])
    assert float(fourier.blocks(matrix).sum()) == pytest.approx(1)
    assert float(fourier.shift_variance(matrix)) == pytest.approx(0, abs=1e-12)
    other = drawn(seed + 1, p, p)
    P = torch.eye(p, dtype=torch.float64).roll(1, 0)
    expected = (other @ P - P @ other).norm() / other.norm()
    assert float(fourier.shift_variance(other)) == pytest.approx(float(expected))


@settings(max_examples=30)
@given(shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=12))
def test_gini_and_the_fewest_frequencies(shares) -> None:
    x = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    n = len(shares)
    assert float(fourier.gini(x)) == pytest.approx(float((x[:, None] - x[None]).abs().sum() / (2 * n * x.sum())))
    needed = int(fourier.frequencies_needed(x))
    held = sorted(x.tolist(), reverse=True)
    assert sum(held[:needed]) >= 0.95 - 1e-9 and sum(held[: needed - 1]) < 0.95


def test_doubling_is_of_the_frequency_twice_as_fast() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2])
    assert fourier.doubling(shares, 7).tolist() == pytest.approx([0.3 / 0.5, 0.2 / 0.3, 0.5 / 0.2])  # 2 3 = 6 = -1
    found = fourier.doubling(shares, 6).tolist()
    assert found[:2] == pytest.approx([0.3 / 0.5, 0.3 / 0.3]) and math.isnan(found[2])  # 2 3 = 0


def test_nothing_has_no_frequency() -> None:
    assert fourier.power(torch.ones(5, 2)).isnan().all() and fourier.blocks(torch.zeros(5, 5)).isnan().all()
    assert fourier.shift_variance(torch.zeros(5, 5)).isnan()


# --- cells ---------------------------------------------------------------------------------------------------


def clock(p: int, k: int, path) -> None:
    """A model whose head 0.0 looks by frequency k and moves it, and whose head 0.1 does nothing."""
    a = torch.arange(p)
    angles = 2 * torch.pi * torch.outer(a, torch.arange(1, 4)) / p  # three frequencies in the embedding
    embedding = torch.cat([angles.cos(), angles.sin(), torch.zeros(p, 2)], 1)
    equals = torch.zeros(1, 8)
    equals[0, 6] = 1
    own = [k - 1, k + 2]  # cosine and sine
    W_Q, W_K, W_V, W_O = torch.zeros(2, 8, 2), torch.zeros(2, 8, 2), torch.zeros(2, 8, 2), torch.zeros(2, 2, 8)
    W_Q[0, 6] = torch.tensor([0.6, 0.8])
    for place, component in enumerate(own):
        W_K[0, component, place] = W_V[0, component, place] = W_O[0, place, component] = 1
    save_file(
        {
            "embed.W_E": torch.cat([embedding, equals]),
            "unembed.W_U": torch.cat([embedding, equals]).T.contiguous(),
            "pos_embed.W_pos": torch.zeros(3, 8),
            **{f"blocks.0.attn.W_{n}": w for n, w in zip("QKVO", (W_Q, W_K, W_V, W_O), strict=True)},
        },
        path,
    )


def cycles(cli, path, *choices: str):
    code, printed = cli("model=local", f"model.path={path}", "model.name=m", "task=modular_addition", "tracking=none",
                        "model.causal=true", "analysis=b03", "analysis.components=0", *choices)  # fmt: skip
    assert code == 0, printed
    (folder,) = (cli.folder / "results" / "m" / "modular_addition").iterdir()
    found = load_table(folder, "cycles")
    return printed, found.set_index(found["part"] + found["head"].astype(str)), load_table(folder, "frequencies")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_clock_head_is_found_and_a_head_of_zeros_has_no_numbers(cli, tmp_path, k) -> None:
    clock(17, k, tmp_path / "clock.safetensors")
    printed, rows, frequencies = cycles(
        cli, tmp_path / "clock.safetensors", "task.cycle.modulus=17", "task.cycle.query=17", "nulls.draws=99"
    )
    for part in ("ov0", "key0"):
        assert rows.at[part, "frequency"] == k and rows.at[part, "share"] == pytest.approx(1)
        assert rows.at[part, "p"] == pytest.approx(0.01) and rows.at[part, "q"] == pytest.approx(0.01)
        assert math.isnan(rows.at[part[:-1] + "1", "share"]) and math.isnan(rows.at[part[:-1] + "1", "p"])
    assert rows.at["ov0", "block_share"] == pytest.approx(1)
    assert rows.at["ov0", "shift_variance"] == pytest.approx(0, abs=1e-6)
    embedding = frequencies[frequencies["part"] == "embedding"]
    assert embedding["power"].iloc[:3].tolist() == pytest.approx([1 / 3] * 3)
    assert rows[rows["part"] == "embedding"]["n_frequencies"].tolist() == [3]
    assert "0.0 OV" in printed and "none" in printed


@pytest.mark.parametrize("k", [1, 3])
def test_what_heads_write_to_neurons_and_neurons_to_logits_is_that_of_materialised_products(cli, tmp_path, k) -> None:
    path = tmp_path / "clock.safetensors"
    clock(17, k, path)
    tensors = load_file(path)
    W_in, W_out = drawn(k, 8, 12).float(), drawn(k + 1, 12, 8).float()
    mlp = {"W_in": W_in, "W_out": W_out, "b_in": torch.zeros(12), "b_out": torch.zeros(8)}
    save_file(tensors | {f"blocks.0.mlp.{name}": tensor for name, tensor in mlp.items()}, path)
    _, rows, frequencies = cycles(cli, path, "task.cycle.modulus=17", "task.cycle.query=17", "nulls.draws=99")
    W_E, W_U = tensors["embed.W_E"][:17].double(), tensors["unembed.W_U"][:, :17].double()
    W_OV = (tensors["blocks.0.attn.W_V"][0] @ tensors["blocks.0.attn.W_O"][0]).double()
    F, labels = transform(17)
    for part, materialised in (("neurons", (W_out.double() @ W_U).T), ("ov_neurons", W_E @ W_OV @ W_in.double())):
        of_row = np.square(F @ materialised.numpy()).sum(1)
        wanted = np.array([of_row[[label == frequency for label in labels]].sum() for frequency in range(1, 9)])
        mine = frequencies[(frequencies["part"] == part) & (frequencies["head"].fillna(0) == 0)]
        assert mine["power"].tolist() == pytest.approx((wanted / wanted.sum()).tolist(), abs=1e-6)
    assert rows.at["ov_neurons0", "frequency"] == k and rows.at["ov_neurons0", "share"] == pytest.approx(1)
    assert rows.at["ov_neurons0", "verdict"] == "corroborated" and math.isnan(rows.at["ov_neurons1", "share"])


def test_random_weights_have_p_at_their_level(cli, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.W_E": (14, 24), "unembed.W_U": (24, 14), "pos_embed.W_pos": (3, 24)}
    shapes |= {f"blocks.0.attn.W_{n}": (40, 24, 4) for n in "QKV"} | {"blocks.0.attn.W_O": (40, 4, 24)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "random.safetensors")
    _, rows, _ = cycles(
        cli, tmp_path / "random.safetensors", "task.cycle.modulus=13", "task.cycle.query=13", "nulls.draws=199"
    )
    p = rows.loc[rows["part"] == "ov", "p"].astype(float)
    assert len(p) == 40 and (p <= 0.25).mean() == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 40))


def test_published_models_have_their_known_frequencies(cli) -> None:
    """Shares of W_E's power, heads' frequencies, OV blocks and keys of Zhong et al.'s model A-like run l8k1hzciux."""
    path = shared_model("modular-addition") / "l8k1hzciux.safetensors"
    _, rows, frequencies = cycles(cli, path, "task.cycle.modulus=59", "task.cycle.query=null", "nulls.draws=99")
    embedding = frequencies[frequencies["part"] == "embedding"].set_index("frequency")["power"]
    for k, share in ((13, 0.394), (16, 0.330), (21, 0.197), (17, 0.061)):
        assert embedding[k] == pytest.approx(share, abs=0.002)
    assert [rows.at[f"ov{head}", "frequency"] for head in range(4)] == [13, 16, 16, 13]
    assert [rows.at[f"key{head}", "frequency"] for head in range(4)] == [13, 16, 16, 13]
    assert rows.loc[rows["part"] == "ov", "block_share"].between(0.955, 0.985).all()
    assert (rows.loc[rows["part"] == "key", "share"] > 0.985).all() and (rows["p"] <= 0.01).all()


def test_nandas_grokked_model_has_its_known_frequencies(cli) -> None:
    path = shared_model("nanda-mod113-grokked") / "model.safetensors"
    _, _, frequencies = cycles(cli, path, "nulls.draws=99")
    embedding = frequencies[frequencies["part"] == "embedding"].set_index("frequency")["power"]
    for k, share in ((23, 0.238), (6, 0.168), (37, 0.152), (41, 0.144), (39, 0.127)):
        assert embedding[k] == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["task.cycle.modulus=4"], "cycle.modulus=4: allowed: 5 and more"),
        (["task.cycle.modulus=40"], "has 18; set task.cycle.modulus"),
        (["task.cycle.modulus=1000000000000"], "names the tokens 0 to 999999999999, and model.path="),
        (["task.cycle.first=-1"], "names the tokens -1 to"),
        (["task.cycle.query=99"], "names the tokens 0 to 99, and model.path="),
        (["task.cycle.words=residues"], "cycle.words=residues: no such word set"),
        (["+task.words.residues=[a,b]", "task.cycle.words=residues"], "2 words; allowed: a set of task.words"),
    ],
)  # fmt: skip
def test_a_cycle_that_the_model_does_not_have_is_refused(cli, tmp_path, choices, said) -> None:
    clock(17, 1, tmp_path / "clock.safetensors")
    code, printed = cli("model=local", f"model.path={tmp_path / 'clock.safetensors'}", "model.name=m", "tracking=none",
                        "task=modular_addition", "task.cycle.modulus=17", "task.cycle.query=17", *choices)  # fmt: skip
    assert code == 1 and said in printed and "Traceback" not in printed


def test_the_words_of_a_cycle_are_found_by_the_tokenizer() -> None:

    names = ["Mary", "John", "Tom", "James", "Paul"]
    config = compose("model=mini-attn", "task=modular_addition", "task.cycle.modulus=5", "task.cycle.query=null",
                     "task.cycle.words=names", f"+task.words.names=[{','.join(names)}]")  # fmt: skip
    checkpoint = open_checkpoint(local(BUNDLED))
    tokenizer = load_tokenizer(checkpoint)
    model = Model.read(OpenedModel(open_weights(checkpoint, local(BUNDLED)), "mini-attn", tokenizer), config)
    cycle = read_cycle(model)
    assert [tokenizer.id_to_token(token).strip("Ġ▁ ") for token in cycle.ids.tolist()] == names
    config.task.words["names"][0] = "Xanthippe"
    with pytest.raises(UserError, match="not one token each in mini-attn: Xanthippe"):
        read_cycle(model)


# --- verdicts and the figure ---------------------------------------------------------------------------------------


def judged(part: str, **row: object) -> str:
    """The verdict on a part of head 0.0, modulo 41, beside keys on frequency 3."""
    base = {"part": part, "layer": 0, "head": 0, "frequency": 3, "share": 0.9, "block_share": 0.9, "n_frequencies": 5,
            "q": 0.01, "min_p": 0.01} | row  # fmt: skip
    keys = base | {"part": "key", "frequency": 3}
    return cycle_verdict(base, pd.DataFrame([base] if part == "key" else [base, keys]), 41)


@pytest.mark.parametrize(
    ("part", "row", "verdict"),
    [
        ("key", {}, "corroborated"), ("key", {"share": 0.49}, "partial"), ("key", {"q": 0.05}, "unsupported"),
        ("key", {"q": math.nan}, "untestable"), ("key", {"min_p": 0.1}, "untestable"),
        ("embedding", {}, "corroborated"), ("unembedding", {"n_frequencies": 6}, "partial"),
        ("ov", {}, "corroborated"), ("ov", {"frequency": 4}, "partial"), ("ov", {"block_share": 0.49}, "partial"),
        ("ov", {"q": 0.2}, "unsupported"),
    ],
)  # fmt: skip
def test_a_verdict_asks_for_the_order_and_for_the_size(part, row, verdict) -> None:
    assert judged(part, **row) == verdict
    assert set(wording.CYCLE_CLAIMS) == set(wording.CYCLE_PARTS) and verdict in wording.VERDICTS


def test_an_ov_without_keys_is_not_judged() -> None:
    row = {"part": "ov", "layer": 0, "head": 0, "frequency": 3, "block_share": 1.0, "q": 0.01, "min_p": 0.01}
    assert cycle_verdict(row, pd.DataFrame([row]), 41) == "untestable"
    keys = row | {"part": "key", "frequency": None}
    assert cycle_verdict(row, pd.DataFrame([row, keys]), 41) == "untestable"


@pytest.fixture
def clock_cell(cli, tmp_path) -> Cell:
    clock(17, 2, tmp_path / "clock.safetensors")
    cycles(cli, tmp_path / "clock.safetensors", "task.cycle.modulus=17", "task.cycle.query=17", "nulls.draws=99")
    found, failed = read_cells(cli.folder / "results")
    assert not failed
    return found[0]


def test_a_clock_head_is_corroborated_and_drawn_where_it_is(clock_cell) -> None:
    table = clock_cell.tables["cycles"].set_index(["part", "head"])["verdict"]
    assert table[("ov", 0)] == table[("key", 0)] == "corroborated"
    assert table[("ov", 1)] == table[("key", 1)] == "untestable"
    figure = cycle_figure(clock_cell, "clock")
    embedding, unembedding, heads = figure.axes
    for axes in (embedding, unembedding):  # three of eight frequencies
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([1 / 3] * 3 + [0] * 5, abs=1e-6)
        assert {text.get_text() for text in axes.texts} == {"1", "2", "3"}
    grid = heads.images[0].get_array()
    assert [label.get_text() for label in heads.get_yticklabels()] == ["0.0 OV", "0.0 keys", "0.1 OV", "0.1 keys"]
    for row in grid[:2]:
        assert row.tolist() == pytest.approx([0, 1, 0, 0, 0, 0, 0, 0], abs=1e-6)
    assert [text.get_text() for text in heads.texts] == ["2: 1.00", "2: 1.00", "no power", "no power"]


def test_the_page_holds_the_figure_and_says_what_it_shows(clock_cell) -> None:
    image = page_data([clock_cell], [], clock_cell.folder, DETAILS[0])["cells"][0]["frequencies"]
    kind, _, coded = image["address"].partition(",")
    assert kind == "data:image/svg+xml;base64" and b"Embedding W_E" in base64.b64decode(coded)
    assert "0.0 OV: 2 has 1.00, corroborated" in image["description"] and "0.1 keys: no power" in image["description"]
    without = Cell(clock_cell.folder, clock_cell.record, {"heads": clock_cell.tables["heads"]})
    assert cycle_figure(without, "clock") is None


def test_of_many_heads_the_strongest_are_drawn() -> None:
    cycle = pd.DataFrame(
        [{"part": part, "layer": 0, "head": head, "frequency": 1, "share": head / 40, "n_frequencies": 1, "gini": 0.5}
         for head in range(40) for part in ("ov", "key")]
    )  # fmt: skip
    powers = pd.concat([pd.DataFrame({"part": row.part, "layer": 0, "head": row.head, "frequency": [1, 2], "power":
                                      [row.share, 1 - row.share]}) for row in cycle.itertuples()])  # fmt: skip
    (heads,) = frequencies(powers, cycle).axes  # without embeddings, and without verdicts
    assert [label.get_text() for label in heads.get_yticklabels()][::2] == [f"0.{head} OV" for head in range(24, 40)]


def test_what_neurons_write_is_drawn_under_the_embeddings() -> None:
    shares = {("neurons", None): [0.1, 0.9], ("embedding", None): [0.6, 0.4], ("ov", 0): [0.5, 0.5]}
    powers = pd.concat(
        [pd.DataFrame({"part": part, "layer": head, "head": head, "frequency": [1, 2], "power": power})
         for (part, head), power in shares.items()]
    )  # fmt: skip
    cycle = pd.DataFrame([{"part": part, "layer": head, "head": head, "frequency": 1, "share": 0.6, "n_frequencies": 2,
                           "gini": 0.1} for part, head in shares])  # fmt: skip
    embedding, neurons, _ = frequencies(powers, cycle).axes
    titles = [axes.get_title("left") for axes in (embedding, neurons)]
    assert titles == ["Embedding W_E", "Neurons to logits W_out W_U"]
    assert [bar.get_height() for bar in neurons.patches] == [0.1, 0.9]


# --- operators, tokens between, and attention that is not all softmax ----------------------------------------------


@given(p=st.sampled_from([5, 7, 8, 13]), seed=st.integers(0, 1000))
def test_a_matrix_that_writes_the_difference_commutes_with_reflected_shifts(p, seed) -> None:
    column = drawn(seed, p)
    a = torch.arange(p)
    adds, subtracts = column[(a[None] - a[:, None]) % p], column[(a[None] + a[:, None]) % p]
    for matrix, back in ((adds, False), (subtracts, True)):
        assert float(fourier.shift_variance(matrix, back)) == pytest.approx(0, abs=1e-12)
        assert float(fourier.shift_variance(matrix, not back)) > 1e-3
    other, P = drawn(seed + 1, p, p), torch.eye(p, dtype=torch.float64).roll(1, 0)
    expected = (other @ P.T - P @ other).norm() / other.norm()
    assert float(fourier.shift_variance(other, back=True)) == pytest.approx(float(expected))
    assert torch.allclose(fourier.blocks(subtracts).sum(), torch.tensor(1.0, dtype=torch.float64))


@given(p=st.sampled_from([5, 6, 7]), operator=st.sampled_from("+-"), between=st.sampled_from([None, 20]),
       query=st.sampled_from([None, 21]))  # fmt: skip
def test_an_input_holds_its_tokens_in_order_and_its_answer(p, operator, between, query) -> None:
    cycle = Cycle(torch.arange(p) + 3, query, operator, between)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    tokens, (right, other) = cycle.inputs(pairs), cycle.answers()
    assert tokens.shape[1] == cycle.length
    for (a, b), row in zip(pairs.tolist(), tokens.tolist(), strict=True):
        assert row == [each for each in (a + 3, between, b + 3, query) if each is not None]
        assert [row[place] for place in cycle.places] == [a + 3, b + 3]
        assert (int(right[a, b]), int(other[a, b])) == (
            ((a + b) % p, (a - b) % p) if operator == "+" else ((a - b) % p, (a + b) % p)
        )


def test_all_pairs_are_run_if_the_analysis_runs_the_model(cli) -> None:
    """Published of this model: gradient symmetricity 33.36 %, distance irrelevance 0.85 (Zhong et al. 2023)."""
    path = shared_model("modular-addition") / "l8k1hzciux.safetensors"
    choices = (
        "task.cycle.modulus=59",
        "task.cycle.query=null",
        "nulls.draws=19",
        "analysis=full",
        "model.causal=false",
    )
    printed, _, _ = cycles(cli, path, *choices)
    assert "All pairs were run: 100.0 % right, distance irrelevance 0.85, gradient symmetricity 0.3" in printed
    cells, _ = read_cells(cli.folder / "results")
    summary = cells[0].record["summary"]
    assert summary["pairs/distance_irrelevance"] == pytest.approx(0.848, abs=5e-4)
    error = summary["pairs/gradient_symmetricity_se"]
    assert summary["pairs/gradient_symmetricity"] == pytest.approx(0.34613, abs=4 * error) and 0 < error < 0.006
    assert "activations" not in cells[0].record
    assert cycle_image(cells[0], "m")["pairs"].startswith("All pairs were run: 100.0 % right")
    code, printed = cli("model=local", f"model.path={path}", "model.name=m", "task=modular_addition", "tracking=none",
                        *choices, "task.cycle.operator='-'")  # fmt: skip
    assert code == 0 and "All pairs were run: 1.7 % right" in printed  # a + b is a - b for 59 of 59^2 pairs
    code, printed = cli("model=local", f"model.path={path}", "model.name=m", "task=modular_addition", "tracking=none",
                        *choices, "model.attn_coeff=0")  # fmt: skip
    assert code == 0 and "model.attn_coeff is 0: no score reaches attention" in printed
    assert "0.0 OV" in printed and "0.0 keys" not in printed and "100.0 % right" not in printed


def test_a_model_that_is_no_block_is_not_run_on_pairs(cli, tmp_path) -> None:
    clock(17, 1, tmp_path / "clock.safetensors")  # without an MLP
    choices = "task.cycle.modulus=17", "task.cycle.query=17", "nulls.draws=19", "analysis=full"
    printed, rows, _ = cycles(cli, tmp_path / "clock.safetensors", *choices)
    assert "note: pairs were not run: " in printed and "blocks.0.mlp.W_in" in printed and len(rows)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["task.cycle.operator='*'"], "task.cycle.operator=*: allowed: + for (a + b) mod p, - for (a - b) mod p"),
        (["model.attn_coeff=1.5"], "model.attn_coeff=1.5: must be in [0, 1]"),
        (["model.attn_coeff=nan"], "model.attn_coeff=nan: must be in [0, 1]"),
        (["task.cycle.between=3"], "cycle.between=3: that token is a residue; allowed: a token of its own, or null"),
        (["task.cycle.modulus=16", "task.cycle.between=16"], "an input has 4 tokens, and model.path="),
        (["task.cycle.between=99"], "names the tokens 0 to 99, and model.path="),
    ],
)  # fmt: skip
def test_an_operator_or_share_that_cannot_be_is_refused(cli, tmp_path, choices, said) -> None:
    clock(17, 1, tmp_path / "clock.safetensors")
    code, printed = cli("model=local", f"model.path={tmp_path / 'clock.safetensors'}", "model.name=m", "tracking=none",
                        "task=modular_addition", "task.cycle.modulus=17", "task.cycle.query=17", *choices)  # fmt: skip
    assert code == 1 and said in printed and "Traceback" not in printed


def test_a_model_with_its_own_config_takes_no_share() -> None:
    with pytest.raises(UserError, match=r"model\.attn_coeff=0\.5: .*mini-attn has its own config\.json"):
        open_weights(open_checkpoint(local(BUNDLED)), replace(local(BUNDLED), attn_coeff=0.5))


@given(seed=st.integers(0, 200), share=st.floats(0, 1))
def test_simulated_attention_mixes_the_softmax_with_ones(seed, share) -> None:
    scores = drawn(seed, 2, 4, 5).masked_fill(torch.ones(4, 5).tril() == 0, -math.inf)
    found, seen = mixed(scores, share), scores > -math.inf
    assert torch.allclose(found, share * scores.softmax(-1) + (1 - share) * seen)
    assert torch.allclose(found.sum(-1), share + (1 - share) * seen.sum(-1).double())


def test_choices_that_are_as_before_keep_a_cells_id() -> None:
    config = compose("model=mini-attn", "task=modular_addition")
    whole = identity(config, "d")
    assert "attn_coeff" not in whole["model"] and not {"operator", "between"} & set(whole["task"]["cycle"])
    for choice in ("task.cycle.operator='-'", "task.cycle.between=120", "model.attn_coeff=0.5"):
        assert cell_id(identity(compose("model=mini-attn", "task=modular_addition", choice), "d")) != cell_id(whole)
