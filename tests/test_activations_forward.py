"""Runs through TransformerLens against plain transformers with hooks, in every family that ovqk reads itself."""

from functools import partial
from pathlib import Path

import pytest
import torch
from support.commands import compose
from support.gguf_writing import ARCHITECTURES, write_gguf
from support.models import KINDS, local, make
from transformers import AutoModelForCausalLM

from ovqk.activations.forward import Look, Places, Replacement, RunningModel
from ovqk.activations.quantities import Writes
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.errors import UserError
from ovqk.structure.model import Model
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel

N, LENGTH = 3, 7
CPU = torch.device("cpu")
REFUSED = {"ministral", "falcon-grouped", "falcon-one_norm"}
"""Forms that TransformerLens has no adapter for, or whose adapter fails."""


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_transformerlens_cannot_read_is_refused(tiny, kind) -> None:
    with pytest.raises(UserError, match="TransformerLens"):
        RunningModel.load(open_checkpoint(local(tiny(kind))), local(tiny(kind)), CPU)


FAST = {"gpt2", "gpt_neox", "gptj", "llama", "qwen3", "phi3", "gemma3_text", "olmo2", "granite", "falcon", "mixtral"}
"""Forms that the fast tests run; the slow ones run all."""
FORMS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in sorted(set(KINDS) - REFUSED)]


@pytest.fixture(scope="module", params=FORMS)
def ran(request, tiny):
    directory = tiny(request.param)
    checkpoint = open_checkpoint(local(directory))
    running = RunningModel.load(checkpoint, local(directory), CPU)
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    vocabulary = plain.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    return running, plain, tokens


def test_patterns_and_logits_are_the_models_own(ran) -> None:
    running, plain, tokens = ran
    every = torch.arange(LENGTH)[:, None].expand(LENGTH, N)
    run = running.run(tokens, Places(every, every))
    with torch.no_grad():
        expected = plain(tokens, output_attentions=True, use_cache=False)
    torch.testing.assert_close(run.logits, expected.logits[:, -1], atol=1e-4, rtol=1e-4)
    patterns = torch.stack(expected.attentions)
    torch.testing.assert_close(run.patterns, patterns, atol=1e-4, rtol=1e-4)


def heads_output(plain: torch.nn.Module, running: RunningModel, layer: int) -> torch.nn.Module:
    """The projection that heads' outputs enter, of the plain model."""
    name = running.bridge.blocks[layer].attn.o.name
    within = next(module for path, module in plain.named_modules() if path.endswith(f".{layer}.{_attention(running)}"))
    return within.get_submodule(name)


def _attention(running: RunningModel) -> str:
    return running.bridge.blocks[0].attn.name


@pytest.mark.parametrize("whole", [False, True], ids=["from the label on", "whole"])
def test_a_replaced_head_changes_what_it_changes_in_the_plain_model(ran, whole) -> None:
    running, plain, tokens = ran
    running.whole = whole
    generator = torch.Generator().manual_seed(1)
    at, end = torch.tensor([2, 4, 3]), torch.full((N,), LENGTH - 1)
    every = torch.arange(N)
    contrast = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    look = Look(end, torch.tensor([0, 1, 2]), torch.tensor([3, 3, 4]))
    base = running.base(tokens)
    d_head = running.run(tokens, Places(end[None], end[None])).outputs.shape[-1]
    for layer, head in ((0, 1), (running.n_layers - 1, 3)):
        new = torch.randn(2, N, d_head, generator=generator)
        replacements = [
            [Replacement(layer, head, new[0])],
            [Replacement(layer, head, new[1]), Replacement(layer, 0, new[0])],
        ]
        patched = running.patched(base, at, replacements, contrast, [look])
        for index, together in enumerate(replacements):

            def replace(
                module: object, inputs: tuple[torch.Tensor, ...], together=together
            ) -> tuple[torch.Tensor, ...]:
                z = inputs[0].clone()
                shape = z.shape
                z = z.view(N, LENGTH, running.n_heads, d_head)
                for each in together:
                    z[every, at, each.head] = each.output
                return (z.view(shape), *inputs[1:])

            handle = heads_output(plain, running, layer).register_forward_pre_hook(replace)
            with torch.no_grad():
                expected = plain(tokens, output_attentions=True, use_cache=False)
            handle.remove()
            last = expected.logits[:, -1]
            difference = last[every, contrast[0]] - last[every, contrast[1]]
            torch.testing.assert_close(patched.difference[index], difference, atol=1e-4, rtol=1e-4)
            rows = torch.stack(expected.attentions)[:, every, :, end]
            looked = rows[every, :, :, look.source] - rows[every, :, :, look.control]  # [prompt, layer, head]
            found = patched.looks[index, 0].permute(2, 0, 1)
            later = slice(layer + 1, None)
            torch.testing.assert_close(found[:, later], looked[:, later], atol=1e-4, rtol=1e-4)
            assert found[:, :layer].isnan().all()  # what comes before is left as it was
    running.whole = False


