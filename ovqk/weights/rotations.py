"""The rotary positions that config.json describes, by its older or newer keys, as transformers understands them.

transformers completes a config with the model type's defaults and moves every rotary key to where its models look;
ovqk takes the rotation from there. A plain Llama config is read without importing it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.errors import UserError
from ovqk.weights.allowed import refuse_wrong_values, reworded
from ovqk.weights.family import Family, as_transformers_reads
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
UP_TO_A_LENGTH = ("longrope", "dynamic")
"""Scalings that change when a text is longer than a limit: ovqk reads the rotation for texts up to that limit."""
UNREADABLE = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def completed(checkpoint: Checkpoint, family: Family) -> tuple[dict[str, Any], Any]:
    """Return config.json with the model type's defaults, the text model's if there are several, and as an object.

    The object is transformers' own; None if config.json tells everything and transformers is not needed.

    Raises:
        UserError: a key's value is not allowed, or transformers cannot read it.
    """
    config = checkpoint.config
    refuse_wrong_values(checkpoint.label, config, family)
    told = all(any(key in config for key in keys) for part, keys in family.keys.items() if part not in ABSENT)
    if family.complete and told:
        return config, None
    whole = _asked(checkpoint)
    full = whole.get_text_config()
    keys: dict[str, Any] = full.to_dict()
    if hasattr(full, "attention_layers"):  # GPT-Neo's to_dict leaves out the kinds that its pattern gives
        keys["attention_layers"] = list(full.attention_layers)
    if whole is not full:  # the model that holds both ties, and not its text model
        keys["tie_word_embeddings"] = bool(getattr(whole, "tie_word_embeddings", False))
    return keys, full


ABSENT = ("d_head", "n_kv_heads")
"""Settings that a config may leave out although the model type has no default for them."""


def read_rotations(
    checkpoint: Checkpoint, family: Family, architecture: Architecture, full: Any
) -> tuple[dict[str | None, Rotary], list[str]]:
    """Read the rotation for each kind of layer, under None if all layers have the same, and notes on them.

    Args:
        checkpoint: its config.json as it stands.
        family: the row in the table that reads it.
        architecture: the model's sizes and kinds.
        full: the config as transformers completes it; None if config.json tells everything.

    Raises:
        UserError: the settings cannot be read, are not supported, or rotate what is no head.
    """
    if family.positions != "rotary":
        return {}, []
    label, d_head = checkpoint.label, architecture.d_head
    names = ["default"]
    rotations: dict[str | None, Rotary]
    try:
        if "rotary_dim" in family.keys:  # GPT-J
            dim = full.rotary_dim
            if dim < 1 or dim % 2:
                raise UserError(f"{label}: config.json gives 'rotary_dim' as {dim}; allowed: an even integer above 0.")
            rotations = {None: Rotary(_inverse_frequencies(10000.0, dim), family.interleaved)}
        elif full is None and (theta := _plain_theta(checkpoint.config, family)) is not None:
            rotations = {None: Rotary(_inverse_frequencies(theta, d_head), family.interleaved)}
        else:
            full = full or _asked(checkpoint)
            rotations, names = _read(label, family, d_head, full)
    except UNREADABLE as error:
        given = getattr(full, "rope_parameters", None) or checkpoint.config.get("rope_scaling")
        raise UserError(f"{label}: the rotary settings of config.json give no rotation: {given}.") from error
    for rotary in rotations.values():
        turned = 2 * len(rotary.inverse_frequencies)
        partial = family.partial_rotary or "rotary_dim" in family.keys
        if turned > d_head or (turned != d_head and not partial) or not rotary.inverse_frequencies.isfinite().all():
            allowed = "pairs within a head" if partial else "all of a head"
            raise UserError(
                f"{label}: the rotary settings of config.json turn {turned} components of {d_head} of a head; allowed "
                f"for model_type={checkpoint.config.get('model_type')}: {allowed}, at finite frequencies."
            )
    notes = [
        f"the rotary scaling '{name}' depends on the length of a text: this is the rotation of texts no longer than "
        f"{_longest(name, full)} tokens"
        for name in sorted({*names} & {*UP_TO_A_LENGTH})
    ]
    return rotations, notes + _ignored(checkpoint, family, d_head)


def _asked(checkpoint: Checkpoint) -> Any:
    """Return the config as transformers completes it.

    Raises:
        UserError: it cannot.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**as_transformers_reads(checkpoint.config))
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{checkpoint.label}: config.json cannot be read ({reworded(error)}).") from error


