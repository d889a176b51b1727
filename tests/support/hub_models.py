"""A model on the hub, opened: what tests of fetching and of its failures share. Its fixtures are in conftest.py."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.files import cache_folder
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_weights
from support.hub_stub import COMMIT, REPO
from support.models import local

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SINGLE = "model.safetensors"


def model(revision: str = "main", repo: str = REPO) -> ModelConfig:
    return ModelConfig(name="tiny", source=Source.hub, repo=repo, revision=revision)


def opened(timeout: float = 20.0, **keys) -> Checkpoint:
    return open_checkpoint(model(**keys), timeout, tensors_read)


def shard(directory: Path, second: tuple[str, ...]) -> None:
    """Save a model's tensors as two shards with an index; the second holds those whose names contain one of these."""
    tensors = load_file(directory / SINGLE)
    weight_map = {name: SHARDS[any(part in name for part in second)] for name in tensors}
    for file in SHARDS:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / SINGLE).unlink()


def same_weights(checkpoint: Checkpoint, config: ModelConfig, other: Path) -> bool:
    """Whether everything that ovqk reads is the same as in a local directory."""
    ours, theirs = open_weights(checkpoint, config), open_weights(open_checkpoint(local(other)), local(other))
    pairs = [(ours.layer(i), theirs.layer(i)) for i in range(theirs.architecture.n_layers)]
    pairs += [(ours.embeddings(), theirs.embeddings()), (ours.first_mlp(), theirs.first_mlp())]
    for mine, yours in pairs:
        assert type(mine) is type(yours)
        if isinstance(yours, str):  # why block 0 has no MLP that is read
            assert mine == yours
            continue
        for name, value in vars(yours).items():
            found = getattr(mine, name)
            if torch.is_tensor(value) and not torch.equal(found, value):
                return False
            if hasattr(value, "weight") and not torch.equal(found.weight, value.weight):
                return False
    return True


def own_folder() -> Path:
    return cache_folder() / "hub" / REPO.replace("/", "--") / COMMIT


def fails(match: str, timeout: float = 20.0, **keys) -> None:
    with pytest.raises(UserError, match=match) as caught:
        opened(timeout=timeout, **keys)
    assert "\n" not in str(caught.value)


@contextmanager
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the pauses between the library's attempts."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        yield
