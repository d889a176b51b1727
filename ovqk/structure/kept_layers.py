"""Layers that a process keeps for its next cells of the same model.

If a sweep's cells run in one process, one after the other, they read the same layers. The weights, their bases and
their singular vectors depend on no task, so that the second cell finds those of the first. Grams and everything that
was computed from them are not kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor

from ovqk.circuits.maps import Basis, FactoredMaps
from ovqk.weights.types import LayerWeights

KEPT_BYTES = 2**29
"""How many bytes of layers a process keeps; layers beyond them are read and decomposed again."""


@dataclass
class LayerParts:
    """A layer's weights and decompositions, as far as they have been asked for.

    Attributes:
        weights: "processed" and "folded" weights.
        maps: form (`layer.Form`) -> a circuit, factored.
        bases: (part, folded) -> its basis.
        across: (circuit, folded) -> products with Grams, which all maps between two bases share.
        eigenvalues: circuit -> eigenvalues.
    """

    weights: dict[str, LayerWeights] = field(default_factory=dict)
    maps: dict[Any, FactoredMaps] = field(default_factory=dict)
    bases: dict[tuple[str, bool], Basis] = field(default_factory=dict)
    across: dict[Any, list[Any]] = field(default_factory=dict)
    eigenvalues: dict[Any, Tensor] = field(default_factory=dict)

    def forget_grams(self) -> None:
        """Drop products with Grams: another cell has Grams of its own, and would not find them."""
        for products in self.across.values():
            products.clear()
        for basis in self.bases.values():
            basis.forget_grams()

    @property
    def size(self) -> int:
        """The number of bytes in all tensors."""
        return sum({id(tensor): tensor.nbytes for tensor in _tensors(self)}.values())


def _tensors(of: object) -> Iterator[Tensor]:
    """Go through the tensors in containers, dataclasses with their cached properties, and bases."""
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, dict):
        for value in of.values():
            yield from _tensors(value)
    elif isinstance(of, list | tuple):
        for value in of:
            yield from _tensors(value)
    elif isinstance(of, Basis) or is_dataclass(of):
        named = {} if isinstance(of, Basis) else {f.name: getattr(of, f.name) for f in fields(of)}  # type: ignore[arg-type]
        yield from _tensors(named | vars(of))


class KeptLayers:
    """The layers of one model at a time, from the first on, up to a number of bytes."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        """Start without layers."""
        self.most, self.used, self._of = most, 0, ""
        self._parts: dict[int, LayerParts] = {}

    def begin(self, of: str) -> None:
        """Begin a cell; layers of anything else are dropped.

        Args:
            of: everything that a layer's weights and decompositions depend on.
        """
        if of != self._of:
            self._of, self.used, self._parts = of, 0, {}

    def parts(self, index: int) -> LayerParts:
        """Return what is kept of a layer; empty parts, which are not kept yet, if that is nothing."""
        return self._parts.get(index) or LayerParts()

    def keep(self, index: int, parts: LayerParts) -> None:
        """Keep a layer if there is room."""
        parts.forget_grams()
        if index not in self._parts and self.used + parts.size <= self.most:
            self._parts[index] = parts
            self.used += parts.size
