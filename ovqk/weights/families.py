"""The architecture families read natively: a row for each.

A new family is a new row in FAMILIES; `native.py` reads by it. Anything not listed goes through `bridge.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ovqk.weights.family import Family, as_transformers_reads
from ovqk.weights.llama_families import (
    BESIDE,
    EXAONE4,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    GPT_OSS,
    GRANITE,
    KEYS,
    LLAMA,
    LLAMA_TENSORS,
    MINISTRAL,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMO3,
    OLMOE,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN2_VL,
    QWEN3,
    QWEN3_MOE,
    QWEN3_VL,
    SMOLLM3,
    WINDOWED,
)

GPT2: Family = Family(
    name="gpt2",
    model_types=("gpt2",),
    prefixes=("", "transformer."),
    norm="layernorm",
    positions="learned",
    linear="in_out",
    tied_by_default=True,
    complete=True,
    read_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm_bias=True,
    tensors={
        "embedding": "wte",
        "positions": "wpe",
        "final_norm": "ln_f",
        "norm": "h.{layer}.ln_1",
        "qkv": "h.{layer}.attn.c_attn",
        "output": "h.{layer}.attn.c_proj",
        "mlp_norm": "h.{layer}.ln_2",
        "mlp_in": "h.{layer}.mlp.c_fc",
        "mlp_out": "h.{layer}.mlp.c_proj",
    },
    keys={
        "n_layers": ("n_layer",),
        "n_heads": ("n_head",),
        "d_model": ("n_embd",),
        "n_ctx": ("n_positions", "n_ctx"),
        "norm_eps": ("layer_norm_epsilon",),
        "activation": ("activation_function",),
    },
    variant=lambda config: _gpt2(config),
)


def _gpt2(config: Mapping[str, Any]) -> Family:
    """Return GPT-2's row with the scale of its scores, and with notes on settings that no metric includes."""
    notes = {
        "scale_attn_by_inverse_layer_idx": "the scores of each layer are divided by its number, counted from 1: a "
        "scale of scores, which is not in W_QK",
        "add_cross_attention": "the model also has cross-attention, which is not read",
    }
    return replace(
        GPT2,
        scale=None if config.get("scale_attn_weights", True) else 1.0,
        divided_by_layer=bool(config.get("scale_attn_by_inverse_layer_idx")),
        notes=tuple(note for key, note in notes.items() if config.get(key)),
    )


GPT_NEO = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    prefixes=("transformer.", ""),
    norm="layernorm",
    positions="learned",
    tied_by_default=True,
    scale=1.0,
    output_bias=True,
    mlp_bias=True,
    norm_bias=True,
    tensors={
        "embedding": "wte",
        "positions": "wpe",
        "final_norm": "ln_f",
        "norm": "h.{layer}.ln_1",
        "query": "h.{layer}.attn.attention.q_proj",
        "key": "h.{layer}.attn.attention.k_proj",
        "value": "h.{layer}.attn.attention.v_proj",
        "output": "h.{layer}.attn.attention.out_proj",
        "mlp_norm": "h.{layer}.ln_2",
        "mlp_in": "h.{layer}.mlp.c_fc",
        "mlp_out": "h.{layer}.mlp.c_proj",
    },
    keys={
        "n_layers": ("num_layers",),
        "n_heads": ("num_heads",),
        "d_model": ("hidden_size",),
        "n_ctx": ("max_position_embeddings",),
        "norm_eps": ("layer_norm_epsilon",),
        "activation": ("activation_function",),
        "window": ("window_size",),
    },
)

GPTJ = Family(
    name="gptj",
    model_types=("gptj",),
    prefixes=("transformer.", ""),
    norm="layernorm",
    positions="rotary",
    interleaved=True,
    parallel=True,
    mlp_bias=True,
    norm_bias=True,
    tensors={
        "embedding": "wte",
        "final_norm": "ln_f",
        "norm": "h.{layer}.ln_1",
        "query": "h.{layer}.attn.q_proj",
        "key": "h.{layer}.attn.k_proj",
        "value": "h.{layer}.attn.v_proj",
        "output": "h.{layer}.attn.out_proj",
        "mlp_norm": "h.{layer}.ln_1",
        "mlp_in": "h.{layer}.mlp.fc_in",
        "mlp_out": "h.{layer}.mlp.fc_out",
    },
    keys={
        "n_layers": ("n_layer",),
        "n_heads": ("n_head",),
        "d_model": ("n_embd",),
        "n_ctx": ("n_positions",),
        "norm_eps": ("layer_norm_epsilon",),
        "activation": ("activation_function",),
        "rotary_dim": ("rotary_dim",),
    },
)

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    prefixes=("gpt_neox.", ""),
    norm="layernorm",
    positions="rotary",
    fused="per_head",
    unembedding="embed_out",
    parallel="use_parallel_residual",
    partial_rotary=True,
    read_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=True,
    norm_bias=True,
    tensors={
        "embedding": "embed_in",
        "final_norm": "final_layer_norm",
        "norm": "layers.{layer}.input_layernorm",
        "qkv": "layers.{layer}.attention.query_key_value",
        "output": "layers.{layer}.attention.dense",
        "mlp_norm": "layers.{layer}.post_attention_layernorm",
        "mlp_in": "layers.{layer}.mlp.dense_h_to_4h",
        "mlp_out": "layers.{layer}.mlp.dense_4h_to_h",
    },
    keys={key: names for key, names in KEYS.items() if key != "n_kv_heads"} | {"norm_eps": ("layer_norm_eps",)},
)

