"""Eigenvalues, singular values and everything read off them, through cores of d_head x d_head.

With the thin singular value decomposition M = U S V^T of each head (QR of both factors, then an SVD of
d_head x d_head), the balanced factors U sqrt(S) and sqrt(S) V^T depend on M alone and not on the head's gauge. For any
matrix G

    the nonzero eigenvalues of  M G  are those of the core  sqrt(S) V^T G U sqrt(S)

which gives W_QK and W_OV with G = I, the full OV circuit W_E W_OV W_U with G = W_U C W_E, and the full QK circuit
with G = W_E^T C W_E. Eigenvalues and traces are cyclic; singular values and Frobenius norms are not.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ovqk.heads import Factors

TINY = 1e-6  # relative to the sum of singular values: below it a denominator is rounding, not weights


@dataclass(frozen=True)
class Decomposition:
    """Thin singular value decomposition M = read diag(sigma) write^T of every head, float64.

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


def decompose(factors: Factors, centred: bool) -> Decomposition:
    """The thin SVD of each head's map, without forming it.

    Args:
        factors: the maps.
        centred: reads and writes are orthogonal to the all-ones direction (LayerNorm folded), which costs a rank
            where d_head is not below d_model.
    """
    left = torch.linalg.qr(factors.left.double())
    right = torch.linalg.qr(factors.right.double().mT)
    inner = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    d_model, d_head = factors.left.shape[1:]
    return Decomposition(
        read=left.Q @ inner.U,
        sigma=inner.S,
        write=right.Q @ inner.Vh.mT,
        rank=min(d_head, d_model - centred),
    )


def core(
    decomposition: Decomposition, gram: Float[Tensor, "d_model d_model"] | None = None
) -> Float[Tensor, "head k k"]:
    """The core whose eigenvalues are the nonzero eigenvalues of M G (G = I where no Gram is given)."""
    left = decomposition.balanced_left
    return decomposition.balanced_right @ (left if gram is None else gram @ left)


def eigenvalues(cores: Float[Tensor, "head k k"]) -> Complex[Tensor, "head k"]:
    """Eigenvalues of each core, by falling modulus (ties: by real, then imaginary part)."""
    values = torch.linalg.eigvals(cores)
    order = values.imag.sort(dim=-1, descending=True, stable=True).indices
    values = values.gather(-1, order)
    order = values.abs().sort(dim=-1, descending=True, stable=True).indices
    return values.gather(-1, order)


def full_circuit_singular_values(
    decomposition: Decomposition,
    gram_in: Float[Tensor, "d_model d_model"],
    gram_out: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, "head k"]:
    """Singular values of C A M B C for token matrices A, B with Grams A^T C A and B C B^T, descending.

    Through roots of the k x k Grams of the balanced factors, so that a vocabulary smaller than d_head is no
    special case: values beyond its rank come out as 0.
    """
    left, right = decomposition.balanced_left, decomposition.balanced_right
    root_in, root_out = _root(left.mT @ gram_in @ left), _root(right @ gram_out @ right.mT)
    return torch.linalg.svdvals(root_in @ root_out.mT)


def _root(gram: Float[Tensor, "head k k"]) -> Float[Tensor, "head k k"]:
    """R with R^T R = gram, for a Gram that may be singular."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values.clamp_min(0).sqrt()[..., :, None] * vectors.mT


def guarded(
    numerator: Float[Tensor, " head"], denominator: Float[Tensor, " head"], scale: Float[Tensor, " head"]
) -> Float[Tensor, " head"]:
    """numerator / denominator, and 0 where the denominator is below 1e-6 of the scale (a nilpotent head)."""
    small = denominator.abs() <= TINY * scale
    return torch.where(small, torch.zeros_like(numerator), numerator / torch.where(small, 1.0, denominator))


def trace_ratio(eigen: Complex[Tensor, "head k"], scale: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """sum lambda / sum |lambda|, in [-1, 1]: the copying score of Elhage et al. 2021 on a full OV circuit."""
    return guarded(eigen.real.sum(-1), eigen.abs().sum(-1), scale)


def spectrum_metrics(decomposition: Decomposition) -> dict[str, Float[Tensor, " head"]]:
    """The metrics of one circuit in the residual space, without their `ov_` or `qk_` prefix.

    Formulas: definitions, section 2; effective rank: Roy & Vetterli 2007; copying as an eigenvalue ratio: Elhage
    et al. 2021; departure from normality: Henrici 1962. Every value is [head]; a head of zero weights scores 0.
    """
    sigma = decomposition.sigma
    cores = core(decomposition)
    eigen = eigenvalues(cores)
    total, energy = sigma.sum(-1), sigma.square()
    energy_sum = energy.sum(-1)
    frobenius = energy_sum.sqrt()
    modulus = eigen.abs()
    share, energy_share = _shares(sigma), _shares(energy)
    departure = (energy_sum - modulus.square().sum(-1)).clamp_min(0).sqrt()
    reached = energy_share.cumsum(-1) < 0.9 - 1e-12
    structural = energy[..., : decomposition.rank]
    geometric = structural.clamp_min(torch.finfo(torch.float64).tiny).log().mean(-1).exp()
    alive = total > 0
    return {
        "trace_ratio": trace_ratio(eigen, total),
        "symmetry": guarded((cores @ cores).diagonal(dim1=-2, dim2=-1).sum(-1), energy_sum, energy_sum),
        "skew_rotation": guarded(eigen.imag.abs().sum(-1), modulus.sum(-1), total),
        "nonnormality": guarded(departure, frobenius, total),
        "frobenius_norm": frobenius,
        "spectral_norm": sigma[..., 0],
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


def vocabulary_symmetry(decomposition: Decomposition, gram: Float[Tensor, "d_model d_model"]) -> Float[Tensor, " head"]:
    """tr(W_QK G W_QK G) / tr(W_QK^T G W_QK G): how symmetric the attention between tokens is, in [-1, 1]."""
    left, right = decomposition.balanced_left, decomposition.balanced_right
    cores = right @ gram @ left
    both = (cores @ cores).diagonal(dim1=-2, dim2=-1).sum(-1)
    norms = ((left.mT @ gram @ left) * (right @ gram @ right.mT).mT).sum((-2, -1))
    return guarded(both, norms, norms)
