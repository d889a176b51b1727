"""Where weights come from: the bundle, a local directory or file, the hub's cache or the hub.

A checkpoint is a set of named tensors in safetensors files, a config and perhaps a tokenizer. Tensors are read
one at a time, so that only what an analysis needs is ever in memory; files are reopened for each read, because
mapped pages count as resident memory for as long as a file stays open.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovqk import hub
from ovqk.config import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.files import CONFIG, INDEX, TOKENIZER_FILES, digest, file_hash, names_by_shard, read_config

BUNDLED = Path(__file__).parent / "bundled"
FLOATING = ("F64", "F32", "F16", "BF16")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        label: how messages name it: what the user typed.
        directory: the folder that holds the files.
        config: `config.json`, or {} for a single file of TransformerLens names.
        files: tensor name -> the safetensors file that holds it.
        shapes: tensor name -> shape.
        unread: tensor name -> dtype, of tensors that are no floats of 16 bits or more.
        digest: SHA-256 over the weights, the config and the tokenizer files: what results depend on.
        revision: the hub's resolved commit; None elsewhere.
    """

    label: str
    directory: Path
    config: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    unread: dict[str, str]
    digest: str
    revision: str | None = None
    _finite: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Tensor name -> which of its rows were read before, and hold neither NaN nor infinity."""

    def __contains__(self, name: str) -> bool:
        if name in self.unread:  # a tensor that is asked for and cannot be read is no missing one
            raise UserError(
                f"{self.label}: tensor '{name}' is stored as {self.unread[name]}; allowed: "
                f"{', '.join(FLOATING)}. Give a checkpoint that is not quantised."
            )
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, 16-bit floats upcast to float32 first.

        Raises:
            UserError: the checkpoint does not hold it, or the file is damaged.
        """
        return self._read(name, lambda file: file.get_tensor(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read the rows start .. stop - 1 of one matrix, as `tensor` does.

        Raises:
            UserError: the checkpoint does not hold it, or the file is damaged.
        """
        finite = self._finite.setdefault(name, torch.zeros(self.shapes.get(name, (0,))[0], dtype=torch.bool))
        rows = self._read(name, lambda file: file.get_slice(name)[start:stop], known=bool(finite[start:stop].all()))
        finite[start:stop] = True
        return rows

    def _read(self, name: str, read: Callable[[Any], Tensor], known: bool = False) -> Tensor:
        """What is read of an open file, as float32 and apart from it: mapped pages go with the file.

        It is checked for NaN and infinity unless it is `known` to hold neither.
        """
        if name not in self:
            raise UserError(f"{self.label}: tensor '{name}' is missing from the checkpoint. {self._holds()}")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor = read(file).to(torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(self.files[name], error)) from error
        if not known:
            check_finite(self.label, name, tensor)
        return tensor

    def _holds(self) -> str:
        names = sorted(self.files)
        return f"It holds {len(names)} tensors, the first of them: {', '.join(names[:3])}."


def check_finite(label: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        UserError: it does.
    """
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # nan goes through; nothing is allocated
        raise UserError(
            f"{label}: tensor '{name}' holds NaN or infinity; allowed: finite weights. Did its training or its "
            "conversion to 16 bits fail?"
        )


def open_checkpoint(model: ModelConfig, hub_timeout: float = 60.0) -> Checkpoint:
    """Find a model's files and index their tensors, without reading any weights but for the digest.

    Args:
        model: the resolved model config.
        hub_timeout: seconds without anything new from the hub after which it is given up.

    Raises:
        UserError: nothing usable is there; the message says what was looked for and what to do.
    """
    if model.source is Source.bundled:
        return _open_directory(BUNDLED / model.name, label=f"model={model.name}")
    if model.source is Source.local:
        return _open_local(model)
    label = f"model={model.name} ({model.repo}@{model.revision})"
    found = hub.fetch(model, label, hub_timeout)
    return _checkpoint(label, found.directory, found.shards, found.hashes, found.commit)


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
        if path.suffix in PICKLED:
            raise UserError(f"{label}: a pickled file, which ovqk does not unpickle; allowed: safetensors.")
        files, shapes, unread = _index([path])
        if not any(name.startswith("blocks.") for name in files):
            raise UserError(
                f"{label}: a single file must hold TransformerLens names (blocks.0.attn.W_Q, ...); this one "
                f"holds {', '.join(sorted(files)[:3])}. Give the Hugging Face directory with its config.json."
            )
        return Checkpoint(label, path.parent, {}, files, shapes, unread, digest({path.name: file_hash(path)}))
    raise UserError(f"{label}: no such file or directory.")


def _open_directory(directory: Path, label: str) -> Checkpoint:
    if not (directory / CONFIG).is_file():
        raise UserError(
            f"{label}: not a checkpoint, it holds no config.json. A Hugging Face directory with config.json and "
            "model.safetensors is needed."
        )
    read_config(directory, label)  # tells of a damaged one before the weights are hashed
    shards = _shards(directory, label)
    return _checkpoint(label, directory, shards, {path.name: file_hash(path) for path in shards})


def _checkpoint(
    label: str, directory: Path, shards: list[Path], hashes: dict[str, str], revision: str | None = None
) -> Checkpoint:
    """A checkpoint of these shards, with the config and the tokenizer of a directory; `hashes` are the shards'."""
    files, shapes, unread = _index(shards)
    extras = [directory / name for name in (CONFIG, *TOKENIZER_FILES) if (directory / name).is_file()]
    content = digest(hashes | {path.name: file_hash(path) for path in extras})
    return Checkpoint(label, directory, read_config(directory, label), files, shapes, unread, content, revision)


def _shards(directory: Path, label: str) -> list[Path]:
    """The safetensors files of a directory, in the order of their names."""
    if (directory / INDEX).is_file():
        names = names_by_shard(directory, label)
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{label}: the index names {', '.join(missing)}, which the directory does not hold.")
        return [directory / name for name in names]
    shards = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if shards:
        return shards
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    found = f" It holds {', '.join(pickled[:3])}, which ovqk does not unpickle." if pickled else ""
    raise UserError(f"{label}: not a checkpoint, it holds no .safetensors file.{found}")


def _index(paths: Iterable[Path]) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], dict[str, str]]:
    """The files and shapes of tensors that can be read, and the dtypes of others: masks, and what is quantised."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unread: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    piece = file.get_slice(name)
                    if piece.get_dtype() in FLOATING:
                        files[name], shapes[name] = path, tuple(piece.get_shape())
                    else:
                        unread[name] = piece.get_dtype()
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(path, error)) from error
    return files, shapes, unread


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name}: not a complete safetensors file ({error}). Copy or download it again."
