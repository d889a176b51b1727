"""Attention-only models that run, with a previous-token head and an induction head built by hand, others random.

The stream has three parts: the token's one-hot row, the position's, and a copy of the token before, which the
previous-token head writes and the induction head looks up.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ovqk.activations.batches import Prompts, read_prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.judge import Judged, judge_activations
from ovqk.activations.links import WriteLinks
from ovqk.activations.measure import check_activations, measure
from ovqk.activations.roles import Measured
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import Config
from ovqk.structure.model import Layer, Model
from ovqk.weights.readers import open_weights
from ovqk.weights.types import Head, OpenedModel
from support.commands import compose
from support.models import local

POSITIONS, HEADS, LAYERS = 24, 4, 2
SHARP, NOISE = 40.0, 0.1


@dataclass
class Ran:
    """A model with everything that was measured of it."""

    prompts: Prompts
    measured: Measured
    judged: Judged


def cell(seed: int, *overrides: str) -> Config:
    config = compose("task=induction", "analysis=full", f"seed={seed}", *overrides)
    config.task.words["content"] = config.task.words["content"][:40]
    return config


def tokenizer(words: list[str]) -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def write_model(file: Path, n_tokens: int, seed: int, planted: tuple[Head, Head] | None) -> None:
    """Save a model; `planted` are its previous-token head (in layer 0) and its induction head (in layer 1)."""
    generator = torch.Generator().manual_seed(seed)
    d_model = 2 * n_tokens + POSITIONS
    token, position, before = (
        slice(0, n_tokens), slice(n_tokens, n_tokens + POSITIONS), slice(n_tokens + POSITIONS, d_model)
    )  # fmt: skip
    tensors = {}
    for layer in range(LAYERS):
        for part in "QKVO":
            shape = (HEADS, n_tokens, d_model) if part == "O" else (HEADS, d_model, n_tokens)
            weight = NOISE * torch.randn(shape, generator=generator) / n_tokens**0.5
            tensors[f"blocks.{layer}.attn.W_{part}"] = weight
    tensors["embed.W_E"] = torch.eye(n_tokens, d_model)
    tensors["pos_embed.W_pos"] = torch.eye(POSITIONS, d_model).roll(n_tokens, 1)
    tensors["unembed.W_U"] = torch.eye(n_tokens, d_model).T.contiguous()
    if planted is not None:
        (_, previous), (_, induction) = planted
        for layer, head in planted:
            for part in "QKVO":
                tensors[f"blocks.{layer}.attn.W_{part}"][head] = 0
        shift = torch.eye(POSITIONS).roll(-1, 1)  # position i asks for i - 1
        shift[0] = 0
        tensors["blocks.0.attn.W_Q"][previous, position, :POSITIONS] = SHARP * shift
        tensors["blocks.0.attn.W_K"][previous, position, :POSITIONS] = torch.eye(POSITIONS)
        tensors["blocks.0.attn.W_V"][previous, token] = torch.eye(n_tokens)
        tensors["blocks.0.attn.W_O"][previous, :, before] = torch.eye(n_tokens)
        tensors["blocks.1.attn.W_Q"][induction, token] = SHARP * torch.eye(n_tokens)
        tensors["blocks.1.attn.W_K"][induction, before] = torch.eye(n_tokens)
        tensors["blocks.1.attn.W_V"][induction, token] = torch.eye(n_tokens)
        tensors["blocks.1.attn.W_O"][induction, :, token] = 4 * torch.eye(n_tokens)
    save_file(tensors, file)


def run_model(file: Path, config: Config) -> Ran:
    """Measure and judge a model that `write_model` saved, or one of transformers' in a directory."""
    words = config.task.words["content"]
    checkpoint = open_checkpoint(local(file))
    config.model = local(file) if file.is_dir() else local(file, causal=True)
    opened = OpenedModel(open_weights(checkpoint, config.model), "planted", tokenizer(words))
    model = Model.read(opened, config)
    asked = config.activations
    prompts = read_prompts(config.task, opened.tokenizer, [], asked.prompts, config.seed, asked.batch)
    running = RunningModel.load(checkpoint, config.model, torch.device("cpu"))
    roles = check_activations(config.task)
    measured = measure(
        running, model, prompts, roles, {}, asked.screened, config.seed, lambda count, what: range(count)
    )
    links = WriteLinks(model, prompts, measured.observed, roles)
    for index in range(model.architecture.n_layers):
        links.visit(Layer(model, index))
    return Ran(prompts, measured, judge_activations(measured, {}, links))
