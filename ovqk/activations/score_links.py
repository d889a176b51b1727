"""Attention scores on prompts, split by the writers of the rows that the head reads (definitions: section 7).

If the norms' scales are kept as they were in the run, the score before the softmax is bilinear in two rows of the
residual stream, the query's and the key's. Each row is a sum of three kinds of terms: the embeddings with the first
MLP, earlier heads' outputs, and the rest. So the score is a sum over pairs of writers. Each pair has a share of the
contrast by which the head looks at the source:

    score(query, source) - mean over the other keys of score(query, key)
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.activations.batches import Batch, Prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.parts import SCORES, Steps
from ovqk.config.schema import RoleConfig
from ovqk.metrics import METRICS
from ovqk.structure.model import Model
from ovqk.weights.devices import to_device
from ovqk.weights.norms import apply_norm, linear_part
from ovqk.weights.types import Architecture, Head, LayerWeights, mixed, score_scale

LEAST_AGREEMENT = 1e-3
"""The largest difference in probability between attention computed from the scores and the model's own."""

Stream = Float[Tensor, "prompt position d_model"]


class ScoreLink(NamedTuple):
    """Shares of a head's score contrast, before a softcap: a part's mean over clusters / the mean contrast.

    Parts may be negative, so a share may lie outside [0, 1]. All are nan if attention computed from the scores differs
    from the model's own, for instance because it has a bias for distance or a sink beside its keys.

    Attributes:
        contrast: the mean contrast, in units of the scaled score before the softmax.
        link: the share if both rows are what the embeddings and the first MLP wrote, which a head's weights see.
        key_heads, query_heads: the share if the row on that side is what earlier heads wrote, with any other row.
        key_partner, query_partner: the same for the partners among these heads; nan if none lies in an earlier layer.
    """

    contrast: float
    link: float
    key_heads: float
    query_heads: float
    key_partner: float
    query_partner: float


class Partners(NamedTuple):
    """The heads that a role's heads are predicted to read, on the query's and on the key's side."""

    query: tuple[Head, ...] = ()
    key: tuple[Head, ...] = ()


def partner_roles(roles: Mapping[str, RoleConfig], name: str) -> dict[str, list[str]]:
    """Return `query` and `key` -> the roles whose heads write that row, as the task's predicted compositions say.

    Args:
        roles: all the task's roles.
        name: the role whose heads read the rows.
    """
    found: dict[str, list[str]] = {"query": [], "key": []}
    for role, config in roles.items():
        for prediction in config.predictions:
            metric = METRICS[prediction.metric]
            if metric.composes not in found:
                continue
            if metric.ranks == "receiver" and role == name:
                found[metric.composes] += prediction.partners
            elif metric.ranks == "sender" and name in prediction.partners:
                found[metric.composes].append(role)
    return {side: list(dict.fromkeys(names)) for side, names in found.items()}


@dataclass(frozen=True)
class Asked:
    """A head whose scores are split.

    Attributes:
        head: the head.
        query, source: labels in the prompts.
        partners: its partners in any layer; those in later layers are left out.
    """

    head: Head
    query: str
    source: str
    partners: Partners

    def earlier(self, side: str) -> tuple[Head, ...]:
        """Return the partners on a side (`query` or `key`) that lie in layers before the head's."""
        return tuple(sorted(head for head in getattr(self.partners, side) if head[0] < self.head[0]))


@dataclass
class _Writers:
    """The residual stream's parts by writer, at every position in a batch, up to the current layer.

    Attributes:
        direct: the part that the embeddings and the first MLP wrote.
        heads: the part that all heads wrote.
        some: a set of heads -> the part that these wrote.
    """

    direct: Stream
    heads: Stream
    some: dict[tuple[Head, ...], Stream] = field(default_factory=dict)

    def parts(self, stream: Stream, partners: tuple[Head, ...]) -> Float[Tensor, "part prompt position d_model"]:
        """Return the stream's four parts: direct, partners, other heads, the rest. They sum to the stream."""
        partner = self.some[partners] if partners else torch.zeros_like(stream)
        return torch.stack([self.direct, partner, self.heads - partner, stream - self.direct - self.heads])


