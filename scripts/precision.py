"""What a place among a role's candidates is worth: precision at 1, 3 and 10, of planted and of measured heads.

    python scripts/precision.py --planted 6
    python scripts/precision.py --cells RESULTS_DIR [RESULTS_DIR ...] --kv-heads smollm2-135m-instruct=3 mini-llama=4
    python scripts/precision.py --repeats MODEL [MODEL ...]

Heads are ranked as candidates are: by the predictions that rank, else by the first that has a value. Precision at k
is the share of the first k heads, over all models, that have the role. Roles that compose alone are not ranked.

    planted   models of docs/calibration.md, several shapes, layers of random heads on top of them, noise
    cells     finished cells that ran prompts: the heads that are `measured` there (docs/definitions.md, section 7).
              Roles that no head of a model has are counted too, as a user meets them
    repeats   heads that look where their role says on random repeats (scripts/evidence_on_repeats.py)

In brackets the exact 95 % interval (Clopper and Pearson), which counts heads of one model as independent. `base rate`
is the share of all heads ranked that have the role: the precision of heads drawn at random. `q <= 0.05` are the heads
that `q_depth` would pass, corrected over all heads: how many of them have the role.
"""

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from evidence_on_repeats import ASKED, cell_of, metrics, on_repeats
from numpy.typing import NDArray

from ovqk import wording
from ovqk.config.schema import Direction, PredictionConfig, register
from ovqk.metrics import METRICS
from ovqk.testing.metric_ranks import Values
from ovqk.testing.null_models import interval
from ovqk.testing.planted import LAYOUT, base_config, judged, planted
from ovqk.verdicts.candidates import Ranking, add_ranking
from ovqk.verdicts.depth import depth_reference
from ovqk.verdicts.nulls import Predicted
from ovqk.verdicts.statistics import ALPHA, benjamini_hochberg
from ovqk.weights.types import Head

FIRST = (1, 3, 10)
NOISES = (0.0, 0.5, 0.8, 0.9, 0.95)
MODELS = (("learned positions", 24, None), ("rotary, grouped queries", 24, None), ("rotary, grouped queries", 12, 24))
"""Shape, heads in a layer, and layers (as many as the planted heads need if None)."""


@dataclass
class Found:
    """What was counted of one row of a table.

    Attributes:
        models: how many rankings, one for a role in a model.
        with_role: how many of them are of a model that has a head of the role.
        heads, ranked: heads that have the role, and all that were ranked.
        hits, places: k -> how many of the first k heads have the role, and how many places that is.
        passed, passed_hits: heads with q <= 0.05, and how many of them have the role.
    """

    models: int = 0
    with_role: int = 0
    heads: int = 0
    ranked: int = 0
    hits: dict[int, int] = field(default_factory=lambda: dict.fromkeys(FIRST, 0))
    places: dict[int, int] = field(default_factory=lambda: dict.fromkeys(FIRST, 0))
    passed: int = 0
    passed_hits: int = 0

    def add(self, ranking: Ranking, role: Collection[Head], groups: NDArray[np.int64]) -> None:
        """Count one model's heads."""
        self.models += 1
        self.with_role += bool(role)
        self.heads += len(set(role) & set(ranking.heads))
        self.ranked += len(ranking.heads)
        for k in FIRST:
            self.hits[k] += sum(head in role for head in ranking.heads[:k])
            self.places[k] += len(ranking.heads[:k])
        chosen = passing(ranking.by.sign * ranking.by.values, groups)
        self.passed += len(chosen)
        self.passed_hits += len(chosen & set(role))

    def cells(self) -> list[str]:
        """Return the row's cells, from `models` on."""
        shares = []
        for k in FIRST:
            low, high = interval(self.hits[k], self.places[k])
            shares.append(f"{self.hits[k] / self.places[k]:.2f} [{low:.2f}, {high:.2f}]")
        models = f"{self.models}" if self.with_role == self.models else f"{self.models}, in {self.with_role} the role"
        return [models, *shares, f"{self.heads / self.ranked:.3f}", f"{self.passed_hits} of {self.passed}"]


def passing(signed: Values, groups: NDArray[np.int64]) -> set[Head]:
    """Return the heads whose p under `depth`, corrected over all heads, is at most 0.05."""
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(~np.isnan(signed))]
    near = {head: depth_reference(signed, head, set(), groups) for head in heads}
    ps = {head: found.counts().p for head, found in near.items() if found is not None}
    return {head for head, q in zip(ps, benjamini_hochberg(list(ps.values())), strict=True) if q <= ALPHA}


def rankings(heads: pd.DataFrame, predictions: Mapping[str, Sequence[PredictionConfig]]) -> dict[str, Ranking]:
    """Rank all heads for each role, from heads.parquet; roles that compose alone are left out."""
    heads = heads.sort_values(["layer", "head"])
    shape = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    found: dict[str, Ranking] = {}
    for role, configs in predictions.items():
        rows = []
        for place, config in enumerate(configs):
            if METRICS[config.metric].of == "pair" or config.metric not in heads or config.direct_only:
                continue
            values = heads[config.metric].to_numpy(float).reshape(shape).copy()
            if config.first_layer is not None and config.first_layer in heads:
                values[0] = heads[config.first_layer].to_numpy(float).reshape(shape)[0]
            rows.append(Predicted(role, config, place == 0, values))
        if rows:
            add_ranking(found, role, rows, [])
    return found


