"""llama.cpp's changes to a checkpoint in a GGUF file, undone: config.json, names and layouts.

llama.cpp's converter gives each architecture names of its own for tensors and settings, permutes the rows of queries
and keys if its rotation pairs neighbours (Llama), writes Gemma's norms as 1 + gamma, transposes GPT-2's Conv1D
weights and takes GPT-NeoX's fused queries, keys and values apart by kind rather than by head. `CONVENTIONS` says which
architecture has which of these; a new one is a new row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovqk.checkpoints.gguf_file import Change, GGUFFile, RenamedTensors
from ovqk.checkpoints.gguf_settings import Config, gemma2, gemma3, gpt_neox, llama, number, phi3, rotary
from ovqk.errors import UserError

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Convention:
    """How llama.cpp writes one architecture.

    Attributes:
        model_type: the `model_type` of its config.json.
        names: the file's name of each tensor, without `.weight` or `.bias` -> the checkpoint's; `{layer}` in both.
        required: the file's key, after the architecture's name -> the key of config.json; all must be there.
        optional: the same, of keys that may be left out.
        constants: settings of config.json that a file does not hold.
        complete: derives the rest of config.json from the file and from the settings read so far.
        changes: the file's name of a tensor, without layer and suffix -> the function that puts its numbers back.
    """

    model_type: str
    names: dict[str, str]
    required: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    complete: Callable[[GGUFFile, Config], Config] = lambda file, config: {}
    changes: dict[str, Callable[[Array, Config], Array]] = field(default_factory=dict)


REFUSED = (
    "expert_count",
    "attention.scale",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
)
"""Settings, after the architecture's name, that change the model's results and are not read; 0 means unset."""


def checkpoint_of(file: GGUFFile) -> tuple[Config, RenamedTensors]:
    """Return the config.json and the tensors that the file was made from, under their names in that checkpoint.

    Raises:
        UserError: the architecture is not in CONVENTIONS, a setting is missing or turns on an unread feature, or
            a tensor that is there does not have the shape that its change needs.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in CONVENTIONS:
        raise UserError(
            f"{file.label}: general.architecture is {architecture!r}, which ovqk does not read from GGUF files; "
            f"allowed: {', '.join(CONVENTIONS)}. Give the Hugging Face directory instead."
        )
    convention = CONVENTIONS[architecture]
    config = _config(file, architecture, convention)
    names = {ours: theirs for theirs in file.tensors if (ours := _renamed(theirs, convention.names)) is not None}
    changes, shapes = dict[str, Change](), dict[str, tuple[int, ...]]()
    for ours, theirs in names.items():
        shapes[ours] = file.tensors[theirs].shape
        change = convention.changes.get(_kind(theirs))
        if change is not None:
            changes[ours] = partial(_changed, change, config, f"{file.label}: tensor '{theirs}'")
            shapes[ours] = shapes[ours][::-1] if change is _transposed else shapes[ours]
    return config, RenamedTensors(file, names, changes, shapes)


def _kind(name: str) -> str:
    """Return a tensor's name without layer and suffix: `attn_q`."""
    return ".".join(part for part in name.split(".") if not part.isdecimal() and part not in ("blk", "weight", "bias"))


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Return the checkpoint's name for a tensor in the file; None if ovqk knows no such tensor."""
    stem, _, suffix = name.rpartition(".")
    parts = stem.split(".")
    if parts[0] == "blk" and len(parts) > 2 and parts[1].isdecimal():
        found = names.get(".".join(("blk.{layer}", *parts[2:])))
        return None if found is None else f"{found.format(layer=int(parts[1]))}.{suffix}"
    return f"{names[stem]}.{suffix}" if stem in names else None


def _changed(change: Callable[[Array, Config], Array], config: Config, which: str, numbers: Array) -> Array:
    try:
        return change(numbers, config)
    except ValueError as error:
        raise UserError(f"{which} has shape {list(numbers.shape)}, which does not fit the file's settings.") from error


