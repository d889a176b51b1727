"""Circuits that compose: at random, planted, and as whole matrices of a model."""

from itertools import product

import torch

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.circuits.composition import (
    LayerCircuits,
)
from ovqk.circuits.factors import Factors, ov_factors, qk_factors
from ovqk.circuits.maps import decompose
from ovqk.circuits.positions import rotary_span
from ovqk.config.schema import Circuit
from ovqk.weights.folding import fold_layer
from ovqk.weights.readers import open_weights
from support.models import local
from support.oracle import centre_tokens, matrices, ratio, rotation


def source_of(path):
    return open_weights(open_checkpoint(local(path)), local(path))


def of_factors(ov: Factors, qk: Factors, dtype: torch.dtype = torch.float32) -> LayerCircuits:
    return LayerCircuits.of(decompose(ov, centred=False), decompose(qk, centred=False), dtype)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_layer(heads: int, d: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> LayerCircuits:
    left, right = noise(2, heads, d, k, seed=seed), noise(2, heads, k, d, seed=seed + 10**7)
    return of_factors(Factors(Circuit.ov, left[0], right[0]), Factors(Circuit.qk, left[1], right[1]), dtype)


def random_layers(n: int, heads: int, d: int, k: int, seed: int = 0) -> list[LayerCircuits]:
    return [random_layer(heads, d, k, seed=100 * seed + layer) for layer in range(n)]


class Materialised:
    """A model's heads as [d, d] matrices in float64, and the same heads as the module takes them."""

    def __init__(self, source, folded: bool = True, rotated: bool = True) -> None:
        self.facts = facts = source.architecture
        self.layers, self.W_OV, self.W_QK = [], {}, {}
        for index in range(facts.n_layers):
            weights = source.layer(index)
            weights = fold_layer(weights, facts) if folded else weights
            span = range(rotary_span(weights, facts)) if rotated and weights.rotary is not None else [0]
            Rbar = torch.stack([rotation(weights.rotary, facts.d_head, D) for D in span]).mean(0)
            for head in range(facts.n_heads):
                self.W_OV[index, head], self.W_QK[index, head] = matrices(weights, facts, head, Rbar)
            ov, qk = ov_factors(weights, facts), qk_factors(weights, facts, span)
            self.layers.append(LayerCircuits.of(decompose(ov, False), decompose(qk, False)))

    @property
    def pairs(self):
        return [(s, r) for s, r in product(self.W_OV, self.W_OV) if s[0] < r[0]]

    def score(self, mode: str, s, r) -> float:
        A = self.W_OV[s]
        B = {"q": self.W_QK[r], "k": self.W_QK[r].T, "v": self.W_OV[r]}[mode]
        return float((A @ B).norm() / A.norm() / B.norm())

    def matching(self, E: torch.Tensor, s, r, W_E: torch.Tensor | None = None) -> float:
        """Query tokens read by W_QK; key tokens first pass through the sender; centred over tokens on both sides.

        A sender of layer 0 reads W_E, where given.
        """
        C = centre_tokens(len(E))
        moved = (E if W_E is None or s[0] > 0 else W_E) @ self.W_OV[s]
        return ratio(C @ (E @ self.W_QK[r]) @ moved.T @ C)
