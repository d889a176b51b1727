"""The metric registry, for heads and for pairs of heads: each metric's name, meaning, range and nulls.

It computes nothing. Everything that decides about a metric is a field in `Metric`, including the places that show it.
So a new metric is a row here and a function that computes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ovqk.config.schema import Circuit, VariableKind

SCHEMA_VERSION = 13
"""Bumped when a number may change: cells with another version are computed again."""

SENDERS_READ = 3
"""How many senders' components a head is said to read, for each of its queries, keys and values."""
SHOWN_CANDIDATES = 3
"""How many candidates for each role the terminal's tables and the page show."""
NOT_APPLICABLE = "not applicable: "
"""A reason begins with this if it lies in the kind of model or task, and not in something that is missing."""

Needs = Literal[
    "weights",
    "embedding",
    "unembedding",
    "block0",
    "task",
    "learned",
    "rotary",
    "positions",
    "offsets",
    "scale",
    "pairs",
    "diagonals",
]
"""A thing that the model, the task or the analysis must have for a metric to be computed.

`scale`: queries and keys are not normalised, so that the scale of W_QK reaches the scores. `offsets`: attention is
causal, with enough positions for a fit by offset. `pairs`: both circuits are analysed. `diagonals`: the
analysis ranks the full circuits' diagonals.
"""
Of = Literal["head", "words", "subspace", "pair"]
"""A metric's subject: a head's weights, a mean over a task's words, the subspace they span, or a pair of heads."""
Topic = Literal["copying", "symmetry", "position", "spectrum", "task", "composition"]
"""The question that a metric answers: a group in the page's atlas and a section in the W&B dashboard.

`copying` includes matching: whether a token is mapped to itself, by W_OV or by W_QK.
"""
Place = Literal["depth", "curve", "histogram", "atlas", "column", "residual column", "profile"]
"""A place that shows some of the metrics.

`depth`: the curves against relative depth in page and figures, and the means by quarter of the depth. `curve` and
`histogram`: W&B panels over the layers and over all heads. `atlas`: a figure with all heads of all models. `column`:
the terminal's tables; `residual column`: the columns before these if a model has few of them. `profile`: a head's page,
which shows it among all the model's heads.
"""
Part = Literal["position", "content", "both"]
"""The part of the key from which a share of the score's variance comes; shares are drawn in this order."""


@dataclass(frozen=True)
class Metric:
    """One metric. Unless it is about a pair, it is a column of heads.parquet.

    Attributes:
        name: the column's name.
        circuit: the circuit that it describes; None for a pair.
        title: the label in plots and tables.
        formula: as in the definitions.
        low, high: the range; None if there is no bound.
        source: the publication that it comes from.
        needs: the things without which it cannot be computed.
        chance: its value if a head has nothing to do with the task; None if there is no such value.
        of: its subject.
        variable: the kind of variable that it is for; None for any kind.
        reads: whether it is an OV metric about reading, which says nothing about writing.
        full_circuit: whether it is a full circuit's trace ratio, from tokens to tokens.
        other_words: whether a null with other words counts for it or is only reported; None if there is no such null.
        in_top: if it ranks a target's logit in the whole vocabulary, the sign by which W_OV is multiplied; else 0.
        topic: the question that it answers.
        shown: the places that show it, besides the page's table and atlas, which show all.
        order: its place among the metrics shown beside it, smaller first; equal ones follow the columns' order.
        column: its title in the terminal's tables, if that is not `title`.
        legend: what its values mean, for the terminal's tables.
        side: the circuit's side that lies in the task's subspace; empty if it has no side.
        ratio_of: if it is an eigenvalue ratio, the space with these eigenvalues, below which it is drawn; else None.
        share: for a share of the score's variance: the part of the key, and a name that tells it from the part's other
            shares.
        composes: for a pair: the receiver's input that the sender writes.
        ranks: for a pair: the end whose heads it ranks.
        only_exploratory: whether predictions about it are always exploratory, so that no verdict may rest on it.
        counts_dimensions: whether it counts dimensions, at most d_head. Models with different d_head are compared by
            its share of d_head.
    """

    name: str
    circuit: Circuit | None
    title: str
    formula: str
    low: float | None
    high: float | None
    source: str
    needs: frozenset[Needs]
    chance: float | None = None
    of: Of = "head"
    variable: VariableKind | None = None
    reads: bool = False
    full_circuit: bool = False
    other_words: Literal["counts", "reported"] | None = None
    in_top: Literal[-1, 0, 1] = 0
    topic: Topic = field(kw_only=True)
    shown: frozenset[Place] = frozenset()
    order: int = 0
    column: str = ""
    legend: str = ""
    side: str = ""
    ratio_of: Literal["vocab", "residual"] | None = None
    share: tuple[Part, str] | None = None
    composes: Literal["query", "key", "value"] | None = None
    ranks: Literal["sender", "receiver"] | None = None
    only_exploratory: bool = False
    counts_dimensions: bool = False

    @property
    def is_readout(self) -> bool:
        """Whether it is read from a task's words."""
        return "task" in self.needs

    @property
    def of_scores(self) -> bool:
        """Whether it is about attention scores between words, which a norm on queries and keys has already changed."""
        return self.of == "words" and self.circuit is Circuit.qk

    @property
    def has_surrogates(self) -> bool:
        """Whether random heads with the same singular values have it, as in the null `spectrum`."""
        return self.of in ("words", "subspace") or self.full_circuit


