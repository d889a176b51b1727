"""Composition: how heads read what heads in earlier layers write (definitions: section 3).

Row vectors: a sender s adds x W_OV^s to the residual stream, and a receiver r in a later layer reads it into its

    queries (q)   norm_F(W_OV^s W_QK^r)
    keys    (k)   norm_F(W_OV^s W_QK^rT)
    values  (v)   norm_F(W_OV^s W_OV^r)

each divided by both heads' norms (Elhage et al. 2021). With thin SVDs U S V^T, each of the three is one k x k block's
norm, norm_F(write_s read_r^T). The write side is W_OV's S V^T. The read sides are W_QK's S U^T (q), W_QK's S V^T (k)
and W_OV's S U^T (v). All sides are scaled to norm 1. Heads are stacked, so a pair of layers is one matrix product,
taken in tiles with at most TILE elements. Computing all pairs therefore needs little memory besides the circuits: one
layer's sides, a tile and the scores.

Under rotary positions W_QK has the mean rotation over the offsets that the caller chose when decomposing it.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ovqk.circuits import spectra
from ovqk.circuits.factors import Factors
from ovqk.circuits.grams import FullCircuit, Matrix, blocks
from ovqk.circuits.maps import Decomposition, decompose
from ovqk.circuits.spectra import full_circuit_ratio
from ovqk.circuits.threads import each
from ovqk.config.schema import Circuit
from ovqk.weights.types import Head

Mode = Literal["q", "k", "v"]
Pair = tuple[Head, Head]
"""(sender, receiver); only a sender in an earlier layer composes."""

MODES: tuple[Mode, ...] = ("q", "k", "v")
NO_COMPONENT = 1e-6
SENDERS_KEPT = 20  # for each receiver and mode; also the number of virtual heads
TILE = 2**22  # elements of a product between stacked heads held at a time


@dataclass(frozen=True)
class LayerCircuits:
    """Both circuits for one layer's heads, decomposed: all that composition needs from a layer."""

    ov: Decomposition
    qk: Decomposition

    @classmethod
    def of(cls, ov: Decomposition, qk: Decomposition, dtype: torch.dtype = torch.float32) -> "LayerCircuits":
        """Keep the singular vectors in this dtype (float32 moves scores by less than 1e-6), the values in float64."""
        return cls(*(dataclasses.replace(c, read=c.read.to(dtype), write=c.write.to(dtype)) for c in (ov, qk)))

    def only(self, heads: Sequence[int]) -> "LayerCircuits":
        """Return these heads alone, in this order."""
        return LayerCircuits(_select(self.ov, heads), _select(self.qk, heads))

    def write(self) -> Float[Tensor, "head k d_model"]:
        """Return W_OV's S V^T over its norm; 0 for a head with zero weights."""
        return _unit_rows(self.ov.write, self.ov.sigma)

    def read(self, mode: Mode) -> Float[Tensor, "head k d_model"]:
        """Return the side that reads the mode's input (see the module), with norm 1; 0 for a head with zero weights."""
        if mode == "v":
            return _unit_rows(self.ov.read, self.ov.sigma)
        return _unit_rows(self.qk.read if mode == "q" else self.qk.write, self.qk.sigma)


def _select(decomposition: Decomposition, heads: Sequence[int]) -> Decomposition:
    """Return these heads alone; one head is not copied."""
    index = (
        slice(heads[0], heads[0] + 1) if len(heads) == 1 else torch.as_tensor(heads, device=decomposition.sigma.device)
    )
    read, sigma, write = (x[index] for x in (decomposition.read, decomposition.sigma, decomposition.write))
    return dataclasses.replace(decomposition, read=read, sigma=sigma, write=write)


def _unit_rows(
    frame: Float[Tensor, "head d_model k"], sigma: Float[Tensor, "head k"]
) -> Float[Tensor, "head k d_model"]:
    norm = sigma.norm(dim=-1, keepdim=True)
    shares = sigma / torch.where(norm > 0, norm, 1.0)
    return (frame * shares.to(frame.dtype)[:, None, :]).mT.contiguous()


# --- scores ----------------------------------------------------------------------------------------------------


