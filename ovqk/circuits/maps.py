"""Low-rank maps for a batch of heads, and their decompositions.

A head's map W_QK or W_OV is [d_model, d_model] of rank at most d_head, and is never formed. It is kept as
M = L N R^T with orthonormal columns in L and R, from one QR of each factor or from the thin singular value
decomposition; `spectra` reads everything off k x k matrices between these bases.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits.factors import Factors
from ovqk.circuits.grams import Gram, Matrix, Root, RootedGram, blocks, dense, precision
from ovqk.circuits.orthonormal import orthonormal
from ovqk.circuits.threads import decomposed

FLOAT32_ROUNDING = 2.0**-24  # relative rounding of a 32-bit weight
BLOCK_ELEMENTS = 2**22  # elements of weights that are in float64 at a time
Cores = Float[Tensor, "head k k"]


@runtime_checkable
class Maps(Protocol):
    """A batch of maps M = L N R^T, one for each head, as spectra see them: through k x k matrices."""

    @property
    def rank(self) -> int:
        """The largest rank the shapes allow."""
        ...

    @property
    def sigma(self) -> Float[Tensor, "head k"]:
        """Singular values, descending, float64."""
        ...

    @property
    def inner(self) -> Float[Tensor, "head r s"]:
        """N, float64."""
        ...

    def core(self, gram: Gram | None = None) -> Float[Tensor, "head r r"]:
        """Return N R^T G L or a matrix similar to it, float64; G = I if no Gram is given.

        If it is asked for first, the Grams below cost less: bases that pass a Gram for a core leave theirs.
        """
        ...

    def left_gram(self, gram: Gram) -> Float[Tensor, "head r r"]:
        """Return L^T G L, float64."""
        ...

    def right_gram(self, gram: Gram) -> Float[Tensor, "head s s"]:
        """Return R^T G R, float64."""
        ...


@dataclass(frozen=True)
class Decomposition:
    """Thin singular value decomposition M = read diag(sigma) write^T of every head.

    It is float64, except for surrogates with float32 frames.

    The balanced factors, U sqrt(S) and sqrt(S) V^T, depend on M alone and not on the head's gauge.

    Attributes:
        read: columns are read (OV) or query (QK) directions.
        sigma: singular values, descending.
        write: columns are write (OV) or key (QK) directions.
        rank: the largest rank the shapes allow.
    """

    read: Float[Tensor, "head d_model k"]
    sigma: Float[Tensor, "head k"]
    write: Float[Tensor, "head d_model k"]
    rank: int

    @property
    def balanced_left(self) -> Float[Tensor, "head d_model k"]:
        """U sqrt(S): M = balanced_left @ balanced_right."""
        return self.read * self.sigma.sqrt()[:, None, :]

    @property
    def balanced_right(self) -> Float[Tensor, "head k d_model"]:
        """sqrt(S) V^T."""
        return (self.write * self.sigma.sqrt()[:, None, :]).mT

    @property
    def inner(self) -> Cores:
        """See `Maps`."""
        return self.sigma.diag_embed()

    def core(self, gram: Gram | None = None) -> Cores:
        """Return sqrt(S) V^T G U sqrt(S): see `Maps`."""
        left = self.balanced_left if gram is None else _times(gram, self.balanced_left)
        return (self.balanced_right.to(left) @ left).double()

    def left_gram(self, gram: Gram) -> Cores:
        """See `Maps`."""
        return self.read.mT.double() @ _times(gram, self.read).double()

    def right_gram(self, gram: Gram) -> Cores:
        """See `Maps`."""
        return self.write.mT.double() @ _times(gram, self.write).double()


def _times(gram: Gram, x: Float[Tensor, "head d_model k"]) -> Float[Tensor, "head d_model k"]:
    """Multiply gram @ x in the Gram's precision, and return it in the larger precision of both."""
    matrix = dense(gram)
    return (matrix @ x.to(matrix.dtype)).to(torch.promote_types(matrix.dtype, x.dtype))


