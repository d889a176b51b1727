"""A bound on how much longer a tokenizer's normalizers may make a text.

A normalizer that writes `ww` for `w` doubles a text, and a list of forty of them turns one letter into 10^12. The
tokenizers library has no bound, and ends the process when memory runs out, so ovqk counts before it hands a file over.
"""

import base64
from collections.abc import Mapping
from typing import Any

MOST = 10_000  # times the length; real models stay below 1,000
DECOMPOSED, LOWER, BYTES, SPACED = 18, 2, 4, 3
"""How many characters one may become: in a Unicode normal form (U+FDFA), in lower case (U+0130), as letters for its
bytes, and with a space on each side."""
EMPTY = set("*?|^$") | {"{0", "{,", "(?", r"\b", r"\B", r"\A", r"\Z", r"\z", r"\G", r"\K"}
"""A regular expression that can match an empty text has one of these parts; not every one with such a part can."""


def longest(normalizer: Any, length: float) -> float:
    """Return an upper bound on a text's length after a normalizer, if it has `length` characters before."""
    if not isinstance(normalizer, Mapping):
        return length
    match normalizer.get("type"):
        case "Sequence":
            for each in normalizer.get("normalizers") or ():
                length = longest(each, length)
                if length > 1e300:
                    break
            return length
        case "Replace":
            return _replaced(normalizer["pattern"], len(normalizer["content"]), length)
        case "Prepend":
            return length + len(normalizer["prepend"])
        case "Precompiled":
            return length * _longest_entry(normalizer["precompiled_charsmap"])
        case "BertNormalizer":
            return length * SPACED * DECOMPOSED * LOWER
        case "NFC" | "NFD" | "NFKC" | "NFKD":
            return length * DECOMPOSED
        case "Lowercase":
            return length * LOWER
        case "ByteLevel":
            return length * BYTES
    return length


def check_growth(normalizer: Any) -> None:
    """Check that a tokenizer.json's `normalizer` makes no text more than MOST times as long.

    Raises:
        ValueError: it may make a text longer than that.
    """
    length = 100.0  # of a text; what a normalizer puts before it counts less the longer it is
    try:
        growth = longest(normalizer, length) / length
    except (AttributeError, KeyError, TypeError, ValueError):
        return  # it is no normalizer, which the library says in better words
    if growth > MOST:
        raise ValueError(f"its normalizers may make a text {growth:.3g} times as long; allowed: up to {MOST:,} times")


def _replaced(pattern: Mapping[str, str], content: int, length: float) -> float:
    """Return the bound if each match is replaced by `content` characters."""
    if text := pattern.get("String"):
        return length * max(1.0, content / len(text))
    regex = pattern.get("Regex", "")
    if not regex or any(part in regex for part in EMPTY):
        return length + (length + 1) * content
    return length * max(1, content)


def _longest_entry(charsmap: str) -> int:
    """Return the longest text's length in a sentencepiece character map (a trie's size, the trie, the texts)."""
    content = base64.b64decode(charsmap)
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")))
