"""Two thousand odd inputs: headers, configs, tokenizers, tables and records. Each ends in a result or in one message,
within 20 s and 1 GB, and no file is written, no command started and nothing unpickled on the way."""

import copy
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import ROOT
from support.commands import compose
from support.models import local, opened
from support.toy import toy_tokenizer

from ovqk import load_results
from ovqk.cell import run_cell
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.checkpoints.shards import read_header
from ovqk.checkpoints.tensors import SafetensorsFiles, index_files
from ovqk.config.schema import TaskConfig, VariableConfig, VariableKind
from ovqk.errors import UserError
from ovqk.records.cells import read_cells
from ovqk.records.record import fault, forget_peak_memory, is_done, peak_memory, read_record
from ovqk.report.page import embedded, page_data
from ovqk.report.thinning import DETAILS
from ovqk.report.write import without_unsound
from ovqk.tasks.tokenizer import load_tokenizer, start_tokens
from ovqk.tasks.words import resolve_task
from ovqk.tracking.sweep_panels import read_sweeps

pytestmark = pytest.mark.slow
SECONDS, HANGS, BYTES = 20.0, 60.0, 10**9
FUZZ: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate], "report_multiple_bugs": False,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}  # fmt: skip
COUNTS = {"headers": 700, "configs": 700, "whole models": 60, "tokenizers": 340, "tables": 100, "records": 100}
assert sum(COUNTS.values()) == 2000

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.integers(-(10**20), 10**20), st.sampled_from([10**9, 2**63]),
    st.floats(), st.text(max_size=8),
    st.sampled_from(["../../x", "\x00", "__main__.Evil", "\ud800", "layer", "default", "yarn"]),
    st.lists(st.integers(-3, 10**10), max_size=4), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip


# --- what is watched ----------------------------------------------------------------------------------------------

FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "pickle.find_class",
)
CHANGING = {
    "os.mkdir": [(0, 2)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.rename": [(0, 2), (1, 3)],
    "os.link": [(1, 3)], "os.symlink": [(1, 2)], "os.chmod": [(0, 2)], "os.chown": [(0, 3)], "os.utime": [(0, 3)],
    "os.truncate": [(0, None)], "shutil.rmtree": [(0, 1)],
}  # fmt: skip
"""Audited event -> which of its arguments are paths that it changes, and which say the folder they are relative to."""
watched: list[Path] = []
seen: list[str] = []


def note_side_effects(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what an input does besides being read: an audit hook, which lasts as long as the process."""
    if not watched:
        return
    if event in FORBIDDEN:
        seen.append(f"{event} {arguments!r:.200}")
    changed = [
        Path(place_of(arguments[folder] if folder is not None else None), os.fsdecode(arguments[path]))
        for path, folder in CHANGING.get(event, ())
        if isinstance(arguments[path], str | bytes | os.PathLike)
    ]
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        changed = [path] if writes else []
    for path in changed:
        if isinstance(path, str | bytes | os.PathLike):
            whole = Path(os.fsdecode(path)).absolute()
            if not any(whole.is_relative_to(folder) for folder in (*watched, Path("/proc"), Path("/dev"))):
                seen.append(f"{event} {whole}")


def place_of(descriptor: object) -> Path:
    """Return the folder that a descriptor is open on; where the process is, if there is none."""
    known = isinstance(descriptor, int) and descriptor >= 0
    return Path(f"/proc/self/fd/{descriptor}").readlink() if known else Path.cwd()


sys.addaudithook(note_side_effects)


@contextmanager
def bounded(allowed: Path) -> Iterator[None]:
    """Run one input: it may raise a UserError, and write into one folder."""
    from ovqk.scratch import scratch_folder

    watched[:] = [allowed, scratch_folder(), Path(os.environ["OVQK_CACHE_DIR"])]
    forget_peak_memory()
    before, started = peak_memory(), time.monotonic()
    faulthandler.dump_traceback_later(
        HANGS, exit=True, file=sys.__stderr__
    )  # also out of code that Python cannot interrupt
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
        watched.clear()
    assert time.monotonic() - started < SECONDS
    assert peak_memory() - before < BYTES
    assert seen == []


def mutated(data: st.DataObject, content: Any, times: int = 3) -> Any:
    """The content with some of its values replaced by odd ones, at any depth; keys may be lost or come again."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, times))):
        place, key = content, None
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 2)) == 0:
                break
            place = inner
        if key is None or not isinstance(place, dict | list) or not place:
            continue
        if isinstance(place, dict) and data.draw(st.integers(0, 5)) == 0:
            del place[key]
        else:
            place[key] = data.draw(ODD)
    return content


