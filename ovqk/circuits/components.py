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

from ovqk.circuits.grams import blocks
from ovqk.circuits.maps import Decomposition
from ovqk.circuits.spectra import ZERO_WITHIN
from ovqk.circuits.threads import decomposed

COMPONENTS = 3
CLUSTER_GAP = 0.1  # relative to the larger of two values: nearer ones are linked
EIGENVALUE_SHIFT = 1e-8  # relative to sum sigma: distance from its eigenvalue at which a left eigenvector is sought
APART = 1e-5  # relative to sum sigma: eigenvalues this far from all others are refined one by one
MODULI_APART = 1e-6  # relative to sum sigma: above the float32 rounding that may turn the order of eigenvalues
RESIDUAL = 1e-11  # relative to |core|_F: of an eigenvector found by inverse iteration
ITERATIONS = 3  # of inverse iteration: each takes away at least a factor of EIGENVALUE_SHIFT / APART
SYSTEM_ELEMENTS = 2**19  # elements of complex matrices that are decomposed at a time
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


def components(
    decomposition: Decomposition, count: int = COMPONENTS, near: Complex[Tensor, "head k"] | None = None
) -> Components:
    """Return the `count` leading singular and eigen components of every head, without those that are rounding.

    `near` are the heads' eigenvalues up to float32 rounding, if a caller has them (see `eigen_components`).
    """
    both = singular_components(decomposition, count), eigen_components(decomposition, count, near)
    return Components(*(torch.cat([getattr(part, field.name) for part in both]) for field in fields(Components)))


def singular_components(decomposition: Decomposition, count: int) -> Components:
    """Take the leading singular components, without those below 1e-6 times sum sigma."""
    sigma = decomposition.sigma
    kept = sigma[:, :count] > ZERO_WITHIN * sigma.sum(-1, keepdim=True)
    sides = [side[:, :, :count].mT[kept].to(torch.complex128) for side in (decomposition.read, decomposition.write)]
    return _batch("singular", kept, sigma.to(torch.complex128), clusters(sigma), sides)


def eigen_components(
    decomposition: Decomposition, count: int, near: Complex[Tensor, "head k"] | None = None
) -> Components:
    """Return the leading eigen components, from the k x k core; components of equal modulus come in either order.

    Eigenvalues below 1e-6 of sum sigma are left out, and so are those that a change in M by that much could bring to
    0. To first order a change moves an eigenvalue by its own size / (l . r), with r and l of unit length. This shows
    that the eigenvalues of a nilpotent chain are rounding. If eigenvalues coalesce, first order says nothing.

    If all eigenvalues are known nearly (`near`), the leading ones are refined, in a sixth of the time that it takes to
    find all eigenvectors. A head of which that cannot be done safely is taken apart as without them.
    """
    total, cores = decomposition.sigma.sum(-1, keepdim=True), decomposition.core()
    if near is None:
        values, right, left = eigen_parts(cores, total, count)
    else:
        leading, _ = _leading(near)
        # on the CPU, as all small decompositions are (`threads.decomposed`)
        found = _refined(cores.cpu(), total.cpu(), leading.cpu(), count)
        values, right, left, safe = (part.to(cores.device) for part in found)
        if not safe.all():
            for into, part in zip((values, right, left), eigen_parts(cores[~safe], total[~safe], count), strict=True):
                into[~safe] = part
    scale = decomposition.sigma.sqrt()[..., None]  # M = U sqrt(S) sqrt(S) V^T
    read, write = _combined(decomposition.read, scale * right), _combined(decomposition.write, scale * left.mT)
    read, write = (side / side.norm(dim=-1, keepdim=True) for side in (read, write))
    overlap = (read * write).sum(-1)
    write = torch.where((overlap.real < 0)[..., None], -write, write)
    values = values.masked_fill(values.imag < 0, math.nan)  # the other half of each pair, sorted last
    members = clusters(values)
    value, modulus = values[:, :count], values[:, :count].abs()
    coalesces = (members[1][:, :count] > 1) | ((value.imag > 0) & (2 * value.imag < CLUSTER_GAP * modulus))
    kept = (modulus > ZERO_WITHIN * total) & (coalesces | (modulus * overlap.abs() > ZERO_WITHIN * total))
    return _batch("eigen", kept, values, members, [read[kept], write[kept]])


def _combined(
    columns: Float[Tensor, "head d_model k"], weights: Complex[Tensor, "head k n"]
) -> Complex[Tensor, "head n d_model"]:
    """Return weighted sums of columns, as rows: one product with real numbers, since the columns are the large side."""
    real, imaginary = (columns.double() @ torch.cat((weights.real, weights.imag), -1)).mT.tensor_split(2, dim=1)
    return torch.complex(real, imaginary)


