"""The stage that runs the model, links weights to activations, and judges heads (definitions: section 7)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from ovqk import wording
from ovqk.activations.batches import Prompts, read_prompts
from ovqk.activations.fidelity import fidelity_note, fidelity_table, prompt_streams, sources_of
from ovqk.activations.forward import RunningModel
from ovqk.activations.joint import joint_table, on_prompts
from ovqk.activations.judge import Judged, judge_activations
from ovqk.activations.links import WriteLinks
from ovqk.activations.measure import check_activations, measure
from ovqk.activations.one_block import OneBlock
from ovqk.activations.parts import Plan, Steps
from ovqk.activations.roles import Measured
from ovqk.activations.streams import draw_prefixes, read_streams
from ovqk.activations.untrained import untrained_control
from ovqk.circuits.effective_embeddings import Streams
from ovqk.config.schema import RoleActivationsConfig
from ovqk.errors import UserError
from ovqk.memory import give_all_back, is_exhausted
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.stages import Tables
from ovqk.tasks.claims import MEASURED, Claims
from ovqk.tasks.readouts import Readout

Found = TypeVar("Found")
SMALLER = 4
"""If memory is exhausted, batches are made smaller once, by this factor."""


@dataclass(frozen=True)
class Runner:
    """Everything that running a checkpoint needs.

    Attributes:
        load: loads the model on a device; imports transformers and TransformerLens only when it is called.
        start: the token ids before every text.
        block: reads the model as one attention layer and MLP without norms, for tasks whose words are a cycle.
    """

    load: Callable[[torch.device], RunningModel]
    start: list[int]
    block: Callable[[], OneBlock]


def within_memory(function: Callable[[], Found]) -> Found | None:
    """Call a function and return its result; None if memory is exhausted."""
    try:
        return function()
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
    return None


def loaded(runner: Runner, device: torch.device) -> RunningModel:
    """Load the model.

    Raises:
        UserError: it cannot be loaded, or memory is exhausted.
    """
    running = within_memory(lambda: runner.load(device))
    if running is None:
        raise UserError("out of memory while the whole model is loaded, in float32.")
    return running


def run_words(
    model: Model, runner: Runner, steps: Steps, tokens: Int[Tensor, " token"], words: Int[Tensor, " word"]
) -> Streams | str:
    """Run the model on single tokens, for `analysis.embedding=stream`; or say why it cannot be run.

    The prefixes hold none of the task's words.
    """
    if model.tokenizer is None:
        return "the model has no tokenizer, whose words single tokens are put behind"
    try:
        prefixes = draw_prefixes(model.tokenizer, runner.start, set(words.tolist()))
        n_ctx, length = model.architecture.n_ctx, prefixes.shape[1] + 1
        if n_ctx is not None and length > n_ctx:
            return f"a word behind its prefix has {length} tokens, more than the model's context of {n_ctx}"
        running = loaded(runner, model.device)
    except UserError as error:
        return str(error).removesuffix(".")
    rows = within_memory(lambda: read_streams(running, tokens, prefixes, steps))
    del running
    give_all_back()  # the model and its hooks refer to each other
    if rows is None:
        return f"out of memory, running {len(tokens):,} words"
    return Streams(tokens, rows)


class ActivationTables:
    """The stage that judges heads by their behaviour on prompts. Its constructor runs the prompts."""

    def __init__(
        self,
        model: Model,
        runner: Runner,
        claims: Claims | str,
        steps: Steps,
        readout: Readout | None = None,
        plan: Plan = lambda planned: None,
    ) -> None:
        """Run the task's prompts through the model, and measure how well the task's `readout` reads words.

        `plan` takes what is planned to run, for an estimate of the time left.

        Raises:
            UserError: the model cannot be run, or the task has no prompts that it can read.
        """
        config = model.config
        self.model = model
        self.roles: Mapping[str, RoleActivationsConfig] = check_activations(config.task)
        if not self.roles:
            raise UserError(f"task {config.task.name}: no role says what its heads do on prompts.")
        if model.tokenizer is None:
            raise UserError("the model has no tokenizer to read prompts with.")
        if model.vocabulary is None or model.vocabulary.W_U_rows is None:
            raise UserError("the checkpoint has no embedding or no unembedding.")
        self.claimed = {} if isinstance(claims, str) else claims.roles
        asked = config.activations
        self.prompts: Prompts = self._read(runner, asked.batch)
        longest = max(batch.tokens.shape[1] for batch in self.prompts.batches)
        n_ctx = model.architecture.n_ctx
        if n_ctx is not None and longest > n_ctx:
            raise UserError(f"a prompt has {longest} tokens, more than the model's context of {n_ctx}.")
        running = loaded(runner, model.device)
        planned = plan, readout is not None
        measured = self._measure(running, steps, *planned)
        if measured is None:
            smaller = max(1, asked.batch // SMALLER)
            self.prompts = self._read(runner, smaller)
            measured = self._measure(running, steps, *planned)
            if measured is None:
                raise UserError(
                    f"activations.batch={asked.batch}: out of memory, and with batches of {smaller} prompts too."
                )
        self.measured: Measured = measured
        self.unmeasured = ""
        self.fidelity = self._fidelity(running, readout, steps)
        self.untrained = self._run_untrained(running, steps)
        del running
        give_all_back()  # the model and its hooks refer to each other
        self.links = WriteLinks(model, self.prompts, self.measured.observed, self.roles)
        self.measured.observed.outputs.clear()  # only replacements need them
        self.judged: Judged | None = None

    def _read(self, runner: Runner, batch: int) -> Prompts:
        config, tokenizer = self.model.config, self.model.tokenizer
        assert tokenizer is not None
        return read_prompts(config.task, tokenizer, runner.start, config.activations.prompts, config.seed, batch)

    def _measure(self, running: "RunningModel", steps: Steps, plan: Plan, reads_words: bool) -> Measured | None:
        """Run the prompts; return None if memory is exhausted."""
        config, roles = self.model.config, self.roles
        asked = config.activations.screened, config.seed, steps, plan, reads_words
        return within_memory(lambda: measure(running, self.model, self.prompts, roles, self.claimed, *asked))

    def _fidelity(self, running: RunningModel, readout: Readout | None, steps: Steps) -> pd.DataFrame:
        """Compare the rows through which the readout reads words with the model's own on the prompts."""
        if readout is None:
            return pd.DataFrame()
        ids = torch.cat([words.ids for words in readout.variable.read]).unique()
        found = within_memory(lambda: prompt_streams(running, self.prompts, sources_of(self.roles), ids, steps))
        if found is None:
            self.unmeasured = (
                "out of memory, comparing words on prompts with those that readouts read: no fidelity.parquet"
            )
            return pd.DataFrame()
        return fidelity_table(readout, self.model.architecture, *found)

    def _run_untrained(self, running: RunningModel, steps: Steps) -> dict[str, dict[str, float]] | None:
        """Run the model with random weights, which replace its own; return None if memory is exhausted."""
        return within_memory(
            lambda: untrained_control(running, self.prompts, self.measured, self.model.config.seed, steps)
        )

    def claims(self) -> Claims | str:
        """Return the measured roles as claims about the weights, or a sentence that says why there are none."""
        judged = judge_activations(self.measured, self.claimed, None)
        if judged.gate:
            return f"no role is measured: {judged.gate}"
        roles = {role: list(heads) for role, heads in judged.measured.items() if heads}
        if not roles:
            return "no head has a role by measurement"
        task = self.model.config.task
        return Claims(
            source=f"measured on {self._n_prompts()} prompts, seed {self.model.config.seed}",
            reliability=MEASURED,
            note=None,
            roles=roles,
            predictions={role: list(task.roles[role].predictions) for role in roles},
            of=self.model.config.model.name,
        )

    def visit(self, layer: Layer) -> None:
        """Link this layer's writes to its weights (`Stage`)."""
        self.links.visit(layer)

    def tables(self, made: Tables) -> Tables:
        """Return `activations`, `roles` and `joint`, and `candidates` with the column `on_prompts`."""
        self.judged = judge_activations(self.measured, self.claimed, self.links)
        config = self.model.config
        groups = self.model.architecture.kv_of_head.numpy()
        joint = joint_table(self.judged, made.get("verdicts"), made["heads"], config.task, config.seed, groups)
        found = Tables({"activations": self.judged.activations, "roles": self.judged.roles, "joint": joint})
        found["fidelity"] = self.fidelity
        if "candidates" in made:
            found["candidates"] = on_prompts(made["candidates"], self.judged, set(self.roles))
        return found

    @property
    def notes(self) -> list[str]:
        """Return notes for the record: layers in which task readouts read words unlike the running model's."""
        return [note for note in (fidelity_note(self.fidelity), self.unmeasured) if note]

    def describe(self) -> dict[str, Any]:
        """Return the record's block on activations: prompts, halves, the gate, controls."""
        assert self.judged is not None
        observed, prompts = self.measured.observed, self.prompts
        halves = {}
        for half in ("choosing", "testing"):
            of_half = observed.testing if half == "testing" else ~observed.testing
            accuracy, difference = self.measured.accuracy(half)
            halves[half] = {
                "prompts": int(of_half.sum()),
                "clusters": len(observed.clusters[of_half].unique()),
                "accuracy": round(accuracy, 4),
                "logit_difference": round(difference, 4),
            }
        correct = (observed.difference > 0).tolist()
        by_template: dict[str, list[bool]] = {}
        for template, right in zip(observed.templates, correct, strict=True):
            by_template.setdefault(template, []).append(right)
        return {
            "start_tokens": prompts.start,
            "left_out": prompts.left_out,
            "words_left_out": prompts.words_left_out,
            "halves": halves,
            "accuracy_by_template": {name: round(sum(each) / len(each), 4) for name, each in by_template.items()},
            "untestable": self.judged.gate,
            "controls": {
                "replaced_by_itself": self.measured.change,
                "downstream": None if math.isnan(self.measured.downstream) else self.measured.downstream,
                "readout_error": observed.readout_error,
                "untrained": self.untrained,
            },
        }

    def summary(self, made: Tables) -> dict[str, float | int]:
        """Return flat scalars: accuracy on the task, verdict counts, and how well weights rank measured heads."""
        assert self.judged is not None
        accuracy, difference = self.measured.accuracy("testing")
        found: dict[str, float | int] = {"prompts/accuracy": accuracy, "prompts/logit_difference": difference}
        verdicts = list(self.judged.roles["verdict"]) if len(self.judged.roles) else []
        found |= {f"prompts/verdicts/{verdict}": verdicts.count(verdict) for verdict in wording.ON_PROMPTS}
        found |= {f"prompts/measured/{role}": len(heads) for role, heads in self.judged.measured.items()}
        rows = made["joint"]
        for row in () if self.judged.gate else rows[rows["kind"] == "role"].to_dict("records"):
            for name in ("auc", "auc_in_layers", "spearman"):
                if math.isfinite(row[name]):
                    found[f"prompts/{name}/{row['role']}"] = float(row[name])
        return found

    def _n_prompts(self) -> int:
        return sum(map(len, self.prompts.batches))
