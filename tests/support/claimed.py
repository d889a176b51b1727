"""Claims about a model of which nothing but its shape is given, and predictions about bare numbers."""

import numpy as np

from ovqk.config.schema import Direction, PredictionConfig
from ovqk.tasks.claims import Claims
from ovqk.verdicts.nulls import Predicted
from ovqk.weights.types import Architecture


def facts(layers: int = 12, heads: int = 12, **changes) -> Architecture:
    base = {
        "family": "test",
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": heads,
        "d_model": 8,
        "d_head": 4,
        "n_ctx": 16,
        "norm": "none",
        "norm_eps": 1e-5,
        "positions": "learned",
    }
    return Architecture(**base | changes)


def claims(**roles) -> Claims:
    return Claims("test", "published", None, roles, {})


def predicted(values: np.ndarray, direction: Direction = Direction.high, primary: bool = True) -> Predicted:
    return Predicted("mover", PredictionConfig("ov_task_auc", direction), primary, values)
