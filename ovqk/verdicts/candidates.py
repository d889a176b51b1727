"""Candidates for each role in a model without claims: the heads that the role's predictions point at.

Nothing here is a verdict. The heads are chosen because they are the strongest, and that choice makes their own p-values
too small. Beside them stand p-values that are corrected over all ranked heads.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk import wording
from ovqk.config.schema import CIRCUITS, TaskConfig
from ovqk.metrics import METRICS
from ovqk.structure.kept import once
from ovqk.tasks.claims import Claims, Head
from ovqk.tasks.readouts import SUBSPACE_METRICS
from ovqk.tasks.task_readout import words_depend_on
from ovqk.verdicts.claim_tests import ClaimTests
from ovqk.verdicts.depth import depth_references
from ovqk.verdicts.nulls import Predicted
from ovqk.verdicts.statistics import benjamini_hochberg, monte_carlo, percentile
from ovqk.verdicts.tails import Tail, tail_p

STRONGEST = 5
"""Candidates for each role."""
MAD_TO_SD = 1.4826
"""Standard deviation over median absolute deviation, for normal values."""


def unclaimed(task: TaskConfig) -> Claims:
    """Return the task's roles without heads: what to look for in a model without claims."""
    predictions = {role: list(config.predictions) for role, config in task.roles.items() if config.predictions}
    return Claims("no claims", "none", None, {role: [] for role in predictions}, predictions)


@dataclass(frozen=True)
class Ranking:
    """All heads, ranked by one of a role's predictions.

    Attributes:
        by: the role's first prediction that ranks: with `ranks`, else the first that can.
        beside: further predictions that rank. A head's place is its worst one in all that rank.
        heads: every head that it has a value for, the most extreme first.
        partners: other roles' candidates that it composes with, if it is a composition.
        predictions: the role's predictions that have a value for any head.
    """

    by: Predicted
    beside: list[Predicted]
    heads: list[Head]
    partners: list[Head]
    predictions: list[Predicted]

    @property
    def strongest(self) -> list[Head]:
        """The candidates: the first heads, without those that exceed no more than half of all heads do."""
        values = self.by.sign * self.by.values
        middle = np.nanmedian(values)
        return [head for head in self.heads[:STRONGEST] if values[head] > middle]


@dataclass(frozen=True)
class Candidate:
    """One prediction of one candidate: the columns of candidates.parquet, in order.

    Attributes:
        role, rank, layer, head: the candidate; rank 1 is the most extreme in the metric that ranks the role.
        ranked: whether the role is ranked by this prediction; of several, the first.
        beside: other metrics that rank the role together with this one, as "name ↑"; empty if none does.
        partners: for a composition, other roles' candidates that the head composes with, as "3.0 3.4".
        metric, prediction, primary, exploratory, value: the prediction and the head's value.
        percentile: the value's place among the other heads in its layer, in [0, 1].
        z: how far the value stands out among all heads in the predicted direction: its distance from their median over
            1.4826 times their median absolute deviation; nan if they have no spread.
        gap: this z minus the z for the next head, which the prediction puts behind it; nan for the last head.
        p_depth, q_depth: against the heads in nearby layers, and corrected over all heads (Benjamini-Hochberg).
        p_spectrum, p_spectrum_all: against random heads with its own singular values, and times the number of ranked
            heads, at most 1; nan for a composition, whose partners were chosen too.
        p_tail, tail_fit, q_tail: `p_spectrum` from the draws' fitted tail (`tails.tail_p`), which the number of draws
            does not bound; p for the test that the tail fits; and p_tail corrected over all ranked heads
            (Benjamini-Hochberg, with p = 1 for heads that are no candidates, which can only raise it). nan if there is
            no such null, if draws are only compared with the value and not measured, or if no tail fits.
        p_words, p_words_all: for predictions that other words decide too (alignment, transfer, read): against other
            words (the larger p under `token` and `token_pairs`), and times the number of ranked heads, at most 1.
    """

    role: str
    rank: int
    layer: int
    head: int
    ranked: bool
    beside: str
    partners: str
    metric: str
    prediction: str
    primary: bool
    exploratory: bool
    value: float
    percentile: float
    z: float
    gap: float
    p_depth: float
    q_depth: float
    p_spectrum: float
    p_spectrum_all: float
    p_tail: float
    tail_fit: float
    q_tail: float
    p_words: float
    p_words_all: float


