"""A cell's results on prompts, arranged for readers: heads by reading, and weights against prompts.

Nothing is measured here. The numbers come from `activations`, `roles` and `joint` (definitions: section 7).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ovqk import wording
from ovqk.records.record import done_records
from ovqk.records.results import load_table
from ovqk.verdicts.statistics import ALPHA

TESTING = "testing"
JOINT = ("kind", "role", "layer", "head", "claimed", "measured", "weights", "activations", "reading")
STATISTICS = (
    "n_measured",
    "n_heads",
    "auc",
    "auc_low",
    "auc_high",
    "auc_in_layers",
    "spearman",
    "split_half",
    "effect_together",
)
MOST_EFFECTS = 8
Json = dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """A role's weight metric and its quantity on prompts, for all heads.

    Attributes:
        role: the role.
        metric: the weights' metric.
        first_layer: the metric that replaces it in layer 0; None if it is the same.
        direction: the prediction's direction, `high` or `low`.
        quantity: the title for the quantity on prompts.
        points: a row for each head: layer, head, weights, prompts, found (a key of `wording.FOUND`).
        statistics: the columns STATISTICS of joint.parquet.
    """

    role: str
    metric: str
    first_layer: str | None
    direction: str
    quantity: str
    points: pd.DataFrame
    statistics: dict[str, float]

    @property
    def titles(self) -> list[str]:
        """The weight metric's title with its predicted sign, and the first layer's metric's title."""
        first = [f"(layer 0: {wording.metric(self.first_layer)})"] if self.first_layer else []
        return [wording.predicted(self.metric, self.direction), *first]

    @property
    def says(self) -> list[str]:
        """Two texts on the ranking: AUC with its interval, also in layers; Spearman, and the most it could reach."""
        auc, low, high = (self.statistics[name] for name in ("auc", "auc_low", "auc_high"))
        interval = f" ({low:.2f} to {high:.2f})" if math.isfinite(low) and math.isfinite(high) else ""
        within = self.statistics["auc_in_layers"]
        interval += f", {within:.2f} in layers" if math.isfinite(within) else ""
        none = "no AUC" if self.statistics["n_measured"] else "no AUC: no head is measured"
        others = [
            f"{title} {_signed(self.statistics[name])}"
            for name, title in wording.RANKED.items()
            if math.isfinite(self.statistics[name])
        ]
        return [f"AUC {auc:.2f}{interval}" if math.isfinite(auc) else none, *([", ".join(others)] if others else [])]


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def role_choice(record: Json, role: str) -> Json:
    """Return a role's `activations` in the record's task; empty if it has none."""
    roles = record["provenance"]["config"]["task"].get("roles") or {}
    return (roles.get(role) or {}).get("activations") or {}


def rankings(record: Json, tables: Mapping[str, pd.DataFrame]) -> list[Ranking]:
    """Return a ranking for each row of joint.parquet about a role, in its order."""
    if not {"joint", "activations", "heads"} <= tables.keys():
        return []
    return [_ranking(record, tables, row) for row in joint_rows(tables["joint"], "role").to_dict("records")]


