"""How often the tests err: p-values where nothing is planted, and power where heads are planted by hand.

    python scripts/calibration.py     # about a quarter of an hour on two cores

The models are those of `ovqk.testing.null_models`. Written to docs/: figures/calibration.svg and .png,
figures/power.svg and .png, and calibration.md with the numbers behind them.

    calibration   random initialisation, heads claimed at random: how often p <= a
    strained      the same where a null has little to draw on
    power         heads of every role planted by hand, with noise mixed into what is planted: how often they are
                  corroborated. At noise 1 nothing is planted, and whatever is corroborated is so falsely
    prompts       p-values of heads on prompts in untrained models, and heads planted by hand in models that run; with
                  `--what prompts` this section alone is made anew, and the rest of the page stays
"""

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ovqk import wording
from ovqk.testing.null_models import (
    FALSE,
    POWER_SHAPES,
    STRAINED,
    SURPRISE,
    TASKS,
    interval,
    least_likely,
    multiplicity,
    null_cells,
    null_run,
    power_run,
    strained_run,
)
from ovqk.testing.planted import FEW, LAYOUT, MANY

mpl.use("Agg")
import matplotlib.pyplot as plt

PROMPTS_TITLE = "## Heads on prompts"
"""The title of the page's last section."""
DOCS = Path(__file__).resolve().parents[1] / "docs"
SMALL = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NOISES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
OUTCOMES = ("corroborated", "partial", "unsupported", "contradicted", "untestable")


def run(function: Callable[[Any], Any], cells: Sequence[Any], processes: int) -> list[Any]:
    """The function of every cell, in order."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(function, cells, chunksize=4)


# --- tables --------------------------------------------------------------------------------------------------


def calibration_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every null and level: how often the primary predictions have p <= a, and where that is least probable."""
    primary, found = rows[rows["primary"]], []
    for null, level in ((null, level) for null in wording.NULLS for level in ("role", "head")):
        mine = primary[(primary["null"] == null) & (primary["level"] == level)]
        if len(mine):
            opposite = {"tail, p opposite": least_likely(mine["p_opposite"].to_numpy())[2]}
            found.append({"null": null, "level": level, **_shares(mine["p"].to_numpy()), **opposite})
    return pd.DataFrame(found)


