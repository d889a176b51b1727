"""Heads with a role on prompts compared with heads that have none (definitions: section 7).

They are compared by the deciding quantities that all heads have. Heads that share keys and values are not independent,
so KV groups are counted and permuted in place of heads.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk.config.schema import RoleActivationsConfig
from ovqk.verdicts.depth import depth_pool, depth_reference
from ovqk.verdicts.statistics import (
    ALPHA,
    Permutation,
    Significance,
    Stratum,
    pooled_permutation,
    stratified_permutation,
)
from ovqk.weights.types import Head

Values = NDArray[np.float64]
"""One quantity for all heads, [layer, head], larger in the predicted direction; nan if a head has no value."""


@dataclass(frozen=True)
class RolePeers:
    """A role's heads compared with others, by the quantity in which they stand out least.

    Attributes:
        p: the largest p among the compared quantities, in (0, 1]; nan if there is none.
        min_p: the smallest p that this quantity could have had.
        null: `layer` or `depth`: where its labels were permuted; empty if there is no p.
    """

    p: float = math.nan
    min_p: float = math.nan
    null: str = ""

    @property
    def outdone(self) -> bool:
        """Whether the role's heads could stand out, and do not."""
        return self.min_p <= ALPHA < self.p


def compared(config: RoleActivationsConfig) -> list[str]:
    """Return the deciding quantities in which heads are compared: those that all heads have."""
    return [quantity for quantity in config.decides if quantity != "effect"]


def standing(config: RoleActivationsConfig, quantity: str, rows: pd.DataFrame) -> NDArray[np.float64]:
    """Return the values that are compared, in the rows' order: attention minus its control, or a signed write.

    Args:
        config: the role's `activations`.
        quantity: a deciding quantity, or one that ranks heads.
        rows: as `Measured.rows` returns them, or rows of activations.parquet.
    """
    values = rows[quantity].to_numpy(dtype=np.float64)
    if quantity in ("attention", "repeats"):
        return values - rows[f"{quantity}_control"].to_numpy(dtype=np.float64)
    return config.write.sign * values if quantity == "write" and config.write is not None else values


def grids(config: RoleActivationsConfig, rows: pd.DataFrame) -> dict[str, Values]:
    """Return all heads' compared quantities; those that were not measured are left out.

    Args:
        config: the role's `activations`.
        rows: as `Measured.rows` returns them: a row for each head, sorted by layer and head.
    """
    shape = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1
    return {name: standing(config, name, rows).reshape(shape) for name in compared(config) if name in rows}


def head_peers(
    values: Mapping[str, Values], head: Head, barred: Collection[Head], groups: NDArray[np.int64]
) -> dict[str, Significance]:
    """Compare a head with the heads around it, as the null `depth` does; there is no row if there is no other head.

    Args:
        values: quantity -> its values.
        head: the head.
        barred: heads that have a role, so that they may not serve as references.
        groups: each head's KV group, [head], the same in every layer.
    """
    found = {}
    for quantity, grid in values.items():
        near = None if math.isnan(grid[head]) else depth_reference(grid, head, barred, groups)
        if near is not None:
            found[quantity] = near.counts()
    return found


def role_peers(
    values: Mapping[str, Values],
    heads: Sequence[Head],
    barred: Collection[Head],
    groups: NDArray[np.int64],
    seed: int,
) -> RolePeers:
    """Compare a role's heads with others by permuting labels, KV groups first, then heads within groups.

    Labels are permuted within layers. If these labels cannot be significant, they are permuted in the window of layers
    around the heads, after the trend over depth is subtracted. One head alone is compared as a head is (`head_peers`),
    so that the role cannot stand out without it.

    Args:
        values: quantity -> its values.
        heads: the role's heads, which the values must not have selected.
        barred: heads with other roles, which may not serve as references.
        groups: each head's KV group, [head], the same in every layer.
        seed: the seed for drawn permutations.
    """
    if len(heads) == 1:
        beside = head_peers(values, heads[0], {*barred, *heads}, groups).values()
        return _weakest([RolePeers(test.p, test.min_p, "depth") for test in beside])
    found = [
        _of_quantity(grid, [head for head in heads if not math.isnan(grid[head])], barred, groups, seed)
        for grid in values.values()
    ]
    return _weakest([each for each in found if not math.isnan(each.p)])


def _weakest(found: Sequence[RolePeers]) -> RolePeers:
    could = [each for each in found if each.min_p <= ALPHA]
    return max(could or found, key=lambda each: each.p, default=RolePeers())


def _of_quantity(
    grid: Values, heads: Sequence[Head], barred: Collection[Head], groups: NDArray[np.int64], seed: int
) -> RolePeers:
    strata = []
    for layer in sorted({layer for layer, _ in heads}):
        known = [head for head in range(grid.shape[1]) if not math.isnan(grid[layer, head])]
        free = [head for head in known if (layer, head) not in barred]
        labels = np.array([(layer, head) in heads for head in free])
        strata.append(Stratum(grid[layer, free], labels, groups[free]))
    tests: dict[str, Permutation] = {}
    if any(not stratum.claimed.all() for stratum in strata):
        tests["layer"] = stratified_permutation(strata, seed)
    if heads and ("layer" not in tests or tests["layer"].min_p > ALPHA):
        pool = depth_pool(grid, heads, barred, groups)
        if pool is not None:
            tests["depth"] = pooled_permutation(pool, seed)
    null = min(tests, key=lambda name: tests[name].min_p, default="")
    return RolePeers(tests[null].p, tests[null].min_p, null) if null else RolePeers()
