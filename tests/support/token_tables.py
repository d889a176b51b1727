"""Tables of directions of planted heads, a materialised float64 oracle for them, and small tokenizers."""

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ovqk.circuits.components import components
from ovqk.circuits.factors import Factors
from ovqk.circuits.maps import Decomposition, decompose
from ovqk.circuits.vocabulary import Vocabulary, read_vocabulary
from ovqk.config.schema import Circuit
from ovqk.structure.token_tables import COLUMNS, TOKENS, Directions
from ovqk.weights.types import EmbeddingWeights


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d: int, h: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(d, h, seed=seed)).Q


def vocabulary(W_E: torch.Tensor, W_U: torch.Tensor | None) -> Vocabulary:
    return read_vocabulary(EmbeddingWeights(W_E, None, W_U, None), None)


def factored(left: torch.Tensor, right: torch.Tensor, circuit: Circuit = Circuit.ov) -> Decomposition:
    """One head M = left @ right."""
    return decompose(Factors(circuit, left[None], right[None]), centred=False)


def table(
    left: torch.Tensor,
    right: torch.Tensor,
    W_E: torch.Tensor,
    W_U: torch.Tensor | None = None,
    circuit: Circuit = Circuit.ov,
    tokenizer: Tokenizer | None = None,
    block: int = 8192,
    **sizes: int,
) -> pd.DataFrame:
    made = Directions(vocabulary(W_E, W_U), tokenizer, block)
    return table_of(made, 0, circuit, factored(left, right, circuit), **sizes)


def table_of(
    directions: Directions, layer: int, circuit: Circuit, parts: Decomposition, count: int = 3, tokens: int = TOKENS
) -> pd.DataFrame:
    """One circuit of one layer."""
    return directions.tables([(layer, circuit, components(parts, count))], tokens)[0]


def ids(rows: pd.DataFrame, kind: str, component: int, side: str, sign: int = 1, head: int = 0) -> list[int]:
    return _list(rows, kind, component, side, sign, head)["token_id"].tolist()


def scores(rows: pd.DataFrame, kind: str, component: int, side: str, sign: int = 1, head: int = 0) -> list[float]:
    return _list(rows, kind, component, side, sign, head)["score"].tolist()


def _list(rows: pd.DataFrame, kind: str, component: int, side: str, sign: int, head: int) -> pd.DataFrame:
    wanted = {"kind": kind, "component": component, "side": side, "sign": sign, "head": head}
    return rows[np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])]


def values(rows: pd.DataFrame, kind: str, head: int = 0) -> list[complex]:
    mine = rows[(rows["kind"] == kind) & (rows["head"] == head)].drop_duplicates("component")
    return [complex(re, im) for re, im in zip(mine["value"], mine["value_im"], strict=True)]


Component = tuple[complex, dict[tuple[str, int], np.ndarray]]  # value, (side, sign) -> sign x every token's score


def oracle(M: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor) -> dict[tuple[str, int], Component]:
    """Three components of each kind, from the d x d matrix, the eigenvectors of its transpose, and rows of tokens."""
    reads, writes = ((rows - rows.mean(0)).numpy() for rows in (reads.double(), writes.double()))
    U, sigma, Vh = (x.numpy() for x in torch.linalg.svd(M))
    found: dict[tuple[str, int], Component] = {}
    for k in range(3):
        found["singular", k] = (sigma[k], _signed(reads @ U[:, k], writes @ Vh[k]))
    lam, right = (x.numpy() for x in torch.linalg.eig(M))
    mu, left = (x.numpy() for x in torch.linalg.eig(M.T))
    order = [i for i in np.argsort(-np.abs(lam)) if lam[i].imag >= 0]
    for k, i in enumerate(order[:3]):
        r, w = right[:, i], left[:, np.argmin(np.abs(mu - lam[i]))]
        if lam[i].imag > 0:
            found["eigen", k] = (lam[i], {("read", 1): _in_plane(reads, r), ("write", 1): _in_plane(writes, w)})
        else:
            w = w.real * np.sign(w.real @ r.real)
            found["eigen", k] = (lam[i], _signed(reads @ r.real, writes @ w))
    return found


def _signed(read: np.ndarray, write: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    turn = np.sign(read[np.argmax(np.abs(read))])
    return {(side, s): s * turn * x for side, x in (("read", read), ("write", write)) for s in (1, -1)}


def _in_plane(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    B = np.stack([vector.real, vector.imag], 1)
    return np.linalg.norm(rows @ B @ np.linalg.inv(B.T @ B) @ B.T, axis=1)


def check(rows: pd.DataFrame, head: int, wanted: dict[tuple[str, int], Component], tolerance: float = 1e-6) -> None:
    """Every list of the head: its tokens, ranks and scores, and the component's value; equal scores in any order."""
    mine = rows[rows["head"] == head].groupby(["kind", "component", "side", "sign"])
    assert set(mine.groups) == {(*key, *side) for key, (_, lists) in wanted.items() for side in lists}
    for (kind, component, side, sign), found in mine:
        value, lists = wanted[kind, component]
        assert complex(found["value"].iloc[0], found["value_im"].iloc[0]) == pytest.approx(value, rel=1e-9)
        everyone, tokens, score = lists[side, sign], found["token_id"].to_numpy(), sign * found["score"].to_numpy()
        assert len(set(tokens)) == len(tokens) == min(10, len(everyone))
        assert np.abs(score - np.sort(everyone)[::-1][: len(tokens)]).max() < tolerance
        assert np.abs(score - everyone[tokens]).max() < tolerance
        assert found["rank"].tolist() == list(range(1, len(tokens) + 1))


def assert_same(one: pd.DataFrame, two: pd.DataFrame, tolerance: float = 1e-6) -> None:
    exact = [name for name in COLUMNS if name not in ("value", "value_im", "score")]
    pd.testing.assert_frame_equal(one[exact], two[exact])
    for name in ("value", "value_im", "score"):
        assert np.abs(one[name] - two[name]).max() < tolerance, name


def word_level(pieces: list[str], pre_tokenizer: object = None, decoder: object = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


BYTE_LEVEL = {
    "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]),
    "decoder": decoders.Sequence([decoders.ByteLevel()]),
}
