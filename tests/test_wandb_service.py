"""What W&B's service is believed of a run."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wandb.proto.wandb_internal_pb2 import Record

from ovqk.tracking import service
from ovqk.tracking.service import FIRST, LAST, LOG_BLOCK, LOG_HEADER, WHOLE, reaches_its_exit

MIDDLE = 3
EXIT = Record()
EXIT.num = 57
EXIT.exit.exit_code = 0


def log_of(records: list[bytes]) -> bytes:
    """A log as LevelDB writes one, after W&B's own first bytes; checksums are not looked at."""
    log = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        first = True
        while True:
            room = LOG_BLOCK - len(log) % LOG_BLOCK
            if room < LOG_HEADER:
                log += bytes(room)
                continue
            piece, record = record[: room - LOG_HEADER], record[room - LOG_HEADER :]
            kind = (WHOLE if first else LAST) if not record else FIRST if first else MIDDLE
            log += bytes(4) + len(piece).to_bytes(2, "little") + bytes([kind]) + piece
            first = False
            if not record:
                break
    return bytes(log)


def history(size: int) -> bytes:
    record = Record()
    record.history.item.add(key="x", value_json="1" * size)
    return record.SerializeToString()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70_000), max_size=3), st.integers(0, 40))
@example([LOG_BLOCK - 50], 0)
def test_a_log_that_is_cut_short_anywhere_does_not_reach_its_exit(
    tmp_path_factory, sizes: list[int], to_end: int
) -> None:
    """Records of one piece and of many, the exit in two blocks among them."""
    path = tmp_path_factory.mktemp("log") / "run.wandb"
    first = [history(size) for size in sizes]
    free = LOG_BLOCK - len(log_of(first)) % LOG_BLOCK
    if free > 100:  # so that the exit begins so many bytes before the end of a block
        first.append(history(free - 60 - to_end))
    whole = log_of([*first, EXIT.SerializeToString()])
    path.write_bytes(whole)
    assert reaches_its_exit(path)
    for cut in (1, 2, 7, 8, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:-cut])
        assert not reaches_its_exit(path)
    path.write_bytes(log_of(first))
    assert not reaches_its_exit(path)


def test_a_log_of_another_format_is_believed(tmp_path) -> None:
    (tmp_path / "run.wandb").write_bytes(b"zstd and what not")
    assert reaches_its_exit(tmp_path / "run.wandb")


def test_a_run_that_is_never_written_to_its_end_was_not_received(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service, "WRITTEN_SECONDS", 0.05)
    log: Path = tmp_path / "run.wandb"
    log.write_bytes(log_of([history(10)]))
    with pytest.raises(service.NotReceivedError, match="ended before the run was written"):
        service.wait_for_end(log)
