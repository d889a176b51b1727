"""Types and shapes are checked at every call while tests run, also in functions that are made anew at every call."""

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from support import checked
from torch import Tensor

from ovqk.weights.norms import normalise


def nested(annotation: Any, default: int = 0) -> Callable[..., Any]:
    @jaxtyped(typechecker=checked)
    def same(x: annotation, y: Float[Tensor, " n"], z: int = default) -> Float[Tensor, " n"]:
        return y if z < 2 else y[:1]

    return same


def test_the_package_is_checked() -> None:
    with pytest.raises(TypeCheckError, match="normalise"):
        normalise("rows", "layernorm", 1e-5)


def test_a_nested_function_is_checked_whenever_it_is_made() -> None:
    three = torch.ones(3)
    for default in (0, 1, 2):
        same = nested(Float[Tensor, " n"], default)
        if default < 2:
            assert same(three, three) is three
        else:  # its own default, not that of the first that was made
            with pytest.raises(TypeCheckError, match="return value"):
                same(three, three)
        with pytest.raises(TypeCheckError, match="return value"):
            same(three, three, z=2)
        with pytest.raises(TypeCheckError, match="parameters"):
            same(three, three[:2])
        with pytest.raises(TypeCheckError, match="parameters"):
            same("x", three)


def test_nested_functions_with_other_annotations_are_others() -> None:
    three = torch.ones(3)
    for annotation, right, wrong in ((str, "x", 1), (int, 1, "x"), (Annotated[bytes, ["unhashable"]], b"x", "x")):
        assert nested(annotation)(right, three) is three
        with pytest.raises(TypeCheckError, match="parameters"):
            nested(annotation)(wrong, three)
