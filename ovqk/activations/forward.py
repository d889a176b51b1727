"""A model that runs on a batch of prompts: its heads' attention and outputs, with and without replacements.

The model is transformers' own. It is seen through TransformerLens's TransformerBridge, whose hook points have the same
names in all architectures. A replacement at layer l and position p changes nothing before that layer or position. So
the changed run begins at layer l with the original run's residual stream, and at position p with its keys and values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.activations.attention_only import AttentionOnly
from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.config.schema import ModelConfig
from ovqk.weights.bridge_loading import boot_bridge, find_architecture, load_model, quiet

GRADIENT_PROMPTS = 8
"""How many prompts' gradients are taken together. All intermediate values from their forward pass stay in memory."""


class Places(NamedTuple):
    """The positions in a batch at which a run's values are kept, one for each prompt.

    Attributes:
        queries: the positions whose patterns and outputs are kept.
        sources: the positions whose value vectors are kept.
    """

    queries: Int[Tensor, "query prompt"]
    sources: Int[Tensor, "source prompt"]


class Look(NamedTuple):
    """An attention to read in a patched run: from a query to a source, minus that to a control. All are positions."""

    query: Int[Tensor, " prompt"]
    source: Int[Tensor, " prompt"]
    control: Int[Tensor, " prompt"]


@dataclass(frozen=True)
class Run:
    """One forward pass over a batch.

    Attributes:
        logits: the logits at END.
        final: the residual stream at END, before the final norm.
        patterns: the attention probabilities from the kept queries, in [0, 1].
        outputs: each query head's z at the kept queries, before the output projection.
        values: each KV head's value vectors at the kept sources, with their bias.
        attention_out: the attention output at END, before a norm that may follow it.
        gradients: the summed logit differences' gradient with respect to `outputs`; None unless asked for.
    """

    logits: Float[Tensor, "prompt vocabulary"]
    final: Float[Tensor, "prompt d_model"]
    patterns: Float[Tensor, "layer prompt head query key"]
    outputs: Float[Tensor, "layer prompt query head d_head"]
    values: Float[Tensor, "layer prompt source kv_head d_head"]
    attention_out: Float[Tensor, "layer prompt d_model"]
    gradients: Float[Tensor, "layer prompt query head d_head"] | None = None


@dataclass(frozen=True)
class Base:
    """A run that patched runs start from: tokens, the residual stream before each layer, and keys and values."""

    tokens: Int[Tensor, "prompt position"]
    residuals: list[Float[Tensor, "prompt position d_model"]]
    cached: list[tuple[Tensor, Tensor]]


class Replacement(NamedTuple):
    """An output that replaces a head's own, for each prompt."""

    layer: int
    head: int
    output: Float[Tensor, "prompt d_head"]


class Patched(NamedTuple):
    """Results from patched runs, for each run and prompt.

    Attributes:
        difference: the answer's logit minus the foil's logit.
        looks: all heads' attention for each `Look`; nan in layers before the replacement, which does not change them.
    """

    difference: Float[Tensor, "replacement prompt"]
    looks: Float[Tensor, "replacement look layer head prompt"]


