"""Eigenvalues, singular values and the metrics read off them, all from cores of d_head x d_head.

A map is M = L N R^T with orthonormal L and R (`maps`). For any matrix G

    M G has the same nonzero eigenvalues as the core N R^T G L

This gives W_QK and W_OV with G = I, the full OV circuit W_E W_OV W_U with G = W_U C W_E, and the full QK circuit with
G = W_E^T C W_E. Eigenvalues and traces are cyclic; singular values and Frobenius norms are not. A full circuit A M B
has the same singular values as root(L^T A^T C A L) N root(R^T B C B^T R)^T.
"""

import math
from functools import partial

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ovqk.circuits.grams import FullCircuit, Gram
from ovqk.circuits.maps import Cores, Maps
from ovqk.circuits.orthonormal import power_of_two
from ovqk.circuits.threads import decomposed

BOUND_ROUNDING = 1e-9  # relative; covers the float64 rounding of a bound
ZERO_WITHIN = 1e-6  # relative to the sum of singular values; a smaller denominator is rounding
PIVOT_ROUNDING = 1e-5  # relative to the largest pivot of a Gram's root; smaller ones are rounding
TIE_WITHIN = 1e-9  # a ratio this near to an observed one is computed exactly instead of bounded
FLOAT32_EIGENVALUES = 1e-2  # of a sum of moduli: far above the float32 rounding of a random core's eigenvalues
SUM_OF_FLOAT32 = 0.1  # of |core|_F: a sum of moduli below this is not taken from float32 eigenvalues


def eigenvalues(cores: Float[Tensor, "head k k"]) -> Complex[Tensor, "head k"]:
    """Return the eigenvalues of each core, by falling modulus (ties: by real, then imaginary part)."""
    values = decomposed(torch.linalg.eigvals, cores)
    order = values.imag.sort(dim=-1, descending=True, stable=True).indices
    values = values.gather(-1, order)
    order = values.abs().sort(dim=-1, descending=True, stable=True).indices
    return values.gather(-1, order)


def full_circuit_singular_values(maps: Maps, read: Gram, write: Gram) -> Float[Tensor, "head k"]:
    """Return the singular values of C A M B C, descending: see `FullCircuit` for A, B and their Grams.

    They come from roots of k x k Grams. So a vocabulary smaller than d_head is no special case: values beyond its rank
    come out as 0.
    """
    root_in, root_out = _root(maps.left_gram(read)), _root(maps.right_gram(write))
    return decomposed(torch.linalg.svdvals, root_in @ maps.inner @ root_out.mT)  # type: ignore[no-any-return]


def _root(gram: Float[Tensor, "head k k"]) -> Float[Tensor, "head k k"]:
    """Return R with R^T R = gram: Cholesky's factor, or the root by eigenvalues if the Gram is singular."""
    gram = (gram + gram.mT) / 2
    root, failed = torch.linalg.cholesky_ex(gram, upper=True)
    pivots = root.diagonal(dim1=-2, dim2=-1)
    poor = (failed > 0) | ~(pivots.amin(-1) > PIVOT_ROUNDING * pivots.amax(-1))
    if poor.any():
        values, vectors = decomposed(torch.linalg.eigh, gram[poor])
        root[poor] = values.clamp_min(0).sqrt()[..., :, None] * vectors.mT
    return root


def guarded(
    numerator: Float[Tensor, "*draw head"], denominator: Float[Tensor, " head"], scale: Float[Tensor, " head"]
) -> Float[Tensor, "*draw head"]:
    """Return numerator / denominator, and 0 if the denominator is below 1e-6 of the scale (a nilpotent head)."""
    small = denominator.abs() <= ZERO_WITHIN * scale
    return torch.where(small, torch.zeros_like(numerator), numerator / torch.where(small, 1.0, denominator))


