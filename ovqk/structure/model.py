"""A model without a task: the parts that all layers share, read once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.circuits import grams, moments
from ovqk.circuits.diagonals import ranked_tokens
from ovqk.circuits.effective_embeddings import Block0
from ovqk.circuits.grams import Block0Grams, FullCircuit
from ovqk.circuits.sides import Block0Side, WrittenRows
from ovqk.circuits.simulated import Simulated
from ovqk.circuits.vocabulary import Vocabulary, read_vocabulary
from ovqk.config.schema import Circuit, Config, Processing
from ovqk.structure.availability import (
    NO_EMBEDDING,
    NO_LATER_LAYER,
    NO_UNEMBEDDING,
    unavailable_metrics,
    why_no_unembedding,
)
from ovqk.structure.kept import Kept, once
from ovqk.structure.rare_tokens import RareTokens, rare_tokens
from ovqk.structure.token_tables import Directions
from ovqk.weights.devices import resolve_device, to_device
from ovqk.weights.folding import fold_embeddings, fold_mlp, fold_reads
from ovqk.weights.mlp import ACTIVATIONS, UNTOLD
from ovqk.weights.types import Architecture, OpenedModel, WeightSource

Value = TypeVar("Value")


@dataclass(frozen=True)
class Model:
    """Everything that is read once per model and shared by its layers; large parts when they are first needed.

    Attributes:
        source: the raw weights.
        config: the resolved cell; its task has no part here.
        device: the device that computes products.
        label: the model's name in messages.
        vocabulary: folded embeddings, for readouts and shares; None if the checkpoint holds no embedding.
        spectral_vocabulary: embeddings as processed, for full-circuit spectra.
        W_pos: learned position embeddings; None without them.
        tokenizer: None if there is none.
        kept: what this process keeps of the model for its next cells; None if it keeps nothing.
    """

    source: WeightSource
    config: Config
    device: torch.device
    label: str
    vocabulary: Vocabulary | None
    spectral_vocabulary: Vocabulary | None
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    tokenizer: Tokenizer | None
    kept: Kept | None = None

    @property
    def architecture(self) -> Architecture:
        """The architecture of the checkpoint."""
        return self.source.architecture

    @property
    def circuits(self) -> list[Circuit]:
        """The circuits that the analysis takes apart."""
        return [Circuit(name) for name in self.config.analysis.circuits]

    @property
    def folds(self) -> bool:
        """Whether spectra are computed from folded weights."""
        return self.config.processing is Processing.folded and self.source.foldable

    @property
    def centred(self) -> bool:
        """Whether the spectra's weights are orthogonal to the all-ones direction."""
        return self.folds and self.architecture.norm == "layernorm"

    @cached_property
    def block0(self) -> Block0 | str:
        """The effective embedding of later layers, or why there is none."""
        return self._once("block0", lambda: read_block0(self.source, self.vocabulary, self.device))

    @cached_property
    def unavailable(self) -> dict[str, str]:
        """Metric -> why no head of this model has it, whatever the task."""
        return unavailable_metrics(
            self.circuits,
            self.architecture,
            self.vocabulary,
            None if self.W_pos is None else self.W_pos.shape[0],
            self.block0,
            self.source.no_vocabulary or NO_EMBEDDING,
            self.config.analysis.diagonals,
        )

    @cached_property
    def token_moments(self) -> tuple[moments.Moments, moments.Moments] | None:
        """Moments over plain and over normalised embedding rows (the second only under rotary positions)."""
        if self.vocabulary is None:
            return None
        plain = moments.token_moments(self.vocabulary)
        if self.architecture.positions != "rotary":
            return plain, plain
        return plain, moments.normalised_moments(self.vocabulary, self.architecture)

    @cached_property
    def sampled_rows(self) -> Float[Tensor, "sampled d_model"] | None:
        """Embedding rows over which normalised queries and keys have their moments; None without an embedding."""
        return None if self.vocabulary is None else moments.sample_rows(self.vocabulary.W_E)

    @cached_property
    def position_moments(self) -> moments.Moments | None:
        """Moments over the rows of W_pos; None without learned positions."""
        return None if self.W_pos is None else moments.row_moments(self.W_pos)

    @cached_property
    def simulated(self) -> Simulated | None:
        """The inputs of simulated attention; None without an embedding, or if it or the context has too few tokens."""
        if self.vocabulary is None:
            return None
        block0 = self.block0 if isinstance(self.block0, Block0) else None
        return Simulated.of(self.vocabulary, self.W_pos, block0, self.architecture)

    @cached_property
    def diagonal_rows(self) -> WrittenRows | None:
        """What layers after the first read of each token when diagonals are ranked, normalised: block 0's MLP output.

        Plain rows without an MLP, or if it writes nothing; None if the MLP cannot be read.
        """
        vocabulary, block0, side = self.vocabulary, self.block0, self.block0_side
        if vocabulary is None or isinstance(block0, str):
            return None
        return WrittenRows(vocabulary, block0, None if side is None else side.read)

    @cached_property
    def block0_grams(self) -> Block0Grams | None:
        """Gram matrices of the block0 embeddings; None if they cannot be had, or if no layer reads them."""
        block0, vocabulary = self.block0, self.vocabulary
        if not isinstance(block0, Block0) or vocabulary is None or self.architecture.n_layers == 1:
            return None
        keeps = self.config.analysis.diagonals and Circuit.qk in self.circuits  # the MLP then runs once for both
        reader = self.diagonal_rows if keeps else self.block0_side
        return self._once("block0_grams", lambda: block0.grams(vocabulary, None if reader is None else reader.read))

    def _once(self, name: str, make: Callable[[], Value]) -> Value:
        """Return a value that depends on the embeddings alone: an earlier cell's, if this process keeps one."""
        return once(self.kept, name, None if self.vocabulary is None else self.vocabulary.size, make)

    def read_block0_rows(self) -> None:
        """Read all block0 embeddings for token lists, in order, unless they were read already, by `block0_grams`.

        Rounding depends on the blocks of tokens in which rows are computed and summed. They are read as `block0_grams`
        reads them, so that lists are the same if nothing needs the Grams, or if an earlier cell has left them.
        """
        if self.block0_side is not None and not self.block0_side.passed:
            n, d_model = self.block0_side.rows.shape
            self.block0_side.read(0, min(n, grams.SHIFT_TOKENS))
            for some in grams.gram_blocks(n, d_model):
                self.block0_side.read(some.start, some.stop)

    def block0_circuit(self, circuit: Circuit) -> FullCircuit | None:
        """Return the Grams of full circuits that read block0 embeddings, as layers after the first do; folded.

        None if block0 embeddings cannot be had, and for OV without an unembedding.
        """
        found, vocabulary = self.block0_grams, self.vocabulary
        if found is None or vocabulary is None:
            return None
        return FullCircuit.of(circuit, lambda: found.embed, lambda: (found.cross, vocabulary.gram_unembed))

    @property
    def why_no_matching(self) -> str | None:
        """Why pairs of heads have no `matching`; None if they have. No Gram is computed."""
        if self.vocabulary is None:
            return self.source.no_vocabulary or NO_EMBEDDING
        if isinstance(self.block0, str):
            return self.block0
        return NO_LATER_LAYER if self.block0.mlp_writes and self.architecture.n_layers == 1 else None

    @property
    def why_no_block0_circuit(self) -> str | None:
        """Why `block0_circuit` returns None for OV; None if it returns Grams. No Gram is computed."""
        if self.why_no_matching or self.architecture.n_layers == 1:
            return self.why_no_matching or NO_LATER_LAYER
        return NO_UNEMBEDDING if self.vocabulary is None else why_no_unembedding(self.vocabulary)

    @property
    def lists_tokens(self) -> bool:
        """Whether components are read out as token lists."""
        return self.vocabulary is not None and self.config.analysis.components > 0

    @cached_property
    def rare_tokens(self) -> RareTokens | None:
        """The tokens that lists leave out; None if there are no lists, or if they leave none out."""
        if self.vocabulary is None or not self.lists_tokens or self.config.analysis.rare_tokens:
            return None
        vocabulary, tokenizer, tied = self.vocabulary, self.tokenizer, self.architecture.tied
        of = vocabulary.size, tokenizer is None
        return once(self.kept, "rare_tokens", of, lambda: rare_tokens(vocabulary, tokenizer, tied))

    @cached_property
    def block0_side(self) -> Block0Side | None:
        """The vocabulary as block0 embeddings, if token lists read some layer through them."""
        if not isinstance(self.block0, Block0) or self.vocabulary is None or not self.lists_tokens:
            return None
        if not any(
            self.config.analysis.directions_embedding.kind(layer) == "block0"
            for layer in range(self.architecture.n_layers)
        ):
            return None
        return Block0Side(self.vocabulary, self.block0, self.listed)

    @cached_property
    def listed(self) -> Bool[Tensor, " token"]:
        """The tokens that may be listed: True for each of them."""
        if self.rare_tokens is not None:
            return self.rare_tokens.listed
        n = 0 if self.vocabulary is None else self.vocabulary.size
        return torch.ones(n, dtype=torch.bool, device=self.device)

    @cached_property
    def directions(self) -> Directions | None:
        """The reader of tokens; None without a vocabulary, or if no component is asked for."""
        if self.vocabulary is None or not self.lists_tokens:
            return None
        return Directions(
            self.vocabulary,
            self.tokenizer,
            architecture=self.architecture,
            embedding=self.config.analysis.directions_embedding,
            later=self.block0_side,
            listed=self.listed,
        )

    @property
    def sample_notes(self) -> list[str]:
        """Notes that say if position and content shares, or diagonal ranks, come from sampled tokens."""
        architecture, vocabulary, notes = self.architecture, self.vocabulary, list[str]()
        if vocabulary is None:
            return notes
        if architecture.qk_norm and architecture.positions == "rotary" and Circuit.qk in self.circuits:
            step = moments.sample_step(vocabulary.size, vocabulary.d_model)
            if step > 1:
                notes.append(
                    "qk_share_*, qk_prev_auc and offsets: queries and keys are normalised, so their moments are taken "
                    f"over one in {step} of {vocabulary.size:,} tokens"
                )
        ranked = len(ranked_tokens(vocabulary.size))
        if self.config.analysis.diagonals and ranked < vocabulary.size:
            notes.append(
                f"ov_diagonal_*, qk_diagonal_first: the entries of {ranked:,} of {vocabulary.size:,} tokens are "
                "ranked, among all tokens"
            )
        return notes

    @property
    def offset_notes(self) -> list[str]:
        """Notes on offsets of `analysis.offsets` that the model does not have."""
        offsets, n_ctx = self.config.analysis.offsets, self.architecture.n_ctx
        if Circuit.qk not in self.circuits:
            return []
        if self.architecture.positions != "rotary":
            said = "QK spectra stand once, at offset 0, for the model has no rotary positions"
            return [] if set(offsets) == {0} else [f"analysis.offsets={offsets}: {said}"]
        if n_ctx is None or max(offsets) < n_ctx:
            return []
        said = f"with {n_ctx:,} tokens of context no key is {max(offsets):,} before its query"
        return [f"analysis.offsets={offsets}: {said}"]

    @property
    def direction_notes(self) -> list[str]:
        """Notes on token lists: how many tokens are left out, and whether block0 embeddings are missing."""
        if not self.lists_tokens:
            return []
        rare = None if self.rare_tokens is None else self.rare_tokens.note
        notes = [] if rare is None else [rare]
        kinds = {self.config.analysis.directions_embedding.kind(layer) for layer in range(self.architecture.n_layers)}
        if isinstance(self.block0, str) and "block0" in kinds:
            notes.append(
                f"directions: all layers are read through token embeddings, for want of block0 ones: {self.block0}"
            )
        return notes

    @property
    def processing(self) -> dict[str, str]:
        """The processing asked for, and the processing that the weights got."""
        asked = self.config.processing.value
        applied = "folded" if self.folds else "raw"
        if self.architecture.norm == "none" and not self.architecture.post_norm:
            return {"requested": asked, "applied": "raw", "reason": "the model has no norms: nothing to fold"}
        if applied != asked:
            return {"requested": asked, "applied": applied, "reason": "the model's norms cannot be folded"}
        return {"requested": asked, "applied": applied}

    @classmethod
    def read(cls, opened: OpenedModel, config: Config, kept: Kept | None = None) -> "Model":
        """Read the embeddings, over the tokens that the tokenizer knows; the task of the config has no part in it.

        `kept` is what earlier cells of this process left (see the class).

        Raises:
            UserError: an embedding holds NaN or infinity, or `device` is not there.
        """
        device = resolve_device(config.device)
        embeddings = once(kept, "embeddings", opened.n_tokens, lambda: read_embeddings(opened, config, device))
        return cls(opened.source, config, device, opened.label, *embeddings, opened.tokenizer, kept)


