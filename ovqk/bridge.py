"""Architectures outside the table of families, through TransformerLens's TransformerBridge.

The whole model is loaded. TransformerLens says which tensors are queries, keys, values and outputs; that ovqk's form
of them, its norms, rotations and multipliers are the model's is measured on the model's own blocks (`agreement`).
What is not reproduced is reported as raw or unavailable, never assumed.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ovqk.activations import CannotRunError, ModelActivations, record_activations
from ovqk.agreement import NO_ROTATION, BlockReading, agrees, measure_norm, read_block
from ovqk.checkpoints import Checkpoint, check_finite
from ovqk.config import ModelConfig
from ovqk.errors import UserError
from ovqk.vocabulary import ACTIVATIONS
from ovqk.weights import (
    Architecture,
    EmbeddingWeights,
    LayerWeights,
    MLPWeights,
    Norm,
    NormKind,
    PositionKind,
    Rotary,
    apply_norm,
)

PROBE = 12  # tokens


class BridgeWeights:
    """Weights of a model that TransformerLens loads."""

    loaded_by: Literal["families", "bridge"] = "bridge"

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        """Load the model, and compare ovqk's reading of it with what its blocks compute.

        Raises:
            UserError: TransformerLens does not support the architecture, tensors are missing, or a layer has no
                attention heads of the shape that the others have.
        """
        self.checkpoint, self.model_config = checkpoint, model
        self.architecture_name = self._find_architecture()
        with _quiet(), torch.no_grad():
            own = self._load()
            self.activations = self._record(own)
            self.bridge = self._boot(own)
            config = self.bridge.cfg
            self.causal = config.attention_dir == "causal"
            raw = [self._raw_layer(index) for index in range(config.n_layers)]
            self._check_shapes(raw)
            self.readings = self._read_blocks(own, raw)
            self._read_facts(config, raw[0], model)

    def _read_facts(self, config: Any, first: LayerWeights, model: ModelConfig) -> None:
        """The architecture, what can be folded, and the notes."""
        kinds = {reading.weights.norm.kind if reading.weights.norm else "none" for reading in self.readings}
        self.norm_kind: NormKind = kinds.pop() if len(kinds) == 1 else "none"
        why = self._why_raw(same_norm=not kinds)
        self.foldable = why is None
        if self.foldable and any(reading.weights.rotary for reading in self.readings):
            self.readings = [
                replace(reading, weights=replace(reading.weights, rotary=reading.weights.rotary or NO_ROTATION))
                for reading in self.readings
            ]
        self.notes = self._read_notes(why)
        eps = [reading.eps for reading in self.readings if reading.eps is not None]
        self.eps = eps[0] if eps else float(config.eps)
        scales = {reading.attention_scale for reading in self.readings if reading.attention_scale is not None}
        n_heads, d_model, d_head = first.W_Q.shape
        usual = d_head**-0.5
        scale = next(iter(scales)) if len(scales) == 1 else None
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
            activation=str(config.act_fn),
            attention_scale=None if scale is None or abs(scale / usual - 1) < 1e-3 else scale,
            post_norm=any(reading.weights.post_norm for reading in self.readings),
            qk_norm=any(reading.weights.qk_norm for reading in self.readings),
            parallel=any(reading.parallel for reading in self.readings),
        )
        self.no_vocabulary = self._why_no_vocabulary(why)

    def layer(self, index: int) -> LayerWeights:
        """The raw attention weights of a layer."""
        weights = self.readings[index].weights
        if self.foldable:
            return weights
        return replace(weights, norm=None, post_norm=None, qk_norm=None, rotary=None)

    def embeddings(self) -> EmbeddingWeights:
        """The raw embeddings; none if ovqk's reading does not reproduce the model."""
        W_pos = self.bridge.W_pos.detach().float() if self.architecture.positions == "learned" else None
        if self.no_vocabulary is not None:
            return EmbeddingWeights(None, W_pos, None, None)
        W_E = self.bridge.W_E.detach().float() * self._embedding_scale(W_pos)
        return EmbeddingWeights(W_E, W_pos, self.bridge.W_U.detach().float(), self._final_norm())

    def first_mlp(self) -> MLPWeights | str:
        """Block 0's MLP, if ovqk's reading of it reproduces what the block adds with attention silenced."""
        reason = "ovqk's reading of block 0's MLP does not reproduce the model's own"
        block = self.activations.blocks[0] if self.activations.blocks else None
        if block is None or block.other_write is None:
            return reason
        if any("expert" in name for name, _ in self.activations.modules[0].named_modules()):
            return "block 0's MLP is a mixture of experts, which ovqk does not read"
        try:
            mlp = self._read_mlp()
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
            return reason
        if mlp.activation not in ACTIVATIONS:
            return f"block 0's MLP has the activation '{mlp.activation}'; known: {', '.join(ACTIVATIONS)}"
        try:
            written = self._mlp_write(mlp, block.stream)
        except RuntimeError:  # of shapes that do not fit
            return reason
        if agrees(written, block.other_write):
            return mlp
        for norm in self._measured_norms(0):
            if agrees(apply_norm(norm, written, self.eps), block.other_write):
                return replace(mlp, post_norm=norm)
        scale = float((written * block.other_write).sum() / written.square().sum().clamp_min(1e-30))
        if agrees(written * scale, block.other_write):
            return replace(mlp, W_out=mlp.W_out * scale, b_out=mlp.b_out * scale)
        return reason

    # --- loading ----------------------------------------------------------------------------------------------

    def _load(self) -> nn.Module:
        """The Hugging Face model, float32.

        Raises:
            UserError: it cannot be loaded, or tensors are missing.
        """
        from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture

        label = self.checkpoint.label
        try:
            model_class = get_hf_model_class_for_architecture(self.architecture_name)
            model, report = model_class.from_pretrained(
                str(self.checkpoint.directory),
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=self.model_config.trust_remote_code,
                local_files_only=True,
            )
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{label}: transformers cannot load {self.architecture_name} ({_told(error)}).") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"{label}: {len(missing)} tensors are missing from the checkpoint, the first of them '{missing[0]}'. "
                "ovqk fills nothing in."
            )
        for name, parameter in model.named_parameters():
            check_finite(label, name, parameter.detach())
        own: nn.Module = model.eval()
        return own

    def _record(self, model: Any) -> ModelActivations:
        """What the model and its blocks compute on a few tokens.

        Raises:
            UserError: the model cannot be run on them.
        """
        config = model.config.get_text_config()
        rows = model.get_input_embeddings().weight.shape[0]
        length = min(PROBE, int(getattr(config, "max_position_embeddings", None) or PROBE))
        tokens = torch.randint(0, rows, (length,), generator=torch.Generator().manual_seed(0))
        try:
            return record_activations(model, tokens, config.num_hidden_layers)
        except CannotRunError as error:
            raise UserError(
                f"{self.checkpoint.label}: {self.architecture_name} cannot be run on {length} tokens, as ovqk must to "
                f"check what it reads ({error})."
            ) from error

    def _boot(self, model: nn.Module) -> Any:
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers import source

        model.config.architectures = [self.architecture_name]  # type: ignore[union-attr, assignment]
        try:
            with unused_tokenizer() as tokenizer, mock.patch.object(source, "load_modality_processor"):
                return TransformerBridge.boot_transformers(
                    str(self.checkpoint.directory),
                    hf_model=model,
                    tokenizer=tokenizer,
                    device="cpu",
                    trust_remote_code=self.model_config.trust_remote_code,
                )
        except Exception as error:  # an adapter raises many kinds
            raise UserError(
                f"{self.checkpoint.label}: TransformerLens cannot read this {self.architecture_name} ({_told(error)})."
            ) from error

    def _find_architecture(self) -> str:
        """The architecture as TransformerLens spells it.

        Raises:
            UserError: config.json names none, or TransformerLens has no adapter for it.
        """
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

        label, config = self.checkpoint.label, self.checkpoint.config
        names = config.get("architectures") or []
        if not names:
            raise UserError(f"{label}: config.json names no 'architectures' for model_type={config.get('model_type')}.")
        known = {name.lower(): name for name in SUPPORTED_ARCHITECTURES}
        for name in names:
            if str(name).lower() in known:
                return known[str(name).lower()]
        raise UserError(
            f"{label}: {', '.join(map(str, names))} is neither a family that ovqk reads itself nor an architecture "
            "that TransformerLens has an adapter for; allowed: those of docs/architectures.md."
        )

    def _raw_layer(self, index: int) -> LayerWeights:
        """A layer's attention weights as TransformerLens names them.

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
        """Every layer has the heads that the first has.

        Raises:
            UserError: one has not.
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
        """Each block's reading; without one where the model's blocks were not seen."""
        rotations = _rotations(model)
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
                    _original(self.bridge.blocks[index], "ln1"),
                )
            )
        return readings

    def _why_raw(self, same_norm: bool) -> str | None:
        """Why the weights are kept raw; None if every layer's reading reproduces it."""
        if not self.causal:
            return "an encoder"
        for index, reading in enumerate(self.readings):
            for reason in (reading.reads, reading.writes):
                if reason is not None:
                    return f"layer {index}: {reason}"
        if not same_norm:
            return "its layers have norms of different kinds before attention"
        return None

    def _read_notes(self, why: str | None) -> list[str]:
        notes = ["read through TransformerLens's bridge: the whole model was in memory"]
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
                mine.append("a state space mixer stands beside attention, and no metric has it in")
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
        if self.checkpoint.config.get("attn_temperature_tuning"):
            notes.append("scores grow with the position of the query (attn_temperature_tuning); no metric has it in")
        return notes

    def _why_no_vocabulary(self, why: str | None) -> str | None:
        """Why no embeddings are given; None if ovqk's reading of them is the model's."""
        if not self.causal:
            return "the model is an encoder"
        if why is not None:
            return f"the weights are raw ({why})"
        if not self._first_stream_matches():
            return "the first residual stream is not a multiple of the embedding's rows plus learned positions"
        if not self._logits_match():
            return "the unembedding does not read the last residual stream through one norm"
        return None

    def _first_stream_matches(self) -> bool:
        """The first residual stream is a multiple of W_E's rows (plus W_pos)."""
        stream = self.activations.first_stream
        if stream is None:
            return False
        W_pos = self.bridge.W_pos.detach().float() if self.architecture.positions == "learned" else None
        return self._embeds(W_pos)

    def _embeds(self, W_pos: Float[Tensor, "n_ctx d_model"] | None) -> bool:
        stream = self.activations.first_stream
        rows = self.bridge.W_E.detach().float()
        if stream is None or rows.shape[1] != stream.shape[1]:
            return False
        embedded = rows[self.activations.tokens] * self._embedding_scale(W_pos)
        return agrees(embedded if W_pos is None else embedded + W_pos[: len(stream)], stream)

    def _embedding_scale(self, W_pos: Float[Tensor, "n_ctx d_model"] | None) -> float:
        """What multiplies the embedding's rows in the first residual stream."""
        stream, rows = self.activations.first_stream, self.bridge.W_E.detach().float()[self.activations.tokens]
        if stream is None or rows.shape != stream.shape:
            return 1.0
        own = stream if W_pos is None else stream - W_pos[: len(stream)]
        scale = float((own * rows).sum() / rows.square().sum())
        return 1.0 if abs(scale - 1) < 1e-5 else scale

    def _logits_match(self) -> bool:
        """The unembedding reads the norm of what the last block writes, and W_U is its weight."""
        unembed, final = _original(self.bridge, "unembed"), self.activations.last_stream
        logits, norm = self.activations.outputs.get(id(unembed)), self._final_norm()
        W_U = self.bridge.W_U.detach().float()
        if logits is None or final is None or W_U.shape[0] != final.shape[-1]:
            return False
        mine = apply_norm(norm, final, self._final_eps()) @ W_U
        if mine.shape != logits.shape:
            return False
        return agrees(mine - mine.mean(0), logits - logits.mean(0))  # a bias of the unembedding is a constant

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

    def _final_norm(self) -> Norm | None:
        measured = measure_norm(_original(self.bridge, "ln_final"), self.architecture.d_model)
        return None if measured is None else measured.norm

    def _final_eps(self) -> float:
        measured = measure_norm(_original(self.bridge, "ln_final"), self.architecture.d_model)
        return self.eps if measured is None else measured.eps

    def _measured_norms(self, index: int) -> list[Norm]:
        """The norms of a block, the one named as before its MLP first."""
        named = [_original(self.bridge.blocks[index], name) for name in ("ln2", "ln2_post", "ln1", "ln1_post")]
        found = [measure_norm(each, self.architecture.d_model) for each in named if each is not None]
        return [each.norm for each in found if each is not None]

    def _mlp_write(
        self, mlp: MLPWeights, stream: Float[Tensor, "position d_model"]
    ) -> Float[Tensor, "position d_model"]:
        x = apply_norm(mlp.norm, stream, self.eps)
        hidden = ACTIVATIONS[mlp.activation](x @ mlp.W_in + mlp.b_in)
        hidden = hidden if mlp.W_linear is None else hidden * (x @ mlp.W_linear)
        return hidden @ mlp.W_out + mlp.b_out

    def _read_mlp(self) -> MLPWeights:
        mlp = self.bridge.blocks[0].mlp
        W_in, W_out = mlp.W_in.detach().float(), mlp.W_out.detach().float()
        d_model = self.architecture.d_model
        if self.bridge.cfg.gated_mlp:  # act(x W_gate) * (x W_in)
            gate, linear = mlp.W_gate.detach().float(), W_in
        else:
            gate, linear = W_in, None
        gate = gate if gate.shape[0] == d_model else gate.T
        linear = linear if linear is None or linear.shape[0] == d_model else linear.T
        W_out = W_out if W_out.shape[-1] == d_model else W_out.T
        norms = [*self._measured_norms(0)]
        return MLPWeights(
            W_in=gate,
            b_in=self._vector(mlp, "b_in", gate.shape[1]),
            W_linear=linear,
            W_out=W_out,
            b_out=self._vector(mlp, "b_out", W_out.shape[1]),
            activation=str(self.bridge.cfg.act_fn),
            norm=norms[0] if norms and self.norm_kind != "none" else None,
        )

    def _vector(self, mlp: Any, name: str, size: int) -> Tensor:
        try:
            found: Tensor = getattr(mlp, name).detach().float()
        except (AttributeError, NotImplementedError, TypeError):
            return torch.zeros(size)
        return found


