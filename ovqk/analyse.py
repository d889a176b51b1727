"""One cell's computation, as a list of stages: from weights to tables.

Read `analyse` from top to bottom: it resolves the claims, reads the model without a task, then the task on the model,
and lets every stage visit every layer. A cell is one choice of model, task and analysis. The stages' tables are written
to disk, and everything that shows results reads them there.

The folders, in the order of the data. No file imports from a folder further down:

    conf/          YAML files, one for each model, task, analysis, tracking mode and launcher
    config/        the keys that a user sets: their types, checks on their values, Hydra's errors in plain words
    checkpoints/   files on disk or on the hub, as named tensors
    weights/       typed weights in one convention, read by a table with a row for each family of architectures
    circuits/      the mathematics of W_QK and W_OV
    structure/     a model layer by layer, without a task
    tasks/         prompts, words, claims, and the metrics that need a task's words
    verdicts/      predictions tested against nulls
    activations/   the model run on the task's prompts
    records/       a cell's files: written, read back, compared
    figures/       Matplotlib figures, as functions of tables
    report/        the terminal's output and the page
    tracking/      W&B

Where a change goes; the first file named is the one to open first:

    a metric                 ovqk/metrics.py: a row of the registry, which also names the places that show it;
                             its formula in ovqk/circuits/, or in ovqk/tasks/readouts.py if it needs a task's words
    a column of results      the file that makes the table: a column of `heads` is a metric (ovqk/metrics.py);
                             else `tests` ovqk/verdicts/null_tests.py, `verdicts` ovqk/verdicts/verdict.py,
                             `candidates` ovqk/verdicts/candidates.py, `composition` ovqk/circuits/composition.py,
                             `layers`, `spectra`, `offsets` ovqk/structure/stages.py, `directions`
                             ovqk/structure/token_tables.py, `roles` ovqk/activations/roles.py, `joint`
                             ovqk/activations/joint.py; ovqk/records/ only stores the tables
    a null                   ovqk/verdicts/nulls.py: what it compares with, and the metrics that it decides about;
                             its random draws in ovqk/verdicts/surrogates.py
    a word of a verdict      ovqk/wording.py, for the record, terminal, page, figures and W&B alike
    a family (architecture)  ovqk/weights/families.py: a row; ovqk/weights/llama_families.py if it is like Llama
    a prompt form            ovqk/tasks/prompts.py; its keys are checked in ovqk/tasks/prompt_entry.py
    a launcher               conf/hydra/launcher/NAME.yaml
    an error message         the file that finds the mistake raises a `UserError`: ovqk/config/checks.py for the value
                             of a key, ovqk/config/hydra_errors.py for Hydra's errors; ovqk/errors.py only prints it
    a figure                 ovqk/figures/comparisons.py: models side by side; ovqk/figures/portraits.py: one head
    a W&B panel              ovqk/tracking/cell_panels.py: a cell's run; ovqk/tracking/sweep_panels.py: a sweep's
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from ovqk import wording
from ovqk.circuits.composition import SENDERS_KEPT, composition_table, virtual_heads_table
from ovqk.circuits.head_maps import CircuitMaps
from ovqk.config.schema import Circuit, Config
from ovqk.errors import UserError
from ovqk.memory import FreedMemory
from ovqk.metrics import COMPOSITION_METRICS, HEAD_METRICS, SENDERS_READ, metric_names
from ovqk.records.record import Analysis
from ovqk.structure.cache import Part, StructureCache, StructureParts, entry_of
from ovqk.structure.kept import Kept
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.stages import Stage, Tables, component_rows
from ovqk.tasks.claims import MEASURED, Claims, resolve_claims
from ovqk.tasks.cycle import Cycle, read_cycle
from ovqk.tasks.task_readout import ReadoutTables, RunWords, TaskReadout
from ovqk.verdicts.candidates import candidate_rows, unclaimed
from ovqk.verdicts.claim_tests import ClaimTests, matching_grams
from ovqk.verdicts.cycles import CycleTables
from ovqk.verdicts.null_tests import NullTest, nulls_table, tests_table
from ovqk.verdicts.nulls import Predicted
from ovqk.verdicts.patterns import PATTERNS, head_patterns
from ovqk.verdicts.surrogates import InTop, Measure
from ovqk.verdicts.verdict import VERDICTS, judge, rows_about, subjects
from ovqk.weights.types import Head, OpenedModel

if TYPE_CHECKING:
    from ovqk.activations.parts import Plan
    from ovqk.activations.stage import ActivationTables, Runner


def analyse(
    opened: OpenedModel,
    config: Config,
    steps: Callable[[int, str], Iterable[int]] = lambda count, what: range(count),
    cache: StructureCache | None = None,
    runner: "Runner | None" = None,
    draws: Callable[[int, int], None] = lambda done, most: None,
    kept: Kept | None = None,
    plan: "Plan" = lambda planned: None,
) -> Analysis:
    """Compute one cell.

    Args:
        opened: the model's raw weights and its tokenizer, if it has one.
        config: the resolved cell.
        steps: counts off layers and batches of prompts, and may show progress.
        cache: keeps the tables that depend on no task for other cells; if None, they are computed anew.
        runner: loads the model to run it, if the analysis asks for activations or reads words through their streams.
        draws: is called with the number of null draws made so far, and the largest number that there may be.
        kept: what earlier cells of this process left, and what it keeps for later ones; None to keep nothing.
        plan: takes what the model is planned to run on prompts, as far as it is known, for the time left.

    Raises:
        UserError: the task's words or claims do not fit this model.
    """
    source = opened.source
    claims = resolve_claims(config.task, config.model, source.architecture)
    model = Model.read(opened, config, kept)
    task = TaskReadout.read(model, None if runner is None else words_runner(model, runner, steps))
    cycle = None if config.task.cycle is None else read_cycle(model)
    no_cycle = cycle if isinstance(cycle, str) else None
    pairs = run_pairs(model, cycle, runner)
    activations = run_prompts(model, task, runner, claims, steps, plan)
    ran = None if activations is None or isinstance(activations, str) else activations
    if config.model.claims == MEASURED:
        claims = f"no role is measured: {activations}" if ran is None else ran.claims()
    judged = JudgedTables(task, claims, draws, cache)
    with ExitStack() as held:
        structure = StructureParts(cache, model, held)
        of_the_task: list[Stage] = [ReadoutTables(task, alongside=not structure.stages), judged]
        of_the_task += [CycleTables(model, cycle)] if isinstance(cycle, Cycle) else []
        of_the_task += [] if ran is None else [ran]
        freed = FreedMemory()
        for index in steps(source.architecture.n_layers, "layer"):
            layer = Layer(model, index)
            for stage in (*structure.stages, *of_the_task):
                stage.visit(layer)
            layer.leave()
            del layer
            freed.give_back()
        made = structure.tables()
    for stage in of_the_task:
        made |= stage.tables(made)
    return Analysis(
        tables={name: table for name, table in made.items() if len(table)},
        unavailable=task.unavailable,
        summary=summarise(task, made)
        | ({} if isinstance(pairs, str) else pairs)
        | ({} if ran is None else ran.summary(made)),
        words={"kept": task.tokens.kept, "dropped": task.tokens.dropped, "reasons": task.tokens.reasons},
        processing=model.processing,
        claims=_describe(claims),
        notes=[
            *source.notes,
            *([] if no_cycle is None else [f"no frequencies: {no_cycle}"]),
            *([f"pairs were not run: {pairs}"] if isinstance(pairs, str) else []),
            *task.tokens.notes,
            *judged.notes,
            *model.offset_notes,
            *model.sample_notes,
            *task.notes,
            *(() if ran is None else ran.notes),
            *model.direction_notes,
        ],
        null_seconds=judged.seconds,
        activations={"untestable": activations}
        if isinstance(activations, str)
        else None
        if ran is None
        else ran.describe(),
    )


def words_runner(model: Model, runner: "Runner", steps: Callable[[int, str], Iterable[int]]) -> RunWords:
    """Return the function that runs the model on single words."""
    from ovqk.activations.stage import run_words  # the modules that run models are imported if one is run

    return partial(run_words, model, runner, steps)


def run_prompts(
    model: Model,
    task: TaskReadout,
    runner: "Runner | None",
    claims: Claims | str,
    steps: Callable[[int, str], Iterable[int]],
    plan: "Plan",
) -> "ActivationTables | str | None":
    """Run the task's prompts if the analysis asks for it; if they cannot be run, return a sentence that says why."""
    config = model.config
    if runner is None or not config.analysis.activations or (config.task.cycle is not None and not config.task.prompts):
        return None
    from ovqk.activations.stage import ActivationTables

    try:
        return ActivationTables(model, runner, claims, steps, task.readout, plan)
    except UserError as error:
        return str(error)


