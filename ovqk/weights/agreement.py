"""How a block reads and writes the residual stream, found by trying ovqk's forms against the block's own activations.

A form counts only if it reproduces the module's own numbers: queries times keys before the softmax, values, and the
output projection's addition to the stream. The first form that does is taken; if none does, the reason is reported.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ovqk.weights.block_probes import BlockActivations
from ovqk.weights.multipliers import TOLERANCE, agrees, fit_multiplier, nearest_known, same, without_mean
from ovqk.weights.norms import Norm, NormKind, QueryKeyNorm, apply_norm, normalise
from ovqk.weights.rotary import Rotary
from ovqk.weights.seen_rotations import measured_scale
from ovqk.weights.types import LayerWeights, keys, queries

UNSEEN_COSINES = (
    "the rotation's cosines could not be seen: a number that multiplies them, if there is one, counts as the scale of "
    "the scores and is not in W_QK"
)
BESIDE_THE_SCALE = (
    "a number multiplies queries or keys besides the scale of the scores; it counts as part of that scale and is not "
    "in W_QK"
)
SAME_SUM = 1e-5
"""Difference from 1 up to which the sum of a query's attention is 1."""
TINY = 1e-3
"""Factor on unit rows that makes a norm's epsilon show."""
NO_ROTATION = Rotary(torch.zeros(1))
"""The rotation for a layer without positions in a model with rotary positions: every R(D) is 1."""


@dataclass(frozen=True)
class MeasuredNorm:
    """A norm module's gain, bias and epsilon as its outputs show them, whatever it stores."""

    norm: Norm
    eps: float


@dataclass(frozen=True)
class BlockReading:
    """The form that reproduces one block.

    Attributes:
        weights: the block's, with the norms, rotation and multipliers that reproduce it.
        eps: the epsilon in the norm before attention; None if there is none.
        attention_scale: the factor that multiplies scores; None if not known.
        parallel: attention and MLP both read the block's input.
        biased: something else than the scores reaches the softmax (ALiBi, a relative position's bias).
        reads, writes: why ovqk's form does not reproduce the block's reads or writes; None if it does.
        notes: parts of attention beyond the form, in words for the record.
    """

    weights: LayerWeights
    eps: float | None
    attention_scale: float | None
    parallel: bool
    biased: bool
    reads: str | None
    writes: str | None
    notes: tuple[str, ...]


def measure_norm(module: nn.Module | None, width: int) -> MeasuredNorm | None:
    """Measure a norm by its outputs on random rows, so that an offset in its stored gain does not matter.

    Returns None if the module is neither a root-mean-square norm nor a LayerNorm over the last `width` components.
    """
    if module is None:
        return None
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    try:
        own, tiny, zero = module(rows), module(TINY * rows), module(torch.zeros(1, width))
    except Exception:  # a module of any other kind raises any kind of error
        return None
    if not torch.is_tensor(own) or own.shape != rows.shape or not torch.is_tensor(zero):
        return None
    eps = _epsilon(module)
    bias = zero[0] if bool(zero.any()) else None
    kinds: tuple[NormKind, ...] = ("rmsnorm", "layernorm")
    for kind in kinds:
        plain = normalise(rows, kind, eps)
        written = own if bias is None else own - bias
        gain = _stored_gain(module, (written * plain).sum(0) / plain.square().sum(0))
        norm = Norm(kind, gain.detach().float(), None if bias is None else bias.detach().float())
        if agrees(apply_norm(norm, rows, eps), own) and agrees(apply_norm(norm, TINY * rows, eps), tiny):
            return MeasuredNorm(norm, eps)
    return None


def _epsilon(module: nn.Module) -> float:
    """Return a norm's epsilon, under any of the names that it has."""
    for each in module.modules():
        for name in ("variance_epsilon", "eps", "epsilon"):
            if isinstance(getattr(each, name, None), float):
                return float(getattr(each, name))
    return 1e-5


