"""The process in which statistical tests compute their cells: all of them, in order, and no error is lost there."""

import math
import operator
import os
import sys

import numpy as np
import pytest


def test_every_cell_is_computed_in_order(many_cells) -> None:
    assert many_cells(operator.neg, [1, 2, 3]) == [-1, -2, -3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process finds its number in /proc")
def test_all_but_the_first_are_computed_elsewhere(many_cells) -> None:
    first, *others = many_cells(os.path.realpath, ["/proc/self"] * 3)
    assert first == f"/proc/{os.getpid()}" and len(set(others)) == 1 and first not in others


def test_an_error_and_a_warning_there_are_errors_here(many_cells) -> None:
    with pytest.raises(ValueError, match="math domain"):
        many_cells(math.sqrt, [1.0, -1.0])
    with pytest.raises(RuntimeWarning, match="invalid value"):
        many_cells(np.log, [1.0, -1.0])
