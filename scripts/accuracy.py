"""Held-out accuracy of a bundled model on each task of the language.

    python scripts/accuracy.py ovqk/bundled/mini-attn

Every example puts a sentence on a held-out triple of words behind ordinary text of a random length (see
`ovqk.testing.language`). Half of the texts start with <eos>, the language's start token, as half of the training
windows do. An example is right if

    ioi         the most likely of all words is the indirect object
    sva         the most likely of all verb forms has the subject's number
    induction   the most likely of all words is the one that followed in the first copy

Beside it stands how often the answer is above its foil: the other name, the same verb's other form, another
word of the sequence.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from ovqk.testing.language import TASKS, held_out_examples
from ovqk.testing.language_words import AGREEMENT


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] of `count` examples: the task's own measure, and answer above foil."""

    task: str
    count: int
    right: float
    above_foil: float


@torch.inference_mode()
def measure(model: PreTrainedModel, tokenizer: Tokenizer, task: str, count: int, seed: int) -> Accuracy:
    """Accuracy on `count` held-out examples of one task, drawn from `seed`."""
    examples = list(held_out_examples(task, count, seed, model.config.max_position_embeddings))
    contexts = [torch.tensor([tokenizer.token_to_id(word) for word in context]) for context, _, _ in examples]
    answers = torch.tensor([tokenizer.token_to_id(answer) for _, answer, _ in examples])
    foils = torch.tensor([tokenizer.token_to_id(foil) for _, _, foil in examples])

    padded = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)  # after the context: never attended to
    last = torch.tensor([len(context) - 1 for context in contexts])
    everywhere = torch.cat([model(batch).logits for batch in padded.split(250)])
    logits = everywhere[torch.arange(count), last]

    right = _number_is_right(logits, tokenizer, answers) if task == "sva" else logits.argmax(-1) == answers
    above = logits.gather(1, answers[:, None]) > logits.gather(1, foils[:, None])
    return Accuracy(task, count, right.float().mean().item(), above.float().mean().item())


def _number_is_right(logits: torch.Tensor, tokenizer: Tokenizer, answers: torch.Tensor) -> torch.Tensor:
    """Whether the best verb form of all has the answer's number."""
    singular, plural = (
        torch.tensor([tokenizer.token_to_id(word) for word in AGREEMENT[f"verbs_{number}"]])
        for number in ("singular", "plural")
    )
    says_plural = logits[:, plural].amax(-1) > logits[:, singular].amax(-1)
    return says_plural == torch.isin(answers, plural)


def load(directory: Path) -> tuple[PreTrainedModel, Tokenizer]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="examples a task")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.directory)
    print(f"{'task':<10} {'examples':>8} {'right':>7} {'above foil':>10}")
    for task in TASKS:
        result = measure(model, tokenizer, task, arguments.count, arguments.seed)
        print(f"{task:<10} {result.count:>8} {result.right:>7.2%} {result.above_foil:>10.2%}")


if __name__ == "__main__":
    main()
