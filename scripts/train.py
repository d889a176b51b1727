"""Train a bundled model from a seed and write it as an ordinary Hugging Face directory.

    python scripts/train.py --model mini-attn --seed 0 --out ovqk/bundled/mini-attn

mini-attn is a GPT-2 whose MLPs write nothing: their weights are zero and stay zero, so that only attention
can move information between positions and a task's circuit is made of heads alone.

The directory holds config.json, model.safetensors (float32), tokenizer.json, tokenizer_config.json and
token_counts.json, the number of times each token of the vocabulary was trained on. Token ids follow that
count: special tokens and punctuation first, then from the most to the least frequent word.
"""

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

from ovqk.testing.language import END_OF_TEXT, TASKS, UNKNOWN, Window, windows

SPECIAL = [UNKNOWN, END_OF_TEXT, ".", ","]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long. `config` goes to the model's Hugging Face configuration."""

    config: dict[str, Any]
    kind: str = "gpt2"
    steps: int = 2000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.4  # of the steps, at the end
    weight_decay: float = 0.01
    mlp: bool = True


RECIPES = {
    "mini-attn": Recipe(
        config={"n_layer": 4, "n_head": 8, "n_embd": 128, "n_positions": 48, "tie_word_embeddings": False},
        mlp=False,
    ),
    "mini-gpt2": Recipe(
        config={
            "n_layer": 4, "n_head": 8, "n_embd": 128, "n_inner": 512, "n_positions": 48, "tie_word_embeddings": False
        },
    ),
    "mini-llama": Recipe(
        kind="llama",
        config={
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128,
            "head_dim": 32, "intermediate_size": 176, "max_position_embeddings": 48, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


class Silent(torch.nn.Module):
    """Stands in for an MLP that writes nothing: in training its zeros need not be computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def training_windows(seed: int, count: int, length: int) -> list[Window]:
    """Every window of the training run, in order."""
    stream = windows(random.Random(f"training {seed}"), length)
    return [next(stream) for _ in range(count)]


def vocabulary(counts: Counter[str]) -> dict[str, int]:
    """Token ids: SPECIAL, then words from the most frequent on (ties alphabetically)."""
    words = sorted((word for word in counts if word not in SPECIAL), key=lambda word: (-counts[word], word))
    return {word: index for index, word in enumerate([*SPECIAL, *words])}


def write_tokenizer(ids: dict[str, int], positions: int, out: Path) -> None:
    """A word-level tokenizer that splits text at white space and punctuation."""
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([UNKNOWN, END_OF_TEXT])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "unk_token": UNKNOWN,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def silence_mlps(model: GPT2LMHeadModel) -> list[torch.nn.Module]:
    """Take the MLPs out of the forward pass, and return them with every weight zero."""
    mlps: list[torch.nn.Module] = []
    for block in model.transformer.h:
        mlp = block.get_submodule("mlp")
        for parameter in mlp.parameters():
            torch.nn.init.zeros_(parameter)
        mlps.append(mlp)
        block.mlp = Silent()
    return mlps


def train(model: PreTrainedModel, data: torch.Tensor, tasks: torch.Tensor, recipe: Recipe) -> float:
    """One pass over data [step, batch, position]: AdamW, warm-up, constant rate, then down to zero.

    The loss is the mean over all words plus, for each task, the mean over the words which that task gives:
    most words of the language are random, and those of a task too few to be learned soon from the first
    mean alone. Returns the loss over the last 100 steps.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

    def schedule(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return min(1.0, (len(data) - step) / (recipe.decay * len(data)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start, names, history = time.time(), ["all", *TASKS], []
    for step, (batch, given) in enumerate(zip(data, tasks, strict=True)):
        logits = model(batch[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        given = given[:, 1:].flatten()
        losses = torch.stack([each.mean(), *(each[given == task].mean() for task in range(len(TASKS)))])
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        history.append(losses.detach())
        if (step + 1) % 100 == 0:
            recent = torch.stack(history[-100:]).mean(0).tolist()
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in zip(names, recent, strict=True))
            print(f"step {step + 1:5d}  {shown}  {time.time() - start:5.0f} s", flush=True)
    return torch.stack(history[-100:]).mean(0)[0].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RECIPES), default="mini-attn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    steps = arguments.steps or recipe.steps
    positions = recipe.config.get("n_positions") or recipe.config["max_position_embeddings"]
    arguments.out.mkdir(parents=True, exist_ok=True)

    texts = training_windows(arguments.seed, steps * recipe.batch, positions)
    counts = Counter(word for text in texts for word in text.tokens)
    ids = vocabulary(counts)
    write_tokenizer(ids, positions, arguments.out)
    write_json(arguments.out / "token_counts.json", {word: counts[word] for word in ids})
    shape = (steps, recipe.batch, positions)
    data = torch.tensor([[ids[word] for word in text.tokens] for text in texts]).view(shape)
    tasks = torch.tensor([text.tasks for text in texts], dtype=torch.int8).view(shape)

    torch.manual_seed(arguments.seed)
    special = {"bos_token_id": ids[END_OF_TEXT], "eos_token_id": ids[END_OF_TEXT]}
    settings: dict[str, Any] = {"vocab_size": len(ids), **recipe.config, **special}
    settings |= NO_DROPOUT if recipe.kind == "gpt2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.kind, **settings))
    mlps = [] if recipe.mlp else silence_mlps(model)
    print(f"{arguments.model}, seed {arguments.seed}: {steps} steps, {len(ids)} words, {data.numel():,} tokens")
    loss = train(model, data, tasks, recipe)
    print(f"mean loss of all words, last 100 steps: {loss:.4f}")
    if not recipe.mlp:
        for block, mlp in zip(model.transformer.h, mlps, strict=True):
            block.mlp = mlp
    model.save_pretrained(arguments.out)
    (arguments.out / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
