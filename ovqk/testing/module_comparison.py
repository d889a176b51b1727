"""A checkpoint as ovqk reads it, compared in float64 with hooks on the Hugging Face model."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ovqk.circuits.effective_embeddings import Block0
from ovqk.weights.block_probes import (
    BlockActivations,
    Recorder,
    find_blocks,
    first_tensor,
    record_activations,
)
from ovqk.weights.folding import fold_embeddings, fold_layer, fold_mlp, fold_reads
from ovqk.weights.norms import apply_norm, normalise
from ovqk.weights.types import Architecture, WeightSource, keys, queries, score_scale

LENGTH = 15
"""Tokens in the text on which both are compared."""
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "resid_out", "wo", "o", "proj", "linear_attn", "out")
"""Names of the output projection, in the order tried."""


def difference(mine: Tensor, own: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the second's largest entry."""
    if mine.shape != own.shape:
        return float("inf")
    return float((mine - own).abs().max() / own.abs().max().clamp_min(1e-12))


def without_slopes(x: Tensor, visible: Tensor) -> Tensor:
    """Return scores without each row's mean and each head's slope by offset, which ALiBi adds (visible entries)."""
    positions = torch.arange(x.shape[-1])
    ramp = (positions[:, None] - positions).to(x).expand_as(x)

    def centred(y: Tensor) -> Tensor:
        y = torch.where(visible, y, 0)
        return torch.where(visible, y - y.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp_min(1), 0)

    x, ramp = centred(x), centred(ramp)
    return x - ramp * (x * ramp).sum((-2, -1), keepdim=True) / ramp.square().sum((-2, -1), keepdim=True)


@torch.no_grad()
def compare(source: WeightSource, model: nn.Module) -> dict[str, float | None]:
    """Compare ovqk's weights with a model's own computation in float64.

    Returns:
        `scores`, `writes`, `block0`, `logits` -> the largest relative difference over layers; None if ovqk gives none.
    """
    facts, tokens = source.architecture, torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(5))
    found: dict[str, float | None] = dict.fromkeys(("scores", "writes", "block0", "logits"))
    if not source.foldable:
        return found
    activations = record_activations(model, tokens, facts.n_layers, seed=9)
    scores, writes = [], []
    for layer, block in enumerate(activations.blocks):
        scores.append(compare_scores(source, layer, block))
        writes.append(compare_writes(source, model, layer, tokens))
    found |= {"scores": max(scores), "writes": max(writes)}
    embeddings = source.embeddings()
    if embeddings.W_E is None:
        return found
    if embeddings.W_U is not None:
        folded = fold_embeddings(embeddings, facts)
        final = activations.last_stream
        assert final is not None and folded.W_U is not None
        kind = "none" if embeddings.final_norm is None else embeddings.final_norm.kind
        W_U = folded.W_U if isinstance(folded.W_U, Tensor) else folded.W_U[:].T
        mine = normalise(final.double(), kind, facts.norm_eps) @ W_U.double()
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[operator, union-attr]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        own = activations.outputs[id(head)] if capped or activations.logits is None else activations.logits
        own = own.double()
        found["logits"] = difference(mine - mine.mean(0), own - own.mean(0))
    mlp = source.first_mlp()
    if not isinstance(mlp, str):
        found["block0"] = compare_block0(source, model)
    return found


def compare_scores(source: WeightSource, layer: int, block: BlockActivations) -> float:
    """Compare each head's scores before the softmax, every query with every key, through the folded weights."""
    facts, weights = source.architecture, fold_layer(source.layer(layer), source.architecture)
    x = normalise(block.stream.double(), facts.norm, facts.norm_eps)
    q, k = queries(weights, x), keys(weights, x)[facts.kv_of_head]
    scale = score_scale(weights, facts)
    mine = torch.zeros(facts.n_heads, LENGTH, LENGTH, dtype=torch.float64)
    for offset in range(LENGTH):
        turned = q[:, offset:]
        if weights.rotary is not None:
            cos, sin = weights.rotary.angles(torch.tensor([offset]))
            turned = weights.rotary.rotate(turned, cos.double(), sin.double())
        products = (turned * k[:, : LENGTH - offset]).sum(-1) * scale
        mine.diagonal(-offset, dim1=-2, dim2=-1).copy_(products)
    below = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if block.queries is not None and block.keys is not None and block.scaling is not None:
        group = facts.n_heads // block.keys.shape[0]
        own = block.queries @ block.keys.repeat_interleave(group, 0).mT * block.scaling
        return difference(mine * below, own * below)
    assert block.logits is not None
    visible = below & (block.logits.amax(0) > -1e4)
    return difference(without_slopes(mine, visible), without_slopes(block.logits, visible))


def output_projection(attention: nn.Module, width: int, d_model: int) -> nn.Module:
    """Return the module that maps the concatenated heads' outputs to the residual stream."""
    named = [
        (name.rsplit(".", 1)[-1], module)
        for name, module in attention.named_modules()
        if sorted(getattr(getattr(module, "weight", None), "shape", ())) == sorted((width, d_model))
    ]
    for wanted in OUTPUTS:
        for name, module in named:
            if name == wanted:
                return module
    raise LookupError(f"no output projection among {[name for name, _ in named]}")


