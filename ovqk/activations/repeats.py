"""Random tokens that come twice: where heads look with no text around (definitions: section 7).

What a head does on a task's prompts may be tied to their words. On a sequence of random tokens that is repeated only
the places are left to go by: the token before, the earlier occurrence of the same token, and the token after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.activations.forward import Places, RunningModel
from ovqk.activations.quantities import Steps
from ovqk.config.schema import Repeats

SEQUENCES, LENGTH, SHORTEST = 64, 20, 4
"""Sequences, half of them for each half; tokens of one before it repeats, at most and at least."""
AT_ONCE = 16

PerSequence = Float[Tensor, "sequence layer head"]


@dataclass(frozen=True)
class RepeatValues:
    """Attention of all heads from the tokens of a sequence's second copy, on average over them.

    Attributes:
        attention: to each place.
        control: to the tokens before that are at none of these places, on average; start tokens aside.
        sink: to the first token of all.
        testing: whether a sequence is of the testing half.
        tokens: the sequences, the start's tokens and two copies.
    """

    attention: dict[Repeats, PerSequence]
    control: PerSequence
    sink: PerSequence
    testing: Bool[Tensor, " sequence"]
    tokens: Int[Tensor, "sequence position"]


def draw_repeats(
    tokenizer: Tokenizer, start: Sequence[int], n_ctx: int | None, seed: int
) -> Int[Tensor, "sequence position"] | None:
    """Draw sequences, uniformly among the tokens that a tokenizer knows but for special ones.

    Args:
        tokenizer: the model's.
        start: the tokens before each sequence.
        n_ctx: the model's context.
        seed: of the draws.

    Returns:
        Tokens, the start's and two copies; None if the context or the vocabulary is too small for them.
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
    running: RunningModel, tokens: Int[Tensor, "sequence position"], n_start: int, steps: Steps
) -> RepeatValues:
    """Run sequences and read where heads look from the second copy, its first and its last token aside.

    Args:
        running: the model that runs.
        tokens: of `draw_repeats`.
        n_start: how many of them stand before the first copy.
        steps: counts off batches.
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
    for number in steps(-(-len(tokens) // AT_ONCE), "batch of random repeats"):
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
