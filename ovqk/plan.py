"""A cell's cost, estimated before anything large is fetched: `ovqk plan MODEL`.

    python -m ovqk.plan MODEL [KEY=VALUE ...]

MODEL is a name in conf/model, a path or OWNER/NAME on the hub. Only config.json, the tokenizer's files and the weights'
headers are read. Operations are counted by the formulas that the cell uses. The time is how long they take at the rate
that this machine reaches now, each part as much slower than one large product as it was measured to be.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ovqk.config.command_line import model_argument, tool
from ovqk.config.schema import Device
from ovqk.errors import UserError, one_message

if TYPE_CHECKING:
    from ovqk.weights.types import WeightSource

IMPORTED = 320e6
"""How many bytes a process takes when it has imported everything that a cell needs."""
HOARDED, LISTS, KEPT = 250e6, 150e6, 256e6
"""The largest number of bytes besides weights and Grams: token blocks and memory that the C library keeps; token lists;
an embedding that is kept (docs/performance.md)."""
PER_THREAD = 275e6
"""The largest number of bytes that each thread except the first may take for its own blocks."""
LARGEST_MEASURED = 256
"""Decompositions are measured up to this dimension; for larger heads the time grows with the cube."""
START_UP = 5.0
"""How many seconds start-up takes, on a server with two cores."""
SLOWER = {
    "Grams of the vocabulary": 1.5,
    "block 0 of every token": 1.2,
    "Grams of block 0": 1.2,
    "Grams times heads": 1.5,
    "bases and cores": 2.2,
    "moments of queries and keys": 1.4,
    "summed W_QK": 1.5,
    "lists of tokens": 2.3,
}
"""Part -> how many times as long it takes as one large product with as many operations: rounded middles of four shapes
(docs/performance.md)."""
OTHERWISE, LISTING = 0.2e-6, 0.1e-6
"""Seconds that a head takes besides, for each of its d_model x d_head elements (conversions, simulated attention), and
what is added if components are listed; from the same four shapes."""
SPECTRA_ROW, LISTED, OTHER = 12.0, 3000.0, 2500.0
"""Bytes in the results: for a row in spectra.parquet, for a head and a component whose tokens are listed, and for the
rest of a head's results. Measured on SmolLM2-135M and on Gemma 3 270M's shape."""


class Sizes(NamedTuple):
    """The sizes that a cell's cost depends on.

    Attributes:
        n_vocab: rows of the embedding.
        d_mlp: hidden dimensions of block 0's MLP; 0 if it is not read.
        gated: whether the MLP has three matrices.
        normalised: whether queries and keys are, so that their moments are taken over sampled tokens.
        components: how many components are listed with their tokens for each circuit.
        block0: whether later layers are read through block 0, which needs its MLP if the model has one.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    n_vocab: int
    d_mlp: int
    gated: bool
    tied: bool
    rotary: bool
    learned: bool
    normalised: bool
    components: int
    block0: bool = True


@dataclass(frozen=True)
class Plan:
    """A cell's cost.

    Attributes:
        operations: part of the cell -> floating point operations in its products.
        decompositions: "eigenvalues" and other kinds -> how many d_head x d_head matrices.
        memory: an upper bound on the whole process's peak in bytes, on one thread.
        written: the results' size in bytes.
    """

    sizes: Sizes
    operations: Mapping[str, float]
    decompositions: Mapping[str, int]
    memory: float
    written: float

    @property
    def total(self) -> float:
        """The number of operations in all products."""
        return sum(self.operations.values())


def head_products(sizes: Sizes) -> dict[str, float]:
    """Count the products of each Gram, or of its triangular root, with all heads' bases.

    A whole d_model x d_model matrix times a basis takes 2 d_model^2 d_head operations, a triangular root half. The
    vocabulary's Gram goes through its root S: S Q, S K, S V, S O; if the embedding is not tied, W_V goes through the
    Gram of both embeddings besides. Moments of positions, or of normalised rows, have roots of their own: S Q and S K.
    Block 0's Grams give the cores of QK and of OV alone, with the side that has fewer heads.
    """
    s = sizes
    one = 2.0 * s.d_model**2 * s.d_head
    by_root = one / 2 * s.n_layers * (s.n_heads + s.n_kv_heads)
    return {
        "vocabulary": 2 * by_root + (0 if s.tied else one * s.n_layers * s.n_kv_heads),
        "positions": by_root * (s.learned or (s.rotary and not s.normalised)),
        "block 0": 2 * one * (s.n_layers - 1) * s.n_kv_heads * s.block0,
    }


