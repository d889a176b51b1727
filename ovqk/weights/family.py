"""A row in the table of architecture families: how a family names its tensors and lays them out."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, Literal, Union

from ovqk.weights.norms import NormKind
from ovqk.weights.types import PositionKind

WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "model.")
"""Prefixes that torch.compile, data parallelism, PEFT and a module kept in a module add to tensors' names."""


ATTENTION_READS = ("query", "key", "value", "qkv")
MLP_PARTS = ("mlp_in", "mlp_linear", "mlp_gate_and_linear", "mlp_out")


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        model_types: values that its config.json has under `model_type`.
        prefixes: checkpoints' prefixes before tensors' names, in the order tried.
        tensors: ovqk's name -> the checkpoint's, without `.weight` or `.bias`; `{layer}` is the layer's index.
            `query`, `key`, `value` or a fused `qkv`; `norm` (absent: none, or one without a gain), `post_norm`,
            `query_norm`, `key_norm`; the MLP's `mlp_in` (its gate, if it has one), `mlp_linear` or a fused
            `mlp_gate_and_linear`, `mlp_out`, `mlp_norm`, `mlp_post_norm`.
        keys: ovqk's name -> config.json's keys, in the order tried.
        linear: `out_in` for torch's Linear [out, in], `in_out` for GPT-2's Conv1D [in, out].
        fused: how `qkv` is laid out: all queries, all keys, all values; or KV head by KV head, the queries that read
            it, its key, its value.
        unembedding: the unembedding's name, without a prefix.
        gain_offset: added to a norm's weight to give its gain (Gemma: 1).
        scaled_embedding: embedding rows are multiplied by sqrt(d_model).
        embedding_multiplier, residual_multiplier, logit_multiplier: keys for numbers that multiply embedding rows, what
            attention and MLP write, and the logits.
        logit_divisor: key for a number that the logits are divided by.
        parallel: attention and MLP read the same stream; or the config's key that says so.
        query_key_norm: queries and keys are normalised per head, or per token over all heads.
        interleaved: rotary pairs are neighbours (GPT-J).
        partial_rotary: `partial_rotary_factor` is read: only a part of each head is rotated. Elsewhere transformers
            ignores it.
        rotated: which layers are rotated: every one; those that `no_rope_layers` marks with 1; those with a sliding
            window; or those, and every one if no window is set.
        rotations_by_kind: the module takes other rotary settings for each kind of layer; the others take one for all.
        default_theta: the rotary frequencies' base if config.json gives none (for a `complete` family).
        position_offset: rows in the position embedding before the first position's (OPT: 2).
        kv_heads: how many there are, if config.json has no key for it.
        scale: key for the number whose -1/2 power scales the scores, or a number; d_head if absent.
        score_multiplier: key for the number that scales the scores itself.
        divided_by_layer: the scale of the scores is divided by the layer's number, counted from 1.
        experts: block 0's MLP is a mixture of experts.
        read_bias, output_bias, mlp_bias: whether queries, keys and values have biases, whether the output projection
            has one, and whether the MLP has; or config.json's key that says so.
        norm_bias: whether the norms on the stream have biases.
        refused: config keys that must be unset or false, as ovqk does not read the features that they turn on.
        caps: keys of config.json for the largest score or logit, in the order that notes tell them.
        complete: config.json alone tells everything; otherwise transformers fills in the model type's defaults.
        variant: from config.json, the row for this checkpoint; None: the bridge.
        notes: for the record, parts that such a model has and the formulas have not.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    norm: NormKind
    positions: PositionKind
    tensors: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]
    linear: Literal["out_in", "in_out"] = "out_in"
    fused: Literal["columns", "per_head"] = "columns"
    unembedding: str = "lm_head"
    tied_by_default: bool = False
    gain_offset: float = 0.0
    scaled_embedding: bool = False
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    parallel: bool | str = False
    query_key_norm: Literal["per_head", "over_heads"] | None = None
    interleaved: bool = False
    partial_rotary: bool = False
    rotated: Literal["every", "no_rope_layers", "windowed", "windowed_or_every"] = "every"
    rotations_by_kind: bool = False
    default_theta: float = 10000.0
    position_offset: int = 0
    kv_heads: int | None = None
    scale: str | float | None = None
    score_multiplier: str | None = None
    divided_by_layer: bool = False
    experts: bool = False
    read_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    norm_bias: bool = False
    refused: tuple[str, ...] = field(default=())
    caps: tuple[str, ...] = ()
    complete: bool = False
    variant: Callable[[Mapping[str, Any]], Union["Family", None]] | None = None
    notes: tuple[str, ...] = ()

    def reads(self, name: str) -> bool:
        """Return whether ovqk reads a tensor with this name: attention, norms, embeddings and block 0's MLP."""
        return self._read.fullmatch(name) is not None

    @cached_property
    def _read(self) -> re.Pattern[str]:
        layers = {True: "0", False: r"\d+"}
        names = (
            re.escape(name).replace(re.escape("{layer}"), layers[part.startswith("mlp_")])
            for part, name in self.tensors.items()
        )
        wrapper = f"(?:{'|'.join(map(re.escape, WRAPPERS))})*"
        own = f"(?:{'|'.join(map(re.escape, self.prefixes))})(?:{'|'.join(names)})"
        head = rf"(?:language_model\.)?{re.escape(self.unembedding)}"
        return re.compile(rf"{wrapper}(?:{own}|{head})\.(?:weight|bias)")


def as_transformers_reads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the model type that transformers reads: a Mistral with `layer_types` is a Ministral."""
    taken = {"model_type": "ministral"} if config.get("model_type") == "mistral" and "layer_types" in config else {}
    return {**config, **taken}


def wrappers() -> Iterator[str]:
    """Yield prefixes that tensors' names may have, from none to three wrappers in a row."""
    yield ""
    for depth in (1, 2, 3):
        yield from map("".join, product(WRAPPERS, repeat=depth))
