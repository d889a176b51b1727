"""Loading a Hugging Face model, and TransformerLens's view of it."""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ovqk.checkpoints.checkpoint import Checkpoint, check_finite
from ovqk.checkpoints.files import CONFIG, INDEX, SINGLE, folder_of
from ovqk.errors import UserError, first_line
from ovqk.scratch import scratch_folder
from ovqk.weights.family import WRAPPERS
from ovqk.weights.sizes import refuse_larger


def find_architecture(checkpoint: Checkpoint) -> str:
    """Return the checkpoint's architecture as TransformerLens spells it.

    Raises:
        UserError: config.json names none, or TransformerLens has no adapter for it.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    label, config = checkpoint.label, checkpoint.config
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    names = config.get("architectures") or ([usual] if isinstance(usual, str) else [])
    if not isinstance(names, list):
        raise UserError(f"{label}: config.json must give 'architectures' as a list of names, not {names!r}.")
    if not names:
        raise UserError(f"{label}: config.json names no 'architectures' for model_type={config.get('model_type')}.")
    known = {name.lower(): name for name in SUPPORTED_ARCHITECTURES}
    for name in names:
        if str(name).lower() in known:
            return known[str(name).lower()]
    raise UserError(
        f"{label}: {', '.join(map(str, names))} is neither a family that ovqk reads itself nor an architecture "
        "that TransformerLens has an adapter for; allowed: those that docs/architectures.md lists as read."
    )


def find_wrappers(checkpoint: Checkpoint) -> list[str]:
    """Return the prefixes that training tools put before tensors' names: each sequence that some name begins with."""
    known = "|".join(re.escape(wrapper) for wrapper in WRAPPERS if wrapper != "model.")  # many models' own
    found = (re.match(f"(?:{known})+", name) for name in checkpoint.shapes)
    return sorted({match[0] for match in found if match}, key=len, reverse=True)


