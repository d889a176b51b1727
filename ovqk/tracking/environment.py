"""W&B's own environment variables: the ones that runs follow, and one that they do not.

Runs follow WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP and WANDB_TAGS; an empty one counts as
not set. They do not follow WANDB_DIR, because a run lies beside the records from which it is made; a warning says so.
"""

import os

from ovqk.config.schema import TrackingConfig


def project_of(chosen: str) -> str:
    """Return the project: the config's if it names its own, else WANDB_PROJECT if it is set."""
    own = chosen != TrackingConfig.project
    return chosen if own else os.environ.get("WANDB_PROJECT") or chosen


def name_of(run: str) -> str:
    """Return a run's name; it follows WANDB_NAME if that is set, since one name may be for a whole sweep's cells."""
    name = os.environ.get("WANDB_NAME")
    return f"{name} {run}" if name else run


def group_of(run: str) -> str:
    """Return a run's group: WANDB_RUN_GROUP if it is set."""
    return os.environ.get("WANDB_RUN_GROUP") or run


def tags_of(run: list[str]) -> list[str]:
    """Return a run's tags, and those that WANDB_TAGS lists between commas."""
    return [*run, *(tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip())]


def not_followed() -> str | None:
    """Return a warning if a variable is set that runs do not follow; else None."""
    place = os.environ.get("WANDB_DIR")
    if not place:
        return None
    return f"WANDB_DIR={place} is not followed: runs lie in results_dir/wandb, beside the records they were made from"
