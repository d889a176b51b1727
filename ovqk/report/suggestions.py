"""Suggested commands after a finished cell, taken from its record and, if it is there, from conf/."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from ovqk.config.command_line import config_folders, quoted
from ovqk.config.place import CONF
from ovqk.config.schema import CycleConfig, TaskConfig, VariableConfig, VariableKind
from ovqk.records.record import read_record

GENERAL = ("ioi", "sva", "induction")
"""Tasks to suggest for a model that no task names. They need only common English words."""


def next_arguments(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Return arguments for run.py that compute cells worth having after this one; None if they cannot be known.

    Other tasks that claim heads in this model come first, then those in GENERAL. A task is left out if it failed for
    the model, or if it keeps too few words with its tokenizer. If no task is left, another analysis is named.
    """
    model = model_arguments(record["provenance"]["config"]["model"])
    if model is None:
        return None
    results_dir = str(folder.parents[2])
    place = "" if results_dir == "results" else f" {quoted('results_dir', results_dir)}"
    given = "".join(f"-cd {shlex.quote(folder)} " for folder in config_folders())
    tasks = _tasks(folder, record)
    if not tasks:
        other = "b03" if record["analysis"] == "composition" else "composition"
        return f"{given}{model} task={record['task']}{cycle_arguments(record)} analysis={other}{place}"
    analysis = "" if record["analysis"] == "b03" else f" analysis={record['analysis']}"
    return f"{given}{'-m ' if len(tasks) > 1 else ''}{model} task={','.join(tasks)}{analysis}{place}"


def cycle_arguments(record: Mapping[str, Any]) -> str:
    """Return the choices about a task's cycle that its file does not make, as arguments that make them again.

    It is empty without a cycle of tokens. If the task's file is not there, all choices are named.
    """
    cycle = record["provenance"]["config"].get("task", {}).get("cycle")
    if not cycle or cycle.get("words"):
        return ""
    filed = [content for path, content in _task_files() if path.stem == record["task"]]
    unless = {field.name: field.default for field in fields(CycleConfig) if field.default != MISSING}
    given = (unless | (filed[-1].get("cycle") or {})) if filed else {}
    told = {key: cycle.get(key, unless.get(key)) for key in TOLD}
    return "".join(
        f" task.cycle.{key}={_spelled(key, value)}" for key, value in told.items() if given.get(key, MISSING) != value
    )


TOLD = ("modulus", "first", "query", "between", "operator")
"""The choices about a cycle of tokens that a suggested command names."""


def _spelled(key: str, value: Any) -> str:
    return "null" if value is None else f"'{value}'" if key == "operator" else str(value)


def model_arguments(chosen: Mapping[str, Any]) -> str | None:
    """Return the arguments that choose this model again; None if no file in conf/model has its name."""
    if chosen["source"] == "local":
        asked = {"claims": chosen["claims"] or None, "n_ctx": chosen["n_ctx"], "causal": chosen["causal"]}
        asked["attn_coeff"] = None if chosen.get("attn_coeff", 1) == 1 else chosen["attn_coeff"]
        more = "".join(f" model.{key}={str(value).lower() if key == 'causal' else value}"
                       for key, value in asked.items() if value is not None)  # fmt: skip
        return f"model=local {quoted('model.path', chosen['path'])} model.name={chosen['name']}{more}"
    name, more = chosen["name"], ""
    if chosen["checkpoint"] is not None:  # a training step is part of the name
        name, more = name.removesuffix(f"-{chosen['revision']}"), f" model.checkpoint={chosen['checkpoint']}"
    elif chosen["source"] == "hub" and chosen["revision"] != "main":
        more = f" model.revision={chosen['revision']}"
    places = [CONF, *map(Path, config_folders())]
    if not CONF.is_dir() or any((place / "model" / f"{name}.yaml").is_file() for place in places):
        return f"model={name}{more}"
    if chosen["source"] == "hub" and chosen["repo"]:
        named = "" if chosen["repo"].rpartition("/")[2] == name else f" model.name={name}"
        return f"model=hub {quoted('model.repo', chosen['repo'])}{named}{more}"
    return None


def shipped_tasks() -> list[TaskConfig]:
    """Return the parts of conf/task that concern words: each task's name, words, continuations and variables.

    A file that holds no such task is skipped; a user who chooses it gets a message.
    """
    return [task for path, content in _task_files() if (task := _with_words(path.stem, content)) is not None]


def _with_words(name: str, content: Mapping[str, Any]) -> TaskConfig | None:
    try:
        variables = {
            key: VariableConfig(**variable | {"kind": VariableKind(variable["kind"])})
            for key, variable in (content.get("variables") or {}).items()
        }
        words, continuations = content.get("words") or {}, content.get("continuations") or []
        return TaskConfig(name=name, words=words, continuations=continuations, variables=variables)
    except (KeyError, TypeError, ValueError):
        return None


def _task_files() -> list[tuple[Path, Mapping[str, Any]]]:
    """Return the files' contents in conf/task, by name; files that YAML cannot read are left out."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: list[tuple[Path, Mapping[str, Any]]] = []
    places = [CONF, *map(Path, config_folders())]
    for path in sorted(path for place in places for path in (place / "task").glob("*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if isinstance(content, dict):
            found.append((path, content))
    return found


def _tasks(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return other tasks that the model can do: those that keep enough words with its tokenizer."""
    readable = record["words"].get("tasks", [])  # records from earlier versions have none
    claims = record["provenance"]["config"]["model"]["claims"]
    offered = _claimed(claims) or [name for name in GENERAL if name in {path.stem for path, _ in _task_files()}]
    tasks = [name for name in offered if name in readable and name != record["task"]]
    return [name for name in tasks if not _failed(folder.parents[1] / name)]


def _claimed(model: str | None) -> list[str]:
    """Return the tasks in conf/task that claim heads in this model."""
    if model is None:
        return []
    return [path.stem for path, content in _task_files() if model in (content.get("claims") or {})]


def _failed(task: Path) -> bool:
    """Say whether every cell with this model and task that has a record failed."""
    records = [found for path in task.glob("*/record.json") if (found := read_record(path.parent)) is not None]
    return bool(records) and all(found.get("status") == "failed" for found in records)