def score_links(
    running: RunningModel, model: Model, prompts: Prompts, asked: Sequence[Asked], steps: Steps
) -> dict[Asked, ScoreLink]:
    """Run the testing half once more, and split heads' scores.

    Args:
        running: the model that runs.
        model: its weights.
        prompts: the prompts. Those in the testing half are used if a head's labels have a place in them.
        asked: the heads.
        steps: counts off the batches.
    """
    found: dict[Asked, list[tuple[Tensor, Tensor]]] = {each: [] for each in asked}
    wrong: set[Asked] = set()
    batches = [batch for batch in prompts.batches if batch.half == "testing"]
    layers = functools.cache(lambda index: to_device(model.source.layer(index), running.device))  # for all batches
    for number in steps(len(batches), SCORES) if asked else ():
        batch = batches[number]
        for each, contrasts in _Split(running, model.architecture, layers, batch, asked).run().items():
            if contrasts is None:
                wrong.add(each)
            else:
                found[each].append((batch.clusters, contrasts))
    return {each: _link(each, parts if each not in wrong else []) for each, parts in found.items()}


def _link(asked: Asked, parts: Sequence[tuple[Tensor, Tensor]]) -> ScoreLink:
    if not parts:
        return ScoreLink(*[math.nan] * len(ScoreLink._fields))
    clusters, contrasts = (torch.cat(list(each)) for each in zip(*parts, strict=True))
    means = torch.stack([contrasts[clusters == cluster].mean(0) for cluster in clusters.unique()]).mean(0)  # [q, k]
    whole = float(means.sum())
    shares = means / whole
    return ScoreLink(
        contrast=whole,
        link=float(shares[0, 0]),
        key_heads=float(shares[:, 1:3].sum()),
        query_heads=float(shares[1:3].sum()),
        key_partner=float(shares[:, 1].sum()) if asked.earlier("key") else math.nan,
        query_partner=float(shares[1].sum()) if asked.earlier("query") else math.nan,
    )


class _Split:
    """One run over a batch, during which some heads' scores are split."""

    def __init__(
        self,
        running: RunningModel,
        architecture: Architecture,
        layers: Callable[[int], LayerWeights],
        batch: Batch,
        asked: Sequence[Asked],
    ) -> None:
        self.running, self.batch, self.architecture, self.layers = running, batch, architecture, layers
        self.here = [each for each in asked if None not in (batch.position(each.query), batch.position(each.source))]
        self.last = max((each.head[0] for each in self.here), default=-1)
        partners = {each.earlier(side) for each in self.here for side in ("query", "key")} - {()}
        self.sets = sorted(partners)
        self.found: dict[Asked, Tensor | None] = {}
        self.expected: dict[Asked, Tensor] = {}
        self.writers: _Writers | None = None
        self.before: Tensor | None = None
        self.outputs: Tensor | None = None
        self.weights: LayerWeights | None = None

    @torch.no_grad()
    def run(self) -> dict[Asked, Float[Tensor, "prompt query_part key_part"] | None]:
        """Return the contrasts for all heads whose labels have a place here; None if their attention does not agree."""
        if not self.here:
            return {}
        names: list[tuple[str, Callable[..., Any]]] = []
        for layer in range(self.last + 1):
            names += [
                (f"blocks.{layer}.hook_in", partial(self._enter, layer=layer)),
                (f"blocks.{layer}.attn.hook_z", self._keep),
                (f"blocks.{layer}.attn.hook_out", partial(self._leave, layer=layer)),
                (f"blocks.{layer}.attn.hook_pattern", partial(self._check, layer=layer)),
            ]
        self.running.run_hooked(self.batch.tokens, names)
        return self.found

    def _enter(self, value: Tensor, hook: Any, layer: int) -> None:
        stream = value.detach().float()
        if self.writers is None:
            zeros = torch.zeros_like(stream)
            self.writers = _Writers(stream, zeros, dict.fromkeys(self.sets, zeros))
        elif layer == 1:
            assert self.before is not None
            self.writers.direct = self.writers.direct + (stream - self.before - self.writers.heads)
        self.before = stream
        self.weights = self.layers(layer)
        for each in self.here:
            if each.head[0] == layer:
                self._split(each, stream)

    def _keep(self, value: Tensor, hook: Any) -> None:
        self.outputs = value.detach().float()

    def _leave(self, value: Tensor, hook: Any, layer: int) -> None:
        assert self.weights is not None and self.outputs is not None and self.writers is not None
        z, W_O, norm, whole = self.outputs, self.weights.W_O, self.weights.post_norm, value.detach().float()
        eps = self.architecture.norm_eps

        def written(heads: Sequence[int]) -> Tensor:
            some = list(heads)
            return linear_part(norm, torch.einsum("bphz,hzd->bpd", z[:, :, some], W_O[some]), whole, eps)

        self.writers.heads = self.writers.heads + written(range(z.shape[2]))
        for some in self.sets:
            own = [head for index, head in some if index == layer]
            if own:
                self.writers.some[some] = self.writers.some[some] + written(own)

    def _check(self, value: Tensor, hook: Any, layer: int) -> None:
        every = torch.arange(len(self.batch))
        for each in self.here:
            if each.head[0] == layer:
                query = self.batch.position(each.query)
                assert query is not None
                own = value.detach().float()[every, each.head[1], query]
                if not float((own - self.expected[each]).abs().max()) <= LEAST_AGREEMENT:
                    self.found[each] = None

    def _split(self, asked: Asked, stream: Stream) -> None:
        assert self.writers is not None and self.weights is not None
        at = {name: self.batch.position(getattr(asked, name)) for name in ("query", "source")}
        query, source = at["query"], at["source"]
        assert query is not None and source is not None
        every, positions = torch.arange(len(stream)), torch.arange(stream.shape[1])
        query_parts = self.writers.parts(stream, asked.earlier("query"))[:, every, query][:, :, None]
        key_parts = self.writers.parts(stream, asked.earlier("key"))
        own = stream[every, query][:, None]
        scores = split_scores(
            self.weights, self.architecture, asked.head[1], (query_parts, own), (key_parts, stream), query
        )
        seen = positions[None] <= query[:, None] if self.architecture.causal else torch.ones(stream.shape[:2]) > 0
        if self.weights.sliding_window is not None:
            seen &= query[:, None] - positions[None] < self.weights.sliding_window
        seen = seen.to(stream.device)
        whole, cap = scores.sum((1, 2)), self.running.scores_softcap()
        whole = whole if cap is None else cap * torch.tanh(whole / cap)
        self.expected[asked] = mixed(whole.masked_fill(~seen, -math.inf), self.architecture.attn_coeff)
        others = seen.clone()
        others[every, source] = False
        mean = (scores * others[:, None, None]).sum(-1) / others.sum(-1)[:, None, None]
        contrast = scores[every, :, :, source] - mean
        contrast[~seen[every, source]] = math.nan  # a token outside the window has no score
        self.found[asked] = contrast.cpu()


