"""Verdicts on claims from the weights: one for each role and each claimed head (definitions: section 6).

A role of one head has no tests of its own: it is judged by its head's, so that the two verdicts are one.

The verdict is the first of these that holds. Only nulls that count for the metric decide:

    out_of_scope   the role predicts nothing about the weights
    untestable     the primary metric is unavailable, or no null can reach p <= 0.05
    contradicted   the primary is significant in the opposite direction under a null that compares with other heads or
                   other words, and as predicted under none of these
    corroborated   the primary is significant under every null that can reach 0.05, and one of them compares with other
                   heads or other words; no secondary prediction is significantly opposite
    partial        the primary is significant under at least one null that compares with other heads or other words
    consistent     it is significant under `spectrum` alone, which any trained head may be
    unsupported    none of these holds, also if it is significant in the opposite direction under `spectrum` alone,
                   which any trained head may be too
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ovqk import wording
from ovqk.config.schema import Circuit
from ovqk.metrics import METRICS
from ovqk.tasks.claims import Claims
from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.nulls import Predicted, counting, only_head
from ovqk.verdicts.statistics import ALPHA
from ovqk.weights.types import Head

VERDICTS = tuple(wording.VERDICTS)

SPECTRUM_ONLY = "spectrum"
"""The flag for an unsupported claim that is significant in the opposite direction under `spectrum`."""


@dataclass(frozen=True)
class Subject:
    """A verdict's subject: a role, or one of its heads."""

    role: str
    head: Head | None

    @property
    def kind(self) -> str:
        """`role` or `head`."""
        return "role" if self.head is None else "head"


@dataclass(frozen=True)
class Evidence:
    """One subject's tests, sorted by their outcome. Only nulls that count are used, unless a property says otherwise.

    Attributes:
        rows: all tests, with those that are only reported.
    """

    rows: Sequence[NullTest]

    @cached_property
    def primary(self) -> list[NullTest]:
        """Tests for the primary prediction."""
        return [row for row in self.rows if row.counts and row.primary]

    @cached_property
    def testable(self) -> list[NullTest]:
        """Tests for the primary prediction that can be significant."""
        return [row for row in self.primary if row.testable]

    @cached_property
    def held(self) -> list[NullTest]:
        """Testable tests that are significant as predicted."""
        return [row for row in self.testable if row.q < ALPHA]

    @cached_property
    def failed(self) -> list[NullTest]:
        """Testable tests that are not significant as predicted."""
        return [row for row in self.testable if row.q >= ALPHA]

    @cached_property
    def opposed(self) -> list[NullTest]:
        """Testable tests that are significant in the other direction."""
        return [row for row in self.testable if row.q_opposite < ALPHA]

    @cached_property
    def held_beyond(self) -> list[NullTest]:
        """Those that hold and compare with other heads or other words, not with `spectrum`."""
        return [row for row in self.held if row.null != "spectrum"]

    @cached_property
    def opposed_beyond(self) -> list[NullTest]:
        """Those that are significant in the other direction, and compare with other heads or other words."""
        return [row for row in self.opposed if row.null != "spectrum"]

    @property
    def any_opposite(self) -> bool:
        """Whether any prediction, primary or secondary, is significant in the other direction."""
        return any(row.counts and row.q_opposite < ALPHA for row in self.rows)

    @property
    def has_peers(self) -> bool:
        """Whether a null with other heads or other words could decide, and not `spectrum` alone."""
        return any(row.null != "spectrum" for row in self.testable)

    @property
    def weakest(self) -> NullTest | None:
        """The least significant testable test; if none is testable, the first test."""
        return max(self.testable, key=lambda row: row.q, default=next(iter(self.primary), None))

    @property
    def tested_head(self) -> Head | None:
        """The head that the primary's tests are about; None if they are about a role of several heads."""
        return next((row.head for row in self.rows if row.primary), None)

    @property
    def placed(self) -> NullTest | None:
        """The test that ranks the heads within their own layers, whether it counts or not."""
        return next((row for row in self.rows if row.primary and row.null == "layer"), None)