PHI = Family(
    name="phi",
    model_types=("phi",),
    prefixes=("model.", ""),
    norm="layernorm",
    positions="rotary",
    parallel=True,
    partial_rotary=True,
    refused=("qk_layernorm",),
    read_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm_bias=True,
    tensors={
        "embedding": "embed_tokens",
        "final_norm": "final_layernorm",
        "norm": "layers.{layer}.input_layernorm",
        "query": "layers.{layer}.self_attn.q_proj",
        "key": "layers.{layer}.self_attn.k_proj",
        "value": "layers.{layer}.self_attn.v_proj",
        "output": "layers.{layer}.self_attn.dense",
        "mlp_norm": "layers.{layer}.input_layernorm",
        "mlp_in": "layers.{layer}.mlp.fc1",
        "mlp_out": "layers.{layer}.mlp.fc2",
    },
    keys=KEYS | {"norm_eps": ("layer_norm_eps",)},
)

OLMO = Family(
    name="olmo",
    model_types=("olmo",),
    prefixes=("model.", ""),
    norm="layernorm",  # without a gain
    positions="rotary",
    refused=("clip_qkv",),
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors={name: value for name, value in LLAMA_TENSORS.items() if not name.endswith("norm")},
    keys={key: names for key, names in KEYS.items() if key != "norm_eps"},  # which is 1e-5
)

STABLELM = Family(
    name="stablelm",
    model_types=("stablelm",),
    prefixes=("model.", ""),
    norm="layernorm",
    positions="rotary",
    partial_rotary=True,
    read_bias="use_qkv_bias",
    norm_bias=True,
    tensors=LLAMA_TENSORS,
    keys=KEYS | {"norm_eps": ("layer_norm_eps",)},
    variant=lambda config: None if config.get("qk_layernorm") else _stablelm(config),
)


def _stablelm(config: Mapping[str, Any]) -> Family:
    if not config.get("use_parallel_residual"):
        return STABLELM
    return replace(STABLELM, parallel=True, tensors=LLAMA_TENSORS | {"mlp_norm": LLAMA_TENSORS["norm"]})


STARCODER2 = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    prefixes=("model.", ""),
    norm="layernorm",
    positions="rotary",
    tied_by_default=True,
    read_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
    norm_bias=True,
    tensors={name: value for name, value in LLAMA_TENSORS.items() if not name.startswith("mlp_")}
    | {
        "mlp_norm": "layers.{layer}.post_attention_layernorm",
        "mlp_in": "layers.{layer}.mlp.c_fc",
        "mlp_out": "layers.{layer}.mlp.c_proj",
    },
    keys=WINDOWED | {"norm_eps": ("norm_epsilon",)},
)

COHERE: Family = Family(
    name="cohere",
    model_types=("cohere",),
    prefixes=("model.", ""),
    norm="layernorm",
    positions="rotary",
    tied_by_default=True,
    logit_multiplier="logit_scale",
    parallel=True,
    interleaved=True,
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors=LLAMA_TENSORS | {"mlp_norm": LLAMA_TENSORS["norm"]},
    keys=KEYS | {"norm_eps": ("layer_norm_eps",)},
    variant=lambda config: None if config.get("use_qk_norm") else COHERE,
)
COHERE2 = replace(
    COHERE,
    name="cohere2",
    model_types=("cohere2",),
    keys=WINDOWED | {"norm_eps": ("layer_norm_eps",)},
    rotated="windowed",
    variant=None,
)

