"""Effective embeddings compared with the residual streams that the running model has for the same words on prompts.

Task readouts are only as good as the row through which they read a word (definitions: section 7).
"""

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.activations.batches import Prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.parts import WORDS, Steps
from ovqk.config.schema import RoleActivationsConfig
from ovqk.tasks.matches import MIN_WORDS
from ovqk.tasks.readouts import Readout
from ovqk.weights.types import Architecture

NEAR = 0.5
"""If a layer's cosine is below this, a note names the layer."""


def sources_of(roles: Mapping[str, RoleActivationsConfig]) -> list[str]:
    """Return the labels that the roles' heads look at."""
    return sorted({config.attention.source for config in roles.values() if config.attention is not None})


def prompt_streams(
    running: RunningModel, prompts: Prompts, labels: Collection[str], ids: Int[Tensor, " word"], steps: Steps
) -> tuple[Int[Tensor, " seen"], Float[Tensor, "layer seen d_model"]]:
    """Return the words at these labels in the clean prompts, and their mean residual stream before each layer.

    Args:
        running: the model that runs.
        prompts: the prompts; a label outside a batch's prompts is skipped.
        labels: labels such as "S1" or "S1+1".
        ids: the words' tokens, in rising order.
        steps: counts off batches.
    """
    sums: dict[int, Tensor] = {}
    counts = torch.zeros(len(ids))
    for number in steps(len(prompts.batches), WORDS):
        batch = prompts.batches[number]
        found = [place for label in labels if (place := batch.position(label)) is not None]
        if not found:
            continue
        places = torch.stack(found, 1)  # [prompt, label]
        tokens = batch.tokens.gather(1, places)
        word = torch.searchsorted(ids, tokens).clamp_max(len(ids) - 1)
        ours = ids[word] == tokens
        counts.index_add_(0, word[ours], torch.ones(int(ours.sum())))

        def add(value: Tensor, hook: Any, layer: int, places: Tensor, word: Tensor, ours: Tensor) -> None:
            every = torch.arange(len(value), device=value.device)[:, None]
            rows = value[every, places.to(value.device)].float().cpu()
            total = sums.setdefault(layer, torch.zeros(len(ids), rows.shape[-1]))
            total.index_add_(0, word[ours], rows[ours])

        of_batch = partial(add, places=places, word=word, ours=ours)
        names = [(f"blocks.{layer}.hook_in", partial(of_batch, layer=layer)) for layer in range(running.n_layers)]
        running.run_hooked(batch.tokens, names)
    seen = counts > 0
    if not sums:
        return ids[:0], torch.zeros(running.n_layers, 0, 1)
    means = torch.stack([sums[layer] for layer in range(running.n_layers)])[:, seen] / counts[seen, None]
    return ids[seen], means


def centred_cosine(a: Float[Tensor, "word d_model"], b: Float[Tensor, "word d_model"]) -> float:
    """Return the cosine between two matrices after each loses its mean row, in [-1, 1]; nan if one has no spread."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else math.nan


def fidelity_table(
    readout: Readout,
    architecture: Architecture,
    ids: Int[Tensor, " word"],
    streams: Float[Tensor, "layer word d_model"],
) -> pd.DataFrame:
    """Return a row for each layer and available effective embedding; no rows if fewer than MIN_WORDS words are seen.

    Columns: `layer`; `embedding` (`token`, `block0`, `stream`); `is_read`, whether the layer's task readouts use it;
    `n_words`; `cosine`, over words, of both rows as the layer's norm leaves them (`centred_cosine`).

    Args:
        readout: the task's variable.
        architecture: the model's architecture.
        ids: the words seen on prompts.
        streams: their mean residual stream before each layer.
    """
    if len(ids) < MIN_WORDS:
        return pd.DataFrame()
    rows = []
    for layer, stream in enumerate(streams):
        actual = architecture.normalised(stream)
        for embedding, kind in readout.kinds(layer).items():
            cosine = centred_cosine(readout.effective(ids, kind).cpu(), actual)
            is_read = kind == readout.kind(layer)
            rows.append((layer, embedding, is_read, len(ids), cosine))
    return pd.DataFrame(rows, columns=["layer", "embedding", "is_read", "n_words", "cosine"])


def fidelity_note(table: pd.DataFrame) -> str | None:
    """Say in which layers task readouts read words unlike the running model's; None if they do not."""
    if not len(table):
        return None
    read = table[table["is_read"] & (table["cosine"] < NEAR)]
    if not len(read):
        return None
    layers, cosines = read["layer"].tolist(), read["cosine"].tolist()
    least = min(cosines)
    spans = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from {layers[0]} to {layers[-1]}"
    better = (
        "" if "stream" in set(table["embedding"]) else "; analysis.embedding=stream reads words as the model runs them"
    )
    return (
        f"task readouts of {spans} read words unlike those of the running model (cosine below {NEAR:g}; least "
        f"{least:.2f}, in layer {layers[cosines.index(least)]}, fidelity.parquet){better}"
    )
