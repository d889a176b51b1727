"""The tables of composition: which pairs are in them, virtual heads, metrics by role, and the components of a pair."""

import dataclasses
import math
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from support.commands import compose
from support.composed import Materialised, noise, of_factors, random_layers, source_of
from support.oracle import centre_tokens, folded_embeddings, ratio
from support.scripts import script

from ovqk.cell import run_cell
from ovqk.circuits import composition
from ovqk.circuits.composition import (
    COLUMNS,
    MODES,
    LayerCircuits,
    component_composition,
    component_scores,
    composition_table,
    k_composed_matching,
    k_composition,
    matching,
    percentiles,
    q_composition,
    received,
    scores,
    virtual_factors,
    virtual_heads_table,
)
from ovqk.circuits.factors import Factors
from ovqk.circuits.grams import FullCircuit, centred_gram
from ovqk.config.schema import Circuit
from ovqk.published import quantities
from ovqk.published.statements import half_a_unit
from ovqk.records.results import load_table

# --- roles -----------------------------------------------------------------------------------------------------


def test_role_metrics_are_the_best_of_their_pairs() -> None:
    layers = random_layers(4, heads=5, d=16, k=3)
    E = noise(30, 16, seed=1)
    gram = centred_gram(E, E)
    given = [(0, 2), (2, 1), (3, 4), (3, 0)]
    into_keys, into_queries = k_composition(layers, given), q_composition(layers, given)
    matched = k_composed_matching(layers, given, gram)
    assert into_keys.shape == into_queries.shape == matched.shape == (4, 5)
    for layer, head in product(range(4), range(5)):
        later = [r for r in given if r[0] > layer]
        earlier = [s for s in given if s[0] < layer]
        share = [float(percentiles(received(layers, r[0], "k"))[layer, head, r[1]]) for r in later]
        score = [float(scores(layers[layer], layers[r[0]], "q")[head, r[1]]) for r in later]
        match = [float(matching(layers, [(s, (layer, head))], gram)) for s in earlier]
        for found, wanted in ((into_keys, share), (into_queries, score), (matched, match)):
            assert found[layer, head] == pytest.approx(max(wanted, default=math.nan), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_heads_best_component_is_that_of_its_matrices(mode) -> None:
    """Component by component, everything materialised."""
    layers = random_layers(3, heads=4, d=16, k=3)
    given = [(1, 2), (2, 0), (2, 3)]
    found = component_composition(layers, given, mode)
    for layer, head in product(range(3), range(4)):
        best = math.nan
        for at, to in given:
            if at <= layer:
                continue
            part = layers[at].ov if mode == "v" else layers[at].qk
            M = part.read[to].double() @ torch.diag(part.sigma[to].double()) @ part.write[to].double().T
            M = M.T if mode == "k" else M
            own = layers[layer].ov.write[head].T  # [component, d]
            best = np.fmax(best, float(((own.double() @ M.double()).norm(dim=1) / M.double().norm()).max()))
        assert found[layer, head] == pytest.approx(best, abs=1e-5, nan_ok=True)


def test_a_planted_weak_component_is_found_where_the_whole_head_is_not() -> None:
    """The sender's last component, of a hundredth of the first one's sigma, writes what the receiver's queries read."""
    layers = random_layers(2, heads=6, d=64, k=4)
    ov, receiver = layers[0].ov, layers[1].qk
    ov.write[0, :, 3], ov.sigma[0] = receiver.read[2, :, 0], torch.tensor([1.0, 0.5, 0.2, 0.01]).to(ov.sigma)
    layers[0] = LayerCircuits.of(ov, layers[0].qk)
    found, whole = component_composition(layers, [(1, 2)], "q"), q_composition(layers, [(1, 2)])
    assert int(np.nanargmax(found[0])) == 0 and found[0, 0] > 2 * np.delete(found[0], 0).max()
    assert whole[0, 0] < 1.5 * np.delete(whole[0], 0).max()


def test_role_metrics_without_heads_are_undefined_everywhere() -> None:
    layers = random_layers(2, heads=3, d=8, k=2)
    for values in (k_composition(layers, []), q_composition(layers, []), k_composed_matching(layers, [], torch.eye(8))):
        assert values.shape == (2, 3) and np.isnan(values).all()


def count_products(monkeypatch) -> list[int]:
    """Pairs of heads that are scored from now on."""
    sizes: list[int] = []
    original = composition.side_scores

    def counted(write, read):
        sizes.append(len(write) * len(read))
        return original(write, read)

    monkeypatch.setattr(composition, "side_scores", counted)
    return sizes


def test_role_metrics_and_asked_pairs_compute_no_other_receivers(monkeypatch) -> None:
    layers = random_layers(4, heads=5, d=16, k=3)
    sizes = count_products(monkeypatch)
    k_composition(layers, [(2, 1), (2, 3), (1, 0)])
    assert sum(sizes) == 2 * (5 * 2) + 1 * 5
    sizes.clear()
    composition_table(layers, {((0, 4), (2, 1)), ((1, 0), (2, 1))}, strongest=0)
    assert sum(sizes) == len(MODES) * 2 * 5


# --- tables ----------------------------------------------------------------------------------------------------


def test_the_table_holds_the_strongest_senders_and_what_was_asked_for() -> None:
    heads, d, strongest = 5, 16, 3
    layers = random_layers(4, heads, d, k=3)
    E = noise(30, d, seed=1)
    gram = centred_gram(E, E)
    every = {
        (mode, s, r): float(scores(layers[s[0]], layers[r[0]], mode)[s[1], r[1]])
        for mode in MODES
        for s, r in product(product(range(4), range(heads)), repeat=2)
        if s[0] < r[0]
    }
    weakest = {min((x for x in every if x[0] == m and x[2] == (3, 2)), key=every.__getitem__)[1] for m in MODES}
    asked = {(s, (3, 2)) for s in weakest} | {((2, 0), (1, 1)), ((2, 0), (2, 1))}  # the last two do not compose
    wanted = {(mode, s, r) for mode in MODES for s, r in asked if s[0] < r[0]}
    for mode, r in product(MODES, product(range(1, 4), range(heads))):
        into = sorted((x for x in every if x[0] == mode and x[2] == r), key=every.__getitem__)
        wanted |= set(into[-strongest:])
    table = composition_table(layers, asked, gram, strongest=strongest)
    assert list(table.columns) == COLUMNS
    rows = {(m, (a, b), (c, e)): rest for m, a, b, c, e, *rest in table.itertuples(index=False)}
    assert set(rows) == wanted and len(table) == len(wanted)
    for (mode, s, r), (score, above, percentile, matched, component, of_component) in rows.items():
        found = component_scores(layers[s[0]].only([s[1]]), layers[r[0]].only([r[1]]), mode)[0]
        assert found[component] == found.max() and of_component == pytest.approx(float(found.max()))
        assert score == pytest.approx(every[mode, s, r], abs=1e-6)
        assert above == pytest.approx(every[mode, s, r] - 1 / math.sqrt(d), abs=1e-6)
        others = [every[mode, (s[0], i), r] for i in range(heads) if i != s[1]]
        assert percentile == pytest.approx(np.mean(np.array(others) < every[mode, s, r]))
        if mode == "k":
            assert matched == pytest.approx(float(matching(layers, [(s, r)], gram)), abs=1e-9)
        else:
            assert math.isnan(matched)
    assert composition_table(layers, asked, strongest=strongest)["matching"].isna().all()


def test_the_table_can_be_of_asked_pairs_alone() -> None:
    layers = random_layers(3, heads=4, d=16, k=3)
    asked = {((0, 3), (2, 1)), ((1, 2), (2, 1)), ((1, 0), (2, 3)), ((0, 0), (1, 3)), ((2, 0), (1, 0))}
    table = composition_table(layers, asked, torch.eye(16), strongest=0)
    found = table[["sender_layer", "sender_head", "receiver_layer", "receiver_head"]].to_numpy().tolist()
    assert sorted(found) == sorted([[*s, *r] for s, r in asked if s[0] < r[0] for _ in MODES])
    everything = composition_table(layers, asked, torch.eye(16))
    merged = table.merge(everything, on=COLUMNS[:5], suffixes=("", "_all"))
    assert len(merged) == len(table)
    for column in COLUMNS[5:]:
        assert np.allclose(merged[column], merged[f"{column}_all"], atol=1e-6, equal_nan=True), column


def test_a_table_without_pairs_is_empty_and_keeps_its_columns() -> None:
    for layers in (random_layers(1, 2, 8, 2), random_layers(2, 2, 8, 2)):
        table = composition_table(layers, set(), strongest=0)
        assert len(table) == 0 and list(table.columns) == COLUMNS
        assert len(virtual_heads_table(layers, table)) == 0
    assert len(composition_table(random_layers(1, 2, 8, 2))) == 0


def test_virtual_heads_match_materialised_products(tiny) -> None:
    source = source_of(tiny("llama"))
    whole, E = Materialised(source), folded_embeddings(source)
    W_E, W_U = E.W_E.double(), E.W_U.double()
    C, columns = centre_tokens(len(W_E)), W_U.T.contiguous()
    full = FullCircuit.ov(centred_gram(W_E, W_E), centred_gram(columns, W_E), centred_gram(columns, columns))
    table = virtual_heads_table(whole.layers, composition_table(whole.layers), full, n=6)
    strength = sorted((whole.score("v", s, r) for s, r in whole.pairs), reverse=True)
    assert table["score"].tolist() == pytest.approx(strength[:6], abs=1e-6)
    for a, b, c, e, score, norm, share, copying in table.itertuples(index=False):
        s, r = (a, b), (c, e)
        virtual = whole.W_OV[s] @ whole.W_OV[r]
        all_of_r = sum(float((whole.W_OV[x] @ whole.W_OV[r]).norm()) ** 2 for x, y in whole.pairs if y == r)
        assert score == pytest.approx(whole.score("v", s, r), abs=1e-6)
        assert norm == pytest.approx(float(virtual.norm()), rel=1e-5)
        assert share == pytest.approx(float(virtual.norm()) ** 2 / all_of_r, rel=1e-5)
        assert copying == pytest.approx(ratio(C @ W_E @ virtual @ W_U @ C), abs=1e-4)
        factors = virtual_factors(whole.layers, [(s, r)])
        assert torch.allclose(factors.left[0] @ factors.right[0], virtual, atol=1e-5 * float(virtual.norm()))
    everything = composition_table(whole.layers)
    assert virtual_heads_table(whole.layers, everything)["ov_copying"].isna().all()
    of_negated = dataclasses.replace(full, cross=-full.cross)  # what layer 0 would read if its embeddings were -W_E
    both = virtual_heads_table(whole.layers, everything, full, of_negated, n=6)
    sign = np.where(table["sender_layer"] == 0, -1, 1)
    assert set(sign) == {1, -1}
    assert np.allclose(both["ov_copying"], sign * table["ov_copying"])


PASS = """
import resource
import torch
from ovqk.circuits.composition import LayerCircuits, composition_table, virtual_heads_table
from ovqk.circuits.maps import Decomposition
from ovqk.circuits.grams import FullCircuit
from ovqk.circuits.maps import Decomposition

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def circuit():
    frames = (torch.randn(12, 768, 64) / 768**0.5 for _ in range(2))
    return Decomposition(next(frames), torch.rand(12, 64, dtype=torch.float64), next(frames), 64)

before = peak()
layers = [LayerCircuits.of(circuit(), circuit()) for _ in range(12)]
gram = torch.eye(768)
table = composition_table(layers, gram=gram)
heads = virtual_heads_table(layers, table, FullCircuit.ov(gram, gram, gram))
print(len(table), len(heads), round(peak() - before))
"""


@pytest.mark.slow
def test_all_pairs_of_gpt2_small_take_a_tenth_of_the_memory_of_transformer_lens() -> None:
    """Its `all_composition_scores` takes 8.8 GB for the modes of this shape; here all of it, circuits included."""
    done = subprocess.run([sys.executable, "-c", PASS], capture_output=True, text=True, check=True, timeout=300)
    pairs, heads, megabytes = map(int, done.stdout.split())
    assert pairs == 3 * 12 * (12 + 20 * 10) and heads == 20  # of layer 1 all 12 senders, then 20 a receiver
    assert megabytes < 880


# --- components --------------------------------------------------------------------------------------------------


def circuits(seed: int, heads: int, d: int = 12, h: int = 3) -> LayerCircuits:
    """Random circuits of a layer."""
    parts = [noise(heads, *shape, seed=seed + n) for n, shape in enumerate([(d, h), (h, d)] * 2)]
    return of_factors(Factors(Circuit.ov, *parts[:2]), Factors(Circuit.qk, *parts[2:]), torch.float64)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 200), mode=st.sampled_from(MODES))