def as_text(content: Any) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


def torn(data: st.DataObject, content: bytes) -> bytes:
    """Bytes that are cut, or of which some are others."""
    kind = data.draw(st.integers(0, 3))
    if kind == 0:
        return content[: data.draw(st.integers(0, len(content)))]
    if kind == 1 and content:
        place = data.draw(st.integers(0, len(content) - 1))
        return content[:place] + data.draw(st.binary(max_size=4)) + content[place + 1 :]
    return content


# --- checkpoints --------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=COUNTS["headers"], **FUZZ)
def test_headers(tmp_path, tiny_gpt2, data) -> None:
    path = tmp_path / "model.safetensors"
    whole = (tiny_gpt2 / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = mutated(data, json.loads(whole[8 : 8 + length]))
    text = torn(data, as_text(header))
    size = len(text) if data.draw(st.integers(0, 4)) else data.draw(st.integers(0, 2**64 - 1))
    path.write_bytes(size.to_bytes(8, "little") + text + torn(data, whole[8 + length :]))
    with bounded(tmp_path):
        files, shapes, unread = index_files([path])
        tensors = SafetensorsFiles(files, shapes, unread)
        for name in files:
            assert tuple(tensors.read(name).shape) == shapes[name]


def configured(source: Path, folder: Path, data: st.DataObject) -> Path:
    """A copy of a checkpoint with an odd config.json; the weights are linked."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    text = torn(data, as_text(mutated(data, json.loads((source / "config.json").read_text()))))
    (folder / "config.json").write_bytes(text)
    return folder


def read_all(directory: Path) -> None:
    source = opened(directory)
    for index in range(source.architecture.n_layers):
        source.layer(index)
    source.embeddings()
    source.first_mlp()


@given(data=st.data())
@settings(max_examples=COUNTS["configs"], **FUZZ)
def test_configs(tmp_path, tiny, data) -> None:
    kind = data.draw(
        st.sampled_from(["gpt2", "llama", "gpt_neo", "gpt_neox", "gemma2", "phi3-longrope", "olmo3", "opt"])
    )
    directory = configured(tiny(kind), tmp_path / "m", data)
    with bounded(tmp_path):
        read_all(directory)


@given(data=st.data())
@settings(max_examples=COUNTS["whole models"], **FUZZ)
def test_configs_of_models_that_are_loaded_whole(tmp_path, bloom, data) -> None:
    directory = configured(bloom, tmp_path / "m", data)
    with bounded(tmp_path):
        read_all(directory)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory) -> Path:
    from transformers import BloomConfig, BloomForCausalLM

    directory = tmp_path_factory.mktemp("bloom")
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=24, n_layer=2, n_head=4)).save_pretrained(directory)
    opened(directory)  # TransformerLens is imported, which opens files of its own
    return directory


NORMALIZERS = st.one_of(
    st.builds(
        lambda kind, pattern, content: {"type": "Replace", "pattern": {kind: pattern}, "content": content},
        st.sampled_from(["String", "Regex"]),
        st.sampled_from(["w", "", "ww", "x*", ".", "(?=w)", r"\b"]),
        st.sampled_from(["", "w", "ww", "w" * 1000]),
    ),
    st.sampled_from(
        [{"type": kind} for kind in ("NFKD", "NFC", "Lowercase", "ByteLevel", "Nmt", "StripAccents")]
        + [{"type": "Prepend", "prepend": "w" * 100}, {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}]
    ),
)


@given(data=st.data())
@settings(max_examples=COUNTS["tokenizers"], **FUZZ)
def test_tokenizers(tmp_path, tiny_gpt2, data) -> None:
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(tiny_gpt2, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    whole = json.loads(toy_tokenizer(40).to_str())
    if data.draw(st.booleans()):
        whole["normalizer"] = {"type": "Sequence", "normalizers": data.draw(st.lists(NORMALIZERS, max_size=60))}
    if data.draw(st.booleans()):
        pattern = {"Regex": data.draw(st.sampled_from(["(w+w+)+x", "(?:(w|w)+)+x", ".*", "(", r"\d"]))}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        whole["pre_tokenizer"] = data.draw(st.sampled_from([split, {"type": "Sequence", "pretokenizers": [split] * 9}]))
    if data.draw(st.booleans()):
        marks = [{"SpecialToken": {"id": "w0", "type_id": 0}}] * data.draw(st.sampled_from([0, 1, 999, 5000]))
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        special = {"w0": {"id": "w0", "ids": [0] * data.draw(st.sampled_from([1, 3000])), "tokens": ["w0"]}}
        whole["post_processor"] = {
            "type": "TemplateProcessing", "single": marks + text, "pair": text, "special_tokens": special,
        }  # fmt: skip
    if data.draw(st.integers(0, 4)) == 0:
        whole["model"] |= {"type": "BPE", "dropout": 0.5, "merges": [], "fuse_unk": data.draw(st.booleans())}
    if data.draw(st.integers(0, 3)):
        (folder / "tokenizer.json").write_bytes(torn(data, as_text(mutated(data, whole))))
    else:
        (folder / "vocab.json").write_bytes(torn(data, as_text(mutated(data, {f"w{n}": n for n in range(20)}))))
        (folder / "merges.txt").write_bytes(torn(data, b"#version: 0.2\nw 1\nw 2\n"))
    (folder / "tokenizer_config.json").write_bytes(
        as_text(mutated(data, {"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    )
    words = {"a": [f"w{n}" for n in range(4, 16)]}
    task = TaskConfig("x", "x", words=words, variables={"v": VariableConfig(VariableKind.set, words="a")})
    with bounded(tmp_path):
        checkpoint = open_checkpoint(local(folder))
        tokenizer = load_tokenizer(checkpoint)
        resolve_task(task, tokenizer, 40, "x")
        if tokenizer is not None:
            start_tokens(tokenizer, checkpoint)


# --- results ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """Two cells, one of which is left alone."""
    results = tmp_path_factory.mktemp("computed") / "results"
    quick = ("analysis.components=1", "nulls.draws=19", "nulls.resamples=20", "nulls.subsamples=20", "tracking=none")
    for task in ("ioi", "none"):
        run_cell(compose(f"task={task}", *quick, "sweep=both", f"results_dir={results}"))
    return results


def others_stand(results: Path, bad: Path) -> None:
    """Every reader gives the other cell."""
    record = read_record(bad)
    sound = record is not None and record.get("status") == "done" and fault(bad, record) is None
    assert is_done(bad) == sound
    assert "none" in set(load_results(results)["cells"]["task"])
    assert all(len(sweep.cells) >= 2 for sweep in read_sweeps(results))
    cells, failures = read_cells(results)
    assert len(cells) + len(failures) == 2

    def make(shown: Any, _: Any) -> str:
        return embedded(page_data(shown, [], results, DETAILS[-1]))

    _, shown, _ = without_unsound(make, cells, results)
    assert "none" in {cell.record["task"] for cell in shown}


def spoiled(data: st.DataObject, frame: pd.DataFrame) -> pd.DataFrame:
    """A table with a column lost, of another kind, or with odd values; or with rows lost or doubled."""
    changes: list[Callable[[pd.DataFrame, str], pd.DataFrame]] = [
        lambda table, name: table.drop(columns=name),
        lambda table, name: table.assign(**{name: "x"}),
        lambda table, name: table.assign(**{name: None}),
        lambda table, name: table.assign(**{name: 10**9}),
        lambda table, name: table.assign(**{name: -1}),
        lambda table, name: table.assign(**{name: np.inf}),
        lambda table, name: table.assign(**{name: [["x"]] * len(table)}),
        lambda table, name: table.assign(**{name: [b"\xff"] * len(table)}),
        lambda table, name: table.iloc[: len(table) // 2],
        lambda table, name: pd.concat([table, table]),
        lambda table, name: table.iloc[:0],
        lambda table, name: table.iloc[::-1],
    ]
    return data.draw(st.sampled_from(changes))(frame, data.draw(st.sampled_from(list(frame.columns))))


@contextmanager
def changed(results: Path, name: str) -> Iterator[Path]:
    """A file of the first cell that is as it was afterwards."""
    (bad,) = results.glob("mini-attn/ioi/b03-*")
    path = bad / name
    before = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(before)


@given(data=st.data())
@settings(max_examples=COUNTS["tables"], **FUZZ)
def test_tables(computed, data) -> None:
    (bad,) = computed.glob("mini-attn/ioi/b03-*")
    name = data.draw(st.sampled_from(sorted(path.name for path in bad.glob("*.parquet"))))
    with changed(computed, name) as path, changed(computed, "record.json") as record:
        if data.draw(st.integers(0, 3)):
            frame = spoiled(data, pd.read_parquet(path))
            frame.to_parquet(path, index=False)
            content = json.loads(record.read_text())
            content["tables"][path.stem] = len(frame)  # as whoever means harm would write
            record.write_text(json.dumps(content))
        else:
            path.write_bytes(torn(data, path.read_bytes()))
        with bounded(computed.parent):
            others_stand(computed, bad)


@given(data=st.data())
@settings(max_examples=COUNTS["records"], **FUZZ)
def test_records(computed, data) -> None:
    (bad,) = computed.glob("mini-attn/ioi/b03-*")
    with changed(computed, "record.json") as path:
        path.write_bytes(torn(data, as_text(mutated(data, json.loads(path.read_text()), times=4))))
        with bounded(computed.parent):
            others_stand(computed, bad)


@pytest.mark.parametrize("change", [
    lambda path: (path / "new").write_text("x"),
    lambda path: (path / "new").mkdir(),
    lambda path: (path / "file").unlink(),
    lambda path: (path / "file").rename(path / "inside" / "file"),
    lambda path: (path / "inside" / "other").rename(path / "file"),
    lambda path: (path / "new").symlink_to(path / "file"),
    lambda path: (path / "folder").rmdir(),
    lambda path: shutil.rmtree(path / "folder"),
    lambda path: os.truncate(path / "file", 0),
])  # fmt: skip
def test_the_watch_sees_what_it_is_for(tmp_path, change) -> None:
    for name in ("inside", "folder"):
        (tmp_path / name).mkdir()
    for name in ("file", "inside/other"):
        (tmp_path / name).write_text("x")
    with pytest.raises(AssertionError), bounded(tmp_path / "inside"):
        change(tmp_path)
    assert seen
    seen.clear()


def test_a_hang_is_ended_also_in_code_that_python_cannot_interrupt(tmp_path) -> None:
    code = """
import pathlib, sys, test_fuzz
test_fuzz.HANGS = 1.0
with test_fuzz.bounded(pathlib.Path(sys.argv[1])):
    while True:
        sum(range(10**9))  # one call that Python cannot interrupt
"""
    folders = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": folders, "OVQK_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 1 and "Timeout" in done.stderr


def test_a_header_of_a_few_bytes_is_read() -> None:
    assert read_header(lambda offset, length: (2).to_bytes(8, "little") if offset == 0 else b"{}", 10).tensors == {}
