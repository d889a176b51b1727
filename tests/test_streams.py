"""Words as the running model has them: the `stream` effective embedding, and how near others come to it."""

import json
import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.commands import compose, computed
from support.models import local
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from ovqk.activations.fidelity import centred_cosine, fidelity_note
from ovqk.activations.forward import RunningModel
from ovqk.activations.streams import FREQUENT, PREFIXES, WORDS, draw_prefixes, read_streams
from ovqk.checkpoints.opening import BUNDLED, open_checkpoint
from ovqk.circuits.effective_embeddings import EffectiveRows, StreamBefore, Streams
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.config.schema import Embedding
from ovqk.errors import UserError
from ovqk.tasks.lookup import WordSet
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import Variable, VariableKind
from ovqk.weights.types import Architecture

CPU = torch.device("cpu")
FEW = ("activations.prompts=96", "nulls.draws=99")


def counted(n: int, what: str) -> range:
    return range(n)


@pytest.mark.parametrize("whole", [False, True], ids=["with the prefixes' keys", "whole"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "gpt_neox"])
def test_streams_are_the_plain_models_hidden_states(tiny, kind, whole) -> None:
    directory = tiny(kind)
    running = RunningModel.load(open_checkpoint(local(directory)), local(directory), CPU)
    running.whole = whole
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randint(plain.config.get_text_config().vocab_size, (3, 4), generator=generator)
    ids = torch.tensor([1, 5, 6, 9])
    found = read_streams(running, ids, prefixes, counted)
    for place, word in enumerate(ids.tolist()):
        texts = torch.cat([prefixes, torch.full((3, 1), word)], 1)
        with torch.no_grad():
            states = plain(texts, output_hidden_states=True, use_cache=False).hidden_states
        before = torch.stack(states[: running.n_layers])[:, :, -1].mean(1)
        torch.testing.assert_close(found[:, place], before, atol=1e-4, rtol=1e-4)


def test_without_attention_a_words_stream_is_its_embedding() -> None:
    """Blocks that write nothing leave the embedding and its position: what is known beforehand."""
    checkpoint = open_checkpoint(compose("model=mini-attn").model)
    running = RunningModel.load(checkpoint, compose("model=mini-attn").model, CPU)
    with torch.no_grad():
        for block in running.bridge.blocks:
            for part in (block.attn, block.mlp):
                for parameter in part.parameters():
                    parameter.zero_()
    tokenizer = load_tokenizer(checkpoint)
    ids = torch.tensor([3, 17, 40, 111])
    found = read_streams(running, ids, draw_prefixes(tokenizer, [1], set()), counted)
    first = found[0]
    torch.testing.assert_close(found[-1], first, atol=1e-5, rtol=1e-5)
    embedding = running.model.get_input_embeddings().weight[ids]
    moved = first - embedding  # by the position alone, the same for every word
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), atol=1e-5, rtol=1e-5)


def worded(words: list[str]) -> Tokenizer:
    return Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0]))


def test_prefixes_are_frequent_words_and_none_of_the_tasks() -> None:
    words = ["[UNK]", *(f"{a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "rstvwx")]
    found = draw_prefixes(worded(words), [0], {1, 2, 3})
    assert found.shape == (PREFIXES, 1 + WORDS) and bool((found[:, 0] == 0).all())
    assert set(found[:, 1:].flatten().tolist()) <= set(range(4, 4 + FREQUENT))
    assert all(len(set(row[1:])) == WORDS for row in found.tolist())
    assert torch.equal(found, draw_prefixes(worded(words), [0], {1, 2, 3}))
    with pytest.raises(UserError, match="has 4 words in lower case besides the task's, and prefixes need 6; allowed"):
        draw_prefixes(worded(["[UNK]", "A", "B", "cat", "dog", "fox", "owl", "task"]), [0], {7})


def test_a_stream_is_of_its_layer_and_of_words_that_were_run() -> None:
    streams = Streams(torch.tensor([2, 5, 9]), torch.arange(12.0).view(2, 3, 2))
    assert streams.of(torch.tensor([9, 2]), 1).tolist() == [[10, 11], [6, 7]]
    with pytest.raises(ValueError, match="was not run"):
        streams.of(torch.tensor([2, 4]), 0)
    architecture = Architecture("x", 2, 1, 1, 4, 4, None, "none", 0.0, "none")
    rows = EffectiveRows(Vocabulary(torch.eye(4), None), None, architecture)
    with pytest.raises(ValueError, match="rows before layer 1 need streams"):
        rows(torch.tensor([1]), StreamBefore(1))
    assert [Embedding.stream.kind(layer) for layer in range(3)] == ["token", "stream", "stream"]
    assert [Embedding.block0.kind(layer) for layer in range(2)] == ["block0", "block0"]


@given(st.integers(1, 40), st.integers(0, 30))
def test_a_thinned_variable_keeps_its_words_and_draws_among_its_matches(most, n) -> None:
    matches = {word: list(range(100 * word, 100 * word + n)) for word in (1, 2, 3)}
    band = torch.tensor(sorted(token for found in matches.values() for token in found), dtype=torch.long)
    words = (WordSet(["a", "b", "c"], torch.tensor([1, 2, 3])),)
    variable = Variable("v", VariableKind.set, words, words, band, matches)
    thin = variable.thinned(most)
    assert all(set(thin.matches[word]) <= set(matches[word]) for word in matches)
    assert all(len(thin.matches[word]) == min(most, n) for word in matches)
    assert set(thin.band.tolist()) == {token for found in thin.matches.values() for token in found}
    assert set(thin.tokens.tolist()) == {1, 2, 3, *thin.band.tolist()} and thin.read is variable.read


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-10, 10))
def test_the_centred_cosine_sees_neither_scale_nor_a_common_row(seed, scale, shift) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    value = centred_cosine(a, b)
    assert -1 <= value <= 1 and centred_cosine(b, a) == pytest.approx(value)
    assert centred_cosine(scale * a + shift, b) == pytest.approx(value, abs=1e-9)
    assert centred_cosine(a, a) == pytest.approx(1) and centred_cosine(a, -a) == pytest.approx(-1)
    assert math.isnan(centred_cosine(torch.ones(9, 5), b))


