"""A checkpoint's tokenizer: what it puts before a text, and that no file of it takes the process away."""

import base64
import json
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.toy import toy_tokenizer
from tokenizers import Tokenizer, models, normalizers, processors

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.gguf_tokenizer import tokenizer_of
from ovqk.checkpoints.tensors import SafetensorsFiles
from ovqk.config.schema import TaskConfig, VariableConfig, VariableKind
from ovqk.errors import UserError
from ovqk.tasks.normalizers import MOST, check_growth, longest
from ovqk.tasks.tokenizer import load_tokenizer, start_tokens
from ovqk.tasks.words import resolve_task


def a_tokenizer(processor: bool = False, after: bool = False):
    """Letters as tokens, and <s> and </s>, which a post-processor may put around a text."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if processor or after:
        template = f"{'<s> ' * processor}$A{' </s>' * after}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    return tokenizer


def a_checkpoint(directory, metadata=None):
    return Checkpoint("x", directory, {}, SafetensorsFiles({}, {}, {}), "", metadata=metadata)


@pytest.mark.parametrize(("tokenizer", "settings", "start"), [
    ({}, None, []),  # GPT-2's vocab.json and merges.txt
    ({}, {"bos_token": "<s>"}, []),
    ({}, {"bos_token": "<s>", "add_bos_token": True}, [2]),
    ({}, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, [2]),
    ({}, {"bos_token": "<s>", "add_bos_token": False}, []),
    ({"processor": True}, None, [2]),
    ({"processor": True, "after": True}, {"bos_token": "<s>", "add_bos_token": None}, [2]),
    ({"processor": True}, {"bos_token": "<s>", "add_bos_token": True}, [2]),
    ({"processor": True}, {"bos_token": "<s>", "add_bos_token": False}, []),
    ({"after": True}, {"bos_token": "<s>"}, []),
])  # fmt: skip
def test_the_start_token_is_the_one_that_the_tokenizer_adds(tokenizer, settings, start, tmp_path):
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert start_tokens(a_tokenizer(**tokenizer), a_checkpoint(tmp_path)) == start


def test_a_start_token_that_is_not_in_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "add_bos_token": true}')
    with pytest.raises(UserError, match="has no bos_token '<bos>'"):
        start_tokens(a_tokenizer(), a_checkpoint(tmp_path))


@pytest.mark.parametrize(("adds", "start"), [(True, [2]), (False, [])])
def test_a_gguf_file_says_itself_what_begins_a_text_whatever_lies_beside_it(adds, start, tmp_path):
    beside = {"bos_token": "a", "add_bos_token": not adds}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    own = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "<s>"], "token_type": [1, 1, 3], "merges": []}
    own |= {"bos_token_id": 2, "add_bos_token": adds}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    assert start_tokens(tokenizer_of(metadata, "file"), a_checkpoint(tmp_path, metadata)) == start


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 10**5, '{"add_bos_token": true, "bos_token": [1]}'])
def test_settings_that_make_no_sense_are_one_message(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(content)
    if content == "[1]":
        assert start_tokens(a_tokenizer(), a_checkpoint(tmp_path)) == []
    else:
        with pytest.raises(UserError, match=r"x: its tokenizer_config\.json (cannot be read|asks for a start token)"):
            start_tokens(a_tokenizer(), a_checkpoint(tmp_path))


# --- normalizers that make a text longer --------------------------------------------------------------------------


def replaced(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def a_charsmap(**texts: str) -> str:
    """A sentencepiece map without a trie, which holds these texts."""
    return base64.b64encode(bytes(4) + b"\0".join(text.encode() for text in texts.values()) + b"\0").decode()


NORMALIZERS = st.recursive(
    st.one_of(
        st.builds(replaced, st.sampled_from(["a", "ab", "é", " "]), st.sampled_from(["", "aa", "\ufdfa", "é" * 9])),
        st.builds(
            replaced,
            st.sampled_from(["a", "[ab]+", "a*", "(?=a)", r"\b", "^", "$", ".", r"\s+", "a|", "a{0,2}"]),
            st.sampled_from(["", "a", "aa", "\ufdfa"]),
            st.just("Regex"),
        ),
        st.builds(lambda text: {"type": "Prepend", "prepend": text}, st.sampled_from(["a", "▁", "abc"])),
        st.sampled_from([{"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "Nmt")]),
        st.just({"type": "StripAccents"}),
        st.just({"type": "Strip", "strip_left": True, "strip_right": False}),
        st.just({"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                 "lowercase": True}),
    ),
    lambda each: st.lists(each, max_size=4).map(lambda several: {"type": "Sequence", "normalizers": several}),
    max_leaves=5,
)  # fmt: skip


@given(normalizer=NORMALIZERS, text=st.text(alphabet="abAé \ufdfaİ字ﬃ\n", min_size=1, max_size=12))
def test_no_text_becomes_longer_than_the_bound(normalizer, text):
    whole = json.loads(toy_tokenizer().to_str()) | {"normalizer": normalizer}
    built = Tokenizer.from_str(json.dumps(whole)).normalizer
    assert built is not None
    try:
        found = built.normalize_str(text)
    except BaseException as error:
        assume(type(error).__name__ != "PanicException")  # of some combinations the library makes nothing at all
        raise
    assert len(found) <= longest(normalizer, float(len(text)))


def test_the_bound_is_met_where_a_text_can_meet_it():
    assert longest(replaced("a", "aa"), 3.0) == 6 == len(normalizers.Replace("a", "aa").normalize_str("aaa"))
    assert longest({"type": "NFKD"}, 2.0) == 36 == len(normalizers.NFKD().normalize_str("\ufdfa\ufdfa"))
    assert longest({"type": "Precompiled", "precompiled_charsmap": a_charsmap(a="b", c="four")}, 2.0) == 8


def test_what_real_tokenizers_do_is_far_below_the_bound():
    llama = [{"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁")]
    albert = [
        replaced("``", '"'), replaced("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
        {"type": "Precompiled", "precompiled_charsmap": a_charsmap(longest="صلى الله عليه وسلم")},
        replaced(" {2,}", " ", "Regex"),
    ]  # fmt: skip
    for several in (llama, albert):
        check_growth({"type": "Sequence", "normalizers": several})
        assert longest({"type": "Sequence", "normalizers": several}, 100.0) < 100 * MOST / 10


@pytest.mark.parametrize("several", [
    [replaced("w", "ww")] * 40,
    [replaced("", "ww", "Regex")] * 40,
    [replaced("w", "w" * 10**6)] * 3,
    [{"type": "ByteLevel"}] * 30,
    [{"type": "Sequence", "normalizers": [replaced("w", "ww")] * 9}] * 9,
    [replaced("w", "ww")] * 5000,
])  # fmt: skip
def test_normalizers_that_multiply_a_text_are_refused_before_they_are_built(several, tmp_path, tiny_gpt2):
    whole = json.loads(toy_tokenizer().to_str()) | {"normalizer": {"type": "Sequence", "normalizers": several}}
    added = {"id": 41, "content": "w" * 30, "single_word": False, "lstrip": False, "rstrip": False}
    whole["added_tokens"] = [added | {"normalized": True, "special": False}]  # the library normalizes it at once
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"tokenizer files cannot be read \(its normalizers may make a text .* times as"
    ):
        load_tokenizer(Checkpoint("x", tmp_path, {"model_type": "gpt2"}, SafetensorsFiles({}, {}, {}), ""))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("content", "said"),
    [("[]", "invalid type|expected"), ('{"normalizer": {"type": "Replace"}}', "missing field|did not match|expected"),
     ('{"normalizer": [1]}', "invalid type|did not match|expected")],
)  # fmt: skip
def test_what_is_no_tokenizer_is_told_in_the_librarys_words(content, said, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"x: its tokenizer files cannot be read .*({said})"):
        load_tokenizer(Checkpoint("x", tmp_path, {"model_type": "gpt2"}, SafetensorsFiles({}, {}, {}), ""))


def test_a_regular_expression_that_gives_up_is_one_message():
    whole = json.loads(toy_tokenizer().to_str())
    whole["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    words = {"a": ["x" * 60, *(f"w{n}" for n in range(9))]}
    task = TaskConfig("x", "x", words=words, variables={"v": VariableConfig(VariableKind.set, words="a")})
    with pytest.raises(UserError, match=r"The model's tokenizer fails on ' xxx.*Regex search error"):
        resolve_task(task, Tokenizer.from_str(json.dumps(whole)), 40, "x")


def test_special_tokens_without_number_are_refused_before_a_text_gets_them(tmp_path):
    ids = {"id": "<s>", "ids": [2] * 20_000, "tokens": ["<s>"] * 20_000}
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    many = {"type": "TemplateProcessing", "pair": text, "special_tokens": {"<s>": ids}}
    many["single"] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 1000 + text
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(a_tokenizer().to_str()) | {"post_processor": many}))
    with pytest.raises(UserError, match=r"x: its tokenizer puts 20000000 special tokens .* allowed: up to 1000"):
        start_tokens(tokenizer, a_checkpoint(tmp_path))


def test_a_word_without_end_is_refused():
    words = {"a": ["x" * 201, *(f"w{n}" for n in range(9))]}
    task = TaskConfig("x", "x", words=words, variables={"v": VariableConfig(VariableKind.set, words="a")})
    with pytest.raises(UserError, match=r"task\.words\.a: holds a word of 201 letters; allowed: up to 200"):
        resolve_task(task, toy_tokenizer(), 40, "x")
