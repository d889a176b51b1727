"""Claimed circuits: the heads that a source assigns to roles in a model, and the roles' predictions about weights."""

import re
from dataclasses import dataclass

from ovqk.config.schema import ClaimsConfig, ModelConfig, PredictionConfig, Source, TaskConfig
from ovqk.errors import UserError, did_you_mean
from ovqk.metrics import METRICS
from ovqk.weights.types import Architecture, Head

MEASURED = "measured"
"""The value of `model.claims` that asks for roles measured on the cell's own prompts."""
RELIABILITIES = ("published", "measured", "unreliable")


@dataclass(frozen=True)
class Claims:
    """A task's claims for one model.

    Attributes:
        source: the publication or measurement that names the heads.
        reliability: `published`, `measured` or `unreliable`. Heads of an unreliable claim stay in the comparison.
        note: a remark on the claims; None if there is none.
        roles: role -> claimed heads, in the source's order.
        predictions: role -> predictions, the primary first.
        of: the model that the claims are about, by name.
    """

    source: str
    reliability: str
    note: str | None
    roles: dict[str, list[Head]]
    predictions: dict[str, list[PredictionConfig]]
    of: str = ""

    @property
    def heads(self) -> set[Head]:
        """Every claimed head."""
        return {head for heads in self.roles.values() for head in heads}


def resolve_claims(task: TaskConfig, model: ModelConfig, architecture: Architecture) -> Claims | str:
    """Return the claims that apply to a model, or a sentence that says why none do.

    A list of heads applies only to the model that it was published for. If a local checkpoint is a copy of that model,
    `model.claims` names the model, and the checkpoint must have as many layers and heads.

    Raises:
        UserError: `model.claims` names another model's list, or a list that the task does not hold; a claim names no
            head, or a head or role that does not exist; or a prediction names an unknown metric.
    """
    check_roles(task)
    check_borrowing(model)
    if model.claims == MEASURED:
        return "roles are measured on prompts"
    if not task.claims:
        return f"task {task.name} claims no heads"
    if model.claims is None:
        return f"no circuit is claimed for {model.name} (model.claims names none)"
    if model.claims not in task.claims:
        if model.claims != model.name:
            raise UserError(
                f"model.claims={model.claims}: task {task.name} holds no claims of that name; allowed: "
                f"{', '.join(task.claims)}."
            )
        return f"task {task.name} holds no claims for {model.name}"
    config = task.claims[model.claims]
    key = f"task.claims.{model.claims}"
    if config.reliability not in RELIABILITIES:
        raise UserError(f"{key}.reliability={config.reliability}: allowed: {', '.join(RELIABILITIES)}.")
    check_shape(config, model.claims, architecture)
    if unknown := set(config.places) - set(config.roles):
        raise UserError(f"{key}.places: {', '.join(sorted(unknown))}: allowed: the roles that it claims heads for.")
    roles = {}
    for role, names in config.roles.items():
        if role not in task.roles:
            raise UserError(f"{key}.roles: unknown role '{role}'; task {task.name} knows {', '.join(task.roles)}.")
        if not names:
            raise UserError(f"{key}.roles.{role}: names no head; leave the role out if it has none.")
        roles[role] = [parse_head(name, f"{key}.roles.{role}", architecture) for name in names]
        if len(set(roles[role])) != len(roles[role]):
            raise UserError(f"{key}.roles.{role}: a head is named twice in {', '.join(map(str, names))}.")
    predictions = {role: list(task.roles[role].predictions) for role in roles}
    return Claims(config.source, config.reliability, config.note, roles, predictions, model.claims)


def check_borrowing(model: ModelConfig) -> None:
    """Check that only a local checkpoint takes claims about a model with another name.

    Raises:
        UserError: a model takes such claims and is not local.
    """
    if model.source is not Source.local and model.claims not in (None, MEASURED, model.name):
        raise UserError(
            f"model.claims={model.claims}: claims about {model.claims} do not apply to {model.name}. Allowed: "
            f"{model.name}, {MEASURED} or null. If your checkpoint is a copy of {model.claims}, use model=local "
            f"model.path=PATH model.claims={model.claims}."
        )


def check_shape(config: ClaimsConfig, name: str, architecture: Architecture) -> None:
    """Check that the model has as many layers and heads as the claims' `shape` says, if they give one.

    Raises:
        UserError: the numbers differ.
    """
    found = [architecture.n_layers, architecture.n_heads]
    if config.shape and list(config.shape) != found:
        layers, *heads = config.shape
        raise UserError(
            f"model.claims={name}: these are heads of a model of {layers} layers of {', '.join(map(str, heads))} heads "
            f"(task.claims.{name}.shape); this one has {found[0]} layers of {found[1]} heads and is no copy of it."
        )


def parse_head(name: object, key: str, architecture: Architecture) -> Head:
    """Turn "9.10" into (9, 10).

    Raises:
        UserError: the text does not have that form, or the model has no such head.
    """
    match = re.fullmatch(r"([0-9]{1,6})\.([0-9]{1,6})", name) if isinstance(name, str) else None
    if match is None:
        raise UserError(f"{key}: '{name}' is not a head; write layer.head in quotes, as \"9.10\".")
    layer, head = int(match[1]), int(match[2])
    if layer >= architecture.n_layers or head >= architecture.n_heads:
        raise UserError(
            f"{key}: head {name} does not exist; the model has layers 0 to {architecture.n_layers - 1} of heads 0 to "
            f"{architecture.n_heads - 1}."
        )
    return layer, head


def check_roles(task: TaskConfig) -> None:
    """Check every role's predictions: metrics exist, compositions name partners, exploratory ones are no primary.

    Raises:
        UserError: a prediction breaks one of these rules.
    """
    for role, config in task.roles.items():
        for prediction in config.predictions:
            for name in (prediction.metric, prediction.first_layer):
                if name is not None and name not in METRICS:
                    raise UserError(
                        f"task.roles.{role}.predictions: unknown metric '{name}'.{did_you_mean(name, METRICS)} "
                        f"Allowed: {', '.join(METRICS)}."
                    )
            if METRICS[prediction.metric].only_exploratory and not prediction.exploratory:
                raise UserError(
                    f"task.roles.{role}.predictions: no verdict rests on {prediction.metric}; allowed: the same with "
                    "exploratory=true."
                )
            strangers = [partner for partner in prediction.partners if partner not in task.roles]
            composes = METRICS[prediction.metric].of == "pair"
            if strangers or composes != bool(prediction.partners):
                raise UserError(
                    f"task.roles.{role}.predictions: {prediction.metric} has partners={list(prediction.partners)}; a "
                    f"composition names the roles it is with, others name none; allowed: {', '.join(task.roles)}."
                )
        if config.predictions and config.predictions[0].exploratory:
            raise UserError(f"task.roles.{role}.predictions: the first is the primary and cannot be exploratory.")
        pairs = [p.metric for p in config.predictions if p.ranks and METRICS[p.metric].of == "pair"]
        if pairs:
            raise UserError(
                f"task.roles.{role}.predictions: {pairs[0]} has ranks=true; allowed: for metrics of single heads, and "
                "none of pairs of heads."
            )
