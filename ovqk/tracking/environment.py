"""W&B's own environment variables: the ones that runs follow, and one that they do not.

Runs follow WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP and WANDB_TAGS; an empty one counts as
not set. A run's tracking.json notes all but WANDB_MODE, so that a run that is sent later, from another shell, goes to
the same place; a variable that is set then goes first. They do not follow WANDB_DIR, because a run lies beside the
records from which it is made; a warning says so.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from ovqk.config.schema import TrackingConfig

FOLLOWED = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_NAME")


def set_now() -> dict[str, str]:
    """Return the variables of FOLLOWED that are set and not empty."""
    return {name: value for name in FOLLOWED if (value := os.environ.get(name))}


def noted_in(state: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a tracking.json notes."""
    return {name: state[name] for name in FOLLOWED if state.get(name)}


def as_typed(variables: Mapping[str, str]) -> str:
    """Return variables as one sets them in a shell."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def project_of(chosen: str, variables: Mapping[str, str]) -> str:
    """Return the project: the config's if it names its own, else WANDB_PROJECT if it is set."""
    own = chosen != TrackingConfig.project
    return chosen if own else variables.get("WANDB_PROJECT") or chosen


def entity_of(chosen: str | None, variables: Mapping[str, str]) -> str | None:
    """Return the project's owner: the config's if it names one, else WANDB_ENTITY; None for W&B's own default."""
    return chosen or variables.get("WANDB_ENTITY")


def name_of(run: str, variables: Mapping[str, str]) -> str:
    """Return a run's name; it follows WANDB_NAME if that is set, since one name may be for a whole sweep's cells."""
    name = variables.get("WANDB_NAME")
    return f"{name} {run}" if name else run


def group_of(run: str, variables: Mapping[str, str]) -> str:
    """Return a run's group: WANDB_RUN_GROUP if it is set."""
    return variables.get("WANDB_RUN_GROUP") or run


def tags_of(run: list[str], variables: Mapping[str, str]) -> list[str]:
    """Return a run's tags, and those that WANDB_TAGS lists between commas."""
    return [*run, *(tag.strip() for tag in variables.get("WANDB_TAGS", "").split(",") if tag.strip())]


def not_followed(results_dir: Path) -> str | None:
    """Return a warning if a variable is set that runs do not follow, once for a results folder; else None."""
    place = os.environ.get("WANDB_DIR")
    if not place or (results_dir / "wandb").exists():  # it was said when the first run was made there
        return None
    return f"WANDB_DIR={place} is not followed: runs lie in results_dir/wandb, beside the records they were made from"
