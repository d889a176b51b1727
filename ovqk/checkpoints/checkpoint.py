"""A checkpoint on disk: named tensors, a config and perhaps a tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovqk.checkpoints.files import CONFIG
from ovqk.checkpoints.tensors import Tensors
from ovqk.errors import UserError

QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "scales": "MLX",
}
"""Names of a quantised tensor's other parts, in the order tried -> the method that uses them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        label: its name in messages, as the user typed it.
        directory: the folder that holds the files.
        config: `config.json`, or {} for a single file with TransformerLens names.
        tensors: its tensors, under the names that the architecture has in Hugging Face's checkpoints.
        digest: SHA-256 over the weights, the config and the tokenizer files, on which results depend.
        revision: the hub's resolved commit; None elsewhere.
        shards: a directory's safetensors files that the digest covers, in order; empty elsewhere.
        hashes: weights' file -> SHA-256.
        metadata: a GGUF file's own, which holds its tokenizer too; None elsewhere.
        quantisation: kind of tensor -> the number formats that a GGUF file stores it in; empty elsewhere.
        notes: facts about the files that whoever reads results must know, for instance that other files were not read.
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
    shards: tuple[Path, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
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
        """Make the error for a missing tensor, the first among n if given; it tells if weights are quantised."""
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
        return UserError(f"{self.label}: {told} ovqk does not fill in missing weights. {self._holds(name)}")

    def refuse_scaled(self, name: str) -> None:
        """Refuse a tensor that has a scale of its own beside it: its numbers alone are not the weights.

        Raises:
            UserError: it has.
        """
        stem = name.rpartition(".")[0]
        found = next((f"{stem}.{part}" for part in QUANTISED if f"{stem}.{part}" in self.shapes), None)
        if found is not None:
            raise UserError(
                f"{self.label}: tensor '{name}' is quantised: '{found}' lies beside it. Allowed: weights without "
                "scales. Give a checkpoint that is not quantised."
            )

    def quantised(self) -> str:
        """Say, in a sentence, how config.json has the weights quantised; empty if it names no method."""
        for config in (self.config, self.config.get("text_config")):
            settings = config.get("quantization_config") if isinstance(config, dict) else None
            if isinstance(settings, dict) and settings.get("quant_method"):
                method = settings["quant_method"]
                return f" The checkpoint is quantised: {CONFIG} gives quantization_config.quant_method={method}."
        return ""

    def _quantised_by_names(self) -> str:
        """Return the same, judged by tensors' names; only for errors, since other tensors may have such names too."""
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
        """Return one matrix's rows start .. stop - 1, as `tensor` does.

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


LARGEST = 1e9
"""The largest magnitude of a weight: products of four, as metrics have them, stay finite in float32."""


def check_finite(label: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity, or numbers whose products are infinite.

    Raises:
        UserError: it does.
    """
    if not tensor.numel():
        return
    extremes = torch.stack(tensor.aminmax())  # nan goes through; nothing is allocated
    if not extremes.isfinite().all():
        raise UserError(
            f"{label}: tensor '{name}' holds NaN or infinity; allowed: finite weights. Did its training or its "
            "conversion to 16 bits fail?"
        )
    largest = float(extremes.abs().max())
    if largest > LARGEST:
        raise UserError(
            f"{label}: tensor '{name}' holds a weight of magnitude {largest:.3g}; allowed: up to {LARGEST:g}. Is the "
            "file damaged?"
        )
