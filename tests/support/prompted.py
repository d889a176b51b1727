"""A cell that ran its model on prompts, made by hand of a real cell without: heads of every reading."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

PROMPTS = {
    "start_tokens": [1],
    "left_out": {"an answer of two tokens": 3},
    "halves": {
        "choosing": {"prompts": 60, "clusters": 8, "accuracy": 1.0, "logit_difference": 4.5},
        "testing": {"prompts": 61, "clusters": 9, "accuracy": 0.9508, "logit_difference": 4.25},
    },
    "accuracy_by_template": {"repeated": 0.97},
    "untestable": "",
    "controls": {"replaced_by_itself": 1e-7, "readout_error": 1e-7},
}
HEADS = [
    ("induction", 3, 0, True, True, "corroborated", "realised", "linked", ""),
    ("induction", 3, 1, True, True, "corroborated", "realised", "unlinked", ""),
    ("induction", 3, 3, True, False, "corroborated", "not_realised", "could", ""),
    ("induction", 3, 4, True, False, "unsupported", "realised", "indirect", ""),
    ("previous_token", 1, 2, True, False, "unsupported", "realised", "unranked", ""),
    ("induction", 2, 7, False, True, None, "realised", "undecided", ""),
    ("previous_token", 1, 1, True, False, "contradicted", "opposite", "neither", ""),
    ("previous_token", 0, 1, False, False, None, "partial", "undecided", "no effect"),
    ("previous_token", 1, 3, True, False, "untestable", "untestable", "undecided", "too few clusters of prompts"),
]
"""role, layer, head, claimed, measured, weights, activations, reading, reason."""
COLUMNS = ["role", "layer", "head", "claimed", "measured", "weights", "activations", "reading", "reason"]


def make_prompted(source: Path, results: Path, model: str = "mini-attn") -> Path:
    """Copy a cell of mini-attn on induction into a results folder as one that ran its model, and return its folder."""
    record = json.loads((source / "record.json").read_text())
    folder = results / model / "induction" / "full-000000000000"
    shutil.copytree(source, folder)
    record |= {"model": model, "analysis": "full", "cell_id": "000000000000", "activations": PROMPTS}
    record["summary"] |= {"prompts/accuracy": 0.9508, "prompts/logit_difference": 4.25}
    (folder / "record.json").write_text(json.dumps(record))
    heads = pd.read_parquet(folder / "heads.parquet")[["layer", "head"]]
    generator = np.random.default_rng(0)
    parts = []
    for role in ("induction", "previous_token"):
        for half in ("choosing", "testing"):
            part = heads.assign(role=role, half=half)
            for name in ("attention", "attention_control", "attention_counterfactual", "sink"):
                part[name] = generator.uniform(0, 1, len(part))
            part["attention_se"] = 0.02
            if role == "induction":
                part["write"] = generator.normal(0, 1, len(part))
                part = part.assign(
                    write_se=0.1, write_share=part["write"] / 4.25, write_from_source=0.9 * part["write"]
                )
                part["write_link"] = 0.8
                part["write_link_slope"] = 1.1
            part["effect"] = generator.normal(0.2, 0.2, len(part))
            part = part.assign(
                effect_se=0.03, effect_mean_replacement=0.9 * part["effect"], effect_restored=float("nan")
            )
            parts.append(part)
    activations = pd.concat(parts, ignore_index=True)
    activations.to_parquet(folder / "activations.parquet", index=False)
    rows = pd.DataFrame(HEADS, columns=COLUMNS)
    testing = activations[activations["half"] == "testing"].drop(columns="half")
    roles = rows.drop(columns=["weights", "reading"]).rename(columns={"activations": "verdict"})
    roles.assign(chosen=True, score_link=0.25).merge(testing, on=["role", "layer", "head"]).to_parquet(
        folder / "roles.parquet", index=False
    )
    statistics = {
        "n_measured": [3, 0],
        "n_heads": 32,
        "auc": [0.91, None],
        "auc_low": [0.8, None],
        "auc_high": [1.0, None],
    }
    ranked = pd.DataFrame(
        {
            "kind": "role",
            "role": ["induction", "previous_token"],
            "metric": ["ov_copying", "qk_prev_auc"],
            "quantity": ["write", "attention"],
            **statistics,
        }
        | {"spearman": [-0.25, 0.5], "split_half": [0.9, 0.8]}
    )
    joint = pd.concat([rows.drop(columns="reason").assign(kind="head"), ranked], ignore_index=True)
    joint.to_parquet(folder / "joint.parquet", index=False)
    made = {name: len(pd.read_parquet(folder / f"{name}.parquet")) for name in ("activations", "roles", "joint")}
    (folder / "record.json").write_text(json.dumps(record | {"tables": record["tables"] | made}))
    return folder
