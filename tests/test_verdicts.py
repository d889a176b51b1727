"""The decision list of verdicts, case by case, and what a verdict says in words."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from ovqk import wording
from ovqk.config.schema import PredictionConfig
from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.nulls import Predicted
from ovqk.verdicts.verdict import Subject, judge

PRIMARY, SECONDARY = PredictionConfig("ov_task_auc"), PredictionConfig("ov_task_copy")
HELD, OPPOSITE, NEITHER, UNTESTABLE = "held", "opposite", "neither", "untestable"


def a_row(null: str, state: str, primary: bool = True, counts: bool = True, **changes) -> NullTest:
    """A row of tests.parquet."""
    q, q_opposite = {HELD: (0.01, 1.0), OPPOSITE: (1.0, 0.01), NEITHER: (0.5, 0.5), UNTESTABLE: (math.nan,) * 2}[state]
    row = NullTest(
        "mover", (1, 0), "ov_task_auc", "high", primary, False, null, counts, value=0.7, percentile=0.9, effect=0.9,
        p=q, p_opposite=q_opposite, min_p=0.001 if state != UNTESTABLE else 0.125, n_null=8 if null == "layer" else 7,
        exact=True, n_heads=1, n_others=7, quantiles=(), q=q, q_opposite=q_opposite, min_q=0.002,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def decided(rows: list[NullTest], head: bool = True) -> dict:
    pair = [Predicted("mover", config, not i, np.ones((2, 2))) for i, config in enumerate((PRIMARY, SECONDARY))]
    return judge(Subject("mover", (1, 0) if head else None), pair, rows, None)


def expected(states: dict[str, str], secondary: str | None) -> tuple[str, str]:
    """The definitions' list, first match wins: (verdict, flags)."""
    testable = {null: state for null, state in states.items() if state != UNTESTABLE}
    held = {null for null, state in testable.items() if state == HELD}
    opposed = {null for null, state in testable.items() if state == OPPOSITE}
    against = bool(opposed)
    if not testable:
        return "untestable", ""
    if opposed - {"spectrum"} and not held - {"spectrum"}:
        return "contradicted", ""
    if len(held) == len(testable) and set(testable) - {"spectrum"} and secondary != OPPOSITE:
        return "corroborated", ""
    if held:
        flags = ["mixed"] if against or secondary == OPPOSITE else []
        return "consistent" if held == {"spectrum"} else "partial", " ".join(flags)
    return "unsupported", "spectrum" if against else ""


@pytest.mark.parametrize("secondary", [None, HELD, OPPOSITE, NEITHER, UNTESTABLE])
@pytest.mark.parametrize(
    "nulls", [("depth", "spectrum"), ("layer", "spectrum"), ("depth", "spectrum", "token"), ("layer",)]
)
def test_the_decision_list_for_every_state_of_every_null_that_counts(nulls, secondary) -> None:
    seen = set()
    for states in itertools.product([HELD, OPPOSITE, NEITHER, UNTESTABLE], repeat=len(nulls)):
        by_null = dict(zip(nulls, states, strict=True))
        rows = [a_row(null, state) for null, state in by_null.items()]
        rows += [a_row(nulls[0], secondary, primary=False)] if secondary else []
        for null in ("layer_all", "token"):  # what does not count decides nothing, whichever way it points
            if null not in nulls:
                rows += [a_row(null, state, counts=False) for state in (HELD, OPPOSITE)]
        found = decided(rows, head="layer" not in nulls)
        assert (found["verdict"], found["flags"]) == expected(by_null, secondary), by_null
        assert found["nulls"] == ", ".join(null for null, state in by_null.items() if state != UNTESTABLE)
        assert found["held"] == ", ".join(null for null, state in by_null.items() if state == HELD)
        assert found["opposed"] == ", ".join(null for null, state in by_null.items() if state == OPPOSITE)
        seen.add(found["verdict"])
    assert seen >= {"contradicted", "unsupported", "untestable"}
    assert ("corroborated" in seen) == (secondary != OPPOSITE)


SAID = {
    HELD: "high against {null} (q = 0.01, beyond 90% of them)",
    OPPOSITE: "not high but low against {null} (q = 0.01, beyond 90% of them)",
    NEITHER: "not significantly high against {null} (q = 0.5, beyond 90% of them)",
}


