"""Folding against TransformerLens, and rotations."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import BUNDLED, local, make_gpt2, make_llama, shared_model

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.weights.folding import fold_embeddings, fold_layer, fold_reads
from ovqk.weights.norms import Norm
from ovqk.weights.readers import open_weights
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture, LayerWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformer_lens and transformers warn about their own plans
]


def boot(path):
    from transformer_lens.model_bridge import TransformerBridge

    from ovqk.weights.bridge_loading import unused_tokenizer

    with unused_tokenizer() as tokenizer:
        return TransformerBridge.boot_transformers(str(path), device="cpu", tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_llama", "mini-attn"])
def path(request):
    return BUNDLED if request.param == "mini-attn" else request.getfixturevalue(request.param)


def test_folding_equals_transformer_lens_compatibility_mode(path) -> None:
    bridge = boot(path)
    bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False, center_unembed=False)
    source = open_weights(open_checkpoint(local(path)), local(path))
    facts = source.architecture
    for layer in range(facts.n_layers):
        mine = fold_layer(source.layer(layer), facts)
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            own = getattr(bridge.blocks[layer].attn, name, None)
            if own is None:  # a projection without bias, before a norm without bias
                assert not getattr(mine, name).any()
                continue
            own = own.reshape(getattr(mine, name).shape) if own.dim() == 3 or name.startswith("b") else own
            assert torch.allclose(getattr(mine, name), own, atol=2e-5), (layer, name)
    embeddings = fold_embeddings(source.embeddings(), facts)
    assert torch.allclose(embeddings.W_E, bridge.W_E, atol=2e-5)
    assert torch.allclose(embeddings.W_U, bridge.W_U, atol=2e-5)
    if facts.positions == "learned":
        assert torch.allclose(embeddings.W_pos, bridge.W_pos, atol=2e-5)


def test_what_real_gpt2_head_4_11_does_is_not_on_the_direct_path_from_positions() -> None:
    """It attends to the previous token at 0.99 and more, yet the positions it sees come through earlier blocks.

    This is why `qk_prev_auc` is a prediction for layer 0 alone under learned positions.
    """
    from ovqk.circuits.positions import learned_position_scores

    folder, patterns = shared_model("gpt2-small-attention"), shared_model("gpt2-attention-patterns")
    for prompt in range(len(json.loads((patterns / "prompts.json").read_text()))):
        pattern = load_file(patterns / f"prompt{prompt}.safetensors")["pattern"][4, 11]
        assert pattern.diagonal(-1)[1:].min() > 0.99
    source = open_weights(open_checkpoint(local(folder)), local(folder))
    facts = source.architecture
    W_pos = fold_embeddings(source.embeddings(), facts).W_pos
    scores = learned_position_scores(fold_layer(source.layer(4), facts), facts, W_pos)
    assert 0.5 < scores.previous_auc[11] < 0.9


def test_gamma_is_folded_after_the_bias() -> None:
    """b + beta W uses the original W: folding gamma first would scale it."""
    W, b = torch.tensor([[[2.0], [4.0]]]), torch.tensor([[1.0]])
    norm = Norm("rmsnorm", weight=torch.tensor([10.0, 100.0]), bias=torch.tensor([1.0, 1.0]))
    layer = LayerWeights(0, W_Q=W, W_K=W, W_V=W, W_O=W.mT, b_Q=b, b_K=b, b_V=b, norm=norm)
    folded = fold_reads(layer, Architecture("tiny", 1, 1, 1, 2, 1, None, "rmsnorm", 0.0, "none"))
    for name in "QKV":
        assert getattr(folded, f"b_{name}").item() == 1 + 2 + 4
        assert getattr(folded, f"W_{name}").flatten().tolist() == [20.0, 400.0]


def test_layernorm_centres_what_is_read_and_what_is_written(tmp_path) -> None:
    make_gpt2(tmp_path / "m")
    source = open_weights(open_checkpoint(local(tmp_path / "m")), local(tmp_path / "m"))
    folded = fold_layer(source.layer(0), source.architecture)
    ones = torch.ones(source.architecture.d_model)
    for name in ("W_Q", "W_K", "W_V"):
        assert (ones @ getattr(folded, name)).abs().max() < 1e-5
    assert (folded.W_O @ ones).abs().max() < 1e-5


def test_rmsnorm_centres_nothing(tmp_path) -> None:
    make_llama(tmp_path / "m")
    source = open_weights(open_checkpoint(local(tmp_path / "m")), local(tmp_path / "m"))
    raw, folded = source.layer(0), fold_layer(source.layer(0), source.architecture)
    assert torch.equal(folded.W_O, raw.W_O)
    assert torch.allclose(folded.W_Q, raw.norm.weight[:, None] * raw.W_Q)


def test_rotation_composes_and_leaves_the_rest_alone() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1]))  # 4 of 6 dimensions
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary.angles(torch.tensor([2, 3, 5]))
    twice = rotary.rotate(rotary.rotate(x, cos[0], sin[0]), cos[1], sin[1])
    assert torch.allclose(twice, rotary.rotate(x, cos[2], sin[2]), atol=1e-6)
    assert torch.equal(twice[4:], x[4:])


def test_interleaved_pairs_are_neighbours() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.5]), interleaved=True)
    cos, sin = rotary.angles(torch.tensor([1]))
    turned = rotary.rotate(torch.tensor([1.0, 0.0, 0.0, 0.0]), cos[0], sin[0])
    assert torch.allclose(turned, torch.tensor([cos[0, 0], sin[0, 0], 0.0, 0.0]))


def test_half_precision_is_upcast_first(tmp_path) -> None:
    model = make_gpt2(tmp_path / "m")
    model.half().save_pretrained(tmp_path / "half")
    source = open_weights(open_checkpoint(local(tmp_path / "half")), local(tmp_path / "half"))
    assert source.layer(0).W_Q.dtype == torch.float32
    full = open_weights(open_checkpoint(local(tmp_path / "m")), local(tmp_path / "m"))
    assert torch.equal(source.layer(0).W_Q, full.layer(0).W_Q.half().float())


def test_linear_and_llama3_rotary_scaling_are_the_models_own(tmp_path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaled = {
        "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
            "rope_theta": 10000.0,
        },
    }
    for kind, parameters in scaled.items():
        model = make_llama(tmp_path / kind, rope_parameters=parameters)
        source = open_weights(open_checkpoint(local(tmp_path / kind)), local(tmp_path / kind))
        own = LlamaRotaryEmbedding(model.config).inv_freq
        assert torch.allclose(source.layer(0).rotary.inverse_frequencies, own)
