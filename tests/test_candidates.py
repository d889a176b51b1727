"""Where nothing is claimed: heads ranked for each role by its primary metric, corrected for it, never judged."""

import math

import numpy as np
import pandas as pd
import pytest
from support.small import DRAWS, N_HEADS, N_LAYERS, SET_ROLES, Oracle, Random, counted, high, run, task

from ovqk.config.schema import Direction
from ovqk.records.record import Analysis
from ovqk.verdicts.candidates import STRONGEST, Ranking, add_ranking, rank, standing
from ovqk.verdicts.claim_tests import ClaimTests
from ovqk.verdicts.depth import depth_reference
from ovqk.verdicts.nulls import Predicted
from ovqk.verdicts.statistics import benjamini_hochberg
from ovqk.verdicts.surrogates import draw_words

ALL = N_LAYERS * N_HEADS


@pytest.fixture(scope="module")
def result() -> Analysis:
    return run(Random(), task(), "model.claims=null")


def grid(result: Analysis, metric: str, first_layer: str | None = None) -> np.ndarray:
    heads = result.tables["heads"]
    values = heads[metric].to_numpy().copy()
    if first_layer is not None:
        first = (heads["layer"] == 0).to_numpy()
        values[first] = heads[first_layer].to_numpy()[first]
    return values.reshape(N_LAYERS, N_HEADS)


def values_of(result: Analysis, role: str, index: int = 0) -> tuple[np.ndarray, float]:
    """The metric of a role's prediction for every head, and the sign of the direction."""
    prediction = SET_ROLES[role][index]
    values = grid(result, prediction.metric, prediction.first_layer)
    return values, -1.0 if prediction.direction is Direction.low else 1.0


RANKED = ["mover", "negative", "duplicate", "writer", "induction"]
"""Roles that their primary metric ranks without heads of another role."""


def by_metric(table: pd.DataFrame, role: str, prediction) -> pd.DataFrame:
    """The rows of one prediction; in layer 0 it may be about a metric of its own."""
    names = np.where(table["layer"] == 0, prediction.first_layer or prediction.metric, prediction.metric)
    mine = (table["role"] == role) & (table["exploratory"] == prediction.exploratory)
    return table[mine & (table["metric"] == names)]


def test_candidates_are_no_verdicts_and_nothing_of_a_verdict_is_written(result) -> None:
    assert not {"tests", "nulls", "verdicts", "composition"} & set(result.tables)
    assert result.claims == {"none": "no circuit is claimed for toy (model.claims names none)"}
    assert not any("verdict" in name or name.startswith("role/") for name in result.summary)
    table = result.tables["candidates"]
    assert list(table.columns) == [
        "role", "rank", "layer", "head", "ranked", "beside", "partners", "metric", "prediction", "primary",
        "exploratory", "value", "percentile", "z", "gap", "p_depth", "q_depth", "p_spectrum", "p_spectrum_all",
        "p_tail", "tail_fit", "q_tail", "p_words", "p_words_all",
    ]  # fmt: skip
    assert list(dict.fromkeys(table["role"])) == [*RANKED, "previous"]


def test_a_role_whose_primary_composes_is_ranked_by_what_it_predicts_besides_and_says_so(result) -> None:
    notes = [note for note in result.notes if "candidates" in note]
    assert notes == ["candidates for previous are ranked by qk_prev_auc: its primary metric, k_composition, composes "
                     "with induction heads, and none is claimed (analysis=composition takes candidates)"]  # fmt: skip
    table = result.tables["candidates"]
    assert not {"k_composed_matching", "k_composition"} & set(table["metric"])
    mine = table[table["role"] == "previous"]
    assert (mine["metric"] == "qk_prev_auc").all() and mine["ranked"].all() and not mine["primary"].any()
    assert (mine["layer"] == 0).all() and mine["value"].is_monotonic_decreasing  # a direct path alone


def test_without_such_a_prediction_there_are_no_candidates_and_a_reason() -> None:
    roles = {"previous": SET_ROLES["previous"][:1], "mover": SET_ROLES["mover"]}
    made = task(roles=roles | {"induction": SET_ROLES["induction"]})
    result = run(Random(), made, "model.claims=null")
    assert [note for note in result.notes if "candidates" in note] == [
        "no candidates for previous: its primary metric, k_composition, composes with induction heads, and none is "
        "claimed (analysis=composition takes candidates)"
    ]


