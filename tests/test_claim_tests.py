"""Claims of a small model, end to end: which nulls there are, which count, and every p-value and interval by force."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from support.commands import compose
from support.small import (
    CONTRAST_CLAIMS,
    CONTRAST_ROLES,
    D_MODEL,
    DRAWS,
    N_HEADS,
    N_LAYERS,
    SET_CLAIMS,
    SET_ROLES,
    Oracle,
    Random,
    cell,
    claimed,
    counted,
    high,
    low,
    run,
    task,
    tokenizer,
)

from ovqk.analyse import analyse
from ovqk.circuits.grams import dense
from ovqk.config.schema import Circuit, Direction
from ovqk.records.record import Analysis
from ovqk.structure.model import Model
from ovqk.verdicts.claim_tests import matching_grams
from ovqk.verdicts.statistics import benjamini_hochberg
from ovqk.verdicts.surrogates import draw_words, subsamples
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.types import LayerWeights, OpenedModel

COLUMNS = {
    "role", "layer", "head", "metric", "prediction", "value", "null", "null_mean", "null_sd", "percentile", "effect",
    "ci_low", "ci_high", "p", "p_opposite", "q", "min_p", "min_q", "n_null", "counts",
}  # fmt: skip
"""Those that the definitions list."""
MORE_COLUMNS = {
    "primary",
    "exploratory",
    "q_opposite",
    "testable",
    "exact",
    "n_heads",
    "n_others",
    "n_groups",
    "group_effect",
    "variable",
}


@pytest.fixture(scope="module")
def of_a_set() -> Analysis:
    return run(Random(), task())


@pytest.fixture(scope="module")
def of_a_contrast() -> Analysis:
    return run(Random(), task("contrast"))


def select(tests: pd.DataFrame, role: str, metric: str, null: str, head: tuple[int, int] | None = None) -> pd.Series:
    rows = tests[(tests["role"] == role) & (tests["metric"] == metric) & (tests["null"] == null)]
    at = rows["head"].isna() if head is None else (rows["layer"] == head[0]) & (rows["head"] == head[1])
    (index,) = rows.index[at]
    return rows.loc[index]


# --- which nulls there are, and which count ------------------------------------------------------------------------

PEERS = {"layer": True, "layer_all": False, "depth": False}, {"layer": False, "depth": True}
FRAMED = tuple(level | {"spectrum": True} for level in PEERS)
WITH_WORDS = tuple(level | {"token": False} for level in FRAMED)
ALIGNED = tuple(level | {"token": True} for level in FRAMED)
CONTRAST = tuple(level | {"token_pairs": True} for level in ALIGNED)
COMPOSED = {"layer": True, "layer_all": False}, {"layer": False}
NULLS = {
    "ov_task_auc": WITH_WORDS,
    "ov_task_copy": FRAMED,
    "ov_task_suppress": FRAMED,
    "qk_task_auc": WITH_WORDS,
    "qk_matching_block0": FRAMED,
    "ov_task_alignment": ALIGNED,
    "ov_top_alignment": ALIGNED,
    "ov_copying": FRAMED,
    "qk_prev_auc": PEERS,
    "k_composition": COMPOSED,
    "k_composed_matching": COMPOSED,
    "ov_task_transfer": CONTRAST,
    "ov_task_read": CONTRAST,
}
"""Metric -> null -> whether it counts, of a role and of a head (definitions, section 6: which count)."""
EXPLORATORY = {"qk_key_alignment": ALIGNED, "qk_task_auc_unembed": WITH_WORDS, "ov_copying_block0": FRAMED}


@pytest.mark.parametrize("kind", ["set", "contrast"])
def test_every_prediction_meets_the_nulls_of_its_kind_and_those_count_that_should(kind, request) -> None:
    tests = request.getfixturevalue(f"of_a_{kind}").tables["tests"]
    roles, claims = (SET_ROLES, SET_CLAIMS) if kind == "set" else (CONTRAST_ROLES, CONTRAST_CLAIMS)
    seen = 0
    for role, predictions in roles.items():
        for index, prediction in enumerate(predictions):
            metric = prediction.metric
            of_role, of_head = (NULLS | EXPLORATORY)[metric]
            for head in (None, *claimed(role, claims)):
                named = prediction.first_layer if head and head[0] == 0 and prediction.first_layer else metric
                mine = tests[(tests["role"] == role) & (tests["metric"] == named)]
                at = mine["head"].isna() if head is None else (mine["layer"] == head[0]) & (mine["head"] == head[1])
                wanted = dict(of_role if head is None else of_head)
                if prediction.exploratory:
                    wanted = dict.fromkeys(wanted, False)
                if metric in ("ov_task_copy", "ov_task_suppress") and (mine[at]["null"] != "depth").all():
                    wanted.pop("depth", None)  # a score that is 0 for most heads of the layer has no spread
                found = mine[at]
                layer = found[found["null"] == "layer"]
                if head is None and "depth" in wanted and not prediction.exploratory:  # it stands in for `layer`
                    wanted["depth"] = not bool(layer["testable"].iloc[0])
                assert dict(zip(found["null"], found["counts"], strict=True)) == wanted, (role, metric, head)
                assert (found["primary"] == (index == 0)).all()
                assert (found["exploratory"] == prediction.exploratory).all()
                assert (found["prediction"] == prediction.direction.value).all()
                seen += len(found)
    assert seen == len(tests)


@pytest.mark.parametrize("kind", ["set", "contrast"])
def test_the_columns_are_those_of_the_definitions_and_no_more_than_the_named_ones(kind, request) -> None:
    result = request.getfixturevalue(f"of_a_{kind}")
    tests = result.tables["tests"]
    assert set(tests.columns) == COLUMNS | MORE_COLUMNS
    for name in ("value", "percentile", "effect", "p", "p_opposite", "min_p", "n_null"):
        assert tests[name].notna().all(), name
    assert tests[["p", "p_opposite", "percentile", "effect", "min_p"]].stack().between(0, 1).all()
    assert (tests["p"] >= tests["min_p"] - 1e-12).all()
    nulls = result.tables["nulls"]
    keys = ["role", "layer", "head", "metric", "null"]
    assert len(nulls) == 11 * len(tests)
    low_ends, high_ends = (nulls[nulls["quantile"] == q].reset_index(drop=True) for q in (0.0, 1.0))
    assert (low_ends["value"] <= high_ends["value"]).all() and low_ends[keys].equals(high_ends[keys])
    drawn = tests["null"].isin(["spectrum", "token", "token_pairs"])
    between = (low_ends["value"] <= tests["null_mean"]) & (tests["null_mean"] <= high_ends["value"])
    assert between[drawn].all()


@pytest.mark.parametrize("kind", ["set", "contrast"])
def test_corrections_are_over_one_family_of_roles_and_one_of_heads_for_each_null(kind, request) -> None:
    tests = request.getfixturevalue(f"of_a_{kind}").tables["tests"]
    testable = tests["min_p"] <= 0.05
    assert (tests["testable"] == testable).all()
    single = tests["head"].notna() & (tests["null"] == "layer")
    inside = testable & ~tests["exploratory"].astype(bool) & ~single
    assert tests.loc[~inside, ["q", "q_opposite", "min_q"]].isna().all(axis=None)
    families = 0
    for (null, *_), family in tests[inside].groupby([tests["null"], tests["head"].isna(), tests["counts"]]):
        families += null != "layer_all"
        assert np.allclose(family["q"], benjamini_hochberg(list(family["p"])))
        assert np.allclose(family["q_opposite"], benjamini_hochberg(list(family["p_opposite"])))
        assert np.allclose(family["min_q"], np.minimum(1, family["min_p"] * len(family)))
    # layer of roles; both of the others, depth among them; of a set the token rows that are only reported stand apart
    assert families == 9


def test_the_verdicts_are_one_for_every_role_and_head_and_none_is_of_a_null_that_does_not_count(of_a_set) -> None:
    verdicts, tests = of_a_set.tables["verdicts"], of_a_set.tables["tests"]
    assert len(verdicts) == len(SET_CLAIMS) + sum(map(len, SET_CLAIMS.values()))
    assert (verdicts[verdicts["role"] == "bystander"]["verdict"] == "out_of_scope").all()
    counting = tests[tests["counts"] & tests["primary"] & tests["testable"]]
    for row in verdicts.to_dict("records"):
        is_role = row["kind"] == "role"
        mine = counting[counting["role"] == row["role"]]
        mine = (
            mine[mine["head"].isna()]
            if is_role
            else mine[(mine["layer"] == row["layer"]) & (mine["head"] == row["head"])]
        )
        assert row["nulls"] == ", ".join(mine["null"])
        assert row["held"] == ", ".join(mine[mine["q"] < 0.05]["null"])


# --- spectrum and token by force --------------------------------------------------------------------------------------


FRAMES = [
    ("mover", "ov_task_auc"), ("mover", "ov_task_copy"), ("negative", "ov_task_auc"), ("negative", "ov_task_suppress"),
    ("mover", "qk_key_alignment"), ("duplicate", "qk_task_auc"), ("duplicate", "qk_matching_block0"),
    ("writer", "ov_task_alignment"), ("writer", "ov_top_alignment"), ("induction", "ov_copying"),
]  # fmt: skip


def check_against(
    tests: pd.DataFrame, role: str, metric: str, null: str, value: dict, draws: dict, sign: float
) -> None:
    """The rows of each head, and of the role as the mean over its heads."""
    value, draws = dict(value), dict(draws)
    value[None] = float(np.mean(list(value.values())))
    draws[None] = np.mean(list(draws.values()), axis=0).tolist()
    for head, mine in value.items():
        named = "qk_matching" if head and (metric, head[0]) == ("qk_matching_block0", 0) else metric
        row = select(tests, role, named, null, head)
        assert row["value"] == pytest.approx(mine, abs=2e-5)
        p, n = counted(sign * mine, [sign * draw for draw in draws[head]])
        opposite, _ = counted(-sign * mine, [-sign * draw for draw in draws[head]])
        assert (row["p"], row["n_null"], row["p_opposite"]) == (pytest.approx(p), n, pytest.approx(opposite)), head
        assert row["min_p"] == pytest.approx(1 / (DRAWS + 1))
        kept = draws[head][: int(row["n_others"])]
        assert row["n_others"] >= n
        assert row["null_mean"] == pytest.approx(np.mean(kept), abs=1e-4)
        assert row["null_sd"] == pytest.approx(np.std(kept), abs=1e-4)
        below = np.mean([(draw < mine - 1e-9) + 0.5 * (abs(draw - mine) <= 1e-9) for draw in kept])
        assert row["percentile"] == pytest.approx(below, abs=1e-9)
        assert row["effect"] == pytest.approx(below if sign > 0 else 1 - below, abs=1e-9)


@pytest.mark.parametrize(("role", "metric"), FRAMES)
def test_the_frame_null_is_a_loop_over_surrogates_written_out(role, metric, of_a_set) -> None:
    oracle = Oracle(Random())
    value, draws = {}, {}
    for head in claimed(role):
        name = "qk_matching" if (metric, head[0]) == ("qk_matching_block0", 0) else metric
        value[head] = oracle.metric(name, head[0], oracle.map(head, name[:2]))
        draws[head] = [oracle.metric(name, head[0], M) for M in oracle.frames(head, name[:2], DRAWS)]
    prediction = next(p for p in SET_ROLES[role] if p.metric == metric)
    check_against(
        of_a_set.tables["tests"],
        role,
        metric,
        "spectrum",
        value,
        draws,
        1 if prediction.direction is Direction.high else -1,
    )


TOKENS = [
    ("set", "mover", "ov_task_auc"), ("set", "mover", "qk_key_alignment"), ("set", "negative", "ov_task_auc"),
    ("set", "duplicate", "qk_task_auc"), ("set", "writer", "ov_task_alignment"), ("set", "writer", "ov_top_alignment"),
    ("contrast", "output", "ov_task_transfer"), ("contrast", "reader", "ov_task_read"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "role", "metric"), TOKENS)
def test_the_token_nulls_are_a_loop_over_other_words(kind, role, metric, request) -> None:
    roles, claims = (SET_ROLES, SET_CLAIMS) if kind == "set" else (CONTRAST_ROLES, CONTRAST_CLAIMS)
    tests = request.getfixturevalue(f"of_a_{kind}").tables["tests"]
    oracle = Oracle(Random(), kind)
    prediction = next(p for p in roles[role] if p.metric == metric)
    heads = claimed(role, claims)
    maps = {head: oracle.map(head, metric[:2]) for head in heads}
    value = {head: oracle.metric(metric, head[0], maps[head]) for head in heads}
    for words in draw_words(oracle.variable, DRAWS, 0):
        draws = {
            head: [oracle.metric(metric, head[0], maps[head], v, oracle.variable) for v in words.variables]
            for head in heads
        }
        sign = 1 if prediction.direction is Direction.high else -1
        check_against(tests, role, metric, words.null, value, draws, sign)


# --- intervals -----------------------------------------------------------------------------------------------------


def effect(values: np.ndarray, role: list[tuple[int, int]], others: set[tuple[int, int]]) -> float:
    """Share of pairs (claimed, other head of its layer) in which the claimed one is higher."""
    won = []
    for layer, head in role:
        for other in range(N_HEADS):
            if (layer, other) not in others | set(role):
                a, b = values[layer, head], values[layer, other]
                won.append(0.5 if abs(a - b) < 1e-12 else float(a > b))
    return float(np.mean(won))


def by_source(oracle: Oracle, metric: str) -> np.ndarray:
    """[layer, head, word]: whose mean over words is the metric."""
    ids = oracle.variable.read[0].ids
    found = np.zeros((N_LAYERS, N_HEADS, len(ids)))
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            L = oracle.rows(layer)[ids] @ oracle.map((layer, head), "ov") @ oracle.W_U
            if metric == "ov_task_copy":
                own = L[torch.arange(len(ids)), ids][:, None]
                found[layer, head] = (own < L).sum(1) < 5
                continue
            L = L[:, ids]
            for t in range(len(ids)):
                rest = [u for u in range(len(ids)) if u != t]
                means = torch.stack([L[[s for s in range(len(ids)) if s != t], u].mean() for u in range(len(ids))])
                found[layer, head, t] = float((L[t] - means < L[t, t] - means[t])[rest].double().mean())
    return found


@pytest.mark.parametrize(
    ("role", "metric", "sign"),
    [("mover", "ov_task_auc", 1), ("mover", "ov_task_copy", 1), ("negative", "ov_task_auc", -1)],
)
def test_intervals_resample_the_words_read_and_nothing_else(role, metric, sign, of_a_set) -> None:
    oracle = Oracle(Random())
    shares = by_source(oracle, metric)
    n = shares.shape[-1]
    counts = np.random.default_rng([0, 1]).multinomial(n, np.full(n, 1 / n), size=1000)
    everyone = {head for name in SET_CLAIMS for head in claimed(name)}
    tests = of_a_set.tables["tests"]
    for null, barred in (("layer", everyone), ("layer_all", set())):
        for subject in (None, claimed(role)[0]) if null == "layer" else (None,):
            heads = claimed(role) if subject is None else [subject]
            row = select(tests, role, metric, null, subject)
            assert row["effect"] == pytest.approx(effect(sign * shares.mean(-1), heads, barred))
            drawn = [effect(sign * (shares * weights).sum(-1) / n, heads, barred) for weights in counts]
            wanted = np.quantile(drawn, [0.025, 0.975])
            assert [row["ci_low"], row["ci_high"]] == pytest.approx(wanted.tolist(), abs=1e-9)
    assert row["ci_low"] < row["ci_high"]


def test_intervals_of_a_subspace_are_of_subsamples_of_its_words(of_a_set) -> None:
    oracle = Oracle(Random())
    everyone = {head for name in SET_CLAIMS for head in claimed(name)}
    drawn = []
    maps = torch.stack([torch.stack([oracle.map((a, b), "ov") for b in range(N_HEADS)]) for a in range(N_LAYERS)])

    def alignment(variable):
        P, r = oracle.span(oracle.W_U.T, variable)
        return (maps @ P).square().sum((2, 3)) / maps.square().sum((2, 3)) / (r / D_MODEL)

    own = alignment(oracle.variable)
    for variable in subsamples(oracle.variable, 200, 0.8, 0):  # 80 % stray half as far as a sample of all words would
        strayed = own + 2 * (alignment(variable) - own)
        drawn.append(effect(strayed.numpy(), claimed("writer"), everyone))
    row = select(of_a_set.tables["tests"], "writer", "ov_task_alignment", "layer")
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=1e-9)


def test_metrics_without_words_have_an_effect_and_no_interval(of_a_set) -> None:
    tests = of_a_set.tables["tests"]
    for role, metric in (
        ("induction", "ov_copying"),
        ("previous", "k_composition"),
        ("duplicate", "qk_matching_block0"),
    ):
        row = select(tests, role, metric, "layer")
        assert math.isfinite(row["effect"]) and math.isnan(row["ci_low"]) and math.isnan(row["ci_high"])
    drawn = tests["null"].isin(["depth", "spectrum", "token"])
    assert tests.loc[drawn, ["ci_low", "ci_high"]].isna().all(axis=None)


# --- the same numbers again ----------------------------------------------------------------------------------------


FEW = {role: SET_CLAIMS[role] for role in ("mover", "writer")}


def test_a_rerun_changes_nothing() -> None:
    made = task(claims=FEW)
    one, again = (run(Random(), made, "nulls.draws=25") for _ in range(2))
    for name in ("tests", "nulls", "verdicts"):
        pd.testing.assert_frame_equal(one.tables[name], again.tables[name], check_exact=True)


def test_only_intervals_depend_on_how_often_words_are_resampled() -> None:
    few = ("nulls.draws=25", "nulls.resamples=2", "nulls.subsamples=2")
    one, other = (run(Random(), task(claims=FEW), *overrides).tables["tests"] for overrides in (few[:1], few))
    ends = ["ci_low", "ci_high"]
    sampled = one["ci_low"].notna()
    assert (one.loc[sampled, ends] != other.loc[sampled, ends]).any(axis=None)
    pd.testing.assert_frame_equal(one.drop(columns=ends), other.drop(columns=ends), check_exact=True)


@pytest.mark.slow
def test_another_number_of_threads_changes_nothing_that_is_counted() -> None:
    made = task(claims=FEW)
    one = run(Random(), made, "nulls.draws=25")
    try:
        torch.set_num_threads(2)
        other = run(Random(), made, "nulls.draws=25")
    finally:
        torch.set_num_threads(1)
    rounded = ["null_mean", "null_sd", "value"]  # weights are float32; what is counted is the same to the last digit
    for name in ("tests", "verdicts"):
        pair = [result.tables[name].drop(columns=rounded, errors="ignore") for result in (one, other)]
        pd.testing.assert_frame_equal(*pair, check_exact=True)
    for name in rounded:
        assert np.allclose(one.tables["tests"][name], other.tables["tests"][name], rtol=1e-5, equal_nan=True)


def test_another_seed_draws_other_nulls_and_leaves_the_values_alone(of_a_set) -> None:
    tests, other = of_a_set.tables["tests"], run(Random(), task(), "seed=1").tables["tests"]
    assert np.allclose(tests["value"], other["value"], atol=1e-12)
    drawn = tests["null"].isin(["spectrum", "token"])
    means = tests["null_mean"] - other["null_mean"]
    assert (means[drawn].abs() > 1e-12).mean() > 0.9  # a metric of whole words may come out alike
    exact = tests["null"].isin(["depth", "layer", "layer_all"])
    assert tests.loc[exact, "p"].equals(other.loc[exact, "p"])
    sampled = tests["ci_low"].notna() & tests["head"].isna()
    assert (tests.loc[sampled, "ci_low"] != other.loc[sampled, "ci_low"]).any()


@pytest.mark.parametrize("draws", [1, 18, 19, 26])
def test_few_draws_are_enough_to_test_with_or_say_that_they_are_not(draws) -> None:
    made = task(claims={"mover": SET_CLAIMS["mover"]})
    tests = run(Random(), made, f"nulls.draws={draws}").tables["tests"]
    assert set(tests.columns) == COLUMNS | MORE_COLUMNS
    drawn = tests[tests["null"].isin(["spectrum", "token"])]
    assert (drawn["min_p"] == 1 / (1 + draws)).all() and (drawn["n_null"] <= draws).all()
    assert (drawn["n_others"] <= draws).all() and (drawn["testable"] == (draws >= 19)).all()
    assert drawn.loc[~drawn["testable"].astype(bool), "q"].isna().all()


# --- compositions: what they see of tokens, and where nothing is claimed ---------------------------------------------


class Bare(Random):
    """Attention alone; or an MLP that writes nothing, as an attention-only model may be stored."""

    def __init__(self, written: float | None) -> None:
        super().__init__()
        self.written = written

    def first_mlp(self) -> MLPWeights | str:
        if self.written is None:
            return "the model has no MLP"
        mlp = super().first_mlp()
        return dataclasses.replace(mlp, W_out=self.written * mlp.W_out)


@pytest.mark.parametrize(("written", "plain"), [(None, True), (0.0, True), (1.0, False)])
def test_k_composed_heads_see_plain_tokens_in_a_model_without_mlps(written, plain) -> None:
    model = Model.read(OpenedModel(Bare(written), "toy", tokenizer()), cell(task()))
    gram, first = matching_grams(model)
    if plain:
        assert torch.equal(gram, dense(model.vocabulary.gram_embed)) and first is None
    else:
        assert gram is model.block0_grams.embed and first is model.block0_grams.with_plain


def pairs_of(source: Random, words: bool = False) -> Analysis:
    chosen = compose("task=none", "analysis=composition", "analysis.components=0", "model.claims=null")
    return analyse(OpenedModel(source, "toy", tokenizer() if words else None), chosen)


def test_all_pairs_have_their_matching_and_copying_without_a_task_that_reads_words() -> None:
    result = pairs_of(Random())
    assert result.tables["composition"].query("mode == 'k'")["matching"].notna().all()
    assert result.tables["virtual_heads"]["ov_copying"].notna().all()
    assert result.tables["heads"].query("layer > 0")[["ov_copying_block0", "qk_matching_block0"]].notna().all(axis=None)
    assert not [note for note in result.notes if "is empty" in note]


def test_where_a_composition_has_no_matching_the_notes_say_why() -> None:
    why = "is empty: the checkpoint has no token embedding"
    notes = pairs_of(Random(embedding=False)).notes
    assert [f"composition: matching {why}", f"virtual_heads: ov_copying {why}"] == [n for n in notes if "empty" in n]
    notes = pairs_of(Random(unembedding=False)).notes
    assert [n for n in notes if "empty" in n] == [
        "virtual_heads: ov_copying is empty: the checkpoint has no unembedding"
    ]


# --- other models, other analyses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("circuit", Circuit)
def test_one_circuit_alone_tests_what_it_can_and_says_what_it_cannot(circuit, of_a_set) -> None:
    result = run(Random(), task(), f"analysis={circuit}")
    tests, verdicts = result.tables["tests"], result.tables["verdicts"]
    both = of_a_set.tables["tests"]
    mine = both["metric"].str.startswith(circuit)
    keys = ["role", "layer", "head", "metric", "null", "value", "p", "p_opposite", "effect", "ci_low"]
    pd.testing.assert_frame_equal(tests[keys], both.loc[mine, keys].reset_index(drop=True))
    for role, predictions in SET_ROLES.items():
        about = verdicts[verdicts["role"] == role]
        if predictions and not predictions[0].metric.startswith(circuit):
            assert (about["verdict"] == "untestable").all()
            named = predictions[0].metric
            assert about["reason"].str.contains(f"analysis {circuit}|analysis has one|{named}").all()
    assert "composition" not in result.tables


def test_normalised_queries_and_keys_have_no_surrogates_for_their_scores() -> None:
    """A frame or other words say nothing of a score that depends on more than W_QK; the other heads still do."""
    tests = run(Random("qk-norm"), task()).tables["tests"]
    by_metric = tests.groupby("metric")["null"].agg(set)
    for metric in ("qk_task_auc", "qk_task_auc_unembed"):
        assert by_metric[metric] == {"layer", "layer_all", "depth"}
    assert by_metric["qk_key_alignment"] == {"layer", "layer_all", "depth", "spectrum", "token"}
    assert by_metric["qk_matching"] == {"layer", "depth", "spectrum"}  # of heads of layer 0, by its own name
    assert by_metric["qk_matching_block0"] == {"layer", "layer_all", "depth", "spectrum"}
    assert by_metric["ov_task_auc"] == {"layer", "layer_all", "depth", "spectrum", "token"}


@pytest.mark.parametrize("words", [True, False])
def test_a_checkpoint_without_an_embedding_is_tested_where_it_can_be(words) -> None:
    result = run(Random(embedding=False), task(), words=words)
    tests, verdicts = result.tables["tests"], result.tables["verdicts"]
    assert set(tests["metric"]) == {"k_composition"} and set(tests["null"]) == {"layer", "layer_all"}
    decided = verdicts[~verdicts["verdict"].isin(["untestable", "out_of_scope"])]
    assert set(decided["role"]) == {"previous"} and set(decided["kind"]) == {"role"}
    movers = verdicts[verdicts["role"] == "mover"]["reason"]
    assert movers.str.contains("ov_task_auc, is unavailable: the checkpoint has no token embedding").all()


def test_a_checkpoint_without_an_unembedding_is_tested_on_what_it_reads() -> None:
    """Of two predictions of one circuit, the one that cannot be measured does not take the other's frames away."""
    roles = {"reader": [high("ov_task_read"), high("ov_copying"), high("ov_copying_block0"), high("ov_task_transfer")]}
    claims = {"reader": CONTRAST_CLAIMS["reader"]}
    tests = run(Random(unembedding=False), task("contrast", roles, claims)).tables["tests"]
    assert set(tests["metric"]) == {"ov_task_read"}
    assert set(tests["null"]) == {"layer", "layer_all", "depth", "spectrum", "token", "token_pairs"}


