"""What the vocabulary contributes to every head: Gram matrices, computed once per model, and effective embeddings.

A softmax cannot see a constant added to every token, so all of it is centred over tokens: C = I - 11^T/V.
Token ids beyond the tokenizer's vocabulary (padding rows) are left out of C, of the Grams and of V.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ovqk.heads import ov_factors
from ovqk.weights import Architecture, EmbeddingWeights, LayerWeights, MLPWeights, apply_norm, normalise

BLOCK = 8192  # tokens handled at a time

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}


@dataclass(frozen=True)
class Vocabulary:
    """Folded embeddings of the real tokens, and the Grams that serve every head.

    Attributes:
        W_E: folded embedding rows.
        W_U: folded unembedding columns; None where the checkpoint holds none.
        mean: mean row of W_E.
        gram_embed: G_QK = W_E^T C W_E.
        gram_cross: G_OV = W_U C W_E.
        gram_unembed: W_U C W_U^T.
    """

    W_E: Float[Tensor, "token d_model"]
    W_U: Float[Tensor, "d_model token"] | None
    mean: Float[Tensor, " d_model"]
    gram_embed: Float[Tensor, "d_model d_model"]
    gram_cross: Float[Tensor, "d_model d_model"] | None
    gram_unembed: Float[Tensor, "d_model d_model"] | None

    @property
    def size(self) -> int:
        """V: the number of real tokens."""
        return self.W_E.shape[0]


def read_vocabulary(embeddings: EmbeddingWeights, n_tokens: int | None) -> Vocabulary:
    """Grams of a model's folded embeddings over its first `n_tokens` ids (all, where None).

    Raises:
        ValueError: there is no W_E.
    """
    if embeddings.W_E is None:
        raise ValueError("a vocabulary needs W_E")
    W_E = embeddings.W_E[:n_tokens]
    W_U = None if embeddings.W_U is None else embeddings.W_U[:, :n_tokens]
    gram_embed = centred_gram(W_E, W_E)
    gram_cross = None if W_U is None else centred_gram(W_U.T, W_E)
    gram_unembed = None if W_U is None else centred_gram(W_U.T, W_U.T)
    return Vocabulary(W_E, W_U, _mean_rows(W_E), gram_embed, gram_cross, gram_unembed)


def centred_gram(a: Float[Tensor, "token d_a"], b: Float[Tensor, "token d_b"]) -> Float[Tensor, "d_a d_b"]:
    """a^T C b in float64 over blocks of tokens: float32 products cost 1e-3 on ratios of small vocabularies."""
    mean_a, mean_b = _mean_rows(a), _mean_rows(b)
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows in blocks(a.shape[0]):
        total += (a[rows].double() - mean_a).T @ (b[rows].double() - mean_b)
    return total


def _mean_rows(x: Float[Tensor, "token d"]) -> Float[Tensor, " d"]:
    return x.mean(0, dtype=torch.float64)


def blocks(n: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover range(n), `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class Block0:
    """The `block0` effective embedding: what later layers see of a token that attended only to itself.

        E = r + MLP0(ln2(r)),   r = W_E + sum over heads of ln1(W_E) W_V W_O   (block 0)

    Without positions, b_V and b_O; MLP biases kept. An attention-only model has E = r. In a parallel block the MLP
    reads W_E too; a norm after attention or MLP is applied to what it writes.
    """

    def __init__(self, layer0: LayerWeights, mlp: MLPWeights | None, architecture: Architecture) -> None:
        """Take block 0's attention and MLP weights, their reads folded (`fold_reads`, `fold_mlp`)."""
        self.factors, self.post_norm = ov_factors(layer0, architecture), layer0.post_norm
        self.mlp, self.architecture = mlp, architecture

    def rows(self, W_E: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """E for these rows of the folded embedding."""
        kind, eps = self.architecture.norm, self.architecture.norm_eps
        read = torch.einsum("td,hdk->thk", normalise(W_E, kind, eps), self.factors.left)
        stream = W_E + apply_norm(self.post_norm, torch.einsum("thk,hkd->td", read, self.factors.right), eps)
        if self.mlp is None:
            return stream
        x = normalise(W_E if self.architecture.parallel else stream, kind, eps)
        hidden = ACTIVATIONS[self.mlp.activation](x @ self.mlp.W_in + self.mlp.b_in)
        if self.mlp.W_linear is not None:
            hidden = hidden * (x @ self.mlp.W_linear)
        return stream + apply_norm(self.mlp.post_norm, hidden @ self.mlp.W_out + self.mlp.b_out, eps)

    def grams(
        self, vocabulary: Vocabulary
    ) -> tuple[
        Float[Tensor, "d_model d_model"], Float[Tensor, "d_model d_model"] | None, Float[Tensor, "d_model d_model"]
    ]:
        """E^T C E, W_U C E (None without an unembedding) and W_E^T C E, a block of tokens at a time."""
        W_E, W_U = vocabulary.W_E, vocabulary.W_U
        n, d_model = W_E.shape
        second, cross, plain = (torch.zeros(d_model, d_model, dtype=torch.float64, device=W_E.device) for _ in range(3))
        total = torch.zeros(d_model, dtype=torch.float64, device=W_E.device)
        for rows in blocks(n, BLOCK // 4):
            embedded = self.rows(W_E[rows]).double()
            second += embedded.T @ embedded
            plain += W_E[rows].double().T @ embedded
            total += embedded.sum(0)
            if W_U is not None:
                cross += W_U[:, rows].double() @ embedded
        gram = second - torch.outer(total, total) / n
        plain -= torch.outer(vocabulary.mean.double(), total)
        if W_U is None:
            return gram, None, plain
        return gram, cross - torch.outer(W_U.double().mean(1), total), plain