def test_writes_of_all_heads_are_what_attention_adds_to_the_stream(ran, request) -> None:
    """z W_O summed over heads, a constant bias aside, through the norm behind attention if there is one."""
    running, _, tokens = ran
    model = weights(request.getfixturevalue("tiny")(request.node.callspec.params["ran"]))
    writes, end = Writes(model), torch.full((1, N), LENGTH - 1)
    kept: dict[str, torch.Tensor] = {}
    names = [f"blocks.{layer}.hook_{part}" for layer in range(running.n_layers) for part in ("in", "resid_mid")]

    def keep(value: torch.Tensor, hook: object, name: str) -> None:
        kept[name] = value[:, -1]

    with running.bridge.hooks(fwd_hooks=[(name, partial(keep, name=name)) for name in names if has(running, name)]):
        run = running.run(tokens, Places(end, end))
    directions = torch.randn(1, model.architecture.d_model, generator=torch.Generator().manual_seed(2)).expand(N, -1)
    for layer in range(running.n_layers):
        through = writes.of_layer(layer, run, directions)
        written = (run.outputs[layer, :, 0] * through).sum((-1, -2))
        middle = kept.get(f"blocks.{layer}.hook_resid_mid")
        added = run.attention_out[layer] if middle is None else middle - kept[f"blocks.{layer}.hook_in"]
        rest = (added * directions).sum(-1) - written
        assert (rest - rest.mean()).abs().max() < 2e-4 * max(1.0, float(written.abs().max())), f"layer {layer}"


def test_the_final_stream_read_as_writes_are_is_the_logit_difference(ran, request) -> None:
    running, _, tokens = ran
    model = weights(request.getfixturevalue("tiny")(request.node.callspec.params["ran"]))
    writes, end = Writes(model), torch.full((1, N), LENGTH - 1)
    run = running.run(tokens, Places(end, end))
    plus, minus = torch.full((N,), 7), torch.full((N,), 9)
    expected = run.logits[:, 7] - run.logits[:, 9]
    found = (run.final * writes.directions(run, plus, minus)).sum(-1) + writes.bias(plus, minus)
    found += running.bias(plus) - running.bias(minus)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def has(running: RunningModel, name: str) -> bool:
    """Whether the model has such a place: the stream between attention and MLP, unless both read the block's input."""
    if not name.endswith("resid_mid"):
        return True
    parallel = getattr(running.bridge.cfg, "parallel_attn_mlp", False)
    return not parallel and hasattr(running.bridge.blocks[0], "hook_resid_mid")


def weights(directory: Path) -> Model:
    """The model as its weights are read, without a task."""
    config = compose("model=local", f"model.path={directory}", "task=none", "analysis=b03")
    return Model.read(OpenedModel(open_weights(open_checkpoint(local(directory)), local(directory)), "tiny"), config)


def test_a_text_model_within_one_for_pictures_has_no_softcap_of_logits() -> None:
    from types import SimpleNamespace

    from transformers import AutoConfig

    capped = {"model_type": "gemma2", "final_logit_softcapping": 3.0}
    logits = torch.tensor([2.0, -1.0])
    for config, changed in (
        (AutoConfig.for_model(**capped), True),
        (AutoConfig.for_model("llava", text_config=capped), False),
    ):
        running = SimpleNamespace(model=SimpleNamespace(config=config))
        assert torch.equal(RunningModel.before_softcap(running, logits), logits) != changed


def test_softcaps_are_the_models_own_and_writes_are_before_the_last(tmp_path) -> None:
    folder = tmp_path / "capped"
    plain = make("gemma2", folder, final_logit_softcapping=3.0, attn_logit_softcapping=2.0).eval()
    running = RunningModel.load(open_checkpoint(local(folder)), local(folder), CPU)
    tokens = torch.randint(40, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    every = torch.arange(LENGTH)[:, None].expand(LENGTH, N)
    run = running.run(tokens, Places(every, every))
    with torch.no_grad():
        expected = plain(tokens, output_attentions=True, use_cache=False)
    torch.testing.assert_close(run.logits, expected.logits[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run.patterns, torch.stack(expected.attentions), atol=1e-4, rtol=1e-4)
    assert run.logits.abs().max() < 3
    model = weights(folder)
    plus, minus = torch.full((N,), 7), torch.full((N,), 9)
    uncapped = [running.before_softcap(run.logits[:, token]) for token in (7, 9)]
    found = (run.final * Writes(model).directions(run, plus, minus)).sum(-1)
    torch.testing.assert_close(found, uncapped[0] - uncapped[1], atol=1e-3, rtol=1e-3)


UNTOLD: dict[str, dict[str, object]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0},
    "gemma3_text": {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention"] * 3},
    "mistral": {"sliding_window": None},
}
"""Settings that a GGUF file does not tell, as it is read."""


@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - {"gemma"}))
def test_a_gguf_file_runs_as_the_directory_that_it_was_made_from(kind, tmp_path) -> None:
    make(kind, tmp_path / "hf", **UNTOLD.get(kind, {}))
    file = write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    tokens = torch.randint(40, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    every = torch.arange(LENGTH)[:, None].expand(LENGTH, N)
    runs = [
        RunningModel.load(open_checkpoint(local(path)), local(path), CPU).run(tokens, Places(every, every))
        for path in (file, tmp_path / "hf")
    ]
    for part in ("logits", "patterns", "outputs"):
        torch.testing.assert_close(*(getattr(run, part) for run in runs), atol=1e-4, rtol=1e-4)
