"""One layer of a model: its weights, raw and folded, and the decompositions that its stages share."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ovqk.circuits import positions
from ovqk.circuits.composition import LayerCircuits
from ovqk.circuits.factors import Factors, key_side, ov_factors, qk_factors, query_side
from ovqk.circuits.maps import Basis, Decomposition, FactoredMaps
from ovqk.circuits.spectra import eigenvalues
from ovqk.config.schema import Circuit
from ovqk.structure.kept import LayerParts
from ovqk.structure.model import Model
from ovqk.weights.devices import to_device
from ovqk.weights.folding import fold_layer
from ovqk.weights.types import LayerWeights

Part = Literal["Q", "K", "V", "O"]


class Form(NamedTuple):
    """The weights in a layer that a metric is computed from.

    Attributes:
        circuit: OV or QK.
        folded: whether the norms are folded in; else the weights are as the checkpoint has them.
        offsets: for QK under rotary positions, those over which the rotation is averaged; (0,) for no rotation.
    """

    circuit: Circuit
    folded: bool
    offsets: tuple[int, ...]


class Layer:
    """One layer's weights, raw and folded, and the decompositions that its stages share."""

    def __init__(self, model: Model, index: int) -> None:
        """Take the layer's place; its weights are read when they are asked for, if no earlier cell left them."""
        self.model, self.index = model, index
        self.parts = LayerParts() if model.kept is None else model.kept.parts(index)
        self.was_left = bool(self.parts.maps)  # by an earlier cell

    def read(self) -> LayerWeights:
        """Read the raw weights from the checkpoint; they are kept only if they are what is processed."""
        return to_device(self.model.source.layer(self.index), self.model.device)

    def leave(self) -> None:
        """Leave the layer to the process's next cell, if this process keeps layers and has room."""
        if self.model.kept is not None:
            self.model.kept.keep(self.index, self.parts)

    @property
    def processed(self) -> LayerWeights:
        """Folded or raw, as the spectra are to be."""
        known = self.parts.weights
        if "processed" not in known:
            known["processed"] = self.folded if self.model.folds else self.read()
        return known["processed"]

    @property
    def folded(self) -> LayerWeights:
        """The weights with the norms folded in, if that can be done."""
        if not self.model.source.foldable:
            return self.processed
        known = self.parts.weights
        if "folded" not in known:
            known["folded"] = fold_layer(self.read(), self.model.architecture)
        return known["folded"]

    def raw_and_folded(self) -> tuple[LayerWeights, LayerWeights]:
        """Return the weights as the checkpoint has them, which are not kept, and folded; one reading gives both."""
        if not self.model.source.foldable:
            return self.folded, self.folded
        raw, known = self.read(), self.parts.weights
        if "folded" not in known:
            known["folded"] = fold_layer(raw, self.model.architecture)
        return raw, known["folded"]

    @property
    def gain(self) -> Float[Tensor, " d_model"] | None:
        """The gain in the norm before attention, float64; None if it is folded into the processed weights."""
        norm = self.processed.norm
        return None if norm is None else norm.weight.double()

    def factors(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> Factors:
        """Return a circuit's factors, folded or as processed; QK is averaged over the offsets' rotations."""
        weights = self.folded if folded else self.processed
        if circuit is Circuit.ov:
            return ov_factors(weights, self.model.architecture)
        return qk_factors(weights, self.model.architecture, offsets)

    @property
    def span(self) -> tuple[int, ...]:
        """The offsets whose mean rotation readouts and compositions use; (0,) without rotary positions."""
        architecture = self.model.architecture
        return (
            tuple(range(positions.rotary_span(self.folded, architecture))) if self.folded.rotary is not None else (0,)
        )

    def basis(self, part: Part, folded: bool) -> Basis:
        """Return orthonormal bases for the subspaces that the heads' W_Q, W_K or W_V read, or that W_O writes.

        They are found once, because every decomposition and moment in this layer goes through them.

        Args:
            part: the weight.
            folded: folded weights; else those that are processed.
        """
        key = part, folded or self.model.folds
        if key not in self.parts.bases:
            weights = self.folded if key[1] else self.processed
            weight = getattr(weights, f"W_{part}")
            self.parts.bases[key] = Basis(weight.mT if part == "O" else weight)
        return self.parts.bases[key]

    def maps(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> FactoredMaps:
        """Return a circuit for all heads, factored once; QK is averaged over the offsets' rotations.

        Args:
            circuit: OV or QK.
            folded: folded weights; else those that are processed.
            offsets: query position less key position; 0 for no rotation.
        """
        form = Form(circuit, folded or self.model.folds, offsets)
        if form not in self.parts.maps:
            weights, architecture = self.folded if form.folded else self.processed, self.model.architecture
            kv = architecture.kv_of_head.to(weights.W_O.device)
            every = torch.arange(architecture.n_heads, device=kv.device)
            rank = min(architecture.d_head, architecture.d_model - self.model.centred)
            across = self.parts.across.setdefault((circuit, form.folded), [])
            if circuit is Circuit.ov:
                left, right = self.basis("V", folded), self.basis("O", folded)
                inner = left.coordinates[kv] @ right.coordinates.mT
                self.parts.maps[form] = FactoredMaps(left, right, kv, every, inner, rank, across=across)
            else:
                left, right = self.basis("Q", folded), self.basis("K", folded)
                inner = query_side(left.coordinates, weights, offsets) @ key_side(right.coordinates, weights)[kv].mT
                self.parts.maps[form] = FactoredMaps(left, right, every, kv, inner, rank, across=across)
        return self.parts.maps[form]

    def decomposition(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> Decomposition:
        """Return a circuit's thin SVD, head by head, with its directions; see `maps`."""
        return self.maps(circuit, folded, offsets).decomposition

    def for_composition(self) -> Callable[[], LayerCircuits]:
        """Return a function that gives both circuits, folded and with the mean rotation, as compositions take them.

        If an earlier cell left the layer, they are decomposed when the function is called, because most tasks find the
        compositions of all pairs in the cache. Else they are decomposed now, so that no weights stay in memory.
        """
        both = self.maps(Circuit.ov, True), self.maps(Circuit.qk, True, self.span)

        def decomposed() -> LayerCircuits:
            ov, qk = (maps.decomposition for maps in both)
            return LayerCircuits.of(ov, qk)

        def later() -> LayerCircuits:
            found = decomposed()
            for maps in both:
                maps.forget_directions()
            return found

        if not self.was_left:
            found = decomposed()
            return lambda: found
        for maps in both:
            maps.decompose_inner()  # now, so that the layer has its size when it is left
        return later

    def eigenvalues(self, circuit: Circuit) -> Complex[Tensor, "head k"]:
        """Return the eigenvalues of a circuit's heads as processed, at D = 0, in residual space; found once."""
        if circuit not in self.parts.eigenvalues:
            self.parts.eigenvalues[circuit] = eigenvalues(self.maps(circuit, self.model.folds).core())
        return self.parts.eigenvalues[circuit]
