"""Known truth: heads built by hand are found, others are not, and a model that does not do the task is not judged."""

import pandas as pd
import pytest
import torch
from support.models import local, shared_model
from support.planted_runs import cell

from ovqk.activations.forward import Places, RunningModel
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.testing.null_models import SURPRISE, least_likely
from ovqk.testing.prompted_models import (
    COPYING,
    HEADS,
    MANY,
    UNTRAINED,
    Ran,
    places,
    planted_run,
    run_model,
    untrained,
    with_copying,
    write_model,
)  # fmt: skip

SEEDS = 50
UNTRAINED_SEEDS = 8


def ran(folder, seed: int, planted, *overrides: str) -> Ran:
    config = with_copying(cell(seed, *overrides))
    file = folder / f"{seed}.safetensors"
    write_model(file, len(config.task.words["content"]) + 1, seed, planted)
    return run_model(file, config)


@pytest.mark.parametrize("seed", [0, 5])
def test_planted_heads_are_measured_and_no_others(tmp_path, seed) -> None:
    planted = places(seed)
    found = ran(tmp_path, seed, list(planted.values()), "activations.prompts=128")
    assert found.judged.measured == {role: [head] for role, head in planted.items()}
    rows = found.judged.roles.set_index("role")
    assert (rows["verdict"] == "realised").all()
    assert rows.at["induction", "effect"] == pytest.approx(1, abs=0.05)  # nothing else predicts the answer
    assert rows.at["induction", "effect_restored"] == pytest.approx(1, abs=0.05)
    assert rows.at["previous_token", "effect"] == pytest.approx(1, abs=0.05)
    assert rows.at["induction", "write_from_source"] == pytest.approx(rows.at["induction", "write"], rel=0.05)
    assert rows.at["induction", "write_link"] > 0.9  # it moves the token that it looks at
    assert rows.at[COPYING, "attention"] == pytest.approx(0.5, abs=0.05)  # the other half goes to END itself
    assert rows.at[COPYING, "write_from_source"] == pytest.approx(rows.at[COPYING, "write"] / 2, rel=0.1)
    if (
        planted[COPYING][0] == 0
    ):  # later layers read what random heads added to the token, which is most of its variance
        assert rows.at[COPYING, "write_link"] > 0.9
    assert found.measured.change < 1e-5 and found.measured.observed.readout_error < 1e-5
    assert found.measured.downstream == 0


@pytest.mark.slow
def test_planted_heads_are_found_at_every_seed(many_cells) -> None:
    found = pd.concat(many_cells(planted_run, [(HEADS, seed) for seed in range(SEEDS)]))
    assert found["measured"].all() and set(found["verdict"]) == {"realised"}
    assert not found["others"].any()  # of 50 models with 5 random heads each, and 3 roles


@pytest.mark.slow
def test_a_planted_head_stands_out_of_many() -> None:
    found = planted_run((MANY, 3))
    assert set(found["verdict"]) == {"realised"} and (found["head_p"] < 0.03).all() and (found["role_p"] < 0.05).all()


@pytest.mark.slow
def test_p_values_on_prompts_keep_their_level_in_untrained_models(many_cells) -> None:
    """Of each kind one p-value a model, as docs/calibration.md counts them, and all kinds together."""
    cells = [(shape, seed) for shape in UNTRAINED for seed in range(UNTRAINED_SEEDS)]
    rows = pd.concat(many_cells(untrained, cells))
    models = rows.drop_duplicates(["shape", "seed"])
    assert models["chosen"].sum() <= 2  # heads that get a role: 2 of 8,960 in the page, of five times as many models
    null = rows[rows["is_null"]]
    for quantity, own in null.groupby("quantity"):
        for p in ("p", "p_opposite"):
            values = own[p].dropna().to_numpy()
            if len(values):
                _, share, probability = least_likely(values)
                assert probability > SURPRISE, f"{p} of {quantity}: {share} (binomial tail {probability:.1e})"
    for name, own in null.groupby(null["quantity"].str.startswith("peers")):
        n = int(own["p"].notna().sum())
        for level in (0.05, 0.2):
            share = (own["p"] <= level).sum() / n
            assert share < level + 3 * (level * (1 - level) / n) ** 0.5, f"{'peers' if name else 'flips'}: {share}"


def test_a_model_that_does_not_do_the_task_is_untestable(tmp_path) -> None:
    judged = ran(tmp_path, 1, None, "activations.prompts=64").judged
    assert judged.gate.startswith("the model does not do the task (accuracy ")
    assert judged.measured == {} and not len(judged.roles)
    assert len(judged.activations)  # what was seen stays


def test_the_heads_of_a_trained_attention_only_model_do_what_is_known_of_them() -> None:
    file = shared_model("nanda-induction-2l-infinite") / "model.safetensors"
    running = RunningModel.load(open_checkpoint(local(file)), local(file, causal=True), torch.device("cpu"))
    part = torch.randint(0, 128, (64, 16), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([part, part, part], 1)
    ends = torch.arange(16, 47)
    run = running.run(tokens, Places(ends[:, None].expand(-1, 64), ends[:1, None].expand(-1, 64)))
    after = torch.stack([run.patterns[:, :, :, i, int(end) - 15].mean(1) for i, end in enumerate(ends)]).mean(0)
    before = torch.stack([run.patterns[:, :, :, i, int(end) - 1].mean(1) for i, end in enumerate(ends)]).mean(0)
    assert sorted(after[1].topk(3).indices.tolist()) == [1, 2, 3] and after[1, 1:].min() > 0.15
    assert after[0].max() < 0.1
    assert int(before.flatten().argmax()) == 2 and before[0, 2] > 0.2
