"""Weights in one safetensors file with TransformerLens names, whose shapes tell most of the architecture."""

import re
from typing import Literal

import torch
from torch import Tensor

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.errors import UserError
from ovqk.weights.mlp import UNTOLD, MLPWeights
from ovqk.weights.norms import Norm, NormKind
from ovqk.weights.types import Architecture, EmbeddingWeights, LayerWeights


class TransformerLensWeights:
    """A single file with TransformerLens names: blocks.0.attn.W_Q [head, d_model, d_head], embed.W_E, ..."""

    loaded_by: Literal["families", "bridge"] = "families"
    foldable = True
    no_vocabulary: str | None = None

    def __init__(self, checkpoint: Checkpoint, n_ctx: int | None, causal: bool | None, attn_coeff: float = 1.0) -> None:
        """Read the architecture off the shapes.

        Raises:
            UserError: an attention tensor is missing, or tensors do not fit one another.
        """
        self.checkpoint = checkpoint
        self.notes = [] if causal is not None else ["model.causal is not set: attention taken to be causal"]
        if attn_coeff == 0:
            self.notes.append("model.attn_coeff is 0: no score reaches attention, so QK describes weights without use")
        numbers = (re.match(r"blocks\.(\d{1,9})\.", name) for name in checkpoint.shapes)
        layers = {int(number[1]) for number in numbers if number}
        gap = next((layer for layer in range(len(layers)) if layer not in layers), None)
        if gap is not None:  # told before names of so many layers are made
            raise checkpoint.missing(f"blocks.{gap}.attn.W_Q")
        for name in self._required(max(1, len(layers))):
            if name not in checkpoint:
                raise checkpoint.missing(name)
        n_kv_heads = self._check_shapes(len(layers))
        n_heads, d_model, d_head = checkpoint.shapes["blocks.0.attn.W_Q"]
        norm: NormKind = "none"
        if "blocks.0.ln1.w" in checkpoint:
            norm = "layernorm" if "blocks.0.ln1.b" in checkpoint else "rmsnorm"
        else:
            self.notes.append("the file holds no norm before attention: taken to have none, or one already folded")
        if "blocks.0.attn.b_Q" not in checkpoint:
            self.notes.append("the file holds no biases of attention: taken to have none")
        positions = checkpoint.shapes.get("pos_embed.W_pos")
        self.architecture = Architecture(
            family="transformer_lens",
            n_layers=len(layers),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_model=d_model,
            d_head=d_head,
            n_ctx=n_ctx or (positions[0] if positions else None),
            norm=norm,
            norm_eps=1e-5,
            positions="learned" if positions else "none",
            causal=True if causal is None else causal,
            attn_coeff=attn_coeff,
        )

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's raw attention weights."""
        W_Q, W_K, W_V, W_O = (self._read(f"blocks.{index}.attn.W_{part}") for part in "QKVO")
        b_Q, b_K, b_V = (
            self._optional(f"blocks.{index}.attn.b_{part}", weight[:, 0])
            for part, weight in zip("QKV", (W_Q, W_K, W_V), strict=True)
        )
        return LayerWeights(index, W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, norm=self._norm(f"blocks.{index}.ln1"))

    def embeddings(self) -> EmbeddingWeights:
        """Return the raw embeddings; None for a matrix that the file does not hold."""
        W_E, W_pos, W_U = (
            self._read(name) if name in self.checkpoint else None
            for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U")
        )
        return EmbeddingWeights(W_E, W_pos, W_U, self._norm("ln_final"))

    def first_mlp(self) -> MLPWeights | str:
        """Return block 0's MLP without its activation, which the names do not tell, or say why it cannot be had."""
        there, shapes = self.checkpoint, self.checkpoint.shapes
        if "blocks.0.mlp.W_in" not in there:
            return "the model has no MLP"
        if "blocks.0.mlp.W_gate" in there or "blocks.0.mlp.W_out" not in there:
            return "a file of TransformerLens names does not tell the MLP's form"
        model, hidden = (self.architecture.d_model,), shapes["blocks.0.mlp.W_out"][:1]
        wanted = {"mlp.W_in": model + hidden, "mlp.W_out": hidden + model, "mlp.b_in": hidden, "mlp.b_out": model}
        for part, shape in (wanted | {"ln2.w": model, "ln2.b": model}).items():
            if shapes.get(f"blocks.0.{part}", shape) != shape:
                return f"blocks.0.{part} does not fit the other tensors"
        W_in, W_out = self._read("blocks.0.mlp.W_in"), self._read("blocks.0.mlp.W_out")
        b_in, b_out = (
            self._optional(f"blocks.0.mlp.{name}", like) for name, like in (("b_in", W_in[0]), ("b_out", W_out[0]))
        )
        return MLPWeights(W_in, b_in, None, W_out, b_out, UNTOLD, self._norm("blocks.0.ln2"))

    def _required(self, n_layers: int) -> list[str]:
        """Return the names that the file must hold: a part in one layer must be in all."""
        blocks = [f"blocks.{layer}" for layer in range(n_layers)]
        names = [f"{block}.attn.W_{part}" for block in blocks for part in "QKVO"]
        biases = [f"{block}.attn.b_{part}" for block in blocks for part in "QKV"]
        if any(name in self.checkpoint.shapes for name in biases):
            names += biases
        norms = [f"{block}.ln1" for block in blocks]
        norms += ["ln_final"] if "unembed.W_U" in self.checkpoint.shapes else []
        for kind in "wb":
            known = re.compile(rf"(?:blocks\.\d+\.ln[12]|ln_final)\.[{kind}b]")  # one with a bias has a gain too
            if any(map(known.fullmatch, self.checkpoint.shapes)):
                names += [f"{norm}.{kind}" for norm in norms]
        return names

    def _check_shapes(self, n_layers: int) -> int:
        """Check all shapes against the first layer's queries and keys, and count the KV heads."""
        label, shapes = self.checkpoint.label, self.checkpoint.shapes
        query, key = shapes["blocks.0.attn.W_Q"], shapes["blocks.0.attn.W_K"]
        if len(query) != 3 or min(query) < 1 or key[1:] != query[1:] or key[0] < 1 or query[0] % key[0]:
            raise UserError(
                f"{label}: 'blocks.0.attn.W_Q' has shape {list(query)} and 'blocks.0.attn.W_K' {list(key)}; allowed: "
                "[head, d_model, d_head] for both, where the number of heads in W_K divides the number in W_Q."
            )
        (n_heads, d_model, d_head), n_kv = query, key[0]
        in_layer = {
            "attn.W_Q": (n_heads, d_model, d_head),
            "attn.W_K": (n_kv, d_model, d_head),
            "attn.W_V": (n_kv, d_model, d_head),
            "attn.W_O": (n_heads, d_head, d_model),
            "attn.b_Q": (n_heads, d_head),
            "attn.b_K": (n_kv, d_head),
            "attn.b_V": (n_kv, d_head),
            "ln1.w": (d_model,),
            "ln1.b": (d_model,),
        }
        n_read, n_written, n_ctx = (
            (*shapes.get(name, ()), 1, 1)[axis]
            for name, axis in (("embed.W_E", 0), ("unembed.W_U", 1), ("pos_embed.W_pos", 0))
        )
        if "embed.W_E" in shapes:  # an "=" that is read and never predicted has no column
            n_written = min(n_written, n_read)
        wanted: dict[str, tuple[int, ...]] = {"ln_final.w": (d_model,), "ln_final.b": (d_model,)}
        wanted |= {"embed.W_E": (n_read, d_model), "pos_embed.W_pos": (n_ctx, d_model)}
        wanted |= {"unembed.W_U": (d_model, n_written)}
        wanted |= {f"blocks.{layer}.{part}": shape for layer in range(n_layers) for part, shape in in_layer.items()}
        for name, shape in wanted.items():
            if shapes.get(name, shape) != shape:
                raise UserError(
                    f"{label}: tensor '{name}' has shape {list(shapes[name])}, but the other tensors promise "
                    f"{list(shape)}."
                )
        return n_kv

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)

    def _optional(self, name: str, like: Tensor) -> Tensor:
        return self._read(name) if name in self.checkpoint else torch.zeros_like(like)

    def _norm(self, name: str) -> Norm | None:
        if f"{name}.w" not in self.checkpoint:
            return None
        bias = self._read(f"{name}.b") if f"{name}.b" in self.checkpoint else None
        return Norm(self.architecture.norm, self._read(f"{name}.w"), bias)
