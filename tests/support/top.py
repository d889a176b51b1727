"""The search for a word's own logit in the whole vocabulary's top 5, begun and ended in one call."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits.alignment import TopSearch, settle
from ovqk.circuits.factors import Factors
from ovqk.weights.stored_rows import Rows


def in_top_by_source(
    factors: Factors,
    rows: Float[Tensor, "word d_model"],
    ids: Int[Tensor, " word"],
    W_U_rows: Rows,
    signs: Sequence[int] = (1, -1),
) -> list[Float[Tensor, "head word"]]:
    """1 for each word whose own logit is in the vocabulary's top 5 and 0 for others, under W_OV times each sign."""
    search = TopSearch((rows @ factors.left) @ factors.right, ids, W_U_rows[ids], signs)
    settle([search], W_U_rows)
    return search.found()