def scores(sender: LayerCircuits, receiver: LayerCircuits, mode: Mode) -> Float[Tensor, "sender receiver"]:
    """Measure how strongly each receiver reads what each sender writes, in [0, 1] (docs/definitions.md, section 3).

    The score is Elhage et al.'s (2021). Independent, identically distributed weights score about 1 / sqrt(d_model), and
    a head with zero weights scores 0.
    """
    return side_scores(sender.write(), receiver.read(mode))


def side_scores(
    write: Float[Tensor, "sender k d_model"], read: Float[Tensor, "receiver k_read d_model"]
) -> Float[Tensor, "sender receiver"]:
    """Return `scores`, in [0, 1], given what the senders write and the receivers read, each side with norm 1."""
    k = max(write.shape[1], read.shape[1])
    side = max(1, math.isqrt(TILE) // k)  # heads on each side of a tile
    found = torch.zeros(len(write), len(read), dtype=torch.float64, device=write.device)
    for senders in blocks(len(write), side):
        for receivers in blocks(len(read), side):
            product = write[senders].flatten(0, 1) @ read[receivers].flatten(0, 1).T
            squares = product.square_().unflatten(0, (-1, write.shape[1])).unflatten(2, (-1, read.shape[1]))
            found[senders, receivers] = squares.sum((1, 3)).double().sqrt()
    return found


def component_scores(sender: LayerCircuits, receiver: LayerCircuits, mode: Mode) -> Float[Tensor, "sender k"]:
    """Measure how strongly one receiver reads each component of each sender's OV, in [0, 1].

    W_OV^s is the sum over sigma_i u_i v_i^T. Component i scores the norm of the receiver's reading of v_i, divided by
    the norm of W_QK^r or W_OV^r (Merullo et al. 2024, arXiv:2406.09519). sigma_i cancels, and chance is 1 /
    sqrt(d_model). If the squares are averaged with weights sigma_i^2, the square of `scores` results. A component whose
    sigma is below NO_COMPONENT times the head's largest has no direction, and scores 0.

    Args:
        sender: the senders.
        receiver: one head (`LayerCircuits.only`).
        mode: the input that it reads.
    """
    return _component_scores(sender.ov.sigma, sender.ov.write, receiver.read(mode)[0])


def _component_scores(
    sigma: Float[Tensor, "sender k"], write: Float[Tensor, "sender d_model k"], read: Float[Tensor, "k_read d_model"]
) -> Float[Tensor, "sender k"]:
    """Return the norm that `read`, of norm 1, takes from each sender's write directions; 0 without a direction."""
    written = write.transpose(0, 1).flatten(1).to(read)  # [d_model, sender * k]
    found = (read @ written).norm(dim=0).double().unflatten(0, sigma.shape)
    return torch.where(sigma > NO_COMPONENT * sigma.amax(-1, keepdim=True), found, 0.0)


def received(
    layers: Sequence[LayerCircuits], layer: int, mode: Mode, heads: Sequence[int] | None = None
) -> Float[Tensor, "sender_layer sender receiver"]:
    """Score all heads in earlier layers as senders to this layer's `heads` (to all if None); layer >= 1.

    An all-pairs pass calls it for each layer and mode.
    """
    return _received(layers, layer, [mode], heads)[mode]


def _received(
    layers: Sequence[LayerCircuits], layer: int, modes: Sequence[Mode], heads: Sequence[int] | None
) -> dict[Mode, Float[Tensor, "sender_layer sender receiver"]]:
    """Return `received` for several modes: each sender's side is made once for all of them."""
    receiver = layers[layer] if heads is None else layers[layer].only(heads)
    reads = {mode: receiver.read(mode) for mode in modes}

    def by(sender: LayerCircuits) -> list[Tensor]:
        write = sender.write()
        return [side_scores(write, read) for read in reads.values()]

    found = each(by, layers[:layer], receiver.ov.sigma.device)
    return {mode: torch.stack(scored) for mode, scored in zip(modes, zip(*found, strict=True), strict=True)}


def percentiles(found: Float[Tensor, "*layer sender receiver"]) -> Float[Tensor, "*layer sender receiver"]:
    """Rank each sender in its layer: the share of the others with lower scores, ties half, in [0, 1]; nan if alone."""
    mine = found.mT.contiguous()
    ordered = mine.sort(dim=-1).values
    below, upto = torch.searchsorted(ordered, mine), torch.searchsorted(ordered, mine, right=True)
    return ((below + upto - 1).double() / (2 * (found.shape[-2] - 1))).mT  # a sender is among those up to itself


def matching(
    layers: Sequence[LayerCircuits], pairs: Sequence[Pair], gram: Matrix, first_gram: Matrix | None = None
) -> Float[Tensor, " pair"]:
    """Say whether receivers look for the token that senders moved: K-composed matching, in [-1, 1].

    It is Re(sum lambda) / sum |lambda| (docs/definitions.md, section 3), +1 if r seeks its own token, moved by s. A
    query token t scores a key token u that passed through the sender by e_t W_QK^r (e_u W_OV^s)^T. Over the vocabulary
    this matrix, C E W_QK^r W_OV^sT E^T C, has the same nonzero eigenvalues as the core

        (R_r R_s^T) (L_s^T G L_r),   W_QK^r = L_r R_r,  W_OV^s = L_s R_s

    The value is 0 if sum |lambda| is below 1e-6 times its bound |R_r| |R_s| |L_s| |G L_r|: the pair does not compose.

    Args:
        layers: from layer 0 on.
        pairs: sender and receiver.
        gram: G = E^T C E for the embeddings that both heads are taken to see: `block0` if the model has MLPs, else
            plain ones (`claim_tests.matching_grams`).
        first_gram: W_E^T C E for senders in layer 0, which read plain embeddings; as `gram` if None. If layer 0
            turns tokens around, `gram` gives these senders the wrong sign.
    """
    found = torch.zeros(len(pairs), dtype=torch.float64, device=gram.device)
    gram, first_gram = gram.double(), None if first_gram is None else first_gram.double()
    rows_of: dict[Head, list[int]] = {}
    for row, (_, head) in enumerate(pairs):
        rows_of.setdefault(head, []).append(row)

    def of(receiver_of: tuple[Head, list[int]]) -> Float[Tensor, " row"]:
        (layer, index), rows = receiver_of
        receiver = _select(layers[layer].qk, [index])
        left, right = receiver.balanced_left, receiver.balanced_right
        senders, cores, scales = [pairs[row][0] for row in rows], [], []
        seen = {
            later: (gram if later or first_gram is None else first_gram) @ left
            for later in {sender_layer > 0 for sender_layer, _ in senders}
        }
        norms = {later: product.norm() for later, product in seen.items()}
        for sender_layer, sender_index in senders:
            sender, later = _select(layers[sender_layer].ov, [sender_index]), sender_layer > 0
            cores.append((right @ sender.balanced_right.mT) @ (sender.balanced_left.mT @ seen[later]))
            scales.append(receiver.sigma.sum().sqrt() * sender.sigma.sum() * norms[later])
        return spectra.trace_ratio(spectra.eigenvalues(torch.cat(cores)), torch.stack(scales))

    for rows, values in zip(rows_of.values(), each(of, rows_of.items(), gram.device), strict=True):
        found[rows] = values
    return found


# --- roles' predictions: [layer, head], nan if undefined ------------------------------------------------------


def k_composition(layers: Sequence[LayerCircuits], receivers: Collection[Head]) -> NDArray[np.float64]:
    """Rank each head in its layer by its score into these receivers' keys; the best percentile counts, in [0, 1]."""
    return _best(layers, receivers, "k", as_percentile=True)


def q_composition(layers: Sequence[LayerCircuits], receivers: Collection[Head]) -> NDArray[np.float64]:
    """Take each head's best score into these receivers' queries, in [0, 1]."""
    return _best(layers, receivers, "q", as_percentile=False)


def component_composition(
    layers: Sequence[LayerCircuits], receivers: Collection[Head], mode: Mode
) -> NDArray[np.float64]:
    """Take each head's component that these receivers read most, by `component_scores`, in [0, 1]."""
    best = np.full((len(layers), _n_heads(layers)), math.nan)
    for layer, head in sorted(set(receivers)):
        receiver = layers[layer].only([head])
        for sender in range(layer):
            found = component_scores(layers[sender], receiver, mode).amax(-1)
            best[sender] = np.fmax(best[sender], found.cpu().numpy())
    return best


def k_composed_matching(
    layers: Sequence[LayerCircuits], senders: Collection[Head], gram: Matrix, first_gram: Matrix | None = None
) -> NDArray[np.float64]:
    """Take each head's best `matching` with these senders, if they are in earlier layers; in [-1, 1]."""
    heads = [(layer, head) for layer in range(len(layers)) for head in range(_n_heads(layers))]
    pairs = [(sender, receiver) for receiver in heads for sender in sorted(set(senders)) if sender[0] < receiver[0]]
    best = np.full((len(layers), _n_heads(layers)), math.nan)
    for (_, receiver), value in zip(pairs, matching(layers, pairs, gram, first_gram).tolist(), strict=True):
        best[receiver] = np.fmax(best[receiver], value)
    return best


def _best(
    layers: Sequence[LayerCircuits], receivers: Collection[Head], mode: Mode, as_percentile: bool
) -> NDArray[np.float64]:
    best = np.full((len(layers), _n_heads(layers)), math.nan)
    for layer in range(1, len(layers)):
        heads = sorted({head for at, head in receivers if at == layer})
        if heads:
            found = received(layers, layer, mode, heads)
            found = percentiles(found) if as_percentile else found
            best[:layer] = np.fmax(best[:layer], found.amax(-1).cpu().numpy())
    return best


def _n_heads(layers: Sequence[LayerCircuits]) -> int:
    return len(layers[0].ov.sigma)


INTO_RECEIVERS: dict[str, Callable[[Sequence[LayerCircuits], Collection[Head]], NDArray[np.float64]]] = {
    "k_composition": k_composition,
    "q_composition": q_composition,
    **{f"{mode}_component_composition": partial(component_composition, mode=mode) for mode in MODES},
}
"""Metric of a sender and given receivers -> its function."""


# --- tables ------------------------------------------------------------------------------------------------------

PAIR_COLUMNS = ["sender_layer", "sender_head", "receiver_layer", "receiver_head"]
COLUMNS = [
    "mode", *PAIR_COLUMNS, "score", "score_above_random", "percentile", "matching", "component", "component_score"
]  # fmt: skip


def composition_table(
    layers: Sequence[LayerCircuits],
    asked: Collection[Pair] = (),
    gram: Matrix | None = None,
    first_gram: Matrix | None = None,
    strongest: int = SENDERS_KEPT,
) -> pd.DataFrame:
    """Make composition.parquet: for each mode the pairs asked for, and every receiver's strongest senders.

    Args:
        layers: from layer 0 on.
        asked: pairs to include; one whose sender is not in an earlier layer does not compose and has no row.
        gram, first_gram: for `matching` in rows with mode k; nan without `gram`, and for the other modes.
        strongest: how many senders to keep for each receiver and mode; with 0, only the pairs asked for are computed.
    """
    tables = []
    for layer in range(1, len(layers)):
        mine = {(sender, receiver[1]) for sender, receiver in asked if receiver[0] == layer and sender[0] < layer}
        heads = list(range(_n_heads(layers))) if strongest else sorted({head for _, head in mine})
        for mode, found in (_received(layers, layer, MODES, heads) if heads else {}).items():
            flat = found.flatten(0, 1)
            top = flat.topk(min(strongest, len(flat)), dim=0).indices
            kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, top, True).view_as(found)
            for sender, head in mine:
                kept[(*sender, heads.index(head))] = True
            rows = pd.DataFrame(kept.nonzero().int().cpu().numpy(), columns=[*PAIR_COLUMNS[:2], "receiver_head"])
            rows["receiver_head"] = np.array(heads, dtype=np.int32)[rows["receiver_head"]]
            rows = rows.assign(mode=mode, receiver_layer=np.int32(layer), matching=math.nan)
            rows["score"], rows["percentile"] = (x[kept].cpu().numpy() for x in (found, percentiles(found)))
            rows["score_above_random"] = rows["score"] - 1 / math.sqrt(layers[layer].ov.read.shape[1])
            rows["component"], rows["component_score"] = _strongest_components(layers, _pairs(rows), mode)
            if mode == "k" and gram is not None:
                rows["matching"] = matching(layers, _pairs(rows), gram, first_gram).cpu().numpy()
            tables.append(rows.sort_values(["receiver_head", "score"], ascending=[True, False], kind="stable"))
    return pd.concat(tables, ignore_index=True)[COLUMNS] if tables else pd.DataFrame(columns=COLUMNS)