def _config(file: GGUFFile, architecture: str, convention: Convention) -> Config:
    settings, prefix = file.metadata, f"{architecture}."
    for key in REFUSED:
        if settings.get(prefix + key):
            raise UserError(
                f"{file.label}: the file sets {prefix}{key}={settings[prefix + key]}, which ovqk does not read from "
                "GGUF files; allowed: unset. Give the Hugging Face directory instead."
            )
    config: Config = {"model_type": convention.model_type, **convention.constants}
    for keys, must in ((convention.required, True), (convention.optional, False)):
        for theirs, ours in keys.items():
            value = number(file, theirs)
            if value is None and must:
                raise UserError(f"{file.label}: the file does not give {prefix}{theirs}, which ovqk needs.")
            if value is not None:
                config[ours] = value
    for name in ("bos", "eos"):
        token = settings.get(f"tokenizer.ggml.{name}_token_id")
        config |= {} if token is None else {f"{name}_token_id": token}
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config.setdefault("tie_word_embeddings", "output.weight" not in file.tensors)
    return config | convention.complete(file, config)


# --- layouts -------------------------------------------------------------------------------------------------


def _unpermuted(numbers: Array, heads: int) -> Array:
    """Reorder each head's rows (or bias) from pairs (0, 1), (2, 3), ... to pairs (0, d/2), (1, d/2 + 1), ..."""
    by_pair = numbers.reshape(heads, len(numbers) // heads // 2, 2, *numbers.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(numbers.shape)


def _queries(numbers: Array, config: Config) -> Array:
    return _unpermuted(numbers, config["num_attention_heads"])


def _keys(numbers: Array, config: Config) -> Array:
    return _unpermuted(numbers, config.get("num_key_value_heads") or config["num_attention_heads"])


def _gain(numbers: Array, config: Config) -> Array:
    return numbers - 1  # the file holds 1 + gamma


def _transposed(numbers: Array, config: Config) -> Array:
    return numbers.T


def _by_head(numbers: Array, config: Config) -> Array:
    """Reorder fused queries, keys and values from all queries, all keys, all values to the three of each head."""
    heads = config["num_attention_heads"]
    by_kind = numbers.reshape(3, heads, len(numbers) // 3 // heads, *numbers.shape[1:])
    return by_kind.swapaxes(0, 1).reshape(numbers.shape)


# --- the table -----------------------------------------------------------------------------------------------

KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
KEY_VALUE_HEADS = {"attention.head_count_kv": "num_key_value_heads"}
RMS_KEYS = KEYS | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
SLIDING = {"attention.sliding_window": "sliding_window"}

BLOCK = "blk.{layer}."
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    BLOCK + "attn_norm": "model.layers.{layer}.input_layernorm",
    BLOCK + "attn_q": "model.layers.{layer}.self_attn.q_proj",
    BLOCK + "attn_k": "model.layers.{layer}.self_attn.k_proj",
    BLOCK + "attn_v": "model.layers.{layer}.self_attn.v_proj",
    BLOCK + "attn_output": "model.layers.{layer}.self_attn.o_proj",
    BLOCK + "ffn_norm": "model.layers.{layer}.post_attention_layernorm",
    BLOCK + "ffn_gate": "model.layers.{layer}.mlp.gate_proj",
    BLOCK + "ffn_up": "model.layers.{layer}.mlp.up_proj",
    BLOCK + "ffn_down": "model.layers.{layer}.mlp.down_proj",
}
QUERY_KEY_NORM_NAMES = {
    BLOCK + "attn_q_norm": "model.layers.{layer}.self_attn.q_norm",
    BLOCK + "attn_k_norm": "model.layers.{layer}.self_attn.k_norm",
}
GEMMA2_NAMES = LLAMA_NAMES | {
    BLOCK + "post_attention_norm": "model.layers.{layer}.post_attention_layernorm",
    BLOCK + "ffn_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    BLOCK + "post_ffw_norm": "model.layers.{layer}.post_feedforward_layernorm",
}
PHI3_NAMES = LLAMA_NAMES | {
    BLOCK + "attn_qkv": "model.layers.{layer}.self_attn.qkv_proj",
    BLOCK + "ffn_up": "model.layers.{layer}.mlp.gate_up_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    BLOCK + "attn_norm": "transformer.h.{layer}.ln_1",
    BLOCK + "attn_qkv": "transformer.h.{layer}.attn.c_attn",
    BLOCK + "attn_output": "transformer.h.{layer}.attn.c_proj",
    BLOCK + "ffn_norm": "transformer.h.{layer}.ln_2",
    BLOCK + "ffn_up": "transformer.h.{layer}.mlp.c_fc",
    BLOCK + "ffn_down": "transformer.h.{layer}.mlp.c_proj",
}
GPT_NEOX_NAMES = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    BLOCK + "attn_norm": "gpt_neox.layers.{layer}.input_layernorm",
    BLOCK + "attn_qkv": "gpt_neox.layers.{layer}.attention.query_key_value",
    BLOCK + "attn_output": "gpt_neox.layers.{layer}.attention.dense",
    BLOCK + "ffn_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
    BLOCK + "ffn_up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
    BLOCK + "ffn_down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
}