SCALES = ("frobenius_norm", "spectral_norm")
"""Spectral metrics that measure the weights' scale, which normalised queries and keys keep out of the scores."""


COPYING, SYMMETRY, SYMMETRY_OF_TOKENS, POSITION, SIGNS, PREVIOUS, RANKS, WORDS, SUBSPACES = range(9)
"""The order of the metrics that are shown beside each other."""


def _at(places: str, order: int = 0) -> dict[str, Any]:
    """Return the fields for a metric that is shown in these places, which commas divide."""
    return {"shown": frozenset(places.split(", ")), "order": order}


def _spectral(circuit: Circuit) -> list[Metric]:
    matrix = "W_OV" if circuit is Circuit.ov else "W_QK"
    residual_ratio = "copying_residual" if circuit is Circuit.ov else "matching_residual"
    sign = {"ratio_of": "residual", "column": f"{circuit.upper()} sign (residual)"}
    sign["legend"] = f"1 if all eigenvalues of {matrix} are positive, -1 if all are negative"
    sign |= _at("profile, residual column, atlas" if circuit is Circuit.ov else "profile, residual column", SIGNS)
    symmetry: dict[str, Any] = {"topic": "symmetry"}
    symmetry |= (
        {}
        if circuit is Circuit.ov
        else {
            "column": "symmetry",
            "legend": "1 if the QK score stays when query and key are exchanged, -1 if its sign turns",
        }
    )
    symmetry |= _at(f"depth, curve, histogram, profile{'' if circuit == 'ov' else ', atlas, column'}", SYMMETRY)
    rank = _at("depth, curve, profile", RANKS)
    rows: list[tuple[str, str, str, float | None, float | None, str, dict[str, Any]]] = [
        (residual_ratio, "eigenvalue sign, residual space", "sum lambda / sum |lambda|", -1.0, 1.0, "Elhage et al. 2021", sign),
        ("symmetry", "symmetry", "tr(M M) / |M|_F^2", -1.0, 1.0, "Saponati et al. 2025", symmetry),
        ("skew_rotation", "rotation", "sum |Im lambda| / sum |lambda|", 0.0, 1.0, "", {}),
        ("nonnormality", "departure from normality", "sqrt(|M|_F^2 - sum |lambda|^2) / |M|_F", 0.0, 1.0, "Henrici 1962", _at("profile")),
        ("frobenius_norm", "Frobenius norm", "sqrt(sum sigma^2)", 0.0, None, "", {}),
        ("spectral_norm", "spectral norm", "sigma_1", 0.0, None, "", {}),
        ("stable_rank", "stable rank", "sum sigma^2 / sigma_1^2", 0.0, None, "Rudelson & Vershynin 2007", {}),
        ("participation_ratio", "participation ratio", "(sum sigma^2)^2 / sum sigma^4", 0.0, None, "", {}),
        ("effective_rank_energy", "effective rank of energies", "exp H(sigma^2 / sum sigma^2)", 0.0, None, "", {}),
        ("effective_rank", "effective rank", "exp H(sigma / sum sigma)", 0.0, None, "Roy & Vetterli 2007", rank),
        ("rank90", "rank at 90 % energy", "components for 90 % of sum sigma^2", 0.0, None, "", {}),
        ("top_share", "top energy share", "sigma_1^2 / sum sigma^2", 0.0, 1.0, "", _at("profile")),
        ("flatness", "spectral flatness", "geometric / arithmetic mean of sigma^2", 0.0, 1.0, "", {}),
    ]  # fmt: skip
    return [
        Metric(
            name=f"{circuit}_{name}",
            circuit=circuit,
            title=f"{circuit.upper()} {title}",
            formula=formula.replace("M", matrix) if "M" in formula else formula,
            low=low,
            high=high,
            source=source,
            needs=frozenset({"weights", "scale"} if circuit is Circuit.qk and name in SCALES else {"weights"}),
            counts_dimensions="rank" in name or name == "participation_ratio",
            **{"topic": "spectrum"} | more,
        )
        for name, title, formula, low, high, source, more in rows
    ]