def run_pairs(model: Model, cycle: Cycle | str | None, runner: "Runner | None") -> dict[str, float] | str:
    """Run all pairs of residues if the task has a cycle and the analysis runs the model.

    Return flat scalars for the summary, none if it was not asked for, or a sentence that says why they cannot be run.
    """
    if runner is None or not model.config.analysis.activations or not isinstance(cycle, Cycle):
        return {}
    from ovqk.activations.one_block import results_of_pairs

    try:
        return results_of_pairs(runner.block(), cycle, model.config.seed)
    except UserError as error:
        return str(error).removesuffix(".")


# --- claims --------------------------------------------------------------------------------------------------


@dataclass
class CountedTests(ClaimTests):
    """Claim tests that report progress: the draws made under `spectrum`, and the largest number that there may be."""

    told: Callable[[int, int], None] = lambda done, most: None
    drawn: int = 0
    most: int = 0
    counting: Lock = field(default_factory=Lock)

    def rows(self, predicted: Mapping[str, Sequence[Predicted]]) -> list[NullTest]:
        """See `ClaimTests`."""
        self._expect(
            (head, prediction.metric_of(head[0]))
            for role, predictions in predicted.items()
            for prediction in predictions
            for head in self.claims.roles[role]
            if not np.isnan(prediction.values[head])
        )
        return super().rows(predicted)

    def spectrum_ps(self, asked: Iterable[tuple[Head, str, float]]) -> dict[tuple[Head, str, float], float]:
        """See `ClaimTests`."""
        asked = list(asked)
        self._expect((head, metric) for head, metric, _ in asked)
        return super().spectrum_ps(asked)

    def _expect(self, tested: Iterable[tuple[Head, str]]) -> None:
        """Count the draws that tests on these heads and metrics may need; metrics with the same form share draws."""
        frames = {
            (head, self.forms.get((metric, head[0]))) for head, metric in tested if self.has_spectrum_null(metric)
        }
        self.drawn, self.most = 0, len(frames) * self.model.config.nulls.draws

    def _measure(self, head: Head, wanted: set[str]) -> Measure:
        measure = super()._measure(head, wanted)

        def counted(maps: CircuitMaps) -> Mapping[str, Tensor | InTop]:
            found = measure(maps)
            with self.counting:
                self.drawn += len(maps.decomposition.sigma)
                self.told(min(self.drawn, self.most), self.most)
            return found

        return counted


