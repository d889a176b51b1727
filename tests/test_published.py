"""Published statements: what a row needs to be called reproduced, and rows whose weights are beside the checkout."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import ROOT
from support.commands import compose
from support.models import BUNDLED, SHARED, make_gpt2, shared_model
from support.scripts import script

from ovqk import library
from ovqk.activations import one_block
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import diagonals
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.published import quantities, table
from ovqk.published.__main__ import chosen_statements, main
from ovqk.published.quantities import QUANTITIES, Opened, compute
from ovqk.published.statements import FILE, half_a_unit, read_statements, statements
from ovqk.published.table import Places, agrees, rows
from ovqk.tasks.cycle import Cycle
from ovqk.tasks.lookup import WordLookup
from ovqk.weights import known

STATEMENTS = {each.name: each for each in statements()}
DIFFERENT = {"mod-59-l8k1hzciux/gradient symmetricity"}
"""Rows known to differ from their source, each with its reason."""
SPREAD = 41
"""The standard deviation of one triple's cosine in model B, in percent."""


# --- the statements --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "tolerance"), [("0.15", 0.005), ("-0.58", 0.005), ("84.70", 0.005), ("1", 0.5), ("95.6", 0.05)]
)
def test_the_tolerance_is_half_a_unit_of_the_last_digit_printed(value, tolerance) -> None:
    assert half_a_unit(value) == pytest.approx(tolerance)


def test_no_statement_holds_a_tolerance_of_its_own() -> None:
    assert not any("tolerance" in entry for entry in yaml.safe_load(FILE.read_text())["statements"])
    for each in STATEMENTS.values():
        assert (each.tolerance is None) == (each.relation != "equals") and each.spread is None


def test_every_statement_says_how_it_is_computed_or_why_not() -> None:
    used = {each.function for each in STATEMENTS.values()} - {None}
    assert used == set(QUANTITIES)
    for each in STATEMENTS.values():
        assert each.definition and each.source and each.needs
        assert each.function is not None or each.reason
        assert bool(each.place) == (each.kind == "published")


def test_the_models_of_statements_have_a_place() -> None:
    for subject in {each.subject.name: each.subject for each in STATEMENTS.values()}.values():
        assert subject.local and (subject.choice or subject.origin)
        known = (ROOT / "conf" / "model" / f"{subject.choice}.yaml").is_file()
        assert subject.choice is None or known or str(subject.choice).count("/") == 1


def test_a_mistaken_statement_is_refused() -> None:
    data = yaml.safe_load(FILE.read_text())
    (entry,) = [each for each in data["statements"] if each.get("function") == "neuron_frequencies"]

    def refused(**changes: object) -> str:
        with pytest.raises(UserError) as error:
            read_statements(data | {"statements": [entry | changes]})
        return str(error.value)

    assert "model=gpt9: allowed: gpt2," in refused(model="gpt9")
    assert "source=me: allowed: saponati" in refused(source="me")
    assert "relation=about: allowed: equals, above, below, set" in refused(relation="about")
    assert "neither `function` nor `reason`" in refused(function=None)
    assert "allowed: the fields of Statement" in refused(tolerance=3)
    assert "numbers as values" in refused(value="many")
    with pytest.raises(UserError, match="two are named mod-113-paper/key frequencies"):
        read_statements(data | {"statements": [entry, entry]})


@pytest.mark.parametrize(
    ("relation", "value", "found", "agreed"),
    [
        ("equals", "0.15", 0.1549, True), ("equals", "0.15", 0.1551, False), ("equals", "-0.58", -0.575, True),
        ("above", "0.95", 0.951, True), ("above", "0.95", 0.95, False), ("below", "0.20", 0.2, False),
        ("below", "0.20", 0.1, True), ("set", "14 35", frozenset({35, 14}), True),
        ("set", "14 35", frozenset({14}), False),
    ],
)  # fmt: skip
def test_a_value_agrees_as_the_relation_says(relation, value, found, agreed) -> None:
    statement = replace(STATEMENTS["gpt2/symmetry"], relation=relation, value=value)
    assert agrees(statement, found) is agreed


@pytest.fixture
def no_sizes_known(monkeypatch) -> None:
    """Let small random models stand in for others of other sizes, which are refused otherwise (tests/test_known.py)."""
    monkeypatch.setattr(known, "known_models", dict)


# --- no row without computing ----------------------------------------------------------------------------------


