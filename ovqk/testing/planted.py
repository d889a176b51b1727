"""Small random transformers in memory, and heads planted in them by hand: each role spelled out in weights.

Vectors are rows, as everywhere: from a token with embedding e, a head reads e W_Q, e W_K and e W_V, and it writes
(e W_V) W_O. Nothing here uses the code that judges the heads. Only the matrix that makes a head's role is planted; the
others stay random. A planted matrix keeps the norm of the random one that it replaces, so that scale says nothing, and
`noise` mixes the random one back in:

    role                  W_Q                     W_K                   W_V              W_O
    name mover            .                       .                     .                unembedding of the name read
    negative name mover   .                       .                     .                the same, with a minus
    duplicate token       what W_K reads          .                     .                .
    previous token        the place before        its own place         .                .
    induction             what the previous-      what the previous-    .                unembedding of the token read
                          token head reads        token head writes
    S-inhibition          .                       .                     .                what a name mover's W_Q reads
    agreement reader      .                       .                     the number       .
    agreement output      .                       .                     .                verbs of the number read

Heads write little compared with the embeddings, so every layer sees a token much as it is in W_E.
"""

import copy
import dataclasses
import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from ovqk.analyse import analyse
from ovqk.config.place import CONF
from ovqk.config.resolve import resolve
from ovqk.config.schema import ClaimsConfig, Config, NullsConfig, register
from ovqk.metrics import COMPOSITION_METRICS
from ovqk.records.record import Analysis
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import Norm, QueryKeyNorm
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture, EmbeddingWeights, Head, LayerWeights, OpenedModel

NAME = "planted"
D_MODEL, D_HEAD, N_CTX = 64, 8, 24
WRITES = 0.02  # the size of entries in W_O and in the MLP; the embeddings' entries are about 1
Claimed = Mapping[str, Sequence[Head]]
"""Role -> heads."""


def architecture(
    layers: int = 4, heads: int = 8, kv_heads: int | None = None, positions: Literal["learned", "rotary"] = "learned"
) -> Architecture:
    """Return a small architecture: learned positions with LayerNorm, or rotary positions with RMSNorm."""
    return Architecture(
        family="planted",
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads or heads,
        d_model=D_MODEL,
        d_head=D_HEAD,
        n_ctx=N_CTX,
        norm="layernorm" if positions == "learned" else "rmsnorm",
        norm_eps=1e-5,
        positions=positions,
        activation="gelu",
    )


SHAPES: dict[str, tuple[int | None, Literal["learned", "rotary"], bool]] = {
    "learned positions": (None, "learned", False),
    "learned, grouped queries": (2, "learned", True),
    "rotary positions": (None, "rotary", True),
    "rotary, grouped queries": (2, "rotary", False),
}
"""Name -> how many heads share a KV head (None if none do), positions, whether the embedding is tied."""
NORMALISED = "rotary positions"
"""The shape whose random models normalise queries and keys."""


# --- words ---------------------------------------------------------------------------------------------------

WORDS = {
    "ioi": {"names": 24},
    "sva": dict.fromkeys(("nouns_singular", "nouns_plural", "verbs_singular", "verbs_plural"), 12),
}
"""Task -> word set -> how many of its words are tokens."""
OTHERS = 60  # words that belong to no set
LOOKALIKES = {"ioi": 10, "sva": 5}  # made-up words beside each of the task's: about 300 tokens in all


@cache
def base_config(task: str) -> Config:
    """Return this task's cell, as conf/ has it, without W&B."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", overrides=[f"task={task}", "tracking=none", "analysis.components=0"]))


def word_sets(task: str) -> dict[str, list[str]]:
    """Return the words in the task's variable that are tokens."""
    words = base_config(task).task.words
    return {name: words[name][:count] for name, count in WORDS[task].items()}


