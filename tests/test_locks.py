"""A lock is waited for, and said so; one that cannot be had is a message that names it."""

import errno
import fcntl
import os
import threading
import time

import pytest
from filelock import Timeout

from ovqk import locks
from ovqk.errors import UserError
from ovqk.locks import locked
from ovqk.records.record import claim


@pytest.fixture
def refusing(monkeypatch):
    """A file system on which flock fails with an errno."""

    def refuse(number: int) -> None:
        def flock(descriptor: int, kind: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_lock_that_the_system_refuses_is_one_message(tmp_path, refusing, number) -> None:
    refusing(number)
    with pytest.raises(UserError) as found, claim(tmp_path, "0123456789ab"):
        pass
    for part in (f"results_dir={tmp_path}", "0123456789ab.lock", os.strerror(number), "cannot be locked"):
        assert part in str(found.value)


def test_a_file_system_that_forbids_locks_is_not_waited_for(tmp_path, refusing, monkeypatch) -> None:
    refusing(errno.EACCES)
    monkeypatch.setattr(locks, "SILENT", 0.2)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"refuses it .Permission denied"), locked(tmp_path / "a.lock", "a cell"):
        pass
    assert time.monotonic() - started < 5


def test_who_waits_says_for_what(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(locks, "SILENT", 0.2)
    entered = threading.Event()

    def hold() -> None:
        with locked(tmp_path / "a.lock", "a cell"):
            entered.set()
            time.sleep(0.8)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(5)
    with pytest.raises(Timeout), locked(tmp_path / "a.lock", "a cell", wait=False):
        pass
    assert capsys.readouterr().err == ""
    with locked(tmp_path / "a.lock", "a cell"):
        holder.join()
    assert capsys.readouterr().err == (
        f"waiting for a cell: another process is at work on it (lock {tmp_path / 'a.lock'})\n"
    )
    with locked(tmp_path / "a.lock", "a cell"):
        pass
    assert capsys.readouterr().err == ""
