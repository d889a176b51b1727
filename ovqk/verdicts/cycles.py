"""Frequencies of heads on words that form a cycle, against the same words in random order (definitions: section 5)."""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ovqk.circuits import fourier
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model
from ovqk.structure.stages import Tables
from ovqk.tasks.cycle import Cycle
from ovqk.verdicts.statistics import ALPHA, benjamini_hochberg
from ovqk.weights.folding import fold_mlp
from ovqk.weights.mlp import MLPWeights
from ovqk.weights.types import keys, queries

AT_ONCE = 2**24
"""How many elements of relabelled matrices are transformed together."""
TIE = 1e-9
MOST_OF = 0.5
"""The least share of power for a claim that one frequency dominates, or that a head moves within frequencies."""
SPARSE = 0.25
"""A part is sparse if at most this share of all frequencies holds 95 % of its power."""


def cycle_verdict(row: Mapping[Hashable, Any], cycles: pd.DataFrame, p: int) -> str:
    """Judge the claim about one part (docs/definitions.md, section 5): a name of `wording.VERDICTS`.

    There are three claims. The embedding, the unembedding and what neurons write to logits are sparse in Fourier space.
    A head is keyed on one frequency. The head's OV moves that frequency, and writes it into the neurons. `corroborated`
    asks for q < .05 and for the size that the claim names; `partial` has q < .05 alone.

    Args:
        row: the part's row in `cycles`.
        cycles: the rows for all parts, with q.
        p: the modulus.
    """
    part, draws_allow = row["part"], row["min_p"] <= ALPHA
    if math.isnan(row["q"]) or not draws_allow:
        return "untestable"
    if part in ("ov", "ov_neurons"):
        same = (cycles["part"] == "key") & (cycles["layer"] == row["layer"]) & (cycles["head"] == row["head"])
        keyed = cycles.loc[same, "frequency"].dropna()
        if not len(keyed):
            return "untestable"
        whole = row["frequency"] == keyed.iloc[0] and row["block_share" if part == "ov" else "share"] >= MOST_OF
    elif part == "key":
        whole = row["share"] >= MOST_OF
    else:
        whole = row["n_frequencies"] <= SPARSE * (p // 2)
    return ("corroborated" if whole else "partial") if row["q"] < ALPHA else "unsupported"


def one_mlp(model: Model) -> MLPWeights | None:
    """Return the MLP behind the heads in a model of one block, folded; None if it has more blocks, none or a gate."""
    mlp = model.source.first_mlp() if model.architecture.n_layers == 1 and model.source.foldable else ""
    if isinstance(mlp, str) or mlp.W_linear is not None:
        return None
    return fold_mlp(mlp, model.architecture)


class CycleTables:
    """The stage that looks for frequencies.

    It makes two tables: `frequencies`, with a row for each part and frequency, and `cycles`, with a row for each part.
    The parts are the embedding, the unembedding, and two for each head. `ov` is W_E W_OV W_U, which maps residues to
    residues. `key` holds the residues' scores as keys for the task's query token, or for the mean residue if the task
    has none. All parts are on the direct path; in layer 0 that is the path the model itself takes. A model of one block
    with an MLP without a gate has two more kinds of parts: `neurons`, W_out W_U, and `ov_neurons`, W_E W_OV W_in.
    """

    def __init__(self, model: Model, cycle: Cycle) -> None:
        """Take the residues' embedding and unembedding rows, into main memory: they are few."""
        self.model, self.cycle = model, cycle
        assert model.vocabulary is not None
        self.W_E = model.vocabulary.W_E[cycle.ids].double().cpu()
        rows = model.vocabulary.written
        self.W_U = (
            None if rows is None or max(cycle.ids.tolist()) >= rows.shape[0] else rows[cycle.ids].double().cpu().T
        )
        config = model.config
        self.orders = fourier.relabellings(cycle.p, config.nulls.draws, config.seed)
        self._frequencies: list[pd.DataFrame] = []
        self._rows: list[dict[str, float | str | int | None]] = []
        self._add_rows("embedding", None, None, self.W_E)
        if self.W_U is not None:
            self._add_rows("unembedding", None, None, self.W_U.T)
        self._mlp = one_mlp(model)
        if self._mlp is not None and self.W_U is not None:
            self._add_rows("neurons", None, None, (self._mlp.W_out.double().cpu() @ self.W_U).T)

    def visit(self, layer: Layer) -> None:
        """See `Stage`."""
        weights, architecture = layer.folded, self.model.architecture
        device = weights.W_V.device
        W_E = self.W_E.to(device)
        if self.W_U is not None:
            kv = architecture.kv_of_head.to(device)
            for head in range(architecture.n_heads):
                moved = W_E @ weights.W_V[kv[head]].double() @ weights.W_O[head].double() @ self.W_U.to(device)
                self._add_matrix(layer.index, head, moved.cpu())
        if self._mlp is not None:
            kv = architecture.kv_of_head.to(device)
            for head in range(architecture.n_heads):
                written = W_E @ weights.W_V[kv[head]].double() @ weights.W_O[head].double()
                self._add_rows("ov_neurons", layer.index, head, (written @ self._mlp.W_in.double().to(device)).cpu())
        scores = self._key_scores(layer)
        for head, of_head in enumerate([] if scores is None else scores):
            self._add_rows("key", layer.index, head, of_head[:, None])

    def tables(self, _: Tables) -> Tables:
        """Return `frequencies` and `cycles`, with q over heads for each kind of part."""
        cycles = pd.DataFrame(self._rows)
        cycles["q"] = math.nan
        whole = ("layer", "head", "frequency", "n_frequencies")
        cycles = cycles.astype(dict.fromkeys(whole, "Int64"))
        for part in cycles["part"].unique():
            rows = cycles.index[(cycles["part"] == part) & cycles["p"].notna()]
            if len(rows):
                cycles.loc[rows, "q"] = benjamini_hochberg(cycles.loc[rows, "p"].tolist())
        cycles["verdict"] = [cycle_verdict(row, cycles, self.cycle.p) for row in cycles.to_dict("records")]
        return {"frequencies": pd.concat(self._frequencies, ignore_index=True), "cycles": cycles}

    def _key_scores(self, layer: Layer) -> Float[Tensor, "head residue"] | None:
        """Return each residue's score as a key, unscaled.

        It is None under rotary positions, which rotate keys, and if no score reaches attention (`attn_coeff` 0).
        """
        weights, architecture, vocabulary = layer.folded, self.model.architecture, self.model.vocabulary
        if weights.rotary is not None or architecture.positions == "unsupported" or vocabulary is None:
            return None
        if architecture.attn_coeff == 0:
            return None
        W_E = self.W_E.to(weights.W_Q.device)
        token: Tensor = W_E.mean(0)
        if self.cycle.query is not None:
            token = vocabulary.W_E[torch.tensor([self.cycle.query])].to(W_E).sum(0)
        W_pos = None if self.model.W_pos is None else self.model.W_pos.to(W_E)
        query, rows = token[None], W_E
        if W_pos is not None:
            last = self.cycle.length - 1
            before = [place for place in self.cycle.places if place != last]
            query, rows = query + W_pos[last], rows + W_pos[before].mean(0)
        q = queries(weights, architecture.normalised(query))[:, 0]
        k = keys(weights, architecture.normalised(rows))[architecture.kv_of_head.to(W_E.device)]
        return torch.einsum("hz,hrz->hr", q, k).cpu()

    def _add_rows(self, part: str, layer: int | None, head: int | None, rows: Float[Tensor, "residue d"]) -> None:
        """Add a part that has a power for each frequency; its statistic is the largest share at one frequency."""
        own = fourier.power(rows)

        def largest(orders: Int[Tensor, "draw residue"]) -> Float[Tensor, " draw"]:
            return fourier.power(rows[orders]).amax(-1)

        more = dict.fromkeys(("block_share", "shift_variance", "reflected_variance"), math.nan)
        self._add(part, layer, head, own, largest, float(own.max()), more, rows.shape[-1])

    def _add_matrix(self, layer: int, head: int, matrix: Float[Tensor, "residue residue"]) -> None:
        """Add a head's OV; its statistic is the share of its power that stays within one frequency."""
        own = fourier.blocks(matrix)

        def together(orders: Int[Tensor, "draw residue"]) -> Float[Tensor, " draw"]:
            return fourier.blocks(matrix[orders[:, :, None], orders[:, None, :]]).sum(-1)

        more = {
            "block_share": float(own.sum()),
            "shift_variance": float(fourier.shift_variance(matrix)),
            "reflected_variance": float(fourier.shift_variance(matrix, back=True)),
        }
        self._add("ov", layer, head, own, together, float(own.sum()), more, self.cycle.p)

    def _add(
        self,
        part: str,
        layer: int | None,
        head: int | None,
        shares: Float[Tensor, " frequency"],
        statistic: Callable[[Int[Tensor, "draw residue"]], Float[Tensor, " draw"]],
        observed: float,
        more: dict[str, float],
        width: int,
    ) -> None:
        there = not math.isnan(observed)
        at_once = max(1, AT_ONCE // (self.cycle.p * width))
        drawn = torch.cat([statistic(part) for part in self.orders.split(at_once)]) if there else torch.zeros(0)
        count = len(shares)
        self._frequencies.append(
            pd.DataFrame(
                {
                    "part": part,
                    "layer": pd.array([layer] * count, dtype="Int64"),
                    "head": pd.array([head] * count, dtype="Int64"),
                    "frequency": np.arange(1, count + 1),
                    "power": shares.numpy(),
                    "doubling": fourier.doubling(shares, self.cycle.p).numpy(),
                }
            )
        )
        held = shares / shares.sum()
        self._rows.append(
            {
                "part": part,
                "layer": layer,
                "head": head,
                "frequency": int(shares.argmax()) + 1 if there else None,
                "share": float(shares.max()),
                **more,
                "gini": float(fourier.gini(held)) if there else math.nan,
                "n_frequencies": int(fourier.frequencies_needed(held)) if there else None,
                "null_q95": float(drawn.quantile(0.95)) if there else math.nan,
                "min_p": 1 / (1 + len(drawn)),
                "p": (1 + int((drawn >= observed - TIE).sum())) / (1 + len(drawn)) if there else math.nan,
            }
        )
