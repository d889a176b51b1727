"""The tokens that a head's leading components read and write (`directions.parquet`; definitions, section 2).

OV reads tokens and writes columns of W_U; QK compares tokens (read: the query, write: the key). Tokens are read as rows
of W_E, or as `block0` embeddings, normalised as the layer's norm would. Projections are centred over the tokens that
may be listed, because a softmax cannot see a constant.

A component's joint sign makes the read side's projection of largest magnitude positive (in a tie, the lowest token id
decides).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ovqk.circuits.components import KINDS, SIDES, Components
from ovqk.circuits.grams import BLOCK, blocks
from ovqk.circuits.sides import Block0Side, NormalisedSide, Side, StoredSide
from ovqk.circuits.threads import each
from ovqk.circuits.vocabulary import Vocabulary
from ovqk.config.schema import Circuit, Embedding
from ovqk.structure.spelling import Spelling
from ovqk.weights.types import Architecture

TOKENS = 10  # in a list, for each side and sign
SLACK = 1e-5  # times the longest token; larger than the rounding of a float32 projection
SCORES = 2**20  # projections held at a time
SEGMENT = 32  # tokens in a segment
EXACT_ELEMENTS = 2**20  # elements in rows of tokens that one thread projects again at a time
GRID = 1e-9  # times the longest token; scores are rounded to multiples of it, so that equal tokens score the same

# fmt: off
COLUMNS = {
    "layer": np.int32, "head": np.int32, "circuit": np.object_, "kind": np.object_, "component": np.int32,
    "value": np.float64, "value_im": np.float64, "cluster": np.int32, "cluster_size": np.int32, "side": np.object_,
    "sign": np.int32, "rank": np.int32, "token_id": np.int32, "token": np.object_, "score": np.float64,
    "contrast": np.float64,
}
# fmt: on


@dataclass(frozen=True)
class Extremes:
    """Token lists, one for each component and sign (a complex pair has only +1), best first.

    Attributes:
        owner: the component that each list belongs to.
        sign: whether it holds the largest (+1) or the smallest (-1) projections.
        token: token ids.
        score: sign times the centred projection; on a pair's plane, its norm.
        contrast: the list's mean score over the standard deviation of all tokens' scores (on a plane, along one axis
            on average); nan if all tokens score alike.
    """

    owner: Int[Tensor, " list"]
    sign: Int[Tensor, " list"]
    token: Int[Tensor, "list rank"]
    score: Float[Tensor, "list rank"]
    contrast: Float[Tensor, " list"]

    def of(self, first: int, n: int) -> "Extremes":
        """Return the lists that belong to n components from `first` on, renumbered from 0."""
        mine = (self.owner >= first) & (self.owner < first + n)
        return Extremes(
            self.owner[mine] - first, self.sign[mine], self.token[mine], self.score[mine], self.contrast[mine]
        )

    def joint_sign(self) -> Int[Tensor, " n"]:
        """Return -1 for each component whose projection of largest magnitude is negative, else 1, [n]."""
        plus, minus = (self.sign == 1).nonzero()[:, 0], (self.sign == -1).nonzero()[:, 0]
        other = plus[self.owner[minus]]  # the list of the same component's largest
        more = self.score[minus, 0] > self.score[other, 0]
        tie = (self.score[minus, 0] == self.score[other, 0]) & (self.token[minus, 0] < self.token[other, 0])
        joint = torch.ones_like(plus)
        joint[self.owner[minus[more | tie]]] = -1
        return joint


class TokenSide:
    """The tokens that may be listed on one side, less their mean."""

    def __init__(self, rows: Side, listed: Bool[Tensor, " token"] | None = None, block: int = BLOCK) -> None:
        """Take the side, and which tokens may be listed (all, if None)."""
        self.rows, self.block = rows, block
        self.listed = torch.ones(len(rows), dtype=torch.bool) if listed is None else listed
        self.mean, self.longest = rows.moments(self.listed)
        self.size = int(self.listed.sum())
        self.slack = max(SLACK, rows.rounding) * self.longest

    def each(self, planes: Sequence[Float[Tensor, "_ 2 d_model"]], count: int) -> list[Extremes]:
        """Find the extremes for several batches of components, in one pass over the tokens."""
        if not planes:
            return []
        together, sizes = self.extremes(torch.cat(list(planes)), count), [len(some) for some in planes]
        return [together.of(sum(sizes[:at]), n) for at, n in enumerate(sizes)]

    def extremes(self, planes: Float[Tensor, "n 2 d_model"], count: int) -> Extremes:
        """Find the tokens with the largest and the smallest projections; equal scores are ordered by id.

        The vocabulary is screened in float32, block by block. Tokens that rounding could bring among the best are
        projected again in float64, so that neither blocks nor threads decide.

        Args:
            planes: for each component one direction, or the two that span a complex pair's plane (else zeros).
            count: the length of a list, at most as many tokens as may be listed.
        """
        is_pair, count = planes[:, 1].any(-1), min(count, self.size)
        given = is_pair.sort(stable=True).indices  # lines first, so that they and pairs are slices below
        planes, is_pair = planes[given], is_pair[given]
        owner = torch.cat((torch.arange(len(planes), device=planes.device), (~is_pair).nonzero()[:, 0]))
        sign = torch.ones_like(owner)
        sign[len(planes) :] = -1
        lists, tokens, spread = self.screened(planes, is_pair, count)
        by_token = tokens.sort(stable=True).indices
        lists, tokens = lists[by_token], tokens[by_token]
        score = self._exact_scores(planes, is_pair, owner[lists], sign[lists], tokens)
        grid = GRID * max(self.longest, torch.finfo(torch.float32).tiny)
        score = (score / grid).round() * grid
        order = np.lexsort([x.cpu().numpy() for x in (tokens, -score, lists)])  # by list, falling score, id
        first_of = np.searchsorted(lists.cpu().numpy()[order], np.arange(len(owner)))
        best = torch.from_numpy(order[first_of[:, None] + np.arange(count)]).to(owner.device)
        contrast = score[best].mean(1) / spread[owner].where(spread[owner] > grid, math.nan)
        back = (given[owner] - len(planes) * (sign - 1)).argsort()  # every component's +1 as it was given, then -1
        return Extremes(given[owner][back], sign[back], tokens[best][back], score[best][back], contrast[back])

    def screened(
        self, planes: Float[Tensor, "n 2 d_model"], is_pair: Bool[Tensor, " n"], count: int
    ) -> tuple[Int[Tensor, " candidate"], Int[Tensor, " candidate"], Float[Tensor, " n"]]:
        """Return candidates (list, token) for each list's `count` best, and the scores' standard deviation [n].

        The lists are every component's +1, then every line's -1; lines come before pairs. Components are taken in
        groups whose scores fit in a processor's cache. A segment is skipped if none of its tokens is among the best so
        far: the count-th largest maximum over segments is a lower bound for the count-th best score. Each thread takes
        a block of tokens; the best scores do not depend on the order of the blocks.
        """
        n, device, n_lines = len(planes), planes.device, int((~is_pair).sum())
        screened_in: dict[torch.dtype, Tensor] = {}
        owners = torch.cat((torch.arange(n, device=device), torch.arange(n_lines, device=device)))
        best = torch.full((len(owners), count), -math.inf, dtype=torch.float64, device=device)
        changing = Lock()

        def candidates(
            job: tuple[Float[Tensor, "padded d_model"], Int[Tensor, " token"]],
        ) -> tuple[Float[Tensor, " n"], list[tuple[Tensor, Tensor, Tensor]]]:
            """Return a block's sum of squared scores, and its candidates; other threads' results may come later."""
            (x, ids), squares, found = job, torch.empty(n, dtype=torch.float64, device=device), []
            narrow = screened_in.get(x.dtype)
            if narrow is None:  # once for all blocks
                narrow = screened_in[x.dtype] = planes.to(x)
            for part in blocks(n, max(1, SCORES // len(x))):
                own, n_own = narrow[part], max(0, min(part.stop, n_lines) - part.start)  # lines among them
                scores, second = (torch.cat((own[:, 0], own[n_own:, 1])) @ x.T).tensor_split([len(own)])
                torch.hypot(scores[n_own:], second, out=scores[n_own:])
                squares[part] = torch.linalg.vector_norm(scores[:, : len(ids)], dim=1).double().square()
                minus = slice(n + part.start, n + part.start + n_own)
                for where, values, sign in (part, scores, 1), (minus, scores[:n_own], -1):
                    some = self._above(values, sign, best[where].to(x), len(ids))
                    with changing:
                        best[where] = _raised(best[where], *some)
                    found.append((some[0] + where.start, ids[some[1]], some[2]))
            return squares, found

        both = each(candidates, self._centred_blocks(), device)
        found = [some for _, here in both for some in here]
        if not found:
            return owners, owners, torch.zeros(n, dtype=torch.float64, device=device)
        squares = torch.stack([squares for squares, _ in both]).sum(0)
        lists, chosen, score = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = score >= best.to(score)[lists, -1] - self.slack
        squares[is_pair] /= 2  # of each axis
        return lists[kept], chosen[kept], (squares / self.size).sqrt()

    def _exact_scores(
        self,
        planes: Float[Tensor, "n 2 d_model"],
        is_pair: Bool[Tensor, " n"],
        owner: Int[Tensor, " candidate"],
        sign: Int[Tensor, " candidate"],
        tokens: Int[Tensor, " candidate"],
    ) -> Float[Tensor, " candidate"]:
        """Project candidates again, in float64. They come by rising token, and each thread takes some tokens' rows."""
        few, number = tokens.unique_consecutive(return_counts=True)
        stops = [0, *number.cumsum(0).tolist()]
        at_a_time = max(1, EXACT_ELEMENTS // planes.shape[-1])
        score = torch.empty(len(tokens), dtype=torch.float64, device=planes.device)

        def project(some: slice) -> None:
            rows = self.rows.exact(few[some]) - self.mean
            at = torch.arange(len(rows), device=rows.device).repeat_interleave(number[some])
            for part in blocks(len(at), at_a_time):
                here = slice(stops[some.start] + part.start, stops[some.start] + part.stop)
                own, x = owner[here], rows[at[part]]
                found, pair = planes[own, 0].mul_(x).sum(-1), is_pair[own]
                second = planes[own[pair], 1].mul_(x[pair]).sum(-1)
                score[here] = sign[here] * found
                score[here.start + pair.nonzero()[:, 0]] = torch.hypot(found[pair], second)

        each(project, blocks(len(few), min(self.block, at_a_time)), planes.device)
        return score

    def _centred_blocks(self) -> Iterator[tuple[Float[Tensor, "padded d_model"], Int[Tensor, " token"]]]:
        """Yield listed tokens as rows less their mean, in whole segments (the last token once more), and their ids."""
        for tokens, rows in self.rows.blocks(self.block):
            ids = self.listed[tokens].nonzero()[:, 0].to(rows.device) + tokens.start
            if len(ids):
                x = rows if len(ids) == len(rows) else rows[ids - tokens.start]
                padded = x.new_empty(len(x) + -len(x) % SEGMENT, x.shape[1])
                padded[len(x) :] = torch.sub(x, self.mean.to(x), out=padded[: len(x)])[-1]
                yield padded, ids

    def _above(
        self, scores: Float[Tensor, "list padded"], sign: int, best: Float[Tensor, "list count"], n: int
    ) -> tuple[Int[Tensor, " candidate"], Int[Tensor, " candidate"], Float[Tensor, " candidate"]]:
        """Return (list, place, sign * score) for the first n tokens' scores that may, times sign, be among the best."""
        segments = scores.unflatten(1, (-1, SEGMENT))
        peaks = segments.amax(-1) if sign > 0 else segments.amin(-1).neg()
        least = best[:, -1]
        if peaks.shape[1] >= best.shape[1]:
            least = torch.maximum(least, peaks.topk(best.shape[1]).values[:, -1])
        least = least - self.slack
        lists, segment = (peaks >= least[:, None]).nonzero(as_tuple=True)
        inside = sign * segments[lists, segment]
        hit, at = (inside >= least[lists, None]).nonzero(as_tuple=True)
        place = segment[hit] * SEGMENT + at
        real = place < n
        return lists[hit][real], place[real], inside[hit, at][real]


def _raised(
    best: Float[Tensor, "list count"], lists: Int[Tensor, " n"], _: Int[Tensor, " n"], scores: Float[Tensor, " n"]
) -> Float[Tensor, "list count"]:
    """Merge new scores, which come list by list, into each list's best so far."""
    if not len(lists):
        return best
    number = torch.bincount(lists, minlength=len(best))
    place = torch.arange(len(lists), device=lists.device) - (number.cumsum(0) - number)[lists]
    new = best.new_full((len(best), int(number.max())), -math.inf)
    new[lists, place] = scores.to(new)
    return torch.cat((best, new), 1).topk(best.shape[1]).values


class Directions:
    """Makes the layers' tables: built once a model, because its vocabulary is prepared once."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer | None,
        block: int = BLOCK,
        *,
        architecture: Architecture | None = None,
        embedding: Embedding = Embedding.by_layer,
        later: Block0Side | None = None,
        listed: Bool[Tensor, " token"] | None = None,
    ) -> None:
        """Take the tokens' embeddings and spelling; without W_U, OV components have no written tokens.

        Args:
            vocabulary: folded embeddings.
            tokenizer: spells the tokens; None for `#id`.
            block: tokens handled at a time.
            architecture: names the norm that embedding rows go through; None for rows as they are.
            embedding: which effective embedding each layer is read through.
            later: block0 embeddings; without them `token` stands in.
            listed: which tokens may be listed; None for all.
        """
        self.vocabulary, self.architecture, self.embedding, self.later = vocabulary, architecture, embedding, later
        self.listed = torch.ones(vocabulary.size, dtype=torch.bool) if listed is None else listed
        self.block, self.spelling = block, Spelling(tokenizer)
        self._sides: dict[str, TokenSide] = {}

    def side(self, kind: str) -> TokenSide | None:
        """Return the tokens as `token` or `block0` rows, or as columns of W_U (`write`; None without one)."""
        if kind not in self._sides:
            W_E, W_U_rows = self.vocabulary.W_E, self.vocabulary.W_U_rows
            rows: Side
            if kind == "write":
                if W_U_rows is None:
                    return None
                rows = StoredSide(W_U_rows)
            elif kind == "block0" and self.later is not None:
                rows = self.later
            else:
                rows = StoredSide(W_E) if self.architecture is None else NormalisedSide(W_E, self.architecture)
            self._sides[kind] = TokenSide(rows, self.listed, self.block)
        return self._sides[kind]

    def kind(self, layer: int) -> str:
        """Say which rows a layer is read through: `token` or `block0`."""
        return "token" if self.later is None else self.embedding.kind(layer)

    def tables(self, found: Sequence[tuple[int, Circuit, Components]], tokens: int = TOKENS) -> list[pd.DataFrame]:
        """List tokens for several circuits (layer, circuit, components), in one pass over the vocabulary.

        Each table has a row for every head, component, side, sign and rank; it is empty if M is 0.

        Columns:
            layer, head, circuit: the head's circuit.
            kind: `singular` or `eigen`.
            component: its number; a complex pair is one component.
            value, value_im: sigma and 0; or Re lambda and Im lambda (> 0 for a pair, else 0).
            cluster, cluster_size: the first component of its cluster, and the cluster's size with components that are
                not reported. If it is above 1, only the span of the cluster is identified.
            side, sign, rank: `read` or `write`; +1 for the largest scores, -1 for the smallest; 1 for the most extreme.
            token_id, token, score: the token, and its centred projection.
            contrast: the list's mean score over the standard deviation of all scores; null if all are equal.
        """
        asked: dict[str, dict[tuple[int, str], Tensor]] = {}
        for at, (layer, circuit, parts) in enumerate(found):
            asked.setdefault(self.kind(layer), {})[at, "read"] = parts.read
            asked.setdefault(self.kind(layer) if circuit is Circuit.qk else "write", {})[at, "write"] = parts.write
        extremes: dict[tuple[int, str], Extremes] = {}
        for kind, planes in asked.items():
            if (side := self.side(kind)) is not None:
                extremes |= zip(planes, side.each(list(planes.values()), tokens), strict=True)
        made = []
        for at, (layer, circuit, parts) in enumerate(found):
            joint = extremes[at, "read"].joint_sign()
            there = [side for side in SIDES if (at, side) in extremes]
            made.append(self._table(layer, circuit, [_rows(parts, extremes[at, s], joint, s) for s in there]))
        return made

    def _table(self, layer: int, circuit: Circuit, sides: list[dict[str, NDArray[Any]]]) -> pd.DataFrame:
        rows = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
        keys = (rows["rank"], -rows["sign"], rows["side"], rows["component"], rows["kind"], rows["head"])
        rows = {name: values[np.lexsort(keys)] for name, values in rows.items()}
        ids, place = np.unique(rows["token_id"], return_inverse=True)
        rows |= {
            "layer": np.full(len(place), layer),
            "circuit": np.full(len(place), circuit.value, dtype=object),
            "kind": np.array(KINDS, dtype=object)[rows["kind"]],
            "value": rows["value"].real,
            "value_im": rows["value"].imag,
            "side": np.array(SIDES, dtype=object)[rows["side"]],
            "token": np.array([self.spelling(token) for token in ids.tolist()], dtype=object)[place],
        }
        return pd.DataFrame({name: rows[name].astype(dtype) for name, dtype in COLUMNS.items()})


def _rows(found: Components, extremes: Extremes, joint: Int[Tensor, " n"], side: str) -> dict[str, NDArray[Any]]:
    """Return one side's columns: every list's component and tokens, signs turned as on the other side."""
    n_ranks, owner = extremes.token.shape[1], extremes.owner
    lists = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in SIDES}
    lists = {name: x[owner] for name, x in lists.items()} | {"sign": extremes.sign * joint[owner]}
    rows = {name: x.cpu().numpy().repeat(n_ranks) for name, x in lists.items()}
    return rows | {
        "side": np.full(len(rows["sign"]), SIDES.index(side)),
        "rank": np.tile(np.arange(1, n_ranks + 1), len(owner)),
        "token_id": extremes.token.flatten().cpu().numpy(),
        "score": extremes.score.flatten().cpu().numpy() * rows["sign"] + 0.0,  # no negative zero
        "contrast": extremes.contrast.cpu().numpy().repeat(n_ranks),
    }


def component_lists(table: pd.DataFrame, titles: tuple[str, str]) -> pd.DataFrame:
    """Return one row for each component and end, with its two lists of tokens.

    Columns: component, sigma, end (+ and -), and the lists.

    Args:
        table: one head's singular components of one circuit, as in directions.parquet.
        titles: the columns' names for the sides `read` and `write`.
    """
    lists = []
    for component, rows in table.sort_values("rank").groupby("component"):
        for sign, end in ((1, "+"), (-1, "-")):
            row: dict[str, Any] = {"component": component, "sigma": float(rows["value"].iloc[0]), "end": end}
            for side, title in zip(SIDES, titles, strict=True):
                row[title] = rows[(rows["side"] == side) & (rows["sign"] == sign)]["token"].tolist()
            lists.append(row)
    return pd.DataFrame(lists)
