"""The measurement of roles from activations: what it calls a head's direct effect, and what it finds where."""

import json
import shutil

import evidence
import measure_roles
import numpy as np
import pytest
import torch
import yaml
from support import ROOT
from support.models import BUNDLED, make

from ovqk.config.schema import PredictionConfig
from ovqk.tasks.claims import Claims
from ovqk.weights.types import Architecture

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = yaml.safe_load((ROOT / "conf" / "task" / "ioi.yaml").read_text())


def batch_of(path):
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(path), device="cpu")
    known = measure_roles.known_words(
        TASK["words"], TASK["prompts"], lambda word: measure_roles.word_token(model.tokenizer, word) is not None
    )
    prompts = measure_roles.sample_prompts(known, TASK["prompts"], 20, 0)
    return model, measure_roles.encode(model, prompts, measure_roles.own_start(str(path), model.tokenizer))


@pytest.mark.parametrize("name", ["mini-attn", "mini-gpt2", "mini-llama"])
def test_bundled_models_are_measured_after_the_start_of_a_text_of_their_language(name) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED.parent / name)
    start = measure_roles.own_start(str(BUNDLED.parent / name), tokenizer)
    assert start == [tokenizer.bos_token_id] and measure_roles.spelled(start, tokenizer) == "after '<eos>'"


@pytest.mark.parametrize(("adds", "said"), [(None, "without a start token"), (True, "after '<|begin|>'")])
def test_another_model_is_measured_after_what_its_tokenizer_adds(adds, said, tiny_gpt2, tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer

    path = tmp_path / "copy"
    shutil.copytree(tiny_gpt2, path)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|begin|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "add_bos_token": adds}
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    loaded = AutoTokenizer.from_pretrained(path)
    assert measure_roles.spelled(measure_roles.own_start(str(path), loaded), loaded) == said


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mini-attn", "llama"])
def test_direct_effects_and_what_is_no_head_add_up_to_the_logit_difference(kind, tmp_path) -> None:
    path = BUNDLED
    if kind == "llama":
        path = tmp_path / "llama"
        size = len(json.loads((BUNDLED / "token_counts.json").read_text()))
        make("llama", path, vocab_size=size, max_position_embeddings=64)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUNDLED / name, path)
    model, batch = batch_of(path)
    result = measure_roles.run(model, batch)
    _, cache = model.run_with_cache(batch.tokens)
    every, end = torch.arange(len(batch.tokens)), batch.at("END")
    rest = cache["hook_embed"][every, end].clone()
    if "hook_pos_embed" in cache:
        rest += cache["hook_pos_embed"].expand(len(batch.tokens), -1, -1)[every, end]
    heads = torch.zeros(len(batch.tokens))
    for layer in range(model.cfg.n_layers):
        rest += cache[f"blocks.{layer}.hook_mlp_out"][every, end]
        rest += 0 if getattr(model.blocks[layer].attn, "b_O", None) is None else model.blocks[layer].attn.b_O
        for head in range(model.cfg.n_heads):
            heads += measure_roles.direct_effect(model, batch, result, (layer, head))
    is_layernorm = kind == "mini-attn"
    rest = (rest - is_layernorm * rest.mean(-1, keepdim=True)) / result.scale * model.ln_final.weight
    rest = rest + model.ln_final.bias if is_layernorm else rest
    contrast = (model.W_U[:, batch.answers] - model.W_U[:, batch.foils]).T
    total = heads + (rest * contrast).sum(-1)
    assert torch.allclose(total, result.difference, atol=1e-4 * float(result.difference.abs().max()))


def test_a_metric_that_finds_a_role_has_auc_one_and_its_negation_zero() -> None:
    values = np.zeros((2, 4))
    values[1, 2:] = 1
    claims = Claims("", "measured", None, {"mover": [(1, 2), (1, 3)]}, {"mover": [PredictionConfig("ov_copying")]})
    facts = Architecture("test", 2, 4, 4, 8, 2, None, "none", 1e-5, "none")
    model = evidence.Measured("m", {"ov_copying": values}, claims, facts)
    assert "| **`ov_copying`** ↑ | 1.00 | 1.00 [1.00, 1.00] | 0.17 |" in evidence.table([model], "mover")
    flipped = evidence.Measured("m", {"ov_copying": -values}, claims, facts)
    assert "| 0.00 | 0.00 [0.00, 0.00] | 1 |" in evidence.table([flipped], "mover")
    assert "| 1.00 | 0.00 | 0.50 [" in evidence.table([model, flipped], "mover")


def test_a_role_that_leaves_no_other_head_to_compare_with_has_no_table() -> None:
    every = Claims("", "measured", None, {"mover": [(0, 0), (0, 1)]}, {"mover": [PredictionConfig("ov_copying")]})
    facts = Architecture("test", 1, 2, 2, 8, 2, None, "none", 1e-5, "none")
    assert evidence.table([evidence.Measured("m", {"ov_copying": np.eye(1, 2)}, every, facts)], "mover") == ""