def trace_ratio(eigen: Complex[Tensor, "head k"], scale: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """Return sum lambda / sum |lambda|, in [-1, 1]: the copying score of Elhage et al. 2021 on a full OV circuit."""
    return guarded(eigen.real.sum(-1), eigen.abs().sum(-1), scale)


def trace_ratio_bounds(
    cores: Float[Tensor, "head k k"], most: Float[Tensor, " head"], sharp: bool
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Return a lower and an upper bound of sum lambda / sum |lambda|, without the eigenvalues.

    The numerator is the trace. The denominator is at most sqrt(k) |core|_F (by Weyl it is at most the sum of singular
    values). With `sharp`, a determinant gives a lower bound too: the denominator is at least k |det|^(1/k), because the
    mean of the moduli is at least their geometric mean. If the denominator is not known to exceed ZERO_WITHIN times
    `most`, the ratio may be 0 (`guarded`).
    """
    k, trace = cores.shape[-1], cores.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest = (1 + BOUND_ROUNDING) * k**0.5 * cores.norm(dim=(-2, -1))
    smallest = torch.zeros_like(trace)
    if sharp:
        _, log_determinant = decomposed(torch.linalg.slogdet, cores)
        smallest = (1 - BOUND_ROUNDING) * k * (log_determinant / k).exp()
    known = smallest > ZERO_WITHIN * most
    near_0 = torch.where(known, trace / largest, 0.0)
    far = torch.where(known, trace / smallest, trace.sign()).clamp(-1, 1)
    return torch.minimum(near_0, far), torch.maximum(near_0, far)


def trace_ratio_intervals(
    cores: Float[Tensor, "head k k"], most: Float[Tensor, " head"]
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Return bounds for sum lambda / sum |lambda| from float32 eigenvalues, which take half as long as float64 ones.

    Use them for cores between random frames, whose eigenvalues are well-conditioned: rounding changes the sum of moduli
    by about 1e-6 of itself, and the bounds allow FLOAT32_EIGENVALUES. If the sum is small beside the core, or may count
    as 0 (`guarded`), the bounds are -1 and 1.
    """
    trace, size = cores.diagonal(dim1=-2, dim2=-1).sum(-1), cores.norm(dim=(-2, -1))
    unit = power_of_two(size)[:, None, None]
    total = decomposed(torch.linalg.eigvals, (cores / unit).float()).abs().double().sum(-1) * unit[:, 0, 0]
    known = (total > SUM_OF_FLOAT32 * size) & (total > 2 * ZERO_WITHIN * most)
    ratio = trace / torch.where(known, total, 1.0)
    wide = FLOAT32_EIGENVALUES * ratio.abs()
    return torch.where(known, ratio - wide, -1.0), torch.where(known, ratio + wide, 1.0)


BOUNDS = (
    partial(trace_ratio_bounds, sharp=False),
    partial(trace_ratio_bounds, sharp=True),
    trace_ratio_intervals,
)
"""Bounds for a trace ratio, the cheapest first."""


def spectrum_metrics(
    maps: Maps, known: tuple[Cores, Complex[Tensor, "head k"]] | None = None
) -> dict[str, Float[Tensor, " head"]]:
    """Return the metrics of one circuit in the residual space, without their `ov_` or `qk_` prefix.

    Formulas: definitions, section 2; effective rank: Roy & Vetterli 2007; copying as an eigenvalue ratio: Elhage
    et al. 2021; departure from normality: Henrici 1962. Every value is [head]; a head of zero weights scores 0.
    `known` are the residual cores and their eigenvalues, if a caller has them.
    """
    unit = power_of_two(maps.sigma[..., 0])  # squares of squares of tiny weights vanish, even in float64
    sigma = maps.sigma / unit[:, None]
    cores, eigen = known or (maps.core(), None)
    eigen = (eigenvalues(cores) if eigen is None else eigen) / unit[:, None]
    cores = cores / unit[:, None, None]
    total, energy = sigma.sum(-1), sigma.square()
    energy_sum = energy.sum(-1)
    frobenius = energy_sum.sqrt()
    modulus = eigen.abs()
    share, energy_share = _shares(sigma), _shares(energy)
    departure = (energy_sum - modulus.square().sum(-1)).clamp_min(0).sqrt()
    reached = energy_share.cumsum(-1) < 0.9 - 1e-12
    structural = energy[..., : maps.rank]
    geometric = structural.clamp_min(torch.finfo(torch.float64).tiny).log().mean(-1).exp()
    alive = total > 0
    return {
        "trace_ratio": trace_ratio(eigen, total),
        "symmetry": guarded((cores @ cores).diagonal(dim1=-2, dim2=-1).sum(-1), energy_sum, energy_sum),
        "skew_rotation": guarded(eigen.imag.abs().sum(-1), modulus.sum(-1), total),
        "nonnormality": guarded(departure, frobenius, total),
        "frobenius_norm": frobenius * unit,
        "spectral_norm": maps.sigma[..., 0],
        "stable_rank": guarded(energy_sum, energy[..., 0], energy_sum),
        "participation_ratio": guarded(energy_sum.square(), energy.square().sum(-1), energy_sum.square()),
        "effective_rank_energy": _entropy(energy_share).exp() * alive,
        "effective_rank": _entropy(share).exp() * alive,
        "rank90": (reached.sum(-1) + 1).double() * alive,
        "top_share": guarded(energy[..., 0], energy_sum, energy_sum),
        "flatness": guarded(geometric, structural.mean(-1), energy_sum),
    }


def _shares(values: Float[Tensor, "head k"]) -> Float[Tensor, "head k"]:
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)


def _entropy(shares: Float[Tensor, "head k"]) -> Float[Tensor, " head"]:
    return -torch.xlogy(shares, shares).sum(-1)


def vocabulary_symmetry(maps: Maps, gram: Gram) -> Float[Tensor, " head"]:
    """Return tr(W_QK G W_QK G) / tr(W_QK^T G W_QK G): how symmetric the attention between tokens is, in [-1, 1]."""
    cores = maps.core(gram)
    both = (cores @ cores).diagonal(dim1=-2, dim2=-1).sum(-1)
    norms = (maps.inner.mT @ maps.left_gram(gram) @ maps.inner * maps.right_gram(gram).mT).sum((-2, -1))
    return guarded(both, norms, norms)


def full_circuit_ratio(
    maps: Maps,
    full: FullCircuit,
    observed: float | None = None,
) -> Float[Tensor, " head"]:
    """Return the trace ratio of A M B, in [-1, 1], from its Grams.

    A denominator counts as 0 relative to the singular values of A M B, which are computed only if a bound from the
    Grams' norms does not settle the matter. If a value was `observed`, only the side on which each ratio lies matters:
    if `trace_ratio_bounds` or `trace_ratio_intervals` decide it, a bound on that side stands for the ratio.
    """
    cores = maps.core(full.cross)
    most = math.sqrt(full.read.norm() * full.write.norm()) * maps.sigma.double().sum(-1)
    found, rest = torch.zeros_like(most), torch.arange(len(cores), device=cores.device)
    for bounds in BOUNDS:
        if observed is None or not len(rest):
            break
        low, high = bounds(cores[rest], most[rest])
        below, above = high < observed - TIE_WITHIN, low > observed + TIE_WITHIN
        found[rest] = torch.where(below, high, low)
        rest = rest[~(below | above)]
    eigen = eigenvalues(cores[rest])
    if (eigen.abs().sum(-1) > ZERO_WITHIN * most[rest]).all():
        found[rest] = trace_ratio(eigen, torch.zeros_like(most[rest]))
        return found
    sigma = full_circuit_singular_values(maps, full.read, full.write)
    found[rest] = trace_ratio(eigen, sigma[rest].sum(-1))
    return found
