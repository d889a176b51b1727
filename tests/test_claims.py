"""Claims apply to the model they were made for, name heads that exist, and are compared with heads that none claims."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support import ROOT
from support.claimed import claims, facts, predicted
from support.commands import compose
from support.scripts import script

from ovqk.config.schema import Direction, PredictionConfig
from ovqk.errors import UserError
from ovqk.metrics import METRICS
from ovqk.records.identity import identity
from ovqk.tasks.claims import Claims, check_roles, parse_head, resolve_claims
from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.nulls import Predicted, correct, head_rows, only_head, predicted_values, role_rows
from ovqk.verdicts.verdict import Subject, judge, rows_about, subjects
from ovqk.weights.types import Architecture


def test_the_published_circuits_are_the_papers() -> None:
    cell = compose("model=gpt2", "task=ioi")
    claims = resolve_claims(cell.task, cell.model, facts())
    assert claims.roles["name_mover"] == [(9, 9), (10, 0), (9, 6)]
    assert claims.roles["backup_name_mover"] == [(9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9)]
    assert claims.roles["negative_name_mover"] == [(10, 7), (11, 10)]
    assert claims.roles["s_inhibition"] == [(7, 3), (7, 9), (8, 6), (8, 10)]
    assert claims.roles["induction"] == [(5, 5), (6, 9), (5, 8), (5, 9)]
    assert claims.roles["duplicate_token"] == [(0, 1), (3, 0), (0, 10)]
    assert claims.roles["previous_token"] == [(2, 2), (4, 11)]
    sva = compose("model=gpt2", "task=sva")
    assert resolve_claims(sva.task, sva.model, facts()).reliability == "unreliable"


@pytest.mark.parametrize("model", ["gpt2-medium", "distilgpt2", "gpt2-xl"])
def test_another_models_head_list_is_never_used(model) -> None:
    cell = compose(f"model={model}", "task=ioi")
    assert isinstance(resolve_claims(cell.task, cell.model, facts(24, 16)), str)


@pytest.mark.parametrize(("model", "of"), [("gpt2-medium", "gpt2"), ("mini-gpt2", "mini-attn"), ("gpt2", "mini-attn")])
def test_another_models_head_list_is_refused_even_when_it_is_named(model, of) -> None:
    cell = compose(f"model={model}", "task=ioi", f"model.claims={of}")
    with pytest.raises(
        UserError,
        match=rf"model\.claims={of}: claims about {of} do not apply to {model}\. Allowed: {model}, measured or null",
    ):
        resolve_claims(cell.task, cell.model, facts(4, 8))


def copy_of(claims: str, **shape: int) -> Claims:
    cell = compose("model=local", "model.path=x", "task=ioi", f"model.claims={claims}")
    return resolve_claims(cell.task, cell.model, facts(**shape))


def test_a_local_copy_is_judged_by_the_claims_that_it_names() -> None:
    assert copy_of("gpt2").of == "gpt2"
    with pytest.raises(UserError, match=r"model\.claims=gpt9.*allowed: .*gpt2"):
        copy_of("gpt9")


@pytest.mark.parametrize("shape", [{"layers": 24, "heads": 16}, {"layers": 12, "heads": 16}, {"layers": 6}])
def test_a_checkpoint_of_another_shape_is_no_copy(shape) -> None:
    with pytest.raises(UserError, match=r"heads of a model of 12 layers of 12 heads .*; this one has"):
        copy_of("gpt2", **shape)


def test_a_role_without_a_head_is_refused() -> None:
    cell = compose("model=gpt2", "task=ioi", "task.claims.gpt2.roles.induction=[]")
    with pytest.raises(UserError, match=r"task\.claims\.gpt2\.roles\.induction: names no head"):
        resolve_claims(cell.task, cell.model, facts())


@pytest.mark.parametrize("head", ["12.0", "0.12", "x", "9", "-1.2", "9.9.9", 9.1, 9])
def test_a_head_that_does_not_exist_is_refused_by_name(head) -> None:
    """An unquoted 9.10 is the number 9.1: refused, never read as another head."""
    with pytest.raises(UserError, match=r"task\.claims\.gpt2"):
        parse_head(head, "task.claims.gpt2.roles.name_mover", facts())


def test_an_unquoted_head_in_yaml_is_refused() -> None:
    cell = compose("model=gpt2", "task=ioi", "task.claims.gpt2.roles.name_mover=[9.10]")
    with pytest.raises(UserError, match="in quotes"):
        resolve_claims(cell.task, cell.model, facts())


def test_places_are_of_roles_that_are_claimed_and_change_no_cell() -> None:
    cell = compose("model=gpt2", "task=ioi")
    before = identity(cell, "0")
    assert "places" not in before["task"]["claims"]["gpt2"] and "revision" not in before["task"]["claims"]["gpt2"]
    cell.task.claims["gpt2"].places["name_mover"] = "elsewhere"
    cell.task.claims["gpt2"].revision = "other"
    assert identity(cell, "0") == before
    cell.task.claims["gpt2"].places["quarterback"] = "page 3"
    with pytest.raises(UserError, match=r"task\.claims\.gpt2\.places: quarterback: allowed: the roles"):
        resolve_claims(cell.task, cell.model, facts())


def test_every_published_claim_names_its_places_and_the_page_is_made_of_them() -> None:
    import yaml

    made = script("claims")
    assert made.PAGE.read_text(encoding="utf-8") == made.page()
    shown = 0
    for path in (ROOT / "conf" / "task").glob("*.yaml"):
        for model, of in made.published(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
            assert set(of["places"]) == set(of["roles"]) and of["revision"], f"{path.stem}, {model}"
            assert all(of["places"].values()) and of["source"] in made.page()
            shown += 1
    assert shown == 7


def test_unknown_roles_and_metrics_are_refused() -> None:
    cell = compose("model=gpt2", "task=ioi")
    cell.task.claims["gpt2"].roles["quarterback"] = ["9.9"]
    with pytest.raises(UserError, match="unknown role 'quarterback'"):
        resolve_claims(cell.task, cell.model, facts())
    cell = compose("model=gpt2", "task=ioi")
    cell.task.roles["induction"].predictions[0].metric = "ov_copyng"
    with pytest.raises(UserError, match=r"unknown metric 'ov_copyng'\. Did you mean ov_copying\? Allowed: "):
        resolve_claims(cell.task, cell.model, facts())


# --- from values to verdicts --------------------------------------------------------------------------------------


def verdict(values: np.ndarray, heads, direction: Direction = Direction.high, **other) -> dict:
    made = claims(mover=heads, **other)
    rows = all_rows([predicted(values, direction)], made, facts(*values.shape))
    subject = Subject("mover", None)
    return judge(subject, [predicted(values, direction)], rows_about(subject, [predicted(values)], rows, made), None)


def all_rows(predictions: list[Predicted], made: Claims, architecture: Architecture) -> list[NullTest]:
    """The corrected tests of a role and its heads under the nulls that compare heads."""
    rows = [row for prediction in predictions for row in role_rows(prediction, made, architecture, seed=0)]
    for prediction in predictions:
        for head in made.roles[prediction.role]:
            rows += head_rows(prediction, head, made, architecture)
    return correct(rows)


def grid(seed: int = 0, layers: int = 3, heads: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(layers, heads))


def test_heads_that_stand_out_are_corroborated_and_the_opposite_is_contradicted() -> None:
    values = grid()
    heads = [(1, 0), (1, 1), (2, 0), (2, 1)]
    for head in heads:
        values[head] = 10 + values[head]
    assert verdict(values, heads)["verdict"] == "corroborated"
    assert verdict(values, heads, Direction.low)["verdict"] == "contradicted"
    assert verdict(-values, heads, Direction.low)["verdict"] == "corroborated"
    assert verdict(-values, heads)["verdict"] == "contradicted"


def test_heads_in_the_middle_are_unsupported() -> None:
    values = np.tile(np.arange(9.0), (2, 1))
    assert verdict(values, [(0, 4), (1, 4), (1, 3)])["verdict"] == "unsupported"


def test_one_head_of_two_layers_of_eight_is_untestable_and_says_why() -> None:
    found = verdict(grid(layers=2), [(1, 0)])
    assert found["verdict"] == "untestable"
    assert "0.0625" in found["reason"] and "1 claimed head among 15 others" in found["reason"]


def test_where_its_layer_has_too_few_heads_a_role_is_judged_by_nearby_layers_and_says_so() -> None:
    values = grid(layers=10, heads=4)
    values[5, :2] = 100
    found = verdict(values, [(5, 0), (5, 1)])
    assert (found["verdict"], found["nulls"]) == ("corroborated", "depth")
    assert "not tested under layer" in found["reason"] and "0.167" in found["reason"]


def test_a_role_of_one_head_is_tested_once_and_has_its_heads_verdict_and_q() -> None:
    """With four more heads claimed, the head's q is five times its p; the role has no p of its own to be less."""
    values = grid()
    values[1, 0] = 100
    made, architecture = claims(mover=[(1, 0)], other=[(0, 0), (0, 1), (2, 0), (2, 1)]), facts(*values.shape)
    other = replace(predicted(values), role="other")
    rows = all_rows([predicted(values), other], made, architecture)
    assert {row.head for row in rows if row.role == "mover"} == {(1, 0)}
    assert any(row.head is None for row in rows if row.role == "other")
    subjects = Subject("mover", None), Subject("mover", (1, 0))
    about = [rows_about(subject, [predicted(values)], rows, made) for subject in subjects]
    role, head = (judge(subject, [predicted(values)], of, None) for subject, of in zip(subjects, about, strict=True))
    places = {"kind", "layer", "head"}
    assert {k: v for k, v in role.items() if k not in places} == {k: v for k, v in head.items() if k not in places}
    assert (role["kind"], role["layer"], head["kind"], head["layer"]) == ("role", None, "head", 1)
    assert role["q"] == pytest.approx(5 * role["p"]) and role["verdict"] == "unsupported"
    alone = claims(mover=[(1, 0)])
    rows = all_rows([predicted(values)], alone, architecture)
    found = judge(subjects[0], [predicted(values)], rows_about(subjects[0], [predicted(values)], rows, alone), None)
    assert (found["verdict"], found["nulls"], found["q"]) == ("corroborated", "depth", found["p"])
    assert found["reason"] == "not tested under spectrum: none can be had for it"  # nor does `layer` count for a head


