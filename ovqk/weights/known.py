"""Whether files are the model's that they are named after: by SHA-256 if one was published, else by sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.weights.types import Architecture

FILE = Path(__file__).with_name("known.yaml")
Identified = Literal["SHA-256", "repository", "sizes alone"]
"""What shows that files are a known model's: the published file's digest, the hub's own repository, or less."""
OTHER_TOKENS = 0.05
"""How much a vocabulary's size may differ, as a share: training adds tokens, and embeddings are padded or cut."""
FEW_TOKENS, OTHER_FEW = 1000, 0.01
"""A vocabulary of no more tokens than this is made for a model's task: it may differ by a smaller share."""


class OtherModelError(UserError):
    """Files of another model than their name says; `said` is the fact without the remedy."""

    def __init__(self, message: str, said: str) -> None:
        """Take the whole message, and the fact alone."""
        super().__init__(message)
        self.said = said


@dataclass(frozen=True)
class Sizes:
    """What can be told of a model without reading its weights; None if the files do not say.

    Attributes:
        layers, heads, d_model: of the model; `heads` counts the query heads in a layer.
        tokens: rows in the embedding.
        family: config.json's model_type.
        kv_heads: the heads in a layer that have keys and values of their own.
    """

    layers: int
    heads: int
    d_model: int
    tokens: int | None = None
    family: str | None = None
    kv_heads: int | None = None

    def fits(self, other: "Sizes") -> bool:
        """Say whether these may be one model's: heads and tokens both fit."""
        return self.heads_fit(other) and self.tokens_fit(other)

    def heads_fit(self, other: "Sizes") -> bool:
        """Say whether all but the vocabularies may be one model's: equal as far as both are known."""
        if (self.layers, self.heads, self.d_model) != (other.layers, other.heads, other.d_model):
            return False
        pairs = (self.family, other.family), (self.kv_heads, other.kv_heads)
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)

    def tokens_fit(self, other: "Sizes") -> bool:
        """Say whether the vocabularies are nearly as large, or the size of one is not known."""
        if self.tokens is None or other.tokens is None:
            return True
        allowed = OTHER_TOKENS if other.large else OTHER_FEW
        return abs(self.tokens - other.tokens) <= allowed * other.tokens

    @property
    def large(self) -> bool:
        """Whether the vocabulary is known and no task's own."""
        return self.tokens is not None and self.tokens > FEW_TOKENS

    def __str__(self) -> str:
        """Say them as messages do."""
        kv_heads = "" if self.kv_heads in (None, self.heads) else f" over {self.kv_heads} key-value heads"
        tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
        family = "" if self.family is None else f", family {self.family}"
        return f"{self.layers} layers of {self.heads} heads{kv_heads}, {self.d_model} wide{tokens}{family}"


@dataclass(frozen=True)
class KnownModel:
    """A model that published statements or claims are about.

    Attributes:
        sizes: what its files must look like.
        source: where the sizes were read.
        repo: its repository on the hub; None if it has none there.
        sha256: the SHA-256 of its one weights' file; None if it is not known.
    """

    name: str
    sizes: Sizes
    source: str
    repo: str | None = None
    sha256: str | None = None


@cache
def known_models() -> Mapping[str, KnownModel]:
    """Return name -> model, as known.yaml lists them."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: _known(name, entry, data["sources"]) for name, entry in data["models"].items()}


def _known(name: str, entry: Mapping[str, Any], sources: Mapping[str, str]) -> KnownModel:
    layers, heads, d_model, tokens = entry["sizes"]
    sizes = Sizes(layers, heads, d_model, tokens, entry.get("family"), entry.get("kv_heads", heads))
    source = sources.get(entry["source"], entry["source"])
    return KnownModel(name, sizes, source, entry.get("repo"), entry.get("sha256"))


def sizes_of_files(checkpoint: Checkpoint, architecture: Architecture) -> Sizes:
    """Return a checkpoint's sizes, as far as its files tell them."""
    tokens = checkpoint.config.get("vocab_size")
    if not isinstance(tokens, int):
        tokens = next(iter(checkpoint.shapes.get("embed.W_E", (None,))))
    family = checkpoint.config.get("model_type")
    known = architecture.n_layers, architecture.n_heads, architecture.d_model
    kv_heads = architecture.n_kv_heads if checkpoint.config else None  # TransformerLens may write one for each head
    return Sizes(*known, tokens, family if isinstance(family, str) else None, kv_heads)


