"""Scores on prompts split by who wrote the rows: exact against the models, known on models built by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.commands import compose
from support.models import KINDS, local
from support.planted_runs import cell
from transformers import AutoModelForCausalLM

from ovqk.activations.batches import Batch, Prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.score_links import Asked, Partners, partner_roles, score_links, split_scores
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.structure.model import Model
from ovqk.testing.prompted_models import run_model, write_model
from ovqk.weights.norms import Norm, QueryKeyNorm, apply_norm
from ovqk.weights.readers import open_weights
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture, LayerWeights, OpenedModel, keys, queries

N, LENGTH = 4, 9
CPU = torch.device("cpu")
REFUSED = {"ministral", "falcon-grouped", "falcon-one_norm"}
FAST = {"gpt2", "gpt_neox", "gptj", "llama", "qwen3", "phi3", "gemma3_text", "olmo2", "granite"}
FORMS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in sorted(set(KINDS) - REFUSED)]
BIASED = {"bloom", "mpt", "gpt_oss"}
"""Attention that is biased by distance, or has a sink beside its keys."""
CAPPED = {"gemma2"}
"""Scores that are capped: patterns tell the capped ones, and links are of those before."""


def batch(vocabulary: int) -> Batch:
    tokens = torch.randint(vocabulary, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    at = {"END": torch.full((N,), LENGTH - 1), "Q": torch.tensor([6, 5, 7, 4]), "S": torch.tensor([2, 3, 1, 4])}
    answers = torch.zeros(N, dtype=torch.long)
    return Batch("testing", tokens, tokens, at, answers, answers + 1, torch.tensor([0, 0, 1, 2]), ("",) * N)


@pytest.mark.parametrize("kind", FORMS)
def test_parts_sum_to_the_models_own_contrast_in_score(kind, tiny) -> None:
    directory = tiny(kind)
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    running = RunningModel.load(open_checkpoint(local(directory)), local(directory), CPU)
    config = compose("model=local", f"model.path={directory}", "task=none", "analysis=b03")
    source = open_weights(open_checkpoint(local(directory)), local(directory))
    model = Model.read(OpenedModel(source, "tiny"), config)
    here = batch(plain.config.get_text_config().vocab_size)
    partners = Partners(query=((0, 0), (1, 1)), key=((0, 1), (2, 2)))
    heads = [(layer, head) for layer in range(running.n_layers) for head in range(running.n_heads)]
    asked = [Asked(head, "Q", "S", partners) for head in heads]
    found = score_links(running, model, Prompts([here], ["a", "b", "c"], [], {}), asked, lambda n, what: range(n))
    with torch.no_grad():
        patterns = plain(here.tokens, output_attentions=True, use_cache=False).attentions
    for each in asked:
        link = found[each]
        if kind in BIASED:
            assert math.isnan(link.contrast)
            continue
        rows = patterns[each.head[0]][torch.arange(N), each.head[1], here.at["Q"]].double().log()
        own = []
        for row, query, key in zip(rows, here.at["Q"], here.at["S"], strict=True):
            others = [row[i] for i in range(int(query) + 1) if i != int(key) and row[i] > -math.inf]
            own.append(row[key] - torch.stack(others).mean())
        own = torch.stack(own)
        expected = torch.stack([own[:2].mean(), own[2], own[3]]).mean()  # of the means of clusters
        if not expected.isfinite():  # a source lies outside of the window
            assert math.isnan(link.contrast) and math.isnan(link.link)
            continue
        if kind not in CAPPED:
            assert link.contrast == pytest.approx(float(expected), abs=2e-4, rel=2e-3), each
        assert math.isnan(link.key_partner) == (each.head[0] == 0)
        if each.head[0] == 0:
            assert link.link == pytest.approx(1.0)


@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["layernorm", "rmsnorm", "none"]),
    normed=st.sampled_from([None, False, True]),
    turned=st.booleans(),
    n_parts=st.integers(1, 4),
)
def test_scores_of_all_pairs_of_parts_sum_to_the_score(seed, kind, normed, turned, n_parts) -> None:
    """For any parts, against queries and keys as the model's definition computes them."""
    generator = torch.Generator().manual_seed(seed)
    d, n_heads, n_kv, d_head, prompts, length = 12, 4, 2, 6, 2, 5

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = LayerWeights(
        0, draw(n_heads, d, d_head), draw(n_kv, d, d_head), draw(n_kv, d, d_head), draw(n_heads, d_head, d),
        draw(n_heads, d_head), draw(n_kv, d_head), draw(n_kv, d_head),
        norm=Norm(kind, draw(d), draw(d) if kind == "layernorm" else None),
        qk_norm=None if normed is None else QueryKeyNorm(draw(n_heads, d_head), draw(n_kv, d_head), 1e-6, normed),
        rotary=Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64), scale=1.3) if turned else None,
    )  # fmt: skip
    architecture = Architecture("x", 1, n_heads, n_kv, d, d_head, None, kind, 1e-5, "rotary" if turned else "none")
    parts = draw(n_parts, prompts, length, d)
    stream, at = parts.sum(0), torch.tensor([4, 2])
    every = torch.arange(prompts)
    found = split_scores(
        weights, architecture, 3, (parts[:, every, at][:, :, None], stream[every, at][:, None]), (parts, stream), at
    )
    assert found.shape == (prompts, n_parts, n_parts, length)
    for prompt in range(prompts):
        x = apply_norm(weights.norm, stream[prompt], 1e-5)
        q, k = queries(weights, x)[3, at[prompt]], keys(weights, x)[1]
        if weights.rotary is not None:
            cos, sin = weights.rotary.angles(at[prompt] - torch.arange(length))
            q = weights.rotary.rotate(q.expand(length, -1), cos, sin)
        expected = (q * k).sum(-1) / math.sqrt(d_head)
        torch.testing.assert_close(found[prompt].sum((0, 1)), expected)


@pytest.mark.parametrize("seed", [0, 6])
def test_planted_heads_look_by_what_they_were_built_to_read(tmp_path, seed) -> None:
    """The previous-token head by positions alone; the induction head's keys as the previous-token head wrote them."""
    config = cell(seed, "activations.prompts=64")
    planted = (0, seed % 4), (1, (seed + 1) % 4)
    file = tmp_path / "planted.safetensors"
    write_model(file, len(config.task.words["content"]) + 1, seed, planted)
    rows = run_model(file, config).judged.roles.set_index("role")
    assert rows.at["previous_token", "score_link"] == pytest.approx(1, abs=0.02)
    assert rows.at["induction", "score_link"] == pytest.approx(0, abs=0.05)
    assert rows.at["induction", "score_key_partner"] == pytest.approx(1, abs=0.05)
    assert math.isnan(rows.at["induction", "score_query_partner"])
    assert rows.at["induction", "score_contrast"] > 3


def test_partners_are_the_roles_that_predictions_of_pairs_name() -> None:
    ioi = compose("task=ioi", "model=mini-attn").task.roles
    assert partner_roles(ioi, "name_mover") == {"query": ["s_inhibition"], "key": []}
    assert partner_roles(ioi, "induction") == {"query": [], "key": ["previous_token"]}
    assert partner_roles(ioi, "previous_token") == {"query": [], "key": []}
