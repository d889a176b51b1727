"""Writes Hugging Face directories as GGUF files, as llama.cpp's convert_hf_to_gguf.py does for these architectures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH, TokenType
from safetensors.numpy import load_file

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "gpt2": MODEL_ARCH.GPT2,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
}


def to_file_layout(kind: str, name: str, data: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """What the converter does to one tensor."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    if kind in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        n = heads if ".q_proj." in name else config["num_key_value_heads"]
        halves = data.reshape(n, 2, data.shape[0] // n // 2, *data.shape[1:])
        return halves.swapaxes(1, 2).reshape(data.shape)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return data + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return data.T
    if kind == "gpt_neox" and "query_key_value" in name:
        by_head = data.reshape(heads, 3, data.shape[0] // 3 // heads, *data.shape[1:])
        return by_head.swapaxes(0, 1).reshape(data.shape)
    return data


def write_gguf(
    directory: Path,
    path: Path,
    quantisation: Mapping[str, GGMLQuantizationType] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a directory's weights and settings.

    Args:
        quantisation: ending of a tensor's name in the file -> its number format; float32 unless given.
        tokenizer: metadata of the tokenizer, without `tokenizer.ggml.`.
        settings: numbers or strings under the architecture's name that take the place of those derived.
        extra: tensors by their names in the file.
    """
    config = json.loads((directory / "config.json").read_text())
    kind = config["model_type"]
    architecture = ARCHITECTURES[kind]
    n_layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = get_tensor_name_map(architecture, n_layers)
    writer = GGUFWriter(path, {"gemma3_text": "gemma3", "gpt_neox": "gptneox", "mistral": "llama"}.get(kind, kind))
    for key, value in (_settings(kind, config) | dict(settings or {})).items():
        if value is not None:
            _add(writer, f"{writer.arch}.{key}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    tensors = load_file(directory / "model.safetensors")
    for name, data in tensors.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        numbers = np.ascontiguousarray(to_file_layout(kind, name, data.astype(np.float32), config))
        wanted = next((q for end, q in (quantisation or {}).items() if own.endswith(end)), GGMLQuantizationType.F32)
        if wanted == GGMLQuantizationType.F32:
            writer.add_tensor(own, numbers)
        else:
            writer.add_tensor(own, quants.quantize(numbers, wanted), raw_dtype=wanted)
    for own, numbers in (extra or {}).items():
        writer.add_tensor(own, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "gpt2":
        return {
            "block_count": config["n_layer"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": config["n_inner"],
            "attention.head_count": config["n_head"],
            "context_length": config["n_positions"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    found = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "context_length": config["max_position_embeddings"],
    }
    rotation = config.get("rope_parameters") or {}
    rotation = rotation.get("full_attention", rotation)
    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    share = rotation.get("partial_rotary_factor", config.get("rotary_pct", 1.0))
    found |= {"rope.freq_base": rotation.get("rope_theta"), "rope.dimension_count": int(share * d_head)}
    if kind == "gpt_neox":
        parallel = config["use_parallel_residual"]
        return found | {"attention.layer_norm_epsilon": config["layer_norm_eps"], "use_parallel_residual": parallel}
    return found | {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": d_head if "head_dim" in config else None,
        "attention.value_length": d_head if "head_dim" in config else None,
        "attention.sliding_window": config.get("sliding_window") if kind.startswith(("gemma", "phi3")) else None,
    }


def tokenizer_metadata(directory: Path, pre: str) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer, from a directory's tokenizer.json."""
    content = json.loads((directory / "tokenizer.json").read_text())
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    vocabulary = content["model"]["vocab"] | {token["content"]: index for index, token in added.items()}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    kinds = [
        TokenType.NORMAL if vocabulary[token] not in added
        else TokenType.CONTROL if added[vocabulary[token]]["special"] else TokenType.USER_DEFINED
        for token in tokens
    ]  # fmt: skip
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [int(kind) for kind in kinds],
        "merges": merges,
        "add_bos_token": False,
    }
