"""Attention simulated from the weights: heads fed with effective embeddings instead of a running model's stream.

`Simulated` holds the inputs that all layers share. `attention` runs a layer's heads on random tokens that occur twice;
`Senders.margins` compares what a head looks for with what earlier heads move (definitions: sections 3 and 4).
Nothing here needs a task, a prompt or a forward pass. The model's own biases and norms for queries and keys apply, and
so do its rotary positions, attention scale, causal mask and sliding window.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ovqk.circuits.alignment import margin_by_source
from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.factors import Factors, key_side, query_side, scores
from ovqk.circuits.grams import blocks
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.weights.types import Architecture, LayerWeights, keys, mixed, queries, score_scale

TOKENS = 50  # different tokens in a sequence; each occurs twice
SEQUENCES = 8
SENDERS = 64
"""Earlier heads whose output is kept: those that attend most to the previous token, in simulation."""
SCORES_AT_A_TIME = 2**24  # elements of scores between a layer's heads and what the senders wrote


@dataclass(frozen=True)
class Simulated:
    """The inputs of simulated attention, as layer 0 (`token`) and later layers (`block0`) read them.

    Attributes:
        sequences: kind of effective embedding -> normalised rows [sequence, position, d_model]: random tokens, none
            twice, and the same tokens again. Learned positions are added to the embedding, before block 0 reads it.
        tokens: kind -> normalised rows [token, d_model] of as many random tokens without positions.
    """

    sequences: dict[str, Float[Tensor, "sequence position d_model"]]
    tokens: dict[str, Float[Tensor, "token d_model"]]

    @classmethod
    def of(
        cls,
        vocabulary: Vocabulary,
        W_pos: Float[Tensor, "n_ctx d_model"] | None,
        block0: Block0 | None,
        architecture: Architecture,
    ) -> "Simulated | None":
        """Draw the tokens, the same whenever it is called; None if vocabulary or context hold fewer than 3 tokens.

        Args:
            vocabulary: the folded embeddings.
            W_pos: learned positions; None without them.
            block0: the effective embedding of later layers; None if it cannot be had.
            architecture: the model's.
        """
        n_ctx = architecture.n_ctx if W_pos is None else len(W_pos)
        n = min(TOKENS, vocabulary.size, TOKENS if n_ctx is None else n_ctx // 2)
        if n < 3:
            return None
        generator = torch.Generator().manual_seed(0)
        ids = torch.stack([torch.randperm(vocabulary.size, generator=generator)[:n] for _ in range(SEQUENCES + 1)])
        rows = vocabulary.W_E[ids.flatten().to(vocabulary.W_E.device)].unflatten(0, ids.shape)
        placed = torch.cat([rows[1:], rows[1:]], 1)
        if W_pos is not None:
            placed = placed + W_pos[: 2 * n].to(placed)
        seen = {"token": (placed, rows[0])}
        if block0 is not None:
            seen["block0"] = block0.rows(placed.flatten(0, 1)).unflatten(0, placed.shape[:2]), block0.rows(rows[0])
        return cls(
            {kind: architecture.normalised(several) for kind, (several, _) in seen.items()},
            {kind: architecture.normalised(few) for kind, (_, few) in seen.items()},
        )

    @staticmethod
    def kind(layer: int) -> str:
        """Return the kind of effective embedding that a layer reads."""
        return "block0" if layer else "token"


def attention(
    weights: LayerWeights, architecture: Architecture, rows: Float[Tensor, "sequence position d_model"]
) -> dict[str, Float[Tensor, " head"]]:
    """Simulate where a layer's heads attend to, from the second copy of repeated tokens (definitions, section 4).

    Args:
        weights: the layer's weights, with the norm before attention folded in.
        architecture: the model's architecture.
        rows: the rows that the heads read: n normalised rows, then the same tokens' rows again, sequence by sequence.

    Returns:
        Mean attention, in [0, 1], over sequences and the n positions of the second copy. `qk_simulated_previous`: to
        the previous token. `qk_simulated_duplicate`: to the token's first copy. `qk_simulated_induction`: to the token
        after that copy. `qk_simulated_self`: to the token itself. `qk_simulated_first`: to the first token.
    """
    sequences, length, _ = rows.shape
    half = length // 2
    at = torch.arange(length, device=rows.device)
    q = queries(weights, rows[:, half:].flatten(0, 1)).unflatten(1, (sequences, length - half))
    k = keys(weights, rows.flatten(0, 1)).unflatten(1, (sequences, length))
    if weights.rotary is not None:
        cos, sin = (part.to(rows) for part in weights.rotary.angles(at.cpu()))
        q = weights.rotary.rotate(q, cos[half:], sin[half:])
        k = weights.rotary.rotate(k, cos, sin) / weights.rotary.scale  # the scale is that of queries and keys together
    scale = score_scale(weights, architecture)
    logits = scale * (q @ k[architecture.kv_of_head.to(k.device)].mT)
    seen = _seen(at[half:], at, weights.sliding_window)
    pattern = mixed(logits.masked_fill(~seen, -torch.inf), architecture.attn_coeff).mean(1)  # [head, query, key]
    query = at[:half]
    places = {
        "previous": half + query - 1,
        "duplicate": query,
        "induction": query + 1,
        "self": half + query,
        "first": torch.zeros_like(query),
    }
    return {f"qk_simulated_{name}": pattern[:, query, key].mean(-1) for name, key in places.items()}


def _seen(queries: Tensor, keys: Tensor, window: int | None) -> Bool[Tensor, "query key"]:
    """Return which keys a query sees: none after it, and none as far back as the window is wide."""
    back = queries[:, None] - keys
    return (back >= 0) if window is None else (back >= 0) & (back < window)


class Senders:
    """What earlier heads write for the probe's tokens: the SENDERS that attend most to the previous token."""

    def __init__(self) -> None:
        """Start before layer 0, without senders."""
        self._written: Tensor | None = None
        self._ranks: Tensor | None = None

    def add(self, factors: Factors, rows: Float[Tensor, "token d_model"], previous: Float[Tensor, " head"]) -> None:
        """Let a layer's heads send.

        Args:
            factors: the layer's OV circuits.
            rows: the probe's tokens as the layer reads them.
            previous: each head's simulated attention to the previous token; of equal ones the earlier head is kept.
        """
        ranks = previous if self._ranks is None else torch.cat([self._ranks, previous])
        kept = ranks.sort(descending=True, stable=True).indices[:SENDERS].sort().values
        before = 0 if self._written is None else len(self._written)
        mine = kept[kept >= before] - before
        written = (rows @ factors.left[mine]) @ factors.right[mine]
        if self._written is not None:
            written = torch.cat([self._written[kept[kept < before]], written])
        self._written, self._ranks = written, ranks[kept]

    def margins(
        self,
        weights: LayerWeights,
        architecture: Architecture,
        rows: Float[Tensor, "token d_model"],
        offsets: tuple[int, ...],
    ) -> Float[Tensor, " head"] | None:
        """Return `qk_composed_margin`: whether each head's queries find their own token where a sender moved it.

        Query token t scores (e_t W_QK) (e_u W_OV^s)^T on a key that holds the sender's output for token u, with the
        mean rotation over the offsets. The value is the margin of t = u (`margin_by_source`), averaged over tokens, for
        the sender with the largest one (docs/definitions.md, section 3); any number. None without senders.
        """
        if self._written is None:
            return None
        senders, n, _ = self._written.shape
        best: list[Tensor] = []
        each = max(1, SCORES_AT_A_TIME // (architecture.n_heads * n * n))
        for some in blocks(senders, each):
            keyed = self._written[some].flatten(0, 1)
            if weights.qk_norm is None:
                found = _unbiased(weights, architecture, rows, keyed, offsets)
            else:
                found = scores(weights, architecture, rows, keyed, offsets)
            by_sender = found.unflatten(-1, (-1, n)).transpose(1, 2)  # [head, sender, query, key]
            best.append(margin_by_source(by_sender).mean(-1).amax(-1))
        return torch.stack(best).amax(0)


def _unbiased(
    weights: LayerWeights, architecture: Architecture, query_rows: Tensor, key_rows: Tensor, offsets: tuple[int, ...]
) -> Float[Tensor, "head query key"]:
    """Return rows W_QK rows^T, with keys computed once for each KV group."""
    q = query_rows @ query_side(weights.W_Q, weights, offsets).to(query_rows)
    k = key_rows @ key_side(weights.W_K, weights).to(key_rows)
    return q @ k[architecture.kv_of_head.to(k.device)].mT