@cache
def tokenizer_of(task: str, lookalikes: int) -> Tokenizer:
    """Build a word-level tokenizer: neutral words, then each task word among made-up words that look like it.

    The made-up words have its length and capitalisation, and ids next to its own, so the token nulls draw from them.
    """
    rng = random.Random(0)
    vocabulary = ["<unk>"]

    def made_up(like: str) -> str:
        while True:
            word = "".join(rng.choice("bcdfghklmnprstvz") for _ in like)
            word = word.capitalize() if like[0].isupper() else word
            if word not in vocabulary:
                return word

    vocabulary += [made_up("x" * (2 + index % 9)) for index in range(OTHERS)]
    for words in zip(*word_sets(task).values(), strict=True):
        for word in words:
            vocabulary += [made_up(word) for _ in range(lookalikes // 2)]
            vocabulary += [word, *(made_up(word) for _ in range(lookalikes - lookalikes // 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


# --- a random transformer ------------------------------------------------------------------------------------


class RandomModel:
    """A transformer at random initialisation, in memory (a `WeightSource`)."""

    loaded_by: Literal["families", "bridge"] = "families"
    foldable = True
    no_vocabulary: str | None = None

    def __init__(
        self, facts: Architecture, task: str, seed: int, tied: bool = False, lookalikes: int | None = None
    ) -> None:
        """Draw every weight from the seed.

        Args:
            facts: the architecture.
            task: the task whose words are tokens.
            seed: the seed for all weights.
            tied: whether W_U is the transpose of W_E.
            lookalikes: how many made-up words stand beside each task word; LOOKALIKES if None.
        """
        self.architecture = dataclasses.replace(facts, tied=tied)
        self.task, self.seed, self.notes = task, seed, list[str]()
        self.tokenizer = tokenizer_of(task, LOOKALIKES[task] if lookalikes is None else lookalikes)
        self.generator = torch.Generator().manual_seed(seed)
        self.W_E = self.normal(self.tokenizer.get_vocab_size(), D_MODEL)
        self.W_U = self.W_E.T.clone() if tied else self.normal(D_MODEL, len(self.W_E))
        self.W_pos = self.normal(N_CTX, D_MODEL) if facts.positions == "learned" else None
        self.layers = [self._layer(index) for index in range(facts.n_layers)]
        self.mlp = self._mlp(2 * D_MODEL)
        self.final_norm: Norm | None = None

    def normal(self, *shape: int) -> Tensor:
        """Draw independent standard normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def _layer(self, index: int) -> LayerWeights:
        heads, kv_heads, size = self.architecture.n_heads, self.architecture.n_kv_heads, D_MODEL**-0.5
        frequencies = 10_000.0 ** -(torch.arange(D_HEAD // 2) / (D_HEAD // 2))
        return LayerWeights(
            layer=index,
            W_Q=size * self.normal(heads, D_MODEL, D_HEAD),
            W_K=size * self.normal(kv_heads, D_MODEL, D_HEAD),
            W_V=size * self.normal(kv_heads, D_MODEL, D_HEAD),
            W_O=WRITES * self.normal(heads, D_HEAD, D_MODEL),
            b_Q=torch.zeros(heads, D_HEAD),
            b_K=torch.zeros(kv_heads, D_HEAD),
            b_V=torch.zeros(kv_heads, D_HEAD),
            norm=None,
            rotary=Rotary(frequencies) if self.W_pos is None else None,
        )

    def _mlp(self, width: int) -> MLPWeights:
        W_in, W_out = self.normal(D_MODEL, width) * D_MODEL**-0.5, WRITES * self.normal(width, D_MODEL)
        return MLPWeights(W_in, torch.zeros(width), None, W_out, torch.zeros(D_MODEL), "gelu", norm=None)

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's raw attention weights."""
        return self.layers[index]

    def embeddings(self) -> EmbeddingWeights:
        """Return the raw embeddings."""
        return EmbeddingWeights(self.W_E, self.W_pos, self.W_U, self.final_norm)

    def dress(self, qk_norm: bool) -> None:
        """Give every norm a random gain (and a bias, if it is a LayerNorm), and queries, keys and values random biases.

        Args:
            qk_norm: whether queries and keys are normalised too, with gains.
        """
        self.architecture = dataclasses.replace(self.architecture, qk_norm=qk_norm)
        self.layers = [self._dressed(layer) for layer in self.layers]
        self.mlp = dataclasses.replace(self.mlp, norm=self._norm(), b_in=0.1 * self.normal(len(self.mlp.b_in)))
        self.final_norm = self._norm()

    def _dressed(self, weights: LayerWeights) -> LayerWeights:
        biases: dict[str, Any] = {
            name: 0.3 * self.normal(*getattr(weights, name).shape) for name in ("b_Q", "b_K", "b_V")
        }
        gains = (1 + 0.3 * self.normal(*weights.b_Q.shape), 1 + 0.3 * self.normal(*weights.b_K.shape))
        qk_norm = QueryKeyNorm(*gains, 1e-5) if self.architecture.qk_norm else None
        return dataclasses.replace(weights, norm=self._norm(), qk_norm=qk_norm, **biases)

    def _norm(self) -> Norm:
        bias = 0.3 * self.normal(D_MODEL) if self.architecture.norm == "layernorm" else None
        return Norm(self.architecture.norm, 1 + 0.3 * self.normal(D_MODEL), bias)

    def first_mlp(self) -> MLPWeights | str:
        """Return block 0's MLP."""
        return self.mlp

    def ids(self, *sets: str) -> list[int]:
        """Return the token ids for these word sets in the task."""
        words = word_sets(self.task)
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[word] for name in sets for word in words[name]]


# --- heads planted in it -------------------------------------------------------------------------------------


class PlantedModel(RandomModel):
    """A random transformer in which some heads have a planted role."""

    def __init__(self, facts: Architecture, task: str, seed: int, noise: float = 0.0, tied: bool = False) -> None:
        """Draw the weights; `noise`, in [0, 1], is the random share of a planted matrix's squared norm."""
        super().__init__(facts, task, seed, tied)
        self.noise, self.drawn = noise, copy.deepcopy(self.layers)

    def read(self, name: Literal["W_Q", "W_K", "W_V", "W_O"], head: Head) -> Tensor:
        """Return a head's matrix; W_K and W_V belong to its KV group."""
        layer, index = head
        return getattr(self.layers[layer], name)[self._index(name, index)]

    def plant(self, name: Literal["W_Q", "W_K", "W_V", "W_O"], head: Head, weight: Tensor) -> None:
        """Replace a head's matrix by another, scaled to the random one's norm."""
        layer, index = head
        drawn = getattr(self.drawn[layer], name)[self._index(name, index)]
        weight = weight * drawn.norm() / weight.norm()
        self.read(name, head).copy_((1 - self.noise) ** 0.5 * weight + self.noise**0.5 * drawn)

    def _index(self, name: str, head: int) -> int:
        return int(self.architecture.kv_of_head[head]) if name in ("W_K", "W_V") else head

    def copying(self, head: Head, tokens: Sequence[int], sign: int = 1) -> None:
        """Write each token's value onto the token's own unembedding: W_O = sum_t (e_t W_V)^T u_t.

        This is an outer-product memory: e_t W_OV u_u ~ (e_t W_V) . (e_u W_V), which is largest for u = t.
        """
        features = self.W_E[tokens] @ self.read("W_V", head)
        self.plant("W_O", head, sign * features.T @ self.W_U[:, tokens].T)

    def same_token(self, head: Head) -> None:
        """Let queries read as keys do: e_t W_QK e_u^T = (e_t W_K) . (e_u W_K), which is largest for u = t."""
        self.plant("W_Q", head, self.read("W_K", head))

    def previous_position(self, head: Head) -> None:
        """Let position i attend to i - 1.

        With learned positions the query at i is the key at i - 1. With rotary positions there is a constant query q and
        the key q R(1); their product q R(D) R(1)^T q^T is largest at D = 1.
        """
        layer, index = head
        weights = self.layers[layer]
        if self.W_pos is not None:
            places = self.normal(N_CTX, D_HEAD)
            self.plant("W_K", head, torch.linalg.pinv(self.W_pos) @ places)
            self.plant("W_Q", head, torch.linalg.pinv(self.W_pos) @ places.roll(1, 0))
        elif weights.rotary is not None:
            query = (1 - self.noise) ** 0.5 * self.normal(D_HEAD)
            cos, sin = weights.rotary.angles(torch.tensor([1]))
            weights.b_Q[index] = query
            weights.b_K[self._index("W_K", index)] = weights.rotary.rotate(query[None], cos, sin)[0]

    def induction(self, head: Head, previous: Head) -> None:
        """Attend to the place to which a previous-token head moved the query's token (K-composition), and copy it.

        The previous-token head writes (e_u W_V) W_O. Keys read that through its W_O, and queries read their own token
        through its W_V. So the score is (e_t W_V) . (e_u W_V), which is largest if the token before was t.
        """
        self.plant("W_K", head, self.read("W_O", previous).T)
        self.plant("W_Q", head, self.read("W_V", previous))
        self.copying(head, range(len(self.W_E)))

    def into_queries(self, head: Head, receiver: Head) -> None:
        """Write in the directions that a later head's queries read (Q-composition)."""
        self.plant("W_O", head, self.read("W_Q", receiver).T)

    def reading_number(self, head: Head) -> None:
        """Read only a noun's number: W_V = a^T 1, a = mean plural - mean singular embedding."""
        minus, plus = (self.W_E[self.ids(f"nouns_{number}")].mean(0) for number in ("singular", "plural"))
        self.plant("W_V", head, (plus - minus)[:, None].expand(D_MODEL, D_HEAD))

    def writing_number(self, head: Head) -> None:
        """Write the number that W_V reads from a noun onto the verbs' number: W_O = (a W_V)^T b.

        a = mean plural - mean singular embedding, b = mean plural - mean singular unembedding.
        """
        minus, plus = (self.W_E[self.ids(f"nouns_{number}")].mean(0) for number in ("singular", "plural"))
        less, more = (self.W_U[:, self.ids(f"verbs_{number}")].mean(1) for number in ("singular", "plural"))
        self.plant("W_O", head, torch.outer((plus - minus) @ self.read("W_V", head), more - less))


LAYOUT: dict[str, dict[str, tuple[Head, ...]]] = {
    "ioi": {
        "duplicate_token": ((0, 0), (0, 4), (0, 8)),
        "previous_token": ((1, 1), (1, 5), (1, 9)),
        "induction": ((2, 0), (2, 4), (2, 8)),
        "s_inhibition": ((3, 1), (3, 5), (3, 9)),
        "name_mover": ((4, 0), (4, 4), (4, 8)),
        "negative_name_mover": ((5, 1), (5, 5), (5, 9)),
    },
    "sva": {
        "agreement_reader": ((1, 0), (1, 1), (1, 6), (1, 7), (2, 0), (2, 1), (2, 6), (2, 7)),
        "agreement_output": ((3, 0), (3, 4), (3, 8)),
    },
}
"""Task -> role -> its heads, among the first 12 heads in a layer.

A role's heads have their own KV heads, except agreement readers: every head that shares W_V with one is one too.
"""
MANY, FEW = 24, 12
"""Heads in a layer: enough for `depth` to single out one head, and too few for that."""


def planted(
    shape: str, task: str, seed: int, noise: float = 0.0, per_layer: int = MANY, layers: int | None = None
) -> PlantedModel:
    """Return a model with one of the SHAPES, `per_layer` heads in a layer, and all task roles planted as in LAYOUT.

    Args:
        shape: one of SHAPES.
        task: one of LAYOUT.
        seed: the seed for all weights.
        noise: the random share of a planted matrix's squared norm, in [0, 1].
        per_layer: heads in a layer.
        layers: how many layers; those after the planted ones hold random heads alone. As few as LAYOUT needs if None.
    """
    group, positions, tied = SHAPES[shape]
    heads = LAYOUT[task]
    least = 1 + max(layer for members in heads.values() for layer, _ in members)
    facts = architecture(layers or least, per_layer, per_layer // (group or 1), positions)
    model = PlantedModel(facts, task, seed, noise, tied)
    if task == "sva":
        for head in heads["agreement_reader"]:
            model.reading_number(head)
        for head in heads["agreement_output"]:
            model.writing_number(head)
        return model
    names = model.ids("names")
    for head in heads["duplicate_token"]:
        model.same_token(head)
    for head, follower in zip(heads["previous_token"], heads["induction"], strict=True):
        model.previous_position(head)
        model.induction(follower, head)
    for head, receiver in zip(heads["s_inhibition"], heads["name_mover"], strict=True):
        model.into_queries(head, receiver)
        model.copying(receiver, names)
    for head in heads["negative_name_mover"]:
        model.copying(head, names, sign=-1)
    return model


# --- judged --------------------------------------------------------------------------------------------------


def random_model(shape: str, task: str, seed: int, layers: int = 4, heads: int = 8) -> RandomModel:
    """Return a model with one of the SHAPES at random initialisation, with random gains and biases."""
    group, positions, tied = SHAPES[shape]
    facts = architecture(layers, heads, heads // (group or 1), positions)
    model = RandomModel(facts, task, seed, tied)
    model.dress(qk_norm=shape == NORMALISED)
    return model


def random_claims(model: RandomModel, each: int = 2) -> Claimed:
    """Draw heads at random for every role in LAYOUT, no head twice."""
    facts = model.architecture
    heads = [(layer, head) for layer in range(facts.n_layers) for head in range(facts.n_heads)]
    drawn = iter(random.Random(model.seed).sample(heads, len(heads)))
    return {role: [next(drawn) for _ in range(each)] for role in LAYOUT[model.task]}


def judged(model: RandomModel, claimed: Claimed, draws: int = 99) -> Analysis:
    """Analyse the model with these heads claimed, and with few resamples, which only intervals need."""
    config = copy.deepcopy(base_config(model.task))
    roles = {role: [f"{layer}.{head}" for layer, head in heads] for role, heads in claimed.items()}
    config.task.claims = {NAME: ClaimsConfig("planted by hand", "measured", roles)}
    config.model.name = config.model.claims = NAME
    config.nulls = NullsConfig(draws, resamples=2, subsamples=2)
    config.seed = model.seed
    return analyse(OpenedModel(model, NAME, model.tokenizer), config)


def p_values(tests: pd.DataFrame) -> pd.DataFrame:
    """Return p-values for every prediction under every null, for the role and for its first head with a value.

    If a head's layer cannot be standardised, it has no `depth` row and cannot be called significant, so p = 1.

    Returns:
        Columns null, level (`role` or `head`), role, metric, primary, p, p_opposite.
    """
    keys = ["role", "metric"]
    whole, heads = tests[tests["head"].isna()], tests[tests["head"].notna()]
    firsts = heads.drop_duplicates(keys)[[*keys, "layer", "head"]]
    heads = heads.merge(firsts)
    bare = heads[~heads["metric"].isin(COMPOSITION_METRICS)].drop_duplicates(keys)
    bare = bare.assign(null="depth", p=1.0, p_opposite=1.0)
    heads = pd.concat([heads, bare]).drop_duplicates([*keys, "null"])
    found = pd.concat([whole.assign(level="role"), heads.assign(level="head")], ignore_index=True)
    return found[["null", "level", *keys, "primary", "p", "p_opposite"]]
