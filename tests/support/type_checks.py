"""Beartype for jaxtyping's import hook, which decorates a nested function anew whenever the function around it runs."""

from collections.abc import Callable, Hashable
from typing import Any

from beartype import beartype

_nested: dict[Hashable, Callable[..., Any]] = {}


def checked(function: Any) -> Any:
    """Return what checks calls of `function`; nested functions with one name and the same annotations share it.

    jaxtyping hands over a function with the arguments and annotations of the one to check, and with no body.
    """
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    code = function.__code__
    arguments = (code.co_varnames, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags)
    key = (function.__module__, function.__qualname__, arguments, *function.__annotations__.items())
    try:
        if key not in _nested:
            _nested[key] = beartype(function)
    except TypeError:  # an annotation that cannot be hashed
        return beartype(function)
    return _nested[key]
