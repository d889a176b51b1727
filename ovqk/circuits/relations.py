"""Pairs of words, a source and a target, among the words of their kind (definitions: section 5).

A head has the relation if attending to the source raises the target: Elhelo & Geva 2024 (arXiv:2412.11965) rank the
target among all tokens (`alignment.TopSearch`), and Gould et al. 2023 (arXiv:2312.09230) among the words of its kind.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

COPYING_PLACES, RELATION_PLACES = 1, 10
"""How many places count as the top: for a relation of words with themselves, and for any other."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of words as places among all of a relation's words.

    Attributes:
        words: the tokens of all sources and targets, none twice, rising.
        own: the place of each pair's target.
        kind: the kind of each pair, from 0.
        of_kind: the sources and targets of the pair's kind.
        targets: the targets of the pair's kind.
        places: how many places count as the top of the vocabulary.
    """

    words: Int[Tensor, " word"]
    own: Int[Tensor, " pair"]
    kind: Int[Tensor, " pair"]
    of_kind: Bool[Tensor, "pair word"]
    targets: Bool[Tensor, "pair word"]
    places: int

    @classmethod
    def of(cls, sources: Int[Tensor, " pair"], targets: Int[Tensor, " pair"], kind: Int[Tensor, " pair"]) -> "Pairs":
        """Take the tokens of each pair, and its kind."""
        words = torch.cat([sources, targets]).unique()
        same, every = kind[:, None] == kind, torch.arange(len(words))

        def seen(tokens: Tensor) -> Tensor:
            places = torch.searchsorted(words, tokens)
            return same.double() @ (places[:, None] == every).double() > 0

        written = seen(targets)
        copies = torch.equal(sources, targets)
        own = torch.searchsorted(words, targets)
        return cls(words, own, kind, seen(sources) | written, written, COPYING_PLACES if copies else RELATION_PLACES)


def first_by_pair(logits: Float[Tensor, "*batch pair word"], pairs: Pairs) -> Float[Tensor, "*batch pair"]:
    """Return 1 for each pair whose target has the largest logit of all words of its kind, and 0 for others.

    A tie is no first place. The mean over pairs is `ov_relation_first` (docs/definitions.md, section 5), the succession
    score of Gould et al. 2023 if the pairs are neighbours in an order.
    """
    own = _own(logits, pairs)
    others = pairs.of_kind.to(logits.device) & ~_is_own(logits, pairs)
    return (others.logical_not() | (logits < own)).all(-1).double()


def auc_by_pair(logits: Float[Tensor, "*batch pair word"], pairs: Pairs) -> Float[Tensor, "*batch pair"]:
    """Return, for each pair, the share of other targets of its kind with a smaller logit, in [0, 1]; 0.5 by chance.

    A tie counts half. Each target's logits are first taken less their mean over the sources of the kind: a target that
    every source raises is a bias. The mean over pairs is `ov_relation_auc` (docs/definitions.md, section 5). A kind
    with one target has 0.5.
    """
    kinds = (pairs.kind[:, None] == pairs.kind).to(logits)
    centred = logits - kinds / kinds.sum(-1, keepdim=True) @ logits
    own = _own(centred, pairs)
    others = pairs.targets.to(logits.device) & ~_is_own(logits, pairs)
    below = ((centred < own) & others).sum(-1) + 0.5 * ((centred == own) & others).sum(-1)
    count = others.sum(-1)
    return torch.where(count > 0, below.double() / count.clamp_min(1), 0.5)


def _own(logits: Tensor, pairs: Pairs) -> Float[Tensor, "*batch pair 1"]:
    index = pairs.own.to(logits.device)[:, None].expand(*logits.shape[:-1], 1)
    return logits.gather(-1, index)


def _is_own(logits: Tensor, pairs: Pairs) -> Bool[Tensor, "pair word"]:
    return (pairs.own[:, None] == torch.arange(len(pairs.words))).to(logits.device)
