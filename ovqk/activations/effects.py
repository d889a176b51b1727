"""Effects when a head's output is replaced by its output on the counterfactual prompt (definitions: section 7)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.activations.batches import Prompts
from ovqk.activations.forward import Look, Replacement, RunningModel
from ovqk.activations.parts import REPLACED as REPLACEMENTS
from ovqk.activations.parts import Steps
from ovqk.activations.quantities import Observed
from ovqk.memory import FreedMemory
from ovqk.weights.types import Head

MOST_ROWS, MOST_TOKENS = 512, 4096
"""The largest numbers of rows (prompts times replacements) and of tokens that run together."""
REPLACED, MEAN, RESTORED = range(3)
LEAST_CHANGE = 1e-3
"""The largest change, over the mean logit difference, that rounding may make when a head is replaced by itself."""


@dataclass(frozen=True)
class Patch:
    """A replacement for a head's output at a label, possibly together with other heads.

    Attributes:
        head: the head; None if only `others` are replaced.
        query: the label at whose position outputs are replaced.
        others: further heads that are replaced at the same label.
    """

    head: Head | None
    query: str
    others: tuple[Head, ...] = ()

    @property
    def heads(self) -> tuple[Head, ...]:
        """All heads that are replaced."""
        return self.others if self.head is None else tuple(dict.fromkeys((*self.others, self.head)))


@dataclass(frozen=True)
class Effects:
    """Logit differences and receivers' attention under a replacement; nan for prompts in which its label has no place.

    Attributes:
        difference: the logit difference if the output is taken from the prompt's own counterfactual.
        mean_difference: the same if the output is the mean over the counterfactuals in the prompt's cluster.
        restored: the logit difference on the counterfactual prompt, with the head's output on the clean prompt.
        look: (query, source, control) -> all heads' attention under the replacement of `difference`.
        mean_look: the same under the replacement of `mean_difference`.
    """

    difference: Float[Tensor, " prompt"]
    mean_difference: Float[Tensor, " prompt"]
    restored: Float[Tensor, " prompt"]
    look: Mapping[tuple[str, str, str], Float[Tensor, "prompt layer head"]]
    mean_look: Mapping[tuple[str, str, str], Float[Tensor, "prompt layer head"]]


def measure_effects(
    running: RunningModel,
    prompts: Prompts,
    observed: Observed,
    patches: Sequence[Patch],
    looks: Sequence[tuple[str, str, str]],
    steps: Steps,
    kinds: Sequence[int] = (REPLACED,),
    what: str = REPLACEMENTS,
) -> dict[Patch, Effects]:
    """Run every replacement on every prompt.

    Args:
        running: the model that runs.
        prompts: the prompts.
        observed: the runs over the prompts, which hold the outputs to put in.
        patches: the replacements.
        looks: the attentions of receivers to read.
        steps: counts off the batches.
        kinds: which kinds to run: REPLACED, MEAN, RESTORED; the others are nan.
        what: the steps' name.
    """
    means = _cluster_means(prompts, observed, {patch.query for patch in patches})
    n_layers, n_heads = running.n_layers, running.n_heads
    total = len(observed.difference)
    nan = float("nan")
    numbers = torch.full((len(patches), 3, total), nan)
    seen = torch.full((len(patches), 2, len(looks), total, n_layers, n_heads), nan)
    start = 0
    freed = FreedMemory()
    for number in steps(len(prompts.batches), what) if patches else ():
        freed.give_back()
        batch, outputs = prompts.batches[number], observed.outputs[number]
        rows = slice(start, start + len(batch))
        start += len(batch)
        places = [(index, patch, batch.position(patch.query)) for index, patch in enumerate(patches)]
        here = [(index, patch, place) for index, patch, place in places if place is not None]
        if not here:
            continue
        found = [tuple(map(batch.position, look)) for look in looks]
        read = {k: Look(*places) for k, places in enumerate(found) if None not in places}  # type: ignore[arg-type]
        contrast = batch.answers, batch.foils
        clean = running.base(batch.tokens)
        other = running.base(batch.counterfactual) if RESTORED in kinds else None
        clean_kinds = tuple(kind for kind in kinds if kind != RESTORED)
        for query in sorted({patch.query for _, patch, _ in here}):
            some = sorted(
                ((i, patch) for i, patch, _ in here if patch.query == query), key=lambda pair: min(pair[1].heads)
            )
            place = next(place for _, patch, place in here if patch.query == query)
            rest = batch.tokens.shape[1] - int(place.min())
            from_of = {
                REPLACED: outputs[query][1],
                MEAN: means[query][:, batch.clusters],
                RESTORED: outputs[query][0],
            }
            for base, wanted in ((clean, clean_kinds), (other, tuple(kind for kind in kinds if kind == RESTORED))):
                if base is None or not wanted:
                    continue
                rows_each = len(batch) * len(wanted)
                at_once = max(1, min(MOST_ROWS, MOST_TOKENS // rest) // rows_each)
                for first in range(0, len(some), at_once):
                    part = [(index, patch, kind) for index, patch in some[first : first + at_once] for kind in wanted]
                    replacements = [
                        [Replacement(layer, head, from_of[kind][layer, :, head]) for layer, head in patch.heads]
                        for _, patch, kind in part
                    ]
                    result = running.patched(
                        base, place, replacements, contrast, list(read.values()) if base is clean else ()
                    )
                    for row, (index, _, kind) in enumerate(part):
                        numbers[index, kind, rows] = result.difference[row]
                        for shown, k in enumerate(read if base is clean else ()):
                            look = result.looks[row, shown].permute(2, 0, 1)
                            seen[index, kind, k, rows] = torch.where(
                                look.isnan(), observed.looks[looks[k]][0][rows], look
                            )
    return {
        patch: Effects(
            difference=numbers[index, REPLACED],
            mean_difference=numbers[index, MEAN],
            restored=numbers[index, RESTORED],
            look={look: seen[index, 0, k] for k, look in enumerate(looks)},
            mean_look={look: seen[index, 1, k] for k, look in enumerate(looks)},
        )
        for index, patch in enumerate(patches)
    }


def merged(first: Effects, second: Effects) -> Effects:
    """Join two measurements for one replacement: REPLACED from the first, the other kinds from the second."""
    return Effects(first.difference, second.mean_difference, second.restored, first.look, second.mean_look)


def _cluster_means(
    prompts: Prompts, observed: Observed, queries: set[str]
) -> dict[str, Float[Tensor, "layer cluster head d_head"]]:
    """Return query -> the mean output at that label over each cluster's counterfactuals."""
    found = {}
    for query in queries:
        sums, counts = None, torch.zeros(len(prompts.clusters))
        for batch, outputs in zip(prompts.batches, observed.outputs, strict=True):
            if query not in outputs:
                continue
            z = outputs[query][1]
            if sums is None:
                sums = torch.zeros(z.shape[0], len(prompts.clusters), *z.shape[2:])
            sums.index_add_(1, batch.clusters, z)
            counts += torch.bincount(batch.clusters, minlength=len(counts))
        if sums is not None:
            found[query] = sums / counts.clamp_min(1)[None, :, None, None]
    return found


