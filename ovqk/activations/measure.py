"""Roles measured on prompts: heads are chosen on one half of the prompts and tested on the other.

See docs/definitions.md, section 7.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from ovqk.activations.batches import Prompts
from ovqk.activations.effects import (
    LEAST_CHANGE,
    MEAN,
    RESTORED,
    Patch,
    check_downstream,
    check_replacing,
    measure_effects,
    merged,
)
from ovqk.activations.forward import RunningModel
from ovqk.activations.parts import (
    DEPENDENT,
    OTHERWISE,
    REPLACE,
    REPLACED,
    TOGETHER,
    Part,
    Plan,
    Steps,
    first_plan,
    replaced_tokens,
)
from ovqk.activations.quantities import looks_of, observe, queries_of
from ovqk.activations.repeats import draw_repeats, run_repeats
from ovqk.activations.roles import Measured, all_at_once
from ovqk.activations.score_links import Asked, Partners, partner_roles, score_links
from ovqk.config.schema import RoleActivationsConfig, TaskConfig
from ovqk.errors import UserError
from ovqk.structure.model import Model
from ovqk.weights.types import Head

LEAST_ERROR = 0.01
"""The largest error that rounding can make in a logit difference computed from writes."""
MOST_CANDIDATES = 24
"""The largest number of heads that are patched for a role because they meet the rest of its rule."""


def check_activations(task: TaskConfig) -> dict[str, RoleActivationsConfig]:
    """Return the roles that have `activations`.

    Raises:
        UserError: a key of `activations` is wrong.
    """
    found = {name: role.activations for name, role in task.roles.items() if role.activations is not None}
    for name, config in found.items():
        key = f"task.roles.{name}.activations"
        given = [part for part in ("attention", "write", "effect", "repeats") if getattr(config, part) is not None]
        if not config.decides or not set(config.decides) <= set(given):
            raise UserError(
                f"{key}.decides={list(config.decides)}: allowed are those given: {', '.join(given) or 'none'}."
            )
        if config.attention is not None and not (
            config.attention.beyond and set(config.attention.beyond) <= {"control", "counterfactual"}
        ):
            raise UserError(
                f"{key}.attention.beyond={list(config.attention.beyond)}: allowed: control, counterfactual."
            )
        for part in (config.write, config.effect):
            if part is not None and part.sign not in (1, -1):
                raise UserError(f"{key}: sign={part.sign}: allowed: 1, -1.")
        if config.effect is None:
            continue
        if config.effect.into and config.effect.given:
            raise UserError(f"{key}.effect: into and given: allowed is one of them.")
        for what, other in (("into", config.effect.into), ("given", config.effect.given)):
            served = found.get(other) if other is not None else None
            if other is not None and (served is None or other == name):
                raise UserError(f"{key}.effect.{what}={other}: allowed: another role with activations of its own.")
            if what == "into" and served is not None and served.attention is None:
                raise UserError(f"{key}.effect.into={other}: role {other} says no attention that could change.")
            if what == "given" and served is not None and queries_of(served) != queries_of(config):
                places = f"{queries_of(served)}, not at {queries_of(config)}"
                raise UserError(f"{key}.effect.given={other}: its heads act at {places}.")
            if served is not None and served.effect is not None and (served.effect.into or served.effect.given):
                raise UserError(f"{key}.effect.{what}={other}: a role that does not itself depend on another's heads.")
    return found


def measure(
    running: RunningModel,
    model: Model,
    prompts: Prompts,
    roles: Mapping[str, RoleActivationsConfig],
    claimed: Mapping[str, Collection[Head]],
    screened: int,
    seed: int,
    steps: Steps,
    plan: Plan = lambda planned: None,
    reads_words: bool = False,
) -> Measured:
    """Run the prompts, and replace the heads that are claimed, meet a role's rule, or have a large first-order effect.

    The replacements MEAN and RESTORED are made for claimed and chosen heads only.

    Args:
        running: the model that runs.
        model: its weights.
        prompts: the prompts.
        roles: role -> its `activations`.
        claimed: role -> claimed heads.
        screened: how many heads are patched because of their first-order effect.
        seed: the seed for drawn sign flips.
        steps: counts off batches.
        plan: takes what is planned to run, as far as it is known.
        reads_words: whether the plan has a later run that reads words on prompts.

    Raises:
        UserError: logits change when a head is replaced by itself, or writes do not add up to the logit difference.
    """
    tokens = _draw_repeats(model, prompts, roles, seed)
    serves = any(_served(config) for config in roles.values())
    plan(first_plan(prompts, 0 if tokens is None else tokens.numel(), serves, reads_words))
    observed = observe(running, model, prompts, roles, steps)
    if not (change := check_replacing(running, prompts, observed)) <= LEAST_CHANGE:
        raise UserError(f"replacing a head by itself changes the logit difference by {change:.2g} of its mean.")
    asked = [config.attention for config in roles.values() if config.attention is not None]
    looks = sorted({(each.query, each.source, each.control) for each in asked})
    if (downstream := check_downstream(running, prompts, observed, looks)) > LEAST_CHANGE:
        raise UserError(f"replacing a head changes attention in its own layer or before it, by {downstream:.2g}.")
    if not observed.readout_error <= LEAST_ERROR:
        raise UserError(
            "what heads write cannot be read off: through the final norm and the unembedding the logit difference "
            f"comes out wrong by {observed.readout_error:.2g} of its mean."
        )
    repeats = None if tokens is None else run_repeats(running, tokens, len(prompts.start), steps)
    groups = model.architecture.kv_of_head.numpy()
    measured = Measured(observed, roles, {}, {}, seed, groups, change, downstream, repeats)
    first = [name for name, config in roles.items() if not _served(config)]
    dependent = [name for name in roles if name not in first]
    n_layers = running.n_layers
    about = [label for name in dependent for label in _labels(roles[name], len(claimed.get(name, ())) + screened)]
    few = {what: replaced_tokens(prompts, [], n_layers, kinds) for what, kinds in ((TOGETHER, 1), (OTHERWISE, 2))}
    halfway = [(label, n_layers // 2) for label in about]  # which heads it will be is not known yet
    plan(({DEPENDENT: replaced_tokens(prompts, halfway, n_layers)} if dependent else {}) | few)
    for what, names in ((REPLACED, first), (DEPENDENT, dependent)):
        patches: dict[Patch, None] = {}
        for name in names:
            for head in _to_patch(measured, name, claimed.get(name, ()), screened):
                patches |= dict.fromkeys(_patches(measured, name, head))
        new = [patch for patch in patches if patch not in measured.effects]
        plan({what: _work(prompts, new, n_layers)} if names else {})
        measured.add(measure_effects(running, prompts, measured.observed, new, looks_of(roles), steps, what=what))
        for name in names:
            measured.receivers[name] = tuple(claimed.get(name, ())) or chosen_heads(measured, name)
    patches = {}
    for name, config in roles.items():
        if config.effect is not None:
            for head in dict.fromkeys((*measured.receivers[name], *chosen_heads(measured, name))):
                patches |= dict.fromkeys(_patches(measured, name, head))
            patches |= dict.fromkeys(filter(None, [all_at_once(config, measured.receivers[name])]))
    new = [patch for patch in patches if patch not in measured.effects]
    plan({TOGETHER: _work(prompts, new, n_layers), OTHERWISE: _work(prompts, list(patches), n_layers, kinds=2)})
    measured.add(measure_effects(running, prompts, observed, new, looks_of(roles), steps, what=TOGETHER))
    kinds = (MEAN, RESTORED)
    again = measure_effects(running, prompts, observed, list(patches), looks_of(roles), steps, kinds, OTHERWISE)
    measured.add({patch: merged(measured.effects[patch], effects) for patch, effects in again.items()})
    _add_scores(measured, running, model, prompts, steps)
    return measured


def _draw_repeats(
    model: Model, prompts: Prompts, roles: Mapping[str, RoleActivationsConfig], seed: int
) -> Int[Tensor, "sequence position"] | None:
    """Draw random repeats; return None if no role asks for them, or if the model's context is too short."""
    assert model.tokenizer is not None
    if all(config.repeats is None for config in roles.values()):
        return None
    return draw_repeats(model.tokenizer, prompts.start, model.architecture.n_ctx, seed)


