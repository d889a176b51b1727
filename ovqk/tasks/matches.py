"""Tokens like a task's words, in spelling and in frequency (definitions: section 5)."""

import math
import re

import numpy as np
from jaxtyping import Int
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
    forms = [surface_form(tokenizer.id_to_token(i) or "") for i in range(n_tokens)]
    ranks = np.array([math.log(token + 1) for token in range(n_tokens)])
    outside = set(excluded.tolist())
    barred = outside - set(() if own is None else own.tolist())

    def matches(window: float, parts: int) -> dict[int, list[int]]:
        by_form: dict[tuple[object, ...], list[int]] = {}
        for token, form in enumerate(forms):
            if token not in barred:
                by_form.setdefault(form[:parts], []).append(token)
        alike = {form: np.array(tokens) for form, tokens in by_form.items()}
        found = {}
        for word in ids.tolist():
            tokens = alike.get(forms[word][:parts], np.empty(0, dtype=np.int64))
            found[word] = tokens[np.abs(ranks[tokens] - ranks[word]) <= window].tolist()
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
