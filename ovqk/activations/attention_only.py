"""An attention-only model that runs from one weights file with TransformerLens names.

No library runs such a file by itself. If it holds no MLPs, shapes alone say how it computes: embeddings, heads, norms,
unembedding. The parts are named like TransformerLens's hook points, so `RunningModel` runs it like any other model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.config.schema import ModelConfig
from ovqk.errors import UserError
from ovqk.weights.norms import apply_norm
from ovqk.weights.transformer_lens_file import TransformerLensWeights
from ovqk.weights.types import LayerWeights, keys, mixed, queries, score_scale

Hooks = dict[str, list[Callable[..., Any]]]


class AttentionBlock(nn.Module):
    """One layer, which adds its heads' outputs to the residual stream."""

    def __init__(self, weights: LayerWeights, b_O: Float[Tensor, " d_model"], model: "AttentionOnly") -> None:
        """Take the raw weights; `model` holds the hooks and the architecture."""
        super().__init__()
        self.weights, self.b_O, self.run_hooks = weights, b_O, model.run_hooks
        self.architecture = model.architecture

    def forward(self, stream: Float[Tensor, "prompt position d_model"], cache: Any) -> Tensor:
        """Return the residual stream after the layer."""
        weights, architecture, name = self.weights, self.architecture, f"blocks.{self.weights.layer}"
        stream = self.run_hooks(f"{name}.hook_in", stream)
        x = apply_norm(weights.norm, stream, architecture.norm_eps)
        q, k = (torch.stack([part(weights, rows) for rows in x]) for part in (queries, keys))
        v = torch.einsum("bpd,hdz->bphz", x, weights.W_V) + weights.b_V
        v = self.run_hooks(f"{name}.attn.hook_v", v).transpose(1, 2)
        before = 0
        if cache is not None:
            before = cache.get_seq_length(weights.layer)
            k, v = cache.update(k, v, weights.layer)
        kv = architecture.kv_of_head
        scale = score_scale(weights, architecture)
        scores = scale * torch.einsum("bhqz,bhkz->bhqk", q, k[:, kv])
        if architecture.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(before + 1)
            scores = scores.masked_fill(later.to(scores.device), -math.inf)
        pattern = mixed(scores, architecture.attn_coeff)
        pattern = self.run_hooks(f"{name}.attn.hook_pattern", pattern)
        z = torch.einsum("bhqk,bhkz->bqhz", pattern, v[:, kv])
        z = self.run_hooks(f"{name}.attn.hook_z", z)
        out = torch.einsum("bqhz,hzd->bqd", z, weights.W_O) + self.b_O
        return stream + self.run_hooks(f"{name}.attn.hook_out", out)


class AttentionOnly(nn.Module):
    """An attention-only model with the part of TransformerLens's bridge that `RunningModel` uses."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        """Read the file.

        Raises:
            UserError: it has MLPs, whose activation function it does not name, or it lacks the embedding or
                unembedding.
        """
        super().__init__()
        source = TransformerLensWeights(checkpoint, config.n_ctx, config.causal, config.attn_coeff)
        self.architecture, self.hooks_by_name = source.architecture, Hooks()
        if any(".mlp." in name for name in checkpoint.shapes):
            raise UserError(f"{checkpoint.label}: a file of TransformerLens names does not tell how its MLPs compute.")
        embeddings = source.embeddings()
        W_E, W_U = embeddings.W_E, embeddings.W_U
        if not isinstance(W_E, Tensor) or not isinstance(W_U, Tensor):
            raise UserError(f"{checkpoint.label}: the file holds no embedding or no unembedding, so it cannot be run.")
        self.W_E, self.W_U, self.W_pos, self.final_norm = W_E, W_U, embeddings.W_pos, embeddings.final_norm
        self.b_U = self._optional(checkpoint, "unembed.b_U", W_U.shape[1])
        n_layers, d_model = self.architecture.n_layers, self.architecture.d_model
        self.blocks = nn.ModuleList()
        for index in range(n_layers):
            b_O = self._optional(checkpoint, f"blocks.{index}.attn.b_O", d_model)
            holder = nn.Module()
            holder.original_component = AttentionBlock(source.layer(index), b_O, self)
            self.blocks.append(holder)
        self.cfg = SimpleNamespace(n_layers=n_layers, n_heads=self.architecture.n_heads)

    @property
    def original_model(self) -> "AttentionOnly":
        """The model that runs."""
        return self

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
        """Call functions with (value, hook) at named places; a value that they return replaces the one there."""
        for name, function in fwd_hooks:
            self.hooks_by_name.setdefault(name, []).append(function)
        try:
            yield
        finally:
            self.hooks_by_name.clear()

    def run_hooks(self, name: str, value: Tensor) -> Tensor:
        """Return the value after the functions at its place have changed it."""
        for function in self.hooks_by_name.get(name, ()):
            found = function(value, hook=None)
            value = value if found is None else found
        return value

    def forward(
        self,
        input_ids: Int[Tensor, "prompt position"],
        use_cache: bool = False,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Return logits at the last `logits_to_keep` positions (0 for all), in the form that transformers returns."""
        cache = past_key_values if use_cache else None
        first = 0 if cache is None else cache.get_seq_length()
        stream = self.W_E[input_ids]
        if self.W_pos is not None:
            stream = stream + self.W_pos[first : first + input_ids.shape[1]]
        for block in self.blocks:
            layer = block.original_component
            assert isinstance(layer, AttentionBlock)
            stream = layer(stream, cache)
        stream = self.run_hooks("ln_final.hook_in", stream)[:, -logits_to_keep:]
        x = apply_norm(self.final_norm, stream, self.architecture.norm_eps)
        return SimpleNamespace(logits=x @ self.W_U + self.b_U, past_key_values=cache)

    def redraw(self, drawn: Callable[[Tensor], Tensor]) -> None:
        """Replace every matrix with the one that a function draws for it."""
        self.W_E, self.W_U = drawn(self.W_E), drawn(self.W_U)
        self.W_pos = None if self.W_pos is None else drawn(self.W_pos)
        for block in self.blocks:
            layer = block.original_component
            assert isinstance(layer, AttentionBlock)
            W_Q, W_K, W_V, W_O = (drawn(getattr(layer.weights, f"W_{part}")) for part in "QKVO")
            layer.weights = replace(layer.weights, W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O)

    def _optional(self, checkpoint: Checkpoint, name: str, size: int) -> Tensor:
        return checkpoint.tensor(name) if name in checkpoint else torch.zeros(size)