def _original(owner: Any, name: str) -> nn.Module | None:
    """The Hugging Face module behind a component of the bridge; None if there is none."""
    component = getattr(owner, name, None)
    found = getattr(component, "original_component", None)
    return found if isinstance(found, nn.Module) else None


def _holds_other_mixers(blocks: list[nn.Module]) -> bool:
    names = (type(module).__name__.lower() for block in blocks for module in block.modules())
    return any("mamba" in name or "deltanet" in name or "mixer" in name for name in names)


def _rotations(model: nn.Module) -> list[Rotary]:
    """The rotations that the model's buffers and config hold, in both layouts, each once."""
    found: list[Rotary] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or buffer.dim() != 1 or name.startswith("original"):
                continue
            kind = name.removesuffix("inv_freq")
            factor = getattr(module, f"{kind}attention_scaling", 1.0)
            found.append(Rotary(buffer.detach().float(), scale=float(factor) ** 2))
    rotary_dim = getattr(getattr(model, "config", None), "rotary_dim", None)
    if isinstance(rotary_dim, int) and rotary_dim > 0:  # CodeGen keeps tables of sines and cosines
        found.append(Rotary(10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)))
    once: list[Rotary] = []
    for rotary in found:
        same = (
            each.scale == rotary.scale and torch.equal(each.inverse_frequencies, rotary.inverse_frequencies)
            for each in once
        )
        if not any(same):
            once.append(rotary)
    once += [replace(rotary, inverse_frequencies=-rotary.inverse_frequencies) for rotary in once]  # turned backwards
    return [replace(rotary, interleaved=interleaved) for interleaved in (False, True) for rotary in once]


@contextlib.contextmanager
def unused_tokenizer() -> Iterator[Any]:
    """TransformerLens wants a tokenizer, loads it again, and invents one of one token where a folder holds none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    special = dict.fromkeys(("unk_token", "pad_token", "bos_token"), "<unk>")
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
        yield PreTrainedTokenizerFast.from_pretrained(folder)


def _told(error: Exception) -> str:
    """The first line of an error, whole, and its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and advice of the libraries are not this program's output."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # the hub's with it, which a later cell may want to show
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers.utils.logging.enable_progress_bar()
