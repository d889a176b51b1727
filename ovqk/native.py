"""Weights of the families in the table, read from the checkpoint one layer at a time."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.checkpoints import Checkpoint, check_finite
from ovqk.errors import UserError
from ovqk.family import BIASES, Family, wrappers
from ovqk.rotations import completed, no_rotation, read_rotations
from ovqk.weights import (
    Architecture,
    EmbeddingWeights,
    LayerWeights,
    MLPWeights,
    Norm,
    NormKind,
    QueryKeyNorm,
    Rows,
    StoredRows,
    split_heads,
    times,
)

ROWS = 4096  # of two embeddings compared at a time
SMALL = 2**22
"""Elements up to which an embedding is read at once (16 MB)."""
DEQUANTISED_ONCE = 2**26
"""Elements up to which an embedding of a GGUF file is dequantised once and kept (256 MB)."""


class NativeWeights:
    """Weights of a checkpoint whose family is in the table."""

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
        self.config, full = completed(checkpoint, family)
        self.wrapper, self.prefix = self._find_prefix()
        self.architecture = self._read_architecture()
        self.rotations, notes = read_rotations(checkpoint, family, self.architecture, full)
        self._check_rotations()
        self._check_tensors()
        self.notes = [*self._notes(), *notes]

    def layer(self, index: int) -> LayerWeights:
        """The raw attention weights of a layer."""
        facts = self.architecture
        n_kv, n_heads = facts.n_kv_heads, facts.n_heads
        (q, b_q), (k, b_k), (v, b_v) = self._queries_keys_values(index)
        output = self._linear("output", index)[0] * self._multiplier(self.family.residual_multiplier)
        kind = self._kind_of_layer(index)
        rotary = self.rotations.get(kind, self.rotations.get(None))
        return LayerWeights(
            layer=index,
            W_Q=split_heads(q, n_heads),
            W_K=split_heads(k, n_kv),
            W_V=split_heads(v, n_kv),
            W_O=output.reshape(n_heads, facts.d_head, facts.d_model),
            b_Q=b_q.reshape(n_heads, -1),
            b_K=b_k.reshape(n_kv, -1),
            b_V=b_v.reshape(n_kv, -1),
            norm=self._norm("norm", index),
            post_norm=self._norm("post_norm", index),
            qk_norm=self._query_key_norm(index),
            rotary=no_rotation() if rotary is not None and not self._rotates(index) else rotary,
            sliding_window=self._window(kind),
        )

    def embeddings(self) -> EmbeddingWeights:
        """The raw embeddings; None for what the checkpoint does not hold."""
        W_E, head = self._rows(self._name("embedding")), self._rows(self._unembedding())
        if self.architecture.tied:  # a tied checkpoint may store either of the two
            W_E = head if W_E is None else W_E
            head = W_E
        if W_E is not None and head is not None and W_E.shape[0] != head.shape[0]:
            raise UserError(
                f"{self.checkpoint.label}: the embedding has {W_E.shape[0]} tokens and the unembedding "
                f"{head.shape[0]}; allowed: the same number."
            )
        family = self.family
        scale = self._multiplier(family.embedding_multiplier)
        W_E = times(W_E, scale * math.sqrt(self.architecture.d_model) if family.scaled_embedding else scale)
        head = times(head, self._multiplier(family.logit_multiplier) / self._multiplier(family.logit_divisor))
        W_pos = self._optional(self._name("positions")) if "positions" in family.tensors else None
        W_pos = None if W_pos is None else W_pos[family.position_offset :]
        final_norm = None if head is None else self._norm("final_norm")
        return EmbeddingWeights(W_E, W_pos, head.T if isinstance(head, Tensor) else head, final_norm)

    def first_mlp(self) -> MLPWeights | str:
        """Block 0's MLP, or the reason why there is none to read."""
        if self.family.experts:
            return "block 0 is a mixture of experts"
        parts = [part for part in self.family.tensors if part.startswith("mlp_") and not part.endswith("norm")]
        missing = [self._name(part, 0) for part in parts if self._name(part, 0) not in self.checkpoint]
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
        residual = self._multiplier(self.family.residual_multiplier)
        W_out, b_out = (part * residual for part in self._linear("mlp_out", 0))
        activation = self.architecture.activation or "missing from the config"
        norms = self._norm("mlp_norm", 0), self._norm("mlp_post_norm", 0)
        return MLPWeights(W_in, b_in, W_linear, W_out, b_out, activation, *norms, b_linear)

    # --- config.json ------------------------------------------------------------------------------------------

    def _read(self, name: str, default: Any = None) -> Any:
        for key in self.family.keys.get(name, ()):
            if self.config.get(key) is not None:
                return self.config[key]
        return default

    def _positive(self, name: str, default: int | None = None) -> int:
        number = self._read(name, default)
        if not isinstance(number, int) or number < 1:
            key = self.family.keys.get(name, (name,))[0]
            raise UserError(
                f"{self.checkpoint.label}: config.json must give '{key}' as a positive integer, not {number!r}."
            )
        return number

    def _read_architecture(self) -> Architecture:
        family, label = self.family, self.checkpoint.label
        for key in family.refused:
            if self.config.get(key):
                raise UserError(
                    f"{label}: config.json sets {key}={self.config[key]}, which ovqk does not read; allowed: unset."
                )
        n_heads, d_model = self._positive("n_heads"), self._positive("d_model")
        d_head = self._positive("d_head", d_model // n_heads)
        n_kv_heads = family.kv_heads or self._positive("n_kv_heads", n_heads)
        norm_eps = self._read("norm_eps", 1e-5)
        if not isinstance(norm_eps, int | float) or not 0 <= norm_eps < math.inf:
            raise UserError(
                f"{label}: config.json must give '{family.keys['norm_eps'][0]}' as a number that is finite and not "
                f"negative, not {norm_eps!r}."
            )
        if n_heads % n_kv_heads:
            raise UserError(
                f"{label}: config.json gives {n_heads} heads over {n_kv_heads} KV heads, which does not divide."
            )
        scale = self.config.get(family.scale) if isinstance(family.scale, str) else family.scale
        if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise UserError(f"{label}: config.json must give '{family.scale}' as a positive number, not {scale!r}.")
        tied = self.config.get("tie_word_embeddings", family.tied_by_default)
        if not isinstance(tied, bool | None):
            raise UserError(f"{label}: config.json must give 'tie_word_embeddings' as true or false, not {tied!r}.")
        attention_scale = None if scale is None else float(scale) ** -0.5
        if family.score_multiplier is not None:
            attention_scale = self._multiplier(family.score_multiplier)
        parallel = self.config.get(family.parallel) if isinstance(family.parallel, str) else family.parallel
        return Architecture(
            family=family.name,
            n_layers=self._positive("n_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_model=d_model,
            d_head=d_head,
            n_ctx=None if self._read("n_ctx") is None else self._positive("n_ctx"),
            norm=family.norm,
            norm_eps=float(norm_eps),
            positions=family.positions,
            tied=bool(tied) and not self._unties(),
            activation=self._read("activation"),
            attention_scale=attention_scale,
            post_norm="post_norm" in family.tensors,
            qk_norm=family.query_key_norm is not None,
            parallel=bool(parallel),
        )

    def _kind_of_layer(self, index: int) -> str | None:
        """`full_attention`, `sliding_attention`, ... where the config tells the layers apart."""
        kinds = self.config.get("layer_types") or self.config.get("attention_layers")
        return kinds[index] if isinstance(kinds, list) and index < len(kinds) else None

    def _window(self, kind: str | None) -> int | None:
        window = self._read("window")
        if kind in ("full_attention", "global") or self.config.get("use_sliding_window", True) is False:
            return None
        return window if isinstance(window, int) and window > 0 else None

    def _check_rotations(self) -> None:
        """Every layer that is rotated has a rotation.

        Raises:
            UserError: the settings name kinds of layers that this model does not have.
        """
        for index in range(self.architecture.n_layers if self.rotations else 0):
            kind = self._kind_of_layer(index)
            if self._rotates(index) and kind not in self.rotations and None not in self.rotations:
                given = ", ".join(map(str, self.rotations))
                raise UserError(
                    f"{self.checkpoint.label}: config.json gives rotary settings for {given}, and layer {index} is of "
                    f"the kind {kind}; allowed: settings for each kind of layer, or one for all."
                )

    def _rotates(self, index: int) -> bool:
        """Whether a layer of a model with rotary positions has them."""
        rule, kind = self.family.rotated, self._kind_of_layer(index)
        if rule == "no_rope_layers":
            marks = self.config["no_rope_layers"]
            return index >= len(marks) or bool(marks[index])
        if rule == "windowed_or_every" and self._read("window") is None:
            return True
        return rule == "every" or self._window(kind) is not None

    def _multiplier(self, key: str | None) -> float:
        """The number that a key of config.json gives; 1 where there is no key."""
        number = 1.0 if key is None else self.config.get(key)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or not number:
            raise UserError(f"{self.checkpoint.label}: config.json must give '{key}' as a number other than 0.")
        return float(number)

    def _unties(self) -> bool:
        """Whether embedding and unembedding are both stored, and differ: transformers ties equal ones alone."""
        names = self._name("embedding"), self._unembedding()
        embedding, head = (self.checkpoint.shapes.get(name) for name in names)
        if embedding is None or head is None:
            return False
        if embedding != head:
            return True
        blocks = range(0, head[0], ROWS)
        return any(
            not torch.equal(*(self.checkpoint.rows(name, n, n + ROWS, checked=False) for name in names)) for n in blocks
        )

    def _notes(self) -> list[str]:
        notes = [*self.family.notes]
        if self.wrapper:
            notes.append(f"the names of the tensors begin with '{self.wrapper}', which was taken off")
        if self.config.get("tie_word_embeddings", self.family.tied_by_default) and not self.architecture.tied:
            notes.append(
                f"config.json, or its model type's default, ties the unembedding to the embedding, but "
                f"'{self._unembedding()}' is stored with other values: read as it is stored, as transformers does"
            )
        keys = (self.family.embedding_multiplier, self.family.residual_multiplier)
        factors = [f"{key}={self._multiplier(key):g}" for key in keys if self._multiplier(key) != 1]
        if factors:
            notes.append(f"in embeddings and in what heads and MLPs write, raw or folded: {', '.join(factors)}")
        if self.architecture.qk_norm:
            notes.append(
                "queries and keys are normalised: QK spectra are of the weights with the norms' gains, "
                "un-normalised; readouts and shares normalise"
            )
        if ignored := self._ignored_biases():
            notes.append(
                f"the checkpoint stores {len(ignored)} biases that the model of its config.json does not have; they "
                f"are not read, as transformers does not read them: {ignored[0]}, ..."
            )
        if cap := self.config.get("attn_logit_softcapping"):
            notes.append(f"scores are capped at {cap:g} before the softmax, and no metric has that in")
        if self.architecture.post_norm:
            notes.append("a norm follows attention: its gain is in W_OV, what it divides by is not")
        if any(rotary.scale != 1 for rotary in self.rotations.values()):
            notes.append("the rotary scaling also multiplies the scores; the factor is in W_QK")
        still = [str(layer) for layer in range(self.architecture.n_layers) if not self._rotates(layer)]
        if self.rotations and still:
            notes.append(f"layers without positions: {', '.join(still)}; they are rotated by no angle")
        return notes

    # --- tensors ----------------------------------------------------------------------------------------------

    def _find_prefix(self) -> tuple[str, str]:
        """What wraps the model in the names of its tensors, and what the names begin with, with that."""
        probe = self.family.tensors["output"].format(layer=0) + ".weight"
        for wrapper, prefix in product(wrappers(), self.family.prefixes):
            if wrapper + prefix + probe in self.checkpoint:
                return wrapper, wrapper + prefix
        raise self.checkpoint.missing(f"{self.family.prefixes[0]}{probe}")

    def _unembedding(self) -> str:
        """The name of the unembedding, beside a text model that is one of two too."""
        names = [f"{self.wrapper}{part}{self.family.unembedding}.weight" for part in ("", "language_model.")]
        if "language_model" not in self.prefix:  # where only the model within is wrapped, it has its bare name
            names[1] = f"{self.family.unembedding}.weight"
        return next((name for name in names if name in self.checkpoint.shapes), names[0])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part's weight, as [d_in, d_out] where it is linear, but for the token embeddings."""
        facts = self.architecture
        queries, keys = facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head
        joint = self.family.query_key_norm == "over_heads"
        norms = ("norm", "post_norm", "final_norm", "mlp_norm", "mlp_post_norm")
        shapes = dict.fromkeys(norms, (facts.d_model,)) | {
            "query_norm": (queries if joint else facts.d_head,),
            "key_norm": (keys if joint else facts.d_head,),
            "qkv": (facts.d_model, queries + 2 * keys),
            "query": (facts.d_model, queries),
            "key": (facts.d_model, keys),
            "value": (facts.d_model, keys),
            "output": (queries, facts.d_model),
        }
        dense = "mlp_out" in self.family.tensors
        mlp_out = self.checkpoint.shapes.get(self._name("mlp_out", 0)) if dense else None
        if mlp_out:  # a partial checkpoint may hold the MLP's biases alone, which are not read
            d_mlp = mlp_out[0 if self.family.linear == "in_out" else -1]
            shapes |= {
                "mlp_in": (facts.d_model, d_mlp),
                "mlp_linear": (facts.d_model, d_mlp),
                "mlp_gate_and_linear": (facts.d_model, 2 * d_mlp),
                "mlp_out": (d_mlp, facts.d_model),
            }
        return {part: shape for part, shape in shapes.items() if part in self.family.tensors}

    def _check_tensors(self) -> None:
        """Check that each layer's attention and norms are there, and that what is read has the shape it should.

        A bias is there in every layer or in none. Embeddings are checked where they are read.
        """
        shapes, label = self._shapes(), self.checkpoint.label
        once = {part for part in shapes if part.startswith(("mlp_", "final_"))}
        places = [(part, layer) for layer in range(self.architecture.n_layers) for part in shapes if part not in once]
        missing = [self._name(*place) for place in places if self._name(*place) not in self.checkpoint]
        missing = missing or [name for part in shapes if part not in once for name in self._missing_biases(part)]
        if missing:
            raise self.checkpoint.missing(missing[0], len(missing))
        beyond = self._name("output", self.architecture.n_layers)
        if beyond in self.checkpoint:
            raise UserError(
                f"{label}: config.json gives '{self.family.keys['n_layers'][0]}' as {self.architecture.n_layers}, but "
                f"the checkpoint holds '{beyond}', of a layer after those."
            )
        for part, layer in [*places, *((part, 0) for part in once)]:
            bias, weight = shapes[part][-1:], shapes[part][:: 1 if self.family.linear == "in_out" else -1]
            self.checkpoint.refuse_scaled(self._name(part, layer))
            self._check_shape(self._name(part, layer), weight)
            self._check_shape(self._name(part, layer, "bias"), bias)
        if "positions" in self.family.tensors and self.architecture.n_ctx is not None:
            rows = self.architecture.n_ctx + self.family.position_offset
            self._check_shape(self._name("positions"), (rows, self.architecture.d_model))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.checkpoint.shapes.get(name, shape)
        if found != shape:
            raise UserError(
                f"{self.checkpoint.label}: tensor '{name}' has shape {list(found)}, but config.json and the other "
                f"tensors promise {list(shape)}."
            )

    def _name(self, part: str, layer: int | None = None, kind: str = "weight") -> str:
        return f"{self.prefix}{self.family.tensors[part].format(layer=layer)}.{kind}"

    def _optional(self, name: str) -> Tensor | None:
        return self.checkpoint.tensor(name) if name in self.checkpoint else None

    def _rows(self, name: str) -> Rows | None:
        """An embedding: read at once where it is small, else left in the checkpoint; None where there is none.

        Its rows are checked for NaN where they are read as those of tokens: `read_vocabulary` checks a small one.
        """
        if name not in self.checkpoint:
            return None
        shape = self.checkpoint.shapes[name]
        if len(shape) != 2 or shape[1] != self.architecture.d_model:
            raise UserError(
                f"{self.checkpoint.label}: tensor '{name}' has shape {list(shape)}, but config.json promises "
                f"[tokens, {self.architecture.d_model}]."
            )
        if math.prod(shape) <= SMALL:
            return self.checkpoint.tensor(name, checked=False)
        if self.checkpoint.quantisation and math.prod(shape) <= DEQUANTISED_ONCE:
            return StoredRows(self._dequantised_rows(name), (shape[0], shape[1]))
        return StoredRows(partial(self.checkpoint.rows, name), (shape[0], shape[1]))

    def _dequantised_rows(self, name: str) -> Callable[[int, int], Tensor]:
        """Return what gives rows of a tensor of a GGUF file that is kept in memory: to dequantise it takes a while."""
        kept = self.checkpoint.tensor(name, checked=False)

        def read(start: int, stop: int) -> Tensor:
            check_finite(self.checkpoint.label, name, kept[start:stop])
            return kept[start:stop]

        return read

    def _linear(self, part: str, layer: int) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
        weight = self.checkpoint.tensor(self._name(part, layer))
        weight = weight if self.family.linear == "in_out" else weight.T
        bias = None if self._unbiased(part) else self._optional(self._name(part, layer, "bias"))
        return weight, weight.new_zeros(weight.shape[-1]) if bias is None else bias

    def _queries_keys_values(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Weight [d_model, head * d_head] and bias of queries, of keys and of values."""
        if "qkv" not in self.family.tensors:
            return [self._linear(part, index) for part in ("query", "key", "value")]
        weight, bias = self._linear("qkv", index)
        facts = self.architecture
        if self.family.fused == "columns":
            sizes = [heads * facts.d_head for heads in (facts.n_heads, facts.n_kv_heads, facts.n_kv_heads)]
            return list(zip(weight.split(sizes, dim=-1), bias.split(sizes), strict=True))
        group = facts.n_heads // facts.n_kv_heads
        per_head = (facts.n_kv_heads, group + 2, facts.d_head)
        weights, biases = weight.reshape(facts.d_model, *per_head), bias.reshape(per_head)
        parts = slice(group), slice(group, group + 1), slice(group + 1, None)
        return [(weights[:, :, part].flatten(1), biases[:, part].flatten()) for part in parts]

    def _norm(self, part: str, layer: int | None = None) -> Norm | None:
        kind: NormKind = "rmsnorm" if self.family.norm == "none" else self.family.norm
        if part not in self.family.tensors:
            return Norm(kind, torch.ones(self.architecture.d_model)) if self._gainless(part) else None
        weight = self.checkpoint.tensor(self._name(part, layer)) + self.family.gain_offset
        return Norm(kind, weight, None if self._unbiased(part) else self._optional(self._name(part, layer, "bias")))

    def _unbiased(self, part: str) -> bool:
        """Whether the model has no bias there, whatever the checkpoint stores."""
        if part.endswith("norm"):
            return self.family.norm != "layernorm" or not self.family.norm_bias
        assumed = self.family.unbiased if self.family.complete else ()
        turned_off = (key for key, parts in BIASES.items() if part in parts)
        return any(self.config.get(key, key not in assumed) is False for key in turned_off)

    def _missing_biases(self, part: str) -> list[str]:
        """Biases of a part that the checkpoint lacks in some layers, though it stores them in others."""
        names = [self._name(part, layer, "bias") for layer in range(self.architecture.n_layers)]
        missing = [name for name in names if name not in self.checkpoint]
        return missing if len(missing) < len(names) and not self._unbiased(part) else []

    def _ignored_biases(self) -> list[str]:
        """Biases that the checkpoint stores and the model does not have, by name."""
        layers = range(self.architecture.n_layers)
        places = [(part, layer) for part in self.family.tensors if self._unbiased(part) for layer in layers]
        names = dict.fromkeys(
            self._name(*place, "bias") for place in places if place[0] not in ("embedding", "positions")
        )
        return [name for name in names if name in self.checkpoint.shapes]

    def _gainless(self, part: str) -> bool:
        """Whether there is a norm without a gain: a family with norms that names no tensor for them."""
        return self.family.norm != "none" and part in ("norm", "mlp_norm", "final_norm")

    def _query_key_norm(self, index: int) -> QueryKeyNorm | None:
        if self.family.query_key_norm is None:
            return None
        facts, joint = self.architecture, self.family.query_key_norm == "over_heads"
        gains = []
        for part, heads in (("query_norm", facts.n_heads), ("key_norm", facts.n_kv_heads)):
            gain = self.checkpoint.tensor(self._name(part, index)) + self.family.gain_offset
            gains.append(gain.reshape(heads, facts.d_head) if joint else gain.expand(heads, facts.d_head))
        return QueryKeyNorm(gains[0], gains[1], facts.norm_eps, over_heads=joint)
