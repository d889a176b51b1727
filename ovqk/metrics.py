"""The registry of per-head metrics: what each column of heads.parquet is called, means and may be.

A leaf: it names metrics and computes none, so tables, messages and plots can label themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ovqk.config.schema import Circuit

SCHEMA_VERSION = 7
"""Bumped when a number may change: cells of another version are computed again."""

NOT_APPLICABLE = "not applicable: "
"""Begins the reasons that lie in the kind of model or task, and not in something that is missing."""

Needs = Literal["weights", "embedding", "unembedding", "task", "learned", "rotary", "positions", "composition"]


@dataclass(frozen=True)
class Metric:
    """One column.

    Attributes:
        name: the column's name.
        circuit: whose circuit it describes.
        title: a plot's or table's label.
        formula: as in the definitions.
        low, high: the range; None where unbounded.
        source: where it comes from.
        needs: what must be there for it to be computed.
        chance: its value for a head with nothing to do with the task, where it has one.
    """

    name: str
    circuit: Circuit
    title: str
    formula: str
    low: float | None
    high: float | None
    source: str
    needs: frozenset[Needs]
    chance: float | None = None


def _spectral(circuit: Circuit) -> list[Metric]:
    matrix = "W_OV" if circuit == "ov" else "W_QK"
    residual_ratio = "copying_residual" if circuit == "ov" else "matching_residual"
    rows: list[tuple[str, str, str, float | None, float | None, str]] = [
        (
            residual_ratio,
            "eigenvalue sign, residual space",
            "sum lambda / sum |lambda|",
            -1.0,
            1.0,
            "Elhage et al. 2021",
        ),
        ("symmetry", "symmetry", "tr(M M) / |M|_F^2", -1.0, 1.0, "Saponati et al. 2025"),
        ("skew_rotation", "rotation", "sum |Im lambda| / sum |lambda|", 0.0, 1.0, ""),
        (
            "nonnormality",
            "departure from normality",
            "sqrt(|M|_F^2 - sum |lambda|^2) / |M|_F",
            0.0,
            1.0,
            "Henrici 1962",
        ),
        ("frobenius_norm", "Frobenius norm", "sqrt(sum sigma^2)", 0.0, None, ""),
        ("spectral_norm", "spectral norm", "sigma_1", 0.0, None, ""),
        ("stable_rank", "stable rank", "sum sigma^2 / sigma_1^2", 0.0, None, "Rudelson & Vershynin 2007"),
        ("participation_ratio", "participation ratio", "(sum sigma^2)^2 / sum sigma^4", 0.0, None, ""),
        ("effective_rank_energy", "effective rank of energies", "exp H(sigma^2 / sum sigma^2)", 0.0, None, ""),
        ("effective_rank", "effective rank", "exp H(sigma / sum sigma)", 0.0, None, "Roy & Vetterli 2007"),
        ("rank90", "rank at 90 % energy", "components for 90 % of sum sigma^2", 0.0, None, ""),
        ("top_share", "top energy share", "sigma_1^2 / sum sigma^2", 0.0, 1.0, ""),
        ("flatness", "spectral flatness", "geometric / arithmetic mean of sigma^2", 0.0, 1.0, ""),
    ]
    return [
        Metric(
            name=f"{circuit}_{name}",
            circuit=circuit,
            title=f"{circuit.upper()} {title}",
            formula=formula.replace("M", matrix) if "M" in formula else formula,
            low=low,
            high=high,
            source=source,
            needs=frozenset({"weights"}),
        )
        for name, title, formula, low, high, source in rows
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
) -> Metric:
    circuit: Circuit = "ov" if name.startswith("ov_") else "qk"
    return Metric(name, circuit, title, formula, low, high, source, frozenset(needs), chance)


def _shares() -> list[Metric]:
    learned = [
        _metric(
            f"qk_share_{query}_{key}",
            f"QK score variance: {query} query, {key} key",
            "tr(A_a B_b) / sum",
            0.0,
            1.0,
            {"embedding", "learned"},
        )
        for query in ("constant", "content", "position")
        for key in ("content", "position")
    ]
    rotary = [
        _metric(
            f"qk_share_{part}{suffix}",
            f"QK score variance: {part}{', normalised rows' if suffix else ''}",
            f"V_{part} / sum",
            0.0,
            1.0,
            {"embedding", "rotary"},
        )
        for suffix in ("", "_normalised")
        for part in ("position", "content", "interaction")
    ]
    return [*learned, *rotary]


_METRICS = [
    _metric("ov_copying", "OV copying", "sum lambda / sum |lambda| of W_E W_OV W_U", -1.0, 1.0, {"unembedding"}, None, "Elhage et al. 2021"),
    _metric("ov_copying_block0", "OV copying, block 0 embeddings", "the same of E W_OV W_U, E the block0 embeddings, layers >= 1", -1.0, 1.0, {"unembedding"}),
    *_spectral("ov"),
    _metric("qk_matching", "QK matching", "sum lambda / sum |lambda| of W_E W_QK W_E^T", -1.0, 1.0, {"embedding"}, None, "Elhage et al. 2021"),
    _metric("qk_matching_block0", "QK matching, block 0 embeddings", "the same with block0 embeddings, layers >= 1", -1.0, 1.0, {"embedding"}),
    _metric("qk_symmetry_vocab", "QK symmetry between tokens", "tr(W_QK G W_QK G) / tr(W_QK^T G W_QK G)", -1.0, 1.0, {"embedding"}),
    *_spectral("qk"),
    *_shares(),
    _metric("qk_positional_share", "QK positional share", "sum of the *_position shares (learned); position share (rotary)", 0.0, 1.0, {"embedding", "positions"}),
    _metric("qk_positional_share_normalised", "QK positional share, normalised rows", "position share of normalised rows", 0.0, 1.0, {"embedding", "rotary"}),
    _metric("qk_offset_r2", "QK offset R^2", "adjusted R^2 of s_ij = a_i + f(i - j)", None, 1.0, {"learned"}),
    _metric("qk_prev_auc", "QK previous-token AUC", "share of positions scored below the previous one", 0.0, 1.0, {"positions"}, 0.5),
    _metric("ov_task_auc", "OV copying of task tokens", "mean_t share of u with L_tu < L_tt, L = e W_OV W_U, columns centred", 0.0, 1.0, {"unembedding", "task"}, 0.5),
    _metric("ov_task_auc_raw", "OV copying of task tokens, uncentred", "the same, columns not centred", 0.0, 1.0, {"unembedding", "task"}, 0.5),
    _metric("ov_task_copy", "OV copy score (top 5)", "share of t with its own logit in the top 5 under W_OV", 0.0, 1.0, {"unembedding", "task"}, None, "Wang et al. 2022"),
    _metric("ov_task_suppress", "OV suppression score (top 5)", "share of t with its own logit in the top 5 under -W_OV", 0.0, 1.0, {"unembedding", "task"}, None, "Wang et al. 2022"),
    _metric("ov_task_transfer", "OV transfer of the contrast", "a W_OV b^T / sigma_1", -1.0, 1.0, {"unembedding", "task"}, 0.0),
    _metric("ov_task_read", "OV reading of the contrast", "d |a W_OV|^2 / |W_OV|_F^2", 0.0, None, {"embedding", "task"}, 1.0),
    _metric("ov_read_alignment", "OV reading of the task subspace", "|P_r W_OV|_F^2 / |W_OV|_F^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
    _metric("ov_task_alignment", "OV writing of the task subspace", "|W_OV P_w|_F^2 / |W_OV|_F^2 / (r/d)", 0.0, None, {"unembedding", "task"}, 1.0),
    _metric("ov_top_alignment", "OV top direction in the task subspace", "|P_w v_1|^2 / (r/d)", 0.0, None, {"unembedding", "task"}, 1.0),
    _metric("qk_task_auc", "QK matching of task tokens", "mean_t share of u with L_tu < L_tt, L = e W_QK e^T, columns centred", 0.0, 1.0, {"embedding", "task"}, 0.5),
    _metric("qk_task_auc_raw", "QK matching of task tokens, uncentred", "the same, columns not centred", 0.0, 1.0, {"embedding", "task"}, 0.5),
    _metric("qk_task_auc_unembed", "QK matching of unembedding queries", "qk_task_auc with unembedding columns as queries", 0.0, 1.0, {"unembedding", "task"}, 0.5, "McDougall et al. 2023"),
    _metric("qk_query_alignment", "QK query side in the task subspace", "|P_r W_QK|_F^2 / |W_QK|_F^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
    _metric("qk_key_alignment", "QK key side in the task subspace", "|W_QK P_r|_F^2 / |W_QK|_F^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
    _metric("qk_top_query_alignment", "QK top query direction in the task subspace", "|P_r u_1|^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
    _metric("qk_top_key_alignment", "QK top key direction in the task subspace", "|P_r v_1|^2 / (r/d)", 0.0, None, {"embedding", "task"}, 1.0),
]  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
"""Every per-head metric, in the order of the columns."""

COMPOSITION_METRICS = ("q_composition", "k_composition", "v_composition", "k_composed_matching")
"""Metrics of head pairs that a role may predict; not columns of heads.parquet."""


def metric_names(circuits: Sequence[str]) -> list[str]:
    """The columns of these circuits, in order."""
    return [name for name, metric in METRICS.items() if metric.circuit in circuits]
