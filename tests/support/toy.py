"""A toy task on local checkpoints, analysed in this process, and how exact its numbers must be."""

from tokenizers import Tokenizer, models, pre_tokenizers

from ovqk.analyse import analyse
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import Config, TaskConfig, VariableConfig, VariableKind
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel
from support.commands import compose
from support.models import local

RATIO = 1e-4  # absolute, where the range is bounded
SCALE = 1e-4  # relative, elsewhere


def toy_tokenizer(size: int = 40) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)} | {"<unk>": size}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def toy_task(kind: str) -> TaskConfig:
    if kind == "set":
        variable = VariableConfig(VariableKind.set, words="a")
    else:
        variable = VariableConfig(VariableKind.contrast, read=["a", "b"], write=["b", "a"])
    sets = {"a": [f"w{i}" for i in range(10, 19)], "b": [f"w{i}" for i in range(20, 29)]}
    return TaskConfig(name="toy", title="toy", words=sets, variables={"v": variable})


def config(path, task: str | TaskConfig, *overrides: str) -> Config:
    cell = compose(f"task={task if isinstance(task, str) else 'none'}", "model=local", f"model.path={path}", *overrides)
    if isinstance(task, TaskConfig):
        cell.task = task
    return cell


def run(path, task, *overrides, tokenizer=None):
    cell = config(path, task, *overrides)
    checkpoint = open_checkpoint(local(path))
    source = open_weights(checkpoint, local(path))
    tokenizer = tokenizer or load_tokenizer(checkpoint)
    rows = source.embeddings().W_E
    n_tokens = None if tokenizer is None or rows is None else min(tokenizer.get_vocab_size(), rows.shape[0])
    return source, cell, tokenizer, n_tokens, analyse(OpenedModel(source, "test", tokenizer), cell)