def check_replacing(running: RunningModel, prompts: Prompts, observed: Observed) -> float:
    """Replace heads' outputs by their own values at every label, and return the largest change that this makes.

    The change is in the logit difference, as a share of its mean; it should only be rounding. If runs that begin at the
    label change anything, `running` begins at the first position from now on.
    """
    batch, outputs = prompts.batches[0], observed.outputs[0]
    base = running.base(batch.tokens)
    scale = float(observed.difference.abs().mean()) or 1.0
    found = math.nan
    for _ in range(2):
        shares: list[float] = []
        for query, (z, _) in outputs.items():
            place = batch.position(query)
            if place is None:
                continue
            same = [
                [Replacement(layer, 0, z[layer, :, 0])] for layer in (0, running.n_layers // 2, running.n_layers - 1)
            ]
            result = running.patched(base, place, same, (batch.answers, batch.foils))
            change = (result.difference - observed.difference[: len(batch)]).abs().max()
            shares.append(float(change) / scale)
        found = float(np.max(shares))  # nan if one is
        if found <= LEAST_CHANGE or running.whole:
            break
        running.whole = True
    return found


def check_downstream(
    running: RunningModel, prompts: Prompts, observed: Observed, looks: Sequence[tuple[str, str, str]]
) -> float:
    """Replace a head in the middle layer, and return the largest attention change in layers that it cannot reach.

    These are its own layer and the layers before it. All layers run. One run has the head's output on the
    counterfactual, the other has its own output. Up to the head both compute the same numbers in the same order, so the
    result should be exactly 0.

    Args:
        running: the model that runs.
        prompts: the prompts, of which the first batch is used.
        observed: the runs over the prompts.
        looks: the attentions (query, source, control) to read.

    Returns:
        The largest change; nan if no label has a place.
    """
    batch, outputs, middle = prompts.batches[0], observed.outputs[0], running.n_layers // 2
    found = [tuple(map(batch.position, look)) for look in looks]
    read = [Look(*places) for places in found if None not in places]  # type: ignore[arg-type]
    base, changes = running.base(batch.tokens), list[float]()
    for query, both in outputs.items():
        place = batch.position(query)
        if place is None or not read:
            continue
        first = Replacement(0, 0, both[0][0, :, 0])  # its own output: makes the run begin at layer 0
        runs = [
            running.patched(
                base, place, [[first, Replacement(middle, running.n_heads - 1, z[middle, :, -1])]],
                (batch.answers, batch.foils), read,
            )
            for z in both
        ]  # fmt: skip
        until = [run.looks[:, :, : middle + 1] for run in runs]
        changes.append(float((until[0] - until[1]).abs().max()))
    return float(np.max(changes)) if changes else math.nan
