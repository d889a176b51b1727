"""Tests that compare the claims' predictions with the nulls, and everything that they need from the weights.

Each layer is read once. `ClaimTests.visit` keeps the parts that the nulls will ask for: singular values, the claimed
heads' maps, and metric values under resampled words. If a role predicts a composition, it also keeps the circuits that
compose. When all layers are read, `ClaimTests.rows` draws the nulls.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovqk.circuits import composition
from ovqk.circuits.composition import LayerCircuits
from ovqk.circuits.effective_embeddings import RowKind
from ovqk.circuits.grams import dense
from ovqk.circuits.head_maps import HeadMaps
from ovqk.config.schema import Circuit, PredictionConfig
from ovqk.metrics import COMPOSITION_METRICS, METRICS
from ovqk.structure.layer import Form, Layer
from ovqk.structure.model import Model
from ovqk.tasks.claims import Claims
from ovqk.tasks.readouts import RELATION_METRICS, SET_METRICS, SUBSPACE_METRICS, Readout
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.words import Variable
from ovqk.verdicts.frames import KeptFrames
from ovqk.verdicts.null_tests import NullTest
from ovqk.verdicts.nulls import Predicted, correct, ensemble_row, head_rows, predicted_values, role_rows
from ovqk.verdicts.statistics import monte_carlo
from ovqk.verdicts.surrogates import (
    CANDIDATES_STAGES,
    CHUNK_ELEMENTS,
    FrameDraws,
    Measure,
    WordDraws,
    draw_words,
    first_of_each,
    stages,
    subsamples,
    surrogate_metrics,
)
from ovqk.weights.types import Head

SUBSAMPLED = 0.8  # the share of words that a subsample keeps
WIDEN = (SUBSAMPLED / (1 - SUBSAMPLED)) ** 0.5
"""A subsample with a share f of the words differs from the whole by sqrt((1 - f) / f) standard errors."""


def predictions_by_metric(predictions: Iterable[PredictionConfig]) -> set[str]:
    """Return every metric that these predictions are about."""
    return {name for config in predictions for name in (config.metric, config.first_layer) if name is not None}


@dataclass
class ClaimTests:
    """One model's claims under test.

    Attributes:
        task: the task read on the model.
        claims: the claimed heads and the predictions about them.
        sigma: (layer, form) -> singular values [head, k], >= 0.
        forms: (metric, layer) -> the form in which the metric takes the weights.
        maps: (head, circuit) -> the claimed head's maps, as task readouts see them.
        resamples: metric -> [draw, layer, head], its values under resampled words.
        circuits: for each layer a function that returns both circuits, if a prediction composes them (`layers`).
        second: claimed head -> sigma_2 / sigma_1 in W_QK, in [0, 1].
        observed: candidate -> metric -> the value that its surrogates are compared with.
        notes: sentences that name a null without draws, and say why it has none.
    """

    task: TaskReadout
    claims: Claims
    sigma: dict[tuple[int, Form], Tensor] = field(default_factory=dict)
    forms: dict[tuple[str, int], Form] = field(default_factory=dict)
    maps: dict[tuple[Head, Circuit], HeadMaps] = field(default_factory=dict)
    resamples: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    circuits: list[Callable[[], LayerCircuits]] = field(default_factory=list)
    second: dict[Head, float] = field(default_factory=dict)
    observed: dict[Head, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Model:
        """The model that the task is read on."""
        return self.task.model

    def __post_init__(self) -> None:
        """Draw the resampled words, which are the same for all layers."""
        predictions = [config for configs in self.claims.predictions.values() for config in configs]
        self.wanted = predictions_by_metric(predictions)
        claimed = any(config.metric in COMPOSITION_METRICS and self.partners(config) for config in predictions)
        self.composes = claimed or self.model.config.analysis.pairs
        self.frames: dict[tuple[Head, Form], FrameDraws] = {}
        readout = self.task.readout
        self.weights: NDArray[np.float64] | None = None
        self.some: list[Readout] = []
        if readout is None or not self.claims.heads:
            return
        draws = self.model.config.nulls
        if self.wanted & {*SET_METRICS, *RELATION_METRICS}:
            n = len(readout.ids)
            generator = np.random.default_rng([self.model.config.seed, 1])
            self.weights = generator.multinomial(n, np.full(n, 1 / n), size=draws.resamples) / n
        if self.wanted & set(SUBSPACE_METRICS):
            drawn = subsamples(readout.variable, draws.subsamples, SUBSAMPLED, self.model.config.seed)
            self.some = [readout.of_some(part) for part in self._chunks(readout, drawn, n_heads=0)]

    @cached_property
    def layers(self) -> list[LayerCircuits]:
        """Both circuits, layer by layer, decomposed; none if no prediction composes them."""
        return [of() for of in self.circuits]

    # --- while the layers pass -----------------------------------------------------------------------------

    def visit(self, layer: Layer) -> None:
        """Keep the parts of this layer that the tests need (`Stage`)."""
        here = sorted(head for at, head in self.claims.heads if at == layer.index)
        if Circuit.qk in self.model.circuits:
            sigma = layer.maps(Circuit.qk, self.model.folds).sigma
            self.second |= {(layer.index, head): float(sigma[head, 1:2].sum() / sigma[head, 0]) for head in here}
        for metric in self.wanted:
            if METRICS[metric].has_surrogates and METRICS[metric].circuit in self.model.circuits:
                form = self.forms[metric, layer.index] = form_of(metric, layer)
                self.sigma[layer.index, form] = layer.maps(form.circuit, form.folded, form.offsets).sigma
        if self.composes and len(self.model.circuits) == 2:
            self.circuits.append(layer.for_composition())
        if not here:
            return
        for circuit in self.model.circuits:
            wanted = {name for name in self.wanted if METRICS[name].circuit == circuit}
            if not any(METRICS[name].is_readout for name in wanted):
                continue
            maps = self.task.maps(layer, circuit)
            if maps is None or self.task.readout is None:
                continue
            self._keep_maps(layer.index, here, circuit, maps)
            self._resample(layer, circuit, maps, wanted)

    def _keep_maps(self, layer: int, heads: Iterable[int], circuit: Circuit, maps: HeadMaps) -> None:
        for head in heads:
            self.maps[(layer, head), circuit] = maps.only([head])

    def _resample(self, layer: Layer, circuit: Circuit, maps: HeadMaps, wanted: set[str]) -> None:
        for name, values in self.task.by_source(layer, circuit).items():
            if name in wanted and self.weights is not None:
                self._keep(name, layer.index, self.weights @ values.double().cpu().numpy().T)
        if not self.some or self.task.readout is None:
            return
        own = self.task.readout.of_subspace(layer.index, maps, wanted)
        found = [readout.of_subspace(layer.index, maps, wanted) for readout in self.some]
        for name in wanted & set(own):
            spread = torch.cat([values[name] for values in found]) - own[name]  # [draw, head]
            self._keep(name, layer.index, (own[name] + WIDEN * spread).double().cpu().numpy())

    def _keep(self, metric: str, layer: int, values: NDArray[np.float64]) -> None:
        architecture = self.model.architecture
        empty = np.full((len(values), architecture.n_layers, architecture.n_heads), np.nan)
        self.resamples.setdefault(metric, empty)[:, layer] = values

    # --- after the last layer ------------------------------------------------------------------------------

    def predicted(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, list[Predicted]]:
        """Return role -> its predictions, each with the values that decide it.

        Args:
            values: metric -> [layer, head].
        """
        architecture = self.model.architecture
        return {
            role: [
                Predicted(
                    role,
                    config,
                    primary=index == 0,
                    values=self.composed(config, self.partners(config))
                    if config.metric in COMPOSITION_METRICS
                    else predicted_values(config, values, architecture),
                )
                for index, config in enumerate(predictions)
            ]
            for role, predictions in self.claims.predictions.items()
        }

    def partners(self, config: PredictionConfig) -> list[Head]:
        """Return the heads claimed for the roles that a composition names as partners."""
        return [head for role in config.partners for head in self.claims.roles.get(role, [])]

    def composed(self, config: PredictionConfig, partners: Collection[Head]) -> NDArray[np.float64]:
        """Measure how strongly every head composes with its strongest partner [layer, head] (definitions, section 3).

        A value is nan if the head can compose with no partner, no partner is given, or the circuits were not kept.
        """
        into, known = composition.INTO_RECEIVERS.get(config.metric), bool(self.circuits and partners)
        if known and into is not None:
            return into(self.layers, partners)
        grams = matching_grams(self.model) if known and config.metric == "k_composed_matching" else ""
        if not isinstance(grams, str):
            return composition.k_composed_matching(self.layers, partners, *grams)
        return np.full((self.model.architecture.n_layers, self.model.architecture.n_heads), np.nan)

    def pairs(self) -> list[tuple[Head, Head]]:
        """Return the (sender, receiver) pairs that the claims' predictions name, in order."""
        found = set()
        for role, predictions in self.claims.predictions.items():
            for config in predictions:
                for own in self.claims.roles[role] if config.metric in COMPOSITION_METRICS else ():
                    for other in self.partners(config):
                        found.add((min(own, other), max(own, other)))
        return sorted(pair for pair in found if pair[0][0] < pair[1][0])

    def rows(self, predicted: Mapping[str, Sequence[Predicted]]) -> list[NullTest]:
        """Test what `predicted` returned under all its nulls, and correct the p-values over the model (`correct`)."""
        architecture, seed = self.model.architecture, self.model.config.seed
        rows: list[NullTest] = []
        for role, predictions in predicted.items():
            for prediction in predictions:
                heads = [head for head in self.claims.roles[role] if not np.isnan(prediction.values[head])]
                if not heads:
                    continue
                rows += role_rows(prediction, self.claims, architecture, seed, self.resamples)
                for head in heads:
                    rows += head_rows(prediction, head, self.claims, architecture, self.resamples)
                rows += self._frame_rows(prediction, heads)
        rows += self._word_rows(predicted)
        variable = self.task.readout.variable.name if self.task.readout is not None else None
        return [replace(row, variable=variable) for row in correct(rows)]

    def _frame_rows(self, predicted: Predicted, heads: Sequence[Head]) -> list[NullTest]:
        names = {head: predicted.metric_of(head[0]) for head in heads}
        if not all(self.has_spectrum_null(names[head]) for head in heads):
            return []
        most, draws = self.model.config.nulls.draws, [self.frame(head, names[head]) for head in heads]
        for count in stages(most):
            found = zip(heads, first_of_each(draws, count), strict=True)
            drawn = {head: values[names[head]][:count] for head, values in found}
            rows, stopped = _ensemble_rows(predicted, "spectrum", heads, drawn, most)
            if stopped:
                break
        return rows

    def spectrum_ps(self, asked: Iterable[tuple[Head, str, float]]) -> dict[tuple[Head, str, float], float]:
        """Return p under `spectrum`, in (0, 1], for candidates; nan if the null does not apply to the metric.

        The candidates' values are in `observed`. Surrogates are drawn for a head until each of its p-values has met 20
        exceedances, at which counting stops (`monte_carlo`). When a metric's p is known, later draws do not measure it.

        Args:
            asked: (candidate, metric, sign); the sign is -1 if the prediction is `low`, else 1.
        """
        found = dict.fromkeys(asked, math.nan)
        going = [one for one in found if self.has_spectrum_null(one[1])]
        for count in stages(self.model.config.nulls.draws, CANDIDATES_STAGES):
            draws: dict[FrameDraws, tuple[Head, set[str]]] = {}
            for head, metric, _ in going:
                draws.setdefault(self.frame(head, metric), (head, set()))[1].add(metric)
            for own, (head, metrics) in draws.items():
                own.measure = self._measure(head, metrics)
            drawn = dict(zip(draws, first_of_each(list(draws), count), strict=True))
            for one in list(going):
                head, metric, sign = one
                values = drawn[self.frame(head, metric)][metric]
                test = monte_carlo(sign * self.observed[head][metric], sign * values[:count])
                found[one] = test.p
                if test.p_stopped:
                    going.remove(one)
        return found

    def has_spectrum_null(self, metric: str) -> bool:
        """Say whether random heads with the same singular values can be compared on this metric.

        If the model normalises queries and keys, they cannot be compared on attention scores, because random heads have
        no such norm.
        """
        return METRICS[metric].has_surrogates and not self._renormalised(metric)

    def _renormalised(self, metric: str) -> bool:
        """Say whether the metric is about scores between normalised queries and keys."""
        return self.model.architecture.qk_norm and METRICS[metric].of_scores

    def frame(self, head: Head, metric: str) -> FrameDraws:
        """Return a head's surrogates, in the form in which this metric takes the weights; they are made once."""
        layer, index = head
        form = self.forms[metric, layer]
        if (head, form) not in self.frames:
            architecture, kept = self.model.architecture, self.model.kept
            # Heads that share keys and values share frames, so the null makes them as dependent as they can be.
            # All candidates share frames too, because no candidate is judged together with another.
            own = layer, int(architecture.kv_of_head[index]), int(form.circuit is Circuit.ov), int(form.folded)
            alone = head not in self.observed
            wanted = {name for name in self._asked(head) if self.forms.get((name, layer)) == form}
            self.frames[head, form] = FrameDraws(
                form.circuit,
                self.sigma[layer, form][index],
                architecture.d_model,
                form.folded and architecture.norm == "layernorm",
                self._measure(head, wanted),
                (self.model.config.seed, *((*own, len(form.offsets)) if alone else ())),
                None if alone or kept is None else kept.value("frames", None, KeptFrames),
            )
        return self.frames[head, form]

    def _measure(self, head: Head, wanted: set[str]) -> Measure:
        return surrogate_metrics(self.task, head[0], wanted, self.observed.get(head, {}))

    def _asked(self, head: Head) -> set[str]:
        """Name a candidate's observed metrics; for a claimed head, the available metrics that its roles predict."""
        if head in self.observed:
            return set(self.observed[head])
        roles = [role for role, heads in self.claims.roles.items() if head in heads] or list(self.claims.predictions)
        predictions = (config for role in roles for config in self.claims.predictions[role])
        return predictions_by_metric(predictions) - set(self.task.unavailable)

    def _word_rows(self, predicted: Mapping[str, Sequence[Predicted]]) -> list[NullTest]:
        """Test the predictions about words, or about their subspace, under `token` and `token_pairs`."""
        asked = [
            (prediction, [head for head in self.claims.roles[role] if not np.isnan(prediction.values[head])])
            for role, predictions in predicted.items()
            for prediction in predictions
            if METRICS[prediction.config.metric].other_words is not None
            and not self._renormalised(prediction.config.metric)
        ]
        asked = [(prediction, heads) for prediction, heads in asked if heads]
        if not asked:
            return []
        rows: list[NullTest] = []
        heads = {head for _, some in asked for head in some}
        for words, drawn in self.word_draws(heads, {prediction.config.metric for prediction, _ in asked}):
            for prediction, some in asked:
                values = {head: drawn[head, prediction.config.metric] for head in some}
                rows += _ensemble_rows(prediction, words.null, some, values, len(words.variables))[0]
        return rows

    def word_draws(
        self, heads: Collection[Head], metrics: set[str]
    ) -> Iterator[tuple[WordDraws, dict[tuple[Head, str], NDArray[np.float64]]]]:
        """Yield each null that draws words, with (head, metric) -> [draw]; if a null has no draws, `notes` says why.

        Args:
            heads: heads whose maps are kept.
            metrics: metrics that read the task's words.
        """
        readout, config = self.task.readout, self.model.config
        if readout is None:
            return
        for words in draw_words(readout.variable, config.nulls.draws, config.seed):
            if not words.variables:
                self.notes.append(f"null {words.null}: {words.reason}")
                continue
            ids = [s.ids for v in words.variables for s in (*v.read, *v.write)]
            own = [s.ids for s in (*readout.variable.read, *readout.variable.write)]
            for layer in {layer for layer, _ in heads}:
                readout.prepare(layer)  # computes the band's centre while all rows are there
            with readout.effective.only(torch.cat([*ids, *own])):
                drawn = self._under_words(readout, words.variables, set(heads), metrics)
            yield words, drawn

    def read_maps(self, heads: Collection[Head], circuit: Circuit) -> None:
        """Read these heads' layers again and keep their maps, if they were not known while the layers passed."""
        for index in sorted({layer for layer, _ in heads}):
            maps = self.task.maps(Layer(self.model, index), circuit)
            if maps is not None:
                self._keep_maps(index, [head for layer, head in heads if layer == index], circuit, maps)

    def _under_words(
        self, observed: Readout, variables: Sequence[Variable], heads: set[Head], metrics: set[str]
    ) -> dict[tuple[Head, str], NDArray[np.float64]]:
        """Return (head, metric) -> [draw]: the metrics when other words replace the task's. Draws are batched."""
        groups: dict[tuple[RowKind, Circuit], list[Head]] = {}
        for head, circuit in self.maps:
            if head in heads and any(METRICS[name].circuit == circuit for name in metrics):
                groups.setdefault((observed.kind(head[0]), circuit), []).append(head)
        joined = [
            (members, HeadMaps.joined([self.maps[head, circuit] for head in members]))
            for (_, circuit), members in groups.items()
        ]
        most = max((len(members) for members in groups.values()), default=1)
        drawn: dict[tuple[Head, str], list[NDArray[np.float64]]] = {}
        for some in self._chunks(observed, variables, most):
            readout = observed.surrogates(some)
            for members, maps in joined:
                found = readout.metrics(members[0][0], maps, metrics)
                for name in metrics & set(found):
                    values = found[name].double().cpu().numpy()  # [draw, head]
                    for at, head in enumerate(members):
                        drawn.setdefault((head, name), []).append(values[:, at])
        return {key: np.concatenate(values) for key, values in drawn.items()}

    def _chunks(self, readout: Readout, variables: Sequence[Variable], n_heads: int) -> Iterator[Sequence[Variable]]:
        """Split draws into chunks whose embedding rows, and scores for this many heads, fit in memory."""
        sets = (*readout.variable.read, *readout.variable.write)
        n_words = sum(len(words.ids) for words in sets)
        size = max(1, CHUNK_ELEMENTS // (n_words * (self.model.architecture.d_model + n_heads * n_words)))
        return (variables[start : start + size] for start in range(0, len(variables), size))


def _ensemble_rows(
    predicted: Predicted,
    null: str,
    heads: Sequence[Head],
    drawn: Mapping[Head, NDArray[np.float64]],
    most: int,
) -> tuple[list[NullTest], bool]:
    """Test the role (by its heads' mean, if they are several) and each head; say whether more draws change nothing."""
    subjects: list[tuple[Head | None, list[Head]]] = [(None, list(heads)), *((head, [head]) for head in heads)]
    rows, stopped = [], True
    for subject, members in subjects[len(heads) == 1 :]:  # one head is tested once, as a head
        value = float(np.mean([predicted.values[head] for head in members]))
        draws = np.mean([drawn[head] for head in members], axis=0)
        test = monte_carlo(predicted.sign * value, predicted.sign * draws)
        rows.append(ensemble_row(predicted, subject, null, value, draws, test, members, most))
        stopped = stopped and test.stopped
    return rows, stopped


def form_of(metric: str, layer: Layer) -> Form:
    """Return the form in which this metric takes this layer's weights.

    Raises:
        ValueError: the metric is defined for a pair of heads.
    """
    model = layer.model
    row = METRICS[metric]
    if row.circuit is None:
        raise ValueError(f"{metric} is of a pair of heads")
    folded = model.source.foldable and (row.is_readout or "block0" in row.needs or model.folds)
    return Form(row.circuit, folded, layer.span if row.is_readout and row.circuit is Circuit.qk else (0,))


def matching_grams(model: Model) -> tuple[Tensor, Tensor | None] | str:
    """Return the Grams that `k_composed_matching` needs, or why there are none (docs/definitions.md, section 3).

    The first is E^T C E, [d_model, d_model], for the embeddings E that senders read: `block0` if the model has MLPs.
    The second is W_E^T C E for senders in layer 0, which read plain embeddings. If the model has no MLPs, or if block
    0's MLP writes nothing, all senders read plain embeddings and the second is None. Then no layer turns one token into
    another, and the heads of block 0 would only blur it.
    """
    if missing := model.why_no_matching:
        return missing
    assert model.vocabulary is not None and not isinstance(model.block0, str)
    if not model.block0.mlp_writes:
        return dense(model.vocabulary.gram_embed), None
    block0 = model.block0_grams
    assert block0 is not None
    return block0.embed, block0.with_plain