def check_files(model: ModelConfig, checkpoint: Checkpoint, architecture: Architecture) -> list[str]:
    """Refuse files of another model than the one that they are named after, or whose claims are asked for.

    Files of the same sizes, such as a fine-tune's, cannot be told apart unless a SHA-256 is known. A large vocabulary
    that was cut or extended is no reason to refuse claims, which `model.claims` asks for on files of another name.

    Returns:
        Notes on what this rests on, if it rests on sizes alone; none if the files are proved, or bear no known name.

    Raises:
        OtherModelError: the files have other sizes, or are another known model's.
    """
    notes = []
    for key, name in {"model.name": model.name, "model.claims": model.claims}.items():
        known = known_models().get((name or "").lower())
        if known is None or (key == "model.claims" and known is known_models().get(model.name.lower())):
            continue
        found = sizes_of_files(checkpoint, architecture)
        _refuse_another(key, known, checkpoint, found)
        if identified_by(model, checkpoint, known.name) == "sizes alone":
            other = f"; the published file's is {known.sha256}" if known.sha256 is not None else ""
            notes.append(
                f"{key}={name}: that these are {known.name}'s weights was checked by their sizes alone "
                f"({known.sizes}), which a fine-tune shares. SHA-256 here: {digests_of(checkpoint)}{other}"
            )
        if not found.tokens_fit(known.sizes):
            notes.append(
                f"{key}={name}: these files have {found.tokens:,} tokens, {known.name} {known.sizes.tokens:,}. The "
                f"claims hold only if {known.name}'s vocabulary was cut or extended, not for a model of other tokens."
            )
    return notes


def digests_of(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of each of the weights' files, as messages and tables show them."""
    return ", ".join(f"{file} {sha256}" for file, sha256 in sorted(checkpoint.hashes.items()))


def _refuse_another(key: str, known: KnownModel, checkpoint: Checkpoint, found: Sizes) -> None:
    """Refuse files that cannot be a known model's.

    Raises:
        OtherModelError: their sizes differ, or their SHA-256 is another known model's.
    """
    named, resized = key == "model.name", known.sizes.large and found.heads_fit(known.sizes)
    remedy = "model=local with a name of their own (model.name=LABEL)" if named else "model.claims=null"
    hashes = set(checkpoint.hashes.values())
    other = next((each.name for each in known_models().values() if each.sha256 in hashes), known.name)
    if other != known.name:
        said = f"{checkpoint.label} is not {known.name}: it holds {other}, as its SHA-256 says"
    elif not (found.fits(known.sizes) or (resized and not named)):
        said = f"{checkpoint.label} is not {known.name}: it has {found}; {known.name} has {known.sizes}"
        if resized:
            remedy += f", and model.claims={known.name} beside it if {known.name}'s vocabulary was cut or extended"
    else:
        return
    raise OtherModelError(f"{key}={known.name}: {said}. Allowed: {known.name}'s files, or {remedy}.", said)


def identified_by(model: ModelConfig, checkpoint: Checkpoint, name: str) -> Identified | None:
    """Return what shows that a checkpoint is the known model of this name, if its sizes fit; None if none is known."""
    known = known_models().get(name.lower())
    if known is None:
        return None
    if known.sha256 is not None and known.sha256 in checkpoint.hashes.values():
        return "SHA-256"
    at_home = model.source is Source.hub and (model.repo or "").lower() == (known.repo or "").lower()
    return "repository" if at_home else "sizes alone"