def read_embeddings(
    opened: OpenedModel, config: Config, device: torch.device
) -> tuple[Vocabulary | None, Vocabulary | None, Float[Tensor, "n_ctx d_model"] | None]:
    """Return the embeddings folded, as the config processes them, and of positions; None for each that is not there.

    Raises:
        UserError: an embedding holds NaN or infinity.
    """
    source, label, n_tokens = opened.source, opened.label, opened.n_tokens
    raw = to_device(source.embeddings(), device)
    folded = fold_embeddings(raw, source.architecture) if source.foldable else raw
    vocabulary = None if folded.W_E is None else read_vocabulary(folded, n_tokens, label)
    spectral = vocabulary
    if config.processing is Processing.raw and source.foldable and raw.W_E is not None:
        spectral = read_vocabulary(raw, n_tokens, label)
    return vocabulary, spectral, folded.W_pos


def read_block0(source: WeightSource, vocabulary: Vocabulary | None, device: torch.device) -> Block0 | str:
    """Read block 0, whose output later layers read as their effective embedding; or say why it cannot be had."""
    if vocabulary is None:
        return source.no_vocabulary or NO_EMBEDDING
    if not source.foldable:
        return "the model's norms cannot be folded"
    layer0 = fold_reads(to_device(source.layer(0), device), source.architecture)
    mlp = source.first_mlp()
    if mlp == "the model has no MLP":
        return Block0(layer0, None, source.architecture)
    if isinstance(mlp, str):
        return mlp
    if mlp.activation == UNTOLD:
        return "a file of TransformerLens names does not tell the MLP's activation"
    if mlp.activation not in ACTIVATIONS:
        return f"block 0's MLP has the activation '{mlp.activation}'; known: {', '.join(ACTIVATIONS)}"
    return Block0(layer0, fold_mlp(to_device(mlp, device), source.architecture), source.architecture)
