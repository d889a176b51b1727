"""Does a head act on the task's causal variable? Readouts over the task's tokens (definitions: section 5).

Rows e_t are effective embeddings normalised as the layer's norm would; the matrices are those of the folded weights,
for QK with the mean rotation under rotary positions. Biases are absent: b_V and b_O by definition, and a query or key
bias adds to a whole column or a whole row of the readout, which centring or comparing within rows removes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovqk.heads import Factors
from ovqk.spectra import Decomposition, guarded
from ovqk.vocabulary import blocks
from ovqk.weights import Rows

ENERGY = 0.9  # of a word set's centred rows, kept in its subspace
TOP_BLOCK = 1024  # tokens compared at a time
TOP = 5  # Wang et al. 2022 count a name as copied when its logit is among the five largest


def task_auc_by_source(
    logits: Float[Tensor, "head source target"],
) -> tuple[Float[Tensor, "head source"], Float[Tensor, "head source"]]:
    """For each task token t, the share of other task tokens u with L_tu < L_tt, in [0, 1]; a tie counts half.

    `ov_task_auc` and `qk_task_auc` are the means over t; chance 0.5.

    Returns:
        With each column first less its mean over the OTHER rows (what a column gets from any source is a bias, not
        copying), and without that centring.
    """
    n = logits.shape[-1]
    others = (logits.sum(-2, keepdim=True) - logits) / (n - 1)
    return _below_own(logits - others), _below_own(logits)


def _below_own(logits: Float[Tensor, "head source target"]) -> Float[Tensor, "head source"]:
    n = logits.shape[-1]
    own = logits.diagonal(dim1=-2, dim2=-1)[..., None]
    below = (logits < own).double().sum(-1) + 0.5 * ((logits == own).double().sum(-1) - 1)
    return below / (n - 1)


def readout(
    factors: Factors, rows: Float[Tensor, "source d_model"], columns: Float[Tensor, "target d_model"]
) -> Float[Tensor, "head source target"]:
    """rows M columns^T for each head: task logits of W_OV (columns: W_U's) or scores of W_QK (columns: keys)."""
    return (rows @ factors.left) @ (factors.right @ columns.T)


def in_top_by_source(
    factors: Factors,
    rows: Float[Tensor, "word d_model"],
    ids: Int[Tensor, " word"],
    W_U_rows: Rows,
) -> tuple[Float[Tensor, "head word"], Float[Tensor, "head word"]]:
    """Whether each word's own logit is in the top 5 of the whole vocabulary, under W_OV and under -W_OV: 1 or 0.

    The means over words are `ov_task_copy`, the copy score of Wang et al. 2022, and `ov_task_suppress`. The vocabulary
    is passed in blocks, and a word is left alone once 5 tokens are known on either side of it.
    """
    written = (rows @ factors.left) @ factors.right  # [head, word, d_model]
    n_heads, n_words = written.shape[:2]
    written, targets = written.flatten(0, 1), ids.repeat(n_heads)
    own = (written.view(n_heads, n_words, -1) * W_U_rows[ids]).sum(-1).flatten()
    above, below = (torch.zeros(len(own), dtype=torch.long, device=own.device) for _ in range(2))
    open_ = torch.arange(len(own), device=own.device)
    for tokens in blocks(W_U_rows.shape[0], TOP_BLOCK):
        logits = written[open_] @ W_U_rows[tokens].T
        mine = targets[open_] - tokens.start
        here = ((mine >= 0) & (mine < logits.shape[1])).nonzero()[:, 0]
        logits[here, mine[here]] = own[open_[here]]  # a word never outranks itself by its own rounding
        above[open_] += _count(logits > own[open_, None])
        below[open_] += _count(logits < own[open_, None])
        open_ = open_[(above[open_] < TOP) | (below[open_] < TOP)]
    alive = (own.view(n_heads, n_words).abs().sum(-1, keepdim=True) > 0).double()
    return (above < TOP).view(n_heads, n_words) * alive, (below < TOP).view(n_heads, n_words) * alive


def _count(true: Bool[Tensor, "word token"]) -> Int[Tensor, " word"]:
    """How many are true in each row: bytes are summed faster than truths."""
    return true.view(torch.uint8).sum(-1, dtype=torch.int32).long()


def subspace(
    rows: Float[Tensor, "word d_model"], origin: Float[Tensor, " d_model"], rank: int | None = None
) -> Float[Tensor, "r d_model"]:
    """Orthonormal basis of the span of a set's rows about an origin, at 90 % of the energy or of the rank given.

    The origin is the mean of the set's matched band: the set's own mean would take out what the set has in common.
    """
    _, sigma, Vh = torch.linalg.svd((rows - origin).double(), full_matrices=False)
    if rank is None:
        share = sigma.square().cumsum(0) / sigma.square().sum()
        rank = int((share < ENERGY).sum()) + 1
    return Vh[:rank]


def unit_contrast(
    minus: Float[Tensor, "word d_model"], plus: Float[Tensor, "word d_model"]
) -> Float[Tensor, "1 d_model"]:
    """Unit direction of mean(plus) - mean(minus), as a basis of one row; nan where they are the same."""
    direction = (plus.double() - minus.double()).mean(0, keepdim=True)
    return direction / direction.norm()


def same_mean(minus: Float[Tensor, "word d_model"], plus: Float[Tensor, "word d_model"]) -> bool:
    """Whether both sides have the same mean, up to the rounding of their rows."""
    gap = (plus.double() - minus.double()).mean(0).norm()
    return bool(gap <= torch.finfo(torch.float32).eps * (minus.norm() + plus.norm()))


@dataclass(frozen=True)
class SideAlignment:
    """Alignment of one side of a map with a subspace; 1 is chance for both."""

    whole: Float[Tensor, " head"]
    """|M P|_F^2 / |M|_F^2 / (r/d): the share of the map's energy on that side."""
    top: Float[Tensor, " head"]
    """|P x_1|^2 / (r/d): of its top singular direction there."""


def side_alignment(
    directions: Float[Tensor, "head d_model k"],
    sigma: Float[Tensor, "head k"],
    basis: Float[Tensor, "r d_model"],
) -> SideAlignment:
    """Alignment of the side whose singular directions these are with the span of an orthonormal basis."""
    chance = basis.shape[0] / basis.shape[1]
    inside = (basis @ directions).square().sum(-2)  # [head, k]
    energy = sigma.square()
    whole = guarded((inside * energy).sum(-1), energy.sum(-1), energy.sum(-1))
    return SideAlignment(whole / chance, inside[..., 0] / chance)


def transfer(
    decomposition: Decomposition, read: Float[Tensor, "1 d_model"], write: Float[Tensor, "1 d_model"]
) -> Float[Tensor, " head"]:
    """a W_OV b^T / sigma_1, in [-1, 1]: what of the variable's read direction arrives on its write direction."""
    a, b = (read @ decomposition.read)[:, 0], (write @ decomposition.write)[:, 0]
    return guarded((a * decomposition.sigma * b).sum(-1), decomposition.sigma[:, 0], decomposition.sigma[:, 0])
