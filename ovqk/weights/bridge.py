"""Architectures outside the table of families, through TransformerLens's TransformerBridge.

The whole model is loaded. TransformerLens says which tensors are queries, keys, values and outputs. Whether ovqk's
form, with its norms, rotations and multipliers, is the model's is measured on the model's own blocks (`agreement`). A
part that is not reproduced is reported as raw or unavailable, never assumed.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.config.schema import ModelConfig
from ovqk.errors import UserError
from ovqk.weights.agreement import NO_ROTATION, BlockReading, measure_norm, read_block
from ovqk.weights.block_probes import CannotRunError, ModelActivations, record_activations
from ovqk.weights.bridge_loading import (
    boot_bridge,
    find_architecture,
    find_wrappers,
    load_model,
    notes_of_config,
    notes_on_further_layers,
    original,
    quiet,
)
from ovqk.weights.bridge_loading import unused_tokenizer as unused_tokenizer
from ovqk.weights.bridge_mlp import read_first_mlp
from ovqk.weights.masked_windows import find_masked_windows
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.multipliers import agrees, fit_multiplier, same
from ovqk.weights.norms import Norm, NormKind, apply_norm
from ovqk.weights.seen_rotations import find_rotations
from ovqk.weights.types import Architecture, EmbeddingWeights, LayerWeights, PositionKind

PROBE = 12  # tokens


class BridgeWeights:
    """The weights of a model that TransformerLens loads; see `WeightSource`."""

    loaded_by: Literal["families", "bridge"] = "bridge"

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        """Load the model, and compare ovqk's reading of it with its blocks' own activations.

        Raises:
            UserError: TransformerLens does not support the architecture, tensors are missing, or a layer has no
                attention heads of the shape that the others have.
        """
        self.checkpoint, self.model_config = checkpoint, model
        self.architecture_name = find_architecture(checkpoint)
        with quiet(), torch.no_grad():
            own = self.own = load_model(checkpoint, self.architecture_name, model.trust_remote_code)
            self.activations = self._record(own)
            self.bridge = boot_bridge(checkpoint, own, self.architecture_name, model.trust_remote_code)
            config = self.bridge.cfg
            self.causal = config.attention_dir == "causal"
            raw = [self.raw_layer(index) for index in range(config.n_layers)]
            self._check_shapes(raw)
            self.readings = self._read_blocks(own, raw)
            self._read_facts(config, raw[0], model)

    def _read_facts(self, config: Any, first: LayerWeights, model: ModelConfig) -> None:
        """Set the architecture, whether the norms can be folded, and the notes."""
        kinds = {reading.weights.norm.kind if reading.weights.norm else "none" for reading in self.readings}
        self.norm_kind: NormKind = kinds.pop() if len(kinds) == 1 else "none"
        why = self._why_raw(same_norm=not kinds)
        self.foldable = why is None
        if not self.foldable:  # there may be norms, of a kind that no form of ovqk's reproduces
            self.norm_kind = "layernorm" if str(config.normalization_type).startswith("LN") else "rmsnorm"
        if self.foldable and any(reading.weights.rotary for reading in self.readings):
            self.readings = [
                replace(reading, weights=replace(reading.weights, rotary=reading.weights.rotary or NO_ROTATION))
                for reading in self.readings
            ]
        self.notes = self._read_notes(why)
        eps = [reading.eps for reading in self.readings if reading.eps is not None]
        self.eps = eps[0] if eps else float(config.eps)
        scales = [reading.attention_scale for reading in self.readings if reading.attention_scale is not None]
        n_heads, d_model, d_head = first.W_Q.shape
        scale = scales[0] if scales and all(same(scales[0], other) for other in scales) else None
        if scale is None:  # a scale for each layer
            self.readings = [
                replace(reading, weights=replace(reading.weights, attention_scale=reading.attention_scale))
                for reading in self.readings
            ]
        self.architecture = Architecture(
            family=str(config.architecture),
            n_layers=config.n_layers,
            n_heads=n_heads,
            n_kv_heads=len(first.W_K),
            d_model=d_model,
            d_head=d_head,
            n_ctx=model.n_ctx or config.n_ctx,
            norm=self.norm_kind,
            norm_eps=self.eps,
            positions="unsupported" if not self.foldable else self._positions(),
            causal=self.causal if model.causal is None else model.causal,
            tied=self._tied(),
            activation=str(config.act_fn),
            attention_scale=None if scale is None or same(scale, d_head**-0.5) else scale,
            post_norm=any(reading.weights.post_norm for reading in self.readings),
            qk_norm=any(reading.weights.qk_norm for reading in self.readings) or self._has_query_norm(),
            parallel=self.readings[0].parallel,  # of block 0, which is all that it is asked about
        )
        self.no_vocabulary = self._why_no_vocabulary(why)
        self.notes += self._note_on_logits()

    def _has_query_norm(self) -> bool:
        """Return whether block 0 has a norm for queries, in whatever form: then no scale of W_QK reaches a score."""
        modules = self.activations.modules[0].named_modules() if self.activations.modules else ()
        return any(re.search(r"(^|\.)(q|query)_?(layer)?_?norm", name) for name, _ in modules)

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's raw attention weights."""
        weights = self.readings[index].weights
        if self.foldable:
            return weights
        return replace(weights, norm=None, post_norm=None, qk_norm=None, rotary=None)

    def embeddings(self) -> EmbeddingWeights:
        """Return the raw embeddings; none if ovqk's reading does not reproduce the model."""
        W_pos = self.bridge.W_pos.detach().float() if self.architecture.positions == "learned" else None
        if self.no_vocabulary is not None:
            return EmbeddingWeights(None, W_pos, None, None)
        W_U = self.bridge.W_U.detach().float() * (self._logit_scale() or 1.0)
        return EmbeddingWeights(self._embedding_rows(W_pos), W_pos, W_U, self._final_norm())

    def first_mlp(self) -> MLPWeights | str:
        """Return block 0's MLP, if ovqk's reading of it reproduces the block's addition with attention silenced."""
        block = self.activations.blocks[0] if self.activations.blocks else None
        if block is None:
            return "block 0 could not be seen"
        norms = self._measured_norms(0)
        before = norms[0] if norms and self.norm_kind != "none" else None
        return read_first_mlp(self.bridge, block, self.activations.modules[0], before, norms, self.eps)

    # --- loading ----------------------------------------------------------------------------------------------

    def _record(self, model: Any) -> ModelActivations:
        """Record the model's and its blocks' activations on a few tokens.

        Raises:
            UserError: the model cannot be run on them.
        """
        config = model.config.get_text_config()
        rows = model.get_input_embeddings().weight.shape[0]
        rope = getattr(config, "rope_parameters", None) or {}  # beyond the original length some rotations are others
        limits = getattr(config, "max_position_embeddings", None), rope.get("original_max_position_embeddings")
        length = min([PROBE, *(int(limit) for limit in limits if limit)])
        tokens = torch.randint(0, rows, (length,), generator=torch.Generator().manual_seed(0))
        try:
            recorded = record_activations(model, tokens, config.num_hidden_layers)
            self._window_note = find_masked_windows(recorded, model, tokens)
            return recorded
        except CannotRunError as error:
            raise UserError(
                f"{self.checkpoint.label}: {self.architecture_name} cannot be run on {length} tokens, which ovqk needs "
                f"to check its reading ({error})."
            ) from error

    def raw_layer(self, index: int) -> LayerWeights:
        """Return a layer's attention weights as TransformerLens names them.

        Raises:
            UserError: the layer has no attention heads, or they are not stored as W_Q, W_K, W_V and W_O.
        """
        try:
            attention = self._attention(index)
            W_Q, W_K, W_V, W_O = (getattr(attention, f"W_{part}").detach().float() for part in "QKVO")
            shapes = [tuple(weight.shape) for weight in (W_Q, W_K, W_V, W_O)]
        except (AttributeError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.checkpoint.label}: {self.bridge.cfg.architecture} has layers without attention heads that "
                f"ovqk can read, layer {index} among them; allowed: attention with W_Q, W_K, W_V and W_O in every "
                "layer."
            ) from error
        if any(len(shape) != 3 for shape in shapes) or W_K.shape != W_V.shape or len(W_Q) % max(1, len(W_K)):
            raise UserError(
                f"{self.checkpoint.label}: layer {index} of {self.bridge.cfg.architecture} has W_Q, W_K, W_V, W_O of "
                f"shapes {shapes}; allowed: [heads, d_model, d_head] each (W_O: [heads, d_head, d_model]), with keys "
                "and values alike."
            )
        zeros = [torch.zeros(weight.shape[0], weight.shape[2]) for weight in (W_Q, W_K, W_V)]
        biases = [self._bias(attention, f"b_{part}", zero) for part, zero in zip("QKV", zeros, strict=True)]
        return LayerWeights(index, W_Q, W_K, W_V, W_O, biases[0], biases[1], biases[2], None)

    def _attention(self, index: int) -> Any:
        return self.bridge.blocks[index].attn

    def _bias(self, attention: Any, name: str, zero: Tensor) -> Tensor:
        try:
            found = getattr(attention, name)
        except (AttributeError, NotImplementedError):
            return zero
        return zero if found is None else found.detach().float().reshape(zero.shape)

    def _check_shapes(self, raw: list[LayerWeights]) -> None:
        """Refuse a model whose layers do not all have the first layer's heads.

        Raises:
            UserError: one does not.
        """
        for weights in raw[1:]:
            for name in ("W_Q", "W_K"):
                first, other = getattr(raw[0], name).shape, getattr(weights, name).shape
                if first != other:
                    raise UserError(
                        f"{self.checkpoint.label}: {name} of layer {weights.layer} has shape {list(other)} and that of "
                        f"layer 0 {list(first)}; allowed: heads of one shape in every layer."
                    )

    # --- the gates ----------------------------------------------------------------------------------------------

    def _read_blocks(self, model: nn.Module, raw: list[LayerWeights]) -> list[BlockReading]:
        """Return each block's reading; a block that was not seen gets one that says so."""
        rotations = find_rotations(model)
        readings = []
        for index, weights in enumerate(raw):
            unseen = BlockReading(weights, None, None, False, False, "its blocks could not be seen", None, ())
            if index >= len(self.activations.blocks) or not self.activations.blocks[index].stream.numel():
                readings.append(unseen)
                continue
            block = self.activations.blocks[index]
            output = getattr(self._attention(index), "o", None)
            module = getattr(output, "original_component", output)
            bias = getattr(output, "bias", None)
            readings.append(
                read_block(
                    block,
                    self.activations.modules[index],
                    weights,
                    None if bias is None else bias.detach().float(),
                    block.inputs.get(id(module)),
                    rotations,
                    original(self.bridge.blocks[index], "ln1"),
                )
            )
        return readings

    def _why_raw(self, same_norm: bool) -> str | None:
        """Return why the weights are kept raw; None if every layer's reading reproduces it."""
        if not self.causal:
            return "an encoder"
        for index, reading in enumerate(self.readings):
            for reason in (reading.reads, reading.writes):
                if reason is not None:
                    return f"layer {index}: {reason}"
        if not same_norm:
            return "its layers have norms of different kinds before attention"
        if len({reading.eps for reading in self.readings}) > 1:
            return "its layers' norms before attention have different epsilons"
        return None

    def _read_notes(self, why: str | None) -> list[str]:
        notes = ["read through TransformerLens's bridge: the whole model was in memory"]
        if self._window_note is not None:
            notes.append(self._window_note)
        for wrapper in find_wrappers(self.checkpoint):
            notes.append(f"the names of the tensors begin with '{wrapper}', which was taken off")
        if why is not None:
            kept = "residual space and raw weights only"
            notes.append(f"an encoder: {kept}" if not self.causal else f"{why}: {kept}")
        told: dict[str, list[int]] = {}
        some_normalise = self.foldable and any(reading.weights.qk_norm for reading in self.readings)
        for index, reading in enumerate(self.readings):
            mine = list(reading.notes)
            if reading.weights.rotary is NO_ROTATION:
                mine.append("no positions reach the scores")
            if _holds_other_mixers(self.activations.modules[index : index + 1]):
                mine.append("a state space mixer stands beside attention, which is not part of any metric")
            if some_normalise and reading.weights.qk_norm is None:
                mine.append("queries and keys are not normalised, as they are in the other layers")
            for note in mine:
                told.setdefault(note, []).append(index)
        for note, layers in told.items():
            every = len(layers) == len(self.readings)
            notes.append(note if every else f"layers {', '.join(map(str, layers))}: {note}")
        if some_normalise:
            notes.append(
                "queries and keys are normalised: QK spectra are of the weights with the norms' gains, "
                "un-normalised; readouts and shares normalise"
            )
        if self.foldable and any(reading.weights.post_norm for reading in self.readings):
            notes.append("a norm follows attention: its gain is in W_OV, what it divides by is not")
        if self.foldable and any(each.weights.rotary and each.weights.rotary.scale != 1 for each in self.readings):
            notes.append("the rotary scaling also multiplies the scores; the factor is in W_QK")
        notes += notes_on_further_layers(self.checkpoint, self.own.config)
        return notes + notes_of_config(self.own.config.get_text_config())

    def _why_no_vocabulary(self, why: str | None) -> str | None:
        """Return why no embeddings are given; None if ovqk's reading of them is the model's."""
        if not self.causal:
            return "the model is an encoder"
        if why is not None:
            return f"the weights are raw ({why})"
        if not self._first_stream_matches():
            return (
                "the first residual stream is not the embedding's rows, times a number or normalised, plus learned "
                "positions"
            )
        if not self._logits_match():
            return "the unembedding does not read the last residual stream through one norm"
        return None

    def _first_stream_matches(self) -> bool:
        """Return whether the first residual stream is a multiple of W_E's rows (plus W_pos)."""
        stream = self.activations.first_stream
        if stream is None:
            return False
        W_pos = self.bridge.W_pos.detach().float() if self.architecture.positions == "learned" else None
        return self._embeds(W_pos)

    def _embeds(self, W_pos: Float[Tensor, "n_ctx d_model"] | None) -> bool:
        return self._embedding_rows(W_pos) is not None

    def _embedding_rows(self, W_pos: Float[Tensor, "n_ctx d_model"] | None) -> Float[Tensor, "token d_model"] | None:
        """Return the rows in the first residual stream, W_E's times a multiplier or through a norm; else None."""
        stream, rows, tokens = self.activations.first_stream, self.bridge.W_E.detach().float(), self.activations.tokens
        if stream is None or rows.shape[1:] != stream.shape[1:]:
            return None
        own, plain = stream if W_pos is None else stream - W_pos[: len(stream)], rows[tokens]
        scale = fit_multiplier(plain, own)
        if agrees(plain * scale, own):
            return rows * scale
        for norm, eps in self._embedding_norms(rows.shape[1]) if W_pos is None else ():
            if agrees(apply_norm(norm, plain, eps), own):
                return apply_norm(norm, rows, eps)
        return None

    def _embedding_norms(self, width: int) -> Iterator[tuple[Norm, float]]:
        """Return a norm without a gain, and every norm module whose output is the first residual stream."""
        yield Norm("rmsnorm", torch.ones(width)), self.eps
        stream = self.activations.first_stream
        if stream is None:
            return
        for module in self.own.modules():
            output = self.activations.outputs.get(id(module))
            if output is not None and "norm" in type(module).__name__.lower():
                measured = measure_norm(module, width) if torch.equal(output, stream) else None
                if measured is not None:
                    yield measured.norm, measured.eps

    def _logits_match(self) -> bool:
        """Return whether the logits are W_U times the last block's normalised output, up to a bias."""
        unembed, final = original(self.bridge, "unembed"), self.activations.last_stream
        logits, norm = self.activations.outputs.get(id(unembed)), self._final_norm()
        W_U = self.bridge.W_U.detach().float()
        if logits is None or final is None or W_U.shape[0] != final.shape[-1]:
            return False
        mine = apply_norm(norm, final, self._final_eps()) @ W_U
        if mine.shape != logits.shape:
            return False
        return agrees(mine - mine.mean(0), logits - logits.mean(0))  # a bias of the unembedding is a constant

    def _logit_scale(self) -> float | None:
        """Return the number that multiplies the unembedding's output; None if the model does something else with it."""
        given, logits = self._given_logits(), self.activations.logits
        if given is None or logits is None or given.shape != logits.shape:
            return 1.0
        scale = fit_multiplier(given, logits)
        return scale if agrees(given * scale, logits) else None

    def _given_logits(self) -> Tensor | None:
        """Return the unembedding's output."""
        return self.activations.outputs.get(id(original(self.bridge, "unembed")))

    def _note_on_logits(self) -> list[str]:
        """Say what follows the unembedding, if that is no number."""
        given, logits = self._given_logits(), self.activations.logits
        if self.no_vocabulary is not None or self._logit_scale() is not None or given is None or logits is None:
            return []
        cap = getattr(self.own.config.get_text_config(), "final_logit_softcapping", None)
        if cap and agrees(cap * torch.tanh(given / cap), logits):
            return [f"logits are capped at {cap:g}, which is not part of any metric"]
        return ["the logits are not the unembedding's output times a number: what follows it is not part of any metric"]

    def _positions(self) -> PositionKind:
        if any(reading.biased for reading in self.readings) or not self.causal:
            return "unsupported"
        if any(reading.weights.rotary for reading in self.readings):
            return "rotary"
        stream = self.activations.first_stream
        try:
            W_pos = self.bridge.W_pos.detach().float()
        except (AttributeError, NotImplementedError):
            return "none" if self._embeds(None) else "unsupported"
        if stream is None or W_pos.shape[0] < stream.shape[0]:
            return "unsupported"
        return "learned" if self._embeds(W_pos) else "unsupported"

    # --- pieces -------------------------------------------------------------------------------------------------

    def _tied(self) -> bool:
        embedding, unembedding = original(self.bridge, "embed"), original(self.bridge, "unembed")
        weight = getattr(embedding, "weight", None)
        return weight is not None and weight is getattr(unembedding, "weight", None)

    def _final_norm(self) -> Norm | None:
        measured = measure_norm(original(self.bridge, "ln_final"), self.architecture.d_model)
        return None if measured is None else measured.norm

    def _final_eps(self) -> float:
        measured = measure_norm(original(self.bridge, "ln_final"), self.architecture.d_model)
        return self.eps if measured is None else measured.eps

    def _measured_norms(self, index: int) -> list[Norm]:
        """Return a block's norms with the epsilon that the model is read with, the one before its MLP first."""
        named = [original(self.bridge.blocks[index], name) for name in ("ln2", "ln2_post", "ln1", "ln1_post")]
        found = [measure_norm(each, self.architecture.d_model) for each in named if each is not None]
        return [each.norm for each in found if each is not None and each.eps == self.eps]


def _holds_other_mixers(blocks: list[nn.Module]) -> bool:
    names = (type(module).__name__.lower() for block in blocks for module in block.modules())
    return any("mamba" in name or "deltanet" in name or "mixer" in name for name in names)