def test_a_head_without_a_value_does_not_make_a_role_of_two() -> None:
    values = grid()
    values[0] = math.nan
    values[2, 3] = 100
    made = claims(mover=[(0, 1), (2, 3)])
    assert only_head(predicted(values), made) == (2, 3)
    assert only_head(predicted(grid()), made) is None
    assert only_head(predicted(np.full((3, 8), math.nan)), made) is None
    rows = all_rows([predicted(values)], made, facts(3, 8))
    assert {row.head for row in rows} == {(2, 3)}


def test_a_composition_is_tested_for_a_role_of_one_head_too() -> None:
    made = claims(mover=[(1, 0)])
    composed = Predicted("mover", PredictionConfig("k_composition", partners=["other"]), True, grid())
    assert only_head(composed, made) is None
    assert [row.null for row in role_rows(composed, made, facts(3, 8), 0)] == ["layer", "layer_all"]


def test_a_role_is_reported_for_kv_groups_too_where_heads_share_keys_and_values() -> None:
    values, heads = grid(layers=6), [(layer, head) for layer in range(6) for head in (0, 1)]
    for head in heads:
        values[head] += 100
    made = claims(mover=heads)
    for kv_heads, n_groups, said in ((4, 6, "AUC within layers 1.00, 1.00 for their 6 KV groups"), (8, 12, None)):
        shared = facts(6, 8, n_kv_heads=kv_heads)
        rows = correct(role_rows(predicted(values), made, shared, 0))
        found = judge(Subject("mover", None), [predicted(values)], rows, None)
        assert (found["n_groups"], found["group_effect"]) == (n_groups, 1.0)
        assert ("KV group" in found["establishes"]) == (said is not None) and (said or "") in found["establishes"]


