"""Tables to draw figures of, and what a drawn figure holds."""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def dots(axes: Axes, marker: str = "o") -> list[tuple[float, float]]:
    return [
        tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == marker and len(line.get_xdata()) == 1
    ]


def verdict_table() -> pd.DataFrame:
    """Two models on two tasks; the second model has one role that is unavailable."""
    role = {
        "kind": "role",
        "layer": math.nan,
        "head": math.nan,
        "prediction": "high",
        "flags": "",
        "primary": "ov_copying",
    }
    roles = [
        ("a", "t1", "name_mover", "partial", 0.75, 0.6, 0.9, 0.04),
        ("a", "t2", "induction", "corroborated", 1.0, math.nan, math.nan, 0.01),
        ("b", "t1", "name_mover", "untestable", math.nan, math.nan, math.nan, math.nan),
    ]
    columns = ("model", "task", "role", "verdict", "effect", "ci_low", "ci_high", "q")
    rows = [role | dict(zip(columns, values, strict=True)) for values in roles]
    heads = [
        ("a", "t1", "name_mover", 0, 1, "partial"),
        ("a", "t1", "name_mover", 1, 2, "partial"),
        ("a", "t1", "name_mover", 1, 3, "contradicted"),
        ("a", "t2", "induction", 1, 0, "corroborated"),
        ("b", "t1", "name_mover", 2, 0, "untestable"),
    ]
    keys = ("model", "task", "role", "layer", "head", "verdict")
    rows += [role | dict(zip(keys, head, strict=True)) | {"kind": "head", "effect": 0.5} for head in heads]
    return pd.DataFrame(rows)


def head_table(model: str = "a", n_layers: int = 3, n_heads: int = 4, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    return pd.DataFrame(
        {
            "model": model, "cell_id": model, "layer": layer, "head": head,
            "ov_copying": generator.uniform(-1, 1, len(layer)), "qk_symmetry": generator.uniform(-1, 1, len(layer)),
            "qk_positional_share": generator.uniform(0, 1, len(layer)), "qk_matching": np.full(len(layer), math.nan),
        }
    )  # fmt: skip


def pair(
    mode: str, sender: tuple[int, int], receiver: tuple[int, int], score: float, above: float
) -> dict[str, object]:
    ends = dict(
        zip(("sender_layer", "sender_head", "receiver_layer", "receiver_head"), (*sender, *receiver), strict=True)
    )
    return {"mode": mode, "score": score, "score_above_random": above, "percentile": 1.0, "matching": math.nan} | ends


def direction_table(tokens: list[str]) -> pd.DataFrame:
    place = {"layer": 0, "head": 0, "circuit": "ov", "kind": "singular", "component": 0, "value": 2.5, "sign": 1}
    place["cluster_size"] = 1
    rows = [
        place | {"side": side, "rank": rank + 1, "token": token}
        for side in ("read", "write")
        for rank, token in enumerate(tokens)
    ]
    return pd.DataFrame(rows)
