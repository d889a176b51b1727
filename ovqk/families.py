"""The architecture families read natively: what each calls its tensors and how it lays them out.

A new family is a new row in FAMILIES; `native.py` reads by it. Anything not listed goes through `bridge.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from ovqk.weights import NormKind, PositionKind


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        model_types: the `model_type` values of config.json that belong to it.
        prefixes: what checkpoints put before the names of the tensors, in the order tried.
        tensors: ovqk's name -> the checkpoint's, without `.weight` or `.bias`; `{layer}` is the layer's index.
            `query`, `key`, `value` or a fused `qkv`; `norm` (absent: none, or one without a gain), `post_norm`,
            `query_norm`, `key_norm`; the MLP's `mlp_in` (its gate, where it has one), `mlp_linear` or a fused
            `mlp_gate_and_linear`, `mlp_out`, `mlp_norm`, `mlp_post_norm`.
        keys: ovqk's name -> the keys of config.json, in the order tried.
        linear: `out_in` for torch's Linear [out, in], `in_out` for GPT-2's Conv1D [in, out].
        fused: how `qkv` is laid out: all queries, all keys, all values; or the three of a head, head by head.
        unembedding: the unembedding's name, without a prefix.
        gain_offset: what is added to the weight of a norm to give its gain (Gemma: 1).
        scaled_embedding: embedding rows are multiplied by sqrt(d_model).
        parallel: attention and MLP read the same stream; or the config's key that says so.
        query_key_norm: queries and keys are normalised per head, or over all heads of a token.
        interleaved: rotary pairs are neighbours (GPT-J).
        scale: key of the number whose -1/2 power scales the scores, or a number; d_head where absent.
        refused: config keys that must be unset or false, as ovqk does not read what they turn on.
        complete: config.json alone tells everything; otherwise transformers fills in the model type's defaults.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    norm: NormKind
    positions: PositionKind
    tensors: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]
    linear: Literal["out_in", "in_out"] = "out_in"
    fused: Literal["columns", "per_head"] = "columns"
    unembedding: str = "lm_head"
    tied_by_default: bool = False
    gain_offset: float = 0.0
    scaled_embedding: bool = False
    parallel: bool | str = False
    query_key_norm: Literal["per_head", "over_heads"] | None = None
    interleaved: bool = False
    scale: str | float | None = None
    refused: tuple[str, ...] = field(default=())
    complete: bool = False

    def reads(self, name: str) -> bool:
        """Whether ovqk reads the tensor of this name: attention, norms and embeddings, and the MLP of block 0 alone."""
        return self._read.fullmatch(name) is not None

    @cached_property
    def _read(self) -> re.Pattern[str]:
        layers = {True: "0", False: r"\d+"}
        names = (
            re.escape(name).replace(re.escape("{layer}"), layers[part.startswith("mlp_")])
            for part, name in self.tensors.items()
        )
        own = f"(?:{'|'.join(map(re.escape, self.prefixes))})(?:{'|'.join(names)})"
        head = rf"(?:language_model\.)?{re.escape(self.unembedding)}"
        return re.compile(rf"(?:{own}|{head})\.(?:weight|bias)")


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    prefixes=("", "transformer."),
    norm="layernorm",
    positions="learned",
    linear="in_out",
    tied_by_default=True,
    complete=True,
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
)

GPT_NEO = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    prefixes=("transformer.", ""),
    norm="layernorm",
    positions="learned",
    tied_by_default=True,
    scale=1.0,
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

KEYS = {
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads",),
    "d_model": ("hidden_size",),
    "d_head": ("head_dim",),
    "n_ctx": ("max_position_embeddings",),
    "norm_eps": ("rms_norm_eps",),
    "activation": ("hidden_act",),
    "window": ("sliding_window",),
}

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    prefixes=("gpt_neox.", ""),
    norm="layernorm",
    positions="rotary",
    fused="per_head",
    unembedding="embed_out",
    parallel="use_parallel_residual",
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
    keys=KEYS | {"norm_eps": ("layer_norm_eps",)},
)

PHI = Family(
    name="phi",
    model_types=("phi",),
    prefixes=("model.", ""),
    norm="layernorm",
    positions="rotary",
    parallel=True,
    refused=("qk_layernorm",),
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
    complete=True,
)

LLAMA_KIN = replace(LLAMA, model_types=("mistral", "qwen2"), complete=False)  # whose windows have defaults of their own

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    query_key_norm="per_head",
    tensors=LLAMA_TENSORS | QUERY_KEY_NORMS,
    keys=KEYS,
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    tensors={name: LLAMA_TENSORS[name] for name in ("embedding", "final_norm", "norm", "output", "mlp_norm", "mlp_out")}
    | {"qkv": "layers.{layer}.self_attn.qkv_proj", "mlp_gate_and_linear": "layers.{layer}.mlp.gate_up_proj"},
    keys=KEYS,
)

OLMO = Family(
    name="olmo",
    model_types=("olmo",),
    prefixes=("model.", ""),
    norm="layernorm",  # without gain or bias
    positions="rotary",
    refused=("clip_qkv",),
    tensors={name: value for name, value in LLAMA_TENSORS.items() if not name.endswith("norm")},
    keys=KEYS,
)

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    prefixes=("model.", ""),
    norm="none",  # attention and MLP read the bare stream; what they write is normalised
    positions="rotary",
    query_key_norm="over_heads",
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
    tensors=LLAMA_TENSORS,
    keys=KEYS | {"activation": ("hidden_activation", "hidden_act")},
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
    tensors=GEMMA2_TENSORS,
    keys=KEYS | {"activation": ("hidden_activation",)},
)

GEMMA3 = Family(
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
    tensors=GEMMA2_TENSORS | QUERY_KEY_NORMS,
    keys=KEYS | {"activation": ("hidden_activation",)},
)

FAMILIES = {
    model_type: family
    for family in (
        GPT2, GPT_NEO, GPTJ, GPT_NEOX, PHI, LLAMA, LLAMA_KIN, QWEN3, PHI3, OLMO, OLMO2, GEMMA, GEMMA2, GEMMA3,
    )
    for model_type in family.model_types
}  # fmt: skip