def plan_of(sizes: Sizes) -> Plan:
    """Count the operations in a cell without a task.

    A product of n x m with m x p takes 2 n m p operations, and the Gram of one matrix takes half as many. Each head
    takes a basis for each weight (two products), each Gram times each basis with which it is needed (`head_products`),
    and some eight products of d_model x d_head with itself, which give cores and Grams. One product gives a layer's
    summed W_QK, raw and folded, with query heads that share keys summed first.
    """
    s = sizes
    heads, kv_heads = s.n_layers * s.n_heads, s.n_layers * s.n_kv_heads
    gram, small = s.n_vocab * s.d_model**2, 2 * s.d_model * s.d_head**2
    later = s.n_layers > 1 and s.block0
    operations = {
        "Grams of the vocabulary": gram * ((1 if s.tied else 4) + (s.rotary and not s.normalised)),
        "block 0 of every token": s.n_vocab
        * (2 * s.d_model * min(s.d_model, 2 * s.n_heads * s.d_head) + (6 if s.gated else 4) * s.d_model * s.d_mlp)
        * later,
        "Grams of block 0": 5 * gram * later,
        "Grams times heads": sum(head_products(s).values()),
        "bases and cores": small * (4 * (heads + kv_heads) + 10 * heads),
        "moments of queries and keys": s.normalised
        * min(s.n_vocab, 2**15)
        * (heads + kv_heads)
        * (2 * s.d_model * s.d_head + 2 * s.d_head**2),
        "summed W_QK": 2 * s.n_layers * s.d_model**2 * s.n_kv_heads * s.d_head,
        "lists of tokens": 8 * s.components * heads * 2 * s.n_vocab * s.d_model,
    }
    decompositions = {
        "eigenvalues": 2 * heads * (4 + later),
        "singular values": 2 * heads * 4,
        "singular vectors": 2 * heads * (s.components > 0),
    }
    layer = 4.0 * s.d_model * s.d_head * 2 * (s.n_heads + s.n_kv_heads)
    grams = 8.0 * s.d_model**2 * (3 + s.rotary + 3 * later)
    mlp = 4.0 * s.d_model * s.d_mlp * (3 if s.gated else 2)
    kept = min(KEPT, 4.0 * s.n_vocab * s.d_model) + LISTS * (s.components > 0)
    memory = IMPORTED + HOARDED + kept + 3 * layer + grams + mlp
    written = heads * (SPECTRA_ROW * s.d_head * 2 * 4 + LISTED * s.components + OTHER)
    counted = {name: float(count) for name, count in operations.items()}
    return Plan(s, counted, decompositions, memory, written)


# --- this machine --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How fast this machine is.

    Attributes:
        products: operations a second in a large product, on all threads.
        decompositions: kind -> seconds for one matrix, on one thread.
        threads: how many threads torch uses.
    """

    products: float
    decompositions: Mapping[str, float]
    threads: int

    def seconds(self, plan: Plan) -> float:
        """Return how long the plan's parts take, start-up left out; threads share the decompositions."""
        s = plan.sizes
        products = sum(SLOWER[part] * count for part, count in plan.operations.items()) / self.products
        each = sum(count * self.decompositions[kind] for kind, count in plan.decompositions.items())
        elements = s.n_layers * s.n_heads * s.d_model * s.d_head
        return products + each / self.threads + elements * (OTHERWISE + LISTING * (s.components > 0))


def measure_rates(d_model: int, d_head: int) -> Rates:
    """Measure this machine for about two seconds."""
    import torch

    from ovqk.circuits.grams import precision

    kind = precision(d_model)
    a, b = (torch.randn(2048, 2048, dtype=kind) for _ in range(2))
    n = min(d_head, LARGEST_MEASURED)
    core, larger = torch.randn(n, n, dtype=torch.float64), (d_head / n) ** 3
    threads = torch.get_num_threads()
    products = 2 * 2048**3 / _best(lambda: a @ b)
    torch.set_num_threads(1)
    try:
        decompositions = {
            "eigenvalues": larger * _best(lambda: torch.linalg.eigvals(core)),
            "singular values": larger * _best(lambda: torch.linalg.svdvals(core)),
            "singular vectors": larger * _best(lambda: torch.linalg.svd(core)),
        }
    finally:
        torch.set_num_threads(threads)
    return Rates(products, decompositions, threads)


