"""Tokens like a task's words, in spelling and in frequency (definitions: section 5)."""

import math
import re
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.errors import UserError

MIN_WORDS = 8
"""With fewer words than this, or fewer tokens matched to them, nothing is read."""
WORD_STARTS = ("Ġ", "▁")  # how byte-level BPE and sentencepiece mark a leading space
RANK_WINDOW = 0.25  # the largest distance in log id rank between a word and a matched token


def surface_form(token: str) -> tuple[bool, str, bool, int]:
    """Return a token's surface form: leading space, capitalisation, whether it is all letters, and length class."""
    text = token.lstrip("".join(WORD_STARTS))
    letters = text if text.isascii() and text.isalpha() else re.sub(r"[^a-zA-Z]", "", text)
    if letters.isupper():
        case = "upper"
    elif letters.istitle():
        case = "title"
    else:
        case = "lower" if letters.islower() or not letters else "mixed"
    return token.startswith(WORD_STARTS), case, text.isalpha(), min(len(text) // 3, 3)


@lru_cache(maxsize=1)
def _forms(
    tokenizer: Tokenizer, n_tokens: int
) -> tuple[dict[tuple[object, ...], NDArray[np.int64]], NDArray[np.float64]]:
    """Return surface form -> its tokens' ids, rising, and every token's log id rank; kept for the next task."""
    forms: dict[tuple[object, ...], list[int]] = {}
    for token in range(n_tokens):
        forms.setdefault(surface_form(tokenizer.id_to_token(token) or ""), []).append(token)
    ranks = np.array([math.log(token + 1) for token in range(n_tokens)])
    return {form: np.array(tokens, dtype=np.int64) for form, tokens in forms.items()}, ranks


def matched_tokens(
    ids: Int[Tensor, " word"],
    excluded: Int[Tensor, " task_token"],
    tokenizer: Tokenizer,
    n_tokens: int,
    own: Int[Tensor, " own"] | None = None,
) -> tuple[dict[int, list[int]], str]:
    """Find tokens like these words: the same surface form, and a log id rank within 0.25.

    If there are fewer than 8 matches in all, the rank window is dropped, then the length class, then the form. If a
    word has fewer than 2 matches, it takes the matches for all words.

    Args:
        ids: the words' token ids.
        excluded: all task words' ids, which match nothing.
        tokenizer: the model's tokenizer.
        n_tokens: how many real tokens there are.
        own: ids in `excluded` that may still match.

    Returns:
        Word id -> its matched tokens' ids (at least one), and a note that is empty if no rule had to be dropped.

    Raises:
        UserError: the vocabulary has fewer than 8 other tokens.
    """
    forms, ranks = _forms(tokenizer, n_tokens)
    outside = set(excluded.tolist())
    barred = outside - set(() if own is None else own.tolist())
    free = np.ones(n_tokens, dtype=bool)
    free[list(barred)] = False

    def matches(window: float, parts: int) -> dict[int, list[int]]:
        alike: dict[tuple[object, ...], list[NDArray[np.int64]]] = {}
        for form, tokens in forms.items():
            alike.setdefault(form[:parts], []).append(tokens)
        found = {}
        for word in ids.tolist():
            form = surface_form(tokenizer.id_to_token(word) or "")[:parts]
            near = np.concatenate([of[free[of] & (np.abs(ranks[of] - ranks[word]) <= window)] for of in alike[form]])
            found[word] = np.sort(near).tolist()
        return found

    relaxations = (
        (RANK_WINDOW, 4, ""),
        (math.inf, 4, "matched tokens drawn without regard to id rank"),
        (math.inf, 3, "matched tokens drawn without regard to id rank and length"),
        (math.inf, 0, "matched tokens drawn from all other tokens"),
    )
    for window, parts, note in relaxations:
        found = matches(window, parts)
        band = sorted({token for tokens in found.values() for token in tokens} - outside)
        if len(band) >= MIN_WORDS:
            return {word: tokens if len(tokens) >= 2 else band for word, tokens in found.items()}, note
    raise UserError(f"the vocabulary has fewer than {MIN_WORDS} tokens besides the task's words.")
