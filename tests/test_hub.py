"""Models of the hub, from a hub on loopback: what is fetched and what is not, and what happens when it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT
from support.commands import compose
from support.hub_stub import COMMIT, REPO, Hub
from support.models import BUNDLED, KINDS, local, make_gpt2
from transformers import AutoModelForCausalLM

from ovqk.activations.forward import Places
from ovqk.cell import runner_of
from ovqk.checkpoints import hub as hub_module
from ovqk.checkpoints import hub_timeout
from ovqk.checkpoints.checkpoint import Checkpoint
from ovqk.checkpoints.files import cache_folder, file_hash
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.checkpoints.shards import LEFT_OUT, read_header, write_part
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.weights.families import FAMILIES, family_of, tensors_read
from ovqk.weights.readers import open_weights

WIDE = {"n_inner": 2048}
"""An MLP that is most of a tiny GPT-2."""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SINGLE = "model.safetensors"


def model(revision: str = "main", repo: str = REPO) -> ModelConfig:
    return ModelConfig(name="tiny", source=Source.hub, repo=repo, revision=revision)


def opened(timeout: float = 20.0, **keys) -> Checkpoint:
    return open_checkpoint(model(**keys), timeout, tensors_read)


@pytest.fixture(autouse=True)
def nothing_asked_before(monkeypatch) -> None:
    """A process that has asked no hub yet."""
    monkeypatch.setattr(hub_module, "unanswered", {})
    monkeypatch.setattr(hub_timeout, "unreached", set())


@pytest.fixture
def hf_cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and an empty one of ovqk's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("OVQK_CACHE_DIR", str(tmp_path / "ovqk"))
    return tmp_path / "hf"


@pytest.fixture
def hub(hf_cache, monkeypatch) -> Iterator[Hub]:
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
def wide(tmp_path) -> Path:
    """A tiny GPT-2 with a wide MLP and a tokenizer, in one file."""
    make_gpt2(tmp_path / "wide", **WIDE)
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path / "wide")
    return tmp_path / "wide"


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


# --- what is fetched ----------------------------------------------------------------------------------------------


def test_a_shard_without_a_needed_tensor_is_not_fetched(hub, wide) -> None:
    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    hub.hold(wide)
    checkpoint = opened()
    assert not any(SHARDS[1] in request for request in hub.requests)
    assert hub.bytes_of(SHARDS[1]) == 0 and hub.bytes_of(SHARDS[0]) >= len(hub.files[SHARDS[0]])
    assert checkpoint.revision == COMMIT
    assert same_weights(checkpoint, model(), wide)


def test_where_most_bytes_are_not_needed_single_tensors_are_read_by_ranges(hub, wide) -> None:
    hub.hold(wide)
    data = hub.files[SINGLE]
    header = read_header(lambda offset, length: data[offset : offset + length], len(data))
    needed = [name for name in header.tensors if FAMILIES["gpt2"].reads(name)]
    checkpoint = opened()
    assert hub.bytes_of(SINGLE) == header.start + header.size(needed) < len(data) / 2
    unread = header.runs(set(header.tensors) - set(needed))
    for sent in hub.sent:
        assert sent.name != SINGLE or all(
            sent.start + sent.size <= start or start + size <= sent.start for start, size in unread
        )
    adjoining = len(header.runs(needed))
    assert sum(sent.name == SINGLE for sent in hub.sent) == 2 + adjoining < len(needed) / 2
    assert same_weights(checkpoint, model(), wide)


def test_where_most_bytes_are_needed_the_whole_file_goes_to_the_hub_cache(hub, tmp_path, hf_cache) -> None:
    make_gpt2(tmp_path / "narrow")
    hub.hold(tmp_path / "narrow")
    checkpoint = opened()
    assert hub.bytes_of(SINGLE) > len(hub.files[SINGLE])  # and the header, which told
    assert (hf_cache / "models--someone--tiny" / "snapshots" / COMMIT / SINGLE).is_file()
    assert not (own_folder() / SINGLE).exists()
    assert same_weights(checkpoint, model(), tmp_path / "narrow")


def test_what_is_here_is_not_fetched_again(hub, wide, monkeypatch) -> None:
    from huggingface_hub import constants

    hub.hold(wide)
    first = opened()
    hub.forget()
    again = opened()
    assert hub.requests == [f"HEAD /{REPO}/resolve/main/config.json"] and not hub.sent
    hub.hang = "."
    hanging = opened(timeout=0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = opened()
    assert first == again == hanging == offline


def test_whole_files_in_the_hub_cache_are_used_first(hub, wide, monkeypatch) -> None:
    from huggingface_hub import hf_hub_download

    hub.hold(wide)
    for name in hub.files:
        hf_hub_download(REPO, name)
    hub.forget()
    checkpoint = opened()
    assert not hub.sent and not (own_folder() / SINGLE).exists()
    assert same_weights(checkpoint, model(), wide)
    hub.answers = {"/api/": (500, "")}  # and with no listing, the cache is enough
    shutil.rmtree(own_folder())
    assert opened(timeout=1.0).digest == checkpoint.digest


def test_the_digest_is_of_the_whole_files_however_they_came(hub, wide, hf_cache) -> None:
    from huggingface_hub import hf_hub_download

    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    of_a_copy = open_checkpoint(local(wide)).digest
    hub.hold(wide)
    assert opened().digest == of_a_copy  # one shard was fetched, the other was not
    shutil.rmtree(hf_cache)
    shutil.rmtree(own_folder())
    for name in hub.files:
        hf_hub_download(REPO, name)
    assert opened().digest == of_a_copy
    shutil.rmtree(hf_cache)
    shutil.rmtree(own_folder())
    hub.files[SHARDS[1]] += b" "  # of a shard that is not fetched
    assert opened().digest != of_a_copy


def test_the_hash_of_a_file_in_the_hub_cache_is_its_etag_and_not_the_name_of_what_that_shares(tmp_path) -> None:
    """huggingface_hub keeps one copy for all repositories under another hash, and links blobs to it."""
    for place in ("blobs/ab", "models--a--b/blobs", "models--a--b/snapshots/c"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / ("ab" * 32)).write_bytes(b"x")
    blob, pointer = tmp_path / "models--a--b" / "blobs" / ("12" * 32), tmp_path / "models--a--b/snapshots/c" / SINGLE
    blob.symlink_to(Path("../../blobs/ab") / ("ab" * 32))
    pointer.symlink_to(Path("../../blobs") / blob.name)
    assert pointer.read_bytes() == b"x" and file_hash(pointer) == "12" * 32


def test_a_part_of_a_file_has_the_digest_of_the_whole(hub, wide) -> None:
    hub.hold(wide)
    checkpoint = opened()
    assert (own_folder() / SINGLE).stat().st_size < len(hub.files[SINGLE]) / 2
    assert checkpoint.digest == open_checkpoint(local(wide)).digest


def test_of_an_architecture_outside_the_table_everything_is_fetched(hub, wide, hf_cache) -> None:
    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    config = json.loads((wide / "config.json").read_text()) | {"model_type": "bloom"}
    (wide / "config.json").write_text(json.dumps(config))
    hub.hold(wide)
    checkpoint = opened()
    assert [hub.bytes_of(name) for name in SHARDS] == [len(hub.files[name]) for name in SHARDS]
    here = {path.name for path in checkpoint.directory.iterdir()}
    assert here == {"config.json", "model.safetensors.index.json", "tokenizer.json", *SHARDS}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_family_reads_is_enough(kind, tiny, tmp_path) -> None:
    whole, part = tiny(kind), tmp_path / "part"
    part.mkdir()
    shutil.copy(whole / "config.json", part)
    family = family_of(json.loads((whole / "config.json").read_text()))
    tensors = load_file(whole / SINGLE)
    kept = {name: tensor for name, tensor in tensors.items() if family.reads(name)}
    mlps = {
        re.split(r"\.(?:mlp|fc\d)\.", name)[0].split(".")[-1] for name in kept if re.search(r"\.(mlp|fc\d)\.", name)
    }
    assert mlps == (set() if family.experts else {"0"})
    assert len(kept) < len(tensors)
    save_file(kept, part / SINGLE)
    assert same_weights(open_checkpoint(local(part)), local(part), whole)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
def test_a_text_model_beside_one_for_pictures_is_read_alone(prefix) -> None:
    reads = FAMILIES["gemma3"].reads
    assert reads(f"{prefix}layers.11.self_attn.q_norm.weight") and reads(f"{prefix}embed_tokens.weight")
    assert reads("lm_head.weight") and reads("language_model.lm_head.weight")
    assert not reads(f"{prefix}layers.10.mlp.up_proj.weight")
    assert not reads("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight")


def test_a_part_that_lacks_what_is_read_now_is_fetched_again(hub, wide) -> None:
    hub.hold(wide)
    opened()
    data, path = hub.files[SINGLE], own_folder() / SINGLE
    header = read_header(lambda offset, length: data[offset : offset + length], len(data))
    names = ["transformer.wte.weight"]
    write_part(path, header, names, iter(data[a : a + n] for a, n in header.runs(names)))  # by another version of ovqk
    assert same_weights(opened(), model(), wide)


def test_a_part_is_an_ordinary_file_of_the_same_name(hub, wide) -> None:
    hub.hold(wide)
    opened()
    with safe_open(own_folder() / SINGLE, framework="pt") as part:
        metadata = part.metadata()
        held = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118
    tensors = load_file(wide / SINGLE)
    assert metadata["format"] == "pt" and set(json.loads(metadata[LEFT_OUT])) | set(held) == set(tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in held.items())


def test_no_request_is_for_more_than_a_chunk(hub, wide, monkeypatch) -> None:
    monkeypatch.setattr(hub_module, "CHUNK", 10_000)
    hub.hold(wide)
    checkpoint = opened()
    ranges = [sent.size for sent in hub.sent if sent.name == SINGLE]
    assert max(ranges[2:]) == 10_000 and len(ranges) > 30
    assert same_weights(checkpoint, model(), wide)


# --- what is said -------------------------------------------------------------------------------------------------


def test_the_size_is_stated_before_anything_is_fetched(hub, wide, capfd) -> None:
    from rich.filesize import decimal

    hub.hold(wide)
    opened()
    size = hub.bytes_of(SINGLE) - sum(sent.size for sent in hub.sent[2:4] if sent.name == SINGLE)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"model=tiny ({REPO}@main): fetching {decimal(size)} of {decimal(len(hub.files[SINGLE]))}: attention, norms, "
        "embeddings and the first MLP\n"
    )
    opened()
    assert capfd.readouterr().err == ""


def test_a_terminal_sees_how_far_it_is(hub, wide, capfd, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("huggingface_hub.utils.are_progress_bars_disabled", lambda: False)  # others may turn them off
    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    hub.hold(wide)
    opened()
    total = f"{len(hub.files[SHARDS[0]]) / 1000:.1f}"
    assert f"{total}/{total} kB" in capfd.readouterr().err


# --- what goes wrong: one message, and nothing incomplete that is taken for whole ------------------------------------


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


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"config.json": (403, "GatedRepo")},
            r"model=tiny \(someone/tiny@main\): the repository is gated.*hf auth login",
        ),
        ({"config.json": (401, "RepoNotFound")}, "no such repository, or it is private"),
        ({"config.json": (404, "EntryNotFound")}, r"the repository holds no config\.json"),
        ({"resolve": (403, "")}, r"refuses access \(HTTP 403\)"),
        ({"GET .*safetensors": (401, "")}, r"refuses access \(HTTP 401\)"),
        ({"GET .*safetensors": (404, "EntryNotFound")}, r"did not deliver the files \(RemoteEntryNotFoundError"),
        ({"resolve": (429, "")}, r"asks for fewer requests \(HTTP 429\)"),
        ({"GET .*safetensors": (429, "")}, r"asks for fewer requests \(HTTP 429\)"),
        ({"GET .*safetensors": (503, "")}, r"did not deliver the files \(HfHubHTTPError: Server error '503"),
    ],
)
def test_what_the_hub_refuses_is_one_message(hub, wide, answers, message, monkeypatch) -> None:
    hub.hold(wide)
    hub.answers = answers
    with at_once(monkeypatch):
        fails(message)
    hub.answers = {}
    assert same_weights(opened(), model(), wide)


def test_a_hub_that_answers_nothing_but_errors_is_given_up_in_time(hub, wide) -> None:
    hub.hold(wide)
    started = time.monotonic()
    hub.answers = {"GET .*safetensors": (503, "")}
    fails(r"the hub delivered nothing for 0\.5 s \(hub_timeout; it last answered HTTP 503\)", timeout=0.5)
    hub.answers = {"GET .*safetensors": (429, "")}
    fails(r"asks for fewer requests \(HTTP 429\)", timeout=0.5)
    assert time.monotonic() - started < 5


def test_a_revision_or_a_repository_that_is_not_there(hub, wide) -> None:
    hub.hold(wide)
    fails(r"model\.revision=nowhere does not exist in the repository", revision="nowhere")
    fails("no such repository, or it is private", repo="someone/other")
    fails(r"model\.repo=a/b/c: must be OWNER/NAME", repo="a/b/c")
    with pytest.raises(UserError, match=r"model\.repo: not set"):
        open_checkpoint(ModelConfig(name="tiny", source=Source.hub), hub_timeout=1.0)


def test_weights_that_the_repository_does_not_hold(hub, wide) -> None:
    hub.hold(wide)
    del hub.files[SINGLE]
    hub.files["pytorch_model.bin"] = b"x"
    fails(r"the repository holds no model\.safetensors; ovqk unpickles nothing")


@pytest.mark.parametrize("cached", [False, True])
def test_what_stands_beside_the_checkpoint_that_is_read_is_told(hub, wide, cached, monkeypatch) -> None:
    from huggingface_hub import constants

    whole = (wide / SINGLE).read_bytes()
    shard(wide, second=("h.1.mlp",))
    (wide / SINGLE).write_bytes(whole)
    (wide / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    hub.hold(wide)
    if cached:  # as another program left all of it, with no hub to be asked
        from huggingface_hub import hf_hub_download

        for name in hub.files:
            hf_hub_download(REPO, name)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = opened()
    two, adapter = checkpoint.notes
    assert two == f"the repository holds more than one checkpoint: {SINGLE} was read, and {', '.join(SHARDS)} was not"
    assert adapter.startswith("the repository holds an adapter (LoRA or the like), which was not applied")
    assert {two, adapter} <= set(open_weights(checkpoint, model()).notes)


@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_alone_in_a_repository_is_called_so(hub, wide, config) -> None:
    """With the config.json of its base model beside it, or without."""
    (wide / SINGLE).rename(wide / "adapter_model.safetensors")
    (wide / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    if not config:
        (wide / "config.json").unlink()
    hub.hold(wide)
    fails(r"an adapter \(LoRA or the like\) of someone/base, without the weights that it adapts")


def test_an_adapter_alone_in_the_hub_cache_is_called_so(filled_cache) -> None:
    snapshot = filled_cache / "models--someone--tiny" / "snapshots" / COMMIT
    (snapshot / "config.json").rename(snapshot / "adapter_config.json")
    fails("an adapter", timeout=1.0)


def test_a_shard_that_the_index_names_and_the_repository_does_not_hold(hub, wide) -> None:
    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    hub.hold(wide)
    del hub.files[SHARDS[1]]
    fails(rf"index\.json names {SHARDS[1]}, which the repository does not hold")
    assert not any("storage" in request for request in hub.requests)  # before anything is fetched


@pytest.mark.parametrize("index", [b"{", b"{}", b'{"weight_map": {"a": "../secret"}}'])
def test_a_damaged_index(hub, wide, index) -> None:
    hub.hold(wide)
    del hub.files[SINGLE]  # which would be read in its place
    hub.files["model.safetensors.index.json"] = index
    fails(r"model\.safetensors\.index\.json is damaged")


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs", b"\x08" + b"\0" * 7 + b'{"a": 1}', b"\xff" * 99])
def test_a_file_on_the_hub_that_is_no_safetensors_file(hub, wide, data) -> None:
    hub.hold(wide)
    hub.files[SINGLE] = data
    fails(r"model\.safetensors is no complete safetensors file on the hub|arrived incomplete")


@pytest.mark.parametrize("spared", [0, 9], ids=["header", "tensors"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("short", r"model\.safetensors arrived incomplete: \d+ bytes from byte \d+ on instead of \d+"),
        ("deaf", r"model\.safetensors arrived incomplete: \d+ bytes from byte \d+ on instead of \d+"),
        ("cut", r"did not deliver the files \(RemoteProtocolError: peer closed connection"),
    ],
)
def test_a_range_that_is_cut_short_leaves_nothing(hub, wide, how, message, spared, monkeypatch) -> None:
    hub.hold(wide)
    hub.spared = spared
    setattr(hub, how, {SINGLE})
    with at_once(monkeypatch):
        fails(message)
    assert {path.suffix for path in own_folder().iterdir()} <= {".json", ".lock"}
    setattr(hub, how, set())
    assert same_weights(opened(), model(), wide)


def test_a_whole_file_that_is_cut_short_leaves_nothing(hub, tmp_path, hf_cache, monkeypatch) -> None:
    make_gpt2(tmp_path / "narrow")
    shard(tmp_path / "narrow", second=("h.2",))
    hub.hold(tmp_path / "narrow")
    hub.cut = {SHARDS[0]}
    with at_once(monkeypatch):
        fails(r"did not deliver the files \(RemoteProtocolError: peer closed connection")
    assert not list(hf_cache.glob(f"**/{SHARDS[0]}")) and not list(hf_cache.glob("**/*.incomplete"))
    hub.cut = set()
    assert same_weights(opened(), model(), tmp_path / "narrow")


@pytest.mark.parametrize("where", ["config.json", "/api/models/", "GET .*safetensors", "/storage/"])
def test_a_hub_that_falls_silent_is_given_up_in_time(hub, wide, where) -> None:
    hub.hold(wide)
    hub.hang = where
    started = time.monotonic()
    fails(r"not in a cache, and the hub delivered nothing for 1 s \(hub_timeout\)", timeout=1.0)
    assert time.monotonic() - started < 5
    hub.hang = None
    fails(r"the hub delivered nothing for 1 s", timeout=1.0)  # the same question, at once
    assert same_weights(opened(), model(), wide)  # with more patience it is another


def test_a_full_disk(hub, wide, monkeypatch) -> None:
    hub.hold(wide)
    plain = Path.open

    def full(path: Path, mode: str = "r", *arguments, **keys):
        return plain(Path("/dev/full") if path.suffix == ".tmp" and mode == "wb" else path, mode, *arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        fails(r"the disk is full \(No space left on device\).*OVQK_CACHE_DIR")
    assert not (own_folder() / SINGLE).exists()
    assert same_weights(opened(), model(), wide)


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub, wide, tmp_path, monkeypatch) -> None:
    hub.hold(wide)
    real = shutil.disk_usage(tmp_path)
    full = tmp_path / "ovqk"
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real._replace(free=1000) if full in Path(p).parents else real)
    fails(r"must be fetched, but only 1\.0 kB are free.*OVQK_CACHE_DIR")
    assert sum(sent.name == SINGLE for sent in hub.sent) == 2  # the header


def test_a_cache_that_cannot_be_written(hub, wide, tmp_path) -> None:
    hub.hold(wide)
    (tmp_path / "ovqk").write_text("a file where the folder should be")
    fails("a cache cannot be written.*OVQK_CACHE_DIR")


# --- without a network --------------------------------------------------------------------------------------------


@pytest.fixture
def filled_cache(hf_cache) -> Path:
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


def test_a_model_in_the_hub_cache_is_read_without_a_network(filled_cache) -> None:
    checkpoint = opened(timeout=1.0)
    assert checkpoint.revision == COMMIT
    assert same_weights(checkpoint, model(), BUNDLED)
    assert not any(str(filled_cache) in str(value) for value in (checkpoint.label, checkpoint.digest))


def test_a_model_cached_by_its_old_name_is_found_by_it(filled_cache) -> None:
    (filled_cache / "models--someone--tiny").rename(filled_cache / "models--tiny")
    assert opened(timeout=1.0, repo="tiny").revision == COMMIT
    (filled_cache / "models--tiny" / "snapshots" / COMMIT / SINGLE).unlink()
    fails("model.repo=tiny: not in the Hugging Face cache by this name; give OWNER/NAME", repo="tiny")


def test_a_shard_that_the_hub_cache_lacks_is_told(filled_cache) -> None:
    (filled_cache / "models--someone--tiny" / "snapshots" / COMMIT / SINGLE).unlink()
    fails("not in the Hugging Face cache, and the hub could not be reached", timeout=1.0)


def test_no_network_and_no_cache_is_one_message(hf_cache) -> None:
    fails(
        r"model=tiny \(someone/other@main\): not in the Hugging Face cache, and the hub could not be",
        repo="someone/other",
    )


def test_a_hub_that_refuses_connections_is_one_message(hub, monkeypatch) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    with at_once(monkeypatch):
        fails(
            r"not in the Hugging Face cache, and the hub could not be reached \(127\.0\.0\.1: Connection refused\)\. "
        )


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses between the library's attempts, which are left out."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def closed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Close the hub; returns what will be asked of it."""
    hub.server.shutdown()
    hub.server.server_close()
    asked: list[str] = []
    before = hub_timeout.Patience.before_request

    def noting(self: hub_timeout.Patience, request) -> None:
        asked.append(f"{request.method} {request.url.path}")
        before(self, request)

    monkeypatch.setattr(hub_timeout.Patience, "before_request", noting)
    return asked


