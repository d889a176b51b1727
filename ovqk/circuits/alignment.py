"""Metrics over a task's tokens: whether a head acts on the task's causal variable (definitions: section 5).

Rows e_t are effective embeddings normalised as the layer's norm would; weights are folded, and QK has the mean
rotation under rotary positions. Biases are absent: b_V and b_O by definition, and a query or key bias adds to a whole
column or row, which centring or comparing within rows removes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovqk.circuits.factors import Factors
from ovqk.circuits.maps import Decomposition
from ovqk.circuits.spectra import guarded
from ovqk.circuits.threads import decomposed
from ovqk.weights.stored_rows import Rows

ENERGY_KEPT = 0.9  # share of a word set's energy that its subspace keeps
ENERGY_ROUNDING = 1e-8  # relative to the largest energy; a smaller one does not determine a direction
TOP_BLOCK = 1024  # the most tokens, and the most words, that are compared at a time
FLAT = 1e-6  # relative to a column's largest entry; a smaller spread of the others is rounding
TOP = 5
"""Wang et al. 2022 count a name as copied when its logit is among the five largest."""


def task_auc_by_source(
    logits: Float[Tensor, "*draw head source target"],
) -> tuple[Float[Tensor, "*draw head source"], Float[Tensor, "*draw head source"]]:
    """Return, for each task token t, the share of other task tokens u with L_tu < L_tt, in [0, 1]; 0.5 by chance.

    A tie counts half. The means over t are `ov_task_auc` and `qk_task_auc` (docs/definitions.md, section 5).

    Returns:
        Two versions. The first centres each column by its mean over the OTHER rows, because a logit that a target gets
        from every source is a bias and no copying. The second does not centre (`_raw`).
    """
    n = logits.shape[-1]
    others = (logits.sum(-2, keepdim=True) - logits) / (n - 1)
    return _below_own(logits - others), _below_own(logits)


def _below_own(logits: Float[Tensor, "*draw head source target"]) -> Float[Tensor, "*draw head source"]:
    n = logits.shape[-1]
    own = logits.diagonal(dim1=-2, dim2=-1)[..., None]
    below = _count(logits < own) + 0.5 * (_count(logits == own) - 1)
    return below.double() / (n - 1)


def margin_by_source(scores: Float[Tensor, "*draw head source target"]) -> Float[Tensor, "*draw head source"]:
    """Return, for each token t, how far its own entry stands out of its column, in standard deviations; 0 by chance.

    The margin is (L_tt - the mean of L_st) / their standard deviation, over the other sources s != t, with n - 2
    degrees of freedom. Unlike an AUC it does not saturate. If the other entries have no spread, FLAT times the column's
    largest entry replaces it. Then a perfect head has a large margin, and a head with zero weights has 0. The means
    over t are `ov_task_margin` and `qk_task_margin` (docs/definitions.md, section 5).

    Raises:
        ValueError: there are fewer than 3 tokens.
    """
    n = scores.shape[-1]
    if n < 3:
        raise ValueError(f"a margin needs at least 3 tokens; there are {n}")
    scores = (scores - scores.mean(-2, keepdim=True)).double()
    own = scores.diagonal(dim1=-2, dim2=-1)
    mean = -own / (n - 1)  # of the others, because the column sums to zero
    squares = torch.linalg.vector_norm(scores, dim=-2).square() - own.square() - (n - 1) * mean.square()
    largest = torch.maximum(scores.amax(-2), -scores.amin(-2))  # by norms and extremes, no second array is made
    spread = (squares.clamp_min(0) / (n - 2)).sqrt().maximum(FLAT * largest)
    return (own - mean) / torch.where(spread > 0, spread, 1.0)


def readout(
    factors: Factors, rows: Float[Tensor, "*draw source d_model"], columns: Float[Tensor, "*draw target d_model"]
) -> Float[Tensor, "*draw head source target"]:
    """Return rows M columns^T, head by head: logits by W_OV (columns of W_U) or scores by W_QK (columns: keys)."""
    left = torch.einsum("...sd,hdk->...hsk", rows, factors.left)
    right = torch.einsum("...td,hkd->...htk", columns, factors.right)
    return left @ right.mT


class TopSearch:
    """A search for the words whose target's logit is in the whole vocabulary's top, under W_OV times each sign.

    A word's target is the word itself, or for a relation another one. The vocabulary is passed in blocks (`compare`,
    `settle`). A word is closed once `top` tokens are known to come before its target, which for most words happens
    after few tokens. The means over words are `ov_task_copy`, the copy score of Wang et al. 2022, and
    `ov_task_suppress`, with a top of 5, and `ov_relation_score` and `ov_relation_suppress` (docs/definitions.md,
    section 5).

    Attributes:
        passed: how many tokens, counted from id 0, were compared.
        top: how many places count as the top.
    """

    def __init__(
        self,
        written: Float[Tensor, "head word d_model"],
        ids: Int[Tensor, " word"],
        own_rows: Float[Tensor, "word d_model"],
        signs: Sequence[int] = (1, -1),
        top: int = TOP,
    ) -> None:
        """Take the rows that the maps write for each word, its target's id and the target's row in W_U^T."""
        own = (written * own_rows).sum(-1)
        self.passed, self.top, self.shape = 0, top, (len(signs), *own.shape)
        self._alive = (own.abs().sum(-1, keepdim=True) > 0).double()
        # For the open words, each under each sign, which become fewer:
        self._own = torch.cat([sign * own.flatten() for sign in signs])
        self._written = torch.cat([sign * written.flatten(0, 1) for sign in signs])
        self._targets = ids.repeat(len(signs) * len(own))
        self._open = torch.arange(len(self._own), device=own.device)
        self._before = torch.zeros(len(self._own), dtype=torch.int32, device=own.device)  # for all words

    @property
    def done(self) -> bool:
        """Whether every word has enough tokens before it."""
        return not len(self._open)

    def compare(self, start: int, columns: Float[Tensor, "d_model token"]) -> None:
        """Count how many tokens, from id `start` on, come before each open word, and close words that have enough."""
        for first in range(0, len(self._open), TOP_BLOCK):  # few enough for the processor's cache
            some = slice(first, first + TOP_BLOCK)
            own, mine = self._own[some], self._targets[some] - start
            logits = self._written[some] @ columns
            here = ((mine >= 0) & (mine < logits.shape[1])).nonzero()[:, 0]
            logits[here, mine[here]] = own[here]  # a word never outranks itself by its own rounding
            self._before[self._open[some]] += _count(logits > own[:, None])
        still = self._before[self._open] < self.top
        if not still.all():
            self._open, self._own = self._open[still], self._own[still]
            self._targets, self._written = self._targets[still], self._written[still]
        self.passed = start + columns.shape[1]

    def found(self) -> list[Float[Tensor, "head word"]]:
        """Return, for each sign, 1 for a word in the top among the tokens passed and 0 for others.

        A head that writes on none of the words has 0 throughout.
        """
        return list((self._before < self.top).view(self.shape) * self._alive)

    @classmethod
    def joined(cls, searches: Sequence["TopSearch"]) -> "TopSearch":
        """Join several searches of one top into one for all their open words; `give_back` hands them its result."""
        one = cls.__new__(cls)
        one.passed, one.top = searches[0].passed, searches[0].top
        one._own = torch.cat([search._own for search in searches])
        one._targets = torch.cat([search._targets for search in searches])
        one._written = torch.cat([search._written for search in searches])
        one._open = torch.arange(len(one._own), device=one._own.device)
        one._before = torch.cat([search._before[search._open] for search in searches])
        return one

    def give_back(self, searches: Sequence["TopSearch"]) -> None:
        """Write a joined search's result into the searches that it was joined from, and close all their words."""
        for search, before in zip(searches, self._before.split([len(s._open) for s in searches]), strict=True):
            search._before[search._open], search.passed = before, self.passed
            search._open, search._own = search._open[:0], search._own[:0]
            search._targets, search._written = search._targets[:0], search._written[:0]