def joint_rows(joint: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return joint.parquet's rows about heads (`head`) or roles (`role`), with all columns that are read here."""
    whole = joint.reindex(columns=list(dict.fromkeys([*JOINT, *joint.columns])))
    return whole[whole["kind"] == kind]


def _ranking(record: Json, tables: Mapping[str, pd.DataFrame], row: Mapping[Any, Any]) -> Ranking:
    role, metric = row["role"], row["metric"]
    config = record["provenance"]["config"]["task"]["roles"][role]
    prediction = next(each for each in config["predictions"] if each["metric"] == metric)
    first_layer = prediction.get("first_layer")
    heads = tables["heads"].set_index(["layer", "head"]).sort_index()
    weights = heads[metric].to_numpy(float).copy()
    if first_layer:
        first = heads.index.get_level_values("layer") == 0
        weights[first] = heads[first_layer].to_numpy(float)[first]
    rows = _testing(tables["activations"], role).reindex(heads.index)
    quantity, values = _quantity(row["quantity"], config["activations"], rows)
    own = joint_rows(tables["joint"], "head")
    found = {
        (int(each["layer"]), int(each["head"])): wording.found(bool(each["claimed"]), bool(each["measured"]))
        for each in own[own["role"] == role].to_dict("records")
    }
    points = pd.DataFrame(
        {
            "layer": heads.index.get_level_values("layer"),
            "head": heads.index.get_level_values("head"),
            "weights": weights,
            "prompts": values,
            "found": [found.get((int(layer), int(head)), "neither") for layer, head in heads.index],
        }
    )
    statistics = {name: float(row.get(name, np.nan)) for name in STATISTICS}
    return Ranking(role, metric, first_layer, prediction["direction"], quantity, points, statistics)


def _testing(activations: pd.DataFrame, role: str) -> pd.DataFrame:
    rows = activations[(activations["role"] == role) & (activations["half"] == TESTING)]
    return rows.set_index(["layer", "head"])


def _quantity(name: str, choice: Json, rows: pd.DataFrame) -> tuple[str, np.ndarray]:
    """Return the ranking quantity's title and values: a write times its sign, or attention minus its control."""
    values = rows[name].to_numpy(float)
    if name == "write":
        write = choice["write"]
        ends = ("answer", "other") if write["sign"] > 0 else ("other", "answer")
        return wording.PROMPT_QUANTITIES[name].format(answer=write[ends[0]], other=write[ends[1]]), write[
            "sign"
        ] * values
    if name == "attention":
        values = values - rows["attention_control"].to_numpy(float)
    return wording.PROMPT_QUANTITIES[name].format(**_labels(choice)), values


def _labels(choice: Json) -> dict[str, str]:
    """Return a role's labels, and the quantity on which its effect is measured, for the titles in `wording`."""
    attention, write, effect = (choice.get(kind) or {} for kind in ("attention", "write", "effect"))
    into = f"{wording.role(effect['into'])} heads' attention" if effect.get("into") else "the logit difference"
    given = f" without {wording.role(effect['given'])} heads" if effect.get("given") else ""
    found = {name: attention.get(name, "the source") for name in ("query", "source", "control")}
    found |= {"repeats": wording.REPEATS.get(choice.get("repeats") or "", "")}
    return found | {name: write.get(name, "") for name in ("answer", "other")} | {"into": into + given}


def pictures(record: Json, role: str) -> list[Json]:
    """Return the bars that show a head's quantities for a role: kind, title, and columns with their labels."""
    choice = role_choice(record, role)
    labels = _labels(choice)
    return [
        {
            "kind": kind,
            "title": wording.PROMPT_KINDS[kind].format(**labels),
            "decides": kind in choice["decides"],
            "bars": [[column, label.format(**labels)] for column, label in bars.items()],
        }
        for kind, bars in wording.PROMPT_BARS.items()
        if choice.get(kind)
    ]


def head_table(joint: pd.DataFrame, roles: pd.DataFrame) -> pd.DataFrame:
    """Return one row per role and claimed or chosen head, measured ones first, then claimed ones.

    Columns: role, layer, head, measured, found (in words), the quantities in `wording.PROMPT_COLUMNS`, weights and
    activations (both verdicts), reading, reason.
    """
    more = ["score_contrast", "score_key_partner", "score_query_partner"]
    wanted = ["role", "layer", "head", "reason", *wording.PROMPT_COLUMNS, *more]
    heads = joint_rows(joint, "head")[
        ["role", "layer", "head", "claimed", "measured", "weights", "activations", "reading"]
    ]
    if not len(heads):
        return pd.DataFrame()
    heads = heads.astype({"layer": int, "head": int, "claimed": bool, "measured": bool})
    order = {role: place for place, role in enumerate(dict.fromkeys(heads["role"]))}
    heads = heads.assign(place=heads["role"].map(order)).sort_values(
        ["place", "measured", "claimed"], ascending=[True, False, False], kind="stable"
    )
    keys = [wording.found(*pair) for pair in zip(heads["claimed"], heads["measured"], strict=True)]
    heads["found"] = [wording.CHOSEN if key == "neither" else wording.FOUND[key] for key in keys]
    quantities = roles.reindex(columns=wanted).astype({"layer": int, "head": int})
    whole = heads.merge(quantities, on=["role", "layer", "head"], how="left")
    first = ["role", "layer", "head", "measured", "found"]
    return whole[[*first, *wording.PROMPT_COLUMNS, "weights", "activations", "reading", "reason", *more]]


def head_values(activations: pd.DataFrame) -> pd.DataFrame:
    """Return each head's quantities for each role on the testing half: those in `wording.PROMPT_BARS`."""
    shown = [column for bars in wording.PROMPT_BARS.values() for column in bars]
    errors = [f"{kind}_se" for kind in wording.PROMPT_BARS]
    columns = ["role", "layer", "head", *shown, *errors, "write_link", "write_link_slope"]
    rows = activations[activations["half"] == TESTING]
    return rows[[column for column in columns if column in rows]].reset_index(drop=True)


def readings(joint: pd.DataFrame) -> list[Json]:
    """Group heads by reading and verdicts, in the order of `wording.READINGS`.

    Returns:
        For each group: the reading, both verdicts (None if a head's weights were not tested), and role -> heads.
    """
    heads = joint_rows(joint, "head")
    heads = heads.assign(weights=[value if isinstance(value, str) else "" for value in heads["weights"]])
    found: list[Json] = []
    for (reading, weights, prompts), rows in heads.groupby(["reading", "weights", "activations"], sort=False):
        roles: dict[str, list[str]] = {}
        for row in rows.to_dict("records"):
            roles.setdefault(row["role"], []).append(f"{int(row['layer'])}.{int(row['head'])}")
        found.append({"reading": reading, "weights": weights or None, "prompts": prompts, "roles": roles})
    orders = [list(order) for order in (wording.READINGS, [*wording.VERDICTS, None], wording.ON_PROMPTS)]
    keys = ("reading", "weights", "prompts")
    found.sort(key=lambda group: [order.index(group[key]) for key, order in zip(keys, orders, strict=True)])
    return found


class HeadEffect(NamedTuple):
    """A head's exact effect on the logit difference, and the roles that it is claimed for or measured in."""

    layer: int
    head: int
    effect: float
    roles: list[str]


def largest_effects(record: Json, activations: pd.DataFrame, roles: pd.DataFrame) -> dict[str, list[HeadEffect]]:
    """Return query -> the heads with the largest effects on the logit difference there, whatever their role.

    The largest effect comes first. Effects count if the head was replaced and they are significant on the testing half;
    at most `MOST_EFFECTS` are returned.
    """
    own: dict[tuple[int, int], list[str]] = {}
    for row in roles.to_dict("records"):
        if row["claimed"] or row["measured"]:
            own.setdefault((int(row["layer"]), int(row["head"])), []).append(row["role"])
    found: dict[str, list[HeadEffect]] = {}
    for role in activations["role"].unique():
        choice = role_choice(record, role)
        effect = choice.get("effect")
        if not effect or effect.get("into") or effect.get("given"):
            continue
        query = (choice.get("attention") or {}).get("query", "END")
        rows = _testing(activations, role)
        if query in found or "effect_p" not in rows:
            continue
        rows = rows[(rows[["effect_p", "effect_p_opposite"]].min(axis=1) <= ALPHA) & rows["effect"].notna()]
        rows = rows.sort_values("effect", key=np.abs, ascending=False, kind="stable").head(MOST_EFFECTS)
        places = [(int(layer), int(head)) for layer, head in rows.index]
        found[query] = [
            HeadEffect(*place, float(value), own.get(place, []))
            for place, value in zip(places, rows["effect"], strict=True)
        ]
    return {query: heads for query, heads in found.items() if heads}


def outdone_roles(joint: pd.DataFrame) -> dict[str, float]:
    """Return role -> p, for roles whose heads together could stand out among other heads, and do not."""
    rows = joint_rows(joint, "role").reindex(columns=["role", "peers_p", "peers_min_p"])
    rows = rows[(rows["peers_min_p"] <= ALPHA) & (rows["peers_p"] > ALPHA)]
    return {str(role): float(p) for role, p in zip(rows["role"], rows["peers_p"], strict=True)}


def verdict_counts(roles: pd.DataFrame, heads: pd.DataFrame) -> dict[str, int]:
    """Count these heads' verdicts on prompts (columns role, layer, head): verdict -> number of heads."""
    if not len(roles):
        return {}
    keys = ["role", "layer", "head"]
    wanted = heads[keys].astype({"layer": int, "head": int})
    found = wanted.merge(roles[[*keys, "verdict"]].astype({"layer": int, "head": int}), on=keys)
    return {str(verdict): int(count) for verdict, count in found["verdict"].value_counts().items()}


def tasks_done(folders: Iterable[Path]) -> pd.DataFrame:
    """Return one row per cell that ran its model: how well the model does the task, and how many heads are measured.

    Columns: model, task, analysis, cell_id, accuracy, logit_difference (both on the testing half), measured_heads, and
    untestable (why nothing can be tested; empty if tests are possible).
    """
    rows = []
    for folder, record in done_records(folders):
        if record.get("activations") is None:
            continue
        roles, summary = load_table(folder, "roles"), record["summary"]
        measured = roles[roles["measured"].astype(bool)] if roles is not None and len(roles) else pd.DataFrame()
        rows.append(
            {key: record[key] for key in ("model", "task", "analysis", "cell_id")}
            | {key: summary.get(f"prompts/{key}") for key in ("accuracy", "logit_difference")}
            | {
                "measured_heads": len(measured[["layer", "head"]].drop_duplicates()) if len(measured) else 0,
                "untestable": record["activations"].get("untestable", ""),
            }
        )
    return pd.DataFrame(rows)
