"""Typed weights in one convention, with the norms folded in.

Row vectors, as in TransformerLens: the residual stream x [d_model] is read by x W_Q and written by z W_O.
Keys and values stay grouped: query head j reads KV head j // (n_heads / n_kv_heads).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import Norm, NormKind, QueryKeyNorm, normalise
from ovqk.weights.rotary import Rotary
from ovqk.weights.stored_rows import Rows, StoredRows

PositionKind = Literal["learned", "rotary", "none", "unsupported"]


Head = tuple[int, int]
"""A head's place: (layer, head)."""


@dataclass(frozen=True)
class Architecture:
    """A model's sizes and kinds that its heads' weights do not hold, the same for all its layers.

    Attributes:
        norm: the norm before attention and before the unembedding; `none` too if attention reads the bare stream.
        attention_scale: the factor that multiplies scores; None for 1 / sqrt(d_head), or if each layer has its own.
            For simulated attention, and scores on prompts.
        post_norm: a norm stands between attention and the residual stream.
        qk_norm: queries and keys are normalised, so that W_QK's scale does not reach the scores.
        parallel: a block's attention and MLP both read its input.
        tied: the unembedding is the transposed embedding.
        activation: the MLP's activation, by name; None if there is no MLP that ovqk reads.
        attn_coeff: the softmax's share of attention, in [0, 1]; the rest is 1 for every key that a query sees.
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
    attn_coeff: float = 1.0

    def normalised(self, rows: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalise residual-stream rows as the norm before attention does, but for its gain and bias."""
        return normalise(rows, self.norm, self.norm_eps)

    @cached_property
    def kv_of_head(self) -> Int[Tensor, " head"]:
        """The KV head that each query head reads."""
        return torch.arange(self.n_heads) // (self.n_heads // self.n_kv_heads)


@dataclass(frozen=True)
class LayerWeights:
    """One layer's attention weights, and its positions and norms as far as they differ from layer to layer.

    Attributes:
        norm: the norm before them; None once folded, or if there is none.
        post_norm: the norm between W_O and the residual stream (Gemma 2, OLMo 2); None once its gain is folded.
        qk_norm: the norm between W_Q, W_K and the scores.
        rotary: how queries and keys are rotated; None without rotary positions.
        sliding_window: how many tokens back a query sees, itself included; None for all.
        attention_scale: the factor that multiplies this layer's scores; None for the architecture's.
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
    attention_scale: float | None = None


def score_scale(weights: LayerWeights, architecture: Architecture) -> float:
    """Return the factor that multiplies a layer's scores."""
    return weights.attention_scale or architecture.attention_scale or architecture.d_head**-0.5


def mixed(scores: Float[Tensor, "*batch query key"], attn_coeff: float) -> Float[Tensor, "*batch query key"]:
    """Return attention: the softmax of scores times `attn_coeff`, and 1 - `attn_coeff` for every key in sight.

    The second part is 1 for a key and not 1 / keys, as in the models of Zhong et al. 2023 (arXiv:2306.17844). Scores of
    keys out of sight are -inf.
    """
    pattern = scores.softmax(-1)
    return pattern if attn_coeff == 1 else attn_coeff * pattern + (1 - attn_coeff) * (scores > -torch.inf)


def queries(weights: LayerWeights, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "head row d_head"]:
    """Return these rows' queries, normalised if the model does so, not yet rotated."""
    q = x @ weights.W_Q.to(x) + weights.b_Q.to(x)[:, None]
    return q if weights.qk_norm is None else weights.qk_norm.apply(q, weights.qk_norm.query_gain.to(x))


def keys(weights: LayerWeights, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "kv_head row d_head"]:
    """Return these rows' keys, normalised if the model does so, not yet rotated."""
    k = x @ weights.W_K.to(x) + weights.b_K.to(x)[:, None]
    return k if weights.qk_norm is None else weights.qk_norm.apply(k, weights.qk_norm.key_gain.to(x))


def split_heads(weight: Float[Tensor, "d_model columns"], n_heads: int) -> Float[Tensor, "head d_model d_head"]:
    """Return columns [d_model, head * d_head] as one block per head."""
    return weight.reshape(weight.shape[0], n_heads, -1).transpose(0, 1)


@dataclass(frozen=True)
class EmbeddingWeights:
    """Token and position embeddings and the unembedding; None for a matrix that the checkpoint does not hold.

    Attributes:
        W_U: [d_model, d_vocab]; if it stays in the checkpoint, its columns as rows.
        final_norm: the norm before W_U; None once folded, or if there is none.
    """

    W_E: Rows | None
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    W_U: Float[Tensor, "d_model d_vocab"] | StoredRows | None
    final_norm: Norm | None


@runtime_checkable
class WeightSource(Protocol):
    """Raw weights, one layer at a time, as the native families and the bridge both give them."""

    architecture: Architecture
    loaded_by: Literal["families", "bridge"]
    foldable: bool
    """False if the norms are not the plain pre-norm kind, so that folding would be wrong."""
    no_vocabulary: str | None
    """Why `embeddings` gives no W_E; None if it gives one, or if the checkpoint simply holds none."""
    notes: list[str]

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's raw attention weights.

        Raises:
            UserError: a tensor is missing, damaged, or holds NaN or infinity.
        """
        ...

    def embeddings(self) -> EmbeddingWeights:
        """Return the raw embeddings."""
        ...

    def first_mlp(self) -> MLPWeights | str:
        """Return block 0's MLP, or the reason why there is none to read."""
        ...


@dataclass(frozen=True)
class OpenedModel:
    """A model as opening its checkpoint gave it: weights that are read layer by layer, and a tokenizer.

    Attributes:
        source: its raw weights.
        label: its name in messages.
        tokenizer: None if the checkpoint holds none, or if nothing is to be read by it.
    """

    source: WeightSource
    label: str
    tokenizer: Tokenizer | None = None

    @property
    def n_tokens(self) -> int | None:
        """How many tokens the tokenizer knows; None without one. Embeddings may have more or fewer rows."""
        return None if self.tokenizer is None else self.tokenizer.get_vocab_size()
