"""A GPU that is not there: its tensors keep their numbers in main memory, and refuse to meet others.

It finds what a machine without a GPU cannot: tensors of two devices in one operation, and a device's tensor handed to
numpy. It says nothing of a GPU's rounding or speed. `python -m support.pretend_gpu FOLDER CHOICE...` computes a cell on
it, in a process of its own, since torch cannot forget a device.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
"""The device's type, for torch."""
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
"""Operations that may take tensors from two devices."""
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations whose indices may be in main memory."""


class OnGpu(Tensor):
    """A tensor that says it is on the device; its numbers are `inner`, in main memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        """Wrap a tensor in main memory; conjugation is carried out, as torch does not see through the wrapper."""
        inner = inner.resolve_conj().resolve_neg()
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        """Return the numbers; torch's own refuses a wrapper."""
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents: None = None) -> str:
        """Print as the tensor inside does, which torch's own cannot."""
        return f"OnGpu({self.inner!r})"

    def __format__(self, spec: str) -> str:
        """Print a number as the tensor inside does."""
        return format(self.inner, spec)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on tensors of which one, at least, is on the device."""
        return dispatched(function, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Every operation, those without a tensor among them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(function, args, kwargs or {})


def dispatched(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation in main memory, and say of its results that they are where a GPU would leave them.

    Raises:
        RuntimeError: it takes tensors on two devices, as torch would raise on a GPU.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    asked = kwargs.get("device")
    if function in MOVES:
        on_gpu = isinstance(tensors[0], OnGpu) if asked is None else torch.device(asked).type == NAME
    else:
        looked_at = _in_one_place(args, kwargs) if function in INDEXED else tensors
        here = [isinstance(each, OnGpu) for each in looked_at if each.dim()]  # a lone number may be anywhere
        if any(here) and not all(here):
            places = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in tensors)
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found {places}")
        some = any(isinstance(each, OnGpu) for each in tensors)
        on_gpu = some if asked is None else torch.device(asked).type == NAME
        if on_gpu and any(isinstance(each, torch.Generator) for each in (*args, *kwargs.values())):
            raise RuntimeError(f"{function}: expected a generator on the device, but found one in main memory")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = function(*_inner(args), **_inner(kwargs))
    if function is aten.copy_.default:
        return args[0]
    known = {id(each.inner): each for each in tensors if isinstance(each, OnGpu)}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_gpu:
            return value
        return known[id(value)] if id(value) in known else OnGpu(value)

    return tree_map(outer, found)


def _in_one_place(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of an operation with indices that must be on one device: indices may be in main memory."""
    itself, indices, *rest = args
    on_gpu = [each for each in tree_leaves(indices) if isinstance(each, OnGpu)]
    return [leaf for leaf in tree_leaves((itself, on_gpu, rest, kwargs)) if isinstance(leaf, Tensor)]


def _inner(values: Any) -> Any:
    return tree_map(lambda value: value.inner if isinstance(value, OnGpu) else value, values)


@cache
def register() -> None:
    """Let torch know the device; it must come before anything is differentiated, and cannot be undone."""
    _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Let torch find the device, in this thread, and ovqk choose it, for as long as the context lasts."""
    register()
    device, before = torch.device(NAME, 0), torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with ExitStack() as stack:
            for module in ("ovqk.weights.devices", "ovqk.structure.model"):
                stack.enter_context(mock.patch(f"{module}.resolve_device", lambda _: device))
            stack.enter_context(_Everything())
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def main(folder: Path, *choice: str) -> None:
    """Compute a cell on the device, with its results below the folder."""
    from support.commands import computed

    with pretended():
        _, record, _ = computed(folder, *choice, "cache=off")
    assert record["status"] == "done", record


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
