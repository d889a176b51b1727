"""Attention on repeated sequences of random tokens (definitions: section 7).

On a task's prompts a head's attention may depend on their words. In a repeated sequence of random tokens only places
can matter: the previous token, the same token's earlier occurrence, and the token after that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.activations.forward import Places, RunningModel
from ovqk.activations.parts import REPEATS, Steps
from ovqk.config.schema import Repeats

SEQUENCES, LENGTH, SHORTEST = 64, 20, 4
"""How many sequences are drawn, and the largest and smallest number of tokens in one copy."""
AT_ONCE = 16

PerSequence = Float[Tensor, "sequence layer head"]


@dataclass(frozen=True)
class RepeatValues:
    """All heads' mean attention from the tokens in a sequence's second copy, in [0, 1].

    Attributes:
        attention: place -> attention to it.
        control: mean attention to the earlier tokens at none of these places, without start tokens.
        sink: attention to the first token.
        testing: whether a sequence belongs to the testing half.
        tokens: the sequences: the start tokens and two copies.
    """

    attention: dict[Repeats, PerSequence]
    control: PerSequence
    sink: PerSequence
    testing: Bool[Tensor, " sequence"]
    tokens: Int[Tensor, "sequence position"]


def draw_repeats(
    tokenizer: Tokenizer, start: Sequence[int], n_ctx: int | None, seed: int
) -> Int[Tensor, "sequence position"] | None:
    """Draw sequences, uniformly from the tokenizer's tokens except special ones.

    Args:
        tokenizer: the model's tokenizer.
        start: the token ids before each sequence.
        n_ctx: the model's context length; None if it is unlimited.
        seed: the seed for the draws.

    Returns:
        Token ids: the start tokens and two copies. None if the context or the vocabulary is too small.
    """
    special = set(tokenizer.get_added_tokens_decoder())
    known = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - special))
    length = LENGTH if n_ctx is None else min(LENGTH, (n_ctx - len(start)) // 2)
    if length < SHORTEST or len(known) < 2 * LENGTH:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = [known[torch.randperm(len(known), generator=generator)[:length]] for _ in range(SEQUENCES)]
    before = torch.tensor(list(start), dtype=torch.long)
    return torch.stack([torch.cat([before, one, one]) for one in drawn])


def run_repeats(
    running: RunningModel, tokens: Int[Tensor, "sequence position"], n_start: int, steps: Steps, what: str = REPEATS
) -> RepeatValues:
    """Run sequences, and read attention from the second copy without its first and its last token.

    Args:
        running: the model that runs.
        tokens: the sequences, as `draw_repeats` returns them.
        n_start: how many start tokens stand before the first copy.
        steps: counts off batches.
        what: the steps' name.
    """
    length = (tokens.shape[1] - n_start) // 2
    queries = torch.arange(n_start + length + 1, n_start + 2 * length - 1)
    places = {Repeats.previous: queries - 1, Repeats.same: queries - length, Repeats.next: queries - length + 1}
    others = torch.arange(tokens.shape[1])[None] < queries[:, None]
    others[:, :n_start] = False
    rows = torch.arange(len(queries))
    for place in places.values():
        others[rows, place] = False
    share = others / others.sum(1, keepdim=True)
    found: dict[Repeats | str, list[Tensor]] = {name: [] for name in (*places, "control", "sink")}
    for number in steps(-(-len(tokens) // AT_ONCE), what):
        part = tokens[number * AT_ONCE : (number + 1) * AT_ONCE]
        every = queries[:, None].expand(-1, len(part))
        pattern = running.run(part, Places(every, every[:1])).patterns  # [layer, sequence, head, query, key]
        for name, place in places.items():
            found[name].append(pattern[:, :, :, rows, place].mean(-1).transpose(0, 1))
        found["control"].append(torch.einsum("lshqk,qk->slh", pattern, share) / len(queries))
        found["sink"].append(pattern[..., 0].mean(-1).transpose(0, 1))
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    return RepeatValues(
        attention={name: whole[name] for name in places},
        control=whole["control"],
        sink=whole["sink"],
        testing=torch.arange(len(tokens)) >= len(tokens) // 2,
        tokens=tokens,
    )
