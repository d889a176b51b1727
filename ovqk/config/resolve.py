"""A cell's choice as typed values, with the defaults that depend on other keys; configs as plain data."""

import re
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ovqk.config.checks import check, refuse_untyped
from ovqk.config.schema import Config, Source, TrackingMode
from ovqk.config.secrets import refuse_secrets
from ovqk.errors import UserError

NO_NAME = "model"
"""The stem of a file that says nothing of the model in it."""


def resolve(config: DictConfig) -> Config:
    """Return the typed choice of one cell, checked as far as possible without reading a file.

    Raises:
        UserError: it does not extend the schema, or a value has the right type but is not allowed.
    """
    refuse_secrets(config)
    refuse_untyped(config)
    missing = sorted(OmegaConf.missing_keys(config))
    if "model.name" in missing and config.model.source is Source.local:
        missing.remove("model.name")
        if not config.model.path:
            raise UserError(
                "model.path: not set. model=local needs model.path=PATH: a Hugging Face directory, a GGUF file, or one "
                "safetensors file of TransformerLens names."
            )
        config = config.copy()
        path = user_path("model.path", config.model.path)
        whole = path.resolve()
        stem = whole.name.removesuffix(".safetensors").removesuffix(".gguf")
        if stem == NO_NAME and whole.suffix:  # model.safetensors: the folder has the name
            stem = whole.parent.name
        config.model.name = re.sub(r"[^A-Za-z0-9._+-]+", "-", stem).strip("-.") or "local"
    if "model.name" in missing and config.model.source is Source.hub:
        missing.remove("model.name")
        if not config.model.repo:
            raise UserError("model.repo: not set. model=hub needs model.repo=OWNER/NAME, a repository on the hub.")
        config = config.copy()
        config.model.name = config.model.repo.rpartition("/")[2]
    if missing:
        raise UserError(f"{missing[0]}: not set, and it has no default.")
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, Config)  # as refuse_untyped found
    typed = _at_checkpoint(typed)
    check(typed)
    return typed


def _at_checkpoint(config: Config) -> Config:
    """Turn a step of training into its revision, and add it to the name: pythia-70m-deduped-step1000."""
    model = config.model
    if model.checkpoint is None:
        return config
    if model.checkpoints is None:
        raise UserError(f"model.checkpoint={model.checkpoint}: model={model.name} has no earlier training steps.")
    if model.checkpoint < 0:
        raise UserError(f"model.checkpoint={model.checkpoint}: must be a step >= 0.")
    revision = model.checkpoints.replace("{checkpoint}", str(model.checkpoint))
    if revision != model.revision:  # a record's cell.yaml is resolved already
        model.revision, model.name = revision, f"{model.name}-{revision}"
    return config


def user_path(key: str, path: str) -> Path:
    """Return a path that a user typed, with `~` for the home folder.

    Raises:
        UserError: nobody knows the home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path}: {error} Write the path without '~', or set HOME.") from error


def plain(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain data, with each enum by its value."""

    def simple(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {key: simple(item) for key, item in value.items()}
        if isinstance(value, list):
            return [simple(item) for item in value]
        return value

    return {key: simple(value) for key, value in asdict(config).items()}


def tracking_mode(config: Config | DictConfig, wandb_mode: str | None) -> TrackingMode:
    """Return the mode of tracking: `none` if the config says so, else WANDB_MODE if it is set, else the config's.

    Raises:
        UserError: WANDB_MODE has an unknown value.
    """
    if config.tracking.mode is TrackingMode.none or not wandb_mode:
        return config.tracking.mode
    modes = {mode.value: mode for mode in (TrackingMode.online, TrackingMode.offline)}
    modes |= {"dryrun": TrackingMode.offline, "disabled": TrackingMode.none}
    if wandb_mode not in modes:
        raise UserError(f"WANDB_MODE={wandb_mode}: allowed: {', '.join(modes)}.")
    return modes[wandb_mode]
