"""What a cell will take: counted operations, headers without weights, and a command that says so."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.hub_models import model, shard
from support.models import BUNDLED, local

from ovqk import fetch
from ovqk import plan as planning
from ovqk.checkpoints.opening import open_checkpoint, survey_checkpoint
from ovqk.checkpoints.tensors import ShapesAlone
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.plan import Rates, Sizes, main, measure_rates, plan_of, sizes_of
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_weights

GPT2 = Sizes(12, 12, 12, 768, 64, 50257, 3072, False, True, False, True, False, 3)


def test_products_of_a_small_model_are_counted_one_by_one() -> None:
    """GPT-2's block 0 and Gram, product by product, written out with numbers."""
    found = plan_of(GPT2).operations
    mlp = 2 * 50257 * 768 * 3072 + 2 * 50257 * 3072 * 768
    attention = 2 * 50257 * 768 * 768  # all heads of block 0 in one product from row to row
    assert found["block 0 of every token"] == mlp + attention
    assert found["Grams of the vocabulary"] == 50257 * 768 * 768  # symmetric, tied: half of a product
    assert found["lists of tokens"] == 144 * 8 * 3 * 2 * 50257 * 768
    assert plan_of(GPT2._replace(n_layers=1)).operations["Grams of block 0"] == 0


@given(
    st.sampled_from(["n_layers", "n_heads", "d_model", "d_head", "n_vocab", "d_mlp", "components"]),
    st.integers(2, 4),
)
def test_a_larger_model_never_takes_less(size, times) -> None:
    larger = GPT2._replace(**{size: times * getattr(GPT2, size)})
    rates = Rates(1e11, dict.fromkeys(("eigenvalues", "singular values", "singular vectors"), 1e-3), 2)
    small, large = plan_of(GPT2), plan_of(larger)
    assert large.total >= small.total and large.memory >= small.memory and large.written >= small.written
    assert rates.seconds(large) >= rates.seconds(small) > 0


def test_sizes_are_those_of_the_tensors() -> None:
    checkpoint = open_checkpoint(local(BUNDLED))
    sizes = sizes_of(open_weights(checkpoint, local(BUNDLED)), checkpoint.shapes, 3)
    config = json.loads((BUNDLED / "config.json").read_text())
    assert (sizes.n_layers, sizes.n_heads, sizes.n_vocab) == (config["n_layer"], config["n_head"], config["vocab_size"])
    assert sizes.d_mlp in (0, 4 * sizes.d_model) and not sizes.gated and sizes.learned and not sizes.rotary


def test_a_block_0_that_cannot_be_read_costs_nothing() -> None:
    """Without its MLP's tensors, as among experts, cells have no block0 embeddings and none of their Grams."""
    checkpoint = open_checkpoint(local(BUNDLED.parent / "mini-llama"))
    source = open_weights(checkpoint, local(BUNDLED.parent / "mini-llama"))
    alone = {name: shape for name, shape in checkpoint.shapes.items() if ".mlp." not in name}
    whole, without = (sizes_of(source, shapes, 3) for shapes in (checkpoint.shapes, alone))
    assert whole.block0 and whole.d_mlp > 0 and not without.block0 and without.d_mlp == 0
    plan, less = plan_of(whole), plan_of(without)
    assert less.operations["Grams of block 0"] == less.operations["block 0 of every token"] == 0
    assert less.operations["Grams times heads"] < plan.operations["Grams times heads"]
    assert less.decompositions["eigenvalues"] == 4 / 5 * plan.decompositions["eigenvalues"]
    assert less.memory < plan.memory


def test_a_survey_fetches_no_weights(hub, wide) -> None:
    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    hub.hold(wide)
    checkpoint, found = survey_checkpoint(model(), 20.0, tensors_read)
    weights = sum(len(data) for name, data in hub.files.items() if name.endswith(".safetensors"))
    read = sum(hub.bytes_of(name) for name in hub.files if name.endswith(".safetensors"))
    assert 0 < read < 0.05 * weights and found.whole == weights and 0 < found.to_fetch < weights
    there = open_weights(open_checkpoint(local(wide)), local(wide)).architecture
    assert open_weights(checkpoint, model()).architecture == there
    with pytest.raises(UserError, match="only its shape was asked for"):
        checkpoint.tensor(next(iter(checkpoint.shapes)))
    hub.requests.clear()
    opened = open_checkpoint(model(), 20.0, tensors_read)
    assert set(opened.shapes) <= set(checkpoint.shapes)
    again = survey_checkpoint(model(), 20.0, tensors_read)[1]
    assert again.to_fetch == 0 and again.whole == weights


def test_embeddings_that_were_not_fetched_are_tied_as_the_config_says() -> None:
    path = BUNDLED.parent / "mini-llama"
    checkpoint = open_checkpoint(local(path))
    shapes = dict(checkpoint.shapes) | {"lm_head.weight": checkpoint.shapes["model.embed_tokens.weight"]}
    for tied in (True, False):
        config = checkpoint.config | {"tie_word_embeddings": tied}
        alone = type(checkpoint)("x", path, config, ShapesAlone(shapes), "")
        assert open_weights(alone, local(path)).architecture.tied is tied


def test_the_command_tells_memory_operations_and_time(capsys) -> None:
    main(["mini-gpt2", "analysis.components=0"])
    said = capsys.readouterr().out
    for part in ("on this machine", "4 layers of 8 heads", "memory ", "operations ", "GFLOP/s", "time "):
        assert part in said
    assert all(len(line) < 200 for line in said.splitlines()) and "GPU" not in said


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_plan_for_a_gpu_says_that_its_time_is_the_processors(capsys, device) -> None:
    main(["mini-gpt2", "analysis.components=0", f"device={device}"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "GPU" in line)
    assert line.startswith(f"device={device}: the time and the memory are those of the processor")


def test_a_model_that_is_loaded_whole_is_not_timed(monkeypatch, capsys) -> None:
    monkeypatch.setattr("ovqk.weights.families.family_of", lambda config: None)
    with pytest.raises(SystemExit) as ended:
        main(["mini-gpt2"])
    assert ended.value.code == 1
    assert "loaded whole through TransformerLens" in capsys.readouterr().err


def test_rates_are_measured_and_threads_left_as_they_were() -> None:
    before = torch.get_num_threads()
    rates = measure_rates(128, 16)
    assert torch.get_num_threads() == before == rates.threads
    assert 1e8 < rates.products < 1e14 and all(0 < value < 1 for value in rates.decompositions.values())
    assert planning.START_UP > 0


def test_wide_heads_are_not_decomposed_to_be_timed() -> None:
    started = time.perf_counter()
    rates = measure_rates(128, 65_536)
    assert time.perf_counter() - started < 30 and rates.decompositions["eigenvalues"] > 60


def test_the_hub_is_asked_for_a_repository() -> None:
    with pytest.raises(UserError, match=r"model\.repo: not set"):
        survey_checkpoint(ModelConfig(name="x", source=Source.hub), 1.0)


@pytest.mark.parametrize("command", [main, fetch.main])
def test_without_a_model_only_the_model_is_missed(command, capsys) -> None:
    with pytest.raises(SystemExit):
        command([])
    assert capsys.readouterr().err.strip().endswith("the following arguments are required: model")
