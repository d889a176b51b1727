"""Independent jobs in threads, with torch single-threaded inside each.

LAPACK takes one small matrix at a time, so torch alone would run such jobs in sequence.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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
    """Call the function on every item, on as many at a time as torch has threads (one inside such a thread).

    Items are made in the caller's thread while the function works on earlier ones; at most two per thread wait, or are
    done and not yet taken. On another device than the CPU, items run one at a time because the device shares out work
    itself. The function must not set torch's number of threads. Results come in the order of the items.
    """
    workers = torch.get_num_threads()
    if workers < 2 or device.type != "cpu":
        return [function(item) for item in items]
    alone, threads, found = _in_this_mode(function), _threads(workers, os.getpid()), list[Result]()
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(alone, item))
            if len(waiting) > 2 * workers:
                found.append(waiting.popleft().result())
        while waiting:
            found.append(waiting.popleft().result())
    finally:  # after an error or Ctrl-C
        for future in waiting:
            future.cancel()
    return found


def begun(
    function: Callable[[Item], Result], items: Sequence[Item], device: torch.device = CPU
) -> Callable[[], list[Result]]:
    """Begin to call the function on every item, in the threads of `each`, and return a function that waits for it.

    The caller goes on meanwhile, so it must not change what the function reads. The results, or the first error, come
    when they are asked for. If `each` would run items one at a time, they are run at once.
    """
    workers = torch.get_num_threads()
    if workers < 2 or device.type != "cpu":
        found = each(function, items, device)
        return lambda: found
    alone, threads = _in_this_mode(function), _threads(workers, os.getpid())
    futures = [threads.submit(alone, item) for item in items]

    def results() -> list[Result]:
        try:
            return [future.result() for future in futures]
        finally:  # after an error or Ctrl-C
            for future in futures:
                future.cancel()

    return results


def _in_this_mode(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """Return the function for other threads, in the inference mode of this thread: a mode is a thread's own."""
    inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> Result:
        with torch.inference_mode(inference):
            return function(item)

    return alone


def decomposed(function: Callable[[Tensor], Any], batch: Inexact[Tensor, "*n rows columns"]) -> Any:
    """Decompose a batch of small matrices, shared out among threads, since LAPACK takes one matrix at a time.

    This is done on the CPU whatever the batch's device is, so that all devices round alike. That a GPU would be slower
    at matrices this small is expected, and was not measured.
    """
    if batch.device.type != "cpu":
        there = decomposed(function, batch.cpu())
        return there.to(batch.device) if isinstance(there, Tensor) else tuple(some.to(batch.device) for some in there)
    parts = min(torch.get_num_threads(), len(batch)) if batch.dim() > 2 else 1
    if parts < 2:
        return function(batch)
    found = each(function, batch.tensor_split(parts))
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(same) for same in zip(*found, strict=True))


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Start `count` threads with torch single-threaded in each: by default each would start as many of its own."""
    ready = Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first query sets the number for all threads
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
        torch.set_num_threads(before)  # the number set last, in any thread, holds for all new threads
    return pool
