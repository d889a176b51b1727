"""What the weights say of each claim: one verdict per claimed head and per role (definitions: section 6).

The first line that matches wins:

    out_of_scope   the role predicts nothing of the weights
    untestable     the primary metric is unavailable, or no counting null can reach p <= 0.05
    contradicted   significantly opposite under a counting null, and significant under none
    corroborated   significant under every testable counting null, other heads or other words among them, and nothing
                   secondary significantly opposite
    partial        significant under at least one; under `frame` alone: consistent with the claim, no more
    unsupported    none of these
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovqk.claims import Claims, Head
from ovqk.metrics import COMPOSITION_METRICS, METRICS
from ovqk.nulls import ALPHA, Predicted

VERDICTS = ("corroborated", "partial", "unsupported", "contradicted", "untestable", "out_of_scope")

NOT_ESTABLISHED = (
    "It does not establish that the model does this on task inputs, nor that the head is necessary: it is a statement "
    "about the direct path through the weights."
)
NOT_INDEPENDENT = (
    " Heads that were found by what they write are no independent evidence of what they write: consistent with it."
)
MEANS = {
    "corroborated": "The weights could do this: {claim}.",
    "partial": "Some evidence that the weights could do this: {claim}.",
    "unsupported": "The weights do not single this out: {claim}.",
    "contradicted": "The weights point the other way: {claim}.",
}
CONSISTENT = "Consistent with the claim and no more, since any trained head may pass: {claim}."
AGAINST = {
    "layer": "the unclaimed heads of the same layers",
    "depth": "the unclaimed heads of nearby layers",
    "frame": "heads of the same singular values between random frames",
    "token": "other words",
    "token_pairs": "random pairs of other words",
}
PAIRS = {
    "q_composition": "Q-composition",
    "k_composition": "K-composition (percentile in the sender's layer)",
    "v_composition": "V-composition",
    "k_composed_matching": "K-composed matching",
}


@dataclass(frozen=True)
class Subject:
    """What a verdict is about: a role, or one of its heads."""

    role: str
    head: Head | None

    @property
    def kind(self) -> str:
        """`role` or `head`."""
        return "role" if self.head is None else "head"


def title(metric: str) -> str:
    """What a person reads for a metric of heads or of pairs of heads."""
    return PAIRS[metric] if metric in COMPOSITION_METRICS else METRICS[metric].title


def judge(
    subject: Subject,
    predicted: Sequence[Predicted],
    rows: Sequence[Mapping[str, Any]],
    reason: str | None,
    patterns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row of verdicts.parquet.

    Args:
        subject: the role or head.
        predicted: its role's predictions, the primary first.
        rows: the rows of tests.parquet about it.
        reason: why the primary metric has no value, where it has none.
        patterns: of a head (`patterns.head_patterns`).
    """
    counting = [row for row in rows if row["counts"]]
    primary = [row for row in counting if row["primary"]]
    testable = [row for row in primary if row["testable"]]
    opposite = any(row["q_opposite"] < ALPHA for row in counting)
    held = [row for row in testable if row["q"] < ALPHA]
    peers = any(row["null"] != "frame" for row in testable)
    verdict, why = _decide(subject, predicted, primary, testable, held, opposite, peers, reason)
    first = next(iter(testable or primary), None)
    # Of a head, the percentile, the effect and its interval are those within its own layer, whichever null decides.
    placed = next((row for row in rows if row["primary"] and row["null"] == "layer"), first)
    weakest = max(testable, key=lambda row: row["q"], default=first)
    flags = ["mixed"] if verdict == "partial" and opposite else []
    if verdict == "partial" and {row["null"] for row in held} == {"frame"}:
        flags.append("consistent")
    value = placed["value"] if subject.head is None and placed else first["value"] if first else None
    return {
        "kind": subject.kind,
        "role": subject.role,
        "layer": None if subject.head is None else subject.head[0],
        "head": None if subject.head is None else subject.head[1],
        "verdict": verdict,
        "primary": predicted[0].config.metric if predicted else None,
        "prediction": predicted[0].config.direction.value if predicted else None,
        "value": value,
        **{key: placed[key] if placed else None for key in ("percentile", "effect", "ci_low", "ci_high")},
        "p": weakest["p"] if weakest else None,
        "q": weakest["q"] if weakest else None,
        "min_q": weakest["min_q"] if weakest else None,
        "nulls": ", ".join(row["null"] for row in testable),
        "held": ", ".join(row["null"] for row in held),
        "flags": " ".join(flags),
        "reason": why,
        **(patterns or {}),
        "establishes": _statement(verdict, predicted, testable, "consistent" in flags, why),
        "does_not_establish": _limits(verdict, predicted),
    }


