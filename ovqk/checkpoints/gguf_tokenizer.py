"""The tokenizer that a GGUF file carries in its metadata: byte-level BPE, or SentencePiece's pieces with scores."""

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ovqk.errors import UserError


class TokenKind(IntEnum):
    """The kinds of tokens in llama.cpp."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
CASED += r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
CASED_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{PUNCTUATION}"
QWEN2 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{PUNCTUATION}"
TEKKEN = rf"{CASED % ('', '')}|\p{{N}}|{CASED_PUNCTUATION}"
GPT4O = rf"{CASED % (f'{CONTRACTIONS}?', f'{CONTRACTIONS}?')}|\p{{N}}{{1,3}}|{CASED_PUNCTUATION}"
GPT2, DIGITS = "gpt2", "digits"
"""GPT-2's own splitting, which the library has built in; the same with every digit apart."""

SPLITS = (
    dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "roberta-bpe", "gigachat"), GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS)
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), LLAMA3)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), QWEN2)
    | {"tekken": TEKKEN, "gpt-4o": GPT4O, "llama4": GPT4O}
)
"""`tokenizer.ggml.pre` -> how a text is split before BPE (llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of
the models that it names)."""
UNNAMED = {"gpt2": "gpt-2", "gptneox": "olmo"}
"""Architecture -> the splitting of files written before it was named in them."""
WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken")
"""Splittings whose models take a word that is a token as it is, whatever the merges say, and begin with a start token
unless the file says otherwise."""
COMPOSED = ("qwen2", "deepseek-r1-qwen", "olmo")
"""Splittings whose models compose characters with their marks first (NFC)."""


def tokenizer_of(metadata: Mapping[str, Any], label: str) -> Tokenizer | None:
    """Build the tokenizer; None if the file carries none.

    Args:
        metadata: the file's.
        label: how messages name the file.

    Raises:
        UserError: it is of a kind that cannot be built, or its lists do not fit one another.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None or kind == "no_vocab" or tokens is None:
        return None
    try:
        return _built(metadata, kind, tokens, label)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and panics of Rust, which are none
        raise UserError(f"{label}: the file's tokenizer cannot be built ({error}).") from error


def _built(metadata: Mapping[str, Any], kind: str, tokens: list[str], label: str) -> Tokenizer:
    kinds = metadata.get("tokenizer.ggml.token_type", [TokenKind.NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise UserError(f"{label}: the file has {len(tokens)} tokens but gives the kinds for {len(kinds)}.")
    n_tokens = len(tokens)
    while n_tokens and kinds[n_tokens - 1] == TokenKind.UNUSED and re.fullmatch(r"\[PAD\d+\]", tokens[n_tokens - 1]):
        n_tokens -= 1  # rows that only make the embedding larger
    vocabulary = {token: index for index, token in enumerate(tokens[:n_tokens])}
    if len(vocabulary) < n_tokens:
        raise UserError(f"{label}: {n_tokens - len(vocabulary)} tokens occur twice in the file's vocabulary.")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocabulary, label)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, vocabulary, kinds, label)
    else:
        raise UserError(
            f"{label}: tokenizer.ggml.model is {kind!r}, which ovqk does not build; allowed: gpt2 (byte-level BPE) and "
            "llama (SentencePiece). Give the Hugging Face directory instead."
        )
    tokenizer.add_special_tokens(_added(tokens[:n_tokens], kinds, TokenKind.CONTROL))
    tokenizer.add_tokens(_added(tokens[:n_tokens], kinds, TokenKind.USER_DEFINED))
    start = metadata.get("tokenizer.ggml.bos_token_id")
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS_FIRST
    if metadata.get("tokenizer.ggml.add_bos_token", begins) and start is not None and 0 <= start < n_tokens:
        piece = tokens[start]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{piece}:0 $A:0", pair=f"{piece}:0 $A:0 {piece}:1 $B:1", special_tokens=[(piece, start)]
        )
    return tokenizer


def _added(tokens: list[str], kinds: list[int], kind: TokenKind) -> list[AddedToken]:
    special = kind is TokenKind.CONTROL
    return [
        AddedToken(token, special=special, normalized=False)
        for token, own in zip(tokens, kinds, strict=False)
        if own == kind and token
    ]


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int], label: str) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", UNNAMED.get(metadata.get("general.architecture", ""), "default"))
    split = SPLITS.get(name)
    if split is None:
        raise UserError(
            f"{label}: tokenizer.ggml.pre is {name!r}, a way to split texts that ovqk does not know; allowed: "
            f"{', '.join(sorted(SPLITS))}. Give the Hugging Face directory instead."
        )
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS_FIRST))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (GPT2, DIGITS))
    if split == GPT2:
        tokenizer.pre_tokenizer = by_bytes
    else:
        first = pre_tokenizers.Digits(individual_digits=True) if split == DIGITS else _isolated(split)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, by_bytes])
    if name in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: dict[str, int], kinds: list[int], label: str) -> Tokenizer:
    """Build SentencePiece's BPE, which first joins the two neighbours that make the piece with the highest score."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(vocabulary):
        raise UserError(f"{label}: the file's SentencePiece tokenizer has no score for each token.")
    merges = [
        (-scores[index], index, vocabulary[piece[:cut]], piece[:cut], piece[cut:])
        for piece, index in vocabulary.items()
        if kinds[index] == TokenKind.NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort()
    unknown = next((token for token, index in vocabulary.items() if kinds[index] == TokenKind.UNKNOWN), None)
    falls_back = any(kind == TokenKind.BYTE for kind in kinds)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [merge[3:] for merge in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=falls_back,
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefixed else spaces)
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
