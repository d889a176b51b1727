"""Tokens that lists leave out: special, unused, parts of characters, and hardly trained ones."""

import torch
from support.token_tables import (
    BYTE_LEVEL,
    random,
    vocabulary,
    word_level,
)
from tokenizers import AddedToken, Tokenizer

from ovqk.structure.rare_tokens import rare_tokens


def large(rows: torch.Tensor, tokenizer: Tokenizer | None = None):
    return rare_tokens(vocabulary(rows, None), tokenizer)


def test_tokens_are_left_out_for_what_the_tokenizer_says_of_them() -> None:
    pieces = ["<unk>", "the", "[unused7]", "<unused_1>", "<|reserved_special_token_3|>", "Ġa", "A", "!", "Ã", "À", "Ċ",
              "Ā", "<0x41>",
              "<b>", "unused"]  # fmt: skip
    tokenizer = word_level(pieces, **{part: BYTE_LEVEL[part] for part in BYTE_LEVEL})
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.add_tokens([AddedToken("  ")])
    found = large(random(19, 4, seed=0), tokenizer)
    left_out = [token for token, there in enumerate(found.listed.tolist()) if not there]
    assert left_out == [2, 3, 4, 8, 9, 11, 12, 15, 17, 18]  # 17 and 18: ids that no token has
    assert found.counts == {"special": 1, "unused": 5, "byte": 4, "near_mean": 0, "like_untrained": 0}
    assert "10 of 19 tokens are left out of lists" in str(found.note) and large(random(9, 4, seed=0)).note is None


def test_rows_near_the_mean_or_like_untrained_ones_are_left_out_of_large_vocabularies_alone() -> None:
    n = 20_000
    rows = random(n, 32, seed=0).float() + 5
    aim = 3 * random(32, seed=1).float()
    rows[:300] = 5 + 0.01 * rows[:300]  # hardly moved from the start
    rows[300:310] = 5 + aim + 0.1 * random(10, 32, seed=2).float()
    pieces = [f"[unused{i}]" if 300 <= i < 305 else f"w{i}" for i in range(n)]
    found = large(rows, word_level(pieces))
    assert found.counts == {"special": 0, "unused": 5, "byte": 0, "near_mean": 200, "like_untrained": 5}
    assert not found.listed[300:310].any() and int(found.listed[:300].sum()) == 100 and found.listed[310:].all()
    tied = rare_tokens(vocabulary(rows, None), word_level(pieces), tied=True)
    assert tied.counts["near_mean"] == 0 and tied.counts["like_untrained"] == 5
    few = large(rows[:9_000], word_level(pieces[:9_000]))
    assert few.counts == {"special": 0, "unused": 5, "byte": 0, "near_mean": 0, "like_untrained": 0}
    assert large(rows, word_level([f"w{i}" for i in range(n)])).counts["like_untrained"] == 0  # none is known