def strained_table(found: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """The same of every case of STRAINED."""
    return pd.DataFrame(
        [
            {"case": name, "null": STRAINED[name][0], "level": STRAINED[name][1]} | _shares(p)
            for name, p in found.items()
        ]
    )


def _shares(p: NDArray[np.float64]) -> dict[str, Any]:
    a, share, probability = least_likely(p)
    shares = {f"P(p <= {level})": float((p <= level).mean()) for level in SMALL}
    return {"n": len(p)} | shares | {"worst a": a, "share there": share, "tail": probability}


def power_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Of every role and noise: how often its role verdict is corroborated, with its 95 % interval."""
    roles = verdicts[(verdicts["kind"] == "role") & (verdicts["per_layer"] == MANY)]
    found = []
    for (role, noise), rows in roles.groupby(["role", "noise"]):
        good, n = int((rows["verdict"] == "corroborated").sum()), len(rows)
        low, high = interval(good, n)
        found.append({"role": role, "noise": noise, "n": n, "power": good / n, "low": low, "high": high})
    return pd.DataFrame(found)


def outcome_table(verdicts: pd.DataFrame, per_layer: int) -> pd.DataFrame:
    """Of every role planted without noise, and of its heads: the share of each verdict, of all that are planted."""
    clean = verdicts[(verdicts["noise"] == 0.0) & (verdicts["per_layer"] == per_layer)]
    found = []
    for (shape, role, kind), rows in clean.groupby(["shape", "role", "kind"]):
        counts = {verdict: float((rows["verdict"] == verdict).mean()) for verdict in OUTCOMES}
        low, high = interval(int((rows["verdict"] == "corroborated").sum()), len(rows))
        shares = {"n": len(rows), **counts, "corroborated, 95 %": f"[{low:.2f}, {high:.2f}]"}
        least = "" if rows["least_p"].isna().all() else f"{rows['least_p'].median():.3f}"
        found.append({"shape": shape, "planted": role, "verdicts": f"{kind}s", **shares, "smallest depth p": least})
    return pd.DataFrame(found).sort_values(["shape", "verdicts", "planted"], ascending=[True, False, True])


def false_table(nulls: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """How many models without planted heads have a verdict of FALSE on a role, or on a head, all the same."""
    models = nulls.drop_duplicates(["shape", "task", "seed"])
    bare = verdicts[verdicts["noise"] == 1.0]
    keys = [bare[name] for name in ("shape", "task", "seed")]
    found = []
    for verdict, kind in itertools.product(FALSE, ("role", "head")):
        planted_where = ((bare["kind"] == kind) & (bare["verdict"] == verdict)).groupby(keys).any()
        counts = {
            "heads drawn at random": (int((models[f"{verdict}_{kind}"] > 0).sum()), len(models)),
            "heads in the places of planted ones, noise 1": (int(planted_where.sum()), len(planted_where)),
        }
        for which, (wrong, n) in counts.items():
            low, high = interval(wrong, n)
            found.append(
                {"verdict": verdict, "of": f"{kind}s", "claims": which, "models": n, "with one": wrong}
                | {"share": wrong / n, "low": low, "high": high}
            )
    return pd.DataFrame(found)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; shares with three digits, small probabilities with two."""

    def cell(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"

    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- figures -------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"  # Okabe & Ito
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "ovqk", "svg.fonttype": "none", "figure.constrained_layout.use": True,
}  # fmt: skip


def save(figure: Any, name: str) -> None:
    """As SVG and PNG, without the date, so that the same numbers give the same file."""
    (DOCS / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(DOCS / "figures" / f"{name}.svg", metadata={"Date": None})
    figure.savefig(DOCS / "figures" / f"{name}.png", dpi=150)
    plt.close(figure)


def plot_calibration(rows: pd.DataFrame) -> None:
    """P(p <= a) against a, a panel for each null."""
    primary = rows[rows["primary"]]
    figure, axes = plt.subplots(2, 3, figsize=(9, 6), sharex=True, sharey=True)
    a = np.geomspace(0.01, 1, 200)
    for axis, (null, what) in zip(axes.flat, wording.NULLS.items(), strict=True):
        mine = primary[primary["null"] == null]
        groups = {level: mine[mine["level"] == level]["p"].to_numpy() for level in ("role", "head")}
        n = min(len(p) for p in groups.values() if len(p))
        half = 1.96 * np.sqrt(a * (1 - a) / n)
        axis.fill_between(a, np.clip(a - half, 1e-4, 1), np.clip(a + half, 0, 1), color="0.88", lw=0)
        axis.plot(a, a, color="0.45", lw=1, ls="--")
        for (level, p), color, style in zip(groups.items(), (BLUE, RED), ("-", (0, (4, 1))), strict=True):
            if len(p):
                label = f"{level}s ({len(p)} p-values)"
                axis.step(a, [(p <= at).mean() for at in a], where="post", color=color, ls=style, lw=1.6, label=label)
        axis.set(xscale="log", yscale="log", xlim=(0.01, 1), ylim=(0.002, 1), title=f"{null}\n{what}")
        axis.set_xticks([0.01, 0.05, 0.2, 1], ["0.01", "0.05", "0.2", "1"])
        axis.set_yticks([0.01, 0.05, 0.2, 1], ["0.01", "0.05", "0.2", "1"])
        axis.minorticks_off()
        axis.legend(loc="upper left", frameon=False, fontsize=8)
    figure.supxlabel("level a", fontsize=10)
    figure.supylabel("share of p-values at most a", fontsize=10)
    save(figure, "calibration")


def plot_power(table: pd.DataFrame) -> None:
    """Power against what is left of the planted matrix, a line for each role."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    titles = {"ioi": "Indirect object identification", "sva": "Subject-verb agreement"}
    looks = list(zip((BLUE, RED, GREEN, ORANGE, PINK, SKY), "os^Dv<", strict=True))
    ticks, nothing = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005], 0.0025
    for axis, (task, title) in zip(axes, titles.items(), strict=True):
        for place, ((color, marker), role) in enumerate(zip(looks, LAYOUT[task], strict=False)):
            rows = table[table["role"] == role].sort_values("noise")
            left = (1 - rows["noise"]).clip(lower=nothing) * 1.012 ** (2 * place - 5)  # side by side
            bars = [rows["power"] - rows["low"], rows["high"] - rows["power"]]
            label = wording.role(role)
            axis.errorbar(left, rows["power"], yerr=bars, color=color, marker=marker, ms=4, lw=1.4, elinewidth=0.7,
                          label=label)  # fmt: skip
        axis.axhline(0.05, color="0.45", lw=1, ls="--")
        axis.text(1.1, 0.065, "0.05", color="0.35", fontsize=8)
        axis.set(title=title, xscale="log", xlim=(1.2, 0.0021), ylim=(-0.03, 1.05))
        axis.set_xticks([*ticks, nothing], [*map(str, ticks), "none"])
        axis.minorticks_off()
        axis.legend(loc="lower left", bbox_to_anchor=(0.0, 0.14), frameon=False, fontsize=8)
    axes[0].set_ylabel("share of models in which\nthe role is corroborated")
    figure.supxlabel("planted share of the matrix's squared norm (1 - noise)", fontsize=10)
    save(figure, "power")


PAGE = """# How often the tests err

Made by `{command}`, which runs everything again. The models are
transformers in memory with weights at random initialisation (`ovqk/testing/planted.py`): embeddings of 64 dimensions,
heads of 8, about 330 tokens, an MLP in block 0; learned and rotary positions, with and without grouped queries, tied
and untied. Models in which nothing is planted have random gains in every norm and random biases; those with rotary
positions and without grouped queries also have norms of queries and keys. Nulls have 99 draws.
`tests/test_calibration.py` and `tests/test_planted.py` hold the tests to these numbers.

## Nothing planted: p-values

{n_models} random models, 4 layers of 8 heads, each with two heads drawn at random for each role. A p-value keeps its
level where P(p <= a) <= a for every a that it can attain. Counted are the primary predictions, for a head level those
of the role's first head. The last columns give the attained a at which the share is least compatible with that, and
how probable that share or a larger one is for a test that keeps its level (a binomial tail), last for p-values in the
direction opposite to the prediction.

The rule: a test is said not to keep its level where that tail is below {surprise:g}. The tail is the smallest over up
to a hundred levels a, and the table has {n_rows} of them. Of a test that keeps its level exactly (1,000 p-values on 100
levels) it is below {surprise:g} in {row_below:.1%} of cases; of {n_rows} such tests the smallest is
{page_median:.2g} in the median, and below {surprise:g} on {page_below:.0%} of pages. So a share
somewhat above its a is no finding by itself, and a tail of 0.001 somewhere in the table is what to expect.

![Share of p-values at most a, against a, for every null](figures/calibration.png)

{calibration}

Where the curve runs below the diagonal the test is conservative. `layer` has few labelings (in a layer of 8 heads the
p-value of a single head cannot be below 1/8), and grouped queries leave it fewer still. `spectrum` and `token` can
attain any multiple of 0.01.

### Where a null has little to draw on

Random models again, 3 layers of 8 heads, with claims that strain a null:

- uneven layers: 8 of the 12 heads of a layer are claimed, so that its median rests on fewer heads than its
  neighbours' (no models here: independent uniform numbers)
- group mates claimed: three of the four heads that share W_V are claimed to read a number, which is a matter of W_V
- few matched words: two made-up words for each name

{strained}

Where the tail is below {surprise:g} a null does not keep its level. What keeps it here: the trend that a head is
standardised by rests on KV groups, of its own layer or of those around it, and the head takes part in it; reference
heads that share keys and values count as one; surrogates of such heads share their frames; and surrogate words of
a set may be the task's own, since without those they would share words with each other and never with the task.

## Heads planted: power

All roles of a task planted in one model of layers of {many} heads, three heads of a role (eight agreement readers). The
columns are the noise, the random share of the planted matrix's squared norm; at noise 1 nothing is planted. In brackets
the 95 % interval (Clopper and Pearson), of {n_power} models or more: half with {power_shapes}.

![Share of models in which a role is corroborated, against noise](figures/power.png)

{power}

Roles are judged by today's predictions. With `k_composition` as their primary, as it was before, previous-token roles
were corroborated more often at noise .5 to .95, but also if their heads look nowhere:
[what the new primary cost](method.md#what-the-new-primary-cost-on-planted-heads).

### Without noise

Of what is planted whole, the share of each verdict, over {n_clean} models of each shape. Heads of a role whose primary
is a composition are untestable: it is tested for the role as a whole.

{outcomes}

### Without noise, beside few heads

What a single head can reach is a matter of how many heads stand beside it. `depth` compares it with the unclaimed heads
of the smallest window of layers around it that holds 40 KV groups, or of the whole model: if it stands out of all n
groups, its p is 1 / (1 + n), the last column above and below, and if one of them is more extreme by chance, twice that.
With k of m heads' rows as small, q = m / (k (1 + n)). The same heads are planted here in layers of {few}, under grouped
queries six KV groups. Before the window grew, it held layers within two, and under grouped queries a head planted whole
was corroborated in 0 to 2 of 100 cases (agreement heads, of which other words decide too, in all). Roles in layers of
{few}: the least share of a role that is corroborated is {roles_few:.3f}.

{outcomes_few}

## Nothing planted: verdicts

Models with at least one such verdict although nothing is planted. The families of role rows and of head rows are
corrected to 0.05 each, under each null. To be corroborated takes every counting null, so that less than 0.05 is
expected; to be contradicted takes one that compares with other heads or other words, in the direction opposite to the
prediction, so that up to 0.05 for each of them may be.

{false}
"""


def write(nulls: pd.DataFrame, strained: dict[str, NDArray[np.float64]], verdicts: pd.DataFrame) -> None:
    """Figures and page, from what `null_run`, `strained_run` and `power_run` found."""
    powers, n_rows = power_table(verdicts), 2 * len(calibration_table(nulls))  # in either direction
    few = outcome_table(verdicts, FEW)
    with mpl.rc_context(STYLE):
        plot_calibration(nulls)
        plot_power(powers)
    wide = powers.assign(power=[f"{row.power:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in powers.itertuples()])
    page = PAGE.format(
        command="python " + " ".join(sys.argv),
        n_models=len(nulls.drop_duplicates(["shape", "task", "seed"])),
        calibration=markdown(calibration_table(nulls)),
        strained=markdown(strained_table(strained)),
        n_power=powers["n"].min(),
        surprise=SURPRISE,
        n_rows=n_rows,
        **multiplicity(n_rows),
        n_clean=verdicts.loc[verdicts["noise"] == 0.0, "seed"].nunique(),
        outcomes=markdown(outcome_table(verdicts, MANY)),
        outcomes_few=markdown(few[few["verdicts"] == "heads"]),
        roles_few=few[few["verdicts"] == "roles"]["corroborated"].min(),
        many=MANY,
        few=FEW,
        power_shapes=", half with ".join(POWER_SHAPES),
        power=markdown(wide.pivot(index="role", columns="noise", values="power").reset_index()),
        false=markdown(false_table(nulls, verdicts)),
    )
    write_page(page)


def write_page(page: str = "", section: str = "") -> None:
    """Write the page, the section on prompts at its end, or both; what is not given stays as it is."""
    path = DOCS / "calibration.md"
    before, _, after = path.read_text(encoding="utf-8").partition(PROMPTS_TITLE)
    path.write_text((page or before).rstrip() + "\n\n" + (section or PROMPTS_TITLE + after), encoding="utf-8")


def main() -> None:
    """Run, count, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--null-seeds", type=int, default=50, help="random models of every shape and task")
    parser.add_argument("--strained-seeds", type=int, default=100, help="models of every strained case")
    parser.add_argument("--power-seeds", type=int, default=16, help="models of every shape, task and noise")
    parser.add_argument("--clean-seeds", type=int, default=50, help="of them those without noise")
    parser.add_argument("--untrained-seeds", type=int, default=64, help="untrained models of every shape on prompts")
    parser.add_argument("--planted-seeds", type=int, default=50, help="planted models on prompts, few heads in a layer")
    parser.add_argument("--many-seeds", type=int, default=20, help="planted models on prompts, many heads in a layer")
    parser.add_argument("--what", choices=("all", "prompts"), default="all")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()

    def found(function: Callable[[Any], Any], cells: Sequence[Any]) -> list[Any]:
        return run(function, cells, options.processes)

    from calibration_on_prompts import prompts_section

    write_page(section=prompts_section(options, found, markdown))
    if options.what == "prompts":
        return
    nulls = pd.concat(found(null_run, null_cells(range(options.null_seeds))), ignore_index=True)
    strained = {
        name: np.array(found(strained_run, [(name, seed) for seed in range(options.strained_seeds)]))
        for name in STRAINED
    }
    cells = [
        cell
        for noise in NOISES
        for cell in itertools.product(
            POWER_SHAPES, TASKS, range(options.power_seeds if noise else options.clean_seeds), [noise], [MANY]
        )
    ]
    cells += itertools.product(POWER_SHAPES, TASKS, range(options.clean_seeds), [0.0], [FEW])
    write(nulls, strained, pd.concat(found(power_run, cells), ignore_index=True))


if __name__ == "__main__":
    main()