OPT: Family = Family(
    name="opt",
    model_types=("opt",),
    prefixes=("model.decoder.", "decoder.", ""),
    norm="layernorm",
    positions="learned",
    position_offset=2,
    tied_by_default=True,
    read_bias="enable_bias",
    output_bias="enable_bias",
    mlp_bias="enable_bias",
    norm_bias=True,
    tensors={
        "embedding": "embed_tokens",
        "positions": "embed_positions",
        "final_norm": "final_layer_norm",
        "norm": "layers.{layer}.self_attn_layer_norm",
        "query": "layers.{layer}.self_attn.q_proj",
        "key": "layers.{layer}.self_attn.k_proj",
        "value": "layers.{layer}.self_attn.v_proj",
        "output": "layers.{layer}.self_attn.out_proj",
        "mlp_norm": "layers.{layer}.final_layer_norm",
        "mlp_in": "layers.{layer}.fc1",
        "mlp_out": "layers.{layer}.fc2",
    },
    keys={
        "n_layers": ("num_hidden_layers",),
        "n_heads": ("num_attention_heads",),
        "d_model": ("hidden_size",),
        "n_ctx": ("max_position_embeddings",),
        "activation": ("activation_function",),
    },
    variant=lambda config: OPT if _is_plain_opt(config) else None,
)


def _is_plain_opt(config: Mapping[str, Any]) -> bool:
    """Return whether norms come first and have gains, and embeddings are as wide as the stream (OPT-350M: neither)."""
    width = config.get("word_embed_proj_dim")
    return (
        config.get("do_layer_norm_before", True) is True
        and not config.get("_remove_final_layer_norm")
        and config.get("layer_norm_elementwise_affine", True) is True
        and width in (None, config.get("hidden_size"))
    )


FALCON = Family(
    name="falcon",
    model_types=("falcon",),
    prefixes=("transformer.", ""),
    norm="layernorm",
    positions="rotary",
    fused="per_head",
    tied_by_default=True,
    parallel=True,
    kv_heads=1,
    read_bias="bias",
    output_bias="bias",
    mlp_bias="bias",
    norm_bias=True,
    tensors={
        "embedding": "word_embeddings",
        "final_norm": "ln_f",
        "norm": "h.{layer}.input_layernorm",
        "qkv": "h.{layer}.self_attention.query_key_value",
        "output": "h.{layer}.self_attention.dense",
        "mlp_norm": "h.{layer}.input_layernorm",
        "mlp_in": "h.{layer}.mlp.dense_h_to_4h",
        "mlp_out": "h.{layer}.mlp.dense_4h_to_h",
    },
    keys={
        "n_layers": ("num_hidden_layers",),
        "n_heads": ("num_attention_heads",),
        "d_model": ("hidden_size",),
        "n_ctx": ("max_position_embeddings",),
        "norm_eps": ("layer_norm_epsilon",),
        "activation": ("activation",),
    },
    variant=lambda config: _falcon(config),
)


def _falcon(config: Mapping[str, Any]) -> Family | None:
    """Return the row for the first Falcon (7B) or for the newer decoder (11B, 40B, 180B); None for any other."""
    if config.get("alibi") or config.get("parallel_attn", True) is not True:
        return None
    if not config.get("new_decoder_architecture"):
        return FALCON if config.get("multi_query", True) is True else None
    norms = {"norm": "h.{layer}.ln_attn", "mlp_norm": "h.{layer}.ln_mlp"}
    two = config.get("num_ln_in_parallel_attn") in (None, 2)
    keys = {**FALCON.keys, "n_kv_heads": ("num_kv_heads",)}
    return replace(FALCON, kv_heads=None, keys=keys, tensors={**FALCON.tensors, **(norms if two else {})})


WRAPPED = {"mistral3": "mistral", "llava": "llama"}
"""Model types that hold a text model of any type in `text_config` -> the type if it gives none."""

FAMILIES = {
    model_type: family
    for family in (
        GPT2, GPT_NEO, GPTJ, GPT_NEOX, PHI, LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, PHI3, OLMO, OLMO2, GEMMA, GEMMA2,
        GEMMA3, GRANITE, SMOLLM3, OLMO3, EXAONE4, GLM, GLM4, STABLELM, STARCODER2, COHERE, COHERE2, OPT, FALCON,
        MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS, QWEN2_VL, QWEN3_VL,
    )
    for model_type in family.model_types
}  # fmt: skip


def tensors_read(config: Mapping[str, Any]) -> Callable[[str], bool] | None:
    """Return which tensors of a checkpoint with this config.json are read, by name; None: the bridge loads all."""
    family = family_of(config)
    return None if family is None else family.reads


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the row that reads a checkpoint with this config.json; None: it needs the bridge."""
    kind = str(as_transformers_reads(config).get("model_type"))
    if kind in WRAPPED:
        text = config.get("text_config")
        text = text if isinstance(text, Mapping) else {}
        inner = family_of({"model_type": WRAPPED[kind], **text})
        if inner is None:
            return None
        caps = tuple(key for key in inner.caps if key != "final_logit_softcapping")  # nothing follows the unembedding
        bare = replace(inner, logit_multiplier=None, logit_divisor=None, caps=caps, unembedding="lm_head")
        return replace(bare, prefixes=BESIDE, complete=False)
    family = FAMILIES.get(kind)
    return family.variant(config) if family is not None and family.variant is not None else family
