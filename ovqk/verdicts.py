"""What the weights say of each claim: one verdict per claimed head and per role (definitions: section 6).

The first line that matches wins:

    out_of_scope   the role predicts nothing of the weights
    untestable     the primary metric is unavailable, or no null can reach p <= 0.05
    contradicted   significantly opposite under a counting null, and significant under none
    corroborated   significant under every testable counting null, nothing secondary significantly opposite
    partial        significant under at least one
    unsupported    none of these
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovqk.claims import Claims, Head
from ovqk.metrics import METRICS
from ovqk.nulls import ALPHA, Predicted

COUNTING = {"role": ("layer",), "head": ("depth",)}
"""The nulls that decide, of those drawn."""

VERDICTS = ("corroborated", "partial", "unsupported", "contradicted", "untestable", "out_of_scope")

NOT_ESTABLISHED = (
    "It does not establish that the model does this on task inputs, nor that the head is necessary: it is a statement "
    "about the direct path through the weights."
)
MEANS = {
    "corroborated": "The weights could do this: {metric} is {direction} against {against} ({evidence}).",
    "partial": "Some evidence that the weights could do this: {metric} is {direction} against {against} ({evidence}).",
    "unsupported": "The weights do not single this out: {metric} is not {direction} against {against} ({evidence}).",
    "contradicted": "The weights point the other way: {metric} is not {direction} but the opposite against {against} "
    "({evidence}).",
}
AGAINST = {"layer": "the unclaimed heads of the same layers", "depth": "the unclaimed heads of nearby layers"}


@dataclass(frozen=True)
class Subject:
    """What a verdict is about: a role, or one of its heads."""

    role: str
    head: Head | None

    @property
    def kind(self) -> str:
        """`role` or `head`."""
        return "role" if self.head is None else "head"


def judge(
    subject: Subject, predicted: Sequence[Predicted], rows: Sequence[Mapping[str, Any]], reason: str | None
) -> dict[str, Any]:
    """One row of verdicts.parquet.

    Args:
        subject: the role or head.
        predicted: its role's predictions, the primary first.
        rows: the rows of tests.parquet about it.
        reason: why the primary metric has no value, where it has none.
    """
    counting = [row for row in rows if row["null"] in COUNTING[subject.kind] and not row["exploratory"]]
    primary = [row for row in counting if row["primary"]]
    testable = [row for row in primary if row["testable"]]
    opposite = any(row["q_opposite"] < ALPHA for row in counting)
    held = [row for row in testable if row["q"] < ALPHA]
    why = ""
    if not predicted:
        verdict, why = "out_of_scope", "the role predicts nothing of the weights"
    elif not primary:
        verdict, why = "untestable", reason or "the primary metric has no value for it"
    elif not testable:
        verdict = "untestable"
        why = f"no null can reach p <= {ALPHA}: the smallest p with {_sizes(primary)} is {primary[0]['min_p']:.3g}"
    elif not held and any(row["q_opposite"] < ALPHA for row in testable):
        verdict = "contradicted"
    elif len(held) == len(testable) and not opposite:
        verdict = "corroborated"
    elif held:
        verdict = "partial"
    else:
        verdict = "unsupported"
        if all(row["min_q"] >= ALPHA for row in testable):
            why = (
                f"it cannot be significant alone: with these comparisons q cannot fall below {testable[0]['min_q']:.2g}"
            )
    first = next(iter(testable or primary), None)
    # Of a head, the percentile is its place in its own layer, whichever null decides.
    placed = next((row for row in rows if row["primary"] and row["null"] == "layer"), first)
    return {
        "kind": subject.kind,
        "role": subject.role,
        "layer": None if subject.head is None else subject.head[0],
        "head": None if subject.head is None else subject.head[1],
        "verdict": verdict,
        "primary": predicted[0].config.metric if predicted else None,
        "prediction": predicted[0].config.direction.value if predicted else None,
        "value": first["value"] if first else None,
        "percentile": placed["percentile"] if placed else None,
        "effect": first["effect"] if first else None,
        "p": first["p"] if first else None,
        "q": first["q"] if first else None,
        "min_q": first["min_q"] if first else None,
        "nulls": ", ".join(row["null"] for row in testable),
        "flags": "mixed" if verdict == "partial" and opposite else "",
        "reason": why,
        "establishes": _statement(verdict, predicted, first, why),
        "does_not_establish": "" if verdict in ("untestable", "out_of_scope") else NOT_ESTABLISHED,
    }


def _sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    row = rows[0]
    heads = "1 claimed head" if row["n_heads"] == 1 else f"{row['n_heads']} claimed heads"
    return f"{heads} among {row['n_others']} others"


def _statement(verdict: str, predicted: Sequence[Predicted], row: Mapping[str, Any] | None, why: str) -> str:
    if verdict not in MEANS or row is None:
        return f"Nothing: {why}."
    evidence = f"q = {row['q']:.2g}, ahead of {row['effect']:.0%} of them in the predicted direction"
    return MEANS[verdict].format(
        metric=METRICS[predicted[0].config.metric].title,
        direction=predicted[0].config.direction.value,
        against=AGAINST[row["null"]],
        evidence=evidence,
    )


def subjects(claims: Claims) -> list[Subject]:
    """Every role, each followed by its heads."""
    return [
        subject
        for role, heads in claims.roles.items()
        for subject in (Subject(role, None), *(Subject(role, head) for head in heads))
    ]
