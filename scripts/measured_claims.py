"""Write the heads that were measured on prompts as a task's `claims:` block, with their evidence.

    python run.py model=MODEL model.claims=measured task=TASK analysis=activations activations.prompts=1024
    python scripts/measured_claims.py results/MODEL/TASK

Reads finished cells and runs no model. The block goes into a task's YAML (docs/extending.md), and `model.claims=MODEL`
then judges the weights of these heads in any analysis. A head is listed if it was chosen on one half of the prompts and
shows every deciding quantity on the other; all numbers are of that other half. p and q are rounded up.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk.tasks.claims import MEASURED

QUANTITIES = {
    "attention": ("attention", "attention_control"),
    "repeats": ("repeats", "repeats_control"),
    "write": ("write", "write_share"),
    "effect": ("effect", "effect_mean_replacement"),
}
"""Deciding quantity -> the columns of roles.parquet that are its evidence."""


def claims_block(record: Mapping[str, Any], roles: pd.DataFrame) -> str:
    """Return one model's claims as YAML, to be put under a task's `claims:`.

    Args:
        record: of a done cell that ran the model.
        roles: its roles.parquet; empty if it has none.

    Raises:
        ValueError: the cell measured heads beside claimed ones, could not be tested, or found no head.
    """
    where, config = f"{record['model']} / {record['task']}", record["provenance"]["config"]
    ran = record.get("activations")
    if not ran:
        raise ValueError(f"{where}: analysis={record['analysis']} did not run the model; use analysis=activations.")
    if config["model"]["claims"] not in (None, MEASURED):
        raise ValueError(f"{where}: measured beside claimed heads; run the cell with model.claims={MEASURED}.")
    if ran["untestable"]:
        raise ValueError(f"{where}: {ran['untestable']}.")
    measured = roles[roles["measured"].astype(bool)] if len(roles) else roles
    if not len(measured):
        raise ValueError(f"{where}: no head has a role by measurement.")
    count = sum(half["prompts"] for half in ran["halves"].values())
    n_layers, n_heads = record["summary"]["n_layers"], record["summary"]["n_heads"]
    lines = [
        f"  {record['model']}:",
        f"    source: measured on {count} prompts, seed {record['seed']}",
        "    reliability: measured",
        f"    shape: [{n_layers}, {n_heads // n_layers}] # layers, heads of a layer",
        "    roles:",
    ]
    of_role = {str(role): rows.to_dict("records") for role, rows in measured.groupby("role", sort=False)}
    for role, rows in of_role.items():
        lines.append(f"      {role}: [{', '.join(map(_head, rows))}]")
    lines.append("    evidence: # of the half of the prompts that did not choose the heads")
    for role, rows in of_role.items():
        decides = config["task"]["roles"][role]["activations"]["decides"]
        lines.append(f"      {role}:")
        for row in rows:
            start = f"        {_head(row)}: {{"
            lines.append(start + f",\n{' ' * len(start)}".join(_evidence(row, decides)) + "}")
    return "\n".join(lines)


def _head(row: Mapping[Any, Any]) -> str:
    return f'"{int(row["layer"])}.{int(row["head"])}"'


def _evidence(row: Mapping[Any, Any], decides: list[str]) -> list[str]:
    """Return one line for each deciding quantity."""
    found = []
    for quantity in decides:
        told = [f"{name}: {row[name]:.3f}" for name in QUANTITIES[quantity] if math.isfinite(row[name])]
        told += [f"{quantity}_{what}: {math.ceil(row[f'{quantity}_{what}'] * 1e4) / 1e4:.4f}" for what in "pq"]
        found.append(", ".join(told))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a results folder, or a folder inside it down to one cell's")
    folder = parser.parse_args().folder
    done = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.rglob("record.json"))]
    done = [(cell, record) for cell, record in done if record["status"] == "done"]
    if not done:
        sys.exit(f"{folder}: no finished cell is there.")
    for cell, record in done:
        table = cell / "roles.parquet"
        try:
            block = claims_block(record, pd.read_parquet(table) if table.is_file() else pd.DataFrame())
        except ValueError as error:
            print(error, file=sys.stderr)
        else:
            print(f"# {record['task']}\nclaims:\n{block}")


if __name__ == "__main__":
    main()