def predictions_of(task: str) -> dict[str, list[PredictionConfig]]:
    """Return role -> predictions of a task."""
    return {role: list(config.predictions) for role, config in base_config(task).task.roles.items()}


def of_planted(seeds: int) -> Iterator[tuple[tuple[str, ...], Found]]:
    """Yield ((role, noise), counts) over all shapes, then ((role, model), counts) at noise 0.8."""
    by_noise: dict[tuple[str, ...], Found] = {}
    by_model: dict[tuple[str, ...], Found] = {}
    for noise, (shape, per_layer, layers), task, seed in product(NOISES, MODELS, LAYOUT, range(seeds)):
        model = planted(shape, task, seed, noise, per_layer, layers)
        facts = model.architecture
        found = rankings(judged(model, LAYOUT[task], draws=1).tables["heads"], predictions_of(task))
        for role, ranking in found.items():
            if role not in LAYOUT[task]:
                continue
            names = [(by_noise, (wording.role(role), f"{noise:g}"))]
            if noise == 0.8:
                label = f"{shape}, {facts.n_layers} layers of {facts.n_heads}"
                names.append((by_model, (wording.role(role), label)))
            for table, key in names:
                table.setdefault(key, Found()).add(ranking, set(LAYOUT[task][role]), facts.kv_of_head.numpy())
    yield from by_noise.items()
    yield from by_model.items()


def of_cells(folders: Sequence[Path], kv: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], Found]]:
    """Yield ((role, task), counts) over the models of finished cells, with and without a head of the role."""
    counts: dict[tuple[str, ...], Found] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/*/*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        ran = record.get("activations") or {}
        if record["status"] != "done" or ran.get("untestable") or not ran:
            continue
        heads, table = pd.read_parquet(path.parent / "heads.parquet"), path.parent / "roles.parquet"
        n_heads = int(heads["head"].max()) + 1
        groups = np.arange(n_heads) // (n_heads // kv.get(record["model"], n_heads))
        own: dict[str, set[Head]] = {}
        if table.is_file():
            rows = pd.read_parquet(table)
            rows = rows[rows["head"].notna() & rows["measured"].astype(bool) & (rows["verdict"] != "sensitive")]
            for role, layer, head in rows[["role", "layer", "head"]].itertuples(index=False):
                own.setdefault(role, set()).add((int(layer), int(head)))
        for role, ranking in rankings(heads, predictions_of(record["task"])).items():
            for where in (record["task"], "each role that a head has") if own.get(role) else (record["task"],):
                key = (where, wording.role(role)) if where == record["task"] else ("all", where)
                counts.setdefault(key, Found()).add(ranking, own.get(role, set()), groups)
            counts.setdefault(("all", "every role"), Found()).add(ranking, own.get(role, set()), groups)
    yield from sorted(counts.items())


def of_repeats(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Found]]:
    """Yield ((role, metric), counts) over models that are run on random repeats."""
    counts: dict[tuple[str, ...], Found] = {}
    roles = predictions_of("induction")
    for name in names:
        cell = cell_of(name)
        behaviour = on_repeats(cell)
        values, groups = metrics(cell)
        for role, (place, columns) in ASKED.items():
            for metric in (metric for metric in columns if metric in values):
                found: dict[str, Ranking] = {}
                config = PredictionConfig(metric, Direction.high)
                add_ranking(found, role, [Predicted(role, config, primary=True, values=values[metric])], [])
                key = (wording.role(role), f"`{metric}`")
                counts.setdefault(key, Found()).add(found[role], behaviour.role(place), groups)
            together = [config for config in roles.get(role, ()) if config.ranks]
            if together and all(config.metric in values for config in together):
                named = " and ".join(f"`{config.metric}`" for config in together)
                made = [Predicted(role, config, primary=False, values=values_of(config, values)) for config in together]
                found = {}
                add_ranking(found, role, made, [])
                key = (wording.role(role), f"{named}, worse place")
                counts.setdefault(key, Found()).add(found[role], behaviour.role(place), groups)
    yield from counts.items()


def values_of(config: PredictionConfig, values: Mapping[str, Values]) -> Values:
    """Return a prediction's metric, [layer, head], with the one for layer 0 if it has another there."""
    found = values[config.metric].copy()
    if config.first_layer is not None:
        found[0] = values[config.first_layer][0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=int, default=0, help="planted models of each shape, task and noise")
    parser.add_argument("--cells", type=Path, nargs="*", default=[])
    parser.add_argument("--kv-heads", nargs="*", default=[], metavar="MODEL=N", help="of models with grouped queries")
    parser.add_argument("--repeats", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    register()
    kv = {name: int(n) for name, n in (given.split("=") for given in options.kv_heads)}
    rows: list[tuple[tuple[str, ...], Found]] = []
    rows += of_planted(options.planted) if options.planted else ()
    rows += of_cells(options.cells, kv) if options.cells else ()
    rows += of_repeats(options.repeats) if options.repeats else ()
    header = ["", "", "rankings", *(f"precision at {k}" for k in FIRST), "base rate", "q <= 0.05"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for key, found in rows:
        print("| " + " | ".join([*key, *found.cells()]) + " |")


if __name__ == "__main__":
    main()
