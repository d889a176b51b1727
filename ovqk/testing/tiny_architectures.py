"""Tiny random models for transformers' architectures, from each one's own config with its sizes made small.

The settings are generic: 4 layers with width 48, 4 heads over 2 KV heads, if a config has such keys.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

SHRUNK: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 48),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "global_head_dim", "v_head_dim"), 12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    "word_embed_proj_dim": 48,
    "rotary_dim": 4,
    "dtype": "float32",
}
"""A config's key -> its small value, if the architecture's own config has the key."""
MULTIPLIERS = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
YARN = {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
    "short_mscale": 1.24,
    "long_mscale": 1.5,
    "original_max_position_embeddings": 32,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
TOWER = {"depth": 2, "out_hidden_size": 48}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
DOTS3 = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "per_layer_config": {}}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 12,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 24},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_n_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8},
    "stablelm": {"partial_rotary_factor": 0.5},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"head_dim": 24, "num_heads": 4, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 48, "adapter_out_dim": 48, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 48, "adapter_out_dim": 48},
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], **TWO_KINDS},
    "mllama": {"text_config": {"cross_attention_layers": [3]}},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "qwen2_vl": {"text_config": MROPE, "vision_config": {"depth": 2, "embed_dim": 48}},
    "qwen2_5_vl": {"text_config": MROPE, "vision_config": {**TOWER, "fullatt_block_indexes": [1]}},
    "qwen3_vl": {"text_config": MROPE, "vision_config": {**TOWER, "deepstack_visual_indexes": [0]}},
    "qwen3_vl_moe": {"text_config": MROPE, "vision_config": {**TOWER, "deepstack_visual_indexes": [0]}},
    "glm4v": {"text_config": MROPE, "vision_config": TOWER},
    "paligemma": {"projection_dim": 48, "vision_config": {"projection_dim": 48}},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 32],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "attention_head_size": 12,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 96,
        "attention_head_dim": 24,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 3,
        "use_mamba_kernels": False,
    },
}
"""Architecture -> further settings that it needs."""
WHOLE = {
    **{
        name: f"{stem}ForConditionalGeneration"
        for name, stem in (
            ("aya_vision", "AyaVision"),
            ("glm4v", "Glm4v"),
            ("idefics3", "Idefics3"),
            ("internvl", "InternVL"),
            ("llava", "Llava"),
            ("llava_next", "LlavaNext"),
            ("llava_onevision", "LlavaOnevision"),
            ("mistral3", "Mistral3"),
            ("paligemma", "PaliGemma"),
            ("qwen2_5_vl", "Qwen2_5_VL"),
            ("qwen2_vl", "Qwen2VL"),
            ("qwen3_vl", "Qwen3VL"),
            ("qwen3_vl_moe", "Qwen3VLMoe"),
            ("smolvlm", "SmolVLM"),
        )
    },
    "llama4": "Llama4ForConditionalGeneration",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
"""Architecture -> the class to use because the causal one leaves out parts or cannot be made from its config."""
BESIDE_PICTURES = tuple(name for name in WHOLE if name not in ("llama4", "musicgen", "musicgen_melody"))
"""Models for images with a causal text model. transformers does not list them as causal models, but loads them so."""
NOT_MADE = {
    "gemma3n": "its vision tower is made by the package timm, which ovqk does not need",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "its config demands that all layers use another model's keys and values, and transformers' module refuses that",
    ),
}
"""Architecture that cannot be made tiny -> the reason."""
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2, scores divided by the layer": {"scale_attn_by_inverse_layer_idx": True},
    "falcon_h1, with multipliers": {
        "key_multiplier": 0.7,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.8,
        "embedding_multiplier": 5.0,
        "lm_head_multiplier": 0.03,
        "mlp_multipliers": [0.9, 0.6],
    },
    "granitemoe, multipliers near 1": {
        "residual_multiplier": 0.9993,
        "embedding_multiplier": 1.00001,
        "attention_multiplier": 12**-0.5 * 1.0006,
        "logits_scaling": 1.00001,
    },
    "phimoe, LongRoPE": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "glm4_moe, YaRN on a part of each head": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5, **YARN}
    },
    "llama, with biases of attention": {"attention_bias": True},
    "llama, YaRN": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **YARN}},
    "granite, with multipliers": {**MULTIPLIERS, "attention_multiplier": 0.02, "logits_scaling": 8.0},
    "granitemoe, with multipliers": {**MULTIPLIERS, "attention_multiplier": 0.02, "logits_scaling": 8.0},
    "cohere, with query and key norms": {"use_qk_norm": True},
    "stablelm, parallel with query and key norms": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "falcon, one after the other with ALiBi": {"alibi": True, "parallel_attn": False, "bias": True},
    "falcon, several KV heads": {"new_decoder_architecture": True},
    "glm4_moe, with query and key norms": {"use_qk_norm": True},
    "phi, with query and key norms": {"qk_layernorm": True},
    "gpt_neox, one after the other": {"use_parallel_residual": False},
    "gemma4_text, heads of one shape": {"per_layer_config": {}},
    "opt, post-norm": {"do_layer_norm_before": False},
}
"""`architecture, setting` -> settings that change a head's input or output."""
KEPT_BY_PATTERN = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Keys with a list that has an entry for each layer; only the first entries are kept."""


def shrunk_config(default: Any, own: dict[str, Any]) -> Any:
    """Return a config like a default one, with its sizes and its nested configs' sizes made small.

    Args:
        default: an architecture's config.
        own: further settings; for a nested config, a dictionary under its name.
    """
    kind, known = type(default), default.to_dict()
    renamed = {value: key for key, value in getattr(kind, "attribute_map", {}).items()}
    overrides = {key: value for key, value in SHRUNK.items() if key in known and key not in renamed.values()}
    overrides |= {key: known[key][:4] for key in KEPT_BY_PATTERN if isinstance(known.get(key), list)}
    if not isinstance(known.get("sliding_window", 0), int):
        overrides.pop("sliding_window", None)
    inner = {key: getattr(default, key, None) for key in kind.sub_configs}
    for key, part in inner.items():
        if part is not None:
            overrides[key] = shrunk_config(part, own.get(key, {}))
    return kind(**overrides | {key: value for key, value in own.items() if inner.get(key) is None})


def shrunk_model(name: str, directory: Path) -> nn.Module:
    """Make a tiny random model with an architecture and save it as a Hugging Face directory.

    Raises:
        Exception: any error from transformers, if the architecture cannot be shrunk in this way.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if name in NOT_MADE:
        raise ValueError(NOT_MADE[name])
    variant = VARIANTS.get(name, {})
    name = name.split(",")[0]
    kind = CONFIG_MAPPING[name]
    config = shrunk_config(kind(), OWN.get(name, {}) | variant)
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    make: Any = AutoModelForCausalLM.from_config
    if name in WHOLE:
        make = getattr(transformers, WHOLE[name])._from_config
    model = make(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if gain else 0.2 * noise)
    model.eval().save_pretrained(directory)
    return model


def randomise(model: torch.nn.Module, seed: int = 0) -> Any:
    """Draw all weights and biases of a model around 0, and its gains around 1; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.2 * noise)
    return model.eval()