def split_scores(
    weights: LayerWeights,
    architecture: Architecture,
    head: int,
    query: tuple[Float[Tensor, "part prompt one d_model"], Float[Tensor, "prompt one d_model"]],
    key: tuple[Float[Tensor, "part prompt position d_model"], Float[Tensor, "prompt position d_model"]],
    at: Int[Tensor, " prompt"],
) -> Float[Tensor, "prompt query_part key_part position"]:
    """Return a head's scores before the softmax, for each pair of a query-row part and a key-row part.

    Biases (from norms, queries and keys) count with the first part. The scores over all pairs sum to the score.

    Args:
        weights: the layer's weights, not folded.
        architecture: the model's architecture.
        head: the head.
        query: the residual stream's parts at the query, and their sum.
        key: the residual stream's parts at every position, and their sum.
        at: the query's position in each prompt.
    """
    q = _side(weights, architecture, head, *query, side="query")[:, :, 0]
    k = _side(weights, architecture, int(architecture.kv_of_head[head]), *key, side="key")
    scale = score_scale(weights, architecture)
    if weights.rotary is None:
        return scale * torch.einsum("apz,bpkz->pabk", q, k)
    offsets = at[:, None] - torch.arange(k.shape[2])[None]
    cos, sin = (each.view(*offsets.shape, -1).to(q) for each in weights.rotary.angles(offsets.flatten().double()))
    turned = weights.rotary.rotate(q[:, :, None], cos, sin)  # x R(query) (y R(key))^T = x R(query - key) y^T
    return scale * torch.einsum("apkz,bpkz->pabk", turned, k)


def _side(
    weights: LayerWeights,
    architecture: Architecture,
    head: int,
    parts: Float[Tensor, "part prompt position d_model"],
    stream: Stream,
    side: str,
) -> Float[Tensor, "part prompt position d_head"]:
    """Return the parts of a head's queries or keys, before they are rotated."""
    W, b = (weights.W_Q, weights.b_Q) if side == "query" else (weights.W_K, weights.b_K)
    eps, norm = architecture.norm_eps, weights.norm
    made = linear_part(norm, parts, stream, eps) @ W[head]
    bias = b[head] if norm is None or norm.bias is None else b[head] + norm.bias @ W[head]
    made[0] += bias
    if weights.qk_norm is None:
        return made
    whole = apply_norm(norm, stream, eps)
    bare = torch.einsum("bpd,hdz->hbpz", whole, W) + b[:, None, None]
    n_heads, width = bare.shape[0], bare.shape[-1]
    scale = weights.qk_norm.inverse_scale(bare.reshape(n_heads, -1, width)).expand(n_heads, -1, 1)[head]
    gain = weights.qk_norm.query_gain if side == "query" else weights.qk_norm.key_gain
    return made * scale.reshape(*bare.shape[1:3], 1) * gain[head]
