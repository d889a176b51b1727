"""Measured roles as claims: the block that a script writes from a cell, and which metric finds them."""

import numpy as np
import pandas as pd
import pytest
import yaml
from support.scripts import script

from ovqk.config.schema import PredictionConfig
from ovqk.tasks.claims import Claims
from ovqk.weights.types import Architecture

evidence = script("evidence")
measured_claims = script("measured_claims")


def record_of(claims: str | None = "measured", untestable: str = "", ran: bool = True) -> dict:
    roles = {
        "mover": {"activations": {"decides": ["attention", "write"]}},
        "server": {"activations": {"decides": ["effect"]}},
    }
    halves = {"choosing": {"prompts": 90}, "testing": {"prompts": 110}}
    return {
        "model": "mine", "task": "names", "analysis": "activations" if ran else "b03", "seed": 3,
        "summary": {"n_layers": 2, "n_heads": 8},
        "activations": {"halves": halves, "untestable": untestable} if ran else None,
        "provenance": {"config": {"model": {"claims": claims}, "task": {"roles": roles}}},
    }  # fmt: skip


def roles_table() -> pd.DataFrame:
    mover = {"attention": 0.6123, "attention_control": 0.1, "attention_p": 1e-6, "attention_q": 0.00391}
    mover |= {"write": 1.5, "write_share": 0.25, "write_p": 0.01, "write_q": 0.02}
    server = {"effect": 0.4, "effect_mean_replacement": float("nan"), "effect_p": 0.001, "effect_q": 0.002}
    return pd.DataFrame(
        [
            {"role": "mover", "layer": 1, "head": 3, "measured": True, **mover},
            {"role": "mover", "layer": 1, "head": 2, "measured": False, **mover},
            {"role": "server", "layer": 0, "head": 1, "measured": True, **server},
        ]
    )


def test_the_block_of_a_cell_holds_its_measured_heads_and_their_evidence() -> None:
    (found,) = yaml.safe_load(measured_claims.claims_block(record_of(), roles_table())).items()
    evidence = {
        "mover": {
            "1.3": {
                "attention": 0.612, "attention_control": 0.1, "attention_p": 0.0001, "attention_q": 0.004,
                "write": 1.5, "write_share": 0.25, "write_p": 0.01, "write_q": 0.02,
            }
        },
        "server": {"0.1": {"effect": 0.4, "effect_p": 0.001, "effect_q": 0.002}},
    }  # fmt: skip
    assert found == (
        "mine",
        {
            "source": "measured on 200 prompts, seed 3", "reliability": "measured", "shape": [2, 4],
            "roles": {"mover": ["1.3"], "server": ["0.1"]}, "evidence": evidence,
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "rows", "said"),
    [
        (record_of(ran=False), 3, "analysis=b03 did not run the model; use analysis=activations"),
        (record_of(claims="gpt2"), 3, "measured beside claimed heads; run the cell with model.claims=measured"),
        (record_of(untestable="the model does not do the task"), 3, "the model does not do the task"),
        (record_of(), 0, "no head has a role by measurement"),
    ],
)
def test_a_cell_that_cannot_be_claims_says_why(record, rows, said) -> None:
    with pytest.raises(ValueError, match=f"mine / names: {said}"):
        measured_claims.claims_block(record, roles_table()[:rows])


def test_a_metric_that_finds_a_role_has_auc_one_and_its_negation_zero() -> None:
    values = np.zeros((2, 4))
    values[1, 2:] = 1
    claims = Claims("", "measured", None, {"mover": [(1, 2), (1, 3)]}, {"mover": [PredictionConfig("ov_copying")]})
    facts = Architecture("test", 2, 4, 4, 8, 2, None, "none", 1e-5, "none")
    model = evidence.Measured("m", {"ov_copying": values}, claims, facts)
    assert "| **`ov_copying`** ↑ | 1.00 | 1.00 [1.00, 1.00] | 0.17 |" in evidence.table([model], "mover")
    flipped = evidence.Measured("m", {"ov_copying": -values}, claims, facts)
    assert "| 0.00 | 0.00 [0.00, 0.00] | 1 |" in evidence.table([flipped], "mover")
    assert "| 1.00 | 0.00 | 0.50 [" in evidence.table([model, flipped], "mover")


def test_a_role_that_leaves_no_other_head_to_compare_with_has_no_table() -> None:
    every = Claims("", "measured", None, {"mover": [(0, 0), (0, 1)]}, {"mover": [PredictionConfig("ov_copying")]})
    facts = Architecture("test", 1, 2, 2, 8, 2, None, "none", 1e-5, "none")
    assert evidence.table([evidence.Measured("m", {"ov_copying": np.eye(1, 2)}, every, facts)], "mover") == ""