def test_a_role_without_predictions_is_out_of_scope_and_one_without_values_untestable() -> None:
    assert judge(Subject("x", None), [], [], None)["verdict"] == "out_of_scope"
    nothing = predicted(np.full((3, 8), math.nan))
    assert role_rows(nothing, claims(mover=[(1, 0)]), facts(3, 8), 0) == []
    found = judge(Subject("mover", None), [nothing], [], "no embedding")
    assert (found["verdict"], found["reason"]) == ("untestable", "no embedding")


def test_a_significantly_opposite_secondary_makes_a_mixed_partial() -> None:
    values = grid()
    heads = [(1, 0), (1, 1), (2, 0), (2, 1)]
    for head in heads:
        values[head] += 10
    made = claims(mover=heads)
    pair = [predicted(values), predicted(values, Direction.low, primary=False)]
    rows = [row for prediction in pair for row in role_rows(prediction, made, facts(3, 8), 0)]
    rows = correct(rows)
    found = judge(Subject("mover", None), pair, rows, None)
    assert (found["verdict"], found["flags"]) == ("partial", "mixed")


def test_other_claimed_heads_leave_the_null_unless_the_list_is_unreliable() -> None:
    values = grid()
    made = claims(mover=[(1, 0), (1, 3)], other=[(1, 1), (1, 2)])
    counted = {row.null: row.n_others for row in role_rows(predicted(values), made, facts(3, 8), 0)}
    assert counted == {"layer": 4, "layer_all": 6, "depth": 20}
    unreliable = Claims("test", "unreliable", None, made.roles, {})
    counted = {row.null: row.n_others for row in role_rows(predicted(values), unreliable, facts(3, 8), 0)}
    assert counted == {"layer": 6, "layer_all": 6, "depth": 22}


