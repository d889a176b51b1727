"""Words as the running model has them before each layer: the `stream` effective embedding (definitions: section 1).

A word stands behind short prefixes made of frequent words. Its mean residual stream there is taken as the row that
later layers read. None of the task's prompts is run.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.activations.batches import NEW_LINE
from ovqk.activations.forward import RunningModel
from ovqk.activations.parts import Steps
from ovqk.errors import UserError
from ovqk.tasks.lookup import WordLookup
from ovqk.tasks.matches import surface_form

PREFIXES, WORDS = 8, 3
"""How many prefixes a word stands behind, and how many words each has besides the start token."""
FREQUENT = 100
"""Prefixes are drawn from this many words, those with the lowest ids."""
AT_ONCE = 32
"""How many words run together, each behind every prefix."""


def draw_prefixes(tokenizer: Tokenizer, start: Sequence[int], barred: set[int]) -> Int[Tensor, "prefix position"]:
    """Draw the texts that words stand behind: start tokens, or a new line, and frequent beginnings of words.

    Ids run from frequent to rare in trained vocabularies. The same tokenizer always gives the same prefixes.

    Args:
        tokenizer: the model's tokenizer.
        start: the model's own start tokens.
        barred: tokens that no prefix may hold: the task's words.

    Raises:
        UserError: the vocabulary has too few words in lower case.
    """
    lookup, special = WordLookup(tokenizer, tokenizer.get_vocab_size()), set(tokenizer.get_added_tokens_decoder())
    frequent: list[int] = []
    for token in range(lookup.n_tokens):
        spaced, case, letters, _ = surface_form(tokenizer.id_to_token(token) or "")
        if letters and case == "lower" and spaced == lookup.marks_spaces and token not in barred | special:
            frequent.append(token)
        if len(frequent) == FREQUENT:
            break
    if len(frequent) < 2 * WORDS:
        raise UserError(
            f"analysis.embedding=stream: the tokenizer has {len(frequent)} words in lower case besides the task's, and "
            f"prefixes need {2 * WORDS}; allowed for this model: by_layer, token, block0."
        )
    rng = random.Random("prefixes")
    before = list(start) or lookup.encode(NEW_LINE).ids
    return torch.tensor([before + rng.sample(frequent, WORDS) for _ in range(PREFIXES)])


def read_streams(
    running: RunningModel, ids: Int[Tensor, " word"], prefixes: Int[Tensor, "prefix position"], steps: Steps
) -> Float[Tensor, "layer word d_model"]:
    """Return each word's residual stream before each layer, averaged over the prefixes; float32.

    Args:
        running: the model that runs.
        ids: the words' tokens.
        prefixes: the prefixes from `draw_prefixes`.
        steps: counts off batches.
    """
    parts = ids.split(AT_ONCE)
    return torch.cat([running.streams(prefixes, parts[n]) for n in steps(len(parts), "words in batch")], dim=1)