@pytest.mark.parametrize("frame", [HELD, OPPOSITE, NEITHER])
@pytest.mark.parametrize("depth", [HELD, OPPOSITE, NEITHER])
def test_a_verdict_says_of_every_null_which_way_it_came_out(depth, frame) -> None:
    found = decided([a_row("depth", depth), a_row("spectrum", frame)])
    said = [
        SAID[depth].format(null="the unclaimed heads of nearby layers"),
        SAID[frame].format(null="heads of the same singular values between random frames"),
    ]
    assert f"OV copying of task tokens is {said[0]}, and {said[1]}." in found["establishes"]
    opening = {
        "corroborated": "The weights could do this:",
        "partial": "Some evidence that the weights could do this:",
        "consistent": "Consistent with the claim and no more",
        "unsupported": "The weights do not single this out:",
        "contradicted": "The weights point the other way:",
    }[found["verdict"]]
    if found["flags"] == "spectrum":
        opening = "The weights do not single this out, and point the other way against heads of the same spectrum only"
    assert (found["flags"] == "spectrum") == ((depth, frame) == (NEITHER, OPPOSITE))
    assert found["q_opposite"] == min({HELD: 1.0, OPPOSITE: 0.01, NEITHER: 0.5}[state] for state in (depth, frame))
    assert found["establishes"].startswith(opening)
    assert found["does_not_establish"]


def test_of_a_role_the_effect_within_layers_is_said_to_be_an_auc() -> None:
    said = decided([a_row("layer", NEITHER), a_row("spectrum", HELD)], head=False)["establishes"]
    assert (
        "not significantly high against the unclaimed heads of the same layers (q = 0.5, AUC within layers 0.90)"
        in said
    )
    assert "high against heads of the same singular values between random frames (q = 0.01, beyond 90% of them)" in said


def test_what_could_not_be_significant_alone_is_not_said_to_be_small() -> None:
    """The highest head of its layers, whose q could not have been lower."""
    row = a_row("depth", NEITHER, q=0.14, min_q=0.29, effect=1.0)
    said = decided([row, a_row("spectrum", HELD)])["establishes"]
    assert (
        "significantly high against the unclaimed heads of nearby layers (q = 0.14, alone it could not be below 0.29"
        in said
    )


def test_the_percentile_of_a_verdict_is_within_the_layer_and_its_q_the_weakest() -> None:
    rows = [a_row("layer", HELD, counts=False, percentile=0.3, effect=0.4, min_p=1.0),
            a_row("depth", HELD, q=0.03, p=0.02), a_row("spectrum", HELD)]  # fmt: skip
    found = decided(rows)
    assert (found["percentile"], found["effect"], found["q"], found["p"]) == (0.3, 0.4, 0.03, 0.02)


def test_where_all_other_heads_of_the_layer_are_claimed_there_is_no_percentile() -> None:
    """That of another null is among other things than the heads of the layer."""
    found = decided([a_row("spectrum", HELD)])
    assert [found[name] for name in ("percentile", "effect", "ci_low", "ci_high")] == [None] * 4
    assert (found["value"], found["q"]) == (0.7, 0.01)


def test_a_head_of_a_role_that_composes_is_said_to_be_tested_with_its_role() -> None:
    pair = [Predicted("previous", PredictionConfig("k_composition", partners=["induction"]), True, np.ones((2, 2)))]
    found = judge(Subject("previous", (0, 0)), pair, [a_row("layer", HELD, counts=False)], None)
    assert (found["verdict"], found["reason"]) == ("untestable", "k_composition is tested for the role as a whole")
    assert (found["value"], found["percentile"]) == (0.7, 0.9)  # described all the same


def test_a_verdict_that_could_not_be_significant_alone_says_so_and_under_what() -> None:
    begins, ends = f"{wording.ALONE} ", ", whatever its value"
    found = decided([a_row("depth", NEITHER, min_q=0.07), a_row("spectrum", NEITHER, min_q=0.06)])
    wanted = f"{begins}q = 0.07 under depth, q = 0.06 under spectrum{ends}"
    assert (found["verdict"], found["reason"]) == ("unsupported", wanted)
    found = decided([a_row("depth", NEITHER, min_q=0.07), a_row("spectrum", HELD)])
    assert (found["verdict"], found["reason"]) == ("consistent", f"{begins}q = 0.07 under depth{ends}")
    assert decided([a_row("depth", NEITHER), a_row("spectrum", NEITHER)])["reason"] == ""