def test_a_hub_that_cannot_be_reached_is_waited_for_once(hub, monkeypatch, pauses) -> None:
    asked = closed(hub, monkeypatch)
    fails("the hub could not be reached")
    assert len(asked) <= hub_timeout.ATTEMPTS and sum(pauses) <= 3  # the library alone: six attempts and 23 s
    asked.clear()
    fails("the hub could not be reached")
    assert not asked  # the same question: the same answer at once
    pauses.clear()
    fails("the hub could not be reached", repo="someone/other")
    assert 1 <= len(asked) <= 2 and not pauses  # another repository: one attempt


def test_a_hub_that_could_not_be_reached_is_asked_again_later(hub, wide, monkeypatch, pauses) -> None:
    from huggingface_hub import constants

    hub.hold(wide)
    with monkeypatch.context() as away:
        away.setattr(hub_module, "REMEMBERED", 0.0)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        away.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(hub.url, "http://127.0.0.1:1")
        )  # nobody listens there
        fails("the hub could not be reached")
        assert hub_timeout.unreached == {"127.0.0.1"}
        away.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert same_weights(opened(), model(), wide)
        assert not hub_timeout.unreached  # it answers: patience as before


def test_a_cached_model_behind_a_hub_that_cannot_be_reached_costs_no_pause(
    hub, filled_cache, monkeypatch, pauses
) -> None:
    asked = closed(hub, monkeypatch)
    assert opened().revision == COMMIT and not pauses
    assert asked