def candidate_rows(tests: ClaimTests, values: Mapping[str, NDArray[np.float64]]) -> tuple[pd.DataFrame, list[str]]:
    """Return candidates.parquet, and notes on the roles that are not ranked by their primary, or not at all."""
    rankings, notes = rank(tests, tests.predicted(values))
    words = _under_words(tests, rankings)
    spectrum = _under_spectrum(tests, observe(tests, rankings))
    rows: list[Candidate] = []
    depths: dict[tuple[object, ...], dict[Head, tuple[float, float]]] = {}
    for ranking in rankings.values():
        for prediction in ranking.predictions:
            config = prediction.config
            same = (config.metric, config.first_layer, config.direct_only, prediction.sign)
            if not composes(prediction) and same not in depths:  # several roles may predict the same
                groups = tests.model.architecture.kv_of_head.numpy()
                find = partial(_depth, prediction, groups)
                depths[same] = once(tests.model.kept, f"depth {same}", prediction.values.tobytes(), find)
            depth = {} if composes(prediction) else depths[same]
            tails = _tails(tests, ranking, prediction, spectrum)
            for head in ranking.strongest:
                if not math.isnan(prediction.values[head]):
                    p = spectrum[head, prediction.metric_of(head[0]), prediction.sign].p
                    rows.append(_candidate(ranking, prediction, head, depth, p, tails[head], words))
    return pd.DataFrame([vars(row) for row in rows]), notes


def rank(tests: ClaimTests, predicted: Mapping[str, list[Predicted]]) -> tuple[dict[str, Ranking], list[str]]:
    """Rank the heads for each role; return role -> ranking, in the order of the roles, and notes.

    If all pairs of heads are composed, a role whose primary is a composition is ranked by it. The partners are then the
    candidates for its partner roles, unless a composition ranks those roles too. If a role's primary has no values, its
    next non-exploratory prediction with values ranks it. Predictions with `ranks` come before all of these.
    """
    found: dict[str, Ranking] = {}
    for role, predictions in predicted.items():
        if not composes(predictions[0]):
            add_ranking(found, role, predictions, [])
    alone = dict(found)
    for role, predictions in predicted.items():
        if composes(predictions[0]):
            config = predictions[0].config
            partners = [head for name in config.partners if name in alone for head in alone[name].strongest]
            composed = dataclasses.replace(predictions[0], values=tests.composed(config, partners))
            add_ranking(found, role, [composed, *predictions[1:]], partners)
    notes = [_note(tests, role, predictions[0], found.get(role)) for role, predictions in predicted.items()]
    return {role: found[role] for role in predicted if role in found}, [note for note in notes if note]


def _note(tests: ClaimTests, role: str, primary: Predicted, ranking: Ranking | None) -> str:
    """Say why a role is not ranked by its primary, and what ranks it instead; empty if the primary does.

    Say, too, if no head stands out at all.
    """
    if ranking is not None and not ranking.strongest:
        return (
            f"no candidates for {wording.role(role)}: by {ranking.by.config.metric} no head exceeds half of the others"
        )
    if (ranking is not None and ranking.by.primary) or (ranking is None and not composes(primary)):
        return ""
    why = "has no value here"
    if composes(primary):
        why = f"composes with {' and '.join(map(wording.role, primary.config.partners))} heads, and none is "
        why += (
            "a candidate in a layer that it could"
            if tests.circuits
            else "claimed (analysis=composition takes candidates)"
        )
    if ranking is None:
        return f"no candidates for {wording.role(role)}: its primary metric, {primary.config.metric}, {why}"
    by = ranking.by.config.metric
    if ranking.by.config.ranks:
        several = " and ".join(prediction.config.metric for prediction in (ranking.by, *ranking.beside))
        return (
            f"candidates for {wording.role(role)} are ranked by {several}, as the task asks (ranks: true); a verdict "
            f"would rest on {primary.config.metric}"
        )
    return f"candidates for {wording.role(role)} are ranked by {by}: its primary metric, {primary.config.metric}, {why}"


def composes(predicted: Predicted) -> bool:
    """Say whether the prediction is about pairs of heads."""
    return METRICS[predicted.config.metric].of == "pair"