def test_where_all_pairs_are_composed_a_role_is_ranked_with_the_candidates_of_its_partners() -> None:
    roles = {"previous": SET_ROLES["previous"], "induction": SET_ROLES["induction"]}
    result = run(Random(), task(roles=roles), "model.claims=null", "analysis=composition")
    table = result.tables["candidates"]
    assert list(dict.fromkeys(table["role"])) == ["previous", "induction"]
    partners = table[(table["role"] == "induction") & table["ranked"]].sort_values("rank")[["layer", "head"]]
    mine = table[(table["role"] == "previous") & table["ranked"]]
    assert (mine["metric"] == "k_composition").all() and mine["primary"].all() and len(mine) == STRONGEST
    assert set(mine["partners"]) == {" ".join(f"{a}.{b}" for a, b in partners.to_numpy())}
    pairs = result.tables["composition"].query("mode == 'k'")
    into = pairs[
        [
            tuple(x) in set(map(tuple, partners.to_numpy()))
            for x in pairs[["receiver_layer", "receiver_head"]].to_numpy()
        ]
    ]
    best = into.groupby(["sender_layer", "sender_head"])["percentile"].max()
    for row in mine.to_dict("records"):
        assert row["value"] == pytest.approx(best[row["layer"], row["head"]])
    assert mine[["p_depth", "p_spectrum"]].isna().all(axis=None)  # of partners that were chosen no p is honest
    assert not [note for note in result.notes if "candidates" in note]


@pytest.mark.parametrize("role", RANKED)
def test_the_five_most_extreme_heads_in_the_predicted_direction_are_ranked(role, result) -> None:
    values, sign = values_of(result, role)
    rest = sorted((i for i in range(1, len(SET_ROLES[role]))), key=lambda i: SET_ROLES[role][i].exploratory)
    more = [values_of(result, role, i) for i in rest if not SET_ROLES[role][i].partners]
    order = sorted(  # heads that tie are told apart by what else the role predicts
        np.ndindex(values.shape),
        key=lambda head: (-sign * values[head], *(-s * np.nan_to_num(v[head], nan=-s * np.inf) for v, s in more), head),
    )[:STRONGEST]
    table = result.tables["candidates"]
    mine = table[(table["role"] == role) & table["primary"]]
    assert mine["rank"].tolist() == [1, 2, 3, 4, 5]
    assert list(zip(mine["layer"], mine["head"], strict=True)) == order
    for index, prediction in enumerate(SET_ROLES[role]):
        if prediction.partners:
            continue
        others, _ = values_of(result, role, index)
        rows = by_metric(table, role, prediction)
        assert (rows["primary"] == (index == 0)).all() and (rows["exploratory"] == prediction.exploratory).all()
        assert (rows["prediction"] == prediction.direction.value).all()
        for row in rows.to_dict("records"):
            head = row["layer"], row["head"]
            assert head == order[row["rank"] - 1]
            assert row["value"] == pytest.approx(others[head])
            rest = [others[head[0], h] for h in range(N_HEADS) if h != head[1]]
            below = np.mean([(v < row["value"] - 1e-12) + 0.5 * (abs(v - row["value"]) <= 1e-12) for v in rest])
            assert row["percentile"] == pytest.approx(below)


@pytest.mark.parametrize("role", RANKED)
def test_z_and_gap_are_over_all_heads_of_the_model(role, result) -> None:
    values, sign = values_of(result, role)
    signed = sign * values[~np.isnan(values)]
    table = result.tables["candidates"]
    mine = table[(table["role"] == role) & table["primary"]]
    spread = 1.4826 * np.median(np.abs(signed - np.median(signed)))
    for row in mine.to_dict("records"):
        assert row["z"] == pytest.approx((sign * row["value"] - np.median(signed)) / spread)
        others = list(signed)
        others.remove(sign * row["value"])
        behind = max(value for value in others if value <= sign * row["value"])  # 0 for heads that tie
        assert row["gap"] == pytest.approx((sign * row["value"] - behind) / spread)


