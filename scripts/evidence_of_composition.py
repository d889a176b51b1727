"""Composition by component for given senders and receivers: the rows of a table in docs/evidence.md.

    python scripts/evidence_of_composition.py MODEL "16.0 17.8" "23.7"

For queries, keys and values: the mean score over senders and receivers (a sender's component that the receiver reads
most, and its whole OV), the mean over all heads in the senders' layers, and an exact p over all choices of as many
heads in the same layers. Senders that are in no earlier layer than a receiver do not compose with it, and do not count.
The last column is the mean by component if all heads in the receivers' layers receive.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ovqk.circuits.composition import MODES, LayerCircuits, component_scores, scores
from ovqk.published.quantities import Opened, head_of
from ovqk.weights.types import Head

Scores = NDArray[np.float64]
"""Of one layer's heads, each as sender: the mean over receivers behind them."""
ROUNDING = 1e-9


def by_component(sender: LayerCircuits, receiver: LayerCircuits, mode: str) -> Scores:
    """Score each head of a layer by the component of its OV that one receiver reads most."""
    found: Scores = component_scores(sender, receiver, mode).amax(-1).cpu().numpy()  # type: ignore[arg-type]
    return found


def by_head(sender: LayerCircuits, receiver: LayerCircuits, mode: str) -> Scores:
    """Score each head of a layer by its whole OV."""
    found: Scores = scores(sender, receiver, mode)[:, 0].cpu().numpy()  # type: ignore[arg-type]
    return found


def statistic(
    layers: Sequence[LayerCircuits],
    senders: Sequence[Head],
    receivers: Sequence[Head],
    mode: str,
    measure: Callable[[LayerCircuits, LayerCircuits, str], Scores],
) -> tuple[float, float, float]:
    """Return the mean over all pairs that compose, the same over all heads in the senders' layers, and p.

    Raises:
        SystemExit: no sender is in an earlier layer than a receiver.
    """
    weights = {layer: sum(layer < at for at, _ in receivers) for layer in {layer for layer, _ in senders}}
    pairs = sum(weights[layer] for layer, _ in senders)
    if not pairs:
        raise SystemExit("no sender is in an earlier layer than a receiver.")
    mine = expected = 0.0
    sums = np.zeros(1)
    for layer, chosen in Counter(layer for layer, _ in senders).items():
        if not weights[layer]:
            continue
        found = sum(measure(layers[layer], layers[at].only([head]), mode) for at, head in receivers if layer < at)
        assert isinstance(found, np.ndarray)
        mine += sum(float(found[head]) for at, head in senders if at == layer)
        expected += chosen * float(found.mean())
        drawn = np.array([found[list(heads)].sum() for heads in combinations(range(len(found)), chosen)])
        sums = (sums[:, None] + drawn).ravel()
    return mine / pairs, expected / pairs, float((sums >= mine - ROUNDING).mean())


def main() -> None:
    """Print a row for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("senders")
    parser.add_argument("receivers")
    asked = parser.parse_args()
    senders, receivers = (list(map(head_of, names.split())) for names in (asked.senders, asked.receivers))
    layers = Opened(asked.model).circuits
    for mode in MODES:
        cells = []
        for measure in (by_component, by_head):
            mean, matched, p = statistic(layers, senders, receivers, mode, measure)
            cells += [f"{mean:.3f}", f"{matched:.3f}", f"{p:.2g}"]
        every = [(layer, head) for layer, _ in receivers for head in range(len(layers[layer].ov.sigma))]
        cells.append(f"{statistic(layers, senders, every, mode, by_component)[0]:.3f}")
        print(f"| {mode.upper()} | {' | '.join(cells)} |")
    choices = math.prod(
        math.comb(len(layers[layer].ov.sigma), count)
        for layer, count in Counter(layer for layer, _ in senders if any(layer < at for at, _ in receivers)).items()
    )
    print(f"the least p is 1 of {choices:,}")


if __name__ == "__main__":
    main()
