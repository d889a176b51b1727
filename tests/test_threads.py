"""Work shared out among threads."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Event

import pandas as pd
import pytest
import torch
from support import ROOT

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.composition import LayerCircuits, composition_table
from ovqk.circuits.grams import dense
from ovqk.circuits.threads import begun, decomposed, each
from ovqk.config.choices import composed
from ovqk.config.schema import Circuit
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel


def test_small_decompositions_are_shared_out_among_threads_that_work_alone() -> None:
    batch = torch.randn(7, 5, 5, dtype=torch.float64)
    before, seen = torch.get_num_threads(), []

    def alone(part: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        decomposed(torch.linalg.svdvals, part)  # from within a thread: nothing waits for itself
        return torch.linalg.svdvals(part)

    try:
        torch.set_num_threads(2)
        for _ in range(2):
            assert torch.equal(decomposed(alone, batch), torch.linalg.svdvals(batch))
        assert seen == [1] * 4 and torch.get_num_threads() == 2
        U, S, Vh = decomposed(torch.linalg.svd, batch)
        assert torch.allclose(U @ S.diag_embed() @ Vh, batch)
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_is_raised() -> None:
    def fails(part: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such decomposition")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="no such decomposition"):
            decomposed(fails, torch.zeros(4, 2, 2))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_work_that_is_begun_gives_its_results_or_its_error_when_it_is_asked(threads) -> None:
    going, seen = Event(), list[int]()

    def square(i: int) -> int:
        if threads == 2:
            assert going.wait(60)  # the caller goes on before anything is done
        seen.append(torch.get_num_threads())
        return i * i

    def fails(i: int) -> int:
        raise ValueError("no such square")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = begun(square, [3, 1, 2])
        going.set()
        assert results() == results() == [9, 1, 4] and seen == [1] * 3
        with pytest.raises(ValueError, match="no such square"):
            begun(fails, [1, 2])()
        with torch.inference_mode():
            assert begun(lambda _: torch.is_inference_mode_enabled(), [1])() == [True]
    finally:
        torch.set_num_threads(before)


def test_items_are_made_as_they_are_needed_and_results_are_in_order() -> None:
    made, done = [], []

    def items():
        for i in range(40):
            made.append(i)
            assert len(made) - len(done) <= 6  # two at work, and as many as the threads can take next
            yield i

    def square(i: int) -> int:
        time.sleep(0.001 * (i % 3))
        done.append(i)
        return i * i

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert each(square, items()) == [i * i for i in range(40)]
        torch.set_num_threads(1)
        made.clear(), done.clear()
        assert each(square, items()) == [i * i for i in range(40)]
    finally:
        torch.set_num_threads(before)


def test_what_waits_is_given_up_at_an_error() -> None:
    begun = []

    def fails(i: int) -> None:
        begun.append(i)
        time.sleep(0.01)
        raise ValueError(str(i))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="0"):
            each(fails, range(100))
    finally:
        torch.set_num_threads(before)
    assert len(begun) < 10


def test_threads_work_in_the_mode_of_the_caller() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            total = torch.zeros(4)
            each(lambda i: total[i : i + 1].add_(i), range(4))
    finally:
        torch.set_num_threads(before)
    assert total.tolist() == [0, 1, 2, 3]


# --- LU ------------------------------------------------------------------------------------------------------

BY_LU = {"lu", "lu_factor", "lu_factor_ex", "lu_solve", "lu_unpack", "solve", "solve_ex", "inv", "inv_ex", "inverse",
         "det", "logdet", "slogdet", "matrix_power", "tensorinv", "tensorsolve"}  # fmt: skip
UNBATCHED = {
    ("ovqk/circuits/components.py", "_both_sides"),  # by `decomposed`, which shares a batch out among such threads
    (
        "ovqk/circuits/components.py",
        "_inverse_iteration",
    ),  # a loop over matrices, torch alone in each thread
    ("ovqk/circuits/positions.py", "_offset_design"),  # one matrix
    (
        "ovqk/circuits/spectra.py",
        "trace_ratio_bounds",
    ),  # by `decomposed`, which shares a batch out among such threads
}


def calls_by_lu(code: str) -> Iterator[str]:
    """The innermost function, or "", around each call of what torch computes by LU, whatever it is called on."""

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.ImportFrom):
            yield from (function for name in node.names if name.name in BY_LU)
        elif isinstance(node, ast.Attribute) and node.attr in BY_LU:
            yield function
        for inner in ast.iter_child_nodes(node):
            yield from visit(inner, function)

    yield from visit(ast.parse(code), "")


def test_nothing_is_decomposed_by_lu_in_a_batch() -> None:
    """Torch's batched LU on the CPU is wrong, hangs or raises from 150 rows on, with two threads or more."""
    assert list(calls_by_lu("def f(x):\n  g(torch.linalg.inv)\nx.det(); from torch.linalg import solve")) == [
        "f",
        "",
        "",
    ]
    found = {
        (path.relative_to(ROOT).as_posix(), function)
        for folder in ("ovqk", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for function in calls_by_lu(path.read_text(encoding="utf-8"))
    }
    assert found == UNBATCHED


COMPONENTS = """
import sys, torch
from ovqk.circuits.components import components
from ovqk.circuits.factors import Factors
from ovqk.circuits.maps import decompose
from ovqk.config.schema import Circuit
from ovqk.circuits.spectra import eigenvalues

torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
left, right = (torch.randn(3, *shape, generator=generator) for shape in ((176, 160), (160, 176)))
heads = decompose(Factors(Circuit.ov, left, right), centred=False)
found = components(heads, 3, eigenvalues(heads.core()) if sys.argv[3] == "near" else None)
spans = [side.mT @ side for side in (found.read, found.write)]
torch.save([found.head, found.kind, found.component, found.cluster_size, found.value, *spans], sys.argv[2])
"""


@pytest.mark.slow
def test_components_of_large_heads_are_the_same_with_two_threads(tmp_path) -> None:
    """At d_head 160, in processes that are given up where they hang."""
    ways = [(1, "whole"), (2, "whole"), (1, "near"), (2, "near")]
    for threads, way in ways:
        call = [sys.executable, "-c", COMPONENTS, str(threads), str(tmp_path / f"{threads} {way}"), way]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "MKL" not in done.stdout + done.stderr, done.stderr
    one, *others = (torch.load(tmp_path / f"{threads} {way}") for threads, way in ways)
    assert set(one[1].tolist()) == {0, 1} and set(one[0].tolist()) == {0, 1, 2}
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("task", ["sva", "ioi"])
def test_two_threads_read_a_task_and_compose_heads_as_one_does(task) -> None:
    """Each circuit's readouts, and each receiver's pairs, are a thread's own."""
    cell = composed(["model=mini-llama", f"task={task}", "tracking=none"])
    checkpoint = open_checkpoint(cell.model)
    opened = OpenedModel(open_weights(checkpoint, cell.model), "test", load_tokenizer(checkpoint))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = Model.read(opened, cell)
            read, layers = TaskReadout.read(model), [Layer(model, index) for index in range(4)]
            parts = [(x.decomposition(Circuit.ov, True), x.decomposition(Circuit.qk, True, x.span)) for x in layers]
            gram = dense(model.vocabulary.gram_embed)
            pairs = composition_table([LayerCircuits.of(*part) for part in parts], gram=gram, strongest=3)
            found.append(([read.metrics(layer) for layer in layers], pairs))
    finally:
        torch.set_num_threads(before)
    (one, pairs), (two, same) = found
    for values, others in zip(one, two, strict=True):
        assert list(values) == list(others) and values
        for name, value in values.items():
            assert torch.allclose(value, others[name], rtol=1e-9, atol=1e-12, equal_nan=True), name
    pd.testing.assert_frame_equal(pairs, same, rtol=1e-6, atol=1e-9)
