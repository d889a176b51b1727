"""The architecture families read natively: what each calls its tensors and how it lays them out.

A new family is a new row in FAMILIES. Anything not listed goes through `bridge.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.checkpoints import Checkpoint
from ovqk.errors import UserError
from ovqk.weights import (
    Architecture,
    EmbeddingWeights,
    LayerWeights,
    MLPWeights,
    Norm,
    NormKind,
    PositionKind,
    Rotary,
)


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        model_types: the `model_type` values of config.json that belong to it.
        prefixes: what checkpoints put before the names of the tensors, in the order tried.
        linear: `out_in` for torch's Linear [out, in], `in_out` for GPT-2's Conv1D [in, out].
        fused: queries, keys and values are columns of one weight.
        tensors: ovqk's name -> the checkpoint's, without `.weight` or `.bias`; `{layer}` is the layer's index.
        keys: ovqk's name -> the keys of config.json, in the order tried.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    norm: NormKind
    positions: PositionKind
    linear: Literal["out_in", "in_out"]
    fused: bool
    tied_by_default: bool
    tensors: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    prefixes=("", "transformer."),
    norm="layernorm",
    positions="learned",
    linear="in_out",
    fused=True,
    tied_by_default=True,
    tensors={
        "embedding": "wte",
        "positions": "wpe",
        "final_norm": "ln_f",
        "norm": "h.{layer}.ln_1",
        "qkv": "h.{layer}.attn.c_attn",
        "output": "h.{layer}.attn.c_proj",
        "mlp_norm": "h.{layer}.ln_2",
        "mlp_in": "h.{layer}.mlp.c_fc",
        "mlp_out": "h.{layer}.mlp.c_proj",
    },
    keys={
        "n_layers": ("n_layer",),
        "n_heads": ("n_head",),
        "d_model": ("n_embd",),
        "n_ctx": ("n_positions", "n_ctx"),
        "norm_eps": ("layer_norm_epsilon",),
        "activation": ("activation_function",),
    },
)

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    prefixes=("model.", ""),
    norm="rmsnorm",
    positions="rotary",
    linear="out_in",
    fused=False,
    tied_by_default=False,
    tensors={
        "embedding": "embed_tokens",
        "final_norm": "norm",
        "norm": "layers.{layer}.input_layernorm",
        "query": "layers.{layer}.self_attn.q_proj",
        "key": "layers.{layer}.self_attn.k_proj",
        "value": "layers.{layer}.self_attn.v_proj",
        "output": "layers.{layer}.self_attn.o_proj",
        "mlp_norm": "layers.{layer}.post_attention_layernorm",
        "mlp_in": "layers.{layer}.mlp.gate_proj",
        "mlp_linear": "layers.{layer}.mlp.up_proj",
        "mlp_out": "layers.{layer}.mlp.down_proj",
    },
    keys={
        "n_layers": ("num_hidden_layers",),
        "n_heads": ("num_attention_heads",),
        "n_kv_heads": ("num_key_value_heads",),
        "d_model": ("hidden_size",),
        "d_head": ("head_dim",),
        "n_ctx": ("max_position_embeddings",),
        "norm_eps": ("rms_norm_eps",),
        "activation": ("hidden_act",),
    },
)

FAMILIES = {model_type: family for family in (GPT2, LLAMA) for model_type in family.model_types}


class NativeWeights:
    """Weights of a checkpoint whose family is in the table, read one layer at a time."""

    loaded_by: Literal["families", "bridge"] = "families"
    foldable = True
    no_vocabulary: str | None = None

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        """Index the checkpoint.

        Raises:
            UserError: a config key or an attention tensor is missing, or has the wrong shape.
        """
        self.checkpoint, self.family = checkpoint, family
        self.notes: list[str] = []
        self.prefix = self._find_prefix()
        self.architecture = self._read_architecture()
        self._check_attention_tensors()

    def layer(self, index: int) -> LayerWeights:
        """The raw attention weights of a layer."""
        facts = self.architecture
        n_kv, n_heads = facts.n_kv_heads, facts.n_heads
        if self.family.fused:
            weight, bias = self._linear("qkv", index)
            (q, k, v), (b_q, b_k, b_v) = weight.chunk(3, dim=-1), bias.chunk(3, dim=-1)
        else:
            q, b_q = self._linear("query", index)
            k, b_k = self._linear("key", index)
            v, b_v = self._linear("value", index)
        output, _ = self._linear("output", index)
        return LayerWeights(
            layer=index,
            W_Q=_split_heads(q, n_heads),
            W_K=_split_heads(k, n_kv),
            W_V=_split_heads(v, n_kv),
            W_O=output.reshape(n_heads, facts.d_head, facts.d_model),
            b_Q=b_q.reshape(n_heads, -1),
            b_K=b_k.reshape(n_kv, -1),
            b_V=b_v.reshape(n_kv, -1),
            norm=self._norm("norm", index),
        )

    def embeddings(self) -> EmbeddingWeights:
        """The raw embeddings; None for what the checkpoint does not hold."""
        W_E = self._optional(self._name("embedding"))
        head = self._optional("lm_head.weight")
        if self.architecture.tied:  # a tied checkpoint may store either of the two
            W_E = head if W_E is None else W_E
            head = W_E
        W_pos = self._optional(self._name("positions")) if "positions" in self.family.tensors else None
        final_norm = None if head is None else self._norm("final_norm")
        return EmbeddingWeights(W_E, W_pos, None if head is None else head.T, final_norm)

    def first_mlp(self) -> MLPWeights | str:
        """Block 0's MLP, or the reason why there is none to read."""
        parts = [part for part in ("mlp_in", "mlp_linear", "mlp_out") if part in self.family.tensors]
        missing = [self._name(part, 0) for part in parts if self._name(part, 0) not in self.checkpoint]
        if missing:
            return f"the checkpoint has no MLP of block 0 ({missing[0]})"
        W_in, b_in = self._linear("mlp_in", 0)
        W_out, b_out = self._linear("mlp_out", 0)
        W_linear = self._linear("mlp_linear", 0)[0] if "mlp_linear" in parts else None
        activation = self.architecture.activation or "missing from the config"
        return MLPWeights(W_in, b_in, W_linear, W_out, b_out, activation, self._norm("mlp_norm", 0))

    # --- the table, read --------------------------------------------------------------------------------------

    def _find_prefix(self) -> str:
        probe = self.family.tensors["output"].format(layer=0) + ".weight"
        for prefix in self.family.prefixes:
            if prefix + probe in self.checkpoint:
                return prefix
        raise UserError(
            f"{self.checkpoint.label}: tensor '{self.family.prefixes[-1]}{probe}' is missing from the checkpoint. "
            f"Its config.json says model_type={self.checkpoint.config.get('model_type')}."
        )

    def _read_architecture(self) -> Architecture:
        config, family = self.checkpoint.config, self.family

        def read(name: str, default: Any = None) -> Any:
            for key in family.keys.get(name, ()):
                if config.get(key) is not None:
                    return config[key]
            return default

        for name in ("n_layers", "n_heads", "d_model"):
            if not isinstance(read(name), int) or read(name) < 1:
                raise UserError(
                    f"{self.checkpoint.label}: config.json must give '{family.keys[name][0]}' as a positive integer, "
                    f"not {read(name)!r}."
                )
        n_heads, d_model = read("n_heads"), read("d_model")
        d_head, n_kv_heads = read("d_head", d_model // n_heads), read("n_kv_heads", n_heads)
        if n_heads % n_kv_heads:
            raise UserError(
                f"{self.checkpoint.label}: config.json gives {n_heads} heads over {n_kv_heads} KV heads, which does "
                "not divide."
            )
        return Architecture(
            family=family.name,
            n_layers=read("n_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_model=d_model,
            d_head=d_head,
            n_ctx=read("n_ctx"),
            norm=family.norm,
            norm_eps=float(read("norm_eps", 1e-5)),
            positions=family.positions,
            rotary=_rotary(config, d_head, self.checkpoint.label) if family.positions == "rotary" else None,
            tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
            activation=read("activation"),
            sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        )

    def _check_attention_tensors(self) -> None:
        """Every layer's attention and norm tensors are there, and have the shapes the config promises."""
        facts = self.architecture
        queries, keys = facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head
        shapes = {
            "qkv": (facts.d_model, queries + 2 * keys),
            "query": (facts.d_model, queries),
            "key": (facts.d_model, keys),
            "value": (facts.d_model, keys),
            "output": (queries, facts.d_model),
        }
        wanted = {
            self._name(part, layer): shapes[part]
            for layer in range(facts.n_layers)
            for part in shapes
            if part in self.family.tensors
        }
        needed = [*wanted, *(self._name("norm", layer) for layer in range(facts.n_layers))]
        missing = [name for name in needed if name not in self.checkpoint]
        if missing:
            raise UserError(
                f"{self.checkpoint.label}: {len(missing)} tensors are missing from the checkpoint, the first of them "
                f"'{missing[0]}'. ovqk fills nothing in."
            )
        for name, shape in wanted.items():
            expected = shape if self.family.linear == "in_out" else shape[::-1]
            if self.checkpoint.shapes[name] != expected:
                raise UserError(
                    f"{self.checkpoint.label}: tensor '{name}' has shape {list(self.checkpoint.shapes[name])}, but "
                    f"config.json promises {list(expected)}."
                )

    def _name(self, part: str, layer: int | None = None, kind: str = "weight") -> str:
        return f"{self.prefix}{self.family.tensors[part].format(layer=layer)}.{kind}"

    def _optional(self, name: str) -> Tensor | None:
        return self.checkpoint.tensor(name) if name in self.checkpoint else None

    def _linear(self, part: str, layer: int) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
        weight = self.checkpoint.tensor(self._name(part, layer))
        weight = weight if self.family.linear == "in_out" else weight.T
        bias = self._optional(self._name(part, layer, "bias"))
        return weight, weight.new_zeros(weight.shape[-1]) if bias is None else bias

    def _norm(self, part: str, layer: int | None = None) -> Norm:
        weight = self.checkpoint.tensor(self._name(part, layer))
        return Norm(self.family.norm, weight, self._optional(self._name(part, layer, "bias")))


class TransformerLensWeights:
    """A single file of TransformerLens names: blocks.0.attn.W_Q [head, d_model, d_head], embed.W_E, ..."""

    loaded_by: Literal["families", "bridge"] = "families"
    foldable = True
    no_vocabulary: str | None = None

    def __init__(self, checkpoint: Checkpoint, n_ctx: int | None, causal: bool | None) -> None:
        """Read the architecture off the shapes.

        Raises:
            UserError: an attention tensor is missing.
        """
        self.checkpoint = checkpoint
        self.notes = [] if causal is not None else ["model.causal is not set: attention taken to be causal"]
        layers = {int(name.split(".")[1]) for name in checkpoint.files if name.startswith("blocks.")}
        for layer in range(max(layers) + 1):
            for part in ("W_Q", "W_K", "W_V", "W_O"):
                if f"blocks.{layer}.attn.{part}" not in checkpoint:
                    raise UserError(
                        f"{checkpoint.label}: tensor 'blocks.{layer}.attn.{part}' is missing from the checkpoint. "
                        "ovqk fills nothing in."
                    )
        n_heads, d_model, d_head = checkpoint.shapes["blocks.0.attn.W_Q"]
        norm: NormKind = "none"
        if "blocks.0.ln1.w" in checkpoint:
            norm = "layernorm" if "blocks.0.ln1.b" in checkpoint else "rmsnorm"
        else:
            self.notes.append("the file holds no norm before attention: taken to have none, or one already folded")
        positions = checkpoint.shapes.get("pos_embed.W_pos")
        self.architecture = Architecture(
            family="transformer_lens",
            n_layers=len(layers),
            n_heads=n_heads,
            n_kv_heads=checkpoint.shapes["blocks.0.attn.W_K"][0],
            d_model=d_model,
            d_head=d_head,
            n_ctx=n_ctx or (positions[0] if positions else None),
            norm=norm,
            norm_eps=1e-5,
            positions="learned" if positions else "none",
            causal=True if causal is None else causal,
        )

    def layer(self, index: int) -> LayerWeights:
        """The raw attention weights of a layer."""
        W_Q, W_K, W_V, W_O = (self._read(f"blocks.{index}.attn.W_{part}") for part in "QKVO")
        b_Q, b_K, b_V = (
            self._optional(f"blocks.{index}.attn.b_{part}", weight[:, 0])
            for part, weight in zip("QKV", (W_Q, W_K, W_V), strict=True)
        )
        return LayerWeights(index, W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, norm=self._norm(f"blocks.{index}.ln1"))

    def embeddings(self) -> EmbeddingWeights:
        """The raw embeddings; None for what the file does not hold."""
        W_E, W_pos, W_U = (
            self._read(name) if name in self.checkpoint else None
            for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U")
        )
        return EmbeddingWeights(W_E, W_pos, W_U, self._norm("ln_final"))

    def first_mlp(self) -> MLPWeights | str:
        """Always a reason: the names do not say which activation the MLP has."""
        if "blocks.0.mlp.W_in" in self.checkpoint:
            return "a file of TransformerLens names does not tell the MLP's activation"
        return "the model has no MLP"

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)

    def _optional(self, name: str, like: Tensor) -> Tensor:
        return self._read(name) if name in self.checkpoint else torch.zeros_like(like)

    def _norm(self, name: str) -> Norm | None:
        if f"{name}.w" not in self.checkpoint:
            return None
        bias = self._read(f"{name}.b") if f"{name}.b" in self.checkpoint else None
        return Norm(self.architecture.norm, self._read(f"{name}.w"), bias)


def _split_heads(weight: Float[Tensor, "d_model columns"], n_heads: int) -> Float[Tensor, "head d_model d_head"]:
    """Columns [d_model, head * d_head] to one block per head."""
    return weight.reshape(weight.shape[0], n_heads, -1).transpose(0, 1).contiguous()


def _rotary(config: Mapping[str, Any], d_head: int, label: str) -> Rotary:
    """The model's own inverse frequencies, from either generation of config.json."""
    parameters = config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = config.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rotary(theta ** -(torch.arange(0, d_head, 2, dtype=torch.float32) / d_head))
    if kind in ("linear", "llama3"):  # closed forms, the same for every sequence length
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        full = AutoConfig.for_model(**{"model_type": "llama", **config})
        return Rotary(ROPE_INIT_FUNCTIONS[kind](full, torch.device("cpu"))[0])
    raise UserError(f"{label}: rotary scaling '{kind}' is not supported; allowed: default, linear, llama3.")
