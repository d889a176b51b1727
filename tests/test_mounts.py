"""Locks that stay on one machine are told from those that do not, by the mount of the results folder."""

from pathlib import Path

import pytest

from ovqk.records import mounts

MOUNTS = r"""24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 24 0:40 / /users rw,relatime shared:2 - nfs4 server:/users rw,vers=4.2,local_lock=none
31 24 0:41 / /scratch rw - nfs server:/scratch rw,vers=3,nolock,local_lock=all
32 31 0:42 / /scratch/my\040own rw - lustre mds:/x rw,flock
33 24 0:43 / /local rw - lustre mds:/y rw,localflock
34 24 0:44 / /win rw - cifs //server/x rw,nobrl
35 24 0:45 / /tmp rw - tmpfs tmpfs rw
36 24 0:46 / /twice rw - tmpfs tmpfs rw
37 36 0:47 / /twice rw - nfs server:/twice rw,local_lock=flock
a line that is none
"""


@pytest.mark.parametrize(("folder", "option"), [
    ("/users/me/results", None),
    ("/scratch/results", "/scratch is mounted as nfs with nolock"),
    ("/scratch/my own/results", None),
    ("/scratch/my ownother", "/scratch is mounted as nfs with nolock"),
    ("/local", "/local is mounted as lustre with localflock"),
    ("/win/a/b", "/win is mounted as cifs with nobrl"),
    ("/tmp/r", None),
    ("/twice/r", "/twice is mounted as nfs with local_lock=flock"),
    ("/elsewhere", None),
])  # fmt: skip
def test_a_mount_whose_locks_stay_on_this_machine_is_named(folder, option) -> None:
    said = mounts.warning(Path(folder), MOUNTS)
    assert said is None if option is None else said is not None and option in said and folder in said


def test_without_a_list_of_mounts_nothing_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "none")
    assert mounts.warning(tmp_path) is None


def test_a_command_warns_once_and_goes_on(tmp_path, monkeypatch, cli) -> None:
    (tmp_path / "mountinfo").write_text(f"31 24 0:41 / {tmp_path} rw - nfs server:/x rw,nolock\n")
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    code, printed = cli("-m", "task=none", "analysis=ov", "tracking=none", "analysis.components=0", "seed=0,1")
    assert code == 0 and printed.count("file locks do not reach other machines") == 1
    assert "2 done, 0 cached, 0 failed, 0 missing" in printed
