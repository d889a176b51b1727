"""One-layer models that add modulo p, run on all pairs: how they get from two residues to their sum.

Gradient symmetricity and distance irrelevance are defined as in Zhong et al. 2023, arXiv:2306.17844. The models are
files with TransformerLens names; they have no norms, and their MLP has ReLUs. The answer is read at the last token.
"""

import itertools
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.errors import UserError

AT_ONCE = 4096
"""How many inputs run together."""
NEEDED = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out")


class OneBlock:
    """One attention layer and a ReLU MLP, without norms, between embedding and unembedding; float64.

    Attributes:
        attention_rate: the share of learned attention; the rest is 1 for every key (Zhong et al. 2023: 1 is an ordinary
            transformer, and 0 attends to all tokens alike).
    """

    def __init__(self, checkpoint: Checkpoint, attention_rate: float = 1.0) -> None:
        """Read all weights; a bias that the file does not hold is 0.

        Raises:
            UserError: the file is no such model: a weight is missing, or there are two layers, or a norm.
        """
        if "blocks.1.attn.W_Q" in checkpoint or "blocks.0.ln1.w" in checkpoint:
            raise UserError(f"{checkpoint.label}: must be one layer without norms, to be run here.")
        for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U", *(f"blocks.0.{part}" for part in NEEDED)):
            if name not in checkpoint:
                raise checkpoint.missing(name)
        self.attention_rate = attention_rate
        self.W_E, self.W_pos, self.W_U = (
            checkpoint.tensor(name).double() for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U")
        )
        self.W_Q, self.W_K, self.W_V, self.W_O, self.W_in, self.b_in, self.W_out, self.b_out = (
            checkpoint.tensor(f"blocks.0.{part}").double() for part in NEEDED
        )
        shapes = {"b_Q": self.W_Q[:, 0], "b_K": self.W_K[:, 0], "b_V": self.W_V[:, 0], "b_O": self.W_O[0, 0]}
        self.biases = {
            name: checkpoint.tensor(f"blocks.0.attn.{name}").double()
            if f"blocks.0.attn.{name}" in checkpoint
            else torch.zeros_like(like)
            for name, like in shapes.items()
        }
        self.b_U = checkpoint.tensor("unembed.b_U").double() if "unembed.b_U" in checkpoint else self.W_U.new_zeros(())

    def logits(self, rows: Float[Tensor, "input position d_model"]) -> Float[Tensor, "input token"]:
        """Return the logits at the last position for embedding rows to which positions are not yet added."""
        x = rows + self.W_pos[: rows.shape[1]]
        biases = self.biases
        query = torch.einsum("id,hdz->ihz", x[:, -1], self.W_Q) + biases["b_Q"]
        key = torch.einsum("ipd,hdz->ihpz", x, self.W_K) + biases["b_K"][:, None]
        value = torch.einsum("ipd,hdz->ihpz", x, self.W_V) + biases["b_V"][:, None]
        scores = torch.einsum("ihz,ihpz->ihp", query, key) / self.W_Q.shape[-1] ** 0.5
        pattern = self.attention_rate * scores.softmax(-1) + (1 - self.attention_rate)
        z = torch.einsum("ihp,ihpz->ihz", pattern, value)
        stream = x[:, -1] + torch.einsum("ihz,hzd->id", z, self.W_O) + biases["b_O"]
        stream = stream + (stream @ self.W_in + self.b_in).relu() @ self.W_out + self.b_out
        return stream @ self.W_U + self.b_U


def inputs(pairs: Int[Tensor, "input two"], query: int | None) -> Int[Tensor, "input position"]:
    """Return token ids for pairs of residues, followed by the token at which the answer is read, if there is one."""
    if query is None:
        return pairs
    return torch.cat([pairs, torch.full((len(pairs), 1), query)], 1)


def logits_of_pairs(block: OneBlock, p: int, query: int | None = None) -> Float[Tensor, "a b residue"]:
    """Return the p residues' logits for all pairs of residues.

    Raises:
        UserError: the model has fewer tokens than residues.
    """
    known = min(len(block.W_E), block.W_U.shape[1])
    if known < p or (query is not None and query >= len(block.W_E)):
        raise UserError(f"modulus={p}: the model has {known} tokens.")
    tokens = inputs(torch.cartesian_prod(torch.arange(p), torch.arange(p)), query)
    found = [block.logits(block.W_E[some])[:, :p] for some in tokens.split(AT_ONCE)]
    return torch.cat(found).view(p, p, p)


def accuracy(logits: Float[Tensor, "a b residue"]) -> float:
    """Return the share of pairs for which (a + b) mod p has the largest logit, in [0, 1]."""
    p = len(logits)
    a = torch.arange(p)
    return float((logits.argmax(-1) == (a[:, None] + a) % p).double().mean())


def distance_irrelevance(logits: Float[Tensor, "a b residue"]) -> float:
    """Return how little the right answer's logit depends on a - b, in [0, 1]; Zhong et al. 2023.

    Put the logits for (a + b) mod p in a matrix over a + b and a - b. Take the standard deviation over a + b, average
    it over a - b, and divide by the whole matrix's standard deviation. p is odd, so that each place is taken once. The
    result is nan if the matrix is constant.
    """
    p = len(logits)
    a = torch.arange(p)
    total, difference = (a[:, None] + a) % p, (a[:, None] - a) % p
    correct = logits.gather(-1, total[..., None])[..., 0]
    matrix = torch.full_like(correct, torch.nan)
    matrix[total, difference] = correct
    whole = matrix.std(correction=0)
    return float(matrix.std(0, correction=0).mean() / torch.where(whole > 0, whole, torch.nan))


def gradient_symmetricity(block: OneBlock, triples: Sequence[tuple[int, int, int]], query: int | None = None) -> float:
    """Return the mean cosine of a logit's gradients with respect to both summands' embeddings; Zhong et al. 2023.

    It lies in [-1, 1], and is 1 if the model uses only the two embeddings' sum.

    Args:
        block: the model.
        triples: (a, b, c): the logit for c on the input a, b.
        query: the token after a and b at which the answer is read, if there is one.
    """
    cosines = []
    for some in torch.tensor(list(triples)).split(AT_ONCE):
        rows = block.W_E[inputs(some[:, :2], query)].requires_grad_()
        chosen = block.logits(rows).gather(1, some[:, 2:]).sum()
        (gradient,) = torch.autograd.grad(chosen, rows)
        cosines.append(torch.cosine_similarity(gradient[:, 0], gradient[:, 1], dim=-1))
    return float(torch.cat(cosines).mean())


def every_triple(p: int) -> list[tuple[int, int, int]]:
    """Return all triples of residues (a, b, c), in order."""
    return list(itertools.product(range(p), repeat=3))  # type: ignore[arg-type]


def drawn_triples(p: int, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Draw (a, b, c) without replacement, with Python's generator, so that others can draw the same sample."""
    return random.Random(seed).sample(every_triple(p), count)