def test_components_are_those_of_the_materialised_product_and_bound_the_whole(seed, mode) -> None:
    sender, receiver = circuits(10 * seed, 3), circuits(10 * seed + 5, 2)
    for head in range(2):
        found = component_scores(sender, receiver.only([head]), mode)
        qk = (receiver.qk.read[head] * receiver.qk.sigma[head]) @ receiver.qk.write[head].T
        ov = (receiver.ov.read[head] * receiver.ov.sigma[head]) @ receiver.ov.write[head].T
        M = {"q": qk, "k": qk.T, "v": ov}[mode]
        for s in range(3):
            V = torch.linalg.svd((sender.ov.read[s] * sender.ov.sigma[s]) @ sender.ov.write[s].T)[2][:3]
            assert torch.allclose(found[s], (V @ M).norm(dim=1) / M.norm())
        whole = scores(sender, receiver, mode)[:, head]
        weights = sender.ov.sigma.square() / sender.ov.sigma.square().sum(-1, keepdim=True)
        assert torch.allclose((weights * found.square()).sum(-1), whole.square())
        assert (found.amax(-1) >= whole - 1e-9).all() and (found <= 1 + 1e-9).all()


def test_the_component_that_a_receiver_reads_is_named_even_if_it_is_the_weakest() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    write = torch.stack([9 * eye[0], 3 * eye[1], 0.1 * eye[2]])[None]  # sigma 9, 3, 0.1
    sender = of_factors(Factors(Circuit.ov, eye[:, :3][None], write), Factors(Circuit.qk, eye[:, :3][None], write))
    reads = Factors(Circuit.qk, eye[:, 2:3][None].clone(), eye[5:6][None].clone())  # queries read direction 2
    receiver = of_factors(Factors(Circuit.ov, eye[:, 6:7][None].clone(), eye[7:8][None].clone()), reads)
    row = composition_table([sender, receiver], strongest=1).set_index("mode").loc["q"]
    assert row["component"] == 2 and row["component_score"] == pytest.approx(1) and row["score"] < 0.02
    zero = of_factors(Factors(Circuit.ov, 0 * eye[:, :3][None], write), Factors(Circuit.qk, eye[:, :3][None], write))
    assert component_scores(zero, receiver, "q").tolist() == [[0, 0, 0]]


