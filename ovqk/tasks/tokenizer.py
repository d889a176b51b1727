"""A checkpoint's own tokenizer: how it is read, the bounds it must keep, and the tokens that it puts before a text."""

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.files import CONFIG, TOKENIZER_FILES, folder_of
from ovqk.config.schema import TaskConfig
from ovqk.errors import UserError
from ovqk.tasks.normalizers import check_growth
from ovqk.whole_files import read_json

MOST_SPECIAL = 1000  # tokens; a start token, and perhaps a language


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return the checkpoint's own tokenizer; None if its directory or GGUF file holds none.

    Padding, truncation and the random dropout of merges are switched off, whatever the files say.

    Raises:
        UserError: the tokenizer's files are damaged, or their kind cannot be built.
    """
    tokenizer = _load_tokenizer(checkpoint)
    if tokenizer is not None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    return tokenizer


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    directory = checkpoint.directory
    if checkpoint.metadata is not None:
        from ovqk.checkpoints.gguf_tokenizer import tokenizer_of

        return tokenizer_of(checkpoint.metadata, checkpoint.label)
    if not checkpoint.config:  # one file with TransformerLens names: a tokenizer that lies beside it is not its own
        return None
    try:
        if (directory / "tokenizer.json").is_file():
            return _checked(directory / "tokenizer.json")
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            return byte_level_bpe(directory)
        if (directory / "tokenizer.model").is_file():
            from transformers import AutoTokenizer

            with folder_of(directory / name for name in (CONFIG, *TOKENIZER_FILES)) as folder:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return tokenizer.backend_tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception; a Rust panic is not even that
        if "trust_remote_code" in str(error):
            error = ValueError("they are of a kind that the directory's own code builds, which ovqk does not run")
        raise UserError(f"{checkpoint.label}: its tokenizer files cannot be read ({error}).") from error
    return None


def _checked(path: Path) -> Tokenizer:
    """Build a tokenizer from a tokenizer.json, after its normalizers are known to be bounded.

    The check comes first because building already normalizes the added tokens.
    """
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    check_growth(content.get("normalizer") if isinstance(content, Mapping) else None)
    return Tokenizer.from_str(text)


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> Encoding:
    """Return a text's tokens, with the special tokens that the tokenizer puts around a text if `special`.

    Raises:
        UserError: the tokenizer fails, for instance because a regular expression gives up.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=special)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as above
        raise UserError(f"The model's tokenizer fails on {text!r:.60} ({error}).") from error


def tokenizer_for(task: TaskConfig, checkpoint: Checkpoint) -> tuple[Tokenizer | None, list[str]]:
    """Return a cell's tokenizer, or None, and notes for the cell's record.

    A task without words needs no tokenizer. If one cannot be built for it, the result is None and a note says why.

    Raises:
        UserError: the tokenizer cannot be built, and the task has words.
    """
    try:
        return load_tokenizer(checkpoint), []
    except UserError as error:
        if task.variables:
            raise UserError(
                f"{error} task={task.name} needs a tokenizer to find its words; task=none does not."
            ) from error
        return None, [
            f"{error} Tokens are therefore listed by their ids, as #0, and every row of the embedding counts."
        ]


def byte_level_bpe(directory: Path) -> Tokenizer:
    """Build the byte-level BPE tokenizer, as GPT-2 has it, from a directory with vocab.json and merges.txt."""
    from tokenizers import decoders, models, pre_tokenizers

    bpe = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def start_tokens(tokenizer: Tokenizer, checkpoint: Checkpoint) -> list[int]:
    """Return the ids that a checkpoint's tokenizer puts before every text; GPT-2's, for instance, puts none.

    A model that is run without them may fail its task: Gemma 3 answers 12 % of ioi's prompts without its start token
    and 100 % with it. If tokenizer_config.json has `add_bos_token`, that decides, as in transformers' classes. If not,
    the tokenizer's post-processor decides. A GGUF file holds its own settings (`tokenizer.ggml.add_bos_token` and
    `bos_token_id`), so a tokenizer_config.json beside it is not read.

    Args:
        tokenizer: the checkpoint's tokenizer, as `load_tokenizer` reads it.
        checkpoint: the checkpoint, whose folder may hold tokenizer_config.json.

    Raises:
        UserError: the tokenizer fails, or puts more than MOST_SPECIAL tokens around a text; or tokenizer_config.json
            cannot be read, or asks for a start token that the vocabulary does not hold.
    """
    if (added := tokenizer.num_special_tokens_to_add(is_pair=False)) > MOST_SPECIAL:
        raise UserError(
            f"{checkpoint.label}: its tokenizer puts {added} special tokens around a text; allowed: up to "
            f"{MOST_SPECIAL}."
        )
    encoded = encode(tokenizer, "a")
    marked = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
    own = [token for token, _ in takewhile(lambda pair: pair[1] == 1, marked)]
    if checkpoint.metadata is not None:
        return own
    file = checkpoint.directory / "tokenizer_config.json"
    try:
        settings = read_json(file) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint.label}: its tokenizer_config.json cannot be read ({error}).") from error
    settings = settings if isinstance(settings, Mapping) else {}
    asked = settings.get("add_bos_token")
    if asked is None or (asked and own):
        return own
    if not asked:
        return []
    name = settings.get("bos_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    found = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if found is None:
        raise UserError(
            f"{checkpoint.label}: its tokenizer_config.json asks for a start token, and the vocabulary has no "
            f"bos_token {name!r:.60}. Correct its bos_token, or set its add_bos_token to false."
        )
    return [found]
