"""Memory that was freed goes back to the system, seldom enough to cost nothing."""

import re
from pathlib import Path

import pytest

from ovqk import memory
from ovqk.memory import FreedMemory

STATUS = Path("/proc/self/status")
glibc = pytest.mark.skipif(memory.malloc_trim() is None or not STATUS.exists(), reason="needs glibc and Linux")


def resident_mb() -> float:
    return int(re.search(r"VmRSS:\s*(\d+)", STATUS.read_text())[1]) / 1024


@glibc
def test_what_lies_between_blocks_in_use_goes_back(monkeypatch) -> None:
    monkeypatch.setattr(memory, "SPACING", 0.0)
    blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]  # below what glibc maps on its own
    kept = blocks[::50]
    del blocks
    before = resident_mb()
    assert FreedMemory().give_back()
    assert resident_mb() < before - 100
    assert all(block[0] == ord("x") for block in kept)


@glibc
def test_it_does_not_go_back_twice_in_a_moment(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    freed = FreedMemory()
    given = []
    for now[0] in (1.0, 2.5, 3.0, 5.0):
        given.append(freed.give_back())
    assert given == [False, True, False, True]


def test_another_c_library_is_left_alone(monkeypatch) -> None:
    class Other:
        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(memory, "SPACING", 0.0)
    monkeypatch.setattr(memory.ctypes, "CDLL", Other)
    memory.malloc_trim.cache_clear()
    try:
        assert not FreedMemory().give_back()
    finally:
        memory.malloc_trim.cache_clear()
