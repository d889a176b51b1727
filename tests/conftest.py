"""Fixtures that the tests share. No test reaches the network; caches and results are temporary folders."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("WANDB_MODE", None)
os.environ.pop("WANDB_API_KEY", None)

import pytest
import torch
from support.commands import CLI, compose
from support.hub_models import SINGLE
from support.hub_stub import COMMIT, Hub
from support.many_cells import ManyCells
from support.models import BUNDLED, make, make_gpt2, make_llama, shared_model
from tokenizers import Tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tests run side by side; one that sets another number of threads does so for itself alone."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def many_cells() -> Iterator[ManyCells]:
    """Maps a function over the cells of a statistical test."""
    made = ManyCells()
    with made.process:
        yield made


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
    from ovqk.tasks.tokenizer import byte_level_bpe

    return byte_level_bpe(shared_model("gpt2-tokenizer"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CLI:
    return CLI(capfd, monkeypatch, tmp_path)


# --- the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, an empty one of ovqk's, and a process that has asked no hub yet."""
    from huggingface_hub import constants

    from ovqk.checkpoints import hub, hub_timeout

    monkeypatch.setattr(hub, "unanswered", {})
    monkeypatch.setattr(hub_timeout, "unreached", set())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("OVQK_CACHE_DIR", str(tmp_path / "ovqk"))
    return tmp_path / "hf"


@pytest.fixture
def hub(hf_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback that this process's huggingface_hub asks."""
    from huggingface_hub import constants

    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A tiny GPT-2 with a wide MLP and a tokenizer, in one file."""
    make_gpt2(tmp_path / "wide", n_inner=2048)
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path / "wide")
    return tmp_path / "wide"


@pytest.fixture
def filled_cache(hf_cache: Path) -> Path:
    """The folder layout that huggingface_hub leaves: blobs named by etag, snapshots of links, refs."""
    repo = hf_cache / "models--someone--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(("config.json", SINGLE, "tokenizer.json", "tokenizer_config.json")):
        blob = repo / "blobs" / (f"{number:064x}" if name == SINGLE else f"{number:040x}")
        shutil.copy(BUNDLED / name, blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return hf_cache


# --- results -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one cell that was never tracked."""
    from ovqk.cell import run_cell

    results = tmp_path_factory.mktemp("computed") / "results"
    claims = ('+task.claims.mini-attn.roles.name_mover=["3.0"]', '+task.claims.mini-attn.roles.s_inhibition=["0.4"]')
    run_cell(compose("tracking=none", "nulls.draws=19", f"results_dir={results}", *claims))  # some that compose
    return results


@pytest.fixture
def results(computed: Path, tmp_path: Path) -> Path:
    """A copy of that folder for one test."""
    return shutil.copytree(computed, tmp_path / "results")
