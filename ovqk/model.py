"""A model as one cell sees it: what is read once and shared by all layers, and one layer at a time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer
from torch import Tensor

from ovqk import positions, spectra
from ovqk.availability import NO_EMBEDDING, NOT_APPLICABLE, unavailable_metrics
from ovqk.composition import Grams
from ovqk.config import Config, Processing
from ovqk.devices import resolve_device, to_device
from ovqk.directions import Directions
from ovqk.effective import Block0Side
from ovqk.head_maps import HeadMaps, Scorer
from ovqk.heads import Circuit, Factors, key_side, ov_factors, qk_factors, query_side, scores
from ovqk.metrics import METRICS
from ovqk.rare import RareTokens, rare_tokens
from ovqk.readouts import EffectiveRows, Readout
from ovqk.tasks import TaskTokens, resolve_task
from ovqk.vocabulary import Block0, Vocabulary, read_vocabulary
from ovqk.weights import (
    Architecture,
    LayerWeights,
    Rows,
    WeightSource,
    fold_embeddings,
    fold_layer,
    fold_mlp,
    fold_reads,
)


@dataclass(frozen=True)
class Model:
    """What is read once per model and task, and shared by its layers; the large parts when first asked for.

    Attributes:
        vocabulary: folded; for readouts and shares. None where the checkpoint holds no embedding.
        spectral_vocabulary: as processed; for full-circuit spectra.
        block0: the effective embedding of later layers, or why there is none.
        readout: the task's first variable; None where no word is read.
    """

    source: WeightSource
    config: Config
    device: torch.device
    tokens: TaskTokens
    vocabulary: Vocabulary | None
    spectral_vocabulary: Vocabulary | None
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    block0: Block0 | str
    readout: Readout | None
    tokenizer: Tokenizer | None
    unavailable: dict[str, str]

    @property
    def architecture(self) -> Architecture:
        """The model's facts."""
        return self.source.architecture

    @property
    def circuits(self) -> list[Circuit]:
        """The circuits that the analysis takes apart."""
        return list(self.config.analysis.circuits)  # type: ignore[arg-type]

    @property
    def folds(self) -> bool:
        """Whether the spectra are of folded weights."""
        return self.config.processing is Processing.folded and self.source.foldable

    @property
    def centred(self) -> bool:
        """Whether the spectra's weights are orthogonal to the all-ones direction."""
        return self.folds and self.architecture.norm == "layernorm"

    @cached_property
    def token_moments(self) -> tuple[positions.Moments, positions.Moments] | None:
        """Of plain and of normalised embedding rows (the second is used under rotary positions)."""
        if self.vocabulary is None:
            return None
        plain = positions.token_moments(self.vocabulary)
        if self.architecture.positions != "rotary":
            return plain, plain
        return plain, positions.normalised_moments(self.vocabulary, self.architecture)

    @cached_property
    def sampled_rows(self) -> Float[Tensor, "sampled d_model"] | None:
        """Embedding rows that the moments of normalised queries and keys are taken over; None without an embedding."""
        return None if self.vocabulary is None else positions.sample_rows(self.vocabulary.W_E)

    @cached_property
    def position_moments(self) -> positions.Moments | None:
        """Of the rows of W_pos; None without learned positions."""
        return None if self.W_pos is None else positions.row_moments(self.W_pos)

    @cached_property
    def block0_grams(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """E^T C E, W_U C E and W_E^T C E of the block0 embeddings E, each [d_model, d_model]; None where not needed."""
        if not isinstance(self.block0, Block0) or self.vocabulary is None or self.architecture.n_layers == 1:
            return None, None, None
        return self.block0.grams(self.vocabulary, None if self.block0_side is None else self.block0_side.read)

    @property
    def lists_tokens(self) -> bool:
        """Whether components are read out as lists of tokens."""
        return self.vocabulary is not None and self.config.analysis.components > 0

    @cached_property
    def rare_tokens(self) -> RareTokens | None:
        """The tokens that lists leave out; None if there are no lists, or if they leave none out."""
        if self.vocabulary is None or not self.lists_tokens or self.config.analysis.rare_tokens:
            return None
        return rare_tokens(self.vocabulary, self.tokenizer, self.architecture.tied)

    @cached_property
    def block0_side(self) -> Block0Side | None:
        """The vocabulary as block0 embeddings, if lists of tokens read some layer through them."""
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
        """Which tokens may be listed."""
        if self.rare_tokens is not None:
            return self.rare_tokens.listed
        n = 0 if self.vocabulary is None else self.vocabulary.size
        return torch.ones(n, dtype=torch.bool, device=self.device)

    @cached_property
    def directions(self) -> Directions | None:
        """What reads tokens out; None where there is none to read, or none is asked for."""
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
        """What a reader of the shares of position and content should know if they are of a sample of the tokens."""
        facts = self.architecture
        if self.vocabulary is None or not facts.qk_norm or facts.positions != "rotary" or "qk" not in self.circuits:
            return []
        step = positions.sample_step(self.vocabulary.size, self.vocabulary.d_model)
        if step == 1:
            return []
        return [
            "qk_share_*, qk_prev_auc and offsets: queries and keys are normalised, so their moments are taken over one "
            f"in {step} of {self.vocabulary.size:,} tokens"
        ]

    @property
    def direction_notes(self) -> list[str]:
        """What a reader of lists of tokens should know: which are left out, and whether block 0 could not be had."""
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
    def full_grams(self) -> tuple[Grams | None, Grams | None]:
        """(E^T C E, W_U C E, W_U C W_U^T) of the block0 embeddings E, and the same of plain ones, all folded."""
        vocabulary, (gram, cross, _) = self.vocabulary, self.block0_grams
        if vocabulary is None or vocabulary.gram_cross is None or vocabulary.gram_unembed is None:
            return None, None
        later = None if gram is None or cross is None else (gram, cross, vocabulary.gram_unembed)
        return later, (vocabulary.gram_embed, vocabulary.gram_cross, vocabulary.gram_unembed)

    @property
    def processing(self) -> dict[str, str]:
        """What was asked for and what was done to the weights."""
        asked = self.config.processing.value
        applied = "folded" if self.folds else "raw"
        if self.architecture.norm == "none" and not self.architecture.post_norm:
            return {"requested": asked, "applied": "raw", "reason": "the model has no norms: nothing to fold"}
        if applied != asked:
            return {"requested": asked, "applied": applied, "reason": "the model's norms cannot be folded"}
        return {"requested": asked, "applied": applied}

    @classmethod
    def read(
        cls,
        source: WeightSource,
        tokenizer: Tokenizer | None,
        n_tokens: int | None,
        label: str,
        config: Config,
    ) -> "Model":
        """Read the embeddings, the words and block 0."""
        device = resolve_device(config.device)
        facts = source.architecture
        raw = to_device(source.embeddings(), device)
        folded = fold_embeddings(raw, facts) if source.foldable else raw
        tokens = read_words(config, tokenizer, n_tokens, raw.W_E, label)
        vocabulary = None if folded.W_E is None else read_vocabulary(folded, n_tokens, label)
        spectral = vocabulary
        if config.processing is Processing.raw and source.foldable and raw.W_E is not None:
            spectral = read_vocabulary(raw, n_tokens, label)
        block0 = read_block0(source, vocabulary, _needs_block0(config, tokens), device)
        readout = None
        if vocabulary is not None and tokens.variables:
            rows = EffectiveRows(vocabulary, block0 if isinstance(block0, Block0) else None, facts)
            readout = Readout(tokens.variables[0], rows, config.analysis.embedding)
        no_words = (
            "no word is read" if config.task.variables else f"{NOT_APPLICABLE}task {config.task.name} has no words"
        )
        unavailable = unavailable_metrics(
            list(config.analysis.circuits),
            facts,
            vocabulary,
            None if folded.W_pos is None else folded.W_pos.shape[0],
            block0,
            readout,
            no_words,
            source.no_vocabulary or NO_EMBEDDING,
        )
        return cls(
            source=source,
            config=config,
            device=device,
            tokens=tokens,
            vocabulary=vocabulary,
            spectral_vocabulary=spectral,
            W_pos=folded.W_pos,
            block0=block0,
            readout=readout,
            tokenizer=tokenizer,
            unavailable=unavailable,
        )


def read_words(
    config: Config, tokenizer: Tokenizer | None, n_tokens: int | None, W_E: Rows | None, label: str
) -> TaskTokens:
    """The task's words as tokens; none where the checkpoint has neither embeddings nor a tokenizer to read them by."""
    if tokenizer is None and W_E is None:
        note = ["the checkpoint has no embeddings and no tokenizer: no word is read"] if config.task.variables else []
        return TaskTokens([], {}, {}, note)
    if n_tokens is None:
        n_tokens = tokenizer.get_vocab_size() if tokenizer is not None else 0
        n_tokens = n_tokens if W_E is None else W_E.shape[0]
    if W_E is not None:  # a tokenizer may know more tokens than the model has rows for
        n_tokens = min(n_tokens, W_E.shape[0])
    return resolve_task(config.task, tokenizer, n_tokens, label)


def _needs_block0(config: Config, tokens: TaskTokens) -> bool:
    """Whether block 0 is read: for words, for pairs of heads, and wherever components are read out.

    The last keeps the structure of an analysis the same for all tasks. Without it a cell of structure alone takes half
    the time and, for large MLPs, half the memory.
    """
    return bool(tokens.variables) or config.analysis.pairs or config.analysis.components > 0


def read_block0(
    source: WeightSource, vocabulary: Vocabulary | None, wanted: bool, device: torch.device
) -> Block0 | str:
    """Return block 0 as the effective embedding of later layers, or why it cannot be had."""
    if vocabulary is None:
        return source.no_vocabulary or NO_EMBEDDING
    if not wanted:
        return "block 0's MLP is read only for a task's words, for lists of tokens or for all pairs of heads"
    if not source.foldable:
        return "the model's norms cannot be folded"
    layer0 = fold_reads(to_device(source.layer(0), device), source.architecture)
    mlp = source.first_mlp()
    if mlp == "the model has no MLP":
        return Block0(layer0, None, source.architecture)
    if isinstance(mlp, str):
        return mlp
    if mlp.activation not in ACTIVATIONS:
        return f"block 0's MLP has the activation '{mlp.activation}'; known: {', '.join(ACTIVATIONS)}"
    return Block0(layer0, fold_mlp(to_device(mlp, device), source.architecture), source.architecture)


Part = Literal["Q", "K", "V", "O"]
Form = tuple[Circuit, bool, tuple[int, ...]]
"""(circuit, folded, offsets of the mean rotation): the form of the weights that a metric is of."""


class Layer:
    """One layer's weights, raw and folded, and the decompositions that its stages share."""

    def __init__(self, model: Model, index: int) -> None:
        """Read the layer."""
        self.model, self.index = model, index
        self._maps: dict[Form, spectra.FactoredMaps] = {}  # no caches of bound methods: they keep layers alive
        self._bases: dict[tuple[str, bool], spectra.Basis] = {}
        self._across: dict[tuple[Circuit, bool], list[tuple[Tensor | None, Tensor]]] = {}
        self._sources: dict[Circuit, dict[str, Tensor]] = {}

    def read(self) -> LayerWeights:
        """The raw weights, from the checkpoint: they are kept only where they are what is processed."""
        return to_device(self.model.source.layer(self.index), self.model.device)

    @cached_property
    def processed(self) -> LayerWeights:
        """Folded or raw, as the spectra are to be."""
        return self.folded if self.model.folds else self.read()

    @cached_property
    def folded(self) -> LayerWeights:
        """With the norms folded in, where that can be done."""
        if not self.model.source.foldable:
            return self.processed
        return fold_layer(self.read(), self.model.architecture)

    @property
    def gain(self) -> Float[Tensor, " d_model"] | None:
        """What the norm before attention multiplies by, if it is not folded into the processed weights, float64."""
        norm = self.processed.norm
        return None if norm is None else norm.weight.double()

    def factors(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> Factors:
        """Factors of the folded or of the processed weights; QK with the mean rotation over the offsets."""
        weights = self.folded if folded else self.processed
        if circuit == "ov":
            return ov_factors(weights, self.model.architecture)
        return qk_factors(weights, self.model.architecture, offsets)

    def task_maps(self, circuit: Circuit) -> HeadMaps | None:
        """A circuit as task readouts see it: folded, QK with the mean rotation; None where positions are unknown."""
        facts = self.model.architecture
        if circuit == "ov":
            return HeadMaps(self.factors("ov", True), self.decomposition("ov", True))
        if facts.positions == "unsupported":
            return None
        weights, span = self.folded, self.span
        scorer: Scorer | None = None
        if weights.qk_norm is not None:

            def scorer(query_rows: Tensor, key_rows: Tensor) -> Tensor:
                return scores(weights, facts, query_rows, key_rows, span)

        return HeadMaps(self.factors("qk", True, span), self.decomposition("qk", True, span), scorer)

    @property
    def span(self) -> tuple[int, ...]:
        """The offsets whose mean rotation readouts and compositions use; (0,) without rotary positions."""
        facts = self.model.architecture
        return tuple(range(positions.rotary_span(self.folded, facts))) if self.folded.rotary is not None else (0,)

    def form(self, metric: str) -> Form:
        """The form of the weights that this metric is of."""
        circuit, is_readout = METRICS[metric].circuit, "task" in METRICS[metric].needs
        folded = self.model.source.foldable and (is_readout or metric.endswith("_block0") or self.model.folds)
        return circuit, folded, self.span if is_readout and circuit == "qk" else (0,)

    def by_source(self, circuit: Circuit) -> dict[str, Tensor]:
        """The task metrics of a circuit's heads, source token by source token."""
        if circuit not in self._sources:
            maps, readout = self.task_maps(circuit), self.model.readout
            there = maps is not None and readout is not None
            self._sources[circuit] = readout.by_source(self.index, maps) if there else {}  # type: ignore[union-attr, arg-type]
        return self._sources[circuit]

    def basis(self, part: Part, folded: bool) -> spectra.Basis:
        """An orthonormal basis of what each head's W_Q, W_K, W_V reads or W_O writes, folded or as processed.

        Found once: every decomposition and every moment of this layer is taken through it.
        """
        key = part, folded or self.model.folds
        if key not in self._bases:
            weights = self.folded if key[1] else self.processed
            weight = getattr(weights, f"W_{part}")
            self._bases[key] = spectra.Basis(weight.mT if part == "O" else weight)
        return self._bases[key]

    def maps(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> spectra.FactoredMaps:
        """A circuit of the layer's heads, factored once; QK with the mean rotation over the offsets."""
        form = circuit, folded or self.model.folds, offsets
        if form not in self._maps:
            weights, facts = self.folded if form[1] else self.processed, self.model.architecture
            kv = facts.kv_of_head.to(weights.W_O.device)
            every = torch.arange(facts.n_heads, device=kv.device)
            rank = min(facts.d_head, facts.d_model - self.model.centred)
            across = self._across.setdefault(form[:2], [])
            if circuit == "ov":
                left, right = self.basis("V", folded), self.basis("O", folded)
                inner = left.coordinates[kv] @ right.coordinates.mT
                self._maps[form] = spectra.FactoredMaps(left, right, kv, every, inner, rank, across=across)
            else:
                left, right = self.basis("Q", folded), self.basis("K", folded)
                inner = query_side(left.coordinates, weights, offsets) @ key_side(right.coordinates, weights)[kv].mT
                self._maps[form] = spectra.FactoredMaps(left, right, every, kv, inner, rank, across=across)
        return self._maps[form]

    def decomposition(self, circuit: Circuit, folded: bool, offsets: tuple[int, ...] = (0,)) -> spectra.Decomposition:
        """The thin SVD of a circuit's heads, with its directions."""
        return self.maps(circuit, folded, offsets).decomposition
