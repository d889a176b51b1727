"""Checks of the values of keys, and the messages about wrong ones; no file is read here.

Each message is a `UserError` that names the key, says what is wrong and lists what is allowed. Hydra's own errors, such
as an unknown key, become messages in `hydra_errors`.
"""

import math
import re

from omegaconf import DictConfig, OmegaConf

from ovqk.config.schema import CIRCUITS, Config, Embedding
from ovqk.errors import CONTROL, UserError

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
RESERVED = "wandb"  # W&B's folder beside those of the models
REPOSITORY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
COMMIT = re.compile(r"[0-9a-f]{40}")
OPERATORS = ("+", "-")
LONGEST_OFFSET = 10_000_000  # no model's context is longer


def check(config: Config) -> None:
    """Refuse a value that has the right type and is not allowed.

    Raises:
        UserError: a key has such a value.
    """
    labels = {
        "model.name": config.model.name,
        "task.name": config.task.name,
        "analysis.name": config.analysis.name,
    }
    for key, label in labels.items():
        if not LABEL.fullmatch(label) or len(label) > 100:
            raise UserError(
                f"{key}={label!r}: allowed are up to 100 letters, digits, '.', '_', '+' and '-', the first a letter or "
                "digit; it names a folder."
            )
    shown = {"task.title": config.task.title, "sweep": config.sweep}
    for name, claims in config.task.claims.items():
        shown |= {f"task.claims.{name}.source": claims.source, f"task.claims.{name}.note": claims.note}
    for key, text in shown.items():
        if text is not None and CONTROL.search(text):
            raise UserError(f"{key}={text!r}: it holds control characters, which a terminal would obey.")
    if config.model.name == RESERVED:
        raise UserError(f"model.name={RESERVED}: W&B's own folder has that name; choose another.")
    if config.model.repo is not None and not REPOSITORY.fullmatch(config.model.repo):
        raise UserError(f"model.repo={config.model.repo!r}: must be OWNER/NAME.")
    if not REVISION.fullmatch(config.model.revision):
        raise UserError(f"model.revision={config.model.revision!r}: must be a branch, a tag or a commit.")
    circuits = config.analysis.circuits
    if not circuits or len(set(circuits)) != len(circuits) or not set(circuits) <= set(CIRCUITS):
        raise UserError(f"analysis.circuits={circuits}: allowed are {', '.join(CIRCUITS)}, each once.")
    offsets = config.analysis.offsets
    if not offsets or min(offsets) < 0 or max(offsets) > LONGEST_OFFSET:
        raise UserError(
            f"analysis.offsets={offsets}: allowed are one or more offsets in 0 .. {LONGEST_OFFSET} (query minus key)."
        )
    if config.analysis.components < 0:
        raise UserError(f"analysis.components={config.analysis.components}: must be a number of components >= 0.")
    if config.analysis.directions_embedding is Embedding.stream:
        raise UserError(
            "analysis.directions_embedding=stream: token lists cover the whole vocabulary, but the model is run on few "
            "words only; allowed: token, block0, by_layer."
        )
    if config.analysis.pairs and len(circuits) < 2:
        raise UserError(f"analysis.pairs=true: composition needs both circuits, and analysis.circuits={circuits}.")
    if not 1 <= config.nulls.draws <= 1_000_000:
        raise UserError(
            f"nulls.draws={config.nulls.draws}: must be in 1 .. 1000000 (p cannot fall below 1 / (1 + draws))."
        )
    for key in ("resamples", "subsamples"):
        draws = getattr(config.nulls, key)
        if not 2 <= draws <= 1_000_000:
            raise UserError(f"nulls.{key}={draws}: must be in 2 .. 1000000 (an interval is between two of its draws).")
    for key, most in (("prompts", 100_000), ("batch", 4096), ("screened", 100_000)):
        number = getattr(config.activations, key)
        least = 0 if key == "screened" else 1
        if not least <= number <= most:
            raise UserError(f"activations.{key}={number}: must be in {least} .. {most}.")
    if config.model.claims == "measured" and not config.analysis.activations:
        raise UserError(
            f"model.claims=measured: analysis={config.analysis.name} does not run the model; allowed with "
            "analysis=full and analysis=activations."
        )
    refuse_tilde(config.results_dir)
    if not config.cache_gb > 0:
        raise UserError(
            f"cache_gb={config.cache_gb}: must be a positive number of gigabytes; cache=false keeps nothing."
        )
    if not (config.hub_timeout > 0 and math.isfinite(config.hub_timeout)):
        raise UserError(f"hub_timeout={config.hub_timeout}: must be a positive number of seconds.")
    if config.model.n_ctx is not None and config.model.n_ctx < 1:
        raise UserError(f"model.n_ctx={config.model.n_ctx}: must be a positive number of tokens.")
    if not 0 <= config.model.attn_coeff <= 1:  # nan is refused too
        raise UserError(
            f"model.attn_coeff={config.model.attn_coeff}: must be in [0, 1]: the softmax's share of attention."
        )
    cycle = config.task.cycle
    if cycle is not None and cycle.operator not in OPERATORS:
        raise UserError(
            f"task.cycle.operator={cycle.operator}: allowed: + for (a + b) mod p, - for (a - b) mod p. Other operators "
            "are no cycle of the residues in order."
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: must be in 0 .. 2^32 - 1.")
    if config.model.trust_remote_code and not COMMIT.fullmatch(config.model.revision):
        raise UserError(
            f"model.trust_remote_code=true with model.revision={config.model.revision}: running a repository's code "
            "needs a revision that is a full commit (40 hexadecimal digits)."
        )


def refuse_untyped(config: DictConfig) -> None:
    """Refuse a choice that does not extend the schema, which gives each key its type.

    Raises:
        UserError: it does not.
    """
    if OmegaConf.get_type(config) is not Config:
        raise UserError(
            "defaults: the primary config (-cp, -cn) leaves out `schema`, so that its keys have no types. Needed: "
            "`defaults: [schema, settings, ..., _self_]`, as in conf/config.yaml. To add files of your own to ovqk's, "
            "use -cd FOLDER instead of -cp."
        )


def refuse_tilde(results_dir: str) -> None:
    """Refuse a results folder under `~`, which a shell left as it is: Hydra would make a folder of that name.

    Raises:
        UserError: it is.
    """
    if results_dir.startswith("~"):
        raise UserError(f"results_dir={results_dir}: the shell has not replaced '~'; write $HOME, or the whole path.")