def test_what_the_user_can_mend_is_asked_again_at_once(hub, wide) -> None:
    hub.hold(wide)
    hub.answers = {"config.json": (403, "GatedRepo")}
    fails("the repository is gated")
    hub.answers = {}
    assert same_weights(opened(), model(), wide)


def test_offline_mode_is_named(hf_cache) -> None:
    fails(r"the hub could not be reached \(HF_HUB_OFFLINE is set\)", repo="someone/other")
    assert not hub_module.unanswered  # no wait, nothing to spare


def test_a_step_of_training_is_read_at_its_revision(filled_cache) -> None:
    refs = filled_cache / "models--someone--tiny" / "refs"
    (refs / "main").rename(refs / "step1000")
    cell = compose("model=pythia-70m-deduped", "model.repo=someone/tiny", "model.checkpoint=1000")
    checkpoint = open_checkpoint(cell.model, 1.0, tensors_read)
    assert checkpoint.revision == COMMIT
    assert checkpoint.label == "model=pythia-70m-deduped-step1000 (someone/tiny@step1000)"


# --- other processes ----------------------------------------------------------------------------------------------


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hf"),
    }
    return os.environ | own | {"OVQK_CACHE_DIR": str(tmp_path / "ovqk"), "NO_PROXY": "127.0.0.1,localhost"}


