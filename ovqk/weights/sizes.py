"""The sizes that config.json gives, compared with the tensors that are there before anything of such sizes is made."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.errors import UserError

LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "attention_types",
)  # fmt: skip
"""Keys for how many layers there are: each has tensors of its own."""
WIDTHS = (
    "hidden_size", "n_embd", "n_embed", "d_model", "num_attention_heads", "n_head", "n_heads", "num_heads",
    "num_key_value_heads", "num_kv_heads", "head_dim", "rotary_dim",
)  # fmt: skip
"""Keys for lengths that some tensor has, or exceeds."""
WIDTHS_OF_ALL = (
    "vocab_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size", "num_experts",
    "num_local_experts", "n_routed_experts", "word_embed_proj_dim", "embedding_size",
)  # fmt: skip
"""The same for a model that is loaded whole."""
MARGIN = 4
"""Times that a width may exceed the longest side of a tensor: matrices may be stored flat, packed or not at all."""
MORE, FEW = 4, 2 * 10**8
"""A model has up to so many times its checkpoint's numbers (shared tensors are stored once), or FEW."""


def refuse_sizes(checkpoint: Checkpoint, loaded_whole: bool) -> None:
    """Refuse a config.json with numbers that the checkpoint's tensors cannot have.

    Args:
        checkpoint: the checkpoint.
        loaded_whole: whether transformers makes the whole model, by all sizes of its config.

    Raises:
        UserError: a number is too large; the message names it.
    """
    tensors = {**checkpoint.shapes, **checkpoint.tensors.unread}
    longest = MARGIN * max((max(shape, default=1) for shape in checkpoint.shapes.values()), default=1)
    bounds = dict.fromkeys(LAYERS, max(1, len(tensors)))
    bounds |= dict.fromkeys((*WIDTHS, *(WIDTHS_OF_ALL if loaded_whole else ())), longest)
    for key, number in _numbers(checkpoint.config):
        most = bounds.get(key.rpartition(".")[2])
        if most is not None and number > most:
            raise UserError(
                f"{checkpoint.label}: config.json gives '{key}' as {number}, but the checkpoint's {len(tensors)} "
                f"tensors have sides up to {longest // MARGIN} only. Is it another checkpoint's config.json?"
            )


def refuse_larger(checkpoint: Checkpoint, numbers: int) -> None:
    """Refuse a config.json whose model has many more numbers than the checkpoint.

    Args:
        checkpoint: the checkpoint.
        numbers: how many the model has.

    Raises:
        UserError: it has.
    """
    stored = sum(map(math.prod, checkpoint.shapes.values()))
    if numbers > max(FEW, MORE * stored):
        raise UserError(
            f"{checkpoint.label}: config.json describes a model with {numbers} numbers, but the checkpoint holds "
            f"{stored}; allowed: the config.json that belongs to this checkpoint."
        )


def _numbers(config: Mapping[str, Any], at: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield keys and whole numbers in a config and in the configs inside it; of a list, under the list's key."""
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 4:
            yield from _numbers(value, f"{at}{key}.", depth + 1)
        for each in _flat(value):
            yield f"{at}{key}", each


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    for each in value if isinstance(value, list) else ():
        yield from _flat(each)