def test_without_spread_there_is_no_standing() -> None:
    assert np.isnan(standing(np.ones((2, 3)), (0, 0))).all()
    z, gap = standing(np.array([[0.0, 1.0, math.nan], [2.0, 3.0, 4.0]]), (0, 0))
    assert z == pytest.approx(-2 / 1.4826) and math.isnan(gap)


def test_tails_are_fitted_to_what_is_measured_and_corrected_over_all_heads() -> None:
    roles = {"mover": [high("ov_task_margin"), high("ov_copying")]}
    table = run(Random(), task(roles=roles), "model.claims=null", "nulls.draws=999").tables["candidates"]
    margin, copying = (table[table["metric"] == name] for name in ("ov_task_margin", "ov_copying"))
    assert copying[["p_tail", "tail_fit", "q_tail"]].isna().all(axis=None)  # draws there may be bounds
    assert margin["p_tail"].notna().all() and (margin["q_tail"] >= margin["p_tail"]).all()
    # Random heads: where draws exceed the value, the fitted p is near the counted one.
    assert (np.abs(np.log(margin["p_tail"] / margin["p_spectrum"])) < 1.5).all()
    ps = sorted(margin["p_tail"])
    assert margin["q_tail"].min() == pytest.approx(min(1.0, min(p * ALL / (i + 1) for i, p in enumerate(ps))))


def depth_p(signed: np.ndarray, head: tuple[int, int]) -> float:
    """Of one head: every other head of the model, in layers of 12 heads as many as it takes; tests/test_depth.py."""
    found = depth_reference(signed, head, set(), np.arange(N_HEADS))
    return math.nan if found is None else found.counts().p


@pytest.mark.parametrize("role", RANKED)
def test_nearby_heads_are_all_the_others_and_the_correction_is_over_every_head(role, result) -> None:
    table = result.tables["candidates"]
    for index, prediction in enumerate(SET_ROLES[role]):
        if prediction.partners:
            continue
        values, sign = values_of(result, role, index)
        p = {head: depth_p(sign * values, head) for head in np.ndindex(values.shape) if not math.isnan(values[head])}
        p = {head: value for head, value in p.items() if not math.isnan(value)}
        q = dict(zip(p, benjamini_hochberg(list(p.values())), strict=True))
        rows = by_metric(table, role, prediction)
        assert len(rows)
        for row in rows.to_dict("records"):
            head = row["layer"], row["head"]
            assert row["p_depth"] == pytest.approx(p.get(head, math.nan), nan_ok=True)
            assert row["q_depth"] == pytest.approx(q.get(head, math.nan), nan_ok=True)


@pytest.mark.parametrize(("role", "index"), [("mover", 0), ("negative", 0), ("duplicate", 1), ("induction", 0)])
def test_frames_are_multiplied_by_the_number_of_heads_that_were_ranked(role, index, result) -> None:
    oracle, prediction = Oracle(Random()), SET_ROLES[role][index]
    values, sign = values_of(result, role, index)
    table = result.tables["candidates"]
    rows = by_metric(table, role, prediction)
    for row in rows[rows["rank"] <= 3].to_dict("records"):
        head = row["layer"], row["head"]
        name = prediction.first_layer if head[0] == 0 and prediction.first_layer else prediction.metric
        draws = [oracle.metric(name, head[0], M) for M in oracle.frames(head, name[:2], DRAWS, claimed=False)]
        exceeding = np.cumsum([sign * draw >= sign * values[head] - 1e-9 for draw in draws])
        n = DRAWS if exceeding[-1] < 20 else int(np.argmax(exceeding == 20)) + 1
        p = (1 + min(20, exceeding[-1])) / (1 + n)
        assert row["p_spectrum"] == pytest.approx(p)
        assert row["p_spectrum_all"] == pytest.approx(min(1, p * ALL))