def _work(prompts: Prompts, patches: Sequence[Patch], n_layers: int, kinds: int = 1) -> Part:
    """Return the part that makes these replacements (`replaced_tokens`), without work if there are none."""
    places = [(patch.query, min(layer for layer, _ in patch.heads)) for patch in patches]
    return replaced_tokens(prompts, places, n_layers, kinds) if patches else Part(REPLACE, 0.0)


def _labels(config: RoleActivationsConfig, heads: int) -> list[str]:
    """Return the label of each replacement that so many heads need, alone and perhaps with another role's heads."""
    return [queries_of(config)] * heads * (2 if config.effect is not None and config.effect.given else 1)


def _add_scores(measured: Measured, running: RunningModel, model: Model, prompts: Prompts, steps: Steps) -> None:
    """Split the scores for all claimed and chosen heads whose role has an `attention`."""
    task, asked = model.config.task, dict[tuple[str, Head], Asked]()
    for name, config in measured.roles.items():
        if config.attention is None:
            continue
        sides = partner_roles(task.roles, name)
        partners = Partners(
            **{
                side: tuple(head for role in roles for head in measured.receivers.get(role, ()))
                for side, roles in sides.items()
            }
        )
        for head in dict.fromkeys((*measured.receivers[name], *chosen_heads(measured, name))):
            asked[name, head] = Asked(head, config.attention.query, config.attention.source, partners)
    found = score_links(running, model, prompts, list(dict.fromkeys(asked.values())), steps)
    measured.scores.update({subject: found[each] for subject, each in asked.items()})