def start(hub: Hub, tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that opens the model and prints its digest."""
    code = (
        "from ovqk.checkpoints.opening import open_checkpoint; from ovqk.config.schema import ModelConfig, Source\n"
        "from ovqk.weights.families import tensors_read\n"
        f"model = ModelConfig(name='tiny', source=Source.hub, repo={REPO!r})\n"
        "print(open_checkpoint(model, reads=tensors_read).digest)"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(hub, tmp_path), **streams)


def test_a_model_of_which_a_part_is_here_is_fetched_whole_to_be_run(hub, wide) -> None:
    hub.hold(wide)
    checkpoint = opened()
    assert not (checkpoint.directory / SINGLE).exists()  # only the part that weights' analyses read
    cell = compose("model=hub", f"model.repo={REPO}", "task=induction", "analysis=activations")
    cell.model = model()
    running = runner_of(checkpoint, cell, None).load(torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        last = Places(torch.tensor([[7]]), torch.tensor([[7]]))
        assert torch.allclose(running.run(tokens, last).logits, plain(tokens).logits[:, -1], atol=1e-5)


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_whole(hub, wide, tmp_path) -> None:
    hub.hold(wide)
    hub.pause = 0.3
    with start(hub, tmp_path) as process:
        limit = time.monotonic() + 60
        while not list(own_folder().glob(f".{SINGLE}.*.tmp")) and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert list(own_folder().glob(f".{SINGLE}.*.tmp")) and not (own_folder() / SINGLE).exists()
    hub.pause = 0
    assert same_weights(opened(), model(), wide)
    assert not list(own_folder().glob("*.tmp"))


def test_two_processes_fetch_the_same_thing_once(hub, wide, tmp_path) -> None:
    hub.hold(wide)
    hub.pause = 0.3
    with start(hub, tmp_path) as one, start(hub, tmp_path) as other:
        said = [process.communicate(timeout=100) for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0], said
    assert {out.strip() for out, _ in said} == {open_checkpoint(local(wide)).digest}
    starts = [sent.start for sent in hub.sent if sent.name == SINGLE and sent.start > 8]
    assert len(starts) == len(set(starts)) > 1


def test_a_cell_of_the_hub_is_that_of_the_same_model_in_a_directory(hub, wide, tmp_path, cli) -> None:
    shard(wide, second=("h.1.mlp", "h.2.mlp"))
    hub.hold(wide)
    quick = ["model.name=tiny", "task=none", "tracking=none", "nulls.draws=9"]
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "model=gpt2-medium",
        f"model.repo={REPO}",
        "hub_timeout=20",
        *quick,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fetching" in done.stderr and "attention, norms, embeddings and the first MLP" in done.stderr
    assert hub.bytes_of(SHARDS[1]) == 0
    code, printed = cli("model=local", f"model.path={wide}", "results_dir=local", *quick)
    assert code == 0, printed
    cells = [next((tmp_path / folder / "tiny").glob("*/*")) for folder in ("results", "local")]
    assert cells[0].name == cells[1].name  # one identity: the same weights, whatever was fetched of them
    tables = [sorted(path.name for path in cell.glob("*.parquet")) for cell in cells]
    assert tables[0] == tables[1] and "heads.parquet" in tables[0]
    for name in tables[0]:
        pd.testing.assert_frame_equal(pd.read_parquet(cells[0] / name), pd.read_parquet(cells[1] / name))
    record = json.loads((cells[0] / "record.json").read_text())
    assert record["provenance"]["revision"] == COMMIT and str(tmp_path) not in json.dumps(record["provenance"])
