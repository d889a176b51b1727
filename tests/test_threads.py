"""Work shared out among threads."""

import time

import pytest
import torch

from ovqk.threads import decomposed, each


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
