"""The section of docs/calibration.md on heads on prompts, which scripts/calibration.py writes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from ovqk.testing import prompted_models
from ovqk.testing.null_models import interval, least_likely

PROMPTS_PAGE = """## Heads on prompts

Made by `{command}`.

### Untrained models

{models} transformers with random weights, biases and gains, {per_shape} of each of three shapes:
{shapes}.
They run {prompts} prompts of the induction task and their counterfactuals, half of them to test on. Two heads are
drawn at random and claimed for each of two roles; every p-value is of the first head of its role, or of the role, so
that there is one of each kind a model. To such a model an earlier occurrence means nothing, and answers and foils are
drawn alike. In brackets the 95 % interval (Clopper and Pearson); the tail is that of the p-values above, by the same
rule.

{table}

- `{no_null}` is no null, and stands there for what it shows: a random head may look at one place more than at the
  next, in any text. It is the reason why a head on prompts is compared with other heads too.
- The other p of attention, of writes and of effects flip signs of clusters of prompts; `effect on attention` is on
  that of the heads that are claimed for induction, and exactly 0, so p = 1, if these come first; `mean` replaces by
  the mean over the cluster.
- `peers` compares with other heads, by KV groups ([method](method.md#heads-on-prompts)): a head with few groups
  beside it has no small p.
- The p of `auc_in_layers` is the permutation `layer` above, of labels that prompts gave.

Heads that the choosing half of the prompts gives a role: {chosen} of {heads} in all models together (the least
effects and writes are shares of a logit difference that such models hardly have, and no gate is asked).

### Heads planted in models that run

Attention-only models with a previous-token head, an induction head and a copy head built by hand and all other heads
random, two layers, {planted_prompts} prompts. With 4 heads in a layer, six are left beside a role, and no p against
other heads can be small.

{found}
"""


def prompts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every p-value on prompts: how often it is small, in all shapes with exact intervals, and in each shape."""
    found = []
    for quantity, own in rows.groupby("quantity", sort=False):
        p, opposite = own["p"].dropna().to_numpy(), own["p_opposite"].dropna().to_numpy()
        row: dict[str, Any] = {"p-value": quantity, "n": len(p)}
        for a in (0.01, 0.05, 0.2):
            low, high = interval(int((p <= a).sum()), len(p))
            row[f"p <= {a}"] = f"{(p <= a).sum()}: {(p <= a).mean():.3f} [{low:.3f}, {high:.3f}]"
        for shape, of_shape in own.groupby("shape", sort=False):
            row[f"p <= 0.05, {shape}"] = f"{(of_shape['p'] <= 0.05).sum()} of {of_shape['p'].notna().sum()}"
        row["p opposite <= 0.05"] = f"{(opposite <= 0.05).sum()} of {len(opposite)}" if len(opposite) else ""
        _, _, tail = least_likely(p)
        found.append(row | {"tail": tail, "tail, p opposite": least_likely(opposite)[2] if len(opposite) else ""})
    return pd.DataFrame(found)


def found_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every planted role: how often its head is measured, realised, and stands out of other heads."""
    found = []
    for (heads, role), own in rows.groupby(["heads", "role"], sort=False):
        row: dict[str, Any] = {"heads in a layer": heads, "planted": role, "models": len(own)}
        counts = {
            "measured": own["measured"], "realised": own["verdict"] == "realised",
            "head beyond others, p <= 0.05": own["head_p"] <= 0.05,
            "role beyond others, p <= 0.05": own["role_p"] <= 0.05,
        }  # fmt: skip
        for name, which in counts.items():
            low, high = interval(int(which.sum()), len(own))
            row[name] = f"{which.sum()} [{low:.2f}, {high:.2f}]"
        found.append(row | {"other heads measured": int(own["others"].sum())})
    return pd.DataFrame(found)


def prompts_section(
    options: argparse.Namespace,
    found: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]],
    markdown: Callable[[pd.DataFrame], str],
) -> str:
    """The section on heads on prompts: run, count, and write."""
    cells = [(shape, seed) for seed in range(options.untrained_seeds) for shape in prompted_models.UNTRAINED]
    rows = pd.concat(found(prompted_models.untrained, cells), ignore_index=True)
    seeds = {prompted_models.HEADS: options.planted_seeds, prompted_models.MANY: options.many_seeds}
    planted = [(heads, seed) for heads, count in seeds.items() for seed in range(count)]
    models = rows.drop_duplicates(["shape", "seed"])
    return PROMPTS_PAGE.format(
        command="python " + " ".join(sys.argv),
        models=len(models),
        per_shape=options.untrained_seeds,
        shapes="; ".join(f"{name} ({kind})" for name, (kind, _) in prompted_models.UNTRAINED.items()),
        prompts=prompted_models.PROMPTS,
        planted_prompts=2 * prompted_models.PROMPTS,
        table=markdown(prompts_table(rows)),
        no_null=prompted_models.NO_NULL,
        chosen=models["chosen"].sum(),
        heads=models["heads"].sum(),
        found=markdown(found_table(pd.concat(found(prompted_models.planted_run, planted), ignore_index=True))),
    )
