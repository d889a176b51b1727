"""A checkpoint's files: which one holds which tensor, and the hashes that results depend on."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from ovqk.errors import UserError
from ovqk.scratch import scratch_folder
from ovqk.whole_files import clear_abandoned, read_json, write_text

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json")


def read_config(directory: Path, label: str, name: str = CONFIG) -> dict[str, Any]:
    """Read a directory's config.json, or another file with JSON keys.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        config = read_json(directory / name)
    except (ValueError, OSError) as error:
        raise UserError(f"{label}: {name} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{label}: {name} must hold keys with values, not one {type(config).__name__}.")
    return config


def names_by_shard(directory: Path, label: str) -> dict[str, list[str]]:
    """Return the shards' file names, in order -> the tensors that a directory's index promises in each.

    Raises:
        UserError: the index is damaged.
    """
    shards: dict[str, list[str]] = {}
    try:
        for name, shard in read_json(directory / INDEX)["weight_map"].items():
            if Path(shard).name != shard or "\0" in shard:
                raise ValueError(f"{shard!r} is no file beside it")
            shards.setdefault(shard, []).append(name)
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{label}: {INDEX} is damaged ({error!r}).") from error
    return dict(sorted(shards.items()))


def notes_on_others(place: str, held: Iterable[str], shards: Iterable[str]) -> tuple[str, ...]:
    """Return notes on checkpoints and adapters that stand beside the one that is read.

    Args:
        place: how a note names what holds them.
        held: all files' names.
        shards: those that are read.
    """
    held, shards, notes = sorted(held), list(shards), []
    others = [name for name in held if name.endswith(".safetensors") and name not in (*shards, ADAPTER[1])]
    if others:
        read = SINGLE if SINGLE in shards else f"the shards of {INDEX}"
        notes.append(f"{place} holds more than one checkpoint: {read} was read, and {few(others)} was not")
    if any(name in held for name in ADAPTER):
        notes.append(f"{place} holds an adapter (LoRA or the like), which was not applied: these are the base weights")
    return tuple(notes)


def adapter_alone(directory: Path) -> str:
    """Return the message for a directory with an adapter and no model, with the base model if its config names it."""
    base = None
    if (directory / ADAPTER[0]).is_file():
        base = read_config(directory, str(directory), ADAPTER[0]).get("base_model_name_or_path")
    named = f" of {base}" if base else ""
    return (
        f"an adapter (LoRA or the like){named}, without the weights that it adapts. Merge it into its base model "
        "(PEFT's merge_and_unload) and give the merged checkpoint."
    )


def few(names: list[str]) -> str:
    """Name the first of some files, and count the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def digest(hashes: Mapping[str, str]) -> str:
    """Hash files' names together with their hashes, ordered by name (SHA-256)."""
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(f"{name}:{hashes[name]}\n".encode())
    return total.hexdigest()


def file_hash(path: Path) -> str:
    """Return a file's SHA-256; the hub's own for a file in its cache, remembered by size and times elsewhere.

    The time of the last change (ctime) is one of them: whoever copies another file there can set the other (mtime).
    """
    if path.is_symlink():
        blob = path.readlink()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and _in_hub_cache(path):
            return blob.name  # a large file's etag is its SHA-256; a small one's is git's hash
    real = path.resolve()
    status = real.stat()
    key = [str(real), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory = cache_folder() / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    try:
        remembered = read_json(memory)
        if remembered["key"] == key:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with real.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    remember(memory, {"key": key, "sha256": sha256})
    return sha256


def _in_hub_cache(path: Path) -> bool:
    """Whether a file lies in this user's Hugging Face cache: links of a folder from elsewhere may have any name."""
    from huggingface_hub import constants

    return path.parent.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())


@contextmanager
def folder_of(files: Iterable[Path], name: str = "files") -> Iterator[Path]:
    """Yield a folder with links to these files, those that exist, and with nothing else.

    A library that is given it cannot read another file of a checkpoint's directory, on which its digest does not
    depend: pickled weights, an adapter, code.
    """
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as above:
        folder = Path(above) / (name or "files")
        folder.mkdir()
        for path in files:
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())
        yield folder


def remember(path: Path, content: Any) -> None:
    """Write JSON that can be had again: atomically, and not at all if the disk does not take it or others write.

    Whoever writes clears what killed processes left half-written in the folder.
    """
    from filelock import Timeout

    from ovqk.locks import locked

    with suppress(OSError, Timeout):  # of a read-only home or a full disk; another process writes in the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(path.parent / "remember.lock", str(path.parent), wait=False):
                clear_abandoned(path.parent, ending=path.suffix)
                write_text(path, json.dumps(content))
        except UserError:  # of a file system without locks, where others' files cannot be told from abandoned ones
            write_text(path, json.dumps(content))


def cache_folder() -> Path:
    """Return the user's cache folder for ovqk (`OVQK_CACHE_DIR` moves it).

    Raises:
        UserError: the home folder is not known.
    """
    folder = Path(os.environ.get("OVQK_CACHE_DIR") or platformdirs.user_cache_dir("ovqk"))
    if str(folder).startswith("~"):
        raise UserError(
            f"the cache folder {folder}: the home folder is not known. Set HOME, or OVQK_CACHE_DIR to a whole path."
        )
    return folder