def _read(label: str, family: Family, d_head: int, full: Any) -> tuple[dict[str | None, Rotary], list[str]]:
    """Return the rotations, and how each is scaled, by name."""
    parameters = full.rope_parameters
    nested = {kind: inner for kind, inner in parameters.items() if inner is None or isinstance(inner, Mapping)}
    if any(nested.values()) and not family.rotations_by_kind:
        given = ", ".join(f"'{kind}'" for kind in nested)
        raise UserError(
            f"{label}: config.json gives rotary settings in 'rope_parameters' by kind of layer ({given}), but a model "
            f"of model_type={full.model_type} has one rotation for all layers; allowed: settings for all of them."
        )
    kinds: dict[str | None, Any] = {**nested} if any(nested.values()) else {None: parameters}
    rotations: dict[str | None, Rotary] = {}
    names = []
    for kind, inner in kinds.items():
        if inner is None:
            rotations[kind] = no_rotation()
            continue
        names.append(inner.get("rope_type", "default"))
        rotations[kind] = _rotary(label, family, d_head, full, kind, inner)
    return rotations, names


def _plain_theta(config: Mapping[str, Any], family: Family) -> float | None:
    """Return the frequencies' base if nothing scales them; None if transformers is to be asked.

    As in transformers, a value beside the scaling's type comes before the key at the top.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = any(isinstance(value, Mapping) for value in parameters.values())
    if nested or parameters.get("rope_type", parameters.get("type", "default")) != "default":
        return None
    return float(parameters.get("rope_theta", config.get("rope_theta", family.default_theta)))


def _rotary(
    label: str, family: Family, d_head: int, full: Any, kind: str | None, parameters: Mapping[str, Any]
) -> Rotary:
    """Return one kind of layer's rotation."""
    name = parameters.get("rope_type", "default")
    if name == "default":
        partial = parameters.get("partial_rotary_factor", 1.0) if family.partial_rotary else 1.0
        dim = int(d_head * partial)
        return Rotary(_inverse_frequencies(float(parameters["rope_theta"]), dim), family.interleaved)
    if name not in SCALINGS:
        raise UserError(f"{label}: rotary scaling '{name}' is not supported; allowed: {', '.join(SCALINGS)}.")
    if name == "longrope":
        pairs = int(d_head * parameters.get("partial_rotary_factor", 1.0)) // 2
        for key in ("short_factor", "long_factor"):
            if len(parameters[key]) not in (1, pairs):
                raise UserError(
                    f"{label}: config.json gives {len(parameters[key])} numbers in '{key}' of its rotary settings; "
                    f"allowed: {pairs}, one for each pair of components that is rotated."
                )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[name](full, torch.device("cpu"), layer_type=kind)
    return Rotary(frequencies, family.interleaved, scale=float(factor) ** 2)


def no_rotation() -> Rotary:
    """Return the rotation for a layer without positions: by no angle, whatever the offset."""
    return Rotary(torch.zeros(1))


def _inverse_frequencies(theta: float, dim: int) -> Float[Tensor, " pair"]:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _longest(name: str, full: Any) -> int:
    """Return the longest text with this rotation."""
    longest: int = full.max_position_embeddings
    if name == "longrope":
        parameters = full.rope_parameters
        longest = parameters.get("original_max_position_embeddings") or longest
    return longest


def _ignored(checkpoint: Checkpoint, family: Family, d_head: int) -> list[str]:
    """Return a note for a key that the config sets but transformers does not read for this model type."""
    config = checkpoint.config
    places = (config, config.get("rope_scaling"), config.get("rope_parameters"))
    factors = [place.get("partial_rotary_factor") for place in places if isinstance(place, Mapping)]
    factor = next((factor for factor in factors if factor is not None), 1.0)
    if family.partial_rotary or "rotary_dim" in family.keys or factor == 1.0:
        return []
    return [
        f"config.json sets partial_rotary_factor={factor}, which transformers does not read for "
        f"model_type={config.get('model_type')}: all {d_head} components of a head are rotated"
    ]