GEMMA = Convention(
    model_type="gemma",
    names=LLAMA_NAMES,
    required=RMS_KEYS | KEY_VALUE_HEADS,
    constants={"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    complete=rotary,
    changes=dict.fromkeys(("output_norm", "attn_norm", "ffn_norm"), _gain),
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    names=GEMMA2_NAMES,
    required=GEMMA.required | SLIDING,
    optional={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    complete=gemma2,
    changes=GEMMA.changes | dict.fromkeys(("post_attention_norm", "post_ffw_norm"), _gain),
)

CONVENTIONS = {
    "llama": Convention(  # SmolLM and Mistral too
        model_type="llama",
        names=LLAMA_NAMES,
        required=RMS_KEYS,
        optional=KEY_VALUE_HEADS | SLIDING,
        constants={"hidden_act": "silu"},
        complete=llama,
        changes={"attn_q": _queries, "attn_k": _keys},
    ),
    "qwen2": Convention(
        model_type="qwen2",
        names=LLAMA_NAMES,
        required=RMS_KEYS | KEY_VALUE_HEADS,
        constants={"hidden_act": "silu", "use_sliding_window": False},
        complete=rotary,
    ),
    "qwen3": Convention(
        model_type="qwen3",
        names=LLAMA_NAMES | QUERY_KEY_NORM_NAMES,
        required=RMS_KEYS | KEY_VALUE_HEADS,
        constants={"hidden_act": "silu", "use_sliding_window": False},
        complete=llama,
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": replace(
        GEMMA2,
        model_type="gemma3_text",
        names=GEMMA2_NAMES | QUERY_KEY_NORM_NAMES,
        complete=gemma3,
        changes=GEMMA2.changes | dict.fromkeys(("attn_q_norm", "attn_k_norm"), _gain),
    ),
    "phi3": Convention(
        model_type="phi3",
        names=PHI3_NAMES,
        required=RMS_KEYS | KEY_VALUE_HEADS,
        optional=SLIDING,
        constants={"hidden_act": "silu", "pad_token_id": None},
        complete=phi3,
    ),
    "gpt2": Convention(
        model_type="gpt2",
        names=GPT2_NAMES,
        required={
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "context_length": "n_positions",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        constants={"activation_function": "gelu_new"},
        changes=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _transposed),
    ),
    "gptneox": Convention(
        model_type="gpt_neox",
        names=GPT_NEOX_NAMES,
        required=KEYS | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        constants={"hidden_act": "gelu"},
        complete=gpt_neox,
        changes={"attn_qkv": _by_head},
    ),
}