def _metric(
    name: str,
    title: str,
    formula: str,
    low: float | None,
    high: float | None,
    needs: set[Needs],
    chance: float | None = None,
    source: str = "",
    **more: Any,
) -> Metric:
    circuit = Circuit.ov if name.startswith("ov_") else Circuit.qk
    return Metric(name, circuit, title, formula, low, high, source, frozenset(needs), chance, **more)


def _words(*row: Any, other_words: Literal["reported"] | None = "reported", **more: Any) -> Metric:
    """Return a metric that is a mean over a set's words."""
    return _metric(*row, of="words", topic="task", variable=VariableKind.set, other_words=other_words, **more)


def _pairs(*row: Any, **more: Any) -> Metric:
    """Return a metric that is a mean over a relation's word pairs."""
    return _metric(*row, of="words", topic="task", variable=VariableKind.relation, **more)


def _subspace(*row: Any, **more: Any) -> Metric:
    """Return a metric about the subspace that a variable's words span: other words decide about it too."""
    return _metric(*row, of="subspace", topic="task", other_words="counts", **more)


def _pair(
    name: str,
    title: str,
    formula: str,
    low: float,
    composes: Literal["query", "key", "value"],
    ranks: Literal["sender", "receiver"] = "sender",
) -> Metric:
    needs: frozenset[Needs] = frozenset({"pairs", "embedding"} if name == "k_composed_matching" else {"pairs"})
    source = "" if name == "k_composed_matching" else "Elhage et al. 2021"
    more: dict[str, Any] = {"composes": composes, "ranks": ranks}
    if "component" in name:
        source, more["only_exploratory"] = "Merullo et al. 2024", True
    return Metric(name, None, title, formula, low, 1.0, source, needs, of="pair", topic="composition", **more)


def _shares() -> list[Metric]:
    learned = [
        _metric(
            f"qk_share_{query}_{key}",
            f"QK score variance: {query} query, {key} key",
            "tr(A_a B_b) / sum",
            0.0,
            1.0,
            {"embedding", "learned"},
            topic="position",
            share=(key, f"{query} query"),
        )
        for query in ("constant", "content", "position")
        for key in ("content", "position")
    ]
    alone = {
        "position": ("position", "offset alone"),
        "content": ("content", "key token alone"),
        "interaction": ("both", "both together"),
    }
    rotary = [
        _metric(
            f"qk_share_{part}{suffix}",
            f"QK score variance: {part}{', normalised rows' if suffix else ''}",
            f"V_{part} / sum",
            0.0,
            1.0,
            {"embedding", "rotary"},
            topic="position",
            share=None if suffix else share,
        )
        for suffix in ("", "_normalised")
        for part, share in alone.items()
    ]
    return [*learned, *rotary]