class Basis:
    """Orthonormal columns that span each head's weight on its residual side: weight = basis @ coordinates.

    Attributes:
        rows: the columns, as rows, in the dtype that `precision` gives.
        coordinates: float64.
    """

    def __init__(self, weight: Float[Tensor, "n d_model k"]) -> None:
        """Take the weights, a few heads at a time."""
        n, d_model, k = weight.shape
        r = min(d_model, k)
        self.rows: Float[Tensor, "n r d_model"] = weight.new_empty(n, r, d_model, dtype=precision(d_model))
        self.coordinates: Float[Tensor, "n r k"] = weight.new_empty(n, r, k, dtype=torch.float64)
        for heads in blocks(n, max(1, BLOCK_ELEMENTS // (d_model * k))):
            self.rows[heads], self.coordinates[heads] = orthonormal(weight[heads], self.rows.dtype)
        self._within: list[tuple[Matrix | Root, Tensor]] = []

    def through(self, root: Root) -> Float[Tensor, "n r d_model"]:
        """Return the columns of S F basis, as rows: one product for all heads. It also yields basis^T G basis."""
        product = root.through(self.rows)
        self._keep(root, product, product)
        return product

    def times(self, gram: Matrix, adjoint: bool = False) -> Float[Tensor, "n r d_model"]:
        """Return the columns of G basis (G^T basis if `adjoint`), as rows: one product for all heads.

        It also yields basis^T G basis, which is of use if G is symmetric.
        """
        product = (self.rows.flatten(0, 1) @ (gram if adjoint else gram.T).to(self.rows)).view_as(self.rows)
        self._keep(gram, self.rows, product)
        return product

    def within(self, gram: Gram) -> Float[Tensor, "n r r"]:
        """Return basis^T G basis for a symmetric G, float64; kept, as it is small."""
        key = gram.b if isinstance(gram, RootedGram) else gram
        if _find(self._within, key) is None:
            self.through(key) if isinstance(key, Root) else self.times(key)
        found = _find(self._within, key)
        assert found is not None
        return found

    def forget_grams(self) -> None:
        """Drop what was computed from Grams."""
        self._within.clear()

    def _keep(self, of: Matrix | Root, left: Tensor, right: Tensor) -> None:
        if _find(self._within, of) is None:
            self._within.append((of, (left @ right.mT).double()))

    def second_moment(self, gram: Gram) -> Float[Tensor, "n k k"]:
        """Return weight^T G weight, float64."""
        return self.coordinates.mT @ self.within(gram) @ self.coordinates


def _find(known: Sequence[tuple[object, Tensor]], gram: Gram | Root | None) -> Tensor | None:
    """Return the result that is kept for this very Gram or root, if any."""
    return next((found for of, found in known if of is gram), None)


@dataclass(frozen=True)
class FactoredMaps:
    """Maps M = left inner right^T between orthonormal bases that several maps share; directions are computed on demand.

    Attributes:
        left_of, right_of: each head's basis, as an index (its KV head's, under grouped queries).
        inner: M between the bases, float64.
        jitter: random change to each product basis^T G basis, relative to |G|: 0, or the rounding of 32-bit weights.
    """

    left: Basis
    right: Basis
    left_of: Int[Tensor, " head"]
    right_of: Int[Tensor, " head"]
    inner: Float[Tensor, "head r s"]
    rank: int
    jitter: float = 0.0
    seed: int = 0
    across: list[tuple[Gram | None, Cores]] = field(default_factory=list)
    """right^T G left, of the Grams that were asked for: one list for all maps between two bases."""

    @cached_property
    def sigma(self) -> Float[Tensor, "head k"]:
        """See `Maps`."""
        return decomposed(torch.linalg.svdvals, self.inner)  # type: ignore[no-any-return]

    @cached_property
    def _inner_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return decomposed(lambda x: torch.linalg.svd(x, full_matrices=False), self.inner)  # type: ignore[no-any-return]

    @cached_property
    def decomposition(self) -> Decomposition:
        """The same maps with their directions."""
        X, S, Yh = self._inner_svd
        read = _of(self.left.rows, self.left_of).mT.double() @ X
        write = _of(self.right.rows, self.right_of).mT.double() @ Yh.mT
        return Decomposition(read, S, write, self.rank)

    def decompose_inner(self) -> None:
        """Find the inner singular vectors, which are small: one product then makes the directions."""
        _ = self._inner_svd

    def forget_directions(self) -> None:
        """Drop the directions, which are large: one product makes them again from the inner SVD, which stays."""
        vars(self).pop("decomposition", None)

    def core(self, gram: Gram | None = None) -> Float[Tensor, "head r r"]:
        """See `Maps`."""
        return self.inner @ self._jittered(self._across(gram), gram)

    def left_gram(self, gram: Gram) -> Float[Tensor, "head r r"]:
        """See `Maps`."""
        return self._jittered(_of(self.left.within(gram), self.left_of), gram)

    def right_gram(self, gram: Gram) -> Float[Tensor, "head s s"]:
        """See `Maps`."""
        return self._jittered(_of(self.right.within(gram), self.right_of), gram)

    def _across(self, gram: Gram | None) -> Cores:
        """Return right^T G left, float64. Roots take both bases, a matrix the one that fewer heads have."""
        found = _find(self.across, gram)
        if found is None:
            left, right = self.left.rows, self.right.rows
            if isinstance(gram, RootedGram):
                left, right = self.left.through(gram.b), self.right.through(gram.a)
            elif gram is not None and len(right) < len(left):
                right = self.right.times(gram, adjoint=True)
            elif gram is not None:
                left = self.left.times(gram)
            found = (_of(right, self.right_of) @ _of(left, self.left_of).mT).double()
            self.across.append((gram, found))
        return found

    def _jittered(self, middle: Tensor, gram: Gram | None) -> Tensor:
        if not self.jitter:
            return middle
        size = self.jitter * (1.0 if gram is None else float(gram.norm()))
        return middle + size * _noise(middle.shape, self.seed).to(middle)

    def rounded(self, seed: int) -> "FactoredMaps":
        """Return the same maps, moved at random by the rounding of 32-bit weights.

        A value that moves with it is decided by rounding and not by the weights, as for a nilpotent map.
        """
        scale = self.left.coordinates.norm(dim=-1)[self.left_of][:, :, None]
        scale = scale * self.right.coordinates.norm(dim=-1)[self.right_of][:, None, :]
        inner = self.inner + FLOAT32_ROUNDING * scale * _noise(self.inner.shape, seed).to(self.inner)
        return replace(self, inner=inner, jitter=FLOAT32_ROUNDING, seed=seed + 1)


def _of(each: Float[Tensor, "n r s"], heads: Int[Tensor, " head"]) -> Float[Tensor, "head r s"]:
    """Return each head's entry; nothing is copied if every head has its own."""
    return each if len(each) == len(heads) else each[heads]


@lru_cache(maxsize=2)
def _noise(shape: torch.Size, seed: int) -> Tensor:
    """Return standard Gaussian noise; kept, as every product of a map's bases is moved by the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decompose(factors: Factors, centred: bool) -> Decomposition:
    """Return the thin SVD of each head's map, without forming the map.

    Args:
        factors: the maps.
        centred: reads and writes are orthogonal to the all-ones direction (LayerNorm folded), which costs a rank
            if d_head is not below d_model.
    """
    every = torch.arange(len(factors.left), device=factors.left.device)
    left, right = Basis(factors.left), Basis(factors.right.mT)
    d_model, d_head = factors.left.shape[1:]
    rank = min(d_head, d_model - centred)
    return FactoredMaps(left, right, every, every, left.coordinates @ right.coordinates.mT, rank).decomposition
