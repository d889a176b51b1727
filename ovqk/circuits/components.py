"""Every head's leading singular and eigen components.

In the row convention a head is a sum over its components, singular (u, v) or eigen (M r = lambda r, l M = lambda l):

    x M = sum sigma (x . u) v        x M = sum lambda (x . r) l / (l . r)

Only a component's joint sign means something: (u, v) and (-u, -v) are one. An eigen component's sides have l . r > 0,
so that copying or suppressing, matching or avoiding show in lambda's sign.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Complex, Float, Inexact, Int
from torch import Tensor

from ovqk.circuits.maps import Decomposition
from ovqk.circuits.spectra import ZERO_WITHIN
from ovqk.circuits.threads import decomposed

COMPONENTS = 3
CLUSTER_GAP = 0.1  # relative to the larger of two values: nearer ones are linked
EIGENVALUE_SHIFT = 1e-8  # relative to sum sigma: distance from its eigenvalue at which a left eigenvector is sought
KINDS, SIDES = ("singular", "eigen"), ("read", "write")


@dataclass(frozen=True)
class Components:
    """All heads' components in one batch.

    Attributes:
        head, kind: the head that it belongs to, and its kind as an index into KINDS.
        component: its place by falling modulus, from 0; a complex pair takes one place.
        value: sigma, or lambda (for a pair, the one with Im > 0).
        cluster, cluster_size: the first component of its cluster (itself if it stands alone), and how many the
            cluster has, reported or not. Above 1 only the cluster's span is identified.
        read, write: orthonormal rows that span the side: two for a pair, else one and a row of zeros.
    """

    head: Int[Tensor, " n"]
    kind: Int[Tensor, " n"]
    component: Int[Tensor, " n"]
    value: Complex[Tensor, " n"]
    cluster: Int[Tensor, " n"]
    cluster_size: Int[Tensor, " n"]
    read: Float[Tensor, "n 2 d_model"]
    write: Float[Tensor, "n 2 d_model"]


def components(decomposition: Decomposition, count: int = COMPONENTS) -> Components:
    """Take every head's `count` leading singular and eigen components (docs/definitions.md, section 2).

    Components that are mere rounding are left out.
    """
    both = singular_components(decomposition, count), eigen_components(decomposition, count)
    return Components(*(torch.cat([getattr(part, field.name) for part in both]) for field in fields(Components)))


def singular_components(decomposition: Decomposition, count: int) -> Components:
    """Take the leading singular components, without those below 1e-6 times sum sigma."""
    sigma = decomposition.sigma
    kept = sigma[:, :count] > ZERO_WITHIN * sigma.sum(-1, keepdim=True)
    sides = [side[:, :, :count].mT[kept].to(torch.complex128) for side in (decomposition.read, decomposition.write)]
    return _batch("singular", kept, sigma.to(torch.complex128), clusters(sigma), sides)


def eigen_components(decomposition: Decomposition, count: int) -> Components:
    """Take the leading eigen components, from the k x k core; equal moduli come in either order.

    Eigenvalues below 1e-6 times sum sigma are left out, and so are those that a change in M by that much could bring
    to 0. To first order a change moves an eigenvalue by its own size / (l . r), for unit vectors r and l. This shows
    that a nilpotent chain's eigenvalues are rounding. If eigenvalues coalesce, first order says nothing.
    """
    total, cores = decomposition.sigma.sum(-1, keepdim=True), decomposition.core()
    values, right = decomposed(torch.linalg.eig, cores)
    order = values.abs().masked_fill(values.imag < 0, -1).sort(dim=-1, descending=True, stable=True).indices
    values, right = values.gather(-1, order), right.gather(-1, order[:, None].expand_as(right))[:, :, :count]
    left = _left_eigenvectors(cores, values[:, :count] + EIGENVALUE_SHIFT * total, right)
    read, write = (decomposition.balanced_left.to(right) @ right).mT, left @ decomposition.balanced_right.to(left)
    read, write = (side / side.norm(dim=-1, keepdim=True) for side in (read, write))
    overlap = (read * write).sum(-1)
    write = torch.where((overlap.real < 0)[..., None], -write, write)
    values = values.masked_fill(values.imag < 0, math.nan)  # the other half of each pair, sorted last
    members = clusters(values)
    value, modulus = values[:, :count], values[:, :count].abs()
    coalesces = (members[1][:, :count] > 1) | ((value.imag > 0) & (2 * value.imag < CLUSTER_GAP * modulus))
    kept = (modulus > ZERO_WITHIN * total) & (coalesces | (modulus * overlap.abs() > ZERO_WITHIN * total))
    return _batch("eigen", kept, values, members, [read[kept], write[kept]])


def _left_eigenvectors(
    cores: Float[Tensor, "head k k"], beside: Complex[Tensor, "head n"], right: Complex[Tensor, "head k n"]
) -> Complex[Tensor, "head n k"]:
    """Find rows l with l K = lambda l, by inverse iteration from the right eigenvector at a number beside lambda.

    If eigenvalues are equal, each gets the l that is nearest to its own r; nothing is divided by l . r.
    """
    n = cores.shape[-1]
    identity = torch.eye(n, dtype=beside.dtype, device=beside.device)
    shifted = (cores.mT.to(beside)[:, None] - beside[..., None, None] * identity).flatten(0, 1)
    systems = torch.cat((shifted, right.mT.conj().flatten(0, 1)[..., None]), -1)
    return decomposed(_inverse_iteration, systems).view(*beside.shape, n)  # type: ignore[no-any-return]


def _inverse_iteration(systems: Complex[Tensor, "n k _"]) -> Complex[Tensor, "n k"]:
    """Find the unit vector that each matrix stretches least, starting from the vector in the last column.

    One matrix at a time and never in a batch: torch's batched LU on the CPU takes several at once through a LAPACK
    that is not safe for that, and from 150 rows on it is wrong or hangs.
    """
    found = []
    for system in systems:
        lu, pivots, _ = torch.linalg.lu_factor_ex(system[:, :-1])
        x = system[:, -1:]
        for _ in range(3):
            x = torch.linalg.lu_solve(lu, pivots, x)
            x = x / x.norm()
        found.append(x[:, 0])
    return torch.stack(found) if found else systems[:, :, -1]


def _batch(
    kind: str,
    kept: Bool[Tensor, "head count"],
    values: Complex[Tensor, "head k"],
    members: tuple[Int[Tensor, "head k"], Int[Tensor, "head k"]],
    sides: list[Complex[Tensor, "n d_model"]],
) -> Components:
    """Put the kept components into one batch; a complex vector becomes an orthonormal basis for its two parts."""
    value, cluster, size = (x[:, : kept.shape[1]][kept] for x in (values, *members))
    planes = []
    for side in sides:
        line = torch.stack((side.real, torch.zeros_like(side.real)), 1)
        basis = torch.linalg.qr(torch.stack((side.real, side.imag), -1)).Q.mT
        planes.append(torch.where((value.imag > 0)[:, None, None], basis, line))
    head, component = kept.nonzero(as_tuple=True)
    return Components(head, torch.full_like(head, KINDS.index(kind)), component, value, cluster, size, *planes)


def clusters(values: Inexact[Tensor, "head k"]) -> tuple[Int[Tensor, "head k"], Int[Tensor, "head k"]]:
    """Return each value's cluster, as its first member's index, and how many members it has (nan: alone).

    Two values closer than 10 % of the larger modulus are linked, and values linked through others are one cluster.
    """
    n, modulus = values.shape[1], values.abs()
    near = (values[:, :, None] - values[:, None]).abs() < CLUSTER_GAP * torch.maximum(
        modulus[:, :, None], modulus[:, None]
    )
    linked = (near | torch.eye(n, dtype=torch.bool, device=values.device)).float()
    for _ in range(n.bit_length()):  # each step doubles the paths
        linked = (linked @ linked).clamp_max(1)
    return linked.argmax(-1), linked.sum(-1).long()
