"""Orthonormal bases by a Gram's Cholesky factor: two products instead of a loop over columns."""

import torch
from jaxtyping import Float
from torch import Tensor

CHOLESKY_UP_TO = 3e3  # |R| |R^-1| up to which Cholesky gives a basis orthonormal within 1e-9 (float32: 1e-4)


def orthonormal(
    weight: Float[Tensor, "n d_model k"], dtype: torch.dtype
) -> tuple[Float[Tensor, "n r d_model"], Float[Tensor, "n r k"]]:
    """Factor weight = Q R with orthonormal Q; return Q^T in this dtype, and R in float64.

    R is the Gram's Cholesky factor, or Householder's if the weight is ill-conditioned. Each weight is first divided by
    a power of two near its size, which changes no digit: a tiny weight's inverse would overflow float32.
    """
    d_model, k = weight.shape[1:]
    exact = weight.double()
    size = power_of_two(exact.abs().amax((-2, -1)))[:, None, None]
    exact = exact / size
    if k > d_model:
        Q, R = torch.linalg.qr(exact)
        return Q.mT.to(dtype), R * size
    R, inverse = triangular_factor(exact)
    rows = inverse.mT.to(dtype) @ exact.mT.to(dtype)
    poor = ~(R.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1)) < CHOLESKY_UP_TO)  # nan is poor too
    if poor.any():
        Q, R[poor] = torch.linalg.qr(exact[poor])
        rows[poor] = Q.mT.to(dtype)
    return rows, R * size


def triangular_factor(
    x: Float[Tensor, "n d_model k"],
) -> tuple[Float[Tensor, "n k k"], Float[Tensor, "n k k"]]:
    """Return R and its inverse for x = Q R with orthonormal Q: x^T x's Cholesky factor, with a positive diagonal.

    If a matrix has linearly dependent columns, neither result can be used.
    """
    R, _ = torch.linalg.cholesky_ex(x.mT @ x, upper=True)
    unit = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device).expand_as(R)
    return R, torch.linalg.solve_triangular(R, unit, upper=True)


def power_of_two(size: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return the smallest power of two above each size, float64; 1 for 0."""
    exponent = torch.frexp(size.double()).exponent
    return torch.ldexp(torch.ones_like(size, dtype=torch.float64), exponent)
