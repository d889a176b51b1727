"""Heads as task readouts take them: maps from rows of tokens to scores and writes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits import alignment
from ovqk.circuits.factors import Factors
from ovqk.circuits.maps import Decomposition
from ovqk.config.schema import Circuit

Scorer = Callable[[Tensor, Tensor], Tensor]
"""(query rows, key rows) -> scores [head, query, key]."""


@runtime_checkable
class CircuitMaps(Protocol):
    """One circuit for a batch of heads, or for one head's surrogates, as readouts take it."""

    @property
    def circuit(self) -> Circuit:
        """`ov` or `qk`."""
        ...

    @property
    def decomposition(self) -> Decomposition:
        """The maps M."""
        ...

    def scores(
        self, query_rows: Float[Tensor, "*draw query d_model"], key_rows: Float[Tensor, "*draw key d_model"]
    ) -> Float[Tensor, "*draw head query key"]:
        """Return rows M rows^T: scores by W_QK, or task logits by W_OV (key rows: W_U's columns)."""
        ...

    def written(self, rows: Float[Tensor, "word d_model"]) -> Float[Tensor, "head word d_model"]:
        """Return rows M."""
        ...


@dataclass(frozen=True)
class HeadMaps:
    """Heads of a model as `CircuitMaps`.

    Attributes:
        scorer: compares queries and keys if the model normalises them; None if the factors alone give the scores.
    """

    factors: Factors
    decomposition: Decomposition
    scorer: Scorer | None = None

    @property
    def circuit(self) -> Circuit:
        """`ov` or `qk`."""
        return self.factors.circuit

    def scores(
        self, query_rows: Float[Tensor, "*draw query d_model"], key_rows: Float[Tensor, "*draw key d_model"]
    ) -> Float[Tensor, "*draw head query key"]:
        """See `CircuitMaps`. If the model normalises queries and keys, the scores are those of the normalised ones."""
        if self.scorer is not None:
            return self.scorer(query_rows, key_rows)
        return alignment.readout(self.factors, query_rows, key_rows)

    def written(self, rows: Float[Tensor, "word d_model"]) -> Float[Tensor, "head word d_model"]:
        """See `CircuitMaps`."""
        return (rows @ self.factors.left) @ self.factors.right

    def only(self, heads: Sequence[int]) -> "HeadMaps":
        """Return these heads alone, in this order, without the scorer for normalised queries and keys."""
        index = torch.as_tensor(heads, device=self.factors.left.device)
        parts = self.decomposition
        return HeadMaps(
            Factors(self.circuit, self.factors.left[index], self.factors.right[index]),
            Decomposition(parts.read[index], parts.sigma[index], parts.write[index], parts.rank),
        )

    @staticmethod
    def joined(batches: "Sequence[HeadMaps]") -> "HeadMaps":
        """Join batches of one circuit."""

        def cat(parts: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(parts))

        factors, parts = [maps.factors for maps in batches], [maps.decomposition for maps in batches]
        return HeadMaps(
            Factors(batches[0].circuit, cat(f.left for f in factors), cat(f.right for f in factors)),
            Decomposition(
                cat(p.read for p in parts), cat(p.sigma for p in parts), cat(p.write for p in parts), parts[0].rank
            ),
        )
