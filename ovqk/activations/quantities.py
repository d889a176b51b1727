"""Every head's attention, write and first-order effect on every prompt (definitions: section 7).

They all come from one run over the clean prompts and one over their counterfactuals.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ovqk.activations.batches import Batch, Prompts
from ovqk.activations.forward import Places, Run, RunningModel
from ovqk.activations.parts import PROMPTS, Steps
from ovqk.config.schema import AttentionConfig, RoleActivationsConfig, WriteConfig
from ovqk.memory import FreedMemory
from ovqk.structure.model import Model
from ovqk.weights.norms import Norm, inverse_scale
from ovqk.weights.stored_rows import StoredRows

Values = Float[Tensor, "prompt layer head"]
"""One number for each prompt and head; nan for a prompt in which a label has no place."""


@dataclass(frozen=True)
class RoleValues:
    """All heads' quantities that one role's `activations` names; None for those that it does not name.

    Attributes:
        attention: attention from the role's query to its source, in [0, 1].
        control: attention from the query to the control.
        counterfactual: attention from the query to the source's position, on the counterfactual prompt.
        sink: attention from the query to the first token.
        write: the head's output at END through the final norm, projected on W_U[answer] - W_U[other] for the role's
            answer and its other word; in logits, before a softcap. The norm's scale is taken from the run.
        write_from_source: the part of the write that comes from the source token's value.
        first_order: the first-order change in the logit difference when the head's output at the query is replaced by
            its output on the counterfactual.
    """

    attention: Values | None = None
    control: Values | None = None
    counterfactual: Values | None = None
    sink: Values | None = None
    write: Values | None = None
    write_from_source: Values | None = None
    first_order: Values | None = None


@dataclass
class Observed:
    """Measurements on all prompts, in the order of their batches.

    Attributes:
        clusters: each prompt's cluster, by number.
        testing: whether a prompt belongs to the testing half.
        difference: the answer's logit minus the foil's, on the prompt.
        counterfactual_difference: the same on its counterfactual.
        templates: each prompt's template.
        roles: role -> all heads' quantities.
        looks: (query, source, control) -> attention to the source minus the control, on prompts and counterfactuals.
        outputs: for each batch, query label -> z on the prompts and on their counterfactuals, each [layer, prompt,
            head, d_head]. A label is missing if it has no place there.
        readout_error: the largest error when logit differences are computed from the final stream as writes are, as a
            share of the mean difference. It is large if ovqk misreads the final norm or the unembedding.
    """

    clusters: Int[Tensor, " prompt"]
    testing: Bool[Tensor, " prompt"]
    difference: Float[Tensor, " prompt"]
    counterfactual_difference: Float[Tensor, " prompt"]
    templates: list[str]
    roles: dict[str, RoleValues]
    looks: dict[tuple[str, str, str], tuple[Values, Values]]
    outputs: list[dict[str, tuple[Tensor, Tensor]]] = field(repr=False)
    readout_error: float = math.nan


def queries_of(config: RoleActivationsConfig) -> str:
    """Return the label at which a role's heads act: its attention's query, or END."""
    return "END" if config.attention is None else config.attention.query


class Writes:
    """The direct path from heads' outputs at END to logits: W_O, a norm that may follow it, the final norm and W_U."""

    def __init__(self, model: Model) -> None:
        """Take all layers' output weights. The model must have an unembedding."""
        source = model.source
        assert model.vocabulary is not None and model.vocabulary.W_U_rows is not None
        self.rows, self.architecture = model.vocabulary.W_U_rows, model.architecture
        self.embeddings = source.embeddings()
        self.kv_of_head = model.architecture.kv_of_head
        layers = [source.layer(index) for index in range(model.architecture.n_layers)]
        self.W_O = [layer.W_O.float().cpu() for layer in layers]
        self.post_norms: list[Norm | None] = [layer.post_norm for layer in layers]

    def directions(
        self, run: Run, plus: Int[Tensor, " prompt"], minus: Int[Tensor, " prompt"]
    ) -> Float[Tensor, "prompt d_model"]:
        """Return directions whose products with the residual stream at END give a logit difference.

        Args:
            run: the run, whose norms' scales are used.
            plus, minus: token ids; the difference is logit(`plus`) - logit(`minus`).
        """
        difference = (self.rows[plus] - self.rows[minus]).float().cpu()
        norm = self.embeddings.final_norm
        kind = self.architecture.norm if norm is None else norm.kind
        return difference * inverse_scale(run.final, kind, self.architecture.norm_eps)

    def bias(self, plus: Int[Tensor, " prompt"], minus: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Return the final norm bias's part in logit(`plus`) - logit(`minus`), for token ids."""
        norm, W_U = self.embeddings.final_norm, self.embeddings.W_U
        if norm is None or norm.bias is None or W_U is None:
            return torch.zeros(len(plus))
        columns = [W_U[ids] if isinstance(W_U, StoredRows) else W_U[:, ids].T for ids in (plus, minus)]
        return (columns[0] - columns[1]).float().cpu() @ norm.bias.float().cpu()

    def of_layer(
        self, layer: int, run: Run, directions: Float[Tensor, "prompt d_model"]
    ) -> Float[Tensor, "prompt head d_head"]:
        """Return directions whose products with each head's output at END give the head's write.

        Args:
            layer: the layer.
            run: the run, whose norms' scales are used.
            directions: as `directions` returns them.
        """
        norm = self.post_norms[layer]
        if norm is not None:
            scale = inverse_scale(run.attention_out[layer], norm.kind, self.architecture.norm_eps)
            directions = directions * norm.weight.float().cpu() * scale
            if norm.kind == "layernorm":
                directions = directions - directions.mean(-1, keepdim=True)
        return torch.einsum("hzd,pd->phz", self.W_O[layer], directions)


def observe(
    running: RunningModel, model: Model, prompts: Prompts, roles: Mapping[str, RoleActivationsConfig], steps: Steps
) -> Observed:
    """Run all prompts and their counterfactuals, and read the quantities that the roles name.

    Args:
        running: the model that runs.
        model: its weights, with an unembedding.
        prompts: the prompts.
        roles: role -> its `activations`.
        steps: counts off the batches, and may show progress.
    """
    writes = Writes(model)
    asked = looks_of(roles)
    parts: list[dict[str, RoleValues]] = []
    seen: list[dict[tuple[str, str, str], tuple[Tensor, Tensor]]] = []
    differences, counterfactuals, errors, outputs = [], [], [], []
    freed = FreedMemory()
    for number in steps(len(prompts.batches), PROMPTS):
        freed.give_back()
        batch = prompts.batches[number]
        queries, sources, places = places_of(batch, roles, asked)
        clean = running.run(batch.tokens, places, (batch.answers, batch.foils))
        other = running.run(batch.counterfactual, places)
        contrast = [
            logits.gather(1, ids[:, None])[:, 0]
            for logits in (clean.logits, other.logits)
            for ids in (batch.answers, batch.foils)
        ]
        differences.append(contrast[0] - contrast[1])
        counterfactuals.append(contrast[2] - contrast[3])
        read = (clean.final * writes.directions(clean, batch.answers, batch.foils)).sum(-1)
        read += writes.bias(batch.answers, batch.foils) + running.bias(batch.answers) - running.bias(batch.foils)
        errors.append(read - running.before_softcap(contrast[0]) + running.before_softcap(contrast[1]))
        outputs.append({label: (clean.outputs[:, :, i], other.outputs[:, :, i]) for label, i in queries.items()})
        parts.append(
            {name: _role(config, batch, clean, other, queries, sources, writes) for name, config in roles.items()}
        )
        seen.append({look: tuple(_look(look, batch, run, queries) for run in (clean, other)) for look in asked})  # type: ignore[misc]
    difference = torch.cat(differences)
    error = torch.cat(errors).abs().max() / difference.abs().mean()
    return Observed(
        clusters=torch.cat([batch.clusters for batch in prompts.batches]),
        testing=torch.cat([torch.full((len(batch),), batch.half == "testing") for batch in prompts.batches]),
        difference=difference,
        counterfactual_difference=torch.cat(counterfactuals),
        templates=[template for batch in prompts.batches for template in batch.templates],
        roles={name: joined([part[name] for part in parts]) for name in roles},
        looks={look: tuple(torch.cat([part[look][i] for part in seen]) for i in (0, 1)) for look in asked},  # type: ignore[misc]
        outputs=outputs,
        readout_error=float(error),
    )


def places_of(
    batch: Batch, roles: Mapping[str, RoleActivationsConfig], looks: Iterable[tuple[str, str, str]]
) -> tuple[dict[str, int], dict[str, Int[Tensor, " prompt"]], Places]:
    """Choose the positions at which a batch's runs are kept.

    Args:
        batch: the prompts; a label that has no place in them is left out.
        roles: role -> its `activations`.
        looks: further attentions (query, source, control).

    Returns:
        Query label -> its number among the kept queries; source label -> its positions; and the positions for both.
    """
    labels = sorted({queries_of(config) for config in roles.values()} | {query for query, _, _ in looks} | {"END"})
    queries = {label: place for label in labels if (place := batch.position(label)) is not None}
    sources = {
        config.attention.source: place
        for config in roles.values()
        if config.attention and (place := batch.position(config.attention.source)) is not None
    }
    places = Places(torch.stack(list(queries.values())), torch.stack(list(sources.values()) or [batch.at["END"]]))
    return {label: number for number, label in enumerate(queries)}, sources, places


def looks_of(roles: Mapping[str, RoleActivationsConfig]) -> list[tuple[str, str, str]]:
    """Return the receivers' attentions (query, source, control) on which roles' effects are measured."""
    found = [look for name in roles if (look := look_of(roles, name)) is not None]
    return list(dict.fromkeys(found))


def look_of(roles: Mapping[str, RoleActivationsConfig], name: str) -> tuple[str, str, str] | None:
    """Return the receivers' attention on which a role's effect is measured; None if that is the logit difference."""
    effect = roles[name].effect
    if effect is None or effect.into is None:
        return None
    receivers = roles[effect.into].attention
    assert receivers is not None  # `check_activations`
    return receivers.query, effect.source or receivers.source, effect.control or receivers.control


def _role(
    config: RoleActivationsConfig,
    batch: Batch,
    clean: Run,
    other: Run,
    queries: Mapping[str, int],
    sources: Mapping[str, Int[Tensor, " prompt"]],
    writes: Writes,
) -> RoleValues:
    query = queries.get(queries_of(config))
    found: dict[str, Tensor] = {}
    shape = (len(batch), *clean.patterns.shape[:1], clean.patterns.shape[2])
    missing = torch.full(shape, math.nan)
    if config.attention is not None:
        found |= attention_values(config.attention, batch, clean, other, query)
    if config.write is not None:
        found |= _write(config, config.write, batch, clean, queries, sources, writes, missing)
    assert clean.gradients is not None
    if query is None:
        found["first_order"] = missing
    else:
        change = (clean.outputs[:, :, query] - other.outputs[:, :, query]) * clean.gradients[:, :, query]
        found["first_order"] = change.sum(-1).transpose(0, 1)
    return RoleValues(**found)


def attention_values(
    config: AttentionConfig, batch: Batch, clean: Run, other: Run, query: int | None
) -> dict[str, Values]:
    """Return `attention`, `control`, `counterfactual` and `sink` for `RoleValues`.

    Args:
        config: the role's `attention`.
        batch: the prompts.
        clean, other: runs over the prompts and over their counterfactuals.
        query: the query's number among the kept queries; None if it has no place here.
    """
    source, control = batch.position(config.source), batch.position(config.control)
    names = ("attention", "control", "counterfactual", "sink")
    if query is None or source is None or control is None:
        shape = (len(batch), *clean.patterns.shape[:1], clean.patterns.shape[2])
        return dict.fromkeys(names, torch.full(shape, math.nan))
    rows = ((clean, source), (clean, control), (other, source), (clean, torch.zeros_like(source)))
    return {name: attention_to(run, query, key) for name, (run, key) in zip(names, rows, strict=True)}


def attention_to(run: Run, query: int, key: Int[Tensor, " prompt"]) -> Values:
    """Return all heads' attention from a kept query to one position in each prompt."""
    every = torch.arange(len(key))
    return run.patterns[:, :, :, query].permute(1, 0, 2, 3)[every, :, :, key]


def _write(
    config: RoleActivationsConfig,
    write: WriteConfig,
    batch: Batch,
    clean: Run,
    queries: Mapping[str, int],
    sources: Mapping[str, Int[Tensor, " prompt"]],
    writes: Writes,
    missing: Tensor,
) -> dict[str, Tensor]:
    directions = writes.directions(clean, batch.words(write.answer), batch.words(write.other))
    end = queries["END"]
    source = None if config.attention is None else config.attention.source
    key = None if source is None else batch.position(source)
    at_end = config.attention is not None and config.attention.query == "END"
    written, from_source = [], []
    for layer in range(len(writes.W_O)):
        through = writes.of_layer(layer, clean, directions)
        written.append((clean.outputs[layer, :, end] * through).sum(-1))
        if at_end and source is not None and key is not None:
            values = clean.values[layer, :, list(sources).index(source)]
            values = values if values.shape[1] == through.shape[1] else values[:, writes.kv_of_head]
            looked = clean.patterns[layer, :, :, end][torch.arange(len(key)), :, key]
            from_source.append(looked * (values * through).sum(-1))
    found = {"write": torch.stack(written, 1)}
    if at_end:
        found["write_from_source"] = torch.stack(from_source, 1) if from_source else missing
    return found


def _look(look: tuple[str, str, str], batch: Batch, run: Run, queries: Mapping[str, int]) -> Values:
    query, source, control = queries.get(look[0]), batch.position(look[1]), batch.position(look[2])
    if query is None or source is None or control is None:
        return torch.full((len(batch), run.patterns.shape[0], run.patterns.shape[2]), math.nan)
    return attention_to(run, query, source) - attention_to(run, query, control)


def joined(parts: Sequence[RoleValues]) -> RoleValues:
    """Join the values from several batches."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return RoleValues(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
