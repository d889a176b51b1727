"""One-layer models that add or subtract modulo p, run on all pairs of residues (definitions: section 7).

Gradient symmetricity and distance irrelevance are defined as in Zhong et al. 2023, arXiv:2306.17844. The models are
files with TransformerLens names; they have no norms, and their MLP has ReLUs. The answer is read at the last token.
"""

import itertools
import math
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.errors import UserError
from ovqk.tasks.cycle import Cycle
from ovqk.weights.types import mixed

AT_ONCE = 4096
"""How many inputs run together."""
TRIPLES = 10_000
"""How many triples (a, b, c) the gradients of a cell are averaged over; all, if there are fewer."""
NEEDED = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out")
REFUSED = (
    "blocks.1.attn.W_Q", "blocks.0.ln1.w", "blocks.0.ln2.w", "ln_final.w", "blocks.0.mlp.W_gate", "blocks.0.mlp.ln.w",
)  # fmt: skip
"""Weights that such a model does not have: its numbers would be wrong without them."""


class OneBlock:
    """One attention layer and a ReLU MLP, without norms, between embedding and unembedding; float64.

    Attributes:
        attn_coeff: the softmax's share of attention; the rest is 1 for every key in sight (Zhong et al. 2023: 1 is an
            ordinary transformer, and 0 attends to all tokens alike).
    """

    def __init__(self, checkpoint: Checkpoint, attn_coeff: float = 1.0) -> None:
        """Read all weights; a bias that the file does not hold is 0.

        Raises:
            UserError: the file is no such model: its names are others, a weight is missing, or there are two layers, a
                norm or a gate.
        """
        if "embed.W_E" not in checkpoint or any(name in checkpoint for name in REFUSED):
            raise UserError(
                f"{checkpoint.label}: must be a file of TransformerLens names, one layer without norms whose MLP has "
                "no gate, to be run here."
            )
        for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U", *(f"blocks.0.{part}" for part in NEEDED)):
            if name not in checkpoint:
                raise checkpoint.missing(name)
        self.attn_coeff = attn_coeff
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
        z = torch.einsum("ihp,ihpz->ihz", mixed(scores, self.attn_coeff), value)
        stream = x[:, -1] + torch.einsum("ihz,hzd->id", z, self.W_O) + biases["b_O"]
        stream = stream + (stream @ self.W_in + self.b_in).relu() @ self.W_out + self.b_out
        return stream @ self.W_U + self.b_U


def logits_of_pairs(block: OneBlock, cycle: Cycle) -> Float[Tensor, "a b residue"]:
    """Return the p residues' logits for all pairs of residues.

    Raises:
        UserError: the model has fewer tokens than residues, or fewer positions than an input.
    """
    p, known = cycle.p, min(len(block.W_E), block.W_U.shape[1])
    extra = [token for token in (cycle.query, cycle.between) if token is not None]
    if int(cycle.ids.max()) >= known or max(extra, default=0) >= len(block.W_E):
        raise UserError(f"modulus={p}: the model has {known} tokens.")
    if cycle.length > len(block.W_pos):
        raise UserError(f"an input has {cycle.length} tokens, and the model {len(block.W_pos)} positions.")
    tokens = cycle.inputs(torch.cartesian_prod(torch.arange(p), torch.arange(p)))
    found = [block.logits(block.W_E[some])[:, cycle.ids] for some in tokens.split(AT_ONCE)]
    return torch.cat(found).view(p, p, p)


def accuracy(logits: Float[Tensor, "a b residue"], cycle: Cycle) -> float:
    """Return the share of pairs whose right answer has the largest logit, in [0, 1]."""
    return float((logits.argmax(-1) == cycle.answers()[0]).double().mean())


def distance_irrelevance(logits: Float[Tensor, "a b residue"], cycle: Cycle) -> float:
    """Return how little the right answer's logit depends on a - b, in [0, 1]; Zhong et al. 2023.

    Put the right answers' logits in a matrix over a + b and a - b. Take the standard deviation over a + b, average it
    over a - b, and divide by the whole matrix's standard deviation. p is odd, so that each place is taken once. If the
    operator is `-`, a + b and a - b change places. The result is nan if the matrix is constant.
    """
    answer, other = cycle.answers()
    correct = logits.gather(-1, answer[..., None])[..., 0]
    matrix = torch.full_like(correct, torch.nan)
    matrix[answer, other] = correct
    whole = matrix.std(correction=0)
    return float(matrix.std(0, correction=0).mean() / torch.where(whole > 0, whole, torch.nan))


def symmetricities(block: OneBlock, triples: Sequence[tuple[int, int, int]], cycle: Cycle) -> Float[Tensor, " triple"]:
    """Return the cosine of a logit's gradients with respect to both operands' embeddings; Zhong et al. 2023.

    Their mean is the gradient symmetricity. It lies in [-1, 1], and is 1 if the model uses only the two embeddings'
    sum. The operator does not change it.

    Args:
        block: the model.
        triples: (a, b, c): the logit for c on the input a, b.
        cycle: the residues as tokens.
    """
    cosines = []
    first, second = cycle.places
    for some in torch.tensor(list(triples)).split(AT_ONCE):
        rows = block.W_E[cycle.inputs(some[:, :2])].requires_grad_()
        chosen = block.logits(rows).gather(1, cycle.ids[some[:, 2:]]).sum()
        (gradient,) = torch.autograd.grad(chosen, rows)
        cosines.append(torch.cosine_similarity(gradient[:, first], gradient[:, second], dim=-1))
    return torch.cat(cosines)


def every_triple(p: int) -> list[tuple[int, int, int]]:
    """Return all triples of residues (a, b, c), in order."""
    return list(itertools.product(range(p), repeat=3))  # type: ignore[arg-type]


def drawn_triples(p: int, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Draw (a, b, c) without replacement, with Python's generator, so that others can draw the same sample."""
    return random.Random(seed).sample(every_triple(p), count)


def results_of_pairs(block: OneBlock, cycle: Cycle, seed: int) -> dict[str, float]:
    """Run all pairs, and return accuracy, distance irrelevance and gradient symmetricity (definitions: section 7).

    The last is a mean over TRIPLES drawn triples; `_se` is its standard error, 0 if there are no more triples than
    those. An even modulus has no distance irrelevance, because pairs then share a + b and a - b.
    """
    logits, p = logits_of_pairs(block, cycle), cycle.p
    every = p**3
    triples = every_triple(p) if every <= TRIPLES else drawn_triples(p, TRIPLES, seed)
    cosines = symmetricities(block, triples, cycle)
    found = {"pairs/accuracy": accuracy(logits, cycle)}
    if p % 2 and math.isfinite(irrelevance := distance_irrelevance(logits, cycle)):
        found["pairs/distance_irrelevance"] = irrelevance
    spread = float(cosines.std()) * math.sqrt((1 - len(triples) / every) / len(triples))
    return found | {"pairs/gradient_symmetricity": float(cosines.mean()), "pairs/gradient_symmetricity_se": spread}
