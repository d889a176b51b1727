"""Which reader a checkpoint needs: the table of families, TransformerLens names, or the bridge."""

import torch

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.files import CONFIG
from ovqk.config.schema import ModelConfig
from ovqk.errors import UserError
from ovqk.weights.families import family_of
from ovqk.weights.known import check_files
from ovqk.weights.native import NativeWeights
from ovqk.weights.sizes import refuse_sizes
from ovqk.weights.transformer_lens_file import TransformerLensWeights
from ovqk.weights.types import WeightSource
from ovqk.weights.unreadable import refuse_unreadable, refuse_unreadable_defaults


def open_weights(checkpoint: Checkpoint, model: ModelConfig) -> WeightSource:
    """Return the raw weights of a checkpoint, by the reader its config.json calls for.

    Raises:
        UserError: tensors are missing or misshapen, or the architecture is supported by neither way.
    """
    try:
        source = _open(checkpoint, model)
    except UserError as error:
        if checkpoint.metadata is None:
            raise
        raise UserError(str(error).replace(CONFIG, "its metadata, as a config.json,")) from error
    source.notes.extend(checkpoint.notes)
    return source


def open_named(checkpoint: Checkpoint, model: ModelConfig) -> WeightSource:
    """Return the raw weights of a checkpoint whose numbers will stand under the model's name.

    Raises:
        UserError: as `open_weights`; or these are not the files of the known model that the name or the claims name.
    """
    source = open_weights(checkpoint, model)
    source.notes.extend(check_files(model, checkpoint, source.architecture))
    return source


def _open(checkpoint: Checkpoint, model: ModelConfig) -> WeightSource:
    if not checkpoint.config:
        return TransformerLensWeights(checkpoint, model.n_ctx, model.causal, model.attn_coeff)
    if model.attn_coeff != 1:
        raise UserError(
            f"model.attn_coeff={model.attn_coeff}: {checkpoint.label} has its own config.json, and attention is all "
            "softmax in every architecture that ovqk knows; allowed: 1."
        )
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str):
        said = "no model_type" if kind is None else f"'model_type' as {kind!r}; allowed: its name"
        raise UserError(f"{checkpoint.label}: config.json gives {said}, so its architecture is unknown.")
    text = checkpoint.config.get("text_config")
    if any(each.get("is_causal") is False for each in (checkpoint.config, text if isinstance(text, dict) else {})):
        raise UserError(
            f"{checkpoint.label}: config.json sets is_causal=false: attention looks both ways, but ovqk's "
            "results for positions and roles assume that keys precede queries; allowed: true, or unset."
        )
    family = family_of(checkpoint.config)
    refuse_sizes(checkpoint, loaded_whole=family is None)
    if family is not None:
        ignored = [
            f"model.{key}" for key, value in (("n_ctx", model.n_ctx), ("causal", model.causal)) if value is not None
        ]
        if ignored:
            raise UserError(
                f"{', '.join(ignored)}: {checkpoint.label} has its own config.json, which decides; allowed: unset."
            )
        return NativeWeights(checkpoint, family)
    if quantised := checkpoint.quantised():
        raise UserError(f"{checkpoint.label}:{quantised} Give a checkpoint that is not quantised.")
    refuse_unreadable(checkpoint.label, checkpoint.config)
    refuse_unreadable_defaults(checkpoint.label, checkpoint.config)
    from ovqk.weights.bridge import BridgeWeights  # 8 seconds of imports, and only here

    with torch.no_grad():
        return BridgeWeights(checkpoint, model)