def add_ranking(found: dict[str, Ranking], role: str, predictions: Sequence[Predicted], partners: list[Head]) -> None:
    """Rank the role's heads by the predictions with `ranks`, else by the first with values; add nothing if none has."""
    valued = [prediction for prediction in predictions if not np.isnan(prediction.values).all()]
    ranking = [prediction for prediction in predictions if prediction.config.ranks]
    if not ranking or any(np.isnan(prediction.values).all() for prediction in ranking):
        ranking = [prediction for prediction in valued if not prediction.config.exploratory][:1]
    if not ranking:
        return
    signed = [prediction.sign * prediction.values for prediction in ranking]
    placed = ~np.isnan(signed).any(0)
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(placed)]
    places = np.array([(values[placed][:, None] < values[placed]).sum(1) for values in signed])
    worst = dict(zip(heads, places.max(0), strict=True))
    # Ties are broken by the role's other predictions, exploratory ones last, and by a head's number if those tie too.
    rest = sorted((p for p in valued if p is not ranking[0]), key=lambda p: p.config.exploratory)
    others = [signed[0], *(np.nan_to_num(p.sign * p.values, nan=-np.inf) for p in rest)]
    heads.sort(key=lambda head: (worst[head], *(-values[head] for values in others), head))
    found[role] = Ranking(ranking[0], ranking[1:], heads, partners, valued)


def _named(predicted: Predicted) -> str:
    return f"{predicted.config.metric} {wording.ARROWS[predicted.config.direction.value]}"


WordValues = list[dict[tuple[Head, str], NDArray[np.float64]]]
"""For each null of words, (head, metric) -> [draw]."""


def _under_words(tests: ClaimTests, rankings: Mapping[str, Ranking]) -> WordValues:
    """Measure the candidates under other words, for the predictions that other words decide too."""
    metrics, heads = set[str](), set[Head]()
    for ranking in rankings.values():
        own = {p.config.metric for p in ranking.predictions if p.config.metric in SUBSPACE_METRICS and decides(p)}
        metrics |= own
        heads |= set(ranking.strongest) if own else set()
    for circuit in CIRCUITS:
        if any(METRICS[metric].circuit == circuit for metric in metrics):
            tests.read_maps(heads, circuit)
    if not metrics:
        return []

    def draw() -> tuple[WordValues, list[str]]:
        before = len(tests.notes)
        drawn = [drawn for _, drawn in tests.word_draws(heads, metrics)]
        said, tests.notes[before:] = tests.notes[before:], []
        return drawn, said

    drawn, said = once(tests.task.kept, "candidates' words", (*_drawn_for(tests), heads, metrics), draw)
    tests.notes.extend(said)
    return drawn


@dataclass(frozen=True)
class SpectrumDraws:
    """A prediction of one candidate under random heads with its own singular values.

    Attributes:
        p: the p-value; nan if there is no such null.
        draws: the metric's draws; None without the null.
    """

    p: float
    draws: NDArray[np.float64] | None


Asked = tuple[Head, str, float]
"""A candidate, a metric, and the sign of the prediction about it."""


def _under_spectrum(tests: ClaimTests, asked: Sequence[Asked]) -> dict[Asked, SpectrumDraws]:
    """Return the draws under `spectrum` for candidates, as `observe` registered them.

    A metric's draws depend on the candidate, its value, and on the signs that are asked for: what is needed again by a
    cell with another analysis is drawn once.
    """
    known: dict[object, SpectrumDraws] = once(tests.task.kept, "candidates' spectrum", _drawn_for(tests), dict)
    signs: dict[tuple[Head, str], set[float]] = {}
    for head, metric, sign in asked:
        signs.setdefault((head, metric), set()).add(sign)
    keys = {
        (head, metric, sign): (head, metric, sign, tests.observed[head][metric], tuple(sorted(signs[head, metric])))
        for head, metric, sign in asked
    }
    ps = tests.spectrum_ps(one for one, key in keys.items() if key not in known)
    for (head, metric, sign), p in ps.items():
        draws = tests.frame(head, metric).drawn[metric] if tests.has_spectrum_null(metric) else None
        known[keys[head, metric, sign]] = SpectrumDraws(p, draws)
    return {one: known[key] for one, key in keys.items()}


def _drawn_for(tests: ClaimTests) -> tuple[object, ...]:
    """Return everything that draws depend on besides the model, the candidates and their values."""
    config = tests.model.config
    return *words_depend_on(tests.model), config.seed, config.nulls.draws


def observe(tests: ClaimTests, rankings: Mapping[str, Ranking]) -> list[Asked]:
    """Register the candidates' values for comparison with surrogates; return each (head, metric, sign)."""
    found = []
    for ranking in rankings.values():
        for prediction in ranking.predictions:
            for head in ranking.strongest:
                value, metric = float(prediction.values[head]), prediction.metric_of(head[0])
                if not math.isnan(value):
                    tests.observed.setdefault(head, {})[metric] = value
                    found.append((head, metric, prediction.sign))
    return found


def decides(predicted: Predicted) -> bool:
    """Say whether the prediction would count for a verdict."""
    return not predicted.config.exploratory


