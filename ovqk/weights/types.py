"""Typed weights in one convention, with the norms folded in.

Row vectors, as in TransformerLens: the residual stream x [d_model] is read by x W_Q and written by z W_O.
Keys and values stay grouped: query head j reads KV head j // (n_heads / n_kv_heads).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

CPU = torch.device("cpu")
ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}

NormKind = Literal["layernorm", "rmsnorm", "none"]
PositionKind = Literal["learned", "rotary", "none", "unsupported"]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: a row x at position m becomes x R(m).

    Attributes:
        inverse_frequencies: radians per position of each rotated pair, [rotary_dim / 2].
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J); otherwise (0, r/2), (1, r/2 + 1), ... (Llama, NeoX).
        scale: factor of R(D), from a scaling that also multiplies the cosines and sines of queries and keys (YaRN,
            LongRoPE: the square of their attention factor).
    """

    inverse_frequencies: Float[Tensor, " pair"]
    interleaved: bool = False
    scale: float = 1.0

    def rotate(
        self,
        x: Float[Tensor, "*#batch d_head"],
        cos: Float[Tensor, "*#batch pair"],
        sin: Float[Tensor, "*#batch pair"],
    ) -> Float[Tensor, "*batch d_head"]:
        """x R for the rotation with these cosines and sines (their means give the mean rotation)."""
        rotary_dim = 2 * self.inverse_frequencies.numel()
        turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        rotated_first, rotated_second = first * cos - second * sin, first * sin + second * cos
        if self.interleaved:
            rotated = torch.stack((rotated_first, rotated_second), dim=-1).flatten(-2)
        else:
            rotated = torch.cat((rotated_first, rotated_second), dim=-1)
        return torch.cat((rotated, passed.expand(*rotated.shape[:-1], -1)), dim=-1)

    def angles(
        self, offsets: Float[Tensor, " offset"] | Int[Tensor, " offset"]
    ) -> tuple[Float[Tensor, "offset pair"], Float[Tensor, "offset pair"]]:
        """Cosines and sines of R(D) for each offset D, times the scale."""
        radians = offsets.to(self.inverse_frequencies)[:, None] * self.inverse_frequencies
        return self.scale * radians.cos(), self.scale * radians.sin()


