"""Fixtures that the tests share. No test reaches the network; caches and results are temporary folders."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("WANDB_MODE", None)
os.environ.pop("WANDB_API_KEY", None)

import pytest
import torch
from support.commands import CLI
from support.models import make, make_gpt2, make_llama, shared_model
from tokenizers import Tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tests run side by side; one that sets another number of threads does so for itself alone."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def private_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside temporary folders is read or written."""
    monkeypatch.setenv("OVQK_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "ovqk-cache"))
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A W&B that knows no key, no settings and no server of the person who runs the tests."""
    from ovqk.tracking import track

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(track, "pause", track.Pause())
    monkeypatch.setattr(track, "agent_cells", {})
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(own_wandb: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A W&B server of the test's own, with a key that it takes."""
    from support.wandb_stub import KEY, wandb_server

    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model of one of KINDS, made once."""

    @cache
    def directory(kind: str) -> Path:
        path = tmp_path_factory.mktemp("kinds") / kind
        make(kind, path)
        return path

    return directory


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    make_gpt2(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_llama(directory)
    return directory


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Tokenizer:
    from ovqk.tasks.words import byte_level_bpe

    return byte_level_bpe(shared_model("gpt2-tokenizer"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CLI:
    return CLI(capfd, monkeypatch, tmp_path)
