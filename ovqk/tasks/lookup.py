"""Words looked up as single tokens in a tokenizer (definitions: section 5)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from ovqk.config.schema import TaskConfig
from ovqk.tasks.matches import WORD_STARTS
from ovqk.tasks.tokenizer import encode


@dataclass(frozen=True)
class WordSet:
    """The words in a set that are one token each.

    Attributes:
        words: the words; empty if the set holds many draws at once (`Variable.stacked`).
        ids: their token ids, in the same order.
    """

    words: list[str]
    ids: Int[Tensor, "*draw word"]


class WordLookup:
    """Looks words up as single tokens: with a leading space if the tokenizer marks spaces, or as a continuation."""

    def __init__(self, tokenizer: Tokenizer, n_tokens: int) -> None:
        self.tokenizer, self.n_tokens = tokenizer, n_tokens
        vocabulary = tokenizer.get_vocab()
        self.marks_spaces = sum(token.startswith(WORD_STARTS) for token in vocabulary) > len(vocabulary) // 20
        self.unknown = getattr(tokenizer.model, "unk_token", None)

    def token(self, word: str, continues: bool = False) -> int | None:
        """Return a word's token id; None if the word is not one token. A continuing word has no space before it."""
        for ids in [self._continuing(word)] if continues else [self._ids(f" {word}"), self._ids(word)]:
            if len(ids) != 1 or ids[0] >= self.n_tokens:
                continue
            token = self.tokenizer.id_to_token(ids[0])
            if token is None or token == self.unknown:
                continue
            if self.marks_spaces and token.startswith(WORD_STARTS) is continues:
                continue
            return ids[0]
        return None

    def encode(self, text: str) -> Encoding:
        """Return a text's tokens and their characters, without special tokens."""
        return encode(self.tokenizer, text, special=False)

    def holds_unknown(self, ids: Iterable[int]) -> bool:
        """Say whether one of the tokens is the tokenizer's token for unknown text."""
        unknown = None if self.unknown is None else self.tokenizer.token_to_id(self.unknown)
        return unknown is not None and unknown in ids

    def next_token(self, text: str, word: str, continues: bool = False) -> int | None:
        """Return the token id that a word adds to a text; None if it adds several tokens or changes earlier ones."""
        before, after = self._ids(text), self._ids(f"{text}{'' if continues else ' '}{word}")
        added = after[len(before) :]
        return added[0] if after[: len(before)] == before and len(added) == 1 else None

    def _ids(self, text: str) -> list[int]:
        return self.encode(text).ids

    def _continuing(self, text: str) -> list[int]:
        """Return a text's ids after a new line, which takes up the space that some tokenizers put before a text."""
        line, ids = self._ids("\n"), self._ids(f"\n{text}")
        return ids[len(line) :] if ids[: len(line)] == line else []

    def aligned(self, task: TaskConfig, sets: list[str]) -> tuple[list[WordSet], list[dict[str, str]]]:
        """Look up index-aligned sets. An index stays only if every set's word is one token and no token comes twice.

        Returns:
            The sets, and for each set the dropped words with reasons.
        """
        rows = [[self.token(word, key in task.continuations) for word in task.words[key]] for key in sets]
        seen: set[int] = set()
        keep = []
        reasons: list[dict[str, str]] = [{} for _ in sets]
        for index, ids in enumerate(zip(*rows, strict=True)):
            found = [token for token in ids if token is not None]
            if len(found) == len(sets) == len(set(found)) and not seen & set(found):
                keep.append(index)
                seen |= set(found)
                continue
            for key, token, lost in zip(sets, ids, reasons, strict=True):
                lost[task.words[key][index]] = _why(token, found, len(sets), seen)
        kept = [
            WordSet([task.words[key][i] for i in keep], torch.tensor([row[i] for i in keep], dtype=torch.long))
            for key, row in zip(sets, rows, strict=True)
        ]
        read = [set(words.words) for words in kept]
        lost_only = [
            {word: why for word, why in lost.items() if word not in words}  # a word may have been given twice
            for words, lost in zip(read, reasons, strict=True)
        ]
        return kept, lost_only

    def pairs(self, task: TaskConfig, sources: str, targets: str) -> tuple[list[WordSet], list[dict[str, str]]]:
        """Look up index-aligned sources and targets. A pair stays if both are one token; targets may come twice.

        Returns:
            The sources and the targets, and for each side the dropped words with reasons.
        """
        words = [task.words[key] for key in (sources, targets)]
        rows = [[self.token(word, key in task.continuations) for word in task.words[key]] for key in (sources, targets)]
        seen: set[int | None] = set()
        keep = []
        reasons: list[dict[str, str]] = [{}, {}]
        for index, ids in enumerate(zip(*rows, strict=True)):
            if None not in ids and ids[0] not in seen:
                keep.append(index)
                seen.add(ids[0])
                continue
            for side in range(2):
                alone = "in a pair with a word that is not one token here"
                why = (
                    "not one token here" if ids[side] is None else alone if None in ids else "a source that comes twice"
                )
                reasons[side][words[side][index]] = why
        kept = [
            WordSet([words[side][i] for i in keep], torch.tensor([rows[side][i] for i in keep], dtype=torch.long))
            for side in range(2)
        ]
        lost = [{word: why for word, why in reasons[side].items() if word not in kept[side].words} for side in range(2)]
        return kept, lost


def some_dropped(dropped: dict[str, str]) -> str:
    """Return a sentence that lists the first six dropped words; empty if there are none."""
    if not dropped:
        return ""
    more = len(dropped) - 6
    return f" Dropped: {', '.join(list(dropped)[:6])}{f' and {more} more' if more > 0 else ''}."


def _why(token: int | None, found: list[int], n_sets: int, seen: set[int]) -> str:
    """Say why a word is dropped: for its own sake, or because its pair is."""
    if token is None:
        return "not one token here"
    if len(found) < n_sets:
        return "in a pair with a word that is not one token here"
    if token in seen or len(set(found)) < n_sets:
        return "the same token as another word"
    return "in a pair with a word that is the same token as another"