def silenced(module: nn.Module, attention: nn.Module) -> dict[str, Tensor]:
    """Return zeros for all parameters in a block, except those in its attention and its norms."""
    inside = {id(each) for each in attention.modules()}
    return {
        f"{name}.{key}": torch.zeros_like(parameter)
        for name, child in module.named_modules()
        if name and id(child) not in inside and "norm" not in type(child).__name__.lower()
        for key, parameter in child.named_parameters(recurse=False)
    }


def compare_writes(source: WeightSource, model: nn.Module, layer: int, tokens: Tensor) -> float:
    """Compare each head's output: the block runs with one head, and the rest of the block is silenced."""
    facts, weights = source.architecture, source.layer(layer)
    module = find_blocks(model, facts.n_layers)[layer]
    recorder = Recorder(len(tokens))
    with recorder.watch(model, find_blocks(model, facts.n_layers)):
        model(input_ids=tokens[None], use_cache=False)
    call = recorder.calls[layer]
    stream = torch.randn(call.stream.shape, generator=torch.Generator().manual_seed(layer), dtype=call.stream.dtype)
    watched = Recorder(len(tokens))
    with watched.watch(module, [module]):
        call.run(module, stream, {})
    attention, block = watched.attention_child, watched.block
    assert attention is not None
    output = output_projection(attention, facts.n_heads * facts.d_head, facts.d_model)
    pattern = block.pattern
    if pattern is None:
        assert block.logits is not None
        pattern = block.logits.softmax(-1)
    x = apply_norm(weights.norm, stream[0].double(), facts.norm_eps)
    values = torch.einsum("pd,hdx->hpx", x, weights.W_V.double()) + weights.b_V.double()[:, None]
    z = pattern.double() @ values[facts.kv_of_head]
    zeros = silenced(module, attention)

    def written(head: int | None) -> Tensor:
        with one_head(output, head, facts):
            returned = first_tensor(call.run(module, stream, zeros))
        assert returned is not None
        return (returned - stream)[0].double()

    bias = getattr(output, "bias", None)
    b_O = torch.zeros(facts.d_model) if bias is None else bias
    worst, nothing = 0.0, written(None)
    for head in range(facts.n_heads):
        mine, own = z[head] @ weights.W_O[head].double(), written(head)
        if weights.post_norm is not None:
            mine = apply_norm(weights.post_norm, mine + b_O, facts.norm_eps)
        else:
            own = own - nothing  # the output's bias, and the terms that norms after a silenced MLP add
        worst = max(worst, difference(mine, own))
    return worst


@contextlib.contextmanager
def one_head(output: nn.Module, head: int | None, facts: Architecture) -> Iterator[None]:
    """Let a single head's values reach the output projection while the context lasts; with None, no head's."""

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = torch.zeros(facts.n_heads, facts.d_head, dtype=args[0].dtype)
        if head is not None:
            kept[head] = 1
        return args[0] * kept.flatten(), *args[1:]

    handle = output.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def compare_block0(source: WeightSource, model: nn.Module) -> float:
    """Compare block 0 as an effective embedding with the block itself on a lone token, without values' biases."""
    facts = source.architecture
    raw, weights = source.embeddings(), source.layer(0)
    assert raw.W_E is not None
    W_E = raw.W_E[:].to(next(model.parameters()).dtype)
    folded_layer, mlp = fold_reads(weights, facts), source.first_mlp()
    assert not isinstance(mlp, str)
    folded = fold_embeddings(raw, facts).W_E
    assert folded is not None
    as64 = {"layer": _double(folded_layer), "mlp": _double(fold_mlp(mlp, facts))}
    mine = Block0(as64["layer"], as64["mlp"], facts).rows(folded[:].double())
    block = find_blocks(model, facts.n_layers)[0]
    width = facts.n_heads * facts.d_head
    holding = (child for name, child in block.named_children() if "att" in name.lower() and "norm" not in name.lower())
    output = output_projection(nn.ModuleList(holding), width, facts.d_model)
    b_V = fold_layer(dataclasses.replace(weights, post_norm=None), facts).b_V.double()[facts.kv_of_head]
    bias = getattr(output, "bias", None)
    constant = torch.einsum("hx,hxd->d", b_V, module_output(output, facts.n_heads))
    constant = constant + (0 if bias is None else bias)
    seen: list[Tensor] = []

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (W_E[:, None], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": W_E[:, None]}

    handles = [
        block.register_forward_pre_hook(give, with_kwargs=True),
        output.register_forward_hook(lambda _, __, out: out - constant),
        block.register_forward_hook(lambda _, __, out: seen.append(_first(out))),
    ]
    try:
        model(input_ids=torch.arange(len(W_E))[:, None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    own = seen[0][:, 0]
    return difference(mine, own - own.mean(-1, keepdim=True) if facts.norm == "layernorm" else own)


def module_output(output: Any, n_heads: int) -> Tensor:
    """Return the output projection's own matrix, [head, d_head, d_model]."""
    weight: Tensor = output.weight
    matrix = weight if type(output).__name__ == "Conv1D" else weight.T
    return matrix.reshape(n_heads, -1, matrix.shape[-1])


def _first(output: Any) -> Tensor:
    found = first_tensor(output)
    assert found is not None
    return found


def _double(weights: Any) -> Any:
    """Return a weights dataclass with its tensors in float64; other parts stay as they are."""
    changes = {}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.double()
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _double(value)
    return dataclasses.replace(weights, **changes)