def load_model(checkpoint: Checkpoint, architecture: str, trust_remote_code: bool) -> Any:
    """Load the Hugging Face model, float32, from a directory or from a GGUF file's tensors.

    Raises:
        UserError: it cannot be loaded, tensors are missing, or some are not finite.
    """
    from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture

    label, files = checkpoint.label, checkpoint.metadata is None
    without = {f"^{re.escape(wrapper)}": "" for wrapper in find_wrappers(checkpoint)}
    try:
        kind: Any = get_hf_model_class_for_architecture(architecture)
        content: dict[str, Any] = {}
        if not files:
            kind, content = _of_gguf(checkpoint)
        with folder_of(_files_of_digest(checkpoint, trust_remote_code), checkpoint.directory.resolve().name) as folder:
            if files:
                refuse_larger(checkpoint, _count_numbers(kind, folder, trust_remote_code))
            model, report = kind.from_pretrained(
                str(folder) if files else None,
                **content,
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",  # others demand rows of certain widths
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                key_mapping=without or None,
                ignore_mismatched_sizes=True,  # to name them below
            )
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds
        reason = first_line(error) or type(error).__name__
        raise UserError(f"{label}: transformers cannot load {architecture} ({reason}).") from error
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, promised = mismatched[0]
        raise UserError(
            f"{label}: tensor '{name}' has shape {list(stored)}, but config.json and the other tensors promise "
            f"{list(promised)}."
        )
    n_layers = model.config.get_text_config().num_hidden_layers
    beyond = _beyond(report["unexpected_keys"], n_layers + further_layers(model.config))
    if beyond:
        raise UserError(
            f"{label}: config.json gives 'num_hidden_layers' as {n_layers}, but the checkpoint holds '{beyond[0]}', "
            "of a layer after those."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise checkpoint.missing(missing[0], len(missing))
    for name, parameter in model.named_parameters():
        check_finite(label, name, parameter.detach())
    return model.eval()


def _files_of_digest(checkpoint: Checkpoint, trust_remote_code: bool) -> list[Path]:
    """List config.json, the weights that the digest is of, and if it is trusted the directory's code."""
    directory, code = checkpoint.directory, checkpoint.directory.glob("*.py") if trust_remote_code else ()
    index = [] if any(shard.name == SINGLE for shard in checkpoint.shards) else [directory / INDEX]
    return [directory / CONFIG, *index, *code, *checkpoint.shards]


def _count_numbers(kind: Any, folder: Path, trust_remote_code: bool) -> int:
    """Count the numbers in the model that config.json describes, without making them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    return sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _beyond(names: Iterable[str], n_layers: int) -> list[str]:
    """Return the names of tensors in layers from this number on."""
    layers = ((name, re.search(r"\.(\d+)\.", name)) for name in sorted(names))
    return [name for name, number in layers if number is not None and int(number[1]) >= n_layers]


def notes_on_further_layers(checkpoint: Checkpoint, config: Any) -> list[str]:
    """Return a note if the checkpoint stores layers that predict further tokens."""
    further, n_layers = further_layers(config), config.get_text_config().num_hidden_layers
    if not further or not _beyond(checkpoint.shapes, n_layers):
        return []
    return [
        f"the checkpoint stores layers that predict further tokens (num_nextn_predict_layers={further}): they are not "
        "part of the model that runs, and are not read"
    ]


def further_layers(config: Any) -> int:
    """Return how many layers that predict further tokens a checkpoint holds behind the model's own."""
    number = getattr(config.get_text_config(), "num_nextn_predict_layers", None)
    return number if isinstance(number, int) and number > 0 else 0


def _of_gguf(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Return the class of a GGUF file's model, and its settings and tensors as transformers takes them."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.for_model(**checkpoint.config)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], {"config": config, "state_dict": tensors}


def boot_bridge(checkpoint: Checkpoint, model: Any, architecture: str, trust_remote_code: bool) -> Any:
    """Return TransformerLens's view of a model that is loaded.

    Raises:
        UserError: TransformerLens cannot read it.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import source

    model.config.architectures = [architecture]  # as TransformerLens spells it
    try:
        # a processor for pictures or sounds is not needed, and loading one may install packages
        with unused_tokenizer() as tokenizer, mock.patch.object(source, "load_modality_processor"):
            return TransformerBridge.boot_transformers(
                str(checkpoint.directory),
                hf_model=model,
                tokenizer=tokenizer,
                device="cpu",
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # an adapter raises many kinds
        reason = first_line(error) or type(error).__name__
        message = f"{checkpoint.label}: TransformerLens cannot read this {architecture} ({reason})."
        if lacking := re.search(r"needs the optional (\w+) library", reason):
            message = (
                f"{checkpoint.label}: TransformerLens reads {architecture} with the help of the package {lacking[1]}, "
                f"which is not installed; allowed: an environment with {lacking[1]}, or another architecture."
            )
        raise UserError(message) from error


def original(owner: Any, name: str) -> nn.Module | None:
    """Return the Hugging Face module behind a bridge component; None if there is none."""
    component = getattr(owner, name, None)
    found = getattr(component, "original_component", None)
    return found if isinstance(found, nn.Module) else None


def notes_of_config(config: Any) -> list[str]:
    """Return notes on settings that a few tokens need not show: about long texts, and clipped values."""
    notes = []
    for place in (config, getattr(config, "attn_config", None)):  # MPT and DBRX keep it one level down
        bound = place.get("clip_qkv") if isinstance(place, dict) else getattr(place, "clip_qkv", None)
        if bound is not None:
            notes.append(
                f"queries, keys and values are clipped at {bound:g} either way, which is not part of any metric"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    named = ["attn_temperature_tuning"] if getattr(config, "attn_temperature_tuning", False) else []
    named += ["llama_4_scaling_beta"] if any(each.get("llama_4_scaling_beta") for each in kinds) else []
    if named:
        notes.append(f"scores grow with the position of the query ({named[0]}); this is not part of any metric")
    if chunk := getattr(config, "attention_chunk_size", None):
        notes.append(
            f"in layers with chunked attention a query sees its own chunk of {chunk} tokens alone; "
            "this is not part of any metric"
        )
    for name in sorted({str(each.get("rope_type")) for each in kinds} & {"dynamic", "longrope"}):
        notes.append(f"the rotation changes with the length of the text ({name}); it is read as for short ones")
    return notes


@contextlib.contextmanager
def unused_tokenizer() -> Iterator[Any]:
    """Yield a tokenizer with one word for TransformerLens, which insists on one even if the checkpoint has none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    special = dict.fromkeys(("unk_token", "pad_token", "bos_token"), "<unk>")
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
        yield PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and advice, which are not this program's output."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # the hub's with it, which a later cell may want to show
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers.utils.logging.enable_progress_bar()
