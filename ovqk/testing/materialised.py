"""Each head's full W_QK and W_OV, in float64, from its module's outputs and not from its stored weights.

A block is given many random residual streams. If the norms that follow a projection do not divide, then queries, keys
and heads' outputs are linear in the normalised stream. So least squares find the matrices, whatever the module's
layout, fusing, gains, multipliers and rotations are.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ovqk.testing.module_comparison import difference, one_head, output_projection, silenced
from ovqk.weights.block_probes import Recorder, Softmaxes, find_blocks, first_tensor
from ovqk.weights.folding import fold_layer
from ovqk.weights.norms import normalise
from ovqk.weights.types import Architecture, LayerWeights, WeightSource, score_scale

TOKENS = 6
"""Tokens in a stream; there must be more than the offset at which scores are read."""
STREAMS = 80
"""How many streams a linear map is fitted to; d_model + 1 are needed."""
GRID = 54
"""The number of queries, and of keys, in the grid for fitting a bilinear form if a module shows only its scores."""
MULTIPLIED_READS: dict[str, Callable[[Any], float]] = {
    "opt": lambda config: (config.hidden_size / config.num_attention_heads) ** -0.5,
    "falcon_h1": lambda config: config.key_multiplier,
}
"""Model type -> a factor on queries or keys, besides cosines, that is not part of W_QK."""


class ReachedError(Exception):
    """Stops a block when it has computed the wanted values."""


@torch.no_grad()
def compare_materialised(source: WeightSource, model: nn.Module) -> dict[str, float]:
    """Return W_QK's and W_OV's largest relative difference over layers, `w_qk` and `w_ov`, for a model in float64."""
    facts, found = source.architecture, {"w_qk": 0.0, "w_ov": 0.0}
    calls = functools.cache(lambda streams: _calls(model, facts, streams))
    for layer, module in enumerate(find_blocks(model, facts.n_layers)):
        weights = fold_layer(source.layer(layer), facts)
        mine, own = w_qk(model, module, calls, weights, facts)
        found["w_qk"] = max(found["w_qk"], difference(mine, own))
        mine, own = w_ov(module, calls(STREAMS)[layer], weights, facts)
        found["w_ov"] = max(found["w_ov"], difference(mine, own))
    return found


def _calls(model: nn.Module, facts: Architecture, streams: int) -> Any:
    """Return the arguments with which the model calls each of its blocks on this many texts at once."""
    tokens = torch.randint(0, 64, (streams, TOKENS), generator=torch.Generator().manual_seed(6))
    recorder = Recorder(TOKENS)
    with recorder.watch(model, find_blocks(model, facts.n_layers)):
        model(input_ids=tokens, use_cache=False)
    return recorder.calls


def _random_stream(call: Any, seed: int = 7) -> Tensor:
    return torch.randn(call.stream.shape, generator=torch.Generator().manual_seed(seed), dtype=call.stream.dtype)


def fitted(rows: Tensor, values: Tensor) -> Tensor:
    """Fit the affine map from rows to values, and return its linear part [d_model, ...]."""
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    inverse = torch.linalg.pinv(torch.cat((rows.double(), ones), -1))
    return torch.einsum("rn,n...->r...", inverse, values.double())[:-1]


# --- W_QK -------------------------------------------------------------------------------------------------------


def w_qk(
    model: nn.Module, module: nn.Module, calls: Callable[[int], Any], weights: LayerWeights, facts: Architecture
) -> tuple[Tensor, Tensor]:
    """Return ovqk's W_QK and the module's [head, d_model, d_model], at offset 0 (1 if the module shows only scores)."""
    call = calls(STREAMS)[weights.layer]
    stream = _random_stream(call)
    handed = captured(module, call, stream)
    if isinstance(handed, tuple):
        rows = normalise(stream[:, 0].double(), facts.norm, facts.norm_eps)
        q, k = (fitted(rows, each[:, :, 0]).transpose(0, 1) for each in handed)
        config: Any = model.config
        text = config.get_text_config()
        number = MULTIPLIED_READS.get(text.model_type, lambda _: 1.0)(text)
        own = q @ k.repeat_interleave(len(q) // len(k), 0).mT / number
        return bilinear(weights, facts, 0), own
    grid = calls(GRID * GRID)[weights.layer]
    some = _random_stream(grid)
    query, key = some[:GRID, 1].clone(), some[:GRID, 0].clone()
    some[:, 1], some[:, 0] = query.repeat_interleave(GRID, 0), key.repeat(GRID, 1)
    scores = captured(module, grid, some)
    assert torch.is_tensor(scores)
    scores = scores[:, :, 1, 0].double().reshape(GRID, GRID, -1) / score_scale(weights, facts)
    query, key = (normalise(each.double(), facts.norm, facts.norm_eps) for each in (query, key))
    left = fitted(query, scores)  # [d_model, key, head]
    return bilinear(weights, facts, 1), fitted(key, left.transpose(0, 1)).permute(2, 1, 0)


def bilinear(weights: LayerWeights, facts: Architecture, offset: int) -> Tensor:
    """Return ovqk's W_Q R(D) W_K^T with the query and key norms' gains, [head, d_model, d_model]."""
    W_Q, W_K = weights.W_Q.double(), weights.W_K.double()
    if weights.qk_norm is not None:
        W_Q = W_Q * weights.qk_norm.query_gain.double()[:, None]
        W_K = W_K * weights.qk_norm.key_gain.double()[:, None]
    if weights.rotary is not None:
        cos, sin = weights.rotary.angles(torch.tensor([offset]))
        W_Q = weights.rotary.rotate(W_Q, cos.double(), sin.double())
    return W_Q @ W_K[facts.kv_of_head].mT


def captured(module: nn.Module, call: Any, stream: Tensor) -> tuple[Tensor, Tensor] | Tensor:
    """Record the queries and keys that a block gives to its attention function, or its scores if it has none."""
    seen: list[Any] = []

    def attend(_: nn.Module, query: Tensor, key: Tensor, *__: Any, **___: Any) -> Any:
        seen.append((query.clone(), key.clone()))
        raise ReachedError

    def scored(logits: Tensor) -> None:
        if logits.shape[-2:] == (TOKENS, TOKENS):
            seen.append(logits.reshape(len(stream), -1, TOKENS, TOKENS).clone())
            raise ReachedError

    with _attending(module, attend), Softmaxes(scored), _undivided(module, stream), contextlib.suppress(ReachedError):
        call.run(module, stream, {})
    found: tuple[Tensor, Tensor] | Tensor = seen[0]
    return found


# --- W_OV -------------------------------------------------------------------------------------------------------


def w_ov(module: nn.Module, call: Any, weights: LayerWeights, facts: Architecture) -> tuple[Tensor, Tensor]:
    """Return ovqk's W_OV and the module's, with everything after the output projection, [head, d_model, d_model]."""
    stream, attention = _random_stream(call), _attention(module, facts)
    output = output_projection(attention, facts.n_heads * facts.d_head, facts.d_model)
    zeros = silenced(module, attention)

    def attend(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> Any:
        copies = query.shape[1] // value.shape[1]  # every token attends to itself alone
        return value.repeat_interleave(copies, 1).transpose(1, 2).contiguous(), None

    def written(head: int | None) -> Tensor:
        with one_head(output, head, facts), _attending(module, attend), _undivided(module, stream):
            returned = first_tensor(call.run(module, stream, zeros))
        assert returned is not None
        return (returned - stream)[:, 0].double()  # the first token attends to itself alone in any case

    rows, nothing = normalise(stream[:, 0].double(), facts.norm, facts.norm_eps), written(None)
    own = torch.stack([fitted(rows, written(head) - nothing) for head in range(facts.n_heads)])
    if facts.norm == "layernorm":
        own = own - own.mean(-1, keepdim=True)  # as folding does: no reader sees that direction
    return weights.W_V.double()[facts.kv_of_head] @ weights.W_O.double(), own


def _attention(module: nn.Module, facts: Architecture) -> nn.Module:
    """Return a block's children whose names say that they are its attention."""
    named = [(name.lower(), child) for name, child in module.named_children()]
    holding = [child for name, child in named if "att" in name and "norm" not in name and not name.startswith("ln")]
    return nn.ModuleList(holding)