def judge(
    subject: Subject,
    predicted: Sequence[Predicted],
    rows: Sequence[NullTest],
    reason: str | None,
    patterns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge one role or head, and return its row in verdicts.parquet.

    p and q come from the null under which the primary is least significant; min_q is the largest over the nulls that do
    not hold (over all if all hold), since each of them has to; q_opposite is the smallest over the nulls. `nulls` lists
    the nulls that could decide, `held` those that are significant for the claim, and `opposed` those against it.
    Percentile, effect and interval are those within the heads' own layers; they are None if all other heads there are
    claimed.

    Args:
        subject: the role or head.
        predicted: its role's predictions, the primary first.
        rows: its rows in tests.parquet (`rows_about`).
        reason: why the primary metric has no value, if it has none.
        patterns: a head's patterns (`patterns.head_patterns`); None for a role.
    """
    evidence = Evidence(rows)
    tested = Subject(subject.role, evidence.tested_head) if subject.head is None else subject
    untested = _untested(tested, predicted[0], evidence) if evidence.testable else ""
    verdict, why = _decide(tested, predicted, evidence, reason, untested)
    flags = _flags(verdict, evidence)
    weakest, placed = evidence.weakest, evidence.placed
    valued = placed or next((row for row in rows if row.primary), None)
    return {
        "kind": subject.kind,
        "role": subject.role,
        "layer": None if subject.head is None else subject.head[0],
        "head": None if subject.head is None else subject.head[1],
        "verdict": verdict,
        "primary": _metric(tested, predicted),
        "prediction": predicted[0].config.direction.value if predicted else None,
        "value": valued.value if valued else None,
        **{key: getattr(placed, key, None) for key in ("percentile", "effect", "ci_low", "ci_high")},
        "n_groups": placed.n_groups if placed and placed.head is None else None,
        "group_effect": placed.group_effect if placed and placed.head is None else None,
        "p": weakest.p if weakest else None,
        "q": weakest.q if weakest else None,
        "min_q": max((row.min_q for row in evidence.failed or evidence.testable), default=None),
        "q_opposite": min((row.q_opposite for row in evidence.testable), default=None),
        "nulls": ", ".join(row.null for row in evidence.testable),
        "held": ", ".join(row.null for row in evidence.held),
        "opposed": ", ".join(row.null for row in evidence.opposed),
        "flags": " ".join(flags),
        "reason": why,
        **(patterns or {}),
        "establishes": _statement(verdict, tested, predicted, evidence.testable, flags, why, untested),
        "does_not_establish": _limits(verdict, predicted),
    }


def _flags(verdict: str, evidence: Evidence) -> list[str]:
    flags = ["mixed"] if verdict in ("partial", "consistent") and evidence.any_opposite else []
    if verdict == "unsupported" and evidence.opposed:  # under spectrum: any other would contradict
        flags.append(SPECTRUM_ONLY)
    return flags


def _metric(subject: Subject, predicted: Sequence[Predicted]) -> str | None:
    if not predicted:
        return None
    return predicted[0].config.metric if subject.head is None else predicted[0].metric_of(subject.head[0])


def _decide(
    subject: Subject, predicted: Sequence[Predicted], evidence: Evidence, reason: str | None, untested: str
) -> tuple[str, str]:
    """Return the verdict, and the reason if it needs one."""
    if not predicted:
        return "out_of_scope", "the role predicts nothing of the weights"
    if not evidence.primary:
        composes = subject.head is not None and METRICS[predicted[0].config.metric].of == "pair"
        whole = f"{predicted[0].config.metric} is tested for the role as a whole"
        return "untestable", reason or (whole if composes else "the primary metric has no value for it")
    if not evidence.testable:
        best = min(evidence.primary, key=lambda row: row.min_p)
        return "untestable", f"no null can reach p <= {ALPHA}: {_too_few(best)}"
    against = ", ".join(f"q = {row.q_opposite:.2g} under {row.null}" for row in evidence.opposed)
    opposite = f"significant the other way: {against}" if against else ""
    if evidence.opposed_beyond and not evidence.held_beyond:
        return "contradicted", "; ".join(filter(None, (opposite, untested)))
    every_null_held = len(evidence.held) == len(evidence.testable)
    if every_null_held and evidence.has_peers and not evidence.any_opposite:
        return "corroborated", untested
    verdict = "partial" if evidence.held_beyond else "consistent" if evidence.held else "unsupported"
    told = opposite if verdict == "unsupported" else ""
    return verdict, "; ".join(filter(None, (told, untested, _powerless(evidence.testable))))


def _untested(subject: Subject, predicted: Predicted, evidence: Evidence) -> str:
    """Say which counting nulls could not decide; `token_pairs` is not mentioned, because a variable may lack it."""
    small: dict[str, list[str]] = {}
    for row in evidence.primary:
        if not row.testable:
            small.setdefault(_too_few(row), []).append(row.null)
    found = [f"not tested under {', '.join(nulls)}: {why}" for why, nulls in small.items()]
    there = {"token_pairs", *(row.null for row in evidence.primary)}
    missing = [null for null in counting(predicted.config.metric, subject.head is None) if null not in there]
    return "; ".join([*found, *([f"not tested under {', '.join(missing)}: none can be had for it"] if missing else [])])


def _too_few(row: NullTest) -> str:
    """Say which p the null could reach at best."""
    return f"the smallest p with {_sizes(row)} is {row.min_p:.3g}"


def _powerless(testable: Sequence[NullTest]) -> str:
    """Say under which nulls the subject alone could not be significant, whatever its value."""
    least = [f"q = {row.min_q:.2g} under {row.null}" for row in testable if _could_not(row)]
    return f"on its own it cannot get below {', '.join(least)}, whatever its value" if least else ""


def _could_not(row: NullTest) -> bool:
    return bool(row.q >= ALPHA and row.min_q >= ALPHA)


def _sizes(row: NullTest) -> str:
    if row.null not in ("layer", "depth"):
        return f"{row.n_others} draws"
    heads = wording.counted(row.n_heads, "claimed head")
    among, n = f"{heads} among {row.n_others} others", row.n_null
    if row.null == "layer":  # n counts labelings
        return f"{among} (the best labelings tie)" if row.min_p * n > 1.5 else among
    return f"{among} (in {n} KV groups)" if n < row.n_others else among


def _statement(
    verdict: str,
    subject: Subject,
    predicted: Sequence[Predicted],
    rows: Sequence[NullTest],
    flags: Sequence[str],
    why: str,
    untested: str,
) -> str:
    """Say what the weights establish, in words to be quoted."""
    metric = _metric(subject, predicted)
    if verdict not in wording.MEANS or not rows or metric is None:
        return f"Nothing: {why}."
    claim = f"{METRICS[metric].title} is " + ", and ".join(_part(row) for row in rows)
    means = wording.MEANS[verdict]
    if SPECTRUM_ONLY in flags:
        means = wording.AGAINST_SPECTRUM
    return means.format(claim=claim) + (f" It is {untested}." if untested else "")


def _part(row: NullTest) -> str:
    """Say what the primary's test under one null found; an insignificant value is only called not significant."""
    direction = row.prediction
    if row.q < ALPHA:
        how, q = direction, row.q
    elif row.q_opposite < ALPHA:
        how, q = f"not {direction} but {'low' if direction == 'high' else 'high'}", row.q_opposite
    else:
        how, q = f"not significantly {direction}", row.q
    details = [f"q = {q:.2g}"]
    if _could_not(row) and row.q_opposite >= ALPHA:
        details.append(f"alone it could not be below {row.min_q:.2g}")
    # Under `layer` a role's effect is an AUC over pairs: a claimed head and another head of its layer.
    beyond = f"AUC within layers {row.effect:.2f}" if row.null == "layer" else f"beyond {_share(row.effect)}"
    if 0 < row.n_groups < row.n_heads and not math.isnan(row.group_effect):
        beyond += f", {row.group_effect:.2f} for their {wording.counted(row.n_groups, 'KV group')}"
    return f"{how} against {wording.AGAINST[row.null]} ({', '.join([*details, beyond])})"


def _share(effect: float) -> str:
    """Say which share of the null the value exceeds; say 100% or 0% only if it exceeds all or none."""
    if 0 < effect < 0.005 or 0.995 <= effect < 1:
        return "less than 1% of them" if effect < 0.5 else "more than 99% of them"
    return f"{effect:.0%} of them"


def _limits(verdict: str, predicted: Sequence[Predicted]) -> str:
    if verdict in ("untestable", "out_of_scope"):
        return ""
    metric = METRICS[predicted[0].config.metric]
    writes = metric.circuit is Circuit.ov and not metric.reads
    return wording.NOT_ESTABLISHED + (wording.NOT_INDEPENDENT if writes else "")


def rows_about(
    subject: Subject, predicted: Sequence[Predicted], rows: Sequence[NullTest], claims: Claims
) -> list[NullTest]:
    """Return the tests that judge a role or a head; a role's prediction about one head is judged by that head's.

    Args:
        subject: the role or head.
        predicted: its role's predictions, the primary first.
        rows: all tests of the claims.
        claims: the claimed heads of all roles.
    """
    own = [row for row in rows if (row.role, row.head) == (subject.role, subject.head)]
    for prediction in predicted if subject.head is None else ():
        head = only_head(prediction, claims)
        if head is not None:
            tested = prediction.role, head, prediction.metric_of(head[0]), prediction.config.direction.value
            own += [row for row in rows if (row.role, row.head, row.metric, row.prediction) == tested]
    return own


def subjects(claims: Claims) -> list[Subject]:
    """Return every role, each followed by its heads."""
    return [
        subject
        for role, heads in claims.roles.items()
        for subject in (Subject(role, None), *(Subject(role, head) for head in heads))
    ]
