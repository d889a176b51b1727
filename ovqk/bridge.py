"""Architectures outside the table of families, through TransformerLens's TransformerBridge.

The whole model is loaded and run once on a few tokens: ovqk's reading of its norms, embeddings and positions counts
only where it reproduces the model's own queries, keys, values and logits. What it does not reproduce is reported as
raw or unavailable, never assumed.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

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
    normalise,
)

TOLERANCE = 1e-3  # of a reading against the model's own activations, relative to their largest
PROBE = 12  # tokens
NORMS: dict[str, NormKind] = {"LN": "layernorm", "LNPre": "layernorm", "RMS": "rmsnorm", "RMSPre": "rmsnorm"}


class BridgeWeights:
    """Weights of a model that TransformerLens loads."""

    loaded_by: Literal["families", "bridge"] = "bridge"

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        """Load the model, and compare ovqk's reading of it with one forward pass.

        Raises:
            UserError: TransformerLens does not support the architecture, or tensors are missing.
        """
        self.checkpoint, self.model_config = checkpoint, model
        with _quiet():
            self.bridge = self._boot()
            self.activations = self._probe()
        config = self.bridge.cfg
        try:
            n_kv_heads = self.bridge.W_K.shape[1]
        except AttributeError as error:  # of state space models, and of hybrids
            raise UserError(
                f"{checkpoint.label}: {config.architecture} has layers without attention heads; allowed: attention in "
                "every layer."
            ) from error
        self.notes = ["read through TransformerLens's bridge: the whole model was in memory"]
        self.norm_kind: NormKind = NORMS.get(str(config.normalization_type), "none")
        self.causal = config.attention_dir == "causal"
        self.architecture = Architecture(
            family=str(config.architecture),
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=n_kv_heads,
            d_model=config.d_model,
            d_head=config.d_head,
            n_ctx=model.n_ctx or config.n_ctx,
            norm=self.norm_kind,
            norm_eps=float(config.eps),
            positions=self._positions(),
            causal=self.causal if model.causal is None else model.causal,
            activation=str(config.act_fn),
        )
        self.foldable = self.causal and self._reads_before_attention()
        if not self.causal:
            self.notes.append("an encoder: residual space and raw weights only")
        elif not self.foldable:
            self.notes.append("its queries are not those of a norm before attention: weights kept raw")
        if hasattr(self.bridge.blocks[0].attn, "q_norm"):
            self.notes.append(
                "queries and keys are normalised per head: QK spectra are of the weights before that norm"
            )
        vocabulary = self.causal and self.foldable and self._reads_embeddings()
        self.no_vocabulary = None if vocabulary else self._why_no_vocabulary()

    def layer(self, index: int) -> LayerWeights:
        """The raw attention weights of a layer."""
        bridge = self.bridge
        norm = self._norm(bridge.blocks[index], "ln1")
        return LayerWeights(
            index,
            bridge.W_Q[index].detach().float(),
            bridge.W_K[index].detach().float(),
            bridge.W_V[index].detach().float(),
            bridge.W_O[index].detach().float(),
            self._bias("b_Q", index, bridge.W_Q),
            self._bias("b_K", index, bridge.W_K),
            self._bias("b_V", index, bridge.W_V),
            norm,
        )

    def embeddings(self) -> EmbeddingWeights:
        """The raw embeddings; none where ovqk's reading does not reproduce the model."""
        W_pos = self.bridge.W_pos.detach().float() if self.architecture.positions == "learned" else None
        if self.no_vocabulary is not None:
            return EmbeddingWeights(None, W_pos, None, None)
        W_E = self.bridge.W_E.detach().float() * self._embedding_scale()
        final = self._norm(self.bridge, "ln_final")
        return EmbeddingWeights(W_E, W_pos, self.bridge.W_U.detach().float(), final)

    def first_mlp(self) -> MLPWeights | str:
        """Block 0's MLP, where ovqk's reading of it reproduces the model's own output."""
        reason = "ovqk's reading of block 0's MLP does not reproduce the model's own"
        try:
            mlp = self._read_mlp()
        except (AttributeError, IndexError, KeyError, TypeError):
            return reason
        if mlp is None or mlp.activation not in ACTIVATIONS:
            return reason
        middle, expected = (
            self.activations.get("blocks.0.hook_resid_mid"),
            self.activations.get("blocks.0.hook_mlp_out"),
        )
        if middle is None or expected is None:
            return reason
        x = self._normed(middle, mlp.norm)
        hidden = ACTIVATIONS[mlp.activation](x @ mlp.W_in + mlp.b_in)
        hidden = hidden if mlp.W_linear is None else hidden * (x @ mlp.W_linear)
        return mlp if _same(hidden @ mlp.W_out + mlp.b_out, expected) else reason

    # --- loading ----------------------------------------------------------------------------------------------

    def _boot(self) -> Any:
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers.helpers import (
            get_hf_model_class_for_architecture,
        )

        directory, label = str(self.checkpoint.directory), self.checkpoint.label
        kind = self.checkpoint.config.get("model_type")
        architectures = self.checkpoint.config.get("architectures") or []
        unsupported = (
            f"{label}: the architecture {architectures or kind} is supported neither natively nor by TransformerLens"
        )
        if not architectures:
            raise UserError(f"{label}: config.json names no 'architectures' for model_type={kind}.")
        try:
            model_class = get_hf_model_class_for_architecture(architectures[0])
            model, report = model_class.from_pretrained(
                directory,
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=self.model_config.trust_remote_code,
                local_files_only=True,
            )
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{unsupported} ({_first_line(error)}).") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(
                f"{label}: {len(missing)} tensors are missing from the checkpoint, the first of them '{missing[0]}'. "
                "ovqk fills nothing in."
            )
        for name, parameter in model.named_parameters():
            check_finite(label, name, parameter.detach())
        try:
            with unused_tokenizer() as tokenizer:
                return TransformerBridge.boot_transformers(
                    directory,
                    hf_model=model,
                    tokenizer=tokenizer,
                    device="cpu",
                    trust_remote_code=self.model_config.trust_remote_code,
                )
        except Exception as error:
            raise UserError(f"{unsupported} ({_first_line(error)}).") from error

    @torch.no_grad()
    def _probe(self) -> dict[str, Tensor]:
        """One forward pass over a few tokens, with its activations."""
        bridge = self.bridge
        rows = bridge.W_E.shape[0]
        length = min(PROBE, int(bridge.cfg.n_ctx))
        tokens = torch.randint(0, rows, (1, length), generator=torch.Generator().manual_seed(0))
        _, cache = bridge.run_with_cache(tokens)
        found = {
            name: cache[name].float()
            for name in cache
            if torch.is_tensor(cache[name]) and cache[name].is_floating_point()
        }
        return found | {"tokens": tokens}

    # --- the gates ----------------------------------------------------------------------------------------------

    def _reads_before_attention(self) -> bool:
        """Queries, keys and values are those of the residual stream through the norm before attention."""
        for index in range(self.bridge.cfg.n_layers):
            weights = self.layer(index)
            stream = self.activations.get(f"blocks.{index}.hook_resid_pre")
            if stream is None or weights.norm is None:
                return False
            x = self._normed(stream, weights.norm)
            read = {"q": (weights.W_Q, weights.b_Q), "k": (weights.W_K, weights.b_K), "v": (weights.W_V, weights.b_V)}
            for name, (weight, bias) in read.items():
                own = self.activations.get(f"blocks.{index}.attn.hook_{name}")
                if own is None or not _same(torch.einsum("bpd,hdx->bphx", x, weight) + bias, own):
                    return False
        return True

    def _reads_embeddings(self) -> bool:
        """The first residual stream is a multiple of W_E's rows (plus W_pos), and W_U reads the final norm."""
        final = self.activations.get(f"blocks.{self.bridge.cfg.n_layers - 1}.hook_resid_post")
        logits, norm = self.activations.get("hook_unembed"), self._norm(self.bridge, "ln_final")
        if final is None or logits is None or norm is None:
            return False
        mine = self._normed(final, norm) @ self.bridge.W_U.float()
        difference = logits - mine
        constant = difference.mean(1, keepdim=True)  # a bias of the unembedding is the same at every position
        return _same(mine + constant, logits) and self._first_stream_matches()

    def _first_stream_matches(self) -> bool:
        stream = self.activations.get("blocks.0.hook_resid_pre")
        if stream is None:
            return False
        embedded = self.bridge.W_E[self.activations["tokens"]].float() * self._embedding_scale()
        if self.architecture.positions == "learned":
            embedded = embedded + self.bridge.W_pos[: stream.shape[1]].float()
        return _same(embedded, stream)

    def _embedding_scale(self) -> float:
        own, rows = self.activations.get("hook_embed"), self.bridge.W_E[self.activations["tokens"]].float()
        if own is None or own.shape != rows.shape:
            return 1.0
        scale = float((own * rows).sum() / rows.square().sum())
        return 1.0 if abs(scale - 1) < 1e-5 else scale

    def _positions(self) -> PositionKind:
        if not self.causal or str(self.bridge.cfg.positional_embedding_type) != "standard":
            return "unsupported"
        stream = self.activations.get("blocks.0.hook_resid_pre")
        try:
            W_pos = self.bridge.W_pos.float()
        except AttributeError:
            return "unsupported"
        if stream is None or W_pos.shape[0] < stream.shape[1]:
            return "unsupported"
        embedded = self.bridge.W_E[self.activations["tokens"]].float() * self._embedding_scale()
        return "learned" if _same(embedded + W_pos[: stream.shape[1]], stream) else "unsupported"

    def _why_no_vocabulary(self) -> str:
        if not self.causal:
            return "the model is an encoder"
        return "ovqk's reading of the embedding, norms or unembedding does not reproduce the model's own activations"

    # --- pieces -------------------------------------------------------------------------------------------------

    def _norm(self, owner: Any, name: str) -> Norm | None:
        module = getattr(owner, name, None)
        parameters = {} if module is None else {key.split(".")[-1]: value for key, value in module.named_parameters()}
        if "weight" not in parameters:
            return None
        weight = parameters["weight"].detach().float()
        if getattr(self.bridge.cfg, "rmsnorm_uses_offset", False):
            weight = 1 + weight
        bias = parameters.get("bias")
        return Norm(self.norm_kind, weight, None if bias is None else bias.detach().float())

    def _normed(self, x: Float[Tensor, "*batch d_model"], norm: Norm | None) -> Float[Tensor, "*batch d_model"]:
        if norm is None:
            return x
        x = normalise(x, norm.kind, float(self.bridge.cfg.eps)) * norm.weight
        return x if norm.bias is None else x + norm.bias

    def _bias(self, name: str, index: int, weight: Tensor) -> Tensor:
        try:
            found: Tensor = getattr(self.bridge, name)[index].detach().float()
        except AttributeError:
            return torch.zeros(weight.shape[1], weight.shape[3])
        return found

    def _read_mlp(self) -> MLPWeights | None:
        bridge = self.bridge
        W_in, W_out = bridge.W_in[0].detach().float(), bridge.W_out[0].detach().float()
        if bridge.cfg.gated_mlp:  # act(x W_gate) * (x W_in)
            gate, linear = bridge.W_gate[0].detach().float(), W_in
        else:
            gate, linear = W_in, None
        return MLPWeights(
            W_in=gate,
            b_in=self._vector("b_in", gate.shape[1]),
            W_linear=linear,
            W_out=W_out,
            b_out=self._vector("b_out", W_out.shape[1]),
            activation=str(bridge.cfg.act_fn),
            norm=self._norm(bridge.blocks[0], "ln2"),
        )

    def _vector(self, name: str, size: int) -> Tensor:
        try:
            found: Tensor = getattr(self.bridge, name)[0].detach().float()
        except (AttributeError, TypeError):
            return torch.zeros(size)
        return found


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


def _same(mine: Tensor, own: Tensor) -> bool:
    if mine.shape != own.shape:
        return False
    return bool((mine - own).abs().max() <= TOLERANCE * own.abs().max().clamp_min(1e-6))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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