def _decide(
    subject: Subject,
    predicted: Sequence[Predicted],
    primary: Sequence[Mapping[str, Any]],
    testable: Sequence[Mapping[str, Any]],
    held: Sequence[Mapping[str, Any]],
    opposite: bool,
    peers: bool,
    reason: str | None,
) -> tuple[str, str]:
    """The verdict, and why where that needs to be said."""
    if not predicted:
        return "out_of_scope", "the role predicts nothing of the weights"
    if not primary:
        composes = subject.head is not None and predicted[0].config.metric in COMPOSITION_METRICS
        whole = f"{predicted[0].config.metric} is tested for the role as a whole"
        return "untestable", reason or (whole if composes else "the primary metric has no value for it")
    if not testable:
        best = min(primary, key=lambda row: row["min_p"])
        return (
            "untestable",
            f"no null can reach p <= {ALPHA}: the smallest p with {_sizes(best)} is {best['min_p']:.3g}",
        )
    if not held and any(row["q_opposite"] < ALPHA for row in testable):
        return "contradicted", ""
    if len(held) == len(testable) and peers and not opposite:
        return "corroborated", ""
    if held:
        alone = "no null of other heads or words is testable for it" if not peers else ""
        return "partial", alone
    if all(row["min_q"] >= ALPHA for row in testable):
        least = min(row["min_q"] for row in testable)
        return (
            "unsupported",
            f"alone among these comparisons it could not be significant: q >= {least:.2g}",
        )
    return "unsupported", ""


def _sizes(row: Mapping[str, Any]) -> str:
    if row["null"] not in ("layer", "depth"):
        return f"{row['n_others']} draws"
    heads = "1 claimed head" if row["n_heads"] == 1 else f"{row['n_heads']} claimed heads"
    return f"{heads} among {row['n_others']} others"


def _statement(
    verdict: str, predicted: Sequence[Predicted], rows: Sequence[Mapping[str, Any]], consistent: bool, why: str
) -> str:
    """What the weights establish, in words to be quoted."""
    if verdict not in MEANS or not rows:
        return f"Nothing: {why}."
    metric, direction = title(predicted[0].config.metric), predicted[0].config.direction.value
    other = {"high": "low", "low": "high"}[direction]

    def part(row: Mapping[str, Any]) -> str:
        if row["q"] < ALPHA:
            how, q = direction, row["q"]
        elif row["q_opposite"] < ALPHA:
            how, q = f"not {direction} but {other}", row["q_opposite"]
        else:
            how, q = f"not {direction}", row["q"]
        return f"{how} against {AGAINST[row['null']]} (q = {q:.2g}, beyond {row['effect']:.0%} of them)"

    claim = f"{metric} is " + ", and ".join(part(row) for row in rows)
    return (CONSISTENT if consistent else MEANS[verdict]).format(claim=claim)


def _limits(verdict: str, predicted: Sequence[Predicted]) -> str:
    if verdict in ("untestable", "out_of_scope"):
        return ""
    metric = predicted[0].config.metric
    writes = metric.startswith("ov_") and metric != "ov_task_read"
    return NOT_ESTABLISHED + (NOT_INDEPENDENT if writes else "")


def subjects(claims: Claims) -> list[Subject]:
    """Every role, each followed by its heads."""
    return [
        subject
        for role, heads in claims.roles.items()
        for subject in (Subject(role, None), *(Subject(role, head) for head in heads))
    ]
