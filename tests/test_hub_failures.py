"""Models of the hub, when it refuses, falls silent or is out of reach: one message, and nothing incomplete is kept."""

import json
import shutil
import time
from pathlib import Path

import pytest
from support.commands import compose
from support.hub_models import SHARDS, SINGLE, at_once, fails, model, opened, own_folder, same_weights, shard
from support.hub_stub import COMMIT, REPO, Hub
from support.models import BUNDLED, make_gpt2

from ovqk.checkpoints import hub as hub_module
from ovqk.checkpoints import hub_timeout
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import ModelConfig, Source
from ovqk.errors import UserError
from ovqk.weights.families import tensors_read
from ovqk.weights.readers import open_weights

# --- what goes wrong ----------------------------------------------------------------------------------------------


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
