"""A task's cycle: residues modulo p as tokens of a model, with the operator and the tokens around them.

An input is "a b", with a token between the two ("+") and one after them ("=") if the task has such tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ovqk.config.schema import CycleConfig, TaskConfig
from ovqk.errors import UserError
from ovqk.structure.model import Model
from ovqk.tasks.lookup import WordLookup

LEAST_RESIDUES = 5


@dataclass(frozen=True)
class Cycle:
    """A task's cycle as tokens of one model.

    Attributes:
        ids: the token id of each residue.
        query: the id of the token after b at which the answer is read, for instance "="; None if it is read at b.
        operator: `+` if the answer to a, b is (a + b) mod p, `-` if it is (a - b) mod p.
        between: the id of the token between a and b, for instance "+"; None if there is none.
    """

    ids: Int[Tensor, " residue"]
    query: int | None = None
    operator: str = "+"
    between: int | None = None

    @property
    def p(self) -> int:
        """The modulus: the number of residues, at least 5."""
        return len(self.ids)

    @property
    def places(self) -> tuple[int, int]:
        """The positions of a and b in an input."""
        return 0, 1 if self.between is None else 2

    @property
    def length(self) -> int:
        """The number of tokens in an input; the answer is read at the last."""
        return self.places[1] + (1 if self.query is None else 2)

    def inputs(self, pairs: Int[Tensor, "input two"]) -> Int[Tensor, "input position"]:
        """Return the token ids of inputs, for pairs of residues."""
        a, b = self.ids[pairs].T
        whole = [a, *self._column(self.between, a), b, *self._column(self.query, a)]
        return torch.stack(whole, 1)

    def answers(self) -> tuple[Int[Tensor, "a b"], Int[Tensor, "a b"]]:
        """Return the right answers to all pairs of residues, and those that the other operator would have."""
        a = torch.arange(self.p)
        found = (a[:, None] + a) % self.p, (a[:, None] - a) % self.p
        return found if self.operator == "+" else found[::-1]

    @staticmethod
    def _column(token: int | None, like: Tensor) -> list[Tensor]:
        return [] if token is None else [torch.full_like(like, token)]


def read_cycle(model: Model) -> Cycle | str:
    """Return the task's cycle as tokens of the model, or a sentence that says why the model has none.

    Raises:
        UserError: a key of `task.cycle` is wrong, or the model's vocabulary is too small for the cycle.
    """
    task = model.config.task
    config = task.cycle
    assert config is not None
    key, vocabulary = f"task {task.name}: cycle", model.vocabulary
    if vocabulary is None:
        return "the checkpoint holds no embedding"
    if config.modulus < LEAST_RESIDUES:
        raise UserError(f"{key}.modulus={config.modulus}: allowed: {LEAST_RESIDUES} and more.")
    ids = _of_words(model, task, config) if config.words else range(config.first, config.first + config.modulus)
    ends = (ids[0], ids[-1]) if isinstance(ids, range) else ids  # a range may be far too long for a list
    extra = {key: getattr(config, key) for key in ("between", "query") if getattr(config, key) is not None}
    wanted = [*ends, *extra.values()]
    if min(wanted) < 0 or max(wanted) >= vocabulary.size:
        raise UserError(
            f"{key}: names the tokens {min(wanted)} to {max(wanted)}, and {model.label} has {vocabulary.size}; set "
            "task.cycle.modulus, task.cycle.first and task.cycle.query to those of the model."
        )
    known = set(ids)
    for name, token in extra.items():
        if token in known:
            raise UserError(
                f"{key}.{name}={token}: that token is a residue; allowed: a token of its own, or null if there is none."
            )
    cycle = Cycle(torch.tensor(list(ids)), config.query, config.operator, config.between)
    n_ctx = model.architecture.n_ctx
    if n_ctx is not None and n_ctx < cycle.length:
        raise UserError(
            f"{key}: an input has {cycle.length} tokens, and {model.label} has {n_ctx} positions; set "
            "task.cycle.between and task.cycle.query to null if there is no such token."
        )
    return cycle


def _of_words(model: Model, task: TaskConfig, config: CycleConfig) -> list[int]:
    words = task.words.get(str(config.words))
    key = f"task {task.name}: cycle.words={config.words}"
    if words is None or len(words) != config.modulus:
        found = "no such word set" if words is None else f"{len(words)} words"
        raise UserError(f"{key}: {found}; allowed: a set of task.words with as many as cycle.modulus={config.modulus}.")
    if model.tokenizer is None or model.vocabulary is None:
        raise UserError(f"{key}: {model.label} has no tokenizer to find them by.")
    lookup = WordLookup(model.tokenizer, model.vocabulary.size)
    ids = {word: lookup.token(word) for word in words}
    missing = [word for word, token in ids.items() if token is None]
    if missing or len(set(ids.values())) < len(words):
        raise UserError(f"{key}: not one token each in {model.label}: {', '.join(missing[:6]) or 'two are the same'}.")
    return [token for token in ids.values() if token is not None]