@pytest.mark.slow
def test_components_that_claimed_receivers_read_are_listed_as_all_components_are(tmp_path) -> None:
    """Also those that are not among the leading ones: the same rows as with `analysis.components` of all."""
    made = {}
    for count in (0, 1, 16):
        outcome = run_cell(compose("model=mini-gpt2", "task=induction", "tracking=none", "nulls.draws=19", "cache=off",
                                   f"analysis.components={count}", f"results_dir={tmp_path / str(count)}"))  # fmt: skip
        folder = Path(str(outcome.folder))
        made[count] = {name: load_table(folder, name) for name in ("directions", "composition")}
    assert made[0]["directions"] is None
    few, every = (made[count]["directions"] for count in (1, 16))
    keys = ["layer", "head", "circuit", "kind", "component", "side", "sign", "rank"]
    assert not few.duplicated(keys).any()
    read = made[1]["composition"][["sender_layer", "sender_head", "component"]].itertuples(index=False, name=None)
    there = few[(few["circuit"] == "ov") & (few["kind"] == "singular")]
    more = there[there["component"] >= 1]
    listed = set(there[["layer", "head", "component"]].itertuples(index=False, name=None))
    assert set(read) <= listed and len(more)
    both = more.merge(every, on=keys, suffixes=("", "_all"))
    assert len(both) == len(more)
    for name in ("token", "cluster", "cluster_size"):
        assert (both[name] == both[f"{name}_all"]).all(), name
    assert np.allclose(both["score"], both["score_all"], rtol=1e-4)
    assert np.allclose(both["contrast"], both["contrast_all"], rtol=1e-4)


