"""A control: the share of heads that pass the tests of attention when the weights are random."""

import torch

from ovqk.activations.batches import Prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.parts import UNTRAINED, UNTRAINED_REPEATS, Steps
from ovqk.activations.quantities import RoleValues, attention_values, joined, places_of, queries_of
from ovqk.activations.repeats import run_repeats
from ovqk.activations.roles import Measured, Tests, heads_table, shows, with_attention, with_repeats


def untrained_control(
    running: RunningModel, prompts: Prompts, measured: Measured, seed: int, steps: Steps
) -> dict[str, dict[str, float]]:
    """Draw the running model's weights anew, and return the share of heads that pass the attention tests.

    Every matrix is drawn from a normal distribution with the matrix's mean and standard deviation; gains and biases
    stay. Writes and effects have no such control, because they are shares of the logit difference, and a model that
    does not do the task has none.

    Args:
        running: the model, which has random weights afterwards.
        prompts: the prompts.
        measured: the trained model's measurements.
        seed: the seed for the weights.
        steps: counts off batches.

    Returns:
        Role -> deciding attention quantity (`attention`, `repeats`) -> share of heads, in [0, 1].
    """
    running.redraw(seed)
    roles = {name: config for name, config in measured.roles.items() if config.attention is not None}
    parts: list[dict[str, RoleValues]] = []
    testing = [batch for batch in prompts.batches if batch.half == "testing"]
    for number in steps(len(testing), UNTRAINED) if roles else ():
        batch = testing[number]
        queries, _, places = places_of(batch, roles, ())
        clean, other = (running.run(tokens, places) for tokens in (batch.tokens, batch.counterfactual))
        values = {
            name: attention_values(config.attention, batch, clean, other, queries.get(queries_of(config)))
            for name, config in roles.items()
            if config.attention is not None
        }
        parts.append({name: RoleValues(**found) for name, found in values.items()})
    clusters = torch.cat([batch.clusters for batch in testing])
    tests = Tests(torch.ones(len(clusters), dtype=torch.bool), clusters.numpy(), seed)
    trained, n_start = measured.repeats, len(prompts.start)
    repeats = None if trained is None else run_repeats(running, trained.tokens, n_start, steps, UNTRAINED_REPEATS)
    found: dict[str, dict[str, float]] = {}
    for name, config in measured.roles.items():
        table = heads_table(name, running.n_layers, running.n_heads)
        if name in roles:
            table = with_attention(table, config, joined([part[name] for part in parts]), tests)
        if config.repeats is not None and repeats is not None:
            table = with_repeats(table, config.repeats, repeats, "testing", seed)
        asked = [quantity for quantity in ("attention", "repeats") if f"{quantity}_p" in table]
        shares = {
            quantity: float(shows(config, quantity, table).mean()) for quantity in asked if quantity in config.decides
        }
        if shares:
            found[name] = shares
    return found
