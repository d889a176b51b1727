"""Known truth: heads built by hand are found, others are not, and a model that does not do the task is not judged."""

import numpy as np
import pytest
import torch
from support.models import KINDS, local, randomise, shared_model
from support.planted_runs import HEADS, Ran, cell, run_model, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from ovqk.activations.forward import Places, RunningModel
from ovqk.checkpoints.opening import open_checkpoint

SEEDS = 50


def ran(folder, seed: int, planted, *overrides: str) -> Ran:
    config = cell(seed, *overrides)
    file = folder / f"{seed}.safetensors"
    write_model(file, len(config.task.words["content"]) + 1, seed, planted)
    return run_model(file, config)


def places(seed: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, seed % HEADS), (1, seed // HEADS % HEADS)


@pytest.mark.parametrize("seed", [0, 5])
def test_planted_heads_are_measured_and_no_others(tmp_path, seed) -> None:
    previous, induction = places(seed)
    found = ran(tmp_path, seed, (previous, induction), "activations.prompts=128")
    assert found.judged.measured == {"induction": [induction], "previous_token": [previous]}
    rows = found.judged.roles.set_index("role")
    assert (rows["verdict"] == "realised").all()
    assert rows.at["induction", "effect"] == pytest.approx(1, abs=0.05)  # nothing else predicts the answer
    assert rows.at["induction", "effect_restored"] == pytest.approx(1, abs=0.05)
    assert rows.at["previous_token", "effect"] == pytest.approx(1, abs=0.05)
    assert rows.at["induction", "write_from_source"] == pytest.approx(rows.at["induction", "write"], rel=0.05)
    assert rows.at["induction", "write_link"] > 0.9  # it moves the token that it looks at
    assert found.measured.change < 1e-5 and found.measured.observed.readout_error < 1e-5


@pytest.mark.slow
def test_planted_heads_are_found_at_every_seed(tmp_path) -> None:
    wrong = 0
    for seed in range(SEEDS):
        previous, induction = places(seed)
        found = ran(tmp_path, seed, (previous, induction), "activations.prompts=128").judged.measured
        assert induction in found["induction"] and previous in found["previous_token"]
        wrong += sum(map(len, found.values())) - 2
    assert wrong <= 2  # of 50 models, in which the tests of roles have been right throughout


def test_a_model_that_does_not_do_the_task_is_untestable(tmp_path) -> None:
    judged = ran(tmp_path, 1, None, "activations.prompts=64").judged
    assert judged.gate.startswith("the model does not do the task (accuracy ")
    assert judged.measured == {} and not len(judged.roles)
    assert len(judged.activations)  # what was seen stays


@pytest.mark.slow
def test_writes_of_random_heads_are_significant_as_often_as_the_level_says(tmp_path) -> None:
    """Answers and foils are drawn alike, so that no head of a random model prefers either."""
    p = np.concatenate(
        [
            ran(tmp_path, seed, None, "activations.prompts=96").measured.rows("induction", "testing")["write_p"]
            for seed in range(SEEDS)
        ]
    )
    for level in (0.05, 0.2):
        # heads of one model share prompts: as few as SEEDS independent ones
        assert abs((p <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / SEEDS)


SHAPES = {
    "gpt2": {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4},
    "llama": {"max_position_embeddings": 32, "num_hidden_layers": 3},
    "gpt_neox": {"max_position_embeddings": 32, "num_hidden_layers": 2},
}
MODELS = 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_p_of_untrained_models_are_at_their_level_in_three_shapes(tmp_path, kind) -> None:
    """Earlier occurrences mean nothing to them, answers and foils are drawn alike: no quantity has a side.

    Attention less that on the counterfactual, the write and the effect, of all heads; and no role is measured.
    """
    found: dict[str, list[np.ndarray]] = {"attention": [], "write": [], "effect": []}
    for seed in range(MODELS):
        config = cell(seed, "activations.prompts=64", "activations.screened=12")
        config.task.roles["induction"].activations.attention.beyond = ["counterfactual"]
        vocabulary = len(config.task.words["content"]) + 1
        plain = AutoConfig.for_model(kind, **KINDS[kind] | SHAPES[kind] | {"vocab_size": vocabulary})
        directory = tmp_path / str(seed)
        randomise(AutoModelForCausalLM.from_config(plain), seed).save_pretrained(directory)
        result = run_model(directory, config)
        assert not any(result.judged.measured.values())
        rows = result.measured.rows("induction", "testing")
        for quantity, values in found.items():
            values.append(rows[f"{quantity}_p"].to_numpy())
    for quantity, values in found.items():
        p = np.stack(values)
        assert np.isfinite(p).all()
        for level in (0.05, 0.2):
            # heads of one model share prompts and streams: as few as MODELS independent ones
            share = (p <= level).mean()
            assert abs(share - level) < 3 * np.sqrt(level * (1 - level) / MODELS), f"{quantity}: {share} at {level}"


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