def _simulated() -> list[Metric]:
    """Return the metrics for attention on random tokens that occur twice, in column order."""
    places = {
        "previous": "the previous token",
        "duplicate": "the token's first copy",
        "induction": "the token after its first copy",
        "self": "itself",
        "first": "the first token",
    }
    needs: set[Needs] = {"embedding", "positions", "offsets"}
    return [
        _metric(
            f"qk_simulated_{name}",
            f"simulated attention to {place}",
            "mean softmax attention there, effective embeddings of random tokens that occur twice",
            0.0,
            1.0,
            needs,
            topic="position",
        )
        for name, place in places.items()
    ]


_METRICS = [
    _metric("ov_copying", "OV copying", "sum lambda / sum |lambda| of W_E W_OV W_U", -1.0, 1.0, {"unembedding"}, None, "Elhage et al. 2021", full_circuit=True, topic="copying", ratio_of="vocab", legend="1 if attending to a token raises its own logit, -1 if it lowers it", **_at("depth, curve, histogram, atlas, column, profile", COPYING)),
    _metric("ov_copying_block0", "OV copying, block 0 embeddings", "the same of E W_OV W_U, E the block0 embeddings, layers >= 1", -1.0, 1.0, {"unembedding", "block0"}, full_circuit=True, topic="copying", **_at("depth, curve, profile", COPYING)),
    *_spectral(Circuit.ov),
    _metric("ov_diagonal_top10", "OV diagonal among the 10 largest", "share of tokens t with L_tt among the 10 largest of row t, L = E' W_OV W_U", 0.0, 1.0, {"unembedding", "diagonals"}, None, "McDougall et al. 2023", topic="copying"),
    _metric("ov_diagonal_bottom10", "OV diagonal among the 10 smallest", "share of tokens t with L_tt among the 10 smallest of row t, L = E' W_OV W_U", 0.0, 1.0, {"unembedding", "diagonals"}, None, "McDougall et al. 2023", topic="copying"),
    _metric("qk_matching", "QK matching", "sum lambda / sum |lambda| of W_E W_QK W_E^T", -1.0, 1.0, {"embedding"}, None, "Elhage et al. 2021", full_circuit=True, topic="copying", ratio_of="vocab", legend="1 if the head looks for its own token, -1 if it avoids it", **_at("depth, curve, histogram, atlas, column, profile", COPYING)),
    _metric("qk_matching_block0", "QK matching, block 0 embeddings", "the same with block0 embeddings, layers >= 1", -1.0, 1.0, {"embedding", "block0"}, full_circuit=True, topic="copying", **_at("depth, curve, profile", COPYING)),
    _metric("qk_symmetry_vocab", "QK symmetry between tokens", "tr(W_QK G W_QK G) / tr(W_QK^T G W_QK G)", -1.0, 1.0, {"embedding"}, topic="symmetry", **_at("curve", SYMMETRY_OF_TOKENS)),
    *_spectral(Circuit.qk),
    _metric("qk_diagonal_first", "QK diagonal first of its row", "share of tokens t with S_tt the largest of row t, S = W_U^T W_QK E'^T", 0.0, 1.0, {"unembedding", "diagonals"}, None, "McDougall et al. 2023", topic="copying"),
    *_shares(),
    _metric("qk_positional_share", "QK positional share", "sum of the *_position shares (learned); position share (rotary)", 0.0, 1.0, {"embedding", "positions"}, topic="position", column="position", legend="share of the QK score's variance that is positional", **_at("depth, curve, histogram, atlas, column", POSITION)),
    _metric("qk_positional_share_normalised", "QK positional share, normalised rows", "position share of normalised rows", 0.0, 1.0, {"embedding", "rotary"}, topic="position"),
    _metric("qk_offset_r2", "QK offset R^2", "adjusted R^2 of s_ij = a_i + f(i - j)", None, 1.0, {"learned", "offsets"}, topic="position"),
    _metric("qk_prev_auc", "QK previous-token AUC", "share of positions scored below the previous one", 0.0, 1.0, {"positions", "offsets"}, 0.5, topic="position", column="previous AUC", legend="share of earlier positions that score below the previous one", **_at("curve, residual column", PREVIOUS)),
    *_simulated(),
    _metric("qk_composed_margin", "QK match with moved tokens, margin", "max over senders s, mean_t (L_tt - mean of L_ut) / sd of L_ut, L = e W_QK (e W_OV(s))^T", None, None, {"embedding", "block0", "positions", "offsets"}, topic="composition"),
    _words("ov_task_auc", "OV copying of task tokens", "mean_t share of u with L_tu < L_tt, L = e W_OV W_U, columns centred", 0.0, 1.0, {"unembedding", "task"}, 0.5, **_at("curve, histogram", WORDS)),
    _words("ov_task_auc_raw", "OV copying of task tokens, uncentred", "the same, columns not centred", 0.0, 1.0, {"unembedding", "task"}, 0.5),
    _words("ov_task_margin", "OV copying of task tokens, margin", "mean_t (L_tt - mean of L_st) / sd of L_st, s != t, L = e W_OV W_U", None, None, {"unembedding", "task"}, 0.0),
    _words("ov_task_copy", "OV copy score (top 5)", "share of t with its own logit in the top 5 under W_OV", 0.0, 1.0, {"unembedding", "task"}, None, "Wang et al. 2022", other_words=None, in_top=1),
    _words("ov_task_suppress", "OV suppression score (top 5)", "share of t with its own logit in the top 5 under -W_OV", 0.0, 1.0, {"unembedding", "task"}, None, "Wang et al. 2022", other_words=None, in_top=-1),
    _pairs("ov_relation_score", "OV relation score (top 10)", "share of pairs (s, t) with t among the 10 largest of row s of E' W_OV W_U (copying: the largest)", 0.0, 1.0, {"unembedding", "task"}, None, "Elhelo & Geva 2024", in_top=1),
    _pairs("ov_relation_suppress", "OV suppression of the relation (top 10)", "the same under -W_OV", 0.0, 1.0, {"unembedding", "task"}, None, "Elhelo & Geva 2024", in_top=-1),
    _pairs("ov_relation_first", "OV relation, first of its kind", "share of pairs (s, t) with L_st the largest among words of their kind, L = E' W_OV W_U", 0.0, 1.0, {"unembedding", "task"}, None, "Gould et al. 2023"),
    _pairs("ov_relation_auc", "OV relation among targets", "mean over pairs (s, t) of the share of other targets u with L_su < L_st, columns centred", 0.0, 1.0, {"unembedding", "task"}, 0.5),
    _subspace("ov_task_transfer", "OV transfer of the contrast", "a W_OV b^T / sigma_1", -1.0, 1.0, {"unembedding", "task"}, 0.0, variable=VariableKind.contrast),
    _subspace("ov_task_read", "OV reading of the contrast", "d |a W_OV|^2 / |W_OV|_F^2", 0.0, None, {"embedding", "task"}, 1.0, reads=True, variable=VariableKind.contrast),
    _subspace("ov_read_alignment", "OV reading of the task subspace", "|P_r W_OV|_F^2 / |W_OV|_F^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0, reads=True, side="reading"),
    _subspace("ov_task_alignment", "OV writing of the task subspace", "|W_OV P_w|_F^2 / |W_OV|_F^2 / (r/d)", 0.0, None, {"unembedding", "task"}, 1.0, side="writing", column="OV align", **_at("curve, column", SUBSPACES)),
    _subspace("ov_top_alignment", "OV top direction in the task subspace", "|P_w v_1|^2 / (r/d)", 0.0, None, {"unembedding", "task"}, 1.0),
    _words("qk_task_auc", "QK matching of task tokens", "mean_t share of u with L_tu < L_tt, L = e W_QK e^T, columns centred", 0.0, 1.0, {"embedding", "task"}, 0.5, **_at("curve, histogram", WORDS)),
    _words("qk_task_auc_raw", "QK matching of task tokens, uncentred", "the same, columns not centred", 0.0, 1.0, {"embedding", "task"}, 0.5),
    _words("qk_task_margin", "QK matching of task tokens, margin", "mean_t (L_tt - mean of L_st) / sd of L_st, s != t, L = e W_QK e^T", None, None, {"embedding", "task"}, 0.0),
    _words("qk_task_auc_unembed", "QK matching of unembedding queries", "qk_task_auc with unembedding columns as queries", 0.0, 1.0, {"unembedding", "task"}, 0.5, "McDougall et al. 2023"),
    _subspace("qk_query_alignment", "QK query side in the task subspace", "|P_r W_QK|_F^2 / |W_QK|_F^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0, side="query"),
    _subspace("qk_key_alignment", "QK key side in the task subspace", "|W_QK P_r|_F^2 / |W_QK|_F^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0, side="key", column="QK align", **_at("curve, column", SUBSPACES)),
    _subspace("qk_top_query_alignment", "QK top query direction in the task subspace", "|P_r u_1|^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
    _subspace("qk_top_key_alignment", "QK top key direction in the task subspace", "|P_r v_1|^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
    _pair("q_composition", "Q-composition", "|W_OV(s) W_QK(r)| / (|W_OV(s)| |W_QK(r)|)", 0.0, "query"),
    _pair("k_composition", "K-composition (percentile in the sender's layer)", "|W_OV(s) W_QK(r)^T| / (|W_OV(s)| |W_QK(r)|)", 0.0, "key"),
    _pair("v_composition", "V-composition", "|W_OV(s) W_OV(r)| / (|W_OV(s)| |W_OV(r)|)", 0.0, "value"),
    _pair("q_component_composition", "Q-composition of the strongest component", "max_i |v_i^T W_QK(r)| / |W_QK(r)|, v_i of W_OV(s)", 0.0, "query"),
    _pair("k_component_composition", "K-composition of the strongest component", "max_i |v_i^T W_QK(r)^T| / |W_QK(r)|, v_i of W_OV(s)", 0.0, "key"),
    _pair("v_component_composition", "V-composition of the strongest component", "max_i |v_i^T W_OV(r)| / |W_OV(r)|, v_i of W_OV(s)", 0.0, "value"),
    _pair("k_composed_matching", "K-composed matching", "sum lambda / sum |lambda| of token -> OV(s) -> keys of r", -1.0, "key", "receiver"),
]  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
"""Every metric; those for heads in column order."""


def named(asked: Callable[[Metric], bool]) -> tuple[str, ...]:
    """Name the metrics for which this is true, in order."""
    return tuple(name for name, metric in METRICS.items() if asked(metric))


def shown_in(place: Place) -> list[str]:
    """Name the metrics that this place shows, in order."""
    return sorted(named(lambda metric: place in metric.shown), key=lambda name: METRICS[name].order)


def ratios() -> dict[tuple[str, str], str]:
    """Return (circuit, space) -> the metric that is drawn below that circuit's eigenvalues in that space."""
    return {(m.circuit, m.ratio_of): m.name for m in METRICS.values() if m.circuit and m.ratio_of}


def shares() -> dict[Literal["learned", "rotary"], dict[Part, dict[str, str]]]:
    """Return position kind -> part of the key -> metric -> its name among that part's shares."""
    kinds: tuple[Literal["learned"], Literal["rotary"]] = ("learned", "rotary")
    found: dict[Literal["learned", "rotary"], dict[Part, dict[str, str]]] = {kind: {} for kind in kinds}
    for part in get_args(Part):
        for metric in METRICS.values():
            if metric.share is not None and metric.share[0] == part:
                kind = next(kind for kind in kinds if kind in metric.needs)
                found[kind].setdefault(part, {})[metric.name] = metric.share[1]
    return found


HEAD_METRICS = {name: METRICS[name] for name in named(lambda metric: metric.of != "pair")}
"""The metrics for heads: the columns of heads.parquet."""
COMPOSITION_METRICS = named(lambda metric: metric.of == "pair")
"""The metrics for pairs of heads."""


def metric_names(circuits: Sequence[Circuit]) -> list[str]:
    """Return these circuits' columns, in order."""
    return [name for name, metric in METRICS.items() if metric.circuit in circuits]
