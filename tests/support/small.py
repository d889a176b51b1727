"""A small random model in memory, a task of its tokens with every kind of claim, and its metrics by force."""

import numpy as np
import torch
from tokenizers import Tokenizer

from ovqk.analyse import analyse
from ovqk.config.schema import ClaimsConfig, Config, Direction, PredictionConfig, RoleConfig, TaskConfig, VariableConfig
from ovqk.config.schema import VariableKind as Kind
from ovqk.records.record import Analysis
from ovqk.tasks.words import resolve_task
from ovqk.weights.folding import fold_embeddings, fold_layer
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.norms import QueryKeyNorm, normalise
from ovqk.weights.rotary import Rotary
from ovqk.weights.types import Architecture, EmbeddingWeights, LayerWeights, OpenedModel
from support.commands import compose
from support.oracle import auc, block0_rows, centre_tokens, matrices, projector, ratio
from support.toy import toy_tokenizer

V, D_MODEL, D_HEAD, N_HEADS, N_LAYERS = 120, 24, 4, 12, 4
DRAWS = 59


class Random:
    """Random weights in memory."""

    loaded_by, foldable, no_vocabulary = "families", True, None

    def __init__(self, kind: str = "gpt", unembedding: bool = True, embedding: bool = True) -> None:
        rotary = kind != "gpt"
        self.notes: list[str] = []
        self.rotary, self.embedding, self.unembedding = rotary, embedding, unembedding
        self.architecture = Architecture(
            family="test",
            n_layers=N_LAYERS,
            n_heads=N_HEADS,
            n_kv_heads=N_HEADS // 2 if rotary else N_HEADS,
            d_model=D_MODEL,
            d_head=D_HEAD,
            n_ctx=16,
            norm="rmsnorm" if rotary else "layernorm",
            norm_eps=1e-5,
            positions="rotary" if rotary else "learned",
            qk_norm=kind == "qk-norm",
            activation="gelu",
        )

    def randn(self, seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def layer(self, index: int) -> LayerWeights:
        facts = self.architecture
        q, kv = facts.n_heads, facts.n_kv_heads

        def one(part: int, heads: int) -> torch.Tensor:
            return self.randn(100 * index + part, heads, D_MODEL, D_HEAD)

        W_O = 0.1 * self.randn(100 * index + 4, q, D_HEAD, D_MODEL)
        zeros = torch.zeros(q, D_HEAD), torch.zeros(kv, D_HEAD), torch.zeros(kv, D_HEAD)
        gains = torch.ones(q, D_HEAD), torch.ones(kv, D_HEAD)
        return LayerWeights(
            index, one(1, q), one(2, kv), one(3, kv), W_O, *zeros, norm=None,
            qk_norm=QueryKeyNorm(*gains, 1e-5) if facts.qk_norm else None,
            rotary=Rotary(torch.tensor([1.0, 0.1])) if self.rotary else None,
        )  # fmt: skip

    def embeddings(self) -> EmbeddingWeights:
        if not self.embedding:
            return EmbeddingWeights(None, None, None, None)
        W_U = self.randn(9001, D_MODEL, V) if self.unembedding else None
        W_pos = None if self.rotary else self.randn(9002, 16, D_MODEL)
        return EmbeddingWeights(self.randn(9000, V, D_MODEL), W_pos, W_U, None)

    def first_mlp(self) -> MLPWeights:
        bias_in, bias_out = torch.zeros(32), torch.zeros(D_MODEL)
        W_in, W_out = self.randn(9003, D_MODEL, 32) / 5, self.randn(9004, 32, D_MODEL) / 5
        return MLPWeights(W_in, bias_in, None, W_out, bias_out, "gelu", None)


def tokenizer() -> Tokenizer:
    return toy_tokenizer(V)


def high(metric: str, **keys) -> PredictionConfig:
    return PredictionConfig(metric, **keys)


def low(metric: str) -> PredictionConfig:
    return PredictionConfig(metric, Direction.low)


SET_ROLES = {
    "mover": [high("ov_task_auc"), high("ov_task_copy"), high("qk_key_alignment", exploratory=True)],
    "negative": [low("ov_task_auc"), high("ov_task_suppress"), high("qk_task_auc_unembed", exploratory=True)],
    "duplicate": [high("qk_task_auc"), high("qk_matching_block0", first_layer="qk_matching")],
    "writer": [high("ov_task_alignment"), low("ov_top_alignment")],
    "induction": [
        high("ov_copying"),
        high("k_composed_matching", partners=["previous"]),
        high("ov_copying_block0", first_layer="ov_copying", exploratory=True),
    ],
    "previous": [high("k_composition", partners=["induction"]), high("qk_prev_auc", direct_only=True)],
    "bystander": [],
}
SET_CLAIMS = {
    "mover": ["1.0", "1.1", "2.0"],
    "negative": ["2.4", "2.5", "3.1"],
    "duplicate": ["0.1", "0.2", "3.0"],
    "writer": ["1.4", "2.1", "3.3"],
    "induction": ["3.6", "3.7"],
    "previous": ["0.6", "0.7"],
    "bystander": ["2.1"],
}
CONTRAST_ROLES = {"output": [high("ov_task_transfer"), low("ov_copying")], "reader": [high("ov_task_read")]}
CONTRAST_CLAIMS = {"output": ["1.0", "1.1", "2.0"], "reader": ["1.0", "2.3", "2.4"]}


def task(kind: str = "set", roles=None, claims=None) -> TaskConfig:
    sets = {name: [f"w{start + 2 * i}" for i in range(n)]  # every other token: between them lie those they match
            for name, start, n in (("a", 10, 10), ("b", 30, 10), ("c", 50, 8), ("d", 66, 8))}  # fmt: skip
    variable = VariableConfig(Kind.set, words="a")
    if kind == "contrast":
        variable = VariableConfig(Kind.contrast, read=["a", "b"], write=["c", "d"])
    roles = roles or (SET_ROLES if kind == "set" else CONTRAST_ROLES)
    claims = claims or (SET_CLAIMS if kind == "set" else CONTRAST_CLAIMS)
    return TaskConfig(
        name="toy",
        title="toy",
        words=sets,
        variables={"v": variable},
        roles={role: RoleConfig(predictions) for role, predictions in roles.items()},
        claims={"toy": ClaimsConfig("a test", "published", claims)},
    )


def cell(made: TaskConfig, *overrides: str) -> Config:
    base = ("task=none", "model.name=toy", "model.claims=toy", "analysis.components=0", f"nulls.draws={DRAWS}")
    config = compose(*base, *overrides)
    config.task = made
    return config


def run(source: Random, made: TaskConfig, *overrides: str, words: bool = True) -> Analysis:
    return analyse(OpenedModel(source, "toy", tokenizer() if words else None), cell(made, *overrides))


def claimed(role: str, claims=SET_CLAIMS) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in (name.split(".") for name in claims[role])]