def test_too_few_other_words_leave_the_frame_null_and_a_note() -> None:
    made = task(claims={"mover": SET_CLAIMS["mover"]})
    made.words["a"] = [f"w{i}" for i in range(80)]  # of 120 tokens: 40 others for 80 words
    result = run(Random(), made)
    assert any("null token" in note and "80 words of 'v'" in note for note in result.notes)
    assert "token" not in set(result.tables["tests"]["null"]) and "spectrum" in set(result.tables["tests"]["null"])


def test_a_head_of_zero_weights_is_no_evidence_for_anything() -> None:
    class Dead(Random):
        def layer(self, index: int) -> LayerWeights:
            weights = super().layer(index)
            W_O = weights.W_O.clone()
            W_O[0] = 0
            return dataclasses.replace(weights, W_O=W_O)

    tests = run(Dead(), task(claims={"mover": SET_CLAIMS["mover"]})).tables["tests"]
    for metric in ("ov_task_auc", "ov_task_copy"):
        for null in ("spectrum", "token") if metric == "ov_task_auc" else ("spectrum",):
            row = select(tests, "mover", metric, null, (1, 0))
            assert (row["p"], row["p_opposite"]) == (1, 1)


def test_heads_of_two_roles_are_drawn_once_and_have_the_same_frames() -> None:
    roles = {"one": [high("ov_task_auc")], "two": [low("ov_task_auc"), high("ov_copying")]}
    claims = {"one": ["1.0", "2.0"], "two": ["1.0", "3.0"]}
    tests = run(Random(), task("set", roles, claims)).tables["tests"]
    one, two = (select(tests, role, "ov_task_auc", "spectrum", (1, 0)) for role in ("one", "two"))
    shared = min(one["n_others"], two["n_others"])
    assert (one["p"], one["p_opposite"]) == (two["p_opposite"], two["p"]) and shared >= 25
