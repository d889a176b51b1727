"""Llama and the families that name their tensors as it does, under RMSNorm: rows in the table of `families.py`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ovqk.weights.family import Family

KEYS = {  # without the window, which some model types do not read
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads",),
    "d_model": ("hidden_size",),
    "d_head": ("head_dim",),
    "n_ctx": ("max_position_embeddings",),
    "norm_eps": ("rms_norm_eps",),
    "activation": ("hidden_act",),
}
WINDOWED = KEYS | {"window": ("sliding_window",)}

LLAMA_TENSORS = {
    "embedding": "embed_tokens",
    "final_norm": "norm",
    "norm": "layers.{layer}.input_layernorm",
    "query": "layers.{layer}.self_attn.q_proj",
    "key": "layers.{layer}.self_attn.k_proj",
    "value": "layers.{layer}.self_attn.v_proj",
    "output": "layers.{layer}.self_attn.o_proj",
    "mlp_norm": "layers.{layer}.post_attention_layernorm",
    "mlp_in": "layers.{layer}.mlp.gate_proj",
    "mlp_linear": "layers.{layer}.mlp.up_proj",
    "mlp_out": "layers.{layer}.mlp.down_proj",
}
QUERY_KEY_NORMS = {"query_norm": "layers.{layer}.self_attn.q_norm", "key_norm": "layers.{layer}.self_attn.k_norm"}

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    tensors=LLAMA_TENSORS,
    keys=KEYS,
    read_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    complete=True,
)

MISTRAL = replace(
    LLAMA,
    model_types=("mistral",),
    keys=WINDOWED,
    read_bias=False,
    output_bias=False,
    mlp_bias=False,
    complete=False,
)
QWEN2 = replace(MISTRAL, model_types=("qwen2",), read_bias=True)

MINISTRAL = replace(MISTRAL, model_types=("ministral",))

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    query_key_norm="per_head",
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors=LLAMA_TENSORS | QUERY_KEY_NORMS,
    keys=WINDOWED,
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    tensors={name: LLAMA_TENSORS[name] for name in ("embedding", "final_norm", "norm", "output", "mlp_norm", "mlp_out")}
    | {"qkv": "layers.{layer}.self_attn.qkv_proj", "mlp_gate_and_linear": "layers.{layer}.mlp.gate_up_proj"},
    keys=WINDOWED,
    partial_rotary=True,
)

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    prefixes=("model.", ""),
    norm="none",  # attention and MLP read the bare stream; what they write is normalised
    positions="rotary",
    query_key_norm="over_heads",
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors={name: value for name, value in LLAMA_TENSORS.items() if name not in ("norm", "mlp_norm")}
    | QUERY_KEY_NORMS
    | {
        "post_norm": "layers.{layer}.post_attention_layernorm",
        "mlp_post_norm": "layers.{layer}.post_feedforward_layernorm",
    },
    keys=KEYS,
)

GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    tied_by_default=True,
    gain_offset=1.0,
    scaled_embedding=True,
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors=LLAMA_TENSORS,
    keys=KEYS,
    refused=("use_bidirectional_attention",),
)

GEMMA2_TENSORS = LLAMA_TENSORS | {
    "post_norm": "layers.{layer}.post_attention_layernorm",
    "mlp_norm": "layers.{layer}.pre_feedforward_layernorm",
    "mlp_post_norm": "layers.{layer}.post_feedforward_layernorm",
}

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    tied_by_default=True,
    gain_offset=1.0,
    scaled_embedding=True,
    scale="query_pre_attn_scalar",
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors=GEMMA2_TENSORS,
    keys=WINDOWED | {"activation": ("hidden_activation",)},
    refused=("use_bidirectional_attention",),
    caps=("attn_logit_softcapping", "final_logit_softcapping"),
)

GEMMA3: Family = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),  # the second holds a text model beside one for pictures
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    norm="rmsnorm",
    positions="rotary",
    tied_by_default=True,
    gain_offset=1.0,
    scaled_embedding=True,
    scale="query_pre_attn_scalar",
    query_key_norm="per_head",
    refused=("use_bidirectional_attention",),
    rotations_by_kind=True,
    caps=("final_logit_softcapping",),  # of scores the module has none, whatever config.json says
    read_bias="attention_bias",
    output_bias="attention_bias",
    tensors=GEMMA2_TENSORS | QUERY_KEY_NORMS,
    keys=WINDOWED | {"activation": ("hidden_activation",)},
    variant=lambda config: replace(GEMMA3, caps=()) if config.get("model_type") == "gemma3" else GEMMA3,
)

# --- Llama's kin, with multipliers, layers without positions, or norms elsewhere ------------------------------------

GRANITE = replace(
    LLAMA,
    name="granite",
    model_types=("granite",),
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    score_multiplier="attention_multiplier",
    logit_divisor="logits_scaling",
    complete=False,
)
SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    model_types=("smollm3",),
    keys=WINDOWED,
    tied_by_default=True,
    rotated="no_rope_layers",
    complete=False,
)
OLMO3 = replace(OLMO2, name="olmo3", model_types=("olmo3",), keys=WINDOWED, rotations_by_kind=True)
EXAONE4 = replace(
    OLMO2,
    name="exaone4",
    model_types=("exaone4",),
    keys=WINDOWED,
    query_key_norm="per_head",
    rotated="windowed_or_every",
    read_bias=False,
    output_bias=False,
)
GLM = replace(
    LLAMA,
    name="glm",
    model_types=("glm",),
    tensors={name: value for name, value in LLAMA_TENSORS.items() if name not in ("mlp_in", "mlp_linear")}
    | {"mlp_gate_and_linear": "layers.{layer}.mlp.gate_up_proj"},
    interleaved=True,
    partial_rotary=True,
    complete=False,
    output_bias=False,
    mlp_bias=False,
)
GLM4 = replace(
    GLM,
    name="glm4",
    model_types=("glm4",),
    tensors={
        **GLM.tensors,
        "post_norm": "layers.{layer}.post_self_attn_layernorm",
        "mlp_post_norm": "layers.{layer}.post_mlp_layernorm",
    },
)

# --- mixtures of experts --------------------------------------------------------------------------------------------

NO_MLP = {name: value for name, value in LLAMA_TENSORS.items() if not name.startswith("mlp_")}
MIXTRAL = replace(MISTRAL, name="mixtral", model_types=("mixtral",), tensors=NO_MLP, experts=True)
QWEN2_MOE = replace(
    MIXTRAL,
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    read_bias="qkv_bias",
    variant=lambda config: _qwen_moe(config),
)
QWEN3_MOE = replace(
    QWEN2_MOE,
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    query_key_norm="per_head",
    tensors=NO_MLP | QUERY_KEY_NORMS,
    read_bias="attention_bias",
    output_bias="attention_bias",
)
OLMOE = replace(
    MIXTRAL,
    name="olmoe",
    model_types=("olmoe",),
    keys=KEYS,
    query_key_norm="over_heads",
    tensors=NO_MLP | QUERY_KEY_NORMS,
    refused=("clip_qkv",),
    read_bias="attention_bias",
    output_bias="attention_bias",
)
GPT_OSS = replace(
    MIXTRAL,
    name="gpt_oss",
    model_types=("gpt_oss",),
    notes=(
        "each head has an attention sink: a share of its attention goes to no token. Scores and writes are the model's "
        "own, and that share is not part of any metric",
    ),
    read_bias="attention_bias",
    output_bias="attention_bias",
)


def _qwen_moe(config: Mapping[str, Any]) -> Family:
    """Return the row, with the dense MLP that some configs give block 0."""
    row = QWEN3_MOE if str(config.get("model_type")).startswith("qwen3") else QWEN2_MOE
    dense = config.get("mlp_only_layers")
    sparse = config.get("decoder_sparse_step", 1) == 1 and not (isinstance(dense, list) and 0 in dense)
    return row if sparse else replace(row, experts=False, tensors={**LLAMA_TENSORS, **row.tensors})


# --- text models beside one for pictures ----------------------------------------------------------------------------

BESIDE = ("model.language_model.", "language_model.model.", "model.", "")
QWEN2_VL = replace(
    QWEN2,
    name="qwen2_vl",
    model_types=("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
    prefixes=BESIDE,
)
QWEN3_VL = replace(QWEN3, name="qwen3_vl", model_types=("qwen3_vl", "qwen3_vl_text"), prefixes=BESIDE, keys=KEYS)
