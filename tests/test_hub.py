"""Models of the hub, from a hub on loopback: what is fetched, what is not, and what two processes share."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT
from support.commands import compose
from support.hub_models import SHARDS, SINGLE, model, opened, own_folder, same_weights, shard
from support.hub_stub import COMMIT, REPO, Hub
from support.models import KINDS, local, make_gpt2
from transformers import AutoModelForCausalLM

from ovqk.activations.forward import Places
from ovqk.cell import runner_of
from ovqk.checkpoints import hub as hub_module
from ovqk.checkpoints.files import file_hash
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.checkpoints.shards import LEFT_OUT, read_header, write_part
from ovqk.weights.families import FAMILIES, family_of

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


def test_the_hash_of_a_file_in_the_hub_cache_is_its_etag_and_not_the_name_of_what_that_shares(
    tmp_path, monkeypatch
) -> None:
    """huggingface_hub keeps one copy for all repositories under another hash, and links blobs to it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
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