def test_a_cell_reads_words_as_they_run(tmp_path) -> None:
    """The column is that of the words' own streams, by the formula written out; a note says how they were read."""
    _, record, tables = computed(
        tmp_path, "model=mini-attn", "task=ioi", "analysis=ov", "analysis.embedding=stream", *FEW
    )
    assert any("as the running model has them" in note for note in record["notes"])
    config = compose("model=mini-attn", "task=ioi", "analysis=ov", "analysis.embedding=stream")
    checkpoint = open_checkpoint(config.model)
    running, tokenizer = RunningModel.load(checkpoint, config.model, CPU), load_tokenizer(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED / "mini-attn", dtype=torch.float64)
    names = [name for name in config.task.words["names"] if len(tokenizer.encode(name).ids) == 1]
    ids = torch.tensor([tokenizer.token_to_id(name) for name in names if tokenizer.token_to_id(name) is not None])
    rows = read_streams(running, ids, draw_prefixes(tokenizer, [1], set(ids.tolist())), counted)[2].double()
    block = plain.transformer.h[2]
    x = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * block.ln_1.weight + block.ln_1.bias
    d_model, n_heads = rows.shape[1], 8
    W_V = block.attn.c_attn.weight[:, 2 * d_model :].double().view(d_model, n_heads, -1)
    W_O = block.attn.c_proj.weight.double().view(n_heads, -1, d_model)
    W_U = (plain.lm_head.weight * plain.transformer.ln_f.weight)[ids]
    W_U = W_U - W_U.mean(1, keepdim=True)
    heads = tables["heads"].set_index(["layer", "head"])["ov_task_auc"]
    for head in range(n_heads):
        logits = (x @ W_V[:, head]) @ W_O[head] @ W_U.T
        centred = logits - logits.mean(0)
        own = centred.diagonal()[:, None]
        others = ~torch.eye(len(ids), dtype=torch.bool)
        below = ((own > centred).double() + 0.5 * (own == centred))[others]
        assert heads[2, head] == pytest.approx(float(below.mean()), abs=0.02)


@pytest.mark.slow
def test_prompts_tell_how_words_are_read(tmp_path) -> None:
    overrides = ("model=mini-attn", "task=ioi", "analysis=activations", "analysis.embedding=stream", *FEW)
    _, _, tables = computed(tmp_path, *overrides)
    found = tables["fidelity"]
    read = found[found["is_read"]].set_index("layer")["cosine"]
    assert list(read.index) == [0, 1, 2, 3] and read.between(0.5, 1).all()  # block0's are 0.2 behind layer 0
    block0 = found[found["embedding"] == "block0"].set_index("layer")["cosine"]
    assert (block0 < 0.3).all() and set(found["n_words"]) == {32}
    assert fidelity_note(found) is None
    told = fidelity_note(found.assign(is_read=found["embedding"] == "block0"))
    assert told.startswith("task readouts of 3 layers from 1 to 3 read words unlike those of the running model")
    assert fidelity_note(pd.DataFrame()) is None


def test_what_cannot_be_run_has_no_streams(tmp_path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    for file in (BUNDLED / "mini-attn").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"n_positions": 4}))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("wpe.weight"))
    save_file(weights | {name: weights[name][:4].clone()}, folder / "model.safetensors")
    _, record, tables = computed(
        tmp_path, "model=local", f"model.path={folder}", "task=ioi", "analysis=ov", "analysis.embedding=stream", *FEW
    )
    assert tables["heads"].query("layer > 0")["ov_task_auc"].isna().all()
    assert tables["heads"].query("layer == 0")["ov_task_auc"].notna().all()
    assert any(
        "a word behind its prefix has 5 tokens, more than the model's context of 4" in n for n in record["notes"]
    )


def test_lists_are_not_read_through_streams() -> None:
    with pytest.raises(UserError, match=r"analysis\.directions_embedding=stream: .*allowed: token, block0, by_layer"):
        compose("model=mini-attn", "task=ioi", "analysis.directions_embedding=stream")