@contextlib.contextmanager
def _attending(module: nn.Module, attend: Callable[..., Any]) -> Iterator[None]:
    """Replace the attention function in a block's modules."""
    with contextlib.ExitStack() as stack:
        for name in {type(each).__module__ for each in module.modules()}:
            if hasattr(sys.modules.get(name), "eager_attention_forward"):
                stack.enter_context(mock.patch.object(sys.modules[name], "eager_attention_forward", attend))
        yield


@contextlib.contextmanager
def _undivided(module: nn.Module, stream: Tensor) -> Iterator[None]:
    """Remove the division from every norm that does not read the block's stream; its gain stays."""

    def free(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0]
        if x.shape == stream.shape and torch.equal(x, stream):
            return output
        mean = x.mean(-1, keepdim=True) if centres(norm, x) else 0
        return output * ((x - mean).square().mean(-1, keepdim=True) + epsilon(norm)).sqrt()

    norms = [
        each
        for each in module.modules()
        if "norm" in type(each).__name__.lower()
        and not any("norm" in type(child).__name__.lower() for child in each.modules() if child is not each)
    ]
    handles = [norm.register_forward_hook(free) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def centres(norm: Any, x: Tensor) -> bool:
    """Say whether a norm subtracts its input's mean."""
    return bool((norm.forward(x + 1) - norm.forward(x)).abs().max() < 1e-3)


def epsilon(norm: Any) -> float:
    """Return a norm's epsilon, whichever of its usual names it has."""
    names = ("variance_epsilon", "eps", "epsilon")
    return next((float(getattr(norm, name)) for name in names if isinstance(getattr(norm, name, None), float)), 1e-5)