class JudgedTables:
    """The stage that tests the claims, or ranks candidates if nothing is claimed, and composes pairs of heads.

    Attributes:
        seconds: the time that its tables took, without composition.
    """

    def __init__(
        self,
        task: TaskReadout,
        claims: Claims | str,
        draws: Callable[[int, int], None] = lambda done, most: None,
        cache: StructureCache | None = None,
    ) -> None:
        """Take the claims, or a sentence that says why there are none, and a function that receives draw counts.

        `cache` keeps the composition of pairs, which depends on no task's words.
        """
        self.claimed = isinstance(claims, Claims)
        claimed = claims if isinstance(claims, Claims) else unclaimed(task.model.config.task)
        self.tests = CountedTests(task, claimed, told=draws)
        self.seconds, self._cache = 0.0, cache

    @property
    def notes(self) -> list[str]:
        """Return sentences for the record that name missing nulls, rankings and compositions, with reasons."""
        return self.tests.notes

    def visit(self, layer: Layer) -> None:
        """See `Stage`."""
        self.tests.visit(layer)

    def tables(self, made: Tables) -> Tables:
        """Return `tests`, `nulls` and `verdicts`, or `candidates` if nothing is claimed; and composition tables."""
        started, found = time.perf_counter(), Tables()
        by_head = {name: _grid(self.tests.model, made["heads"], name) for name in HEAD_METRICS}
        if self.claimed:
            found |= judge_claims(self.tests, by_head)
        else:
            found["candidates"], notes = candidate_rows(self.tests, by_head)
            self.notes.extend(notes)
        self.seconds = time.perf_counter() - started
        found |= composition_tables(self.tests, self._cache)
        if "directions" in made and "composition" in found:
            found["directions"] = with_read_components(self.tests, made["directions"], found["composition"])
        return found