def random_weights(folder: Path) -> None:
    """Random models under the names that local weights have, small ones."""
    generator = torch.Generator().manual_seed(1)
    for subject in {each.subject.name: each.subject for each in STATEMENTS.values()}.values():
        for name in subject.local:
            if not name.endswith(".safetensors"):
                continue
            layers, p = (2 if "2l" in name else 1), (59 if "modular" in name else 113)
            shapes = {"embed.W_E": (p + 1, 16), "unembed.W_U": (16, p + 1), "pos_embed.W_pos": (3, 16)}
            heads = 12 if layers == 2 else 2
            for layer in range(layers):
                block = f"blocks.{layer}"
                shapes |= {f"{block}.attn.W_{part}": (heads, 16, 4) for part in "QKV"}
                shapes |= {f"{block}.attn.W_O": (heads, 4, 16)}
                if layers == 1:
                    shapes |= {f"{block}.mlp.W_in": (16, 20), f"{block}.mlp.b_in": (20,)}
                    shapes |= {f"{block}.mlp.W_out": (20, 16), f"{block}.mlp.b_out": (16,)}
            (folder / name).parent.mkdir(exist_ok=True)
            save_file({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, folder / name)
    make_gpt2(folder / "gpt2", n_layer=12, n_head=12, n_embd=48)


@pytest.mark.usefixtures("no_sizes_known")
def test_random_weights_in_place_of_the_models_reproduce_nothing(tmp_path, monkeypatch) -> None:
    random_weights(tmp_path)
    every = quantities.one_block.every_triple
    monkeypatch.setattr(one_block, "every_triple", lambda p: every(p)[::997])
    computed = list[str]()

    def counted(name: str, *arguments):
        computed.append(name)
        return compute(name, *arguments)

    monkeypatch.setattr(table, "compute", counted)
    of_words = [each for each in STATEMENTS.values() if each.options.get("task") is None]
    found = rows(of_words, Places(tmp_path, hub=False))
    assert [row.statement.name for row in found if row.result == "reproduced"] == []
    values = [row for row in found if row.value is not None]
    assert len(values) >= 30 and {row.result for row in values} == {"differs"}
    assert {row.statement.function for row in values} == {each.function for each in of_words if each.function}
    assert len(computed) >= len(values)
    assert all(row.reason for row in found if row.value is None)


def test_a_row_has_the_value_that_its_function_returns(monkeypatch) -> None:
    monkeypatch.setattr(Places, "find", lambda self, statement: (Opened(BUNDLED), "there"))
    statement = replace(STATEMENTS["gpt2/symmetry"], value="0.25", needs=("attention",))
    for value, result in ((0.2501, "reproduced"), (0.26, "differs"), (math.nan, "not runnable here")):
        monkeypatch.setitem(QUANTITIES, "layer_median", lambda opened, value=value, **options: value)
        found = table.row(statement, Places(None, hub=False))
        assert found.result == result and (result != "differs" or found.value == value)


def published_value(statement) -> float | frozenset[int]:
    """A value that agrees with the published one."""
    if statement.relation == "set":
        return frozenset(map(int, statement.numbers))
    return statement.numbers[0] + {"above": 0.01, "below": -0.01, "equals": 0.0}[statement.relation]


@pytest.fixture(scope="module")
def bundled() -> Opened:
    """One for all statements: what it composes takes a third of a second."""
    return Opened(BUNDLED)


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_row_is_reproduced_but_by_what_its_function_returns(name, bundled, monkeypatch) -> None:
    statement, called = STATEMENTS[name], []
    monkeypatch.setattr(Places, "find", lambda self, statement: (bundled, "there"))
    monkeypatch.setattr(table, "lacking", lambda *_: None)
    monkeypatch.setattr(quantities, "_check_heads", lambda *_: None)
    right = published_value(statement)
    wrong = frozenset({1}) if isinstance(right, frozenset) else right + (2 if statement.relation == "below" else -2)
    for value, result in ((right, "reproduced"), (wrong, "differs"), (math.nan, "not runnable here")):

        def found(opened, value=value, **options):
            called.append(options)
            return value

        for function in QUANTITIES:
            monkeypatch.setitem(QUANTITIES, function, found)
        made = table.row(statement, Places(None, hub=False))
        assert made.result == (result if statement.function else "not runnable here")
    assert called == [dict(statement.options)] * 3 * (statement.function is not None)


def test_another_model_in_a_statements_place_is_told(bundled, monkeypatch) -> None:
    """mini-attn where GPT-2 should be: four layers of eight heads."""
    monkeypatch.setattr(Places, "find", lambda self, statement: (bundled, "there"))
    for name, statement in STATEMENTS.items():
        if statement.function == "composition_rank":
            found = table.row(statement, Places(None, hub=True))
            assert found.result == "not runnable here" and "it is another model than the statement's" in found.reason, (
                name
            )


def test_weights_that_are_not_here_or_lack_a_part_are_said_to(tmp_path) -> None:
    found = table.row(STATEMENTS["gpt2/symmetry"], Places(None, hub=False))
    assert found.result == "not runnable here" and "--weights" in found.reason and "--hub" in found.reason
    found = table.row(STATEMENTS["mod-113-paper/key frequencies"], Places(tmp_path, hub=True))
    assert found.reason.startswith("no nanda-mod113-paper/model.safetensors below --weights")
    (tmp_path / "attn-only-2l.safetensors").touch()
    found = table.row(STATEMENTS["attn-only-2l/1.4 own token first"], Places(tmp_path, hub=False))
    assert found.result == "not runnable here" and "attn-only-2l.safetensors" in found.reason
    with pytest.raises(UserError, match="no such folder"):
        Places(tmp_path / "nowhere", hub=False)


@pytest.mark.usefixtures("no_sizes_known")
def test_a_local_model_that_lacks_a_part_gives_way_to_the_hubs_where_the_part_is_needed(tmp_path) -> None:
    make_gpt2(tmp_path / "gpt2-small-attention")
    file = tmp_path / "gpt2-small-attention" / "model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if "wte" not in name and "mlp" not in name}, file)
    whole, part = STATEMENTS["gpt2/copy score of name movers"], STATEMENTS["gpt2/symmetry"]
    places = Places(tmp_path, hub=True)
    for _ in range(2):
        assert [places.find(each)[1] for each in (part, whole)] == ["gpt2-small-attention", "hub"]
    assert places.find(whole)[0].place == "gpt2" and places.find(whole)[0] is places.find(whole)[0]
    found = table.row(whole, Places(tmp_path, hub=False))
    assert found.reason == "gpt2-small-attention holds no unembedding and no first MLP"


# --- the command -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_sizes_known")
def test_the_command_prints_and_writes_the_table(tmp_path, capsys, monkeypatch) -> None:
    random_weights(tmp_path)
    monkeypatch.setattr(one_block, "every_triple", lambda p: [(0, 1, 2), (3, 4, 5)])
    for out in (tmp_path / "p.csv", tmp_path / "p.parquet"):
        main(["mod-59-l8k1hzciux", "gpt2-medium/symmetry", "--weights", str(tmp_path), "--out", str(out)])
        printed = capsys.readouterr().out
        assert "mod-59-l8k1hzciux/distance irrelevance: 0.85, here 0." in printed
        assert "8 statements: 0 reproduced, 7 differs, 1 not runnable here" in printed and str(out) in printed
        written = pd.read_csv(out) if out.suffix == ".csv" else pd.read_parquet(out)
        assert len(written) == 8 and set(written["result"]) == {"differs", "not runnable here"}
        assert {"model", "definition", "published", "tolerance", "source", "place", "needs", "value"} <= set(written)


@pytest.mark.usefixtures("no_sizes_known")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_end_before_the_last_row_leaves_the_rows_that_were_made(error, tmp_path, capsys, monkeypatch) -> None:
    random_weights(tmp_path)

    def ends(opened: Opened, **options: object) -> float:
        raise error

    monkeypatch.setitem(QUANTITIES, "addition_accuracy", ends)
    names = ["distance irrelevance", "share of frequency 13", "accuracy"]
    asked = [f"mod-59-l8k1hzciux/{name}" for name in names]
    with pytest.raises((SystemExit, MemoryError)):
        main([*asked, "--weights", str(tmp_path), "--out", str(tmp_path / "p.csv")])
    assert pd.read_csv(tmp_path / "p.csv")["statement"].tolist() == names[:2]
    assert "not finished: 2 of 3 statements are in the table: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt3"], "published gpt3: no such statement or model; allowed: gpt2, "),
        (["gpt2/symetry"], "no such statement or model; allowed: gpt2/symmetry, "),
        (["--out", "table.xlsx"], "allowed: a name that ends in .csv or .parquet"),
        (["--out", "nowhere/p.csv"], "no such folder: nowhere"),
        (["--weights", "nowhere"], "--weights nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_message(arguments, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err and not list(tmp_path.iterdir())


def test_names_choose_rows() -> None:
    assert [each.name for each in chosen_statements(["gpt2/symmetry"])] == ["gpt2/symmetry"]
    assert {each.subject.name for each in chosen_statements(["gpt2", "phi-1"])} == {"gpt2", "phi-1"}
    assert chosen_statements([]) == list(statements())


# --- one-layer models ------------------------------------------------------------------------------------------


def block(p: int, seed: int, path: Path, **changes: torch.Tensor) -> one_block.OneBlock:
    """A random model of two tokens, with biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.W_E": (p + 1, 6), "unembed.W_U": (6, p + 1), "pos_embed.W_pos": (3, 6), "unembed.b_U": (p + 1,)}
    shapes |= {f"blocks.0.attn.W_{part}": (2, 6, 3) for part in "QKV"} | {"blocks.0.attn.W_O": (2, 3, 6)}
    shapes |= {f"blocks.0.attn.b_{part}": (2, 3) for part in "QKV"} | {"blocks.0.attn.b_O": (6,)}
    shapes |= {"blocks.0.mlp.W_in": (6, 9), "blocks.0.mlp.b_in": (9,)}
    shapes |= {"blocks.0.mlp.W_out": (9, 6), "blocks.0.mlp.b_out": (6,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | changes
    save_file(tensors, path)
    checkpoint = open_checkpoint(ModelConfig(name="m", source=Source.local, path=str(path)))
    return one_block.OneBlock(checkpoint, attn_coeff=float(changes.get("rate", torch.tensor(1.0))))


def residues(p: int, query: int | None = None, operator: str = "+", between: int | None = None) -> Cycle:
    return Cycle(torch.arange(p), query, operator, between)


def by_hand(tensors: dict[str, np.ndarray], rows: np.ndarray, rate: float) -> np.ndarray:
    """Logits at the last position, head by head, in numpy."""
    x = rows + tensors["pos_embed.W_pos"][: len(rows)]
    part = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    out = part["b_O"].copy()
    for head in range(2):
        q, k, v = (x @ part[f"W_{n}"][head] + part[f"b_{n}"][head] for n in "QKV")
        scores = q[-1] @ k.T / 3**0.5
        pattern = np.exp(scores) / np.exp(scores).sum() * rate + 1 - rate
        out = out + pattern @ v @ part["W_O"][head]
    stream = x[-1] + out
    stream = stream + np.maximum(stream @ part["W_in"] + part["b_in"], 0) @ part["W_out"] + part["b_out"]
    return stream @ part["W_U"] + part["b_U"]


@pytest.mark.parametrize(("query", "between"), [(None, None), (5, None), (None, 5)])
@pytest.mark.parametrize("rate", [1.0, 0.3, 0.0])
def test_a_block_runs_as_by_hand(tmp_path, query, between, rate) -> None:
    from safetensors.numpy import load_file

    model = block(5, 3, tmp_path / "m.safetensors", rate=torch.tensor(rate))
    tensors = {name: value.astype(np.float64) for name, value in load_file(tmp_path / "m.safetensors").items()}
    found = one_block.logits_of_pairs(model, residues(5, query, between=between)).numpy()
    for a in range(5):
        for b in range(5):
            tokens = [each for each in (a, between, b, query) if each is not None]
            expected = by_hand(tensors, tensors["embed.W_E"][tokens], rate)[:5]
            assert np.allclose(found[a, b], expected)


def test_a_quantity_runs_the_model_with_its_share_of_softmax_attention(tmp_path) -> None:
    """The choice `model.attn_coeff` reaches the run: 1 of the ordinary model, 0 of one that attends to all alike."""
    path = tmp_path / "m.safetensors"
    found = {}
    for share in (0.0, 0.4, 1.0):
        whole = block(5, 6, path, rate=torch.tensor(share))
        opened = Opened(path, ("model.causal=false", f"model.attn_coeff={share}"))
        found[share] = compute("gradient_symmetricity", opened, {"modulus": 5})
        expected = one_block.symmetricities(whole, one_block.every_triple(5), residues(5)).mean()
        assert found[share] == pytest.approx(100 * float(expected))
        expected_irrelevance = one_block.distance_irrelevance(
            one_block.logits_of_pairs(whole, residues(5)), residues(5)
        )
        assert compute("distance_irrelevance", opened, {"modulus": 5}) == pytest.approx(expected_irrelevance)
    assert len({round(value, 3) for value in found.values()}) == 3


def test_gradients_are_those_of_small_steps(tmp_path) -> None:
    model = block(5, 4, tmp_path / "m.safetensors")
    triples = one_block.drawn_triples(5, 6, seed=2)
    cosines = []
    for a, b, c in triples:
        rows = model.W_E[[a, b]]
        steps = 1e-6 * torch.eye(12, dtype=torch.float64).view(12, 2, 6)
        gradient = (model.logits(rows + steps)[:, c] - model.logits(rows - steps)[:, c]).view(2, 6)
        cosines.append(float(torch.cosine_similarity(gradient[0], gradient[1], dim=0)))
    assert one_block.symmetricities(model, triples, residues(5)).tolist() == pytest.approx(cosines, abs=1e-4)


def test_a_model_of_the_mere_sum_of_embeddings_has_symmetric_gradients(tmp_path) -> None:
    """Constant attention, no positions, and a last token of its own: a and b enter as their sum alone."""
    zero = {"pos_embed.W_pos": torch.zeros(3, 6), "rate": torch.tensor(0.0)}
    model = block(5, 5, tmp_path / "m.safetensors", **zero)
    found = one_block.symmetricities(model, one_block.every_triple(5), residues(5, 5))
    assert found.tolist() == pytest.approx([1] * 125)


def test_distance_irrelevance_of_answers_planted() -> None:
    p = 7
    a = torch.arange(p)
    right = (a[:, None] + a) % p
    of_sum, of_difference, logits = torch.randn(p), torch.randn(p), torch.zeros(p, p, p, dtype=torch.float64)
    on_sum = logits.scatter(-1, right[..., None], of_sum[right].double()[..., None])
    cycle, minus = residues(p), residues(p, operator="-")
    assert one_block.distance_irrelevance(on_sum, cycle) == pytest.approx(1)
    on_difference = logits.scatter(-1, right[..., None], of_difference[(a[:, None] - a) % p].double()[..., None])
    assert one_block.distance_irrelevance(on_difference, cycle) == pytest.approx(0, abs=1e-9)
    assert math.isnan(one_block.distance_irrelevance(logits, cycle))
    one_hot = torch.nn.functional.one_hot(right, p).double()
    assert one_block.accuracy(one_hot, cycle) == 1
    assert one_block.accuracy(one_hot, minus) == pytest.approx(1 / p)  # a + b = a - b where b is 0
    answer = (a[:, None] - a) % p  # of a subtraction: the same logits, at other answers
    swapped = logits.scatter(-1, answer[..., None], of_sum[answer].double()[..., None])
    assert one_block.distance_irrelevance(swapped, minus) == pytest.approx(1)
    assert one_block.accuracy(torch.nn.functional.one_hot(answer, p).double(), minus) == 1


@given(seed=st.integers(0, 200), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_distance_irrelevance_sees_neither_scale_nor_shift(seed, scale, shift) -> None:
    logits = torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for operator in "+-":
        cycle = residues(5, operator=operator)
        found = one_block.distance_irrelevance(logits, cycle)
        assert 0 <= found <= 1
        assert one_block.distance_irrelevance(scale * logits + shift, cycle) == pytest.approx(found)


def test_key_frequencies_are_those_that_neurons_write(tmp_path) -> None:
    """Neurons write frequencies 1 and 3 of 11 residues; the embedding holds all of them."""
    angles = 2 * math.pi * torch.arange(11) / 11
    waves = torch.stack([wave(k * angles) for k in (1, 3) for wave in (torch.cos, torch.sin)])
    W_U = torch.cat([torch.cat([waves, torch.zeros(2, 11)]), torch.ones(6, 1)], 1)
    block(11, 6, tmp_path / "m.safetensors", **{"unembed.W_U": W_U})
    opened = Opened(tmp_path / "m.safetensors")
    assert compute("neuron_frequencies", opened, {"modulus": 11}) == {1, 3}
    with pytest.raises(UserError, match="modulus=13: the model has no logits of that many residues"):
        compute("neuron_frequencies", opened, {"modulus": 13})
    with pytest.raises(UserError, match="only a model of one block"):
        compute("neuron_frequencies", Opened("mini-gpt2"), {"modulus": 11})


def test_other_models_are_not_run_as_one_block(tmp_path) -> None:
    config = ModelConfig(name="m", source=Source.local, path=str(tmp_path / "m.safetensors"))
    norm = {"blocks.0.ln1.w": torch.ones(6), "blocks.0.ln1.b": torch.ones(6)}
    with pytest.raises(UserError, match="one layer without norms"):
        block(5, 0, tmp_path / "m.safetensors", **norm)
    save_file({"blocks.0.attn.W_Q": torch.zeros(1, 2, 2), "embed.W_E": torch.zeros(3, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"pos_embed\.W_pos"):
        one_block.OneBlock(open_checkpoint(config))
    with pytest.raises(UserError, match=r"modulus=9: the model has 6 tokens"):
        one_block.logits_of_pairs(block(5, 0, tmp_path / "m.safetensors"), residues(9))


@pytest.mark.parametrize("name", ["blocks.0.ln2.w", "ln_final.w", "blocks.0.mlp.W_gate"])
def test_a_norm_or_gate_that_would_be_left_out_is_refused(tmp_path, name) -> None:
    with pytest.raises(UserError, match="one layer without norms whose MLP has no gate"):
        block(5, 1, tmp_path / "m.safetensors", **{name: torch.ones(6, 9) if "gate" in name else torch.ones(6)})


def test_a_checkpoint_with_other_names_is_not_said_to_lack_weights(tmp_path) -> None:
    make_gpt2(tmp_path / "m", n_layer=1)
    with pytest.raises(UserError, match="must be a file of TransformerLens names, one layer"):
        one_block.OneBlock(open_checkpoint(ModelConfig(name="m", source=Source.local, path=str(tmp_path / "m"))))


# --- the diagonal ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 300), n=st.integers(3, 40))
def test_ranks_of_the_diagonal_are_those_of_the_whole_matrix(seed, n) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    own = torch.randperm(n, generator=generator)[: n // 2 + 1]
    found = diagonals.own_ranks(left, right[:, own], own)
    for head in range(2):
        matrix = left[head] @ right[head].T
        for place, t in enumerate(own.tolist()):
            order = matrix[:, t].argsort(descending=True).tolist()
            assert found.from_largest[head, place] == 1 + order.index(t)
            assert found.from_smallest[head, place] == n - order.index(t)
    shares = [float(diagonals.share_up_to(found.from_largest, count)[0]) for count in range(n + 1)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1


def test_a_copying_head_is_first_a_suppressing_one_last_and_a_head_of_zeros_neither() -> None:
    eye = torch.eye(30, dtype=torch.float64)
    left = torch.stack([eye, -eye, 0 * eye])
    found = diagonals.own_ranks(left, eye.expand(3, -1, -1), torch.arange(30))
    assert diagonals.share_up_to(found.from_largest, 10).tolist() == [1, 0, 0]
    assert diagonals.share_up_to(found.from_smallest, 10).tolist() == [0, 1, 0]


@pytest.mark.parametrize("rows_read", ["token", "block0", "mlp0"])
def test_the_diagonal_of_a_model_is_that_of_its_matrices(rows_read, tmp_path) -> None:
    """A row is what attending to its token does to all logits (OV), or the scores of all keys for its query (QK)."""
    make_gpt2(tmp_path / "m")
    opened = Opened(tmp_path / "m")
    model = opened.model
    W_E = model.vocabulary.W_E[:]
    kinds = {"token": W_E, "block0": model.block0.rows(W_E), "mlp0": model.block0.mlp_output(W_E)}
    kinds = {name: each.double() for name, each in kinds.items()}
    W_U = model.vocabulary.W_U_rows[:].double()
    W_U, E, head = W_U - W_U.mean(0), kinds[rows_read], opened.library.head(1, 2)
    matrices = {
        ("ov", "unembedding"): E @ head.ov.matrix() @ W_U.T,
        ("qk", "unembedding"): W_U @ head.qk.matrix() @ E.T,
        ("qk", "token"): kinds["token"] @ head.qk.matrix() @ E.T,
        ("qk", "block0"): kinds["block0"] @ head.qk.matrix() @ E.T,
    }
    for (circuit, queries), matrix in matrices.items():
        own, options = matrix.diagonal()[:, None], {"circuit": circuit, "rows": rows_read, "queries": queries}
        before, below = (matrix > own).sum(1), (matrix < own).sum(1)
        for count in (1, 10):
            share = 100 * float((before < count).double().mean())
            assert quantities.diagonal(opened, "1.2", **options, highest=count) == pytest.approx(share)
            share = 100 * float((below < count).double().mean())
            assert quantities.diagonal(opened, "1.2", **options, lowest=count) == pytest.approx(share)
        share = 100 * float((below <= 0.25 * len(E)).double().mean())  # at most a quarter of all tokens come before
        assert quantities.diagonal(opened, "1.2", **options, lowest=0.25) == pytest.approx(share)
        assert quantities.diagonal(opened, "1.2", **options) == 1 + float(before.median())
    both = E @ (head.ov.matrix() + opened.library.head(0, 1).ov.matrix()) @ W_U.T
    first = 100 * float((both.argmax(1) == torch.arange(len(E))).double().mean())
    asked = {"circuit": "ov", "rows": rows_read, "highest": 1}
    assert quantities.diagonal(opened, "1.2 0.1", **asked) == pytest.approx(first)


def test_a_head_that_copies_from_every_token_but_into_few_is_told_by_rows() -> None:
    """Rows, not columns: attending to t raises t most, though t's logit is raised more by one loud token."""
    left = torch.eye(6, dtype=torch.float64)
    right = torch.eye(6, dtype=torch.float64)
    left[0] = 10 * left[0] + 5  # a loud token: it raises every logit more than the others' own tokens do
    own = torch.arange(6)
    by_row = diagonals.own_ranks(right[None], left[None], own)
    by_column = diagonals.own_ranks(left[None], right[None], own)
    assert float(diagonals.share_up_to(by_row.from_largest, 1)) == 1
    assert float(diagonals.share_up_to(by_column.from_largest, 1)) == pytest.approx(1 / 6)


# --- quantities of cells ---------------------------------------------------------------------------------------


def test_ranks_by_composition_are_those_of_the_table() -> None:
    from ovqk.circuits.composition import composition_table

    opened = Opened("mini-attn")
    table_ = composition_table(opened.circuits, strongest=100)
    rows_ = table_[(table_["mode"] == "k") & (table_["receiver_layer"] == 3) & (table_["receiver_head"] == 1)]
    assert len(rows_) == 24
    for place, row in enumerate(rows_.head(5).itertuples(), 1):
        sender = f"{row.sender_layer}.{row.sender_head}"
        assert compute("composition_rank", opened, {"mode": "k", "sender": sender, "receiver": "3.1"}) == place


def test_copying_is_that_of_the_library() -> None:
    heads = ["0.0", "3.0"]
    values = [library.open("mini-attn").head(layer, 0).ov.copying for layer in (0, 3)]
    assert compute("least_copying", Opened("mini-attn"), {"heads": heads}) == min(values)


def test_a_metric_of_a_cell_is_that_of_its_table() -> None:
    opened = Opened("mini-attn")
    options = {"task": "ioi", "metric": "ov_task_copy", "heads": ["3.0", "3.4"], "reduce": "min"}
    found = compute("cell_heads", opened, options)
    heads = opened.cell("ioi", "ov")[1]["heads"].set_index(["layer", "head"])
    assert len(heads) == 32 and found == heads.loc[[(3, 0), (3, 4)], "ov_task_copy"].min()
    with pytest.raises(UserError, match="ov_task_transfer: "):
        compute("cell_heads", opened, options | {"metric": "ov_task_transfer"})
    for name in ("3.0", "0.2"):
        rank = compute("cell_rank", opened, {"task": "ioi", "metric": "ov_task_margin", "head": name})
        layer, _, head = name.partition(".")
        assert rank == 1 + (heads["ov_task_margin"] > heads.loc[(int(layer), int(head)), "ov_task_margin"]).sum()
    with pytest.raises(UserError, match="ov_task_transfer: "):
        compute("cell_rank", opened, {"task": "ioi", "metric": "ov_task_transfer", "head": "0.0"})


def test_a_heads_rank_and_lead_by_relation_score_are_those_of_matrices_by_hand() -> None:
    """The form of the rows of GPT-2 XL and Pythia: block 0's MLP output, OV as [d, d], the whole vocabulary."""
    opened = Opened("mini-gpt2")
    model = opened.model
    assert model.vocabulary is not None and not isinstance(model.block0, str)
    lookup = WordLookup(model.tokenizer, model.vocabulary.size)
    words = compose("model=mini-gpt2", "task=name_copying").task.words["names"]
    ids = torch.tensor(sorted({token for word in words if (token := lookup.token(word)) is not None}))
    W_E, W_U = model.vocabulary.W_E[:], model.vocabulary.W_U_rows[:].double()
    scores = {}
    for layer in range(model.architecture.n_layers):
        rows_ = model.architecture.normalised(W_E if layer == 0 else model.block0.mlp_output(W_E))[ids].double()
        for head in range(model.architecture.n_heads):
            logits = rows_ @ opened.library.head(layer, head).ov.matrix() @ W_U.T
            scores[layer, head] = float((logits.argmax(-1) == ids).double().mean())
    options = {"task": "name_copying", "metric": "ov_relation_score"}
    first = max(scores, key=lambda head: scores[head])
    rest = max(score for head, score in scores.items() if head != first)
    assert scores[first] > rest > 0
    assert compute("cell_heads", opened, options | {"reduce": "max"}) == pytest.approx(scores[first])
    name = "{}.{}".format(*first)
    assert compute("cell_rank", opened, options | {"head": name}) == 1
    empty = {"task": "name_copying", "metric": "ov_copying_block0", "head": "0.0"}  # layer 0 reads no block before it
    assert math.isnan(compute("cell_rank", opened, empty))
    assert compute("cell_lead", opened, options | {"head": name}) == pytest.approx(scores[first] / rest)
    middle = sorted(scores, key=lambda head: scores[head])[len(scores) // 2]
    rank = sum(score >= scores[middle] - 1e-9 for score in scores.values())
    assert compute("cell_rank", opened, options | {"head": "{}.{}".format(*middle)}) == rank


@pytest.mark.slow
def test_what_heads_do_on_prompts_is_that_of_the_cells_tables() -> None:
    opened = Opened("mini-attn")
    record, tables = opened.cell("ioi", "activations")
    rows_ = tables["activations"]
    of_role = rows_[(rows_["role"] == "name_mover") & (rows_["layer"] == 3) & (rows_["head"] == 0)]
    options = {"task": "ioi", "role": "name_mover", "heads": ["3.0"], "column": "attention", "reduce": "mean"}
    assert compute("attention_on_prompts", opened, options) == pytest.approx(of_role["attention"].mean())
    assert set(of_role["half"]) == {"choosing", "testing"}
    assert compute("on_prompts", opened, {"task": "ioi", "key": "accuracy", "scale": 100}) == 100
    halves = [half["logit_difference"] for half in record["activations"]["halves"].values()]
    assert min(halves) <= compute("on_prompts", opened, {"task": "ioi", "key": "logit_difference"}) <= max(halves)


# --- weights beside the checkout -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside() -> Places:
    """The weights beside the checkout; one model stays open from row to row."""
    if not SHARED.is_dir():
        pytest.skip("no real weights are beside this checkout")
    return Places(SHARED, hub=False)


@pytest.mark.parametrize(
    "name", [each.name for each in statements() if any((SHARED / place).exists() for place in each.subject.local)]
    or ["none"],
)  # fmt: skip
def test_local_rows_come_out(name, beside, monkeypatch) -> None:
    if name == "none":
        shared_model("gpt2-small-attention")
    if STATEMENTS[name].function == "gradient_symmetricity":  # of one triple in 50, for time; all are in the slow test
        every, kept = one_block.every_triple, 50
        monkeypatch.setattr(one_block, "every_triple", lambda p: every(p)[::kept])
        found = table.row(STATEMENTS[name], beside)
        (line,) = (
            line for line in (ROOT / "docs" / "published.md").read_text().splitlines() if f"`{name}` | grad" in line
        )
        whole = float(line.split("|")[4])
        assert found.value == pytest.approx(whole, abs=4 * SPREAD * (kept / 59**3) ** 0.5)
        assert found.result == "differs" and found.value != pytest.approx(whole, abs=1e-9)
        return
    found = table.row(STATEMENTS[name], beside)
    whole = "gpt2-small-attention" if name.startswith("gpt2/") else ""
    if found.value is None:
        assert whole and found.reason.startswith(whole) and {"unembedding", "block0"} & set(STATEMENTS[name].needs)
    else:
        assert found.result == ("differs" if name in DIFFERENT else "reproduced")


@pytest.mark.slow
def test_the_page_is_made_of_the_rows() -> None:
    shared_model("gpt2-small-attention")
    shared_model("modular-addition")
    found = rows(statements(), Places(SHARED, hub=False))
    assert (ROOT / "docs" / "published.md").read_text(encoding="utf-8") == script("published").page(found)
    assert {row.statement.name for row in found if row.result == "differs"} == DIFFERENT


def test_the_page_names_every_statement_with_its_value() -> None:
    published = script("published").published
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    for each in STATEMENTS.values():
        assert any(f"| `{each.name}` |" in line and published(each) in line for line in text.splitlines()), each.name
