"""The floor of a cell: the products that it needs, at the rate of one large product.

Counted are operations in matrix products. A Gram of n rows with themselves costs n d^2, because it is symmetric; every
other product of n x m with m x p costs 2 n m p. No decomposition is counted, and nothing that moves numbers only.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from threading import current_thread, main_thread
from typing import Any

import torch

from ovqk.circuits import simulated
from ovqk.plan import Sizes, head_products, plan_of
from ovqk.testing.random_checkpoints import Shape


def product_rate(n: int = 3072) -> float:
    """Floating point operations a second in one float32 product of n x n, the best of four."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    found = []
    for _ in range(4):
        started = time.perf_counter()
        a @ b
        found.append(time.perf_counter() - started)
    return 2 * n**3 / min(found)


def processor_rate(n: int = 2048) -> float:
    """The same for each second of processor time on one thread, which other processes disturb less."""
    a, b, threads, found = torch.randn(n, n), torch.randn(n, n), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            started = time.process_time()
            a @ b
            found.append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * n**3 / min(found)


def sizes_of_shape(shape: Shape) -> Sizes:
    """The sizes on which a cell's cost depends, for a checkpoint of this shape."""
    return Sizes(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads or shape.n_heads,
        d_model=shape.d_model,
        d_head=shape.d_head,
        n_vocab=shape.n_vocab,
        d_mlp=shape.mlp_width,
        gated=shape.family != "gpt2",
        tied=shape.tied,
        rotary=shape.family != "gpt2",
        learned=shape.family == "gpt2",
        normalised=shape.family == "gemma3_text",
        components=0,
    )


def spectra_operations(sizes: Sizes) -> float:
    """Operations that eigen- and singular values of every head need, QK and OV, both spaces.

    Besides the Grams and `head_products`, products of d x k with d x k, 2 d k^2 each: the residual cores (2) and Grams
    (4, symmetric: half), the full-vocabulary cores (2) and Grams (4, half).
    """
    s = sizes
    small = 2 * s.d_model * s.d_head**2 * s.n_layers * s.n_heads
    return s.n_vocab * s.d_model**2 * (1 if s.tied else 4) + head_products(s)["vocabulary"] + 8 * small


def cell_operations(sizes: Sizes, n_ctx: int, pairs: int) -> dict[str, float]:
    """Operations that a cell without a task needs, part by part: what is planned, and what a plan leaves out.

    Args:
        sizes: the model's.
        n_ctx: positions in the context; they are scored against each other if they are learned.
        pairs: complex pairs whose tokens are listed, each of which has a second direction on both sides. How many
            there are is known only once eigenvalues are.
    """
    s = sizes
    weight = 2 * s.d_model * s.d_head  # a row through one head's weight
    positions = n_ctx * s.learned * (weight * (s.n_heads + s.n_kv_heads) + n_ctx * s.d_head * s.n_heads) * s.n_layers
    n = simulated.TOKENS
    seen = 1.5 * n  # keys that a query in the second copy sees, on average
    copies = 1 + s.learned  # whose keys differ; without learned positions the second copy's are those of the first
    projected = weight * (s.n_heads + copies * s.n_kv_heads)
    sequences = simulated.SEQUENCES * n * (projected + 2 * seen * s.d_head * s.n_heads)
    composed = 0.0
    for layer in range(1, s.n_layers):
        received = n * min(simulated.SENDERS, layer * s.n_heads)  # rows that the senders wrote
        as_keys = weight * received * s.n_kv_heads + 2 * n * received * s.d_head * s.n_heads
        as_queries = (weight * n + 2 * n * received * s.d_model) * s.n_heads
        composed += weight * n * s.n_heads + min(as_keys, as_queries)
    composed += 2 * weight * n * min(simulated.SENDERS, (s.n_layers - 1) * s.n_heads)  # what a sender writes
    return dict(plan_of(s).operations) | {
        "second directions of complex pairs": 2 * pairs * 2.0 * s.n_vocab * s.d_model,
        "scores between positions": float(positions),
        "simulated attention": sequences * s.n_layers + composed,
    }


def products_done(function: Callable[[], Any]) -> float:
    """Operations in the products that a call makes, as torch counts them; on one thread, so that none is missed."""
    from torch.utils.flop_counter import FlopCounterMode

    def added(_: Any, a: torch.Size, b: torch.Size, **__: Any) -> int:  # in place, which torch does not count
        return 2 * a[0] * a[1] * b[1]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
            function()
    finally:
        torch.set_num_threads(threads)
    return float(counter.get_total_flops())


# --- where the time goes -------------------------------------------------------------------------------------

PARTS = {
    "vocabulary's Grams": ("ovqk.circuits.vocabulary", "centred_grams"),
    "Grams of normalised rows": ("ovqk.circuits.moments", "centred_grams"),
    "block 0 and its Grams": ("ovqk.circuits.effective_embeddings", "Block0.grams"),
    "moments of queries and keys": ("ovqk.circuits.moments", "normalised_head_moments"),
    "bases": ("ovqk.circuits.maps", "Basis.__init__"),
    "Grams times heads": ("ovqk.circuits.maps", "FactoredMaps._across"),
    "Grams times one side": ("ovqk.circuits.maps", "Basis.times"),
    "eigen- and singular values": ("ovqk.circuits.spectra", "decomposed"),
    "singular vectors": ("ovqk.circuits.maps", "decomposed"),
    "components": ("ovqk.structure.stages", "components"),
    "lists of tokens": ("ovqk.structure.token_tables", "Directions.tables"),
    "simulated attention": ("ovqk.structure.stages", "simulated_metrics"),
    "layers' summed QK": ("ovqk.structure.stages", "layer_row"),
    "reading layers": ("ovqk.structure.layer", "Layer.read"),
    "readouts": ("ovqk.tasks.task_readout", "ReadoutTables.visit"),
    "candidates and nulls": ("ovqk.analyse", "JudgedTables.tables"),
}
"""Part -> the function that does it. A part has what its function takes less what parts inside take."""


@contextmanager
def split_times() -> Iterator[dict[str, float]]:
    """Give part -> wall seconds, filled while the context is open."""
    found, inside = dict.fromkeys(PARTS, 0.0), [0.0]

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def again(*args: Any, **named: Any) -> Any:
            if current_thread() is not main_thread():  # its time is in that of the part that started the thread
                return function(*args, **named)
            inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                took = time.perf_counter() - started
                found[part] += took - inside.pop()
                inside[-1] += took

        return again

    undo = []
    for part, (module, path) in PARTS.items():
        owner: Any = import_module(module)
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield found
    finally:
        for owner, name, function in undo:
            setattr(owner, name, function)
