"""Tokens as the text that they stand for."""

import re

from tokenizers import Tokenizer


def _byte_letters() -> dict[str, int]:
    """Return letter -> the byte that it stands for in a byte-level vocabulary (Radford et al. 2019)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


class Spelling:
    """The text that each token stands for, spelled once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Take the vocabulary; without one every token is its `#id`."""
        self.tokenizer, self.known, self.byte_level = tokenizer, dict[int, str](), False
        if tokenizer is not None:
            self.known = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
            self.byte_level = "ByteLevel(" in f"{tokenizer.decoder} {tokenizer.pre_tokenizer}"

    def __call__(self, token: int) -> str:
        """Spell a token: leading spaces and control characters kept, special tokens by name, other bytes as `\\xNN`.

        A token that the tokenizer lacks is `#id`. Never raises; escape the text before a terminal shows it.
        """
        if token not in self.known:
            self.known[token] = self._spelled(token)
        return self.known[token]

    def _spelled(self, token: int) -> str:
        piece = self.tokenizer.id_to_token(token) if self.tokenizer is not None and 0 <= token < 2**32 else None
        if piece is None:
            return f"#{token}"
        if self.byte_level:
            if not all(letter in BYTE_LETTERS for letter in piece):
                return piece  # a token that was put in as text
            return bytes(BYTE_LETTERS[letter] for letter in piece).decode(errors="backslashreplace")
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):  # sentencepiece's bytes
            return bytes([int(piece[3:5], 16)]).decode(errors="backslashreplace")
        return re.sub("^Ġ", " ", piece.replace("▁", " "))