def _strongest_components(
    layers: Sequence[LayerCircuits], pairs: Sequence[Pair], mode: Mode
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return, for each pair, the sender's component that the receiver reads most, counted from 0, and its score."""
    index, score = np.zeros(len(pairs), dtype=np.int64), np.zeros(len(pairs))
    rows_of: dict[Head, list[int]] = {}
    for row, (_, receiver) in enumerate(pairs):
        rows_of.setdefault(receiver, []).append(row)

    def of(receiver_of: tuple[Head, list[int]]) -> tuple[Tensor, Tensor]:
        (layer, head), rows = receiver_of
        senders = [layers[at].ov for at, _ in (pairs[row][0] for row in rows)]
        sigma = torch.stack([ov.sigma[pairs[row][0][1]] for ov, row in zip(senders, rows, strict=True)])
        # side by side, as the product wants them: stacked heads would be copied once more
        write = torch.stack([ov.write[pairs[row][0][1]] for ov, row in zip(senders, rows, strict=True)], dim=1)
        best = _component_scores(sigma, write.transpose(0, 1), layers[layer].only([head]).read(mode)[0]).max(-1)
        return best.indices, best.values

    found = each(of, rows_of.items(), layers[0].ov.sigma.device)
    for rows, (indices, values) in zip(rows_of.values(), found, strict=True):
        index[rows], score[rows] = indices.cpu().numpy(), values.cpu().numpy()
    return index, score


def _pairs(table: pd.DataFrame) -> list[Pair]:
    """Read the pairs from a table's rows."""
    return [((a, b), (c, d)) for a, b, c, d in table[PAIR_COLUMNS].to_numpy().tolist()]


def virtual_factors(layers: Sequence[LayerCircuits], pairs: Sequence[Pair]) -> Factors:
    """Return the virtual heads W_OV^s W_OV^r for these pairs, from s's reads to r's writes (Elhage et al. 2021)."""
    lefts, rights = [], []
    for (sender_layer, sender_head), (layer, head) in pairs:
        sender, receiver = _select(layers[sender_layer].ov, [sender_head]), _select(layers[layer].ov, [head])
        lefts.append(sender.balanced_left @ (sender.balanced_right @ receiver.balanced_left))
        rights.append(receiver.balanced_right)
    return Factors(Circuit.ov, torch.cat(lefts), torch.cat(rights))


def virtual_heads_table(
    layers: Sequence[LayerCircuits],
    composition: pd.DataFrame,
    full: FullCircuit | None = None,
    first_full: FullCircuit | None = None,
    n: int = SENDERS_KEPT,
) -> pd.DataFrame:
    """Make virtual_heads.parquet: the virtual heads for a composition table's n strongest V pairs.

    With n up to the table's `strongest` no pair outside the table is stronger.

    Columns, besides the pair and its score:
        frobenius_norm: norm_F(W_OV^s W_OV^r).
        frobenius_share: its square over the sum for all the receiver's senders, in [0, 1]; nan if all are 0.
        ov_copying: Re(sum lambda) / sum |lambda| for E W_OV^s W_OV^r W_U, in [-1, 1]; nan without `full`. Senders in
            layer 0 read through `first_full`, if that is given.
    """
    strongest = composition[composition["mode"] == "v"].sort_values("score", ascending=False, kind="stable").head(n)
    table = strongest[[*PAIR_COLUMNS, "score"]]
    pairs = _pairs(table)
    norm, share, copying = (np.full(len(table), math.nan) for _ in range(3))
    if pairs:
        virtual = decompose(virtual_factors(layers, pairs), centred=False)
        norm = virtual.sigma.norm(dim=-1).cpu().numpy()
        if full is not None:
            later, first = (full_circuit_ratio(virtual, of).cpu().numpy() for of in (full, first_full or full))
            copying = np.where(table["sender_layer"] == 0, first, later)
    for row, ((at, sender), (layer, head)) in enumerate(pairs):
        norms = torch.stack([layers[earlier].ov.sigma.norm(dim=-1) for earlier in range(layer)])
        energy = (received(layers, layer, "v", [head])[..., 0] * norms).square()
        share[row] = float(energy[at, sender] / energy.sum())
    return table.assign(frobenius_norm=norm, frobenius_share=share, ov_copying=copying).reset_index(drop=True)
