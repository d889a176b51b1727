"""Work shared out among threads in each of which torch works alone: what it would do one after the other itself."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import torch
from jaxtyping import Inexact
from torch import Tensor

CPU = torch.device("cpu")
Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device = CPU) -> list[Result]:
    """The function of every item, in order, as many at a time as torch has threads here (one, within such a thread).

    Items are made in the thread of the caller, while the function works on those before them: at most two for each
    thread wait, or are done and not yet taken. What another device computes it shares out by itself: there one item is
    taken at a time. The function must not set torch's number of threads.
    """
    workers = torch.get_num_threads()
    if workers < 2 or device.type != "cpu":
        return [function(item) for item in items]
    inference = torch.is_inference_mode_enabled()  # a mode is a thread's own

    def alone(item: Item) -> Result:
        with torch.inference_mode(inference):
            return function(item)

    threads, found = _threads(workers, os.getpid()), list[Result]()
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(alone, item))
            if len(waiting) > 2 * workers:
                found.append(waiting.popleft().result())
        while waiting:
            found.append(waiting.popleft().result())
    finally:  # of an error, or of Ctrl-C
        for future in waiting:
            future.cancel()
    return found


def decomposed(function: Callable[[Tensor], Any], batch: Inexact[Tensor, "*n rows columns"]) -> Any:
    """A decomposition of small matrices, the batch shared out: LAPACK takes one at a time."""
    parts = min(torch.get_num_threads(), len(batch)) if batch.dim() > 2 else 1
    if parts < 2 or batch.device.type != "cpu":
        return function(batch)
    found = each(function, batch.tensor_split(parts))
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(same) for same in zip(*found, strict=True))


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """So many threads of this process in which torch works alone: a new one would start as many of its own."""
    ready = Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first question of a thread sets what all threads are to have
        torch.set_num_threads(1)
        with suppress(BrokenBarrierError):
            ready.wait()

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "torch-alone", begin)
    try:
        for _ in range(count):
            pool.submit(int)
        ready.wait()
    except BaseException:  # no thread to be had, or Ctrl-C: those that wait are let go
        ready.abort()
        raise
    finally:
        torch.set_num_threads(before)  # what was set last, in whatever thread, holds for threads that are yet to come
    return pool
