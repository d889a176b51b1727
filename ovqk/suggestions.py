"""Commands that go on from a finished cell, from its record and, if they are there, the files of conf/."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ovqk.record import read_record
from ovqk.results import load_table

CONF = Path(__file__).parents[1] / "conf"
GENERAL = ("ioi", "sva", "induction")
"""Tasks for a model that no task names: plain English, with a role in most circuits that were published."""


def next_arguments(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Return the arguments of run.py for cells worth computing after this one; None if it cannot be told how.

    Other tasks that claim heads of this model come first, then those of GENERAL. A task that failed for the model is
    left out. If words cannot be read, or no task is left, another analysis of the same task is named.
    """
    model = model_arguments(record["provenance"]["config"]["model"])
    if model is None:
        return None
    results_dir = str(folder.parents[2])
    place = "" if results_dir == "results" else f" {_quoted('results_dir', results_dir)}"
    tasks = _tasks(folder, record)
    if not tasks:
        other = "b03" if record["analysis"] == "composition" else "composition"
        return f"{model} task={record['task']} analysis={other}{place}"
    analysis = "" if record["analysis"] == "b03" else f" analysis={record['analysis']}"
    return f"{'-m ' if len(tasks) > 1 else ''}{model} task={','.join(tasks)}{analysis}{place}"


def model_arguments(chosen: Mapping[str, Any]) -> str | None:
    """Return the arguments that choose this model again; None if its name is no file of conf/model."""
    if chosen["source"] == "local":
        claims = f" model.claims={chosen['claims']}" if chosen["claims"] else ""
        return f"model=local {_quoted('model.path', chosen['path'])} model.name={chosen['name']}{claims}"
    name, more = chosen["name"], ""
    if chosen["checkpoint"] is not None:  # a step of training is part of the name
        name, more = name.removesuffix(f"-{chosen['revision']}"), f" model.checkpoint={chosen['checkpoint']}"
    elif chosen["source"] == "hub" and chosen["revision"] != "main":
        more = f" model.revision={chosen['revision']}"
    if CONF.is_dir() and not (CONF / "model" / f"{name}.yaml").is_file():
        return None
    return f"model={name}{more}"


def _tasks(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return other tasks that make sense for the model, none if its words cannot be read."""
    if not _reads_words(folder, record):
        return []
    claims = record["provenance"]["config"]["model"]["claims"]
    tasks = _claimed(claims) or [name for name in GENERAL if (CONF / "task" / f"{name}.yaml").is_file()]
    return [name for name in tasks if name != record["task"] and not _failed(folder.parents[1] / name)]


def _reads_words(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether words of a task were read, or words are among the tokens that the leading components read and write."""
    if any(record["words"]["kept"].values()):
        return True
    table = load_table(folder, "directions")
    return table is not None and bool(table["token"].astype(str).str.contains("[A-Za-z]{3}").any())


def _claimed(model: str | None) -> list[str]:
    """Return the tasks of conf/task that claim heads of this model."""
    if model is None:
        return []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = []
    for path in sorted((CONF / "task").glob("*.yaml")):
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        if isinstance(content, dict) and model in (content.get("claims") or {}):
            found.append(path.stem)
    return found


def _failed(task: Path) -> bool:
    """Whether every cell of this model and task failed, of those that have a record."""
    records = [found for path in task.glob("*/record.json") if (found := read_record(path.parent)) is not None]
    return bool(records) and all(found.get("status") == "failed" for found in records)


def _quoted(key: str, value: str) -> str:
    """Return KEY=VALUE for Hydra in a shell: a value with odd characters is quoted for both."""
    if re.fullmatch(r"[\w./~+-]+", value):
        return f"{key}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')
