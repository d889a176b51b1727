"""Where no circuit is claimed for a model: the heads that each role's predictions point at, as candidates.

Nothing here is a verdict. The heads are chosen for being the strongest, so their own p-values are too small by that
choice; the corrected ones stand beside them, over all the heads that were ranked.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk.claims import Claims, Head
from ovqk.config import TaskConfig
from ovqk.metrics import COMPOSITION_METRICS
from ovqk.nulls import Predicted, depth_reference, reference_counts
from ovqk.statistics import benjamini_hochberg, monte_carlo, percentile
from ovqk.testing import ClaimTests

STRONGEST = 5
"""Candidates of each role."""


def unclaimed(task: TaskConfig) -> Claims:
    """The task's roles without heads: what to look for in a model that nothing is claimed of."""
    predictions = {role: list(config.predictions) for role, config in task.roles.items() if config.predictions}
    return Claims("no claims", "none", None, {role: [] for role in predictions}, predictions)


def candidate_rows(tests: ClaimTests, values: Mapping[str, NDArray[np.float64]]) -> tuple[pd.DataFrame, list[str]]:
    """candidates.parquet, and notes on the roles that cannot be ranked.

    One row for every prediction of every candidate. Columns:
        role, rank, layer, head: the candidate; rank 1 has the most extreme primary metric.
        metric, prediction, primary, exploratory, value: the prediction and the head's value.
        percentile: of the value among the other heads of its layer, in [0, 1].
        p_depth, q_depth: against the heads of layers within 2, and corrected over all heads (Benjamini-Hochberg).
        p_frame, p_frame_all: against heads of its own singular values, and times the number of heads ranked, at most 1.
    """
    rows: list[dict[str, object]] = []
    notes = []
    for role, predictions in tests.predicted(values).items():
        primary = predictions[0]
        if primary.config.metric in COMPOSITION_METRICS:
            notes.append(f"no candidates for {role.replace('_', ' ')}: its primary metric composes with claimed heads")
            continue
        signed = primary.sign * primary.values
        ranked = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(signed))]
        ranked.sort(key=lambda head: (-signed[head], head))
        for prediction in predictions:
            if prediction.config.metric in COMPOSITION_METRICS:
                continue
            depth = _depth(prediction, tests.model.architecture.kv_of_head.numpy())
            for rank, head in enumerate(ranked[:STRONGEST], start=1):
                if not math.isnan(prediction.values[head]):
                    place = {"role": role, "rank": rank, "layer": head[0], "head": head[1]}
                    rows.append(place | _row(tests, prediction, head, depth, len(ranked)))
    return pd.DataFrame(rows), notes


def _row(
    tests: ClaimTests, predicted: Predicted, head: Head, depth: Mapping[Head, tuple[float, float]], ranked: int
) -> dict[str, object]:
    value = float(predicted.values[head])
    same = np.delete(predicted.values[head[0]], head[1])
    p_depth, q_depth = depth.get(head, (math.nan, math.nan))
    p_frame = math.nan
    metric = predicted.metric_of(head[0])
    if tests.can_frame(metric):
        draws = tests.frame(head, metric).first(tests.model.config.nulls.draws)[metric]
        p_frame = monte_carlo(predicted.sign * value, predicted.sign * draws).p
    return {
        "metric": predicted.config.metric,
        "prediction": predicted.config.direction.value,
        "primary": predicted.primary,
        "exploratory": predicted.config.exploratory,
        "value": value,
        "percentile": percentile(value, same[~np.isnan(same)]),
        "p_depth": p_depth,
        "q_depth": q_depth,
        "p_frame": p_frame,
        "p_frame_all": min(1.0, p_frame * ranked) if not math.isnan(p_frame) else math.nan,
    }


def _depth(predicted: Predicted, groups: NDArray[np.int64]) -> dict[Head, tuple[float, float]]:
    """Head -> (p, q) against the heads of nearby layers, for every head that has one."""
    signed = predicted.sign * predicted.values
    found: dict[Head, float] = {}
    for layer, index in np.argwhere(~np.isnan(signed)):
        head = (int(layer), int(index))
        near = depth_reference(signed, head, set(), groups)
        if near is not None:
            found[head] = reference_counts(near.z, near.reference, near.groups)["p"]
    return {head: (found[head], q) for head, q in zip(found, benjamini_hochberg(list(found.values())), strict=True)}
