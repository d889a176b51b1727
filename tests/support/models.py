"""Checkpoints for tests: those beside the repository, the bundled ones, and tiny random ones of every architecture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.testing.tiny_architectures import randomise
from ovqk.weights.bridge import BridgeWeights
from ovqk.weights.readers import open_weights
from ovqk.weights.types import WeightSource
from support import ROOT

SHARED = ROOT.parent / "shared" / "models"
BUNDLED = ROOT / "ovqk" / "bundled" / "mini-attn"


def shared_model(name: str) -> Path:
    """A real checkpoint that is not part of the repository; the test skips, with the reason, where it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the real weights {name} are not beside this checkout")
    return path


def local(path: Path, **keys: object) -> ModelConfig:
    """The config of a local checkpoint."""
    return ModelConfig(name=path.name.removesuffix(".safetensors"), source=Source.local, path=str(path), **keys)


def opened(path: Path, **keys: object) -> WeightSource:
    """The weights of a local checkpoint."""
    model = local(path, **keys)
    return open_weights(open_checkpoint(model), model)


def bridged(path: Path) -> BridgeWeights:
    """The same through the bridge, whether or not the architecture is also read natively."""
    return BridgeWeights(open_checkpoint(local(path)), local(path))


def make_gpt2(directory: Path, **overrides: object) -> torch.nn.Module:
    """A tiny random GPT-2 saved as a Hugging Face directory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"vocab_size": 40, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 12, "n_inner": 32}
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = randomise(GPT2LMHeadModel(GPT2Config(**settings | quiet | overrides)))
    model.save_pretrained(directory)
    return model


def make_llama(directory: Path, **overrides: object) -> torch.nn.Module:
    """A tiny random Llama with grouped queries, saved as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = randomise(LlamaForCausalLM(LlamaConfig(**settings | overrides)))
    model.save_pretrained(directory)
    return model


SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WIDE = SIZES | {"head_dim": 8}  # heads together wider than the stream
ONE_KV_EACH = SIZES | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
FALCON = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
KINDS: dict[str, dict[str, object]] = {
    "gpt2": {"vocab_size": 40, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 16, "n_inner": 32},
    "gpt_neo": {
        "vocab_size": 40, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "intermediate_size": 32,
        "max_position_embeddings": 16, "window_size": 4, "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {
        "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": 32, "rotary_dim": 4,
    },
    "gpt_neox": ONE_KV_EACH | {"hidden_size": 32, "rotary_pct": 0.5},
    "gpt_neox-sequential": ONE_KV_EACH | {"hidden_size": 32, "rotary_pct": 0.25, "use_parallel_residual": False},
    "phi": SIZES | {"hidden_size": 32, "partial_rotary_factor": 0.5},
    "phi3": SIZES | {"hidden_size": 32},
    "phi3-longrope": SIZES | {
        "hidden_size": 32, "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "short_factor": [1.1, 1.3], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 12,
        },
    },
    "llama": WIDE,
    "llama-yarn": WIDE | {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4,
        },
    },
    "mistral": WIDE | {"sliding_window": 5},
    "ministral": WIDE | WINDOWS,
    "qwen2": SIZES,
    "qwen3": WIDE,
    "olmo": ONE_KV_EACH,
    "olmo2": SIZES,
    "gemma": WIDE,
    "gemma2": WIDE | WINDOWS | {"query_pre_attn_scalar": 12, "final_logit_softcapping": None},
    "gemma3_text": WIDE | WINDOWS | {"query_pre_attn_scalar": 12},
    "llama-biases": WIDE | {"mlp_bias": True, "attention_bias": True},
    "granite": SIZES | {
        "mlp_bias": True, "attention_bias": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.3, "logits_scaling": 8.0,
    },
    "smollm3": SIZES | {"no_rope_layers": [1, 0, 1]},
    "olmo3": SIZES | WINDOWS | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 4,
            },
        },
    },
    "exaone4": SIZES | WINDOWS,
    "exaone4-without_windows": SIZES | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "glm": WIDE,
    "glm4": WIDE,
    "stablelm": SIZES | {"hidden_size": 32, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "stablelm-parallel": SIZES | {"hidden_size": 32, "partial_rotary_factor": 0.5, "use_parallel_residual": True},
    "starcoder2": SIZES | {"sliding_window": 5},
    "cohere": SIZES | {"attention_bias": True},
    "cohere2": SIZES | WINDOWS,
    "opt": {
        "vocab_size": 40, "hidden_size": 24, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    },
    "falcon": FALCON,
    "falcon-grouped": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon-one_norm": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "mixtral": WIDE | EXPERTS | {"sliding_window": 5},
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 20},
    "qwen2_moe-dense_first": SIZES | EXPERTS | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_moe": WIDE | EXPERTS,
    "olmoe": SIZES | EXPERTS,
    "gpt_oss": WIDE | EXPERTS | WINDOWS,
}  # fmt: skip
"""Tiny configurations of the architectures read natively; what follows a dash is a variant."""


TEXT = {key: value for key, value in SIZES.items() if key != "pad_token_id"}
PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MARKS = {"image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}
SECTIONS = {"rope_type": "default", "rope_theta": 300.0, "mrope_section": [1, 1, 1]}
QWEN_VL = {"text_config": TEXT | {"rope_parameters": SECTIONS}, **MARKS}
SEEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 24}
BESIDE_PICTURES: dict[str, dict[str, object]] = {
    "qwen2_vl": QWEN_VL | {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2}},
    "qwen2_5_vl": QWEN_VL | {"vision_config": SEEN | {"fullatt_block_indexes": [0]}},
    "qwen3_vl": QWEN_VL
    | {"vision_config": SEEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": []}}
    | {"text_config": TEXT | {"head_dim": 6, "rope_parameters": SECTIONS, "tie_word_embeddings": True}},
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": 5},
        "vision_config": {"model_type": "pixtral", **PICTURES, "image_size": 8, "patch_size": 4, "head_dim": 8},
        "image_token_index": 39,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **PICTURES, "image_size": 8, "patch_size": 4},
        "image_token_index": 39,
    },
}
"""Language models beside ones for pictures; what was cut from a checkpoint of both is read as the text model."""


def edited(tiny, kind: str, folder: Path, drop: tuple[str, ...] = (), **keys: object) -> Path:
    """A tiny model's checkpoint with other keys in its config.json."""
    folder.mkdir()
    config = json.loads((tiny(kind) / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | keys
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(tiny(kind) / "model.safetensors"), folder / "model.safetensors")
    return folder


def make(kind: str, directory: Path, **overrides: object) -> torch.nn.Module:
    """A tiny random model of one of KINDS, saved as a Hugging Face directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind.split("-")[0], **KINDS[kind] | overrides)
    model = randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    model.save_pretrained(directory)
    return model
