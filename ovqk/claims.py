"""Claimed circuits: which heads of this model a source says play which role, and what that predicts of the weights."""

import re
from dataclasses import dataclass

from ovqk.config import ModelConfig, PredictionConfig, TaskConfig
from ovqk.errors import UserError
from ovqk.metrics import COMPOSITION_METRICS, METRICS
from ovqk.weights import Architecture

Head = tuple[int, int]
"""(layer, head)."""

RELIABILITIES = ("published", "measured", "unreliable")


@dataclass(frozen=True)
class Claims:
    """The claims of one task for one model.

    Attributes:
        roles: role -> claimed heads, in the order of the source.
        predictions: role -> predictions, the primary first.
        reliability: `published`, `measured`, or `unreliable` (which excludes no one from the nulls).
    """

    source: str
    reliability: str
    note: str | None
    roles: dict[str, list[Head]]
    predictions: dict[str, list[PredictionConfig]]

    @property
    def heads(self) -> set[Head]:
        """Every claimed head."""
        return {head for heads in self.roles.values() for head in heads}


def resolve_claims(task: TaskConfig, model: ModelConfig, architecture: Architecture) -> Claims | str:
    """The claims that apply, or the reason why none do.

    A head list serves the model it was published for and no other, unless `model.claims` names it.

    Raises:
        UserError: a claim names a head or role that does not exist, a prediction an unknown metric, or
            `model.claims` a list that the task does not hold for a model that is not its own.
    """
    check_roles(task)
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
    roles = {}
    for role, names in config.roles.items():
        if role not in task.roles:
            raise UserError(f"{key}.roles: unknown role '{role}'; task {task.name} knows {', '.join(task.roles)}.")
        roles[role] = [parse_head(name, f"{key}.roles.{role}", architecture) for name in names]
        if len(set(roles[role])) != len(roles[role]):
            raise UserError(f"{key}.roles.{role}: a head is named twice in {', '.join(map(str, names))}.")
    predictions = {role: list(task.roles[role].predictions) for role in roles}
    return Claims(config.source, config.reliability, config.note, roles, predictions)


def parse_head(name: object, key: str, architecture: Architecture) -> Head:
    """ "9.10" -> (9, 10).

    Raises:
        UserError: not of that form, or the model has no such head.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", name) if isinstance(name, str) else None
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
    """Every prediction of every role names a metric that exists.

    Raises:
        UserError: one does not.
    """
    for role, config in task.roles.items():
        for prediction in config.predictions:
            for name in (prediction.metric, prediction.first_layer):
                if name is not None and name not in METRICS and name not in COMPOSITION_METRICS:
                    raise UserError(
                        f"task.roles.{role}.predictions: unknown metric '{name}'; allowed: "
                        f"{', '.join([*METRICS, *COMPOSITION_METRICS])}."
                    )
            strangers = [partner for partner in prediction.partners if partner not in task.roles]
            composes = prediction.metric in COMPOSITION_METRICS
            if strangers or composes != bool(prediction.partners):
                raise UserError(
                    f"task.roles.{role}.predictions: {prediction.metric} has partners={list(prediction.partners)}; a "
                    f"composition names the roles it is with, others name none; allowed: {', '.join(task.roles)}."
                )
        if config.predictions and config.predictions[0].exploratory:
            raise UserError(f"task.roles.{role}.predictions: the first is the primary and cannot be exploratory.")
