"""Sliding windows that a model has in its masks alone, found by running it with a window so short that it shows."""

from typing import Any

import torch
from torch import Tensor

from ovqk.weights.block_probes import CannotRunError, ModelActivations, record_activations

SEEN_WINDOW = 2  # tokens: a window that shows on so few


def find_masked_windows(recorded: ModelActivations, model: Any, tokens: Tensor) -> str | None:
    """Note the sliding window for blocks that attend through a mask and are not told about the window.

    The model is run again with a window so short that it shows: a block has one if its queries then see no token
    further back.

    Returns:
        A note for the record if it cannot be seen whether a block has the config's window, else None.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    blind = [block for block in recorded.blocks if block is not None and block.window is None]
    if not isinstance(window, int) or window < 1 or not blind or len(tokens) <= SEEN_WINDOW:
        return None
    unseen = (
        f"config.json gives sliding_window={window}, and it cannot be seen which layers have it: metrics of positions "
        "are those of layers without a window"
    )
    config.sliding_window = SEEN_WINDOW
    try:
        short = record_activations(model, tokens, config.num_hidden_layers)
    except CannotRunError:
        return unseen
    finally:
        config.sliding_window = window
    told = None
    for block, other in zip(recorded.blocks, short.blocks, strict=True):
        if block is None or other is None or block.window is not None:
            continue
        if block.pattern is None or other.pattern is None:
            told = unseen
            continue
        far = torch.ones(other.pattern.shape[-2:], dtype=torch.bool).tril(-SEEN_WINDOW)
        was_seen = bool((block.pattern[..., far] != 0).any())
        if was_seen and not (other.pattern[..., far] != 0).any():
            block.window = window
    return told