@dataclass(frozen=True)
class Architecture:
    """The facts of a model that its heads' weights do not hold, the same for all of its layers.

    Attributes:
        norm: the norm before attention and before the unembedding; `none` too where attention reads the bare stream.
        attention_scale: what multiplies the scores; None for 1 / sqrt(d_head). No metric has it in.
        post_norm: a norm stands between attention and the residual stream.
        qk_norm: queries and keys are normalised, so that no scale of W_QK reaches the scores.
        parallel: attention and MLP of a block both read what comes into the block.
        tied: the unembedding is the transposed embedding.
        activation: name of the MLP's activation; None where there is no MLP that ovqk reads.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    n_ctx: int | None
    norm: NormKind
    norm_eps: float
    positions: PositionKind
    causal: bool = True
    tied: bool = False
    activation: str | None = None
    attention_scale: float | None = None
    post_norm: bool = False
    qk_norm: bool = False
    parallel: bool = False

    @cached_property
    def kv_of_head(self) -> Int[Tensor, " head"]:
        """The KV head that each query head reads."""
        return torch.arange(self.n_heads) // (self.n_heads // self.n_kv_heads)


@dataclass(frozen=True)
class Norm:
    """A norm's gain and bias, [d_model] each; `weight` holds the whole gain (Gemma: 1 + gamma)."""

    kind: NormKind
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True)
class QueryKeyNorm:
    """A root-mean-square norm of queries and keys, before they are rotated.

    Attributes:
        query_gain, key_gain: what each normalised component is multiplied by.
        over_heads: one root mean square for all heads of a token (OLMo 2) instead of one for each.
    """

    query_gain: Float[Tensor, "head d_head"]
    key_gain: Float[Tensor, "kv_head d_head"]
    eps: float
    over_heads: bool = False

    def apply(
        self, x: Float[Tensor, "any_head row d_head"], gain: Float[Tensor, "any_head d_head"]
    ) -> Float[Tensor, "any_head row d_head"]:
        """The norm of queries or of keys, with their gain."""
        over = (0, 2) if self.over_heads else (2,)
        return x * torch.rsqrt(x.square().mean(over, keepdim=True) + self.eps) * gain[:, None]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's attention weights, and what of its positions and norms differs from layer to layer.

    Attributes:
        norm: what stands before them; None once folded, or where there is none.
        post_norm: what stands between W_O and the residual stream (Gemma 2, OLMo 2); None once its gain is folded.
        qk_norm: what stands between W_Q, W_K and the scores.
        rotary: the rotation of queries and keys, under rotary positions.
        sliding_window: how many tokens back a query sees, itself included; None for all.
    """

    layer: int
    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    b_V: Float[Tensor, "kv_head d_head"]
    norm: Norm | None
    post_norm: Norm | None = None
    qk_norm: QueryKeyNorm | None = None
    rotary: Rotary | None = None
    sliding_window: int | None = None


def queries(weights: LayerWeights, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "head row d_head"]:
    """Queries of these rows, normalised where the model does so, not yet rotated."""
    q = x @ weights.W_Q.to(x) + weights.b_Q.to(x)[:, None]
    return q if weights.qk_norm is None else weights.qk_norm.apply(q, weights.qk_norm.query_gain.to(x))


def keys(weights: LayerWeights, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "kv_head row d_head"]:
    """Keys of these rows, normalised where the model does so, not yet rotated."""
    k = x @ weights.W_K.to(x) + weights.b_K.to(x)[:, None]
    return k if weights.qk_norm is None else weights.qk_norm.apply(k, weights.qk_norm.key_gain.to(x))


@dataclass(frozen=True)
class MLPWeights:
    """Block 0's MLP: x -> act(x W_in + b_in) [* (x W_linear + b_linear)] W_out + b_out; the norms as in LayerWeights.

    Attributes:
        W_linear: the linear branch of a gated MLP; None where there is no gate.
        b_linear: its bias; None for zeros.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_linear: Float[Tensor, "d_model d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    activation: str
    norm: Norm | None
    post_norm: Norm | None = None
    b_linear: Float[Tensor, " d_mlp"] | None = None


@dataclass(frozen=True)
class StoredRows:
    """A row of d_model for each token, left in the checkpoint and read when asked for: `rows[ids]`, `rows[start:stop]`.

    Attributes:
        read: rows start .. stop - 1 as they are stored, float32.
        shape: (tokens, d_model).
        gain: what each component is multiplied by; None for 1.
        centred: whether each row is taken less its own mean.
    """

    read: Callable[[int, int], Float[Tensor, "token d_model"]]
    shape: tuple[int, int]
    gain: Float[Tensor, " d_model"] | None = None
    centred: bool = False
    device: torch.device = CPU

    NEAR = 256  # tokens between two that are asked for, up to which they are read in one piece
    PIECE = 4096  # tokens that are read in one piece, at most

    def __getitem__(self, index: slice | Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """Rows of these tokens: a slice of step 1, or ids in any order."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return self.fold(self.read(start, stop).to(self.device))
        ids, place = index.cpu().unique(return_inverse=True)
        ends = ((ids.diff() > self.NEAR) | (ids // self.PIECE).diff().bool()).nonzero()[:, 0] + 1
        pieces = [
            self.read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in ids.tensor_split(ends) if run.numel()
        ]
        found = torch.cat(pieces) if pieces else torch.empty(0, self.shape[1])
        return self.fold(found.to(self.device))[place.to(self.device)]

    def folded(self, gain: Float[Tensor, " d_model"] | None, centred: bool) -> "StoredRows":
        """The same rows times a gain, then less their mean.

        Raises:
            ValueError: they are centred already, and a gain after that is not one before it.
        """
        if gain is not None and self.centred:
            raise ValueError("a gain comes before centring")
        if gain is not None and self.gain is not None:
            gain = self.gain * gain
        return dataclasses.replace(self, gain=self.gain if gain is None else gain, centred=self.centred or centred)

    def first(self, n_tokens: int | None) -> "StoredRows":
        """The first tokens alone; all, where None."""
        n = self.shape[0] if n_tokens is None else min(n_tokens, self.shape[0])
        return dataclasses.replace(self, shape=(n, self.shape[1]))

    def to(self, device: torch.device) -> "StoredRows":
        """The same rows, handed out on a device."""
        return dataclasses.replace(self, device=device, gain=None if self.gain is None else self.gain.to(device))

    def fold(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What gain and centring make of a row: a linear map, of any rows of d_model."""
        rows = rows if self.gain is None else rows * self.gain.to(rows)
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows


Rows = Float[Tensor, "token d_model"] | StoredRows
"""One row for each token, in memory or in the checkpoint."""


def times(rows: Rows | None, factor: float) -> Rows | None:
    """Return an embedding times a number."""
    if rows is None or factor == 1:
        return rows
    return (
        rows.folded(torch.full((rows.shape[1],), factor), centred=False)
        if isinstance(rows, StoredRows)
        else rows * factor
    )


def split_heads(weight: Float[Tensor, "d_model columns"], n_heads: int) -> Float[Tensor, "head d_model d_head"]:
    """Return columns [d_model, head * d_head] as one block per head."""
    return weight.reshape(weight.shape[0], n_heads, -1).transpose(0, 1)


@dataclass(frozen=True)
class EmbeddingWeights:
    """Token and position embeddings and the unembedding; None for what the checkpoint does not hold.

    Attributes:
        W_U: [d_model, d_vocab]; where it stays in the checkpoint, its columns as rows.
        final_norm: what stands before W_U; None once folded, or where there is none.
    """

    W_E: Rows | None
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    W_U: Float[Tensor, "d_model d_vocab"] | StoredRows | None
    final_norm: Norm | None


@runtime_checkable
class WeightSource(Protocol):
    """What the native families and the bridge both give: raw weights, one layer at a time."""

    architecture: Architecture
    loaded_by: Literal["families", "bridge"]
    foldable: bool
    """False where the norms are not the plain pre-norm kind, so that folding would be wrong."""
    no_vocabulary: str | None
    """Why `embeddings` gives no W_E; None where it gives one, or where the checkpoint simply holds none."""
    notes: list[str]

    def layer(self, index: int) -> LayerWeights:
        """The raw attention weights of a layer."""
        ...

    def embeddings(self) -> EmbeddingWeights:
        """The raw embeddings."""
        ...

    def first_mlp(self) -> MLPWeights | str:
        """Block 0's MLP, or the reason why there is none to read."""
        ...


def normalise(x: Float[Tensor, "*batch d_model"], kind: NormKind, eps: float) -> Float[Tensor, "*batch d_model"]:
    """The norm without gain and bias: what remains of it once folded."""
    if kind == "none":
        return x
    if kind == "layernorm":
        return functional.layer_norm(x, x.shape[-1:], eps=eps)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return x * torch.rsqrt(square + eps)


def apply_norm(norm: Norm | None, x: Float[Tensor, "*batch d_model"], eps: float) -> Float[Tensor, "*batch d_model"]:
    """The whole norm, with gain and bias."""
    if norm is None:
        return x
    x = normalise(x, norm.kind, eps) * norm.weight
    return x if norm.bias is None else x + norm.bias


def _read_through(
    norm: Norm | None, weight: Float[Tensor, "*head d_model d_out"], bias: Float[Tensor, "*head d_out"]
) -> tuple[Float[Tensor, "*head d_model d_out"], Float[Tensor, "*head d_out"]]:
    """Fold the norm before a reading weight into it: first the bias, by the original weight, then the gain."""
    if norm is not None and norm.bias is not None:
        bias = bias + torch.einsum("d,...do->...o", norm.bias, weight)
    return read_through(norm, weight), bias


def read_through(
    norm: Norm | None, weight: Float[Tensor, "*head d_model d_out"]
) -> Float[Tensor, "*head d_model d_out"]:
    """A reading weight with the norm before it folded in: its gain, and under LayerNorm no all-ones direction."""
    if norm is None:
        return weight
    weight = norm.weight.to(weight)[:, None] * weight
    return weight - weight.mean(-2, keepdim=True) if norm.kind == "layernorm" else weight


def _write_centred(kind: NormKind, weight: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Drop the all-ones direction of a write, which no reader behind a LayerNorm sees."""
    return weight - weight.mean(-1, keepdim=True) if kind == "layernorm" else weight


def fold_reads(weights: LayerWeights, architecture: Architecture) -> LayerWeights:
    """Fold the norm before attention into W_Q, W_K, W_V and centre W_O; a norm after attention stays beside W_O."""
    W_Q, b_Q = _read_through(weights.norm, weights.W_Q, weights.b_Q)
    W_K, b_K = _read_through(weights.norm, weights.W_K, weights.b_K)
    W_V, b_V = _read_through(weights.norm, weights.W_V, weights.b_V)
    W_O = _write_centred(architecture.norm, weights.W_O)
    return dataclasses.replace(weights, W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O, b_Q=b_Q, b_K=b_K, b_V=b_V, norm=None)


def fold_layer(weights: LayerWeights, architecture: Architecture) -> LayerWeights:
    """Fold the norms before and after attention (definitions: section 1, Processing).

    What a norm after attention divides by depends on all heads together, and is left out: only its gain is folded.
    """
    folded = fold_reads(weights, architecture)
    if weights.post_norm is None:
        return folded
    return dataclasses.replace(folded, W_O=folded.W_O * weights.post_norm.weight, post_norm=None)


def fold_embeddings(weights: EmbeddingWeights, architecture: Architecture) -> EmbeddingWeights:
    """Centre W_E and W_pos, and fold the final norm into W_U (its bias moves every logit alike for all sources)."""
    W_E, W_pos, W_U, centred = weights.W_E, weights.W_pos, weights.W_U, architecture.norm == "layernorm"
    if isinstance(W_U, StoredRows):
        norm = weights.final_norm
        W_U = W_U if norm is None else W_U.folded(norm.weight, norm.kind == "layernorm")
    elif W_U is not None:
        W_U, _ = _read_through(weights.final_norm, W_U, W_U.new_zeros(W_U.shape[-1]))
    if isinstance(W_E, StoredRows):
        W_E = W_E.folded(None, centred)
    elif W_E is not None:
        W_E = _write_centred(architecture.norm, W_E)
    return EmbeddingWeights(
        W_E=W_E,
        W_pos=None if W_pos is None else _write_centred(architecture.norm, W_pos),
        W_U=W_U,
        final_norm=None,
    )


def fold_mlp(weights: MLPWeights, architecture: Architecture) -> MLPWeights:
    """Fold the norm before an MLP into both of its reading weights and centre what it writes; one after it stays."""
    W_in, b_in = _read_through(weights.norm, weights.W_in, weights.b_in)
    W_linear, b_linear = weights.W_linear, weights.b_linear
    if W_linear is not None:
        bias = W_linear.new_zeros(W_linear.shape[-1]) if b_linear is None else b_linear
        W_linear, b_linear = _read_through(weights.norm, W_linear, bias)
    return dataclasses.replace(
        weights,
        W_in=W_in,
        b_in=b_in,
        W_linear=W_linear,
        b_linear=b_linear,
        W_out=_write_centred(architecture.norm, weights.W_out),
        b_out=_write_centred(architecture.norm, weights.b_out),
        norm=None,
    )
