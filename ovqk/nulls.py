"""The nulls a claim is tested against, and the rows of tests.parquet (definitions: section 6).

`layer`      the role's heads against the other heads of their layers: labels permuted within layers
`layer_all`  the same, with the heads of other claimed roles among the others; reported, never counted
`depth`      one head against the unclaimed heads of layers within 2, each standardised within its layer

`frame` and `token` are ensembles of surrogate heads and words; a role that needs them says that they were not drawn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovqk.claims import Claims, Head
from ovqk.config import Direction, PredictionConfig
from ovqk.statistics import (
    Stratum,
    benjamini_hochberg,
    percentile,
    robust_z,
    stratified_permutation,
    within_layer_auc,
)
from ovqk.weights import Architecture

ALPHA = 0.05
DEPTH = 2  # layers on either side
DEPTH_MIN_HEADS = 4  # unclaimed heads of a layer, for a median and a MAD that mean something
Values = Mapping[str, NDArray[np.float64]]
"""Metric -> [layer, head], nan where it has no value."""


@dataclass(frozen=True)
class Predicted:
    """A prediction with the values that decide it.

    Attributes:
        values: [layer, head], larger in the predicted direction; nan where the prediction does not apply.
    """

    role: str
    config: PredictionConfig
    primary: bool
    values: NDArray[np.float64]

    @property
    def sign(self) -> float:
        """-1 where the prediction is `low`."""
        return -1.0 if self.config.direction is Direction.low else 1.0


def predicted_values(config: PredictionConfig, values: Values, architecture: Architecture) -> NDArray[np.float64]:
    """The metric of a prediction for every head, nan where it makes none."""
    empty = np.full((architecture.n_layers, architecture.n_heads), math.nan)
    found = values.get(config.metric, empty).copy()
    if config.first_layer is not None:
        found[0] = values.get(config.first_layer, empty)[0]
    if config.direct_only and architecture.positions != "rotary":
        found[1:] = math.nan
    return found


def layer_strata(
    predicted: Predicted, claims: Claims, architecture: Architecture, exclude_claimed: bool
) -> list[Stratum]:
    """One stratum per layer with heads of the role that have a value."""
    role = set(claims.roles[predicted.role])
    others = claims.heads - role if exclude_claimed and claims.reliability != "unreliable" else set()
    groups = architecture.kv_of_head.numpy()
    strata = []
    for layer in sorted({layer for layer, _ in role}):
        heads = [
            head
            for head in range(architecture.n_heads)
            if (layer, head) not in others and not math.isnan(predicted.values[layer, head])
        ]
        claimed = np.array([(layer, head) in role for head in heads], dtype=bool)
        if claimed.any():
            strata.append(Stratum(predicted.sign * predicted.values[layer, heads], claimed, groups[heads]))
    return strata


def role_rows(predicted: Predicted, claims: Claims, architecture: Architecture, seed: int) -> list[dict[str, Any]]:
    """The role's rows under `layer` and `layer_all`; none where no head of the role has a value."""
    rows = []
    for null, exclude in (("layer", True), ("layer_all", False)):
        strata = layer_strata(predicted, claims, architecture, exclude)
        if not strata:
            continue
        test = stratified_permutation(strata, seed)
        n_claimed = sum(int(stratum.claimed.sum()) for stratum in strata)
        n_others = sum(int((~stratum.claimed).sum()) for stratum in strata)
        rows.append(
            _row(predicted, None, null)
            | {
                "value": test.statistic,
                "null_mean": test.null_mean,
                "null_sd": test.null_sd,
                "percentile": test.percentile,
                "effect": within_layer_auc(strata),
                "p": test.p,
                "p_opposite": test.p_opposite,
                "min_p": test.min_p,
                "n_null": test.labelings,
                "exact": test.exact,
                "n_heads": n_claimed,
                "n_others": n_others,
            }
        )
    return rows


def head_rows(predicted: Predicted, head: Head, claims: Claims, architecture: Architecture) -> list[dict[str, Any]]:
    """The head's rows under `layer` (its place among the layer's unclaimed heads) and `depth`."""
    layer, _ = head
    signed = predicted.sign * predicted.values
    if math.isnan(signed[head]):
        return []
    barred = claims.heads if claims.reliability != "unreliable" else set(claims.roles[predicted.role])

    def unclaimed(layer: int) -> NDArray[np.float64]:
        values = np.array([signed[layer, h] for h in range(architecture.n_heads) if (layer, h) not in barred])
        return values[~np.isnan(values)] if len(values) else values

    same = unclaimed(layer)
    rows = []
    if len(same):
        plain = predicted.sign * same
        rows.append(
            _row(predicted, head, "layer")
            | _counts(signed[head], same)
            | {
                "null_mean": float(plain.mean()),
                "null_sd": float(plain.std()),
                "percentile": percentile(float(predicted.values[head]), plain),
            }
        )
    # The head counts in its own layer's median and MAD as every reference head does in its layer's: standardised by
    # others alone it would be more extreme than they are by construction.
    own = np.append(same, signed[head])
    z = robust_z(float(signed[head]), own) if len(same) >= DEPTH_MIN_HEADS else None
    if z is not None:
        near = range(max(0, layer - DEPTH), min(architecture.n_layers, layer + DEPTH + 1))
        layers = [own if at == layer else unclaimed(at) for at in near]
        pooled = [robust_z(float(v), values) for values in layers if len(values) >= DEPTH_MIN_HEADS for v in values]
        standard = np.array([value for value in pooled if value is not None])
        standard = np.delete(standard, np.flatnonzero(standard == z)[0])  # the head itself
        rows.append(
            _row(predicted, head, "depth")
            | _counts(z, standard)
            | {"null_mean": math.nan, "null_sd": math.nan, "percentile": percentile(z, standard)}
        )
    return [row | {"value": float(predicted.values[head]), "n_heads": 1} for row in rows]


def _counts(value: float, reference: NDArray[np.float64]) -> dict[str, Any]:
    n = len(reference)
    return {
        "p": float((1 + (reference >= value).sum()) / (1 + n)),
        "p_opposite": float((1 + (reference <= value).sum()) / (1 + n)),
        "min_p": 1 / (1 + n),
        "effect": percentile(value, reference),
        "n_null": n,
        "exact": True,
        "n_others": n,
    }


def _row(predicted: Predicted, head: Head | None, null: str) -> dict[str, Any]:
    return {
        "role": predicted.role,
        "layer": None if head is None else head[0],
        "head": None if head is None else head[1],
        "metric": predicted.config.metric,
        "prediction": predicted.config.direction.value,
        "primary": predicted.primary,
        "exploratory": predicted.config.exploratory,
        "null": null,
    }


def correct(rows: list[dict[str, Any]]) -> None:
    """Add q, q_opposite and min_q: Benjamini-Hochberg per null, role rows and head rows apart.

    A null is untestable for a row whose min_p exceeds 0.05; such rows, exploratory ones and the descriptive `layer`
    rows of single heads leave the family before the correction and have no q.
    """
    families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        is_role = row["head"] is None
        row |= {"q": math.nan, "q_opposite": math.nan, "min_q": math.nan, "testable": row["min_p"] <= ALPHA}
        if row["testable"] and not row["exploratory"] and (is_role or row["null"] != "layer"):
            families.setdefault((row["null"], is_role), []).append(row)
    for family in families.values():
        for name, p in (("q", "p"), ("q_opposite", "p_opposite")):
            for row, q in zip(family, benjamini_hochberg([row[p] for row in family]), strict=True):
                row[name] = q
        for row in family:
            row["min_q"] = min(1.0, row["min_p"] * len(family))