class RunningModel:
    """A language model that runs prompts.

    Attributes:
        n_layers, n_heads: how many layers there are, and how many heads in each.
        whole: whether patched runs begin at the first position. Some architectures cannot continue from another run's
            keys and values.
    """

    def __init__(self, bridge: Any, device: torch.device) -> None:
        """Take a loaded model as TransformerLens's bridge shows it."""
        self.bridge, self.device = bridge, device
        self.model = bridge.original_model.to(device).requires_grad_(requires_grad=False).eval()
        self.n_layers, self.n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
        self.whole = False
        self._in_tuples = False

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: ModelConfig, device: torch.device) -> "RunningModel":
        """Load a checkpoint's model in float32.

        Raises:
            UserError: transformers or TransformerLens cannot load it, or tensors are missing.
        """
        if not checkpoint.config:
            return cls(AttentionOnly(checkpoint, config), device)
        with quiet(), torch.no_grad():
            architecture = find_architecture(checkpoint)
            model = load_model(checkpoint, architecture, config.trust_remote_code)
            return cls(boot_bridge(checkpoint, model, architecture, config.trust_remote_code), device)

    # --- whole runs ------------------------------------------------------------------------------------------

    def run(
        self,
        tokens: Int[Tensor, "prompt position"],
        places: Places,
        contrast: tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]] | None = None,
    ) -> Run:
        """Run prompts from the start, and keep the heads' attention, outputs and values at some places.

        Args:
            tokens: the prompts' token ids.
            places: the positions that are kept.
            contrast: the answers' and foils' token ids. If they are given, the logit difference's gradients are taken.
        """
        if contrast is not None and len(tokens) > GRADIENT_PROMPTS:
            parts = [slice(first, first + GRADIENT_PROMPTS) for first in range(0, len(tokens), GRADIENT_PROMPTS)]
            return _joined(
                [
                    self.run(
                        tokens[part],
                        Places(places.queries[:, part], places.sources[:, part]),
                        (contrast[0][part], contrast[1][part]),
                    )
                    for part in parts
                ]
            )
        kept: dict[str, list[Tensor]] = {"pattern": [], "z": [], "v": [], "out": [], "final": []}
        queries, sources = (each.T.to(self.device) for each in places)
        every = torch.arange(len(tokens), device=self.device)[:, None]

        def keep(value: Tensor, hook: Any, part: str) -> Tensor | None:
            if part == "z":
                if contrast is not None and not value.requires_grad:
                    value = value.detach().requires_grad_()
                kept[part].append(value if contrast is not None else value[every, queries])
                return value
            if part == "pattern":
                found = value.transpose(1, 2)[every, queries].transpose(1, 2)
            else:
                found = value[every, sources] if part == "v" else value[:, -1]
            kept[part].append(found.detach())
            return None

        names = [
            (f"blocks.{layer}.attn.hook_{part}", partial(keep, part=part))
            for layer in range(self.n_layers)
            for part in ("pattern", "z", "v", "out")
        ]
        with (
            torch.set_grad_enabled(contrast is not None),
            self._hooked([*names, ("ln_final.hook_in", partial(keep, part="final"))]),
        ):
            logits = self._forward(input_ids=tokens.to(self.device), use_cache=False)
            gradients = None
            if contrast is not None:
                answers, foils = (ids.to(self.device)[:, None] for ids in contrast)
                difference = logits.gather(1, answers) - logits.gather(1, foils)
                found = torch.autograd.grad(difference.sum(), kept["z"])
                gradients = torch.stack([gradient[every, queries] for gradient in found]).cpu()
                kept["z"] = [value[every, queries].detach() for value in kept["z"]]
        return Run(
            logits=logits.detach().cpu(),
            final=kept["final"][0].cpu(),
            patterns=torch.stack(kept["pattern"]).cpu(),
            outputs=torch.stack(kept["z"]).cpu(),
            values=torch.stack(kept["v"]).cpu(),
            attention_out=torch.stack(kept["out"]).cpu(),
            gradients=gradients,
        )

    def run_hooked(
        self, tokens: Int[Tensor, "prompt position"], names: Sequence[tuple[str, Callable[..., Any]]]
    ) -> None:
        """Run prompts from the start, and call functions with (value, hook) at named hook points."""
        with torch.no_grad(), self._hooked(names):
            self._forward(input_ids=tokens.to(self.device), use_cache=False)

    @torch.no_grad()
    def streams(
        self, prefixes: Int[Tensor, "prefix position"], words: Int[Tensor, " word"]
    ) -> Float[Tensor, "layer word d_model"]:
        """Return words' residual stream before each layer when they stand behind prefixes, averaged over the prefixes.

        The prefixes' keys and values are computed once, unless the architecture cannot continue from them.
        """
        found: list[Tensor] = []
        n, last = len(words), words.repeat_interleave(len(prefixes))[:, None]
        names = [(f"blocks.{layer}.hook_in", partial(_append, to=found)) for layer in range(self.n_layers)]
        if self.whole:
            self.run_hooked(torch.cat([prefixes.repeat(n, 1), last], 1), names)
        else:
            base = self.base(prefixes)
            with self._hooked(names):
                cache = _prefix(base, prefixes.shape[1], n)
                self._forward(input_ids=last.to(self.device), use_cache=True, past_key_values=cache)
        return torch.stack([each[:, -1].float().unflatten(0, (n, -1)).mean(1) for each in found]).cpu()

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Draw every matrix anew from a normal distribution with the matrix's mean and standard deviation.

        Gains and biases stay as they are.
        """
        generator = torch.Generator().manual_seed(seed)

        def drawn(matrix: Tensor) -> Tensor:
            return torch.empty(matrix.shape).normal_(float(matrix.mean()), float(matrix.std()), generator=generator)

        if isinstance(self.model, AttentionOnly):
            self.model.redraw(drawn)
            return
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.data = drawn(parameter).to(parameter)

    # --- replacements ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def base(self, tokens: Int[Tensor, "prompt position"]) -> Base:
        """Run prompts, and keep the values that patched runs start from."""
        residuals: list[Tensor] = []
        names = [(f"blocks.{layer}.hook_in", partial(_append, to=residuals)) for layer in range(self.n_layers)]

        def look(module: object, inputs: object, output: object) -> None:
            self._in_tuples = isinstance(output, tuple)

        with self._hooked(names), _removed(self.bridge.blocks[0].original_component.register_forward_hook(look)):
            output = self.model(
                input_ids=tokens.to(self.device), use_cache=True, logits_to_keep=1, past_key_values=_empty_cache()
            )
        cached = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return Base(tokens.to(self.device), residuals, cached)

    @torch.no_grad()
    def patched(
        self,
        base: Base,
        at: Int[Tensor, " prompt"],
        replacements: Sequence[Sequence[Replacement]],
        contrast: tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]],
        looks: Sequence[Look] = (),
    ) -> Patched:
        """Run prompts with some heads' outputs replaced at one position.

        Args:
            base: the run to change.
            at: the position in each prompt.
            replacements: for each changed run, the heads to replace.
            contrast: the answers' and foils' token ids.
            looks: the attentions to read.
        """
        n, first = len(replacements), int(torch.stack([at, *(look.query for look in looks)]).min())
        first = 0 if self.whole else first
        start = min(each.layer for together in replacements for each in together)
        prompts = len(base.tokens)
        every = torch.arange(prompts)
        shown = torch.full((n, len(looks), self.n_layers, self.n_heads, prompts), math.nan)

        def replace(value: Tensor, hook: Any, layer: int) -> Tensor:
            value = value.clone()
            for index, together in enumerate(replacements):
                for each in together:
                    if each.layer == layer:
                        value[every + index * prompts, at - first, each.head] = each.output.to(value)
            return value

        def look(value: Tensor, hook: Any, layer: int) -> None:
            for number, (query, source, control) in enumerate(looks):
                whole = value.view(n, prompts, *value.shape[1:])
                rows = whole[:, every, :, query - first]  # [prompt, n, head, key]
                found = rows[every, :, :, source] - rows[every, :, :, control]
                shown[:, number, layer] = found.permute(1, 2, 0).cpu()

        layers = sorted({each.layer for together in replacements for each in together})
        names: list[tuple[str, Callable[..., Any]]] = [
            (f"blocks.{layer}.attn.hook_z", partial(replace, layer=layer)) for layer in layers
        ]
        if looks:
            later = range(start, self.n_layers)
            names += [(f"blocks.{layer}.attn.hook_pattern", partial(look, layer=layer)) for layer in later]
        with self._hooked(names), self._beginning_at(start, base.residuals[start][:, first:].repeat(n, 1, 1)):
            logits = self._forward(
                input_ids=base.tokens[:, first:].repeat(n, 1),
                use_cache=True,
                past_key_values=_prefix(base, first, n),
            )
        answers, foils = (ids.to(self.device).repeat(n)[:, None] for ids in contrast)
        difference = (logits.gather(1, answers) - logits.gather(1, foils)).view(n, prompts)
        return Patched(difference.cpu(), shown)

    @contextmanager
    def _beginning_at(self, layer: int, residual: Float[Tensor, "prompt position d_model"]) -> Iterator[None]:
        """Skip the layers before this one, and give it the residual stream that they would have computed."""
        blocks = [self.bridge.blocks[index].original_component for index in range(layer)]
        for block in blocks:
            block.forward = lambda *_, **__: (residual,) if self._in_tuples else residual
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    # --- the model itself ------------------------------------------------------------------------------------

    def bias(self, tokens: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Return the unembedding's bias for these token ids; 0 if it has none."""
        found = getattr(self.model, "b_U", None)
        if found is None:
            found = getattr(self.model.get_output_embeddings(), "bias", None)
        return found.detach().float().cpu()[tokens] if isinstance(found, Tensor) else torch.zeros(len(tokens))

    def before_softcap(self, logits: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Return logits as they were before the model's softcap, if it has one."""
        config = getattr(self.model, "config", None)  # not its text_config: a model for images does not apply that cap
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.atanh(logits / cap)

    def scores_softcap(self) -> float | None:
        """Return the attention scores' softcap, or None if the model has none."""
        config = getattr(self.model, "config", None)
        cap = None if config is None else getattr(config.get_text_config(), "attn_logit_softcapping", None)
        return None if cap is None else float(cap)

    def _forward(self, **inputs: Any) -> Float[Tensor, "prompt vocabulary"]:
        """Return the logits at the last position."""
        return self.model(logits_to_keep=1, **inputs).logits[:, -1].float()

    def _hooked(self, names: Sequence[tuple[str, Callable[..., Any]]]) -> AbstractContextManager[Any]:
        return self.bridge.hooks(fwd_hooks=list(names))  # type: ignore[no-any-return]


def _joined(runs: Sequence[Run]) -> Run:
    """Join the runs over a batch's parts."""

    def cat(name: str) -> Tensor:
        parts = [getattr(run, name) for run in runs]
        return torch.cat(parts, 0 if name in ("logits", "final") else 1)

    return Run(**{field.name: cat(field.name) for field in fields(Run)})


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _append(value: Tensor, hook: Any, to: list[Tensor]) -> None:
    to.append(value.detach())


def _empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _prefix(base: Base, first: int, n: int) -> Any:
    """Return a cache that holds the keys and values before a position, for n changed runs; it keeps no new ones."""
    from transformers import DynamicCache

    class Prefix(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            before = (part[:, :, :first].repeat(n, 1, 1, 1) for part in base.cached[layer_idx])
            joined = [torch.cat(pair, 2) for pair in zip(before, (key_states, value_states), strict=True)]
            return joined[0], joined[1]

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return first

        def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
            return first + query_length, 0

    return Prefix()