@pytest.mark.parametrize(("kind", "role"), [("set", "writer"), ("contrast", "output"), ("contrast", "reader")])
def test_other_words_are_a_null_of_candidates_whose_claim_is_about_these_words(kind, role) -> None:
    """Each surrogate of the words by force, the larger p of the nulls that the variable has, times all heads."""
    oracle = Oracle(Random(), kind)
    result = run(Random(), task(kind), "model.claims=null")
    table = result.tables["candidates"]
    nulls = draw_words(oracle.variable, DRAWS, 0)
    assert len(nulls) == (1 if kind == "set" else 2)
    mine = table[(table["role"] == role) & table["primary"]]
    assert len(mine) == STRONGEST
    for row in mine.to_dict("records"):
        M = oracle.map((row["layer"], row["head"]), "ov")
        like = oracle.variable if kind == "set" else None
        found = [
            counted(row["value"], [oracle.metric(row["metric"], row["layer"], M, v, like) for v in words.variables])[0]
            for words in nulls
            if words.variables
        ]
        assert row["p_words"] == pytest.approx(max(found))
        assert row["p_words_all"] == pytest.approx(min(1, max(found) * ALL))
    others = table[~table["metric"].isin(["ov_task_alignment", "ov_top_alignment", "ov_task_transfer", "ov_task_read"])]
    assert others[["p_words", "p_words_all"]].isna().all(axis=None)  # what copies need not be special to these words


def test_where_no_surrogate_has_the_metric_there_is_no_p_of_one() -> None:
    table = run(Random("qk-norm"), task(roles={"duplicate": SET_ROLES["duplicate"]}), "model.claims=null").tables
    candidates: pd.DataFrame = table["candidates"]
    scores = candidates[candidates["metric"] == "qk_task_auc"]
    assert scores[["p_spectrum", "p_spectrum_all"]].isna().all(axis=None) and scores["p_depth"].notna().all()
    assert candidates[candidates["metric"] == "qk_matching_block0"]["p_spectrum"].notna().all()


def ranked_by(predictions: dict[str, tuple[bool, list[list[float]]]]) -> Ranking:
    """The ranking of a role by metrics that rank (or do not), with these values [layer, head]."""
    found: dict[str, Ranking] = {}
    made = [
        Predicted("role", high(name, ranks=ranks, exploratory=place > 0), place == 0, np.array(values))
        for place, (name, (ranks, values)) in enumerate(predictions.items())
    ]
    add_ranking(found, "role", made, [])
    return found["role"]


def test_metrics_that_rank_together_rank_by_the_worst_place() -> None:
    values = {"a": [[9.0, 8, 7, 1]], "b": [[1.0, 7, 8, 9]], "primary": [[1.0, 2, 3, 4]]}
    found = ranked_by({"primary": (False, values["primary"]), "a": (True, values["a"]), "b": (True, values["b"])})
    assert [p.config.metric for p in (found.by, *found.beside)] == ["a", "b"]
    assert found.heads == [(0, 1), (0, 2), (0, 0), (0, 3)]  # places 2 and 3, 3 and 2, 1 and 4, 4 and 1


def test_a_note_says_what_ranks_by_the_tasks_own_choice() -> None:
    made = [
        Predicted("role", high("ov_copying"), True, np.array([[1.0, 2]])),
        Predicted("role", high("ov_task_auc", ranks=True, exploratory=True), False, np.array([[2.0, 1]])),
    ]
    _, notes = rank(ClaimTests.__new__(ClaimTests), {"role": made})  # no role composes
    assert notes == [
        "candidates for role are ranked by ov_task_auc, as the task asks (ranks: true); a verdict would rest on "
        "ov_copying"
    ]


def test_the_primary_ranks_if_one_of_the_metrics_that_rank_has_no_values() -> None:
    lacking = [[math.nan] * 4]
    found = ranked_by({"primary": (False, [[1.0, 2, 3, 4]]), "a": (True, [[9.0, 8, 7, 1]]), "b": (True, lacking)})
    assert found.by.config.metric == "primary" and not found.beside and found.heads[0] == (0, 3)


def test_a_head_that_exceeds_no_more_than_half_of_the_heads_is_no_candidate() -> None:
    assert ranked_by({"primary": (False, [[0.0, 0, 0.3, 0]])}).strongest == [(0, 2)]
    assert ranked_by({"primary": (False, [[0.0, 0, 0, 0]])}).strongest == []


def test_a_metric_without_values_has_no_candidates() -> None:
    result = run(Random(embedding=False), task(), "model.claims=null", words=False)
    assert "candidates" not in result.tables
