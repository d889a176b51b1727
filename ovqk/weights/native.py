"""Weights for the families in the table, read from the checkpoint one layer at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.checkpoints.checkpoint import Checkpoint, check_finite
from ovqk.checkpoints.tensors import ShapesAlone
from ovqk.errors import UserError
from ovqk.weights.family import Family, wrappers
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import Norm, NormKind, QueryKeyNorm
from ovqk.weights.settings import Settings
from ovqk.weights.stored_rows import Rows, StoredRows, times
from ovqk.weights.types import EmbeddingWeights, LayerWeights, split_heads

ROWS_COMPARED = 4096  # rows in two embeddings compared at a time
KEEP_UP_TO = 2**22
"""Elements up to which an embedding is read at once (16 MB)."""
DEQUANTISED_ONCE = 2**26
"""Elements up to which an embedding in a GGUF file is dequantised once and kept (256 MB)."""


class NativeWeights:
    """The weights in a checkpoint whose family is in the table; see `WeightSource`."""

    loaded_by: Literal["families", "bridge"] = "families"
    foldable = True
    no_vocabulary: str | None = None

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        """Index the checkpoint.

        Raises:
            UserError: a config key or an attention tensor is missing; one of them, or a tensor that is read, is not
                as it should be; or the config turns on something that ovqk does not read.
        """
        self.checkpoint, self.family = checkpoint, family
        self.settings = Settings(checkpoint, family)
        self.architecture = self.settings.architecture
        self.wrapper, self.prefix = self._find_prefix()
        if self.architecture.tied and self._unties():
            self.architecture = replace(self.architecture, tied=False)
        self._check_tensors()
        self.notes = self._notes()

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's raw attention weights."""
        architecture = self.architecture
        n_kv, n_heads = architecture.n_kv_heads, architecture.n_heads
        (q, b_q), (k, b_k), (v, b_v) = self._queries_keys_values(index)
        output = self._linear("output", index)[0] * self.settings.multiplier(self.family.residual_multiplier)
        scale = (architecture.attention_scale or architecture.d_head**-0.5) / (index + 1)
        return LayerWeights(
            layer=index,
            W_Q=split_heads(q, n_heads),
            W_K=split_heads(k, n_kv),
            W_V=split_heads(v, n_kv),
            W_O=output.reshape(n_heads, architecture.d_head, architecture.d_model),
            b_Q=b_q.reshape(n_heads, -1),
            b_K=b_k.reshape(n_kv, -1),
            b_V=b_v.reshape(n_kv, -1),
            norm=self._norm("norm", index),
            post_norm=self._norm("post_norm", index),
            qk_norm=self._query_key_norm(index),
            rotary=self.settings.rotary(index),
            sliding_window=self.settings.window(index),
            attention_scale=scale if self.family.divided_by_layer else None,
        )

    def embeddings(self) -> EmbeddingWeights:
        """Return the raw embeddings; None for a matrix that the checkpoint does not hold."""
        W_E, head = self._rows(self.tensor_name("embedding")), self._rows(self._unembedding())
        if self.architecture.tied:  # a tied checkpoint may store either one
            W_E = head if W_E is None else W_E
            head = W_E
        if W_E is not None and head is not None and W_E.shape[0] != head.shape[0]:
            raise UserError(
                f"{self.checkpoint.label}: the embedding has {W_E.shape[0]} tokens and the unembedding "
                f"{head.shape[0]}; allowed: the same number."
            )
        family = self.family
        scale = self.settings.multiplier(family.embedding_multiplier)
        W_E = times(W_E, scale * math.sqrt(self.architecture.d_model) if family.scaled_embedding else scale)
        head = times(
            head, self.settings.multiplier(family.logit_multiplier) / self.settings.multiplier(family.logit_divisor)
        )
        W_pos = self._optional(self.tensor_name("positions")) if "positions" in family.tensors else None
        W_pos = None if W_pos is None else W_pos[family.position_offset :]
        final_norm = None if head is None else self._norm("final_norm")
        return EmbeddingWeights(W_E, W_pos, head.T if isinstance(head, Tensor) else head, final_norm)

    def first_mlp(self) -> MLPWeights | str:
        """Return block 0's MLP, or the reason why there is none to read."""
        if self.family.experts:
            return "block 0 is a mixture of experts"
        parts = [part for part in self.family.tensors if part.startswith("mlp_")]
        missing = [name for part in parts for name in self._missing(part, 0)]
        if missing:
            return f"the checkpoint has no MLP of block 0 ({missing[0]})"
        W_linear = b_linear = None
        if "mlp_gate_and_linear" in parts:
            fused, b_fused = self._linear("mlp_gate_and_linear", 0)
            (W_in, W_linear), (b_in, b_linear) = fused.chunk(2, dim=-1), b_fused.chunk(2)
        else:
            W_in, b_in = self._linear("mlp_in", 0)
            if "mlp_linear" in parts:
                W_linear, b_linear = self._linear("mlp_linear", 0)
        residual = self.settings.multiplier(self.family.residual_multiplier)
        W_out, b_out = (part * residual for part in self._linear("mlp_out", 0))
        activation = self.architecture.activation or "missing from the config"
        norms = self._norm("mlp_norm", 0), self._norm("mlp_post_norm", 0)
        return MLPWeights(W_in, b_in, W_linear, W_out, b_out, activation, *norms, b_linear)

    # --- facts that the checkpoint adds to config.json ---------------------------------------------------------------

    def _unties(self) -> bool:
        """Return whether embedding and unembedding are both stored, and differ: transformers ties equal ones alone."""
        names = self.tensor_name("embedding"), self._unembedding()
        embedding, head = (self.checkpoint.shapes.get(name) for name in names)
        if embedding is None or head is None:
            return False
        if embedding != head:
            return True
        if isinstance(self.checkpoint.tensors, ShapesAlone):
            return False  # as config.json says: there are no numbers to compare
        blocks = range(0, head[0], ROWS_COMPARED)
        return any(
            not torch.equal(*(self.checkpoint.rows(name, n, n + ROWS_COMPARED, checked=False) for name in names))
            for n in blocks
        )

    def _notes(self) -> list[str]:
        notes = []
        if self.wrapper:
            notes.append(f"the names of the tensors begin with '{self.wrapper}', which was taken off")
        if self.settings.architecture.tied and not self.architecture.tied:
            notes.append(
                f"config.json, or its model type's default, ties the unembedding to the embedding, but "
                f"'{self._unembedding()}' is stored with other values: read as it is stored, as transformers does"
            )
        if ignored := self._ignored_biases():
            notes.append(
                f"the checkpoint stores {len(ignored)} biases that the model of its config.json does not have; they "
                f"are not read, as transformers does not read them: {ignored[0]}, ..."
            )
        return notes + self.settings.notes()

    # --- tensors ----------------------------------------------------------------------------------------------

    def _find_prefix(self) -> tuple[str, str]:
        """Return the wrapper's prefix in tensors' names, and the whole prefix including it."""
        probe = self.family.tensors["output"].format(layer=0) + ".weight"
        for wrapper, prefix in product(wrappers(), self.family.prefixes):
            if wrapper + prefix + probe in self.checkpoint:
                return wrapper, wrapper + prefix
        raise self.checkpoint.missing(f"{self.family.prefixes[0]}{probe}")

    def _unembedding(self) -> str:
        """Return the unembedding's name, also if the text model stands beside another."""
        names = [f"{self.wrapper}{part}{self.family.unembedding}.weight" for part in ("", "language_model.")]
        if "language_model" not in self.prefix:  # if only the model within is wrapped, it has its bare name
            names[1] = f"{self.family.unembedding}.weight"
        return next((name for name in names if name in self.checkpoint.shapes), names[0])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part's weight, [d_in, d_out] if it is linear, except for the token embeddings."""
        architecture = self.architecture
        queries, keys = architecture.n_heads * architecture.d_head, architecture.n_kv_heads * architecture.d_head
        joint = self.family.query_key_norm == "over_heads"
        norms = ("norm", "post_norm", "final_norm", "mlp_norm", "mlp_post_norm")
        shapes = dict.fromkeys(norms, (architecture.d_model,)) | {
            "query_norm": (queries if joint else architecture.d_head,),
            "key_norm": (keys if joint else architecture.d_head,),
            "qkv": (architecture.d_model, queries + 2 * keys),
            "query": (architecture.d_model, queries),
            "key": (architecture.d_model, keys),
            "value": (architecture.d_model, keys),
            "output": (queries, architecture.d_model),
        }
        dense = "mlp_out" in self.family.tensors
        mlp_out = self.checkpoint.shapes.get(self.tensor_name("mlp_out", 0)) if dense else None
        if mlp_out:  # a partial checkpoint may hold the MLP's biases alone, which are not read
            d_mlp = mlp_out[0 if self.family.linear == "in_out" else -1]
            shapes |= {
                "mlp_in": (architecture.d_model, d_mlp),
                "mlp_linear": (architecture.d_model, d_mlp),
                "mlp_gate_and_linear": (architecture.d_model, 2 * d_mlp),
                "mlp_out": (d_mlp, architecture.d_model),
            }
        return {part: shape for part, shape in shapes.items() if part in self.family.tensors}

    def _check_tensors(self) -> None:
        """Check that each layer's attention and norms are there, biases with them, and that they have their shapes.

        Embeddings are checked when they are read.
        """
        shapes, label = self._shapes(), self.checkpoint.label
        once = {part for part in shapes if part.startswith(("mlp_", "final_"))}
        places = [(part, layer) for layer in range(self.architecture.n_layers) for part in shapes if part not in once]
        missing = [name for place in places for name in self._missing(*place)]
        if missing := sorted(missing, key=lambda name: name.endswith(".bias")):  # weights are named first
            raise self.checkpoint.missing(missing[0], len(missing))
        beyond = self.tensor_name("output", self.architecture.n_layers)
        if beyond in self.checkpoint:
            raise UserError(
                f"{label}: config.json gives '{self.family.keys['n_layers'][0]}' as {self.architecture.n_layers}, but "
                f"the checkpoint holds '{beyond}', of a layer after those."
            )
        for part, layer in [*places, *((part, 0) for part in once)]:
            bias, weight = shapes[part][-1:], shapes[part][:: 1 if self.family.linear == "in_out" else -1]
            self.checkpoint.refuse_scaled(self.tensor_name(part, layer))
            self._check_shape(self.tensor_name(part, layer), weight)
            if self.settings.has_bias(part):
                self._check_shape(self.tensor_name(part, layer, "bias"), bias)
        if "positions" in self.family.tensors and self.architecture.n_ctx is not None:
            rows = self.architecture.n_ctx + self.family.position_offset
            self._check_shape(self.tensor_name("positions"), (rows, self.architecture.d_model))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.checkpoint.shapes.get(name, shape)
        if found != shape:
            raise UserError(
                f"{self.checkpoint.label}: tensor '{name}' has shape {list(found)}, but config.json and the other "
                f"tensors promise {list(shape)}."
            )

    def tensor_name(self, part: str, layer: int | None = None, kind: str = "weight") -> str:
        """Return the checkpoint's name for a part's weight or bias."""
        return f"{self.prefix}{self.family.tensors[part].format(layer=layer)}.{kind}"

    def _optional(self, name: str) -> Tensor | None:
        return self.checkpoint.tensor(name) if name in self.checkpoint else None

    def _rows(self, name: str) -> Rows | None:
        """Return an embedding: read at once if it is small, else left in the checkpoint; None if there is none.

        Its rows are checked for NaN when they are read as tokens' rows; `read_vocabulary` checks a small embedding.
        """
        if name not in self.checkpoint:
            return None
        shape = self.checkpoint.shapes[name]
        if len(shape) != 2 or shape[1] != self.architecture.d_model:
            raise UserError(
                f"{self.checkpoint.label}: tensor '{name}' has shape {list(shape)}, but config.json promises "
                f"[tokens, {self.architecture.d_model}]."
            )
        if math.prod(shape) <= KEEP_UP_TO:
            return self.checkpoint.tensor(name, checked=False)
        if self.checkpoint.quantisation and math.prod(shape) <= DEQUANTISED_ONCE:
            return StoredRows(self._dequantised_rows(name), (shape[0], shape[1]))
        return StoredRows(partial(self.checkpoint.rows, name), (shape[0], shape[1]))

    def _dequantised_rows(self, name: str) -> Callable[[int, int], Tensor]:
        """Return a reader of rows from a GGUF tensor that is kept in memory, because dequantising it takes a while."""
        kept = self.checkpoint.tensor(name, checked=False)
        finite = torch.zeros(len(kept), dtype=torch.bool)

        def read(start: int, stop: int) -> Tensor:
            if not finite[start:stop].all():
                check_finite(self.checkpoint.label, name, kept[start:stop])
                finite[start:stop] = True
            return kept[start:stop]

        return read

    def _linear(self, part: str, layer: int) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
        weight = self.checkpoint.tensor(self.tensor_name(part, layer))
        weight = weight if self.family.linear == "in_out" else weight.T
        bias = self._bias(part, layer)
        return weight, weight.new_zeros(weight.shape[-1]) if bias is None else bias

    def _bias(self, part: str, layer: int | None) -> Tensor | None:
        """Return a part's bias if the model has it; None if it has none, whatever the checkpoint stores."""
        return self.checkpoint.tensor(self.tensor_name(part, layer, "bias")) if self.settings.has_bias(part) else None

    def _missing(self, part: str, layer: int) -> list[str]:
        """Name what the checkpoint lacks for a part: its weight, and its bias if the model has one."""
        kinds = ("weight", "bias") if self.settings.has_bias(part) else ("weight",)
        names = [self.tensor_name(part, layer, kind) for kind in kinds]
        return [name for name in names if name not in self.checkpoint]

    def _queries_keys_values(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Return weight [d_model, head * d_head] and bias for queries, keys and values."""
        if "qkv" not in self.family.tensors:
            return [self._linear(part, index) for part in ("query", "key", "value")]
        weight, bias = self._linear("qkv", index)
        architecture = self.architecture
        if self.family.fused == "columns":
            sizes = [
                heads * architecture.d_head
                for heads in (architecture.n_heads, architecture.n_kv_heads, architecture.n_kv_heads)
            ]
            return list(zip(weight.split(sizes, dim=-1), bias.split(sizes), strict=True))
        group = architecture.n_heads // architecture.n_kv_heads
        per_head = (architecture.n_kv_heads, group + 2, architecture.d_head)
        weights, biases = weight.reshape(architecture.d_model, *per_head), bias.reshape(per_head)
        parts = slice(group), slice(group, group + 1), slice(group + 1, None)
        return [(weights[:, :, part].flatten(1), biases[:, part].flatten()) for part in parts]

    def _norm(self, part: str, layer: int | None = None) -> Norm | None:
        kind: NormKind = "rmsnorm" if self.family.norm == "none" else self.family.norm
        if part not in self.family.tensors:
            return Norm(kind, torch.ones(self.architecture.d_model)) if self._gainless(part) else None
        weight = self.checkpoint.tensor(self.tensor_name(part, layer)) + self.family.gain_offset
        return Norm(kind, weight, self._bias(part, layer))

    def _ignored_biases(self) -> list[str]:
        """Return the biases that the checkpoint stores and the model does not have, by name."""
        layers = range(self.architecture.n_layers)
        places = [(part, layer) for part in self.family.tensors if not self.settings.has_bias(part) for layer in layers]
        names = dict.fromkeys(
            self.tensor_name(*place, "bias") for place in places if place[0] not in ("embedding", "positions")
        )
        return [name for name in names if name in self.checkpoint.shapes]

    def _gainless(self, part: str) -> bool:
        """Return whether there is a norm without a gain: a family with norms that names no tensor for them."""
        return self.family.norm != "none" and part in ("norm", "mlp_norm", "final_norm")

    def _query_key_norm(self, index: int) -> QueryKeyNorm | None:
        if self.family.query_key_norm is None:
            return None
        architecture, joint = self.architecture, self.family.query_key_norm == "over_heads"
        gains = []
        for part, heads in (("query_norm", architecture.n_heads), ("key_norm", architecture.n_kv_heads)):
            gain = self.checkpoint.tensor(self.tensor_name(part, index)) + self.family.gain_offset
            gains.append(gain.reshape(heads, architecture.d_head) if joint else gain.expand(heads, architecture.d_head))
        return QueryKeyNorm(gains[0], gains[1], architecture.norm_eps, over_heads=joint)