def _stored_gain(module: nn.Module, measured: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """Return the stored gain (or 1 + it, Gemma) if it is the measured one, because it has no rounding."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == measured.shape:
        for stored in (weight.detach().float(), 1 + weight.detach().float()):
            if torch.allclose(stored, measured, rtol=1e-6, atol=1e-6):
                return stored
    return measured


def norms_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return a module's direct children that are norms."""
    return {
        name: child
        for name, child in module.named_children()
        if "norm" in type(child).__name__.lower() or "norm" in name.lower()
    }


def read_block(
    block: BlockActivations,
    module: nn.Module,
    weights: LayerWeights,
    output_bias: Float[Tensor, " d_model"] | None,
    output_input: Float[Tensor, "position columns"] | None,
    rotations: Sequence[Rotary],
    norm_module: nn.Module | None,
) -> BlockReading:
    """Try ovqk's forms on one block.

    Args:
        block: the block's own activations.
        module: the block.
        weights: its attention weights, without norms.
        output_bias: the output projection's bias.
        output_input: the output projection's input.
        rotations: the rotations that the model's layers may use.
        norm_module: the norm that is named as the one before attention.
    """
    d_model = weights.W_Q.shape[1]
    norms = [norm_module, *norms_of(module).values()] if norm_module is not None else list(norms_of(module).values())
    measured = [found for found in (measure_norm(each, d_model) for each in norms) if found is not None]
    notes: list[str] = []
    reads: str | None = "its values are not those of the residual stream through a norm before attention"
    eps, scale, biased = None, block.scaling, False
    multiplied = [found for found in (_multiplied(block, each) for each in measured) if found is not None]
    for candidate in [*measured, None, *multiplied]:
        x = block.stream if candidate is None else apply_norm(candidate.norm, block.stream, candidate.eps)
        if not _values_agree(block, x, weights, output_input):
            continue
        weights = replace(weights, norm=None if candidate is None else candidate.norm)
        eps = None if candidate is None else candidate.eps
        if any(candidate is each for each in multiplied):
            notes.append("a multiplier stands between the norm and attention; it is in W_Q, W_K and W_V as a gain is")
        matched = _match_scores(block, x, weights, rotations)
        if matched is None:
            reads = "its scores before the softmax are not those of x W_Q and x W_K, normalised and rotated"
        else:
            plain, usual = weights.W_Q, weights.W_Q.shape[-1] ** -0.5
            weights, scale, biased = matched.weights, matched.scale, matched.biased
            if matched.unseen and not same(scale, usual):
                notes.append(UNSEEN_COSINES)
            elif block.scaling is not None and scale not in (block.scaling, usual):
                notes.append(BESIDE_THE_SCALE)
            if weights.W_Q is not plain:
                notes.append("queries and keys pass a LayerNorm: what it takes away, their mean, is out of W_Q and W_K")
            reads = _mixing(block, output_input, weights.W_O.shape[0])
            notes += _beyond_scores(block, biased)
        break
    weights, writes, told = _match_write(block, weights, output_bias, output_input, measured)
    return BlockReading(
        replace(weights, sliding_window=block.window),
        eps,
        scale,
        _is_parallel(block),
        biased,
        reads,
        writes,
        (*notes, *told),
    )


def _multiplied(block: BlockActivations, measured: MeasuredNorm) -> MeasuredNorm | None:
    """Return a norm times the number that makes it attention's own input; None if there is no such number but 1."""
    given = block.inputs.get(id(block.attention))
    x = apply_norm(measured.norm, block.stream, measured.eps)
    if given is None or given.shape != x.shape:
        return None
    number, norm = fit_multiplier(x, given), measured.norm
    if number == 1 or not agrees(number * x, given):
        return None
    bias = None if norm.bias is None else number * norm.bias
    return replace(measured, norm=replace(norm, weight=number * norm.weight, bias=bias))


def _values_agree(
    block: BlockActivations, x: Float[Tensor, "position d_model"], weights: LayerWeights, output_input: Tensor | None
) -> bool:
    """Return whether x W_V + b_V are the module's values."""
    mine = torch.einsum("pd,hdx->hpx", x, weights.W_V) + weights.b_V[:, None]
    if block.values is not None:
        copies = block.values.shape[0] // mine.shape[0]  # a module may repeat them for each query head itself
        return agrees(mine.repeat_interleave(max(copies, 1), 0), block.values)
    if output_input is None:
        return False
    group = weights.W_O.shape[0] // mine.shape[0]
    first = mine[:, 0].repeat_interleave(group, 0).flatten()  # the first token attends to itself alone
    return agrees(first, output_input[0])


@dataclass(frozen=True)
class _Match:
    """The weights with the norms and the rotation that give a module's scores.

    Attributes:
        scale: the factor that multiplies scores.
        biased: a bias by position is added to them.
        unseen: the cosines were not seen, so that a factor on them would be in `scale`.
    """

    weights: LayerWeights
    scale: float
    biased: bool
    unseen: bool


def _match_scores(
    block: BlockActivations, x: Float[Tensor, "position d_model"], weights: LayerWeights, rotations: Sequence[Rotary]
) -> _Match | None:
    """Return the form that gives the module's scores; None if no form does.

    A factor on cosines, as they are seen, is the rotation's; the scale of the scores is what is left.
    """
    watched = block.queries is not None and block.scaling is not None
    own, visible = _own_scores(block)
    if own is None:
        return None
    usual, group = weights.W_Q.shape[-1] ** -0.5, weights.W_Q.shape[0] // weights.W_K.shape[0]
    turns = [(rotary, measured_scale(rotary, block.tables)) for rotary in rotations]
    seen = [(None, 1.0), *((replace(rotary, scale=scale or 1.0), scale) for rotary, scale in turns)]
    for normed in _query_key_forms(block, weights):
        q, k = queries(normed, x), keys(normed, x).repeat_interleave(group, 0)
        for rotary, measured in seen:
            mine = _scores(q, k, rotary)
            if mine.shape != own.shape:
                continue
            for slopes in (False, True) if rotary is None and not watched else (False,):
                scale, agreed = fit_multiplier(mine, own), False
                if not watched:
                    scale, agreed = _fit_scale(mine, own, visible, slopes)
                elif scale > 0:  # a model may scale its queries and then not the scores
                    agreed = agrees(mine * scale, own)
                if agreed:
                    biased = slopes
                    if watched:
                        biased = _shift(block) > TOLERANCE * float(own.abs().max()) and not block.capped
                    scale = nearest_known(scale, block.scaling, usual)
                    return _Match(replace(normed, rotary=rotary), scale, biased, measured is None)
    return None


def _own_scores(block: BlockActivations) -> tuple[Tensor | None, Tensor]:
    """Return the module's scores before its softmax, [head, query, key], and which of them count."""
    length = len(block.stream)
    below = torch.ones(length, length, dtype=torch.bool).tril()
    if block.queries is not None and block.keys is not None and block.scaling is not None:
        group = block.queries.shape[0] // block.keys.shape[0]
        return block.queries @ block.keys.repeat_interleave(group, 0).mT * block.scaling, below
    return block.logits, below


def _scores(
    q: Float[Tensor, "head position d_head"], k: Float[Tensor, "head position d_head"], rotary: Rotary | None
) -> Float[Tensor, "head position position"]:
    """Return q R(i - j) k^T for every pair of positions, without a scale."""
    if rotary is None:
        return q @ k.mT
    cos, sin = (each.to(q) for each in replace(rotary, scale=1.0).angles(torch.arange(q.shape[1])))
    return rotary.rotate(q, rotary.scale * cos, rotary.scale * sin) @ rotary.rotate(k, cos, sin).mT


def _fit_scale(mine: Tensor, own: Tensor, visible: Tensor, slopes: bool) -> tuple[float, bool]:
    """Return the scale between two sets of scores, and whether they agree up to row constants and slopes by offset."""
    visible = visible & (own.amax(0) > -1e4)
    length = len(visible)
    offsets = (torch.arange(length)[:, None] - torch.arange(length)).to(own)

    def centred(x: Tensor) -> Tensor:
        counts = visible.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(visible, x - (x * visible).sum(-1, keepdim=True) / counts, 0)

    own, mine, ramp = (centred(torch.where(visible, each, 0)) for each in (own, mine, offsets.expand_as(own)))
    # one scale for all heads, one slope for each (ALiBi): eliminate the slopes, then fit
    if slopes:
        energy = ramp.square().sum((-2, -1), keepdim=True)
        own, mine = (x - ramp * (x * ramp).sum((-2, -1), keepdim=True) / energy for x in (own, mine))
    scale = fit_multiplier(mine, own)
    return scale, agrees(mine * scale, own)


def _query_key_forms(block: BlockActivations, weights: LayerWeights) -> Iterable[LayerWeights]:
    """Yield the weights as they are, and with each norm for queries and keys that the attention module holds."""
    yield weights
    if block.attention is None:
        return
    found: dict[str, tuple[str, nn.Module]] = {}
    for parent in block.attention.modules():
        for name, child in norms_of(parent).items():
            low = name.lower()
            if low.startswith(("q_", "q2", "query")) or low in ("qk_norm", "q_norm"):
                found.setdefault("query", (name, child))
            if low.startswith(("k_", "key")) or low == "qk_norm":
                found.setdefault("key", (name, child))
    (n_heads, _, d_head), n_kv = weights.W_Q.shape, weights.W_K.shape[0]
    if len(found) == 2:
        query, key = found["query"][1], found["key"][1]
        for joint in (False, True):
            one = measure_norm(query, n_heads * d_head if joint else d_head)
            two = measure_norm(key, n_kv * d_head if joint else d_head)
            if one is None or two is None or one.norm.bias is not None or two.norm.bias is not None:
                continue
            gains = [
                gain.reshape(heads, d_head) if joint else gain.expand(heads, d_head)
                for gain, heads in ((one.norm.weight, n_heads), (two.norm.weight, n_kv))
            ]
            form = QueryKeyNorm(gains[0], gains[1], one.eps, over_heads=joint)
            if one.norm.kind == "rmsnorm":
                yield replace(weights, qk_norm=form)
            elif not joint:  # a LayerNorm is a root-mean-square norm after centring, and centring is linear
                yield _centred(weights, form)
        heads = _norms_by_head(query, n_heads, d_head), _norms_by_head(key, n_kv, d_head)
        if heads[0] is not None and heads[1] is not None:
            yield _centred(weights, QueryKeyNorm(heads[0], heads[1], _epsilon(query)))
    ones = torch.ones(n_heads, d_head), torch.ones(n_kv, d_head)
    for eps in (1e-6, 1e-5):
        yield replace(weights, qk_norm=QueryKeyNorm(*ones, eps))  # a norm without gains need not be a module


def _centred(weights: LayerWeights, form: QueryKeyNorm) -> LayerWeights:
    """Centre queries and keys over each head's components, in the weights."""

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    return replace(
        weights,
        W_Q=centre(weights.W_Q),
        W_K=centre(weights.W_K),
        b_Q=centre(weights.b_Q),
        b_K=centre(weights.b_K),
        qk_norm=form,
    )


def _norms_by_head(module: nn.Module, heads: int, d_head: int) -> Tensor | None:
    """Return each head's LayerNorm gains, from one module for all heads (Cohere) or one for each (StableLM)."""
    rows = torch.randn(heads, d_head, generator=torch.Generator().manual_seed(2))
    eps = _epsilon(module)
    try:
        shaped = rows[None, :, None] if any(isinstance(m, nn.ModuleList) for m in module.modules()) else rows[None]
        own, zero = module(shaped).reshape(heads, d_head), module(torch.zeros_like(shaped))
    except Exception:  # a module of any other kind raises any kind of error
        return None
    plain = normalise(rows, "layernorm", eps)
    gain = own / plain
    other = torch.randn(heads, d_head, generator=torch.Generator().manual_seed(3))
    again = module(other.reshape(shaped.shape)).reshape(heads, d_head)
    right = agrees(normalise(other, "layernorm", eps) * gain, again) and not bool(zero.any())
    return gain.detach().float() if right else None


def _mixing(block: BlockActivations, output_input: Tensor | None, n_heads: int) -> str | None:
    """Say why the output projection does not get the values averaged by the pattern; None if it does."""
    if block.pattern is None or block.values is None:
        return None
    if output_input is None:
        return "the output projection was not seen"
    values = block.values.repeat_interleave(n_heads // block.values.shape[0], 0)
    z = (block.pattern @ values).transpose(0, 1).flatten(1)
    return None if agrees(z, output_input) else "between the values and the output projection stands a gate or a norm"


def _shift(block: BlockActivations) -> float:
    """Return the largest difference between the softmax's input and the scores, apart from a constant per row."""
    own, visible = _own_scores(block)
    if own is None or block.logits is None or block.logits.shape != own.shape:
        return 0.0
    seen = visible & (block.logits.amax(0) > -1e4)
    shift = torch.where(seen, block.logits - own, 0)
    mean = shift.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    return float(torch.where(seen, shift - mean, 0).abs().max())


def _beyond_scores(block: BlockActivations, biased: bool) -> list[str]:
    """Say which parts of attention lie beyond the scores: notes for the record."""
    notes = []
    if block.pattern is not None and bool(((block.pattern.sum(-1) - 1).abs() > SAME_SUM).any()):
        notes.append(
            "a sink takes part of each head's attention: it scales down a head's writes and is not part of any metric"
        )
    if block.capped:
        notes.append(
            "the scores are capped before the softmax (logit softcapping), and the cap is not part of any metric"
        )
    if biased:
        notes.append("a bias by position is added to the scores, which is not part of any metric")
    return notes


def _match_write(
    block: BlockActivations,
    weights: LayerWeights,
    output_bias: Tensor | None,
    output_input: Tensor | None,
    norms: Sequence[MeasuredNorm],
) -> tuple[LayerWeights, str | None, list[str]]:
    """Return the weights with the norm or multiplier behind W_O that reproduces attention's write to the stream."""
    own = block.attention_write
    if own is None or output_input is None:
        return weights, "what its attention adds to the residual stream could not be seen", []
    columns = weights.W_O.flatten(0, 1)
    if output_input.shape[-1] != len(columns):
        return weights, f"its output projection reads {output_input.shape[-1]} components, not {len(columns)}", []
    bias = torch.zeros(columns.shape[1]) if output_bias is None else output_bias
    plain = output_input @ columns + bias

    for measured in norms:
        if agrees(without_mean(apply_norm(measured.norm, plain, measured.eps)), without_mean(own)):
            return replace(weights, post_norm=measured.norm), None, []
    scale = fit_multiplier(without_mean(plain), without_mean(own))
    if agrees(without_mean(plain) * scale, without_mean(own)):
        if scale == 1:
            return weights, None, []
        told = ["a multiplier follows the output projection; it is in W_O"]
        return replace(weights, W_O=weights.W_O * scale), None, told
    return weights, "attention adds something other than z W_O + b_O to the residual stream", []


def _is_parallel(block: BlockActivations) -> bool:
    """Return whether the rest of the block reads the block's input, without attention's write."""
    if block.attention_write is None or block.other_write is None or block.both_write is None:
        return False
    return agrees(block.attention_write + block.other_write, block.both_write)
