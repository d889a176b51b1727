"""A GGUF file's settings as config.json has them: derived ones, and those for single architectures."""

import math
import re
from typing import Any

from ovqk.checkpoints.gguf_file import GGUFFile
from ovqk.errors import UserError

Config = dict[str, Any]

FRACTIONS = ("epsilon", "softcapping", "factor", "scale_linear", "freq_base", "freq_base_swa", "beta_fast", "beta_slow")
"""Endings of settings that need not be whole numbers."""
PARTLY_ROTATED = ("gpt_neox", "phi3")
"""Model types that may rotate only a head's first components."""


def setting(file: GGUFFile, key: str, default: Any = None) -> Any:
    """Return a setting for the file's architecture.

    Raises:
        UserError: it is a list, which gives each layer another.
    """
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if isinstance(value, list):
        raise UserError(f"{file.label}: {key} holds a list; allowed: one value, the same for all layers.")
    return value


def number(file: GGUFFile, key: str, default: float | None = None) -> Any:
    """Return a setting that is a number: a whole one, unless its name says otherwise.

    Raises:
        UserError: it is anything else.
    """
    value = setting(file, key, default)
    whole = not key.endswith(FRACTIONS)
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if value is None or (number and 0 <= value < math.inf):  # nan is neither
        return value
    raise UserError(
        f"{file.label}: the file gives {value!r} for {file.metadata['general.architecture']}.{key}; allowed: a "
        f"{'whole ' if whole else ''}number that is finite and not negative."
    )


def rotary(file: GGUFFile, config: Config) -> Config:
    """Return `head_dim`, and the rotation as `rope_parameters`.

    Raises:
        UserError: values have another width than keys, only a part of a head is rotated although the architecture
            rotates the whole, or the scaling is unknown.
    """
    heads = config["num_attention_heads"]
    d_head = number(file, "attention.key_length") or config["hidden_size"] // max(heads, 1)
    d_value = number(file, "attention.value_length") or d_head
    if d_value != d_head:
        raise UserError(
            f"{file.label}: each head has {d_head} components for keys and {d_value} for values; allowed: the same "
            "number for both."
        )
    parameters: Config = {"rope_type": "default", "rope_theta": float(number(file, "rope.freq_base", 10000.0))}
    rotated = number(file, "rope.dimension_count") or d_head
    if rotated != d_head and config["model_type"] not in PARTLY_ROTATED:
        raise UserError(
            f"{file.label}: the file rotates {rotated} of a head's {d_head} components; allowed for its architecture: "
            "all of them."
        )
    if rotated != d_head:
        parameters["partial_rotary_factor"] = rotated / d_head
    return {"head_dim": d_head, "rope_parameters": parameters | _scaling(file, config)}


