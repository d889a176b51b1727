"""Training steps that hold the same weights, because a repository may serve one content under several revisions."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Json = Mapping[str, Any]


def shared_steps(records: Iterable[Json]) -> list[list[str]]:
    """Group models that are steps in one training and share a weights digest; each group is sorted by step.

    A model is in no group if it is not a step (`model.checkpoint` is not set) or if no other step has its weights.
    """
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for record in records:
        provenance = record["provenance"]
        model = (provenance.get("config") or {}).get("model") or {}
        if model.get("checkpoint") is not None and provenance.get("weights_digest"):
            training = str(model.get("repo"))
            found[training, provenance["weights_digest"]][record["model"]] = int(model["checkpoint"])
    groups = [sorted(steps, key=lambda name: steps[name]) for steps in found.values() if len(steps) > 1]
    return sorted(groups)


def twins(records: Iterable[Json]) -> dict[str, str]:
    """Return model -> the first step with the same weights, for steps that are not the first in their group."""
    return {name: group[0] for group in shared_steps(records) for name in group[1:]}


def said(group: list[str]) -> str:
    """Say that steps share their weights, and what follows."""
    first, *others = group
    return (
        f"{', '.join(others)}: the same weights as {first} (one digest): the repository serves one content for these "
        "steps, so they are one point of the training"
    )