def judge_claims(tests: ClaimTests, values: dict[str, NDArray[np.float64]]) -> dict[str, pd.DataFrame]:
    """Test the claims and judge them: tests.parquet, nulls.parquet and verdicts.parquet."""
    model, claims = tests.model, tests.claims
    predicted = tests.predicted(values)
    rows = tests.rows(predicted)
    verdicts = []
    for subject in subjects(claims):
        about = rows_about(subject, predicted[subject.role], rows, claims)
        reason = _why_no_primary(tests, predicted[subject.role])
        patterns = None
        if subject.head is not None:
            shape = (model.architecture.d_model - model.centred, model.architecture.d_head)
            patterns = head_patterns(values, subject.head, shape, tests.second.get(subject.head, math.nan), about)
        verdicts.append(judge(subject, predicted[subject.role], about, reason, patterns))
    table = pd.DataFrame(verdicts)
    for name in set(PATTERNS) & set(table):  # a column without any value is empty, and does not hold numbers
        table[name] = table[name].astype(object).where(table[name].notna(), None)
    return {"tests": tests_table(rows), "nulls": nulls_table(rows), "verdicts": table}


def composition_tables(tests: ClaimTests, cache: StructureCache | None = None) -> dict[str, pd.DataFrame]:
    """Make composition.parquet for the claims' pairs, or for the strongest of all pairs and virtual_heads.parquet.

    The tables are taken from the cache if it has them for the same pairs.
    """
    if not tests.circuits:
        return {}
    model, pairs = tests.model, tests.pairs()
    every, missing = model.config.analysis.pairs, model.why_no_matching
    if missing:
        tests.notes.append(f"composition: matching is empty: {missing}")
    if every and model.why_no_block0_circuit:
        tests.notes.append(f"virtual_heads: ov_copying is empty: {model.why_no_block0_circuit}")
    with entry_of(cache, model, Part.composition, pairs) as entry:
        if entry.tables is not None:
            return entry.tables
        grams = matching_grams(model)
        gram, first_gram = (None, None) if isinstance(grams, str) else grams
        table = composition_table(tests.layers, pairs, gram, first_gram, strongest=SENDERS_KEPT if every else 0)
        found = {"composition": table}
        if every:
            full = model.block0_circuit(Circuit.ov)
            first_full = None if model.vocabulary is None else model.vocabulary.full_circuit(Circuit.ov)
            found["virtual_heads"] = virtual_heads_table(tests.layers, table, full, first_full)
        entry.keep(found)
    return found