def _scaling(file: GGUFFile, config: Config) -> Config:
    """Return how the rotation is scaled, in `rope_parameters`' words.

    Llama 3's scaling is in the file as the factors that it divides frequencies by; LongRoPE with these factors for
    every length is the same rotation.
    """
    factor = number(file, "rope.scaling.factor", number(file, "rope.scale_linear"))
    kind = setting(file, "rope.scaling.type", "linear" if factor else "none")
    attention = number(file, "rope.scaling.attn_factor")
    trained = number(file, "rope.scaling.original_context_length")
    if "rope_factors_short.weight" in file.tensors:
        short, long = (_factors(file, f"rope_factors_{length}.weight") for length in ("short", "long"))
        scaling: Config = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        scaling |= {} if attention is None else {"attention_factor": attention}
        return scaling | {"original_max_position_embeddings": trained or config["max_position_embeddings"]}
    if "rope_freqs.weight" in file.tensors:
        divisors, trained = _factors(file, "rope_freqs.weight"), config["max_position_embeddings"]
        scaling = {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
        return scaling | {"original_max_position_embeddings": trained}
    if kind == "none":
        return {}
    if kind == "linear" and factor:
        return {} if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and trained and attention in (None, 1):
        bounds = {ours: number(file, f"rope.scaling.yarn_{ours}") for ours in ("beta_fast", "beta_slow")}
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
        return scaling | {ours: bound for ours, bound in bounds.items() if bound is not None}
    raise UserError(
        f"{file.label}: the file scales its rotary positions by {kind!r} (factor {factor}, first trained on {trained} "
        "tokens); allowed: none, linear, yarn with a factor and the first context length and no factor of its own for "
        "the scores, or factors for each frequency."
    )


def _factors(file: GGUFFile, name: str) -> list[float]:
    if name not in file.tensors or not file.tensors[name].known:
        raise UserError(f"{file.label}: the tensor '{name}', which scales the rotary frequencies, cannot be read.")
    return [float(factor) for factor in file.read(name).flatten()]


def llama(file: GGUFFile, config: Config) -> Config:
    """Return the rotation, and whether there are biases, which the file shows by holding one of them."""
    biases = {
        "attention_bias": r"blk\.\d+\.attn_(q|k|v|output)\.bias",
        "mlp_bias": r"blk\.\d+\.ffn_(gate|up|down)\.bias",
    }
    held = {key: any(re.fullmatch(name, other) for other in file.tensors) for key, name in biases.items()}
    return rotary(file, config) | held


def gpt_neox(file: GGUFFile, config: Config) -> Config:
    """Return the rotation, for a part of each head, and whether attention and MLP read the same stream."""
    rotation = rotary(file, config)
    share = rotation["rope_parameters"].pop("partial_rotary_factor", 1.0)
    theta = rotation["rope_parameters"]["rope_theta"]
    return {"rotary_pct": share, "rotary_emb_base": theta, "rope_parameters": rotation["rope_parameters"]} | {
        "use_parallel_residual": bool(setting(file, "use_parallel_residual", True))
    }


def phi3(file: GGUFFile, config: Config) -> Config:
    """Return the rotation, with the keys that transformers reads beside `rope_parameters` too."""
    rotation = rotary(file, config)
    trained = rotation["rope_parameters"].get("original_max_position_embeddings")
    top = {} if trained is None else {"original_max_position_embeddings": trained}
    share = rotation["rope_parameters"].get("partial_rotary_factor")
    return rotation | top | ({} if share is None else {"partial_rotary_factor": share})


def gemma2(file: GGUFFile, config: Config) -> Config:
    """Return the settings that the file leaves to the model: every other layer slides, and how scores are scaled.

    Scores are divided by sqrt(d_head), and in the largest model by sqrt(d_model / heads), as llama.cpp does.
    """
    rotation = rotary(file, config)
    largest = 46  # layers of Gemma 2 27B: no key of the file tells its scale
    return rotation | _scale(config, rotation, largest) | {"layer_types": _layer_types(config, period=2)}


def gemma3(file: GGUFFile, config: Config) -> Config:
    """Return the same for Gemma 3: every sixth layer sees all, the others slide, with a rotation of their own."""
    rotation = rotary(file, config)
    largest = 62  # layers of Gemma 3 27B
    period = number(file, "attention.sliding_window_pattern") or 6
    local = {"rope_type": "default", "rope_theta": float(number(file, "rope.freq_base_swa", 10000.0))}
    rotations = {"full_attention": rotation["rope_parameters"], "sliding_attention": local}
    kinds = _layer_types(config, period)
    return rotation | _scale(config, rotation, largest) | {"layer_types": kinds, "rope_parameters": rotations}


def _scale(config: Config, rotation: Config, largest: int) -> Config:
    whole = config["num_hidden_layers"] == largest
    scale = config["hidden_size"] // config["num_attention_heads"] if whole else rotation["head_dim"]
    return {"query_pre_attn_scalar": scale}


def _layer_types(config: Config, period: int) -> list[str]:
    n_layers = config["num_hidden_layers"]
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(n_layers)]
