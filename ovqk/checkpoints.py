"""Where weights come from: the bundle, a local directory or file, the hub's cache or the hub.

A checkpoint is a set of named tensors in safetensors files, a config and perhaps a tokenizer. Tensors are read
one at a time, so that only what an analysis needs is ever in memory; files are reopened for each read, because
mapped pages count as resident memory for as long as a file stays open.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovqk.config import ModelConfig, Source
from ovqk.errors import UserError

BUNDLED = Path(__file__).parent / "bundled"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json")
FLOATING = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        label: how messages name it: what the user typed.
        directory: the folder that holds the files.
        config: `config.json`, or {} for a single file of TransformerLens names.
        files: tensor name -> the safetensors file that holds it.
        shapes: tensor name -> shape.
        digest: SHA-256 over the weights, the config and the tokenizer files: what results depend on.
        revision: the hub's resolved commit; None elsewhere.
    """

    label: str
    directory: Path
    config: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    digest: str
    revision: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, 16-bit floats upcast to float32 first.

        Raises:
            UserError: the checkpoint does not hold it, or the file is damaged.
        """
        if name not in self.files:
            raise UserError(f"{self.label}: tensor '{name}' is missing from the checkpoint. {self._holds()}")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return file.get_tensor(name).to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(self.files[name], error)) from error

    def _holds(self) -> str:
        names = sorted(self.files)
        return f"It holds {len(names)} tensors, the first of them: {', '.join(names[:3])}."


def open_checkpoint(model: ModelConfig, hub_timeout: float = 60.0) -> Checkpoint:
    """Find a model's files and index their tensors, without reading any weights but for the digest.

    Args:
        model: the resolved model config.
        hub_timeout: seconds before an unanswered hub request is given up.

    Raises:
        UserError: nothing usable is there; the message says what was looked for and what to do.
    """
    if model.source is Source.bundled:
        return _open_directory(BUNDLED / model.name, label=f"model={model.name}")
    if model.source is Source.local:
        return _open_local(model)
    return _open_hub(model, hub_timeout)


def _open_local(model: ModelConfig) -> Checkpoint:
    if not model.path:
        raise UserError(
            "model.path: not set. model=local needs model.path=PATH, a Hugging Face directory or one "
            "safetensors file of TransformerLens names."
        )
    path = Path(model.path).expanduser()
    label = f"model.path={model.path}"
    if path.is_dir():
        return _open_directory(path, label)
    if path.is_file():
        files, shapes = _index([path])
        if not any(name.startswith("blocks.") for name in files):
            raise UserError(
                f"{label}: a single file must hold TransformerLens names (blocks.0.attn.W_Q, ...); this one "
                f"holds {', '.join(sorted(files)[:3])}. Give the Hugging Face directory with its config.json."
            )
        return Checkpoint(label, path.parent, {}, files, shapes, _digest([path]))
    raise UserError(f"{label}: no such file or directory.")


def _open_directory(directory: Path, label: str, revision: str | None = None) -> Checkpoint:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UserError(
            f"{label}: not a checkpoint, it holds no config.json. A Hugging Face directory with config.json and "
            "model.safetensors is needed."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{label}: config.json is not valid JSON ({error}).") from error
    shards = _shards(directory, label)
    files, shapes = _index(shards)
    extras = [directory / name for name in ("config.json", *TOKENIZER_FILES) if (directory / name).is_file()]
    return Checkpoint(label, directory, config, files, shapes, _digest([*shards, *extras]), revision)


def _shards(directory: Path, label: str) -> list[Path]:
    """The safetensors files of a directory, in the order of their names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{label}: model.safetensors.index.json is damaged ({error!r}).") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{label}: the index names {', '.join(missing)}, which the directory does not hold.")
        return [directory / name for name in names]
    shards = sorted(directory.glob("*.safetensors"))
    if shards:
        return shards
    pickled = sorted(path.name for path in directory.glob("*.bin")) + sorted(
        path.name for path in directory.glob("*.pt")
    )
    found = f" It holds {', '.join(pickled[:3])}, which ovqk does not unpickle." if pickled else ""
    raise UserError(f"{label}: not a checkpoint, it holds no .safetensors file.{found}")


def _index(paths: Iterable[Path]) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    piece = file.get_slice(name)
                    if piece.get_dtype() in FLOATING:  # leaves out boolean masks and 8-bit buffers
                        files[name], shapes[name] = path, tuple(piece.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(path, error)) from error
    return files, shapes


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name}: not a complete safetensors file ({error}). Copy or download it again."


# --- the hub -------------------------------------------------------------------------------------------------


def _open_hub(model: ModelConfig, timeout: float) -> Checkpoint:
    """Files of a hub repository, fetched where the cache does not hold them."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging

    repository = model.repo
    if not repository:
        raise UserError(f"model.repo: not set for model={model.name}. source=hub needs repo: OWNER/NAME.")
    label = f"model={model.name} ({model.repo}@{model.revision})"

    def fetch(filename: str) -> Path:
        return Path(hf_hub_download(repository, filename, revision=model.revision, etag_timeout=timeout))

    def fetch_if_there(filename: str) -> Path | None:
        try:
            return fetch(filename)
        except LocalEntryNotFoundError:
            return None  # offline, and not in the cache
        except EntryNotFoundError:
            return None

    hub_logging.set_verbosity_error()  # its retries are told by the one message below
    constants.HF_HUB_DOWNLOAD_TIMEOUT = max(1, int(timeout))
    try:
        directory = fetch("config.json").parent
        index = fetch_if_there("model.safetensors.index.json")
        if index is None:
            fetch("model.safetensors")
        else:
            for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
                fetch(name)
        for name in TOKENIZER_FILES:
            fetch_if_there(name)
    except GatedRepoError as error:
        raise UserError(
            f"{label}: the repository is gated. Accept its licence and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{label}: model.revision={model.revision} does not exist in the repository.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{label}: no such repository, or it is private and you are not logged in.") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{label}: not in the Hugging Face cache, and the hub could not be reached. Connect once, or use "
            "model=local model.path=DIR."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{label}: the repository holds no safetensors weights; ovqk unpickles nothing.") from error
    except (OSError, HfHubHTTPError) as error:
        raise UserError(f"{label}: the hub did not deliver the files ({type(error).__name__}: {error}).") from error
    return _open_directory(directory, label, revision=directory.name)


# --- digests -------------------------------------------------------------------------------------------------


def _digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, in order."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        total.update(f"{path.name}:{_file_digest(path)}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    """A file's SHA-256; the hub's own for a file in its cache, remembered by (path, size, mtime) elsewhere."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) in (40, 64):
        return real.name  # the hub's etag, a hash of the content
    status = real.stat()
    key = [str(real), status.st_size, status.st_mtime_ns]
    memory = cache_folder() / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        if remembered["key"] == key:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with real.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"key": key, "sha256": sha256}), encoding="utf-8")
        temporary.replace(memory)
    except OSError:
        pass  # a read-only home: the digest is computed again next time
    return sha256


def cache_folder() -> Path:
    """The user's cache folder for ovqk (`OVQK_CACHE_DIR` moves it)."""
    return Path(os.environ.get("OVQK_CACHE_DIR") or platformdirs.user_cache_dir("ovqk"))