def _candidate(
    ranking: Ranking,
    predicted: Predicted,
    head: Head,
    depth: Mapping[Head, tuple[float, float]],
    p_spectrum: float,
    tail: tuple[Tail, float],
    words: WordValues,
) -> Candidate:
    value, ranked = float(predicted.values[head]), len(ranking.heads)
    z, gap = standing(predicted.sign * predicted.values, head)
    same = np.delete(predicted.values[head[0]], head[1])
    p_depth, q_depth = depth.get(head, (math.nan, math.nan))
    metric = predicted.metric_of(head[0])

    def p(draws: NDArray[np.float64]) -> float:
        return monte_carlo(predicted.sign * value, predicted.sign * draws).p

    drawn = [values[head, metric] for values in words if (head, metric) in values and decides(predicted)]
    p_words = max(map(p, drawn), default=math.nan)
    return Candidate(
        role=predicted.role,
        rank=1 + ranking.heads.index(head),
        layer=head[0],
        head=head[1],
        ranked=predicted is ranking.by,
        beside=" and ".join(_named(p) for p in ranking.beside) if predicted is ranking.by else "",
        partners=" ".join(f"{layer}.{head}" for layer, head in ranking.partners) if composes(predicted) else "",
        metric=metric,
        prediction=predicted.config.direction.value,
        primary=predicted.primary,
        exploratory=predicted.config.exploratory,
        value=value,
        percentile=percentile(value, same[~np.isnan(same)]),
        z=z,
        gap=gap,
        p_depth=p_depth,
        q_depth=q_depth,
        p_spectrum=p_spectrum,
        p_spectrum_all=_of_all(p_spectrum, ranked),
        p_tail=tail[0].p,
        tail_fit=tail[0].fit,
        q_tail=tail[1],
        p_words=p_words,
        p_words_all=_of_all(p_words, ranked),
    )


def standing(signed: NDArray[np.float64], head: Head) -> tuple[float, float]:
    """Return a head's z among all heads with a value, and its gap to the next one; see `Candidate`.

    Args:
        signed: the metric [layer, head], larger in the predicted direction; nan if a head has no value.
        head: the head.
    """
    values = signed[~np.isnan(signed)]
    spread = MAD_TO_SD * float(np.median(np.abs(values - np.median(values))))
    if spread == 0:
        return math.nan, math.nan
    behind = np.sort(values)[: int((values <= signed[head]).sum()) - 1]  # a head that ties has a gap of 0
    gap = float(signed[head] - behind[-1]) / spread if len(behind) else math.nan
    return float(signed[head] - np.median(values)) / spread, gap


def _tails(
    tests: ClaimTests, ranking: Ranking, predicted: Predicted, spectrum: Mapping[Asked, SpectrumDraws]
) -> dict[Head, tuple[Tail, float]]:
    """Return candidate -> its surrogates' fitted tail, and its p corrected over all ranked heads.

    No tail is fitted for a metric whose draws may be bounds (`surrogate_metrics`).
    """
    found = dict.fromkeys(ranking.strongest, Tail(math.nan, math.nan, 0))
    for head in ranking.strongest:
        metric = predicted.metric_of(head[0])
        row = METRICS[metric]
        measured = row.of in ("words", "subspace") and not row.in_top and tests.has_spectrum_null(metric)
        if measured and not math.isnan(predicted.values[head]):
            draws = spectrum[head, metric, predicted.sign].draws
            assert draws is not None
            found[head] = tail_p(float(predicted.sign * predicted.values[head]), predicted.sign * draws)
    ps = [1.0 if math.isnan(tail.p) else tail.p for tail in found.values()]
    qs = benjamini_hochberg([*ps, *[1.0] * (len(ranking.heads) - len(ps))])
    return {
        head: (tail, math.nan if math.isnan(tail.p) else q)
        for (head, tail), q in zip(found.items(), qs[: len(ps)], strict=True)
    }


def _of_all(p: float, ranked: int) -> float:
    """Correct p by Bonferroni for the number of heads that the candidate was chosen from."""
    return math.nan if math.isnan(p) else min(1.0, p * ranked)


def _depth(predicted: Predicted, groups: NDArray[np.int64]) -> dict[Head, tuple[float, float]]:
    """Return head -> (p, q) against the heads in nearby layers, for every head that has such a p."""
    signed = predicted.sign * predicted.values
    found = {head: near.counts().p for head, near in depth_references(signed, groups).items()}
    return {head: (found[head], q) for head, q in zip(found, benjamini_hochberg(list(found.values())), strict=True)}