def test_a_single_head_is_compared_with_unclaimed_heads_of_as_many_layers_as_hold_forty() -> None:
    values = grid(layers=9)
    values[3, 0] = 100
    rows = {row.null: row for row in head_rows(predicted(values), (3, 0), claims(mover=[(3, 0), (3, 1)]), facts(9, 8))}
    assert rows["layer"].n_null == 6 and rows["layer"].percentile == 1
    assert rows["depth"].n_null == 6 + 6 * 8  # 38 within two layers, so three on either side
    assert rows["depth"].p == pytest.approx(1 / 55)
    q = {row.null: row.q for row in correct(list(rows.values()))}
    assert q["depth"] == pytest.approx(1 / 55) and math.isnan(q["layer"])


@pytest.mark.parametrize("claimed", [1, 2, 4])
def test_the_depth_null_is_calibrated_whatever_the_number_of_unclaimed_heads(claimed) -> None:
    """iid heads: P(p <= a) <= a within its binomial interval."""
    rng = np.random.default_rng(claimed)
    heads = [(1, head) for head in range(claimed)]
    n, found = 600, []
    for _ in range(n):
        rows = head_rows(predicted(rng.normal(size=(4, 8))), (1, 0), claims(mover=heads), facts(4, 8))
        found += [row.p for row in rows if row.null == "depth"]
    assert len(found) == n
    for a in (0.05, 0.1, 0.25, 0.5):
        assert (np.array(found) <= a).mean() <= a + 3.5 * math.sqrt(a * (1 - a) / n), a


def depth_row(values: np.ndarray, head: tuple[int, int], made: Claims, **changes) -> NullTest:
    rows = head_rows(predicted(values), head, made, facts(*values.shape, **changes))
    return next(row for row in rows if row.null == "depth")


@pytest.mark.parametrize("claimed", [(1, 5), (1, 1), (4, 2)])
def test_how_the_heads_of_a_layer_are_numbered_changes_nothing(claimed) -> None:
    """Neither where the head's own layer is the smaller one, nor where its neighbour is."""
    rng = np.random.default_rng(3)
    values, seen = rng.normal(size=(3, 12)), []
    values[0, 9] = values[0, 10]  # a tie, which has no order of its own
    for _ in range(4):
        order = [rng.permutation(12) for _ in range(3)]
        moved = np.stack([row[at] for row, at in zip(values, order, strict=True)])
        numbered = [
            (layer, int(np.flatnonzero(order[layer] == h)[0])) for layer in (0, 1) for h in range(claimed[layer])
        ]
        seen.append(depth_row(moved, numbered[-1], claims(mover=numbered)))
    for name in ("p", "p_opposite", "percentile", "n_null"):
        assert len({round(getattr(row, name), 12) for row in seen}) == 1, name
    assert all(np.allclose(row.quantiles, seen[0].quantiles) for row in seen)


def test_nineteen_reference_heads_are_just_enough() -> None:
    """In a model with fewer groups than the window asks for, all of them are compared with: p = 1/20 is attainable."""
    made = claims(mover=[(2, h) for h in range(4)], other=[(1, 1)])
    row = depth_row(np.random.default_rng(0).normal(size=(3, 8)), (2, 0), made)
    assert row.n_null == 19 and row.min_p <= 0.05
    assert row.testable and row.exact


