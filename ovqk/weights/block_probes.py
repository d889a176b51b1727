"""A Hugging Face model's own activations on a few tokens, and those that each block has alone.

Each block is called by itself on a random residual stream: once with everything but attention silenced, which gives
attention's addition to the stream and that addition's inputs, and once with attention silenced. Random rows with
unit variance keep the differences exact, which the large components in a trained model's stream would not.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ovqk.errors import first_line
from ovqk.weights.seen_rotations import CosineTable, cosine_tables


class CannotRunError(Exception):
    """The model raises if it is run on a few tokens; the message is its own."""


@dataclass
class BlockActivations:
    """One block's activations on the rows `stream`.

    Attributes:
        stream: the rows that the block was given.
        attention_write: attention's addition to them, with everything behind its output projection; None if the block
            could not be silenced.
        other_write: the rest of the block's addition if attention is silenced.
        both_write: the whole block's addition.
        queries, keys, values: the inputs of attention's own product, rotated and normalised; None if the model
            does not hand them to an attention function.
        pattern: that function's own weights.
        scaling: its factor on the scores.
        window: how many tokens back it looks, the query's included; None for all.
        capped: the scores are capped before the softmax.
        logits: the softmax's input, after caps, masks and biases.
        inputs: the input that each module in the block gets, by the module's identity.
        tables: the cosines that the block's modules are given or give.
    """

    stream: Float[Tensor, "position d_model"]
    attention_write: Float[Tensor, "position d_model"] | None = None
    other_write: Float[Tensor, "position d_model"] | None = None
    both_write: Float[Tensor, "position d_model"] | None = None
    queries: Float[Tensor, "head position d_head"] | None = None
    keys: Float[Tensor, "kv_head position d_head"] | None = None
    values: Float[Tensor, "kv_head position d_head"] | None = None
    pattern: Float[Tensor, "head position position"] | None = None
    scaling: float | None = None
    window: int | None = None
    capped: bool = False
    logits: Float[Tensor, "head position position"] | None = None
    attention: nn.Module | None = None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    tables: list[CosineTable] = field(default_factory=list)


@dataclass
class ModelActivations:
    """The whole model's activations on `tokens`, and each block's alone.

    Attributes:
        first_stream: the first block's input; None if its blocks were not found.
        inputs, outputs: each module's, by its identity.
        blocks: one entry for each block, in order.
        logits: the model's output, with every multiplier and cap; None if it gives no logits.
    """

    tokens: Int[Tensor, " position"]
    first_stream: Float[Tensor, "position d_model"] | None
    last_stream: Float[Tensor, "position d_model"] | None
    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    modules: list[nn.Module]
    blocks: list[BlockActivations]
    logits: Float[Tensor, "position token"] | None = None


def find_blocks(model: nn.Module, n_layers: int) -> list[nn.Module]:
    """Return the model's decoder blocks: a list of `n_layers` modules that hold attention; empty if there is none."""
    found = [
        (any(part in name for part in ("vision", "visual", "audio")), list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _holds_attention(module[0])
    ]
    return min(found, key=lambda each: each[0])[1] if found else []


def _holds_attention(module: nn.Module) -> bool:
    return any("att" in name.lower() for name, _ in module.named_children())


@torch.no_grad()
def record_activations(
    model: nn.Module, tokens: Int[Tensor, " position"], n_layers: int, seed: int = 0
) -> ModelActivations:
    """Run the model on the tokens, and each block on random rows.

    Raises:
        CannotRunError: the model cannot be run on these tokens.
    """
    modules = find_blocks(model, n_layers)
    recorder = Recorder(len(tokens))
    with recorder.watch(model, modules):
        logits = getattr(_call(model, input_ids=tokens[None], use_cache=False), "logits", None)
    calls = recorder.calls
    first = last = None
    if modules and len(calls) == len(modules):
        first, last = recorder.inputs.get(id(modules[0])), recorder.outputs.get(id(modules[-1]))
    there = torch.is_tensor(logits) and logits.dim() == 3
    found = ModelActivations(tokens, first, last, recorder.inputs, recorder.outputs, modules, [])
    found.logits = logits[0] if logits is not None and there else None
    generator = torch.Generator().manual_seed(seed)
    for index, module in enumerate(modules):
        call = calls.get(index)
        if call is None or call.stream.dim() != 3:
            found.blocks.append(BlockActivations(torch.empty(0, 0)))
            continue
        stream = torch.randn(call.stream.shape, generator=generator, dtype=call.stream.dtype)
        found.blocks.append(_record_block(module, call, stream))
    return found


def _call(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as error:  # of any model's own code
        raise CannotRunError(f"{type(error).__name__}: {first_line(error)}") from error


@dataclass(frozen=True)
class _Call:
    """How the model called a block: its stream, and everything else."""

    stream: Tensor
    run: Callable[[nn.Module, Tensor, dict[str, Tensor]], Any]


def _record_block(module: nn.Module, call: _Call, stream: Tensor) -> BlockActivations:
    """Call a block on a stream: as it is, with attention alone, and without attention."""
    recorder = Recorder(stream.shape[1])
    with recorder.watch(module, [module]):
        whole = first_tensor(_call(call.run, module, stream, {}))
    block = recorder.block
    block.stream, block.inputs = stream[0], recorder.inputs
    attention = recorder.attention_child
    if whole is None or whole.shape != stream.shape:
        return block
    block.both_write, block.attention = whole[0] - stream[0], attention
    if attention is None:
        return block
    inside = {id(each) for each in attention.modules()}
    others, own = {}, {}
    for name, child in module.named_modules():
        norm = "norm" in type(child).__name__.lower()
        for key, parameter in child.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            if id(child) in inside:
                own[full] = _zeros(parameter)
            elif name and not norm:
                others[full] = _zeros(parameter)
    silenced = []
    for zeros in (others, own):
        try:
            written = first_tensor(_call(call.run, module, stream, zeros))
        except CannotRunError:
            written = None
        silenced.append(None if written is None else written[0] - stream[0])
    block.attention_write, block.other_write = silenced
    return block


def _zeros(parameter: Tensor) -> Tensor:
    """Return zeros like a parameter: a matrix shares one zero in memory, but experts' tensors cannot."""
    if parameter.dim() > 2:
        return torch.zeros_like(parameter)
    return torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)


class Recorder:
    """Hooks on a model: its modules' inputs and outputs, calls to its blocks, and attention's inputs."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.calls: dict[int, _Call] = {}
        self.block = BlockActivations(torch.empty(0, 0))
        self.attention_child: nn.Module | None = None
        self._stack: list[nn.Module] = []
        self._blocks: list[nn.Module] = []

    @contextlib.contextmanager
    def watch(self, model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
        """Record everything that runs inside."""
        self._blocks = blocks
        self._numbers = {id(block): number for number, block in enumerate(blocks)}
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        with contextlib.ExitStack() as stack:
            stack.enter_context(Softmaxes(self._softmax))
            for name in {type(module).__module__ for module in model.modules()}:
                own = getattr(sys.modules.get(name), "eager_attention_forward", None)
                if own is not None:
                    stack.enter_context(
                        mock.patch.object(sys.modules[name], "eager_attention_forward", self._attention(own))
                    )
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(module)
        self.block.tables += cosine_tables((args, kwargs), self.length)
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        self._keep(self.inputs, module, given)
        number = self._numbers.get(id(module))
        if number is None or number in self.calls:
            return
        key = None if args else next((key for key, value in kwargs.items() if torch.is_tensor(value)), None)
        key = "hidden_states" if "hidden_states" in kwargs and not args else key
        stream = args[0] if args else kwargs.get(key or "")
        if torch.is_tensor(stream):
            rest, named = args[1:], dict(kwargs)

            def run(block: nn.Module, stream: Tensor, parameters: dict[str, Tensor]) -> Any:
                keys = named if key is None else named | {key: stream.clone()}
                positional = (stream.clone(), *rest) if key is None else ()
                return functional_call(block, parameters, positional, keys)

            self.calls[number] = _Call(stream.clone(), run)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        self._keep(self.outputs, module, first_tensor(output))
        self.block.tables += cosine_tables(output, self.length)

    def _keep(self, where: dict[int, Tensor], module: nn.Module, value: Any) -> None:
        if torch.is_tensor(value) and value.is_floating_point() and value.shape[:2] == (1, self.length):
            where[id(module)] = value[0].clone()

    def _note_attention(self) -> None:
        """Find the block's child inside which attention runs."""
        if len(self._blocks) == 1 and self._blocks[0] in self._stack:
            place = self._stack.index(self._blocks[0])
            if place + 1 < len(self._stack):
                self.attention_child = self._stack[place + 1]

    def _softmax(self, logits: Tensor) -> None:
        logits = logits[None] if logits.dim() == 3 else logits  # the first axis may be heads instead of the batch
        shape = logits.shape
        if len(shape) == 4 and shape[0] == 1 and shape[2] == self.length and shape[3] in (self.length, self.length + 1):
            self.block.logits = logits[0, :, :, : self.length].clone()
            self._note_attention()

    def _attention(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = own(module, query, key, value, *args, **kwargs)
            scaling = args[1] if len(args) > 1 else kwargs.get("scaling")
            block = self.block
            block.queries, block.keys, block.values = query[0].clone(), key[0].clone(), value[0].clone()
            block.scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            block.pattern = found[1][0].clone() if torch.is_tensor(found[1]) else None
            block.capped = bool(kwargs.get("softcap"))
            window = kwargs.get("sliding_window")
            block.window = window if isinstance(window, int) and window > 0 else None
            self._note_attention()
            return found

        return attend


class Softmaxes(TorchDispatchMode):
    """Reports every softmax's input."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax):
            self.tell(args[0])
        return func(*args, **(kwargs or {}))


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor among a module's outputs."""
    if torch.is_tensor(output):
        return output
    if isinstance(output, tuple | list):
        return next((each for each in output if torch.is_tensor(each)), None)
    return None