def test_the_least_q_of_a_verdict_is_that_of_the_nulls_that_do_not_hold() -> None:
    """Also if another null is less significant: `depth` could not have favoured this head alone."""
    powerless, weakest = a_row("depth", NEITHER, q=0.14, min_q=0.36), a_row("spectrum", NEITHER, q=0.8)
    found = decided([powerless, weakest])
    assert (found["q"], found["min_q"]) == (0.8, 0.36)
    assert wording.ALONE in found["reason"]
    held = dataclasses.replace(powerless, q=0.04)  # beside others that stand out as much
    found = decided([held, weakest])
    assert (found["q"], found["min_q"], found["reason"]) == (0.8, weakest.min_q, "")
    assert decided([held, a_row("spectrum", HELD)])["min_q"] == 0.36
    assert decided([a_row("depth", UNTESTABLE)])["min_q"] is None


def test_a_verdict_names_the_nulls_that_count_and_could_not_decide() -> None:
    """Few draws, or a head that has no such null, do not make a claim look better tested than it is."""
    few = a_row("spectrum", UNTESTABLE, min_p=1 / 6, n_others=5)
    depth = a_row("depth", HELD)
    found = decided([a_row("layer", HELD), depth, few], head=False)
    assert (found["verdict"], found["nulls"]) == ("corroborated", "layer, depth")
    assert found["reason"] == "not tested under spectrum: the smallest p with 5 draws is 0.167"
    assert found["establishes"].endswith(f" It is {found['reason']}.")
    both = decided([a_row("layer", HELD), depth, few, dataclasses.replace(few, null="token")], head=False)["reason"]
    assert both == found["reason"].replace("spectrum", "spectrum, token")
    found = decided([a_row("layer", HELD), depth], head=False)
    assert (found["verdict"], found["reason"]) == ("corroborated", "not tested under spectrum: none can be had for it")
    crowded = a_row("layer", UNTESTABLE, n_heads=2)
    found = decided([crowded, depth, a_row("spectrum", HELD)], head=False)
    assert found["verdict"] == "corroborated"  # by heads of nearby layers, where those of its own are too few
    assert found["reason"] == "not tested under layer: the smallest p with 2 claimed heads among 7 others is 0.125"
    assert decided([a_row("depth", HELD), a_row("spectrum", HELD)])["reason"] == ""


def test_an_untestable_claim_says_what_keeps_its_p_large() -> None:
    begins = "no null can reach p <= 0.05: the smallest p with "
    ties = a_row("layer", UNTESTABLE, min_p=9 / 144, n_null=144, n_heads=2, n_others=22)
    found = decided([ties], head=False)["reason"]
    assert found == f"{begins}2 claimed heads among 22 others (the best labelings tie) is 0.0625"
    grouped = a_row("depth", UNTESTABLE, min_p=1 / 7, n_null=6, n_others=11)
    assert decided([grouped])["reason"] == f"{begins}1 claimed head among 11 others (in 6 KV groups) is 0.143"


def test_a_contradiction_shows_its_evidence() -> None:
    """The column q is of the predicted direction, and 1 here."""
    found = decided([a_row("depth", OPPOSITE), a_row("spectrum", NEITHER)])
    assert (found["verdict"], found["q"]) == ("contradicted", 1.0)
    assert found["reason"] == "significant the other way: q = 0.01 under depth"


def test_random_heads_of_the_same_spectrum_alone_neither_bear_a_claim_out_nor_contradict_it() -> None:
    """A head in the middle of its peers is no contradiction; one below them is, whatever random heads do."""
    found = decided([a_row("depth", NEITHER), a_row("spectrum", OPPOSITE)])
    assert (found["verdict"], found["flags"]) == ("unsupported", "spectrum")
    assert found["reason"].startswith("significant the other way: q = 0.01 under spectrum")
    assert decided([a_row("spectrum", OPPOSITE)])["verdict"] == "unsupported"
    below = decided([a_row("depth", OPPOSITE), a_row("spectrum", HELD)])
    assert (below["verdict"], below["flags"], below["held"]) == ("contradicted", "", "spectrum")


@pytest.mark.parametrize(
    ("effect", "said"), [(1.0, "100%"), (0.996, "more than 99%"), (0.004, "less than 1%"), (0.0, "0%")]
)
def test_all_and_none_of_them_are_said_only_where_it_is_so(effect, said) -> None:
    assert f"beyond {said} of them)" in decided([a_row("depth", HELD, effect=effect)])["establishes"]
