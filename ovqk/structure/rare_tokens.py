"""Tokens that lists leave out because a model was hardly trained on them (docs/method.md has the rule).

The rows of such tokens lie apart from all others, and would fill every list with extreme projections. They are
recognised as in Land & Bartolo 2024 (arXiv 2405.05417): by the token's kind, and by a row near the mean or like those
of unused tokens.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.circuits.grams import blocks, mean_row
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.structure.spelling import BYTE_LETTERS, Spelling

NEAR_MEAN = 0.01  # quantile over all distances from the mean row
LIKE_UNTRAINED = 0.9  # least cosine with the mean over untrained rows, both less the mean row
KNOWN_UNTRAINED = 3  # the least number of rows known to be untrained
LARGE_VOCABULARY = 10_000  # the least size for judging rows; in smaller vocabularies every token is frequent
IMPOSSIBLE = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text has
WHITESPACE = {0x09, 0x0A, 0x0D}
UNUSED = re.compile(r"[\[<]\|?(unused|reserved|extra|pad)[\w-]*\|?[\]>]|madeupword\d+", re.IGNORECASE)
RAW_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # sentencepiece's bytes stand for characters without a token
REASONS = {
    "special": "special",
    "unused": "unused or reserved",
    "byte": "bytes that are no text",
    "near_mean": "of rows nearest to the mean",
    "like_untrained": "of rows like untrained ones",
}


@dataclass(frozen=True)
class RareTokens:
    """The tokens that lists leave out, and their number by reason; a token counts for the first of REASONS that holds.

    Attributes:
        listed: True for the tokens that stay.
    """

    listed: Bool[Tensor, " token"]
    counts: dict[str, int]

    @property
    def note(self) -> str | None:
        """A sentence for the record; None if nothing is left out."""
        left_out, n = sum(self.counts.values()), len(self.listed)
        if not left_out:
            return None
        parts = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in self.counts.items() if count)
        return (
            f"directions: {left_out:,} of {n:,} tokens are left out of lists, being special or hardly trained "
            f"({parts}); analysis.rare_tokens=true lists them too"
        )


def rare_tokens(vocabulary: Vocabulary, tokenizer: Tokenizer | None, tied: bool = False) -> RareTokens:
    """Apply the rule to a model's vocabulary: by the tokenizer, and by rows of W_E if the vocabulary is large.

    A short row is a sign only if the embedding is not tied. If it is tied, rows of frequent words are short too.
    """
    n, device = vocabulary.size, vocabulary.W_E.device
    found = {reason: torch.zeros(n, dtype=torch.bool) for reason in REASONS}
    untrained = torch.zeros(n, dtype=torch.bool)
    for token, reason, known in _by_tokenizer(tokenizer, n):
        found[reason][token] = True
        untrained[token] = known
    if n >= LARGE_VOCABULARY:
        distance, cosine = _by_row(vocabulary, untrained.to(device))
        if not tied:
            found["near_mean"] = (distance < distance.quantile(NEAR_MEAN)).cpu()
        if cosine is not None:
            found["like_untrained"] = (cosine > LIKE_UNTRAINED).cpu()
    listed, counts = torch.ones(n, dtype=torch.bool), dict.fromkeys(REASONS, 0)
    for reason, some in found.items():
        counts[reason] = int((some & listed).sum())
        listed &= ~some
    if not listed.any():  # a tokenizer of nothing else
        return RareTokens(torch.ones_like(listed).to(device), dict.fromkeys(REASONS, 0))
    return RareTokens(listed.to(device), counts)


def _by_tokenizer(tokenizer: Tokenizer | None, n: int) -> list[tuple[int, str, bool]]:
    """Return (token, reason, known to be untrained) for the tokens that the tokenizer tells."""
    if tokenizer is None:
        return []
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    byte_level, pieces = Spelling(tokenizer).byte_level, tokenizer.get_vocab()
    found = [(token, "unused", True) for token in set(range(n)) - set(pieces.values())]
    for piece, token in pieces.items():
        if token >= n:
            continue
        if UNUSED.fullmatch(piece):
            found.append((token, "unused", True))
        elif token in special:
            found.append((token, "special", False))
        elif RAW_BYTE.fullmatch(piece):
            found.append((token, "byte", int(piece[3:5], 16) in IMPOSSIBLE))
        elif byte_level and len(piece) == 1 and piece in BYTE_LETTERS:
            byte = BYTE_LETTERS[piece]
            if byte >= 0x7F or (byte < 0x20 and byte not in WHITESPACE):
                found.append((token, "byte", byte in IMPOSSIBLE))
    return found


def _by_row(
    vocabulary: Vocabulary, untrained: Bool[Tensor, " token"]
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"] | None]:
    """Return each row's distance from the mean row, and its cosine with the untrained mean (None if few are known)."""
    W_E, mean = vocabulary.W_E, mean_row(vocabulary.W_E)
    aim = None
    if int(untrained.sum()) >= KNOWN_UNTRAINED:
        aim = W_E[untrained.nonzero()[:, 0]].double().mean(0) - mean
        aim = (aim / aim.norm().clamp_min(torch.finfo(torch.float64).tiny)).to(W_E[:1])
    distances, along = [], []
    for part in blocks(vocabulary.size):
        rows = W_E[part] - mean.to(W_E[:1])
        distances.append(torch.linalg.vector_norm(rows, dim=1))
        if aim is not None:
            along.append(rows @ aim)
    distance = torch.cat(distances)
    return distance, None if aim is None else torch.cat(along) / distance.clamp_min(torch.finfo(distance.dtype).tiny)
