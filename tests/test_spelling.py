"""Tokens as the text that they stand for, hostile ones among them."""

import pytest
from support.models import BUNDLED, shared_model
from support.token_tables import BYTE_LEVEL, word_level
from tokenizers import AddedToken, Tokenizer

from ovqk.structure.spelling import Spelling


def test_gpt2_tokens_are_spelled_as_the_text_they_stand_for() -> None:
    from ovqk.tasks.tokenizer import byte_level_bpe

    tokenizer = byte_level_bpe(shared_model("gpt2-tokenizer"))
    spelling = Spelling(tokenizer)
    assert [spelling(i) for i in (0, 262, 1757, 198, 188, 50256)] == [
        "!", " the", " John", "\n", "\0", "<|endoftext|>",
    ]  # fmt: skip
    assert spelling(tokenizer.token_to_id("Ã©")) == "é" and spelling(tokenizer.token_to_id("âĢĶ")) == "—"
    assert spelling(447) == "\\xe2\\x80"  # part of a character
    assert (spelling(50257), spelling(-1), spelling(2**40)) == ("#50257", "#-1", "#1099511627776")
    for token in range(tokenizer.get_vocab_size()):  # where its bytes are text, the tokenizer's own decoder agrees
        text = tokenizer.decode([token], skip_special_tokens=False)
        assert "�" in text or spelling(token) == text


def test_sentencepiece_tokens_keep_their_space_and_show_special_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(shared_model("stories260k") / "tokenizer.json"))
    spelling = Spelling(tokenizer)
    assert [spelling(i) for i in (0, 1, 2, 13, 259, 260)] == ["<unk>", "<s>", "</s>", "\n", " t", "he"]
    assert spelling(3 + 0x41) == "A" and spelling(3 + 0xE2) == "\\xe2"
    assert spelling(512) == "#512"


def test_the_bundled_tokenizer_s_words_are_spelled_with_their_space() -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    spelling = Spelling(tokenizer)
    spelled = [spelling(token) for token in range(tokenizer.get_vocab_size())]
    assert not any("Ġ" in text or "▁" in text for text in spelled)
    assert len(set(spelled)) == len(spelled)


@pytest.mark.parametrize("parts", [["pre_tokenizer"], ["decoder"], ["pre_tokenizer", "decoder"]], ids=" ".join)
def test_hostile_byte_level_tokens_are_spelled_and_never_raise(parts) -> None:
    pieces = ["<unk>", "", "Ġ", "Ċ", "ł", "ð", "ðŁĺĢ", "日本", "a b", "\u202eabc", "é", "Ã©"]
    tokenizer = word_level(pieces, **{part: BYTE_LEVEL[part] for part in parts})
    tokenizer.add_special_tokens([AddedToken("Ã©Ġ<special>", special=True)])
    spelled = [Spelling(tokenizer)(token) for token in range(len(pieces) + 2)]
    assert spelled == [
        "<unk>", "", " ", "\n", "\\xa0", "\\xf0", "😀", "日本", "a b", "\u202eabc", "\\xe9", "é", "Ã©Ġ<special>", "#13",
    ]  # fmt: skip
    for text in spelled:
        text.encode()  # no lone surrogate, so that every file format takes it


def test_other_tokens_are_spelled_and_never_raise() -> None:
    spelling = Spelling(word_level(["é", "Ã©", "Ġfoo", "▁▁bar▁", "<0x0A>", "<0xFF>", "<0xZZ>", "##ing"]))
    assert [spelling(i) for i in range(9)] == ["é", "Ã©", " foo", "  bar ", "\n", "\\xff", "<0xZZ>", "##ing", "#8"]
    assert Spelling(None)(17) == "#17"
