"""A file is written whole or not at all, and what is left behind is known by its name."""

import errno
import json

import pytest
from filelock import FileLock

from ovqk.checkpoints.files import remember
from ovqk.whole_files import clear_abandoned, is_temporary, temporary, whole, write_json, write_text


def test_a_file_takes_the_place_of_the_one_before_at_the_end(tmp_path) -> None:
    path = tmp_path / "record.json"
    write_text(path, "before")
    with whole(path) as file:
        file.write("after")
        assert path.read_text() == "before" and temporary(path).exists()
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_what_breaks_off_leaves_the_file_as_it_was(tmp_path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), whole(path, "wb") as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_temporary_names_are_known(tmp_path) -> None:
    assert is_temporary(temporary(tmp_path / "heads.parquet").name)
    assert not is_temporary("heads.parquet") and not is_temporary(".written")


def test_what_killed_processes_left_is_deleted_for_one_file_or_for_all(tmp_path) -> None:
    names = [".a.json.7.tmp", ".a.json.12.tmp", ".b.json.7.tmp", "a.json", ".a.json.lock"]
    for name in names:
        (tmp_path / name).touch()
    clear_abandoned(tmp_path, "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
    clear_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[3:])
    clear_abandoned(tmp_path / "none")


def test_a_number_that_is_not_finite_is_null(tmp_path) -> None:
    write_json(tmp_path / "a.json", {"a": [1.5, float("nan")], "b": (float("inf"),)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None], "b": [None]}


def test_remembering_deletes_what_killed_processes_left(tmp_path) -> None:
    (tmp_path / ".digest.json.7.tmp").touch()
    remember(tmp_path / "other.json", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "remember.lock"]


def test_remembering_leaves_alone_what_others_fetch_into_the_folder(tmp_path) -> None:
    (tmp_path / ".model.safetensors.7.tmp").touch()  # a part of a hub model, under a lock of its own
    remember(tmp_path / "listing.json", {"a": 1})
    assert (tmp_path / ".model.safetensors.7.tmp").exists()


def test_remembering_waits_for_no_other_process_and_deletes_nothing_of_it(tmp_path) -> None:
    (tmp_path / ".digest.json.7.tmp").touch()
    with FileLock(tmp_path / "remember.lock"):
        remember(tmp_path / "other.json", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digest.json.7.tmp", "remember.lock"]


def test_where_there_are_no_locks_it_is_remembered_and_nothing_is_deleted(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".digest.json.7.tmp").touch()
    remember(tmp_path / "other.json", {"a": 1})
    assert {path.name for path in tmp_path.iterdir()} >= {".digest.json.7.tmp", "other.json"}
