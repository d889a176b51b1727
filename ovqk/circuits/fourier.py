"""Circuits over a cycle of tokens, by frequency (definitions: section 5).

If a task's words are the residues modulo p, a model may represent residue a by cos(2 pi k a / p) and sin(2 pi k a / p)
for a few frequencies k = 1 .. p // 2. Models that learn modular addition do so (Nanda et al. 2023, arXiv:2301.05217).
Frequency 0 is a constant. It is left out everywhere, because a softmax does not see it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ENOUGH = 0.95
"""The share of the power that the leading frequencies must hold together (`frequencies_needed`)."""
NOTHING = 1e-24
"""The largest power that counts as rounding, as a share of the whole power with the constants'."""


def power(rows: Float[Tensor, "*batch residue d"]) -> Float[Tensor, "*batch frequency"]:
    """Return the share of the rows' power at each frequency 1 .. p // 2, in [0, 1]; nan if all rows are equal.

    A frequency's power is the squared norm of its two rows (one at p / 2) in the real discrete Fourier transform.
    """
    found = torch.fft.fft(rows.double(), dim=-2).abs().square().sum(-1)
    powers, whole = _folded(found), found.sum(-1, keepdim=True)
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total > NOTHING * whole, total, torch.nan)


def blocks(matrix: Float[Tensor, "*batch residue residue_written"]) -> Float[Tensor, "*batch frequency"]:
    """Return the share of a matrix's power in each block (k, k), from a frequency to itself; nan without power.

    The power is measured on F M F^T without the constants' row and column; F is the real transform. If a head moves
    residues as the group does, all its power is in these blocks.
    """
    found = torch.fft.fft2(matrix.double()).abs().square()
    p = found.shape[-1]
    k = torch.arange(p)
    kept = found[..., 1:, 1:].sum((-2, -1))
    same = found[..., k, k] + torch.where(k == (-k) % p, 0.0, 1.0).to(found) * found[..., k, (-k) % p]
    there = kept > NOTHING * found.sum((-2, -1))
    return _folded(same) / torch.where(there, kept, torch.nan)[..., None]


def _folded(by_frequency: Float[Tensor, "*batch residue"]) -> Float[Tensor, "*batch frequency"]:
    """Return the sums over k and -k for k = 1 .. p // 2."""
    p = by_frequency.shape[-1]
    k = torch.arange(1, p // 2 + 1)
    other = torch.where(k == (-k) % p, 0.0, 1.0).to(by_frequency) * by_frequency[..., (-k) % p]
    return by_frequency[..., k] + other


def gini(shares: Float[Tensor, "*batch frequency"]) -> Float[Tensor, "*batch"]:
    """Return the Gini coefficient of powers over frequencies, in [0, 1]: 0 if all are equal, near 1 if one has all."""
    rising = shares.sort(-1).values
    n = rising.shape[-1]
    weights = 2 * torch.arange(1, n + 1).to(rising) - n - 1
    return (weights * rising).sum(-1) / (n * rising.sum(-1))


def frequencies_needed(shares: Float[Tensor, "*batch frequency"]) -> Int[Tensor, "*batch"]:
    """Return how many frequencies are needed, the strongest first, to hold the share ENOUGH of the power."""
    held = shares.sort(-1, descending=True).values.cumsum(-1)
    return (held < ENOUGH - 1e-12).sum(-1) + 1


def doubling(shares: Float[Tensor, " frequency"], p: int) -> Float[Tensor, " frequency"]:
    """Return, for each frequency k, the power at 2k (modulo p, or p - 2k) over the power at k; >= 0.

    It is near 0 if a model's heads use frequency k, and larger if none does (Zhong et al. 2023, arXiv:2306.17844). For
    k = p / 2, 2k is frequency 0, whose power counts as 0.
    """
    k = torch.arange(1, p // 2 + 1)
    twice = torch.minimum(2 * k % p, -2 * k % p)
    of_twice = torch.where(twice > 0, shares[twice.clamp_min(1) - 1], torch.nan)
    return of_twice / torch.where(shares > 0, shares, torch.nan)


def shift_variance(matrix: Float[Tensor, "residue residue"], back: bool = False) -> Float[Tensor, ""]:
    """Return |M P - P M| / |M|, P the shift by one residue, in [0, 2]: 0 for a circulant matrix; nan for 0.

    A circulant M writes c = a + s for each a alike. With `back`, P^T stands on one side: |M P^T - P M| / |M|, 0 if M
    writes c = s - a, as the second operand of a subtraction asks.
    """
    step = -1 if back else 1
    shifted = matrix.double().roll((1, step), (0, 1)) - matrix.double()  # as large as the difference of products
    norm = matrix.double().norm()
    return shifted.norm() / torch.where(norm > 0, norm, torch.nan)


def relabellings(p: int, count: int, seed: int) -> Int[Tensor, "draw residue"]:
    """Draw permutations of the residues: they keep every spectrum and destroy the cycle."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(p, generator=generator) for _ in range(count)])
