"""What a process keeps of a model for its next cells.

If a sweep's cells run in one process, one after the other, they read the same model. Its layers' weights, bases and
singular vectors depend on no task, so that the second cell finds those of the first; nor do the vocabulary's Grams.
What does depend on the task is found by cells with another analysis. Products of layers with Grams are not kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

from ovqk.circuits.maps import Basis, FactoredMaps
from ovqk.weights.types import LayerWeights

Value = TypeVar("Value")
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

    def slim(self) -> None:
        """Drop products with Grams, which no task needs, and directions, which are large and soon made again."""
        for maps in self.maps.values():
            maps.forget_directions()
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


class Kept:
    """One model at a time: its layers, from the first on, up to a number of bytes, and values under names."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        """Start with nothing; `most` is how many bytes of layers are kept."""
        self.most, self.used, self._of = most, 0, ""
        self._parts: dict[int, LayerParts] = {}
        self._sizes: dict[int, int] = {}
        self._values: dict[str, tuple[Any, Any]] = {}

    def begin(self, of: str) -> None:
        """Begin a cell; what is kept of anything else is dropped.

        Args:
            of: everything about the model that layers and values depend on.
        """
        if of != self._of:
            self._of, self.used = of, 0
            self._parts, self._sizes, self._values = {}, {}, {}

    def parts(self, index: int) -> LayerParts:
        """Return what is kept of a layer; empty parts, which are not kept yet, if that is nothing."""
        return self._parts.get(index) or LayerParts()

    def keep(self, index: int, parts: LayerParts) -> None:
        """Keep a layer, as large as it has become, if there is room."""
        parts.slim()
        if index in self._parts:
            self.used -= self._sizes.pop(index)
            del self._parts[index]
        size = parts.size
        if self.used + size <= self.most:
            self._parts[index], self._sizes[index] = parts, size
            self.used += size

    def has(self, name: str, of: Any) -> bool:
        """Say whether an earlier cell made this value; see `value`."""
        return name in self._values and bool(self._values[name][0] == of)

    def value(self, name: str, of: Any, make: Callable[[], Value]) -> Value:
        """Return the value that an earlier cell made, or make it. Of each name the last one is kept.

        Args:
            name: what it is.
            of: everything that it depends on besides the model; it must compare equal for an earlier value to be taken.
            make: makes it; what it raises is raised, and nothing is kept.
        """
        if not self.has(name, of):
            self._values[name] = of, make()
        return self._values[name][1]  # type: ignore[no-any-return]


def once(kept: Kept | None, name: str, of: Any, make: Callable[[], Value]) -> Value:
    """Return what `Kept.value` returns; without a `Kept`, make the value."""
    return make() if kept is None else kept.value(name, of, make)