def _best(function: Callable[[], Any], times: int = 4) -> float:
    """Return the seconds that the fastest call took, out of several."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


# --- the command ---------------------------------------------------------------------------------------------


@one_message()
def main(arguments: Sequence[str] | None = None) -> None:
    """Say what a cell on a model will take."""
    parser = argparse.ArgumentParser(
        prog=tool("plan"), description="Say what a cell of a model will take, before its weights are fetched."
    )
    parser.add_argument("model", help="a name of conf/model, a path, or OWNER/NAME on the hub")
    parser.add_argument(
        "choices", nargs="*", default=[], metavar="KEY=VALUE", help="such as analysis.components=0, model.revision=v1"
    )
    asked = parser.parse_args(arguments)

    from rich.filesize import decimal

    from ovqk.checkpoints.opening import survey_checkpoint
    from ovqk.config.choices import chosen
    from ovqk.weights.families import family_of, tensors_read
    from ovqk.weights.readers import open_weights

    config = chosen(model_argument(asked.model), *asked.choices)
    checkpoint, there = survey_checkpoint(config.model, config.hub_timeout, tensors_read)
    if there is not None:
        print(f"{checkpoint.label}, commit {there.commit}")
        print(f"to fetch     {decimal(there.to_fetch)} of {decimal(there.whole)}")
    else:
        print(f"{checkpoint.label}: on this machine")
    if checkpoint.config and family_of(checkpoint.config) is None:
        whole = 4 * sum(math.prod(shape) for shape in checkpoint.shapes.values())
        raise UserError(
            f"{checkpoint.label}: ovqk does not read this model layer by layer, so that it is loaded whole "
            f"through TransformerLens: {decimal(whole)} of memory in float32. Its time is not planned."
        )
    sizes = sizes_of(open_weights(checkpoint, config.model), checkpoint.shapes, config.analysis.components)
    plan, rates = plan_of(sizes), measure_rates(sizes.d_model, sizes.d_head)
    seconds = START_UP + rates.seconds(plan)
    print(
        f"heads        {sizes.n_layers} layers of {sizes.n_heads} heads over {sizes.n_kv_heads} KV heads, d_model "
        f"{sizes.d_model:,}, d_head {sizes.d_head}, {sizes.n_vocab:,} tokens"
    )
    print(f"memory       up to {decimal(int(plan.memory + PER_THREAD * (rates.threads - 1)))}")
    print(f"results      some {decimal(int(plan.written))}")
    print(f"operations   {plan.total:.2g}, the most for: {_most(plan)}")
    print(
        f"time         about {_duration(seconds)}: {rates.products / 1e9:.0f} GFLOP/s in products on {rates.threads} "
        f"threads, {1e3 * rates.decompositions['eigenvalues']:.1f} ms for the eigenvalues of a head"
    )
    if config.device is not Device.cpu:
        print(
            f"device={config.device.value}: the time and the memory are those of the processor and its memory, all the "
            "same: a GPU's are not planned."
        )
    print(
        "For a cell without a task, start-up included, on a machine that does nothing else. A task adds its words and "
        "nulls, up to as much again; analysis=full runs the model as well, which is not planned."
    )


def sizes_of(source: "WeightSource", shapes: Mapping[str, tuple[int, ...]], components: int) -> Sizes:
    """Return the sizes on which a cell's cost depends, from an architecture and from tensors' shapes."""
    from ovqk.weights.native import NativeWeights

    architecture = source.architecture
    n_vocab, d_mlp, gated, block0 = shapes.get("embed.W_E", (0,))[0], 0, False, source.foldable
    if isinstance(source, NativeWeights):
        parts = source.family.tensors
        n_vocab = shapes.get(source.tensor_name("embedding"), (0,))[0]
        gated = bool({"mlp_linear", "mlp_gate_and_linear"} & set(parts))
        fused = "mlp_gate_and_linear" in parts
        first = next((name for name in ("mlp_in", "mlp_gate_and_linear") if name in parts), None)
        if first is not None and not source.family.experts:
            d_mlp = math.prod(shapes.get(source.tensor_name(first, 0), (0,))) // architecture.d_model // (1 + fused)
        block0 = block0 and not source.family.experts and (first is None or d_mlp > 0)
    return Sizes(
        n_layers=architecture.n_layers,
        n_heads=architecture.n_heads,
        n_kv_heads=architecture.n_kv_heads,
        d_model=architecture.d_model,
        d_head=architecture.d_head,
        n_vocab=n_vocab,
        d_mlp=d_mlp,
        gated=gated,
        tied=architecture.tied,
        rotary=architecture.positions == "rotary",
        learned=architecture.positions == "learned",
        normalised=architecture.qk_norm,
        components=components,
        block0=block0,
    )


def _most(plan: Plan) -> str:
    """Name the three parts with the most operations, and their shares."""
    largest = sorted(plan.operations.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {value / plan.total:.0%}" for name, value in largest)


def _duration(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