def test_one_head_left_in_its_layer_has_its_place_by_the_layers_beside_it() -> None:
    values = grid()
    values[1] = 3.0
    values[1, 0] = 100
    row = depth_row(values, (1, 0), claims(mover=[(1, head) for head in range(8)]))
    assert row.n_null == 16 and row.p == pytest.approx(1 / 17)


def test_the_percentile_of_a_head_is_its_place_in_its_own_layer() -> None:
    values = grid(layers=5)
    values[2, 0] = values[2, 1:].min() - 1
    made = claims(mover=[(2, 0)])
    prediction = predicted(values, Direction.low)
    rows = head_rows(prediction, (2, 0), made, facts(5, 8))
    rows = correct(rows)
    found = judge(Subject("mover", (2, 0)), [prediction], rows, None)
    assert found["percentile"] == 0 and found["value"] == values[2, 0]


def test_a_heads_place_in_its_layer_is_described_and_never_corrected_or_counted_however_many_heads_there_are() -> None:
    values = grid(layers=1, heads=30)
    layer, depth = correct(head_rows(predicted(values), (0, 3), claims(mover=[(0, 3)]), facts(1, 30)))
    assert layer.testable and not layer.counts and math.isnan(layer.q)
    assert depth.counts and depth.q == depth.p  # alone in its family


def test_percentiles_follow_the_metric_and_effects_the_prediction() -> None:
    """A low value predicted low: below the others, and beyond them."""
    values = grid(layers=5)
    values[2, 0] = values.min() - 1
    rows = head_rows(predicted(values, Direction.low), (2, 0), claims(mover=[(2, 0)]), facts(5, 8))
    assert [row.null for row in rows] == ["layer", "depth"]
    for row in rows:
        assert (row.percentile, row.effect, row.p) == (0, 1, 1 / (1 + row.n_null))
        assert row.quantiles[0] < row.quantiles[-1]


def test_the_first_layer_may_have_a_metric_of_its_own_and_direct_paths_end_there() -> None:
    values = {"a": np.ones((3, 2)), "b": np.full((3, 2), 2.0)}
    config = PredictionConfig("a", first_layer="b")
    assert predicted_values(config, values, facts(3, 2))[:, 0].tolist() == [2, 1, 1]
    direct = predicted_values(PredictionConfig("a", direct_only=True), values, facts(3, 2))
    assert not np.isnan(direct[0]).any() and np.isnan(direct[1:]).all()
    rotary = facts(3, 2, positions="rotary")
    assert not np.isnan(predicted_values(PredictionConfig("a", direct_only=True), values, rotary)).any()


def test_every_verdict_says_what_it_does_and_does_not_establish() -> None:
    values = grid()
    values[1, :4] += 10
    found = verdict(values, [(1, 0), (1, 1), (1, 2), (1, 3)])
    assert found["establishes"].startswith("The weights could do this: OV copying of task tokens is high")
    assert "does not establish that the model does this" in found["does_not_establish"]
    assert [s.head for s in subjects(claims(mover=[(1, 0), (2, 3)]))] == [None, (1, 0), (2, 3)]


def test_composition_of_components_is_predicted_as_exploratory_alone() -> None:
    task = compose("task=ioi").task
    (prediction,) = [p for p in task.roles["s_inhibition"].predictions if p.metric == "q_component_composition"]
    assert prediction.exploratory and METRICS["q_component_composition"].only_exploratory
    check_roles(task)
    prediction.exploratory = False
    with pytest.raises(UserError, match="no verdict rests on q_component_composition; allowed: the same"):
        check_roles(task)


def test_an_exploratory_composition_is_tested_and_has_no_q() -> None:
    from support.small import N_LAYERS, Random, high, run, task

    q = high("q_composition", partners=["mover"])
    roles = {"inhibition": [q, high("q_component_composition", partners=["mover"], exploratory=True)], "mover": []}
    claims = {"inhibition": ["0.1", "1.2"], "mover": [f"{N_LAYERS - 1}.3"]}
    tests = run(Random(), task(roles=roles, claims=claims)).tables["tests"]
    ours = tests[tests["metric"] == "q_component_composition"]
    assert len(ours) and ours["q"].isna().all() and ours["p"].between(0, 1).all()
    plain = run(Random(), task(roles={"inhibition": [q], "mover": []}, claims=claims)).tables["tests"]
    rest = tests[tests["metric"] != "q_component_composition"].reset_index(drop=True)
    assert rest[["value", "p", "q"]].equals(plain[["value", "p", "q"]])