def settle(searches: Sequence[TopSearch], W_U_rows: Rows) -> None:
    """End searches that have passed the same tokens, in one pass over the rest of the vocabulary.

    Raises:
        ValueError: the searches have passed different numbers of tokens, or have tops of different sizes.
    """
    waiting = [search for search in searches if not search.done]
    if not waiting:
        return
    if len({(search.passed, search.top) for search in waiting}) > 1:
        raise ValueError("searches can be settled together only if they have passed the same tokens, for one top")
    one = waiting[0] if len(waiting) == 1 else TopSearch.joined(waiting)
    for tokens in widening(one.passed, W_U_rows.shape[0]):
        if one.done:
            break
        one.compare(tokens.start, W_U_rows[tokens].T)
    if one is not waiting[0]:
        one.give_back(waiting)


def widening(start: int, n: int) -> Iterator[slice]:
    """Yield slices that cover range(start, n), the first ones short because few words are open after them."""
    size = min(TOP_BLOCK, max(1, TOP_BLOCK // 32, start))
    while start < n:
        yield slice(start, min(start + size, n))
        start, size = start + size, min(2 * size, TOP_BLOCK)


def _count(true: Bool[Tensor, "*word token"]) -> Int[Tensor, "*word"]:
    """Count the true entries in each row, as bytes: torch sums bytes faster than booleans."""
    return true.view(torch.uint8).sum(-1, dtype=torch.int32)


def subspace(
    rows: Float[Tensor, "*draw word d_model"], origin: Float[Tensor, "*or_one d_model"], rank: int | None = None
) -> Float[Tensor, "*draw r d_model"]:
    """Return an orthonormal basis for a word set's rows about an origin, [draw, r, d_model], float64.

    It keeps 90 % of their energy, or has the given rank (docs/definitions.md, section 5). If there are several draws,
    each has its own rank, and rows of zeros fill it up to the largest.

    Args:
        rows: the words' embeddings.
        origin: the mean over the set's matched band: the set's own mean would take out the direction that its words
            share.
        rank: the rank; None for 90 % of the energy.
    """
    x = (rows - origin[..., None, :]).double()
    energy, U = (part.flip(-1) for part in decomposed(torch.linalg.eigh, x @ x.mT))  # of the Gram: words are few
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    ranks = (share < ENERGY_KEPT).sum(-1) + 1
    ranks = ranks if rank is None else torch.full_like(ranks, rank)
    most = int(ranks.max())
    if (
        energy.gather(-1, ranks[..., None] - 1) <= ENERGY_ROUNDING * energy[..., :1]
    ).any():  # fewer dimensions than asked for
        basis = torch.linalg.svd(x, full_matrices=False).Vh[..., :most, :]  # any others beside
    else:
        basis = U[..., :most].mT @ x / energy[..., :most, None].sqrt()
    return basis.masked_fill((torch.arange(most).to(ranks) >= ranks[..., None])[..., None], 0.0)


def unit_contrast(
    minus: Float[Tensor, "*draw word d_model"], plus: Float[Tensor, "*draw word d_model"]
) -> Float[Tensor, "*draw 1 d_model"]:
    """Return mean(plus) - mean(minus) with length 1, as a basis with one row; nan if the means are equal."""
    direction = (plus.double() - minus.double()).mean(-2, keepdim=True)
    return direction / direction.norm(dim=-1, keepdim=True)


def same_mean(minus: Float[Tensor, "*draw word d_model"], plus: Float[Tensor, "*draw word d_model"]) -> bool:
    """Say whether in any draw both sides have the same mean, up to float32 rounding."""
    gap = (plus.double() - minus.double()).mean(-2).norm(dim=-1)
    size = minus.norm(dim=(-2, -1)) + plus.norm(dim=(-2, -1))
    return bool((gap <= torch.finfo(torch.float32).eps * size).any())


@dataclass(frozen=True)
class SideAlignment:
    """How one side of a map aligns with a subspace of rank r. Both numbers are >= 0, and 1 by chance."""

    whole: Float[Tensor, "*draw head"]
    """|M P|_F^2 / |M|_F^2 / (r/d): the map's energy in the subspace."""
    top: Float[Tensor, "*draw head"]
    """|P x_1|^2 / (r/d): the same for its top singular direction alone."""


def side_alignment(
    directions: Float[Tensor, "head d_model k"],
    sigma: Float[Tensor, "head k"],
    basis: Float[Tensor, "*draw r d_model"],
) -> SideAlignment:
    """Measure how much of each head's energy on one side lies in a subspace (docs/definitions.md, section 5).

    Args:
        directions: the head's singular directions on that side.
        sigma: its singular values.
        basis: orthonormal rows; rows of zeros do not count.
    """
    chance = basis.square().sum((-2, -1))[..., None] / basis.shape[-1]  # r is the trace of the projector
    inside = _along(basis, directions).square().sum(-2)  # [*draw, head, k]
    energy = sigma.square()
    whole = guarded((inside * energy).sum(-1), energy.sum(-1), energy.sum(-1))
    return SideAlignment(whole / chance, inside[..., 0] / chance)


def transfer(
    decomposition: Decomposition, read: Float[Tensor, "*draw 1 d_model"], write: Float[Tensor, "*draw 1 d_model"]
) -> Float[Tensor, "*draw head"]:
    """Return a W_OV b^T / sigma_1, in [-1, 1]: how much of read direction a arrives on write direction b.

    It is negative if it arrives with the opposite sign, and 0 for zero weights.
    """
    a, b = _along(read, decomposition.read)[..., 0, :], _along(write, decomposition.write)[..., 0, :]
    return guarded((a * decomposition.sigma * b).sum(-1), decomposition.sigma[:, 0], decomposition.sigma[:, 0])


def _along(
    basis: Float[Tensor, "*draw r d_model"], directions: Float[Tensor, "head d_model k"]
) -> Float[Tensor, "*draw head r k"]:
    return torch.einsum("...rd,hdk->...hrk", basis.to(directions), directions).double()