def test_the_statistic_of_the_evidence_is_that_of_every_choice_of_senders(capsys, monkeypatch) -> None:
    """The rows of docs/evidence.md for mini-attn, and p by a loop over all choices of heads in the senders' layers."""
    evidence = script("evidence_of_composition")
    senders, receivers = "0.1 0.4 1.1 1.3 1.5 1.6 1.7", "3.0 3.3 3.4"
    monkeypatch.setattr("sys.argv", ["", "mini-attn", senders, receivers])
    evidence.main()
    printed, text = capsys.readouterr().out.splitlines(), (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    starts = "| `mini-attn`, seven", "| | | "
    rows_told = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(starts)]
    for row in printed[:3]:
        side, *numbers = [each.strip() for each in row.strip("|").split("|")]
        start = [side, numbers[0].lstrip("0"), numbers[1].lstrip("0")]
        (told,) = [cells[3:] for cells in rows_told if [cell.strip() for cell in cells[2:5]] == start]
        for number, each in zip(numbers, told, strict=False):
            assert float(number) == pytest.approx(float(each), abs=half_a_unit(each.strip())), row
    layers = quantities.Opened("mini-attn").circuits
    of_senders, of_receivers = [(0, 1), (0, 4), (1, 2)], [(1, 3), (2, 0)]  # 1.3 hears layer 0 alone

    def mean(chosen) -> float:
        pairs = [(layers[s[0]].only([s[1]]), layers[r[0]].only([r[1]])) for s, r in product(chosen, of_receivers)
                 if s[0] < r[0]]  # fmt: skip
        return sum(float(component_scores(sender, receiver, "k").max()) for sender, receiver in pairs) / len(pairs)

    every = [[(0, a), (0, b), (1, c)] for a, b in combinations(range(8), 2) for c in range(8)]
    mine, values = mean(of_senders), [mean(chosen) for chosen in every]
    found = evidence.statistic(layers, of_senders, of_receivers, "k", evidence.by_component)
    assert found[0] == pytest.approx(mine) and found[1] == pytest.approx(sum(values) / len(values))
    assert found[2] == sum(value >= mine - 1e-9 for value in values) / len(values)