class Oracle:
    """The model's metrics, everything materialised in float64."""

    def __init__(self, source: Random, kind: str = "set") -> None:
        self.source, self.facts = source, source.architecture
        self.variable = resolve_task(task(kind), tokenizer(), V, "toy").variables[0]
        E = fold_embeddings(source.embeddings(), self.facts)
        self.W_E, self.W_U = E.W_E.double(), E.W_U.double()
        self.later, self.C = block0_rows(source, E), centre_tokens(V)

    def map(self, head: tuple[int, int], circuit: str) -> torch.Tensor:
        W_OV, W_QK = matrices(fold_layer(self.source.layer(head[0]), self.facts), self.facts, head[1])
        return W_OV if circuit == "ov" else W_QK

    def rows(self, layer: int) -> torch.Tensor:
        return normalise(self.W_E if layer == 0 else self.later, self.facts.norm, self.facts.norm_eps)

    def metric(self, name: str, layer: int, M: torch.Tensor, variable=None, like=None) -> float:
        variable = variable or self.variable
        ids, x = variable.read[0].ids, self.rows(layer)
        if name == "ov_task_auc":
            return auc((x[ids] @ M @ self.W_U)[:, ids], centred=True)
        if name == "qk_task_auc":
            return auc(x[ids] @ M @ x[ids].T, centred=True)
        if name in ("ov_task_copy", "ov_task_suppress"):
            L = x[ids] @ M @ self.W_U * (1 if name == "ov_task_copy" else -1)
            own = L[torch.arange(len(ids)), ids][:, None]
            return float(((own < L).sum(1) < 5).double().mean())
        if name == "ov_copying":
            return ratio(self.C @ self.W_E @ M @ self.W_U @ self.C)
        if name in ("qk_matching", "qk_matching_block0"):
            tokens = self.W_E if name == "qk_matching" else self.later
            return ratio(self.C @ tokens @ M @ tokens.T @ self.C)
        if variable.kind is Kind.contrast:
            a, b = (
                rows[sets[1].ids].mean(0) - rows[sets[0].ids].mean(0)
                for rows, sets in ((x, variable.read), (self.W_U.T, variable.write))
            )
            a, b = a / a.norm(), b / b.norm()
            if name == "ov_task_transfer":
                return float(a @ M @ b / torch.linalg.matrix_norm(M, 2))
            return float((a @ M).square().sum() / M.square().sum() * D_MODEL)
        P, r = self.span(self.W_U.T if name.startswith("ov") else x, variable, like)
        if name == "ov_top_alignment":
            return float((torch.linalg.svd(M).Vh[0] @ P).square().sum() / (r / D_MODEL))
        side = M @ P if name in ("ov_task_alignment", "qk_key_alignment") else P @ M
        return float(side.square().sum() / M.square().sum() / (r / D_MODEL))

    def span(self, rows: torch.Tensor, variable, like=None) -> tuple[torch.Tensor, int]:
        """Of a surrogate: with the rank of the variable that it is like; its words and the drawn ones trade places."""
        band = variable.band
        if like is not None:
            pool = set(like.band.tolist()) | set(like.read[0].ids.tolist())
            band = torch.tensor(sorted(pool - set(variable.read[0].ids.tolist())))
        centred = rows[variable.read[0].ids] - rows[band].mean(0)
        _, sigma, Vh = torch.linalg.svd(centred, full_matrices=False)
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        r = int((shares < 0.9).sum()) + 1 if like is None else self.span(rows, like)[1]
        return projector(Vh[:r]), r

    def frames(self, head: tuple[int, int], circuit: str, n: int, claimed: bool = True) -> list[torch.Tensor]:
        """Surrogates of a head, one at a time: its singular values between two frames orthogonal to all-ones.

        A claimed head has frames of its own; all candidates share theirs, of either circuit.
        """
        sigma = torch.linalg.svdvals(self.map(head, circuit))[:D_HEAD]
        key = [0, *((*head, int(circuit == "ov"), 1, 1) if claimed else ())]
        state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        generator = torch.Generator().manual_seed(state)
        made = []
        for _ in range(n):
            sides = []
            for _ in range(2):
                x = torch.randn(D_MODEL, D_HEAD, generator=generator).double()
                Q, R = torch.linalg.qr(x - x.mean(0))
                sides.append(Q * R.diagonal().sign())
            made.append(sides[0] @ torch.diag(sigma) @ sides[1].T)
        return made


def counted(value: float, draws: list[float]) -> tuple[float, int]:
    """p and the draws it was counted on: one by one, up to the 20th that is at least as extreme."""
    exceeding = n = 0
    for draw in draws:
        n += 1
        exceeding += draw >= value - 1e-9
        if exceeding == 20:
            break
    return (1 + exceeding) / (1 + n), n