def _leading(values: Complex[Tensor, "head k"]) -> tuple[Complex[Tensor, "head k"], Int[Tensor, "head k"]]:
    """Return eigenvalues by falling modulus, but all those with Im < 0 last, and their places."""
    order = values.abs().masked_fill(values.imag < 0, -1).sort(dim=-1, descending=True, stable=True).indices
    return values.gather(-1, order), order


def eigen_parts(
    cores: Float[Tensor, "head k k"], total: Float[Tensor, "head 1"], count: int
) -> tuple[Complex[Tensor, "head k"], Complex[Tensor, "head k n"], Complex[Tensor, "head n k"]]:
    """Return all eigenvalues, the leading first (`_leading`), and the leading ones' unit right and left vectors."""
    values, right = decomposed(torch.linalg.eig, cores)
    values, order = _leading(values)
    right = right.gather(-1, order[:, None].expand_as(right))[:, :, :count]
    return values, right, _left_eigenvectors(cores, values[:, :count] + EIGENVALUE_SHIFT * total, right)


def _refined(
    cores: Float[Tensor, "head k k"], total: Float[Tensor, "head 1"], near: Complex[Tensor, "head k"], count: int
) -> tuple[Complex[Tensor, "head k"], Complex[Tensor, "head k n"], Complex[Tensor, "head n k"], Bool[Tensor, " head"]]:
    """Return what `eigen_parts` does, from eigenvalues that are nearly known, and of which heads it can be used.

    Vectors come from inverse iteration beside each leading eigenvalue, and the eigenvalue is then l K r / (l r). A head
    is left out if one of them is near another eigenvalue or modulus, so that iteration is slow or the order is open,
    or if its vectors do not fit the core: its eigenvalues are rounding.
    """
    n, k = min(count, cores.shape[-1]), cores.shape[-1]
    leading = near[:, :n]
    beside = leading + EIGENVALUE_SHIFT * total
    identity, found = torch.eye(k).to(beside), leading.new_empty(len(cores), n, 2, k)
    for heads in blocks(len(cores), max(1, SYSTEM_ELEMENTS // (n * k * k))):
        shifted = cores[heads].mT.to(beside)[:, None] - beside[heads, :, None, None] * identity
        found[heads] = decomposed(_both_sides, shifted.flatten(0, 1)).unflatten(0, (-1, n))
    left, right = found[:, :, 0], found[:, :, 1]
    moved = right @ cores.mT.to(right)
    refined = (left * moved).sum(-1) / (left * right).sum(-1)
    refined = torch.where(leading.imag == 0, refined.real.to(refined), refined)
    residual = torch.linalg.vector_norm(moved - refined[..., None] * right, dim=-1)
    residual = residual + torch.linalg.vector_norm(left @ cores.to(left) - refined[..., None] * left, dim=-1)
    fits = (residual <= RESIDUAL * cores.norm(dim=(-2, -1))[:, None]) & ((refined - leading).abs() <= APART * total)
    gaps = (leading[:, :, None] - near[:, None]).abs()
    gaps[:, range(n), range(n)] = math.inf
    falling = near.abs().masked_fill(near.imag < 0, 0)[:, : n + 1]
    ordered = (falling.diff(dim=-1)[:, :n].abs() > MODULI_APART * total).all(-1, keepdim=True)
    apart = (gaps.amin(-1) > APART * total) & ordered
    values = near.clone()
    values[:, :n] = refined
    return values, right.mT, left, (fits & apart).all(-1)


def _both_sides(matrices: Complex[Tensor, "n k k"]) -> Complex[Tensor, "n 2 k"]:
    """Return for each matrix A the unit vectors x and y with A x and A^T y nearest to 0, by inverse iteration.

    All start from one random vector. Call it by `decomposed`, which gives several matrices only to a thread in which
    torch has no other: elsewhere torch's batched LU is not safe (`_inverse_iteration`).
    """
    k = matrices.shape[-1]
    start = torch.randn(k, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrices)
    x, found = start.to(matrices).expand(len(matrices), k, 1), []
    for adjoint in (True, False):  # A^H z = 0 has the conjugate of y, which is near x
        for _ in range(ITERATIONS):
            x = torch.linalg.lu_solve(lu, pivots, x, adjoint=adjoint)
            x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        found.append(x[..., 0].conj() if adjoint else x[..., 0])
    return torch.stack(found[::-1], 1)


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

    One matrix at a time: if torch has several threads, its batched LU on the CPU takes several matrices at once through
    a LAPACK that is not safe for that, and from 150 rows on it is wrong or hangs.
    """
    found = []
    for system in systems:
        lu, pivots, _ = torch.linalg.lu_factor_ex(system[:, :-1])
        x = system[:, -1:]
        for _ in range(ITERATIONS):
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
    for _ in range(n.bit_length()):  # each step doubles the paths, until there are no longer ones
        longer = (linked @ linked).clamp_max(1)
        if torch.equal(longer, linked):
            break
        linked = longer
    return linked.argmax(-1), linked.sum(-1).long()
