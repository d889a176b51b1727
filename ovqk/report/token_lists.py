"""A head's token lists as lines of text, from `directions.parquet`."""

from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd

from ovqk import wording

LONG = 30  # how many letters a line shows of a token at most
SIDES = ("read", "write")
KINDS = {"singular": "singular {}", "eigen": "eigen {} of the residual space"}
"""Component kind -> its name in a line. (`ov_copying` is about eigenvalues over the vocabulary, not about these.)"""


def describe(
    table: pd.DataFrame, layer: int, head: int, shown: int = 5, kinds: Sequence[str] = tuple(KINDS)
) -> list[str]:
    """Return a head's components as lines: `OV singular 0 (sigma 12.3): reads ' John' (6.1) | not ' a' (2.4) -> ...`.

    The number after each list is its contrast. `kinds` are the component kinds to describe.

    Tokens are quoted and escaped as by repr, which leaves no control or direction-changing character. They may still
    hold text that rich takes for markup, so print them as `rich.text.Text`.
    """
    rows = table[(table["layer"] == layer) & (table["head"] == head) & (table["rank"] <= shown)]
    rows = rows[rows["kind"].isin(kinds)]
    return [_line(part) for _, part in rows.groupby(["circuit", "kind", "component"], sort=False)]


def _list(records: Sequence[dict[Hashable, Any]]) -> str:
    """Return a list's tokens, and its contrast if it has one."""
    tokens = [record["token"] for record in records]
    text = " ".join(repr(token if len(token) <= LONG else token[:LONG] + "…") for token in tokens)
    contrast = records[0].get("contrast", 0.0) if records else 0.0  # records from earlier versions have none
    return f"{text} ({contrast:.1f})" if contrast >= 0.05 else text


def _line(rows: pd.DataFrame) -> str:
    records = rows.to_dict("records")
    first = records[0]
    value = f"{'sigma' if first['kind'] == 'singular' else 'lambda'} {first['value']:.3g}"
    value += f" ± {first['value_im']:.3g}i, a plane" if first["value_im"] > 0 else ""
    turned = first["kind"] == "eigen" and first["value"] < 0 and first["value_im"] == 0
    verbs = {
        "ov": ("reads", "suppresses" if turned else "writes"),
        "qk": ("queries", "avoid keys" if turned else "keys"),
    }
    sides = []
    for verb, side in zip(verbs[first["circuit"]], SIDES, strict=True):
        lists = [[r for r in records if (r["side"], r["sign"]) == (side, sign)] for sign in (1, -1)]
        texts = [_list(part) for part in lists]
        sides += [f"{verb} {' | not '.join(filter(None, texts))}"] if texts[0] else []
    size = first["cluster_size"]
    together = f" ({wording.CLUSTER.format(size=size)})" if size > 1 else ""
    name = f"{first['circuit'].upper()} {KINDS[first['kind']].format(first['component'])}"
    return f"{name} ({value}){together}: {' -> '.join(sides)}"


def leading_eigenvalues(spectra: pd.DataFrame, circuit: str, layer: int, head: int, shown: int = 3) -> str:
    """Return a circuit's leading eigenvalues over the vocabulary, `11.4, 9.03, 7.09 ± 0.988i`; empty if there are none.

    These are the eigenvalues that `ov_copying` and `qk_matching` sum. A complex pair counts as one.
    """
    told = (spectra["layer"] == layer) & (spectra["head"] == head) & (spectra["circuit"] == circuit)
    rows = spectra[told & (spectra["space"] == "vocab") & (spectra["kind"] == "eigen")]
    rows = rows[(rows["offset"] == rows["offset"].min()) & (rows["im"] >= 0)].sort_values("index").head(shown)
    return ", ".join(
        f"{row['re']:.3g}" + (f" ± {row['im']:.3g}i" if row["im"] > 0 else "") for row in rows.to_dict("records")
    )
