"""Architectures outside the table: read through TransformerLens, gated by the model's own activations."""

import pytest
import torch
from support.commands import compose
from support.models import bridged, make_gpt2, opened, randomise
from support.oracle import matrices

from ovqk.analyse import analyse
from ovqk.errors import UserError
from ovqk.weights.folding import fold_layer
from ovqk.weights.types import OpenedModel

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    from transformers import OPTConfig, OPTForCausalLM

    directory = tmp_path_factory.mktemp("opt")
    config = OPTConfig(**SIZES, num_hidden_layers=2, ffn_dim=32, word_embed_proj_dim=24, bos_token_id=0, eos_token_id=0)
    randomise(OPTForCausalLM(config)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    directory = tmp_path_factory.mktemp("bert")
    config = BertConfig(**SIZES, num_hidden_layers=2, intermediate_size=32, bos_token_id=0, eos_token_id=0)
    randomise(BertForMaskedLM(config)).save_pretrained(directory)
    return directory


def test_a_pre_norm_decoder_is_folded_and_its_positions_are_found(opt) -> None:
    source = bridged(opt)
    assert source.loaded_by == "bridge" and source.foldable and source.no_vocabulary is None
    assert source.architecture.positions == "learned"
    assert not isinstance(source.first_mlp(), str)


def test_an_encoder_is_residual_space_and_raw(bert) -> None:
    source = opened(bert)
    assert not source.foldable and source.no_vocabulary == "the model is an encoder"
    cell = compose("task=none", "model=local", f"model.path={bert}")
    result = analyse(OpenedModel(source, "bert"), cell)
    assert result.processing["applied"] == "raw"
    assert result.unavailable["ov_copying"] == "the model is an encoder"
    heads = result.tables["heads"]
    W_OV, _ = matrices(source.layer(1), source.architecture, 2)
    assert heads.query("layer == 1 and head == 2")["ov_frobenius_norm"].item() == pytest.approx(
        float(W_OV.norm()), rel=1e-5
    )


def test_the_bridge_and_the_table_agree_on_a_model_both_can_read(tmp_path) -> None:
    make_gpt2(tmp_path / "m")
    native, through = opened(tmp_path / "m"), bridged(tmp_path / "m")
    assert through.foldable and through.no_vocabulary is None
    for layer in range(native.architecture.n_layers):
        one, two = (fold_layer(source.layer(layer), source.architecture) for source in (native, through))
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            assert torch.allclose(getattr(one, name), getattr(two, name), atol=1e-6), name
    mine, theirs = native.embeddings(), through.embeddings()
    for name in ("W_E", "W_U", "W_pos"):
        assert torch.allclose(getattr(mine, name), getattr(theirs, name), atol=1e-6)
    assert torch.allclose(native.first_mlp().W_in, through.first_mlp().W_in, atol=1e-6)


def test_missing_tensors_are_refused_not_filled_with_random_numbers(opt, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    directory = tmp_path / "opt"
    shutil.copytree(opt, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("model.decoder.layers.1.self_attn.out_proj.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing.*layers\.1\.self_attn\.out_proj\.weight"):
        bridged(directory)


def test_a_model_without_attention_heads_is_one_message(tmp_path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=40, hidden_size=24, num_hidden_layers=1, bos_token_id=0, eos_token_id=0)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="MambaForCausalLM has layers without attention heads"):
        opened(tmp_path)


def test_weights_that_are_not_finite_are_named(opt, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    tensors = load_file(opt / "model.safetensors")
    tensors[name][0, 0] = torch.inf
    (tmp_path / "config.json").write_text((opt / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"'{name}' holds NaN or infinity"):
        bridged(tmp_path)
