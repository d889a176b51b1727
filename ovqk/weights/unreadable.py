"""Architectures that ovqk does not read, told from config.json before anything large is imported or loaded."""

from collections.abc import Mapping
from typing import Any

from ovqk.errors import UserError
from ovqk.weights.family import as_transformers_reads

KIND_KEYS = ("layer_types", "layers_block_type", "block_types", "_block_types")
"""Keys in config.json, or attributes of transformers' config, that give each layer's kind."""
WITHOUT_HEADS = ("linear", "conv", "mamba", "recurrent", "ssm", "delta", "moe", "mlp")
"""Words in a layer kind's name which show that such layers have no attention heads."""
PER_LAYER = ("num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads", "head_dim")
TWO_KINDS = (
    ("global_head_dim", "head_dim"),
    ("num_global_key_value_heads", "num_key_value_heads"),
    ("swa_num_attention_heads", "num_attention_heads"),
    ("swa_num_key_value_heads", "num_key_value_heads"),
    ("swa_head_dim", "head_dim"),
    ("v_head_dim", "head_dim"),
    ("swa_v_head_dim", "v_head_dim"),
)
"""Pairs of keys that give some heads another shape than others, or values another width than keys."""


def refuse_unreadable(label: str, config: Mapping[str, Any]) -> None:
    """Refuse an architecture whose config.json says that its attention is not W_Q, W_K, W_V, W_O with like heads.

    Args:
        label: how messages name the checkpoint.
        config: config.json, as it is or completed by transformers.

    Raises:
        UserError: it says so; the message names what the architecture has and what is allowed.
    """
    text = config.get("text_config")
    settings = {**config, **text} if isinstance(text, Mapping) else dict(config)
    reason = _reason(settings)
    if reason is not None:
        name = ", ".join(config.get("architectures") or [str(config.get("model_type"))])
        raise UserError(f"{label}: {name} {reason}.")


def refuse_unreadable_defaults(label: str, config: Mapping[str, Any]) -> None:
    """Refuse an architecture that is not read, by config.json with transformers' defaults for missing keys.

    Raises:
        UserError: the architecture is not read.
    """
    from transformers import AutoConfig

    try:
        full = AutoConfig.for_model(**as_transformers_reads(config))
        text = full.get_text_config()
        settings = {**full.to_dict(), **text.to_dict(), "text_config": None}
        settings |= {key: getattr(text, key) for key in KIND_KEYS if isinstance(getattr(text, key, None), list)}
        heads = getattr(text, "num_attention_heads", None)
    except Exception:  # of a config that transformers does not know; loading the model tells
        return
    refuse_unreadable(label, settings | {"architectures": config.get("architectures")})
    if heads is None and not any(hasattr(text, key) for key in ("num_heads", "n_heads", "n_head")):
        name = ", ".join(config.get("architectures") or [str(config.get("model_type"))])
        stacks = [
            key for key, part in settings.items() if isinstance(part, Mapping) and part.get("num_attention_heads")
        ]
        if len(stacks) > 1:
            raise UserError(
                f"{label}: {name} has several stacks of layers ({', '.join(stacks)}); allowed: a model with one stack "
                "of layers."
            )
        raise UserError(f"{label}: {name} has layers without attention heads; allowed: attention in every layer.")


def _reason(config: Mapping[str, Any]) -> str | None:
    """Say which feature ovqk does not read, and what is allowed; None if it reads all."""
    if config.get("is_encoder_decoder"):
        return (
            "is an encoder-decoder model, with two stacks of layers and attention from one to the other; allowed: a "
            "model with one stack of layers"
        )
    if config.get("kv_lora_rank"):
        return (
            f"has multi-head latent attention (kv_lora_rank={config['kv_lora_rank']}): keys and values are read from a "
            "normalised latent vector, so that no head has a W_K and W_V of the residual stream; allowed: multi-head "
            "and grouped-query attention"
        )
    others = _layers_without_heads(config)
    if others:
        told = "; ".join(f"{kind}: {_listed(layers)}" for kind, layers in others.items())
        return f"has layers without attention heads ({told}); allowed: attention in every layer"
    width, own = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if width is not None and own is not None and width != own:
        return (
            f"projects its embeddings from word_embed_proj_dim={width} to hidden_size={own}; allowed: embeddings of "
            "the width of the residual stream"
        )
    if config.get("cross_attention_layers"):
        return (
            f"has layers that attend to pictures ({_listed(config['cross_attention_layers'])}); allowed: attention to "
            "the model's own tokens in every layer"
        )
    if config.get("num_kv_shared_layers"):
        return (
            f"has {config['num_kv_shared_layers']} layers that use the keys and values of earlier layers "
            "(num_kv_shared_layers); allowed: keys and values in every layer"
        )
    return _unlike_heads(config)


def _layers_without_heads(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return each layer kind without attention heads, with its layers."""
    found: dict[str, list[int]] = {}
    for key in KIND_KEYS:
        kinds = config.get(key)
        for layer, kind in enumerate(kinds if isinstance(kinds, list) else []):
            if isinstance(kind, str) and any(part in kind for part in WITHOUT_HEADS):
                found.setdefault(kind, []).append(layer)
        if found:
            return found
    period, offset = config.get("attn_layer_period"), config.get("attn_layer_offset")
    n_layers = config.get("num_hidden_layers")
    if isinstance(period, int) and period > 1 and isinstance(offset, int) and isinstance(n_layers, int):
        return {"mamba": [layer for layer in range(n_layers) if layer % period != offset]}
    return found


def _unlike_heads(config: Mapping[str, Any]) -> str | None:
    """Say why the model's heads have not all the same shape; None if they have."""
    for key in PER_LAYER:
        each = config.get(key)
        if isinstance(each, list) and len(set(map(str, each))) > 1:
            return f"has another {key} in each layer ({_listed(each)}); allowed: the same in every layer"
    overrides = config.get("per_layer_config")
    for layer, own in overrides.items() if isinstance(overrides, Mapping) else ():
        unlike = [
            key for key in PER_LAYER if isinstance(own, Mapping) and own.get(key, config.get(key)) != config.get(key)
        ]
        if unlike:
            return (
                f"has heads of another shape in layer {layer} ({unlike[0]}={own[unlike[0]]} instead of "
                f"{config.get(unlike[0])}); allowed: the same in every layer"
            )
    for one, other in TWO_KINDS:
        if isinstance(config.get(one), int) and isinstance(config.get(other), int) and config[one] != config[other]:
            return (
                f"has heads of two shapes ({one}={config[one]}, {other}={config[other]}); allowed: heads of one shape, "
                "with values as wide as keys"
            )
    return None


def _listed(numbers: list[int]) -> str:
    """Spell out a list's first numbers."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ..." if len(numbers) > 8 else shown