def chosen_heads(measured: Measured, role: str) -> tuple[Head, ...]:
    """Return the heads that show all the role's deciding quantities on the choosing half."""
    rows = measured.rows(role, "choosing")
    shown = np.logical_and.reduce(list(measured.passes(role, rows).values()))
    return _heads(rows[shown])


def _served(config: RoleActivationsConfig) -> str | None:
    return None if config.effect is None else config.effect.into or config.effect.given


def _to_patch(measured: Measured, role: str, claimed: Collection[Head], screened: int) -> list[Head]:
    """Return the heads to replace for a role; none if the role has no `effect`."""
    config = measured.roles[role]
    if config.effect is None:
        return []
    rows = measured.rows(role, "choosing")
    shown = [ok for name, ok in measured.passes(role, rows).items() if name != "effect"]
    meets = np.logical_and.reduce(shown) if shown else np.zeros(len(rows), bool)
    by = "attention_nonsink" if config.attention is not None else "write_share"
    best = rows[meets].sort_values(by, key=np.abs, ascending=False).head(MOST_CANDIDATES)
    large = rows.sort_values("effect_first_order", key=np.abs, ascending=False).head(screened)
    return list(dict.fromkeys((*claimed, *_heads(best), *_heads(large))))


def _patches(measured: Measured, role: str, head: Head) -> list[Patch]:
    config = measured.roles[role]
    assert config.effect is not None
    query, found = queries_of(config), [Patch(head, queries_of(config))]
    if config.effect.given is not None:
        receivers = measured.receivers[config.effect.given]
        if receivers and head not in receivers:
            found += [Patch(None, query, receivers), Patch(head, query, receivers)]
    return found


def _heads(rows: pd.DataFrame) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True))