def with_read_components(tests: ClaimTests, listed: pd.DataFrame, composition: pd.DataFrame) -> pd.DataFrame:
    """Add to `directions` the components of claimed senders that claimed receivers read most.

    They need not be among the leading ones. Weights that are not folded have none, because their components are others
    than those of compositions.
    """
    model, pairs = tests.model, set(tests.pairs())
    ends = ["sender_layer", "sender_head", "receiver_layer", "receiver_head"]
    claimed = [((s, h), (r, k)) in pairs for s, h, r, k in composition[ends].itertuples(index=False)]
    rows = composition[claimed].sort_values("score", ascending=False, kind="stable")
    rows = rows[rows["component"].notna()].groupby(["mode", "receiver_layer", "receiver_head"]).head(SENDERS_READ)
    keys = ["layer", "head", "component"]
    there = listed[(listed["circuit"] == Circuit.ov.value) & (listed["kind"] == "singular")]
    known = set(there[keys].itertuples(index=False, name=None))
    wanted = {
        (int(s), int(h), int(component))
        for s, h, component in rows[["sender_layer", "sender_head", "component"]].itertuples(index=False)
    } - known
    if not wanted or not model.folds or model.directions is None:
        return listed
    return pd.concat([listed, component_rows(model, tests.layers, sorted(wanted))], ignore_index=True)


def _why_no_primary(tests: ClaimTests, predicted: list[Predicted]) -> str | None:
    if not predicted:
        return None
    model, config = tests.model, predicted[0].config
    metric = config.metric
    if metric in COMPOSITION_METRICS:
        if not tests.circuits:
            computed = " and ".join(circuit.upper() for circuit in model.circuits)
            name = model.config.analysis.name
            return f"its primary metric, {metric}, needs both circuits; analysis={name} computes only {computed}"
        if not tests.partners(config):
            return f"its primary metric, {metric}, is with {_and(config.partners)}, and no such head is claimed"
        if np.isnan(predicted[0].values).all():
            return f"its primary metric, {metric}, has no value: no layer lies between it and {_and(config.partners)}"
        return None
    if metric not in metric_names(model.circuits):
        return f"analysis {model.config.analysis.name} does not compute its primary metric, {metric}"
    reason = tests.task.unavailable.get(metric)
    return None if reason is None else f"its primary metric, {metric}, is unavailable: {reason}"


def _and(roles: list[str]) -> str:
    return " and ".join(f"{wording.role(role)} heads" for role in roles)


def _describe(claims: Claims | str) -> dict[str, Any]:
    if isinstance(claims, str):
        return {"none": claims}
    described = {"of": claims.of, "source": claims.source, "reliability": claims.reliability}
    return described | ({"note": claims.note} if claims.note else {})


# --- tables --------------------------------------------------------------------------------------------------


def summarise(task: TaskReadout, tables: dict[str, pd.DataFrame]) -> dict[str, float | int]:
    """Return flat scalars: sizes, means over heads, verdict counts, each role's effect and p."""
    model, architecture = task.model, task.model.architecture
    summary: dict[str, float | int] = {
        "n_layers": architecture.n_layers,
        "n_heads": architecture.n_layers * architecture.n_heads,
        "n_unstable_heads": int((tables["heads"]["unstable"] != "").sum()),
    }
    for name in metric_names(model.circuits):
        if name not in task.unavailable:
            summary[f"mean/{name}"] = float(tables["heads"][name].mean())
    if "verdicts" in tables:
        verdicts = tables["verdicts"]
        for kind in ("role", "head"):
            counts = verdicts[verdicts["kind"] == kind]["verdict"].value_counts()
            summary |= {f"verdicts/{kind}/{verdict}": int(counts.get(verdict, 0)) for verdict in VERDICTS}
        for row in verdicts[(verdicts["kind"] == "role") & verdicts["p"].notna()].to_dict("records"):
            summary |= {f"role/{row['role']}/{name}": float(row[name]) for name in ("effect", "p")}
    return summary


def _grid(model: Model, heads: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Return a metric's values as [layer, head]; nan if the analysis does not compute it."""
    shape = model.architecture.n_layers, model.architecture.n_heads
    return heads[name].to_numpy(dtype=np.float64).reshape(shape) if name in heads else np.full(shape, math.nan)
