"""Reasons why no head of a model has a metric: they are in the record, and no value is made up."""

from collections.abc import Sequence

from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.config.schema import Circuit
from ovqk.metrics import METRICS, NOT_APPLICABLE, Needs, metric_names
from ovqk.weights.types import Architecture

NO_EMBEDDING = "the checkpoint has no token embedding"
NO_UNEMBEDDING = "the checkpoint has no unembedding"
NO_LATER_LAYER = "the model has no layer after the first"
MIN_TOKENS = 21  # with fewer, the ends of a row hold most of it
MIN_POSITIONS = 4  # fewer leave no degree of freedom for an offset fit


def unavailable_metrics(
    circuits: Sequence[Circuit],
    architecture: Architecture,
    vocabulary: Vocabulary | None,
    n_positions: int | None,
    block0: Block0 | str,
    why_no_embedding: str,
    diagonals: bool = False,
) -> dict[str, str]:
    """Say why a metric is missing for every head: metric -> reason, for these circuits' metrics.

    Args:
        circuits: the circuits that the analysis takes apart.
        architecture: the model's.
        vocabulary: its embeddings; None if the checkpoint holds none.
        n_positions: how many learned positions there are; None without them.
        block0: the effective embedding that later layers read, or why there is none.
        why_no_embedding: why there is no vocabulary, if there is none.
        diagonals: whether the analysis ranks the full circuits' diagonals.
    """

    def needing(need: Needs) -> list[str]:
        return [name for name in metric_names(circuits) if need in METRICS[name].needs]

    no_embedding = why_no_embedding if vocabulary is None else None
    no_unembedding = no_embedding if vocabulary is None else why_no_unembedding(vocabulary)
    few_tokens = None
    if vocabulary is not None and vocabulary.size < MIN_TOKENS:
        few_tokens = f"{vocabulary.size} tokens: the ends of a column, of 10 each, are all of it"
    positions = _position_reasons(architecture, n_positions)
    reasons: dict[str, str] = {}
    for name in metric_names(circuits):
        found = [
            reason
            for need, reason in {
                **positions,  # what does not apply to the model comes before what is missing
                "embedding": no_embedding,
                "diagonals": few_tokens if diagonals else f"{NOT_APPLICABLE}analysis.diagonals is false",
                "unembedding": no_unembedding,
            }.items()
            if need in METRICS[name].needs and reason
        ]
        if found:
            reasons[name] = found[0]
    if architecture.qk_norm:
        for name in needing("scale"):
            reasons[name] = f"{NOT_APPLICABLE}queries and keys are normalised: no scale of the weights reaches a score"
    few = n_positions is not None and n_positions < MIN_POSITIONS
    if few:
        reasons |= dict.fromkeys(
            needing("offsets"),
            f"{n_positions} positions are too few for a fit by offset",
        )
    if not architecture.causal:
        for name in needing("offsets"):
            reasons.setdefault(name, "attention is not causal: keys follow queries too")
    for name in needing("block0"):
        if isinstance(block0, str):
            reasons.setdefault(name, block0)
        elif architecture.n_layers == 1:
            reasons.setdefault(name, f"{NOT_APPLICABLE}{NO_LATER_LAYER}")
    return reasons


def why_no_unembedding(vocabulary: Vocabulary) -> str | None:
    """Say why there is no unembedding with a column for each token; None if there is one."""
    if vocabulary.W_U_rows is not None:
        return None
    if vocabulary.some_W_U_rows is None:
        return NO_UNEMBEDDING
    return f"the unembedding has columns for {vocabulary.some_W_U_rows.shape[0]:,} of {vocabulary.size:,} tokens"


def _position_reasons(architecture: Architecture, n_positions: int | None) -> dict[str, str | None]:
    kind = architecture.positions
    unknown = {
        "none": "the model has no learned or rotary positions",
        "unsupported": "ovqk does not know how this model encodes positions",
    }.get(kind)
    missing = "the checkpoint has no position embedding" if kind == "learned" and n_positions is None else None
    return {
        "positions": unknown or missing,
        "learned": missing if kind == "learned" else unknown or f"{NOT_APPLICABLE}the model has {kind} positions",
        "rotary": None if kind == "rotary" else unknown or f"{NOT_APPLICABLE}the model has {kind} positions",
    }
