"""Values that are rarely given and mostly wrong: each is one message, or works."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT
from support.commands import compose
from support.models import make_gpt2, make_llama, opened

from ovqk.cell import run_cell
from ovqk.checkpoints import files
from ovqk.config.resolve import user_path
from ovqk.errors import UserError, end_command
from ovqk.report.write import write_report
from ovqk.tasks.claims import parse_head
from ovqk.tracking import __main__ as tracking
from ovqk.tracking.service import settings

QUICK = ("task=none", "analysis=qk", "analysis.components=0", "tracking=none")


@pytest.mark.parametrize(("override", "message"), [
    ("hub_timeout=nan", "hub_timeout=nan: must be a positive number of seconds"),
    ("hub_timeout=inf", "hub_timeout=inf: must be a positive number of seconds"),
    ("analysis.offsets=[1000000000000000000]", "allowed are one or more offsets in 0 .. 10000000"),
    ("results_dir='~/x'", "results_dir=~/x: the shell has not replaced '~'"),
])  # fmt: skip
def test_values_that_are_refused(override, message) -> None:
    with pytest.raises(UserError, match=message):
        compose(*QUICK, override)


@pytest.mark.parametrize("argument", ["results_dir=a~b", "model.path=x^2"])
def test_letters_that_hydra_takes_in_quotes_are_told_with_the_quotes(cli, tmp_path, argument) -> None:
    code, printed = cli(*QUICK, argument)
    assert code == 1 and printed.startswith(f"ovqk: {argument}: the value has signs with a meaning of their own. Quote")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["nan", "-1", "0", "inf", "soon", "1e9"])
def test_times_of_wandb_that_are_none(monkeypatch, text) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", text)
    with pytest.raises(UserError, match=f"WANDB_INIT_TIMEOUT={text}: must be a number of seconds in 0 .. 86400"):
        settings()


def test_a_home_that_nobody_knows(monkeypatch) -> None:
    monkeypatch.delenv("OVQK_CACHE_DIR")
    monkeypatch.setattr(files.platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    with pytest.raises(UserError, match=r"the home folder is not known\. Set HOME, or OVQK_CACHE_DIR"):
        files.cache_folder()

    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(UserError, match=r"model\.path=~/x: Could not determine home directory"):
        user_path("model.path", "~/x")


@pytest.mark.parametrize("name", ["\u0661.\u0662", "1.\u0968", "1.2\n", "9" * 5000 + ".1"])
def test_a_head_in_other_digits_is_none(name, tiny_gpt2) -> None:
    with pytest.raises(UserError, match="is not a head; write"):
        parse_head(name, "task.claims.x", opened(tiny_gpt2).architecture)


def test_a_weight_whose_products_are_infinite_is_refused(tmp_path) -> None:
    make_gpt2(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.attn.c_proj.weight"][0, 0] = -3e38
    save_file(tensors, path)
    source = opened(tmp_path / "m")
    with pytest.raises(
        UserError, match=r"'transformer\.h\.1\.attn\.c_proj\.weight' holds a weight of magnitude 3e\+38"
    ):
        source.layer(1)
    assert torch.isfinite(source.layer(0).W_Q).all()


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", True), ("num_hidden_layers", -1), ("sliding_window", -4), ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1.0), ("num_attention_heads", 2.0), ("max_position_embeddings", -1),
])  # fmt: skip
def test_odd_numbers_of_a_config_are_named(tmp_path, key, value) -> None:
    make_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"'{key}'"):
        opened(tmp_path)


def test_results_that_cannot_be_written_are_one_message(cli, tmp_path, monkeypatch) -> None:
    assert cli(*QUICK)[0] == 0

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tracking, "claim", read_only)
    monkeypatch.setattr(sys, "argv", ["tracking", str(tmp_path / "results"), "--mode", "offline"])
    with pytest.raises(SystemExit) as stopped:
        tracking.main()
    assert stopped.value.code == 1
    told = cli.capfd.readouterr().err
    assert told == f"ovqk: {tmp_path / 'results'}: it cannot be written (Read-only file system); nothing was tracked.\n"


@pytest.mark.slow
def test_a_terminal_without_letters_beyond_ascii(tmp_path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), "task=ioi", "tracking=none", "nulls.draws=19"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b"" and b"copy suppression" in done.stdout
    shutil.rmtree(tmp_path / "results")


@pytest.mark.parametrize("place", ["", "folder", "pipe"])
def test_a_report_takes_the_place_of_no_device_and_no_folder(tmp_path, monkeypatch, place) -> None:
    monkeypatch.chdir(tmp_path)
    run_cell(compose(*QUICK))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no file; allowed: a path of a page"):
        write_report(tmp_path / "results", Path(place), with_figures=False)
    assert (tmp_path / "pipe").is_fifo() and not list((tmp_path / "folder").iterdir())


def test_control_characters_of_someone_elses_files_are_shown_and_not_obeyed(tmp_path, capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit):
        end_command("model.path=\x1b]0;x\x07/a\tb\n\x9bK: no such file")
    assert capsys.readouterr().err == "ovqk: model.path=\\x1b]0;x\\x07/a\tb\n\\x9bK: no such file\n"
    folder = tmp_path / "\x1b[2J" / "none" / "qk-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("[")
    with pytest.raises(SystemExit):
        tracking.main([str(tmp_path), "--mode", "offline"])
    said = capsys.readouterr().err
    assert "\x1b" not in said and "skipped" in said
    with pytest.raises(UserError, match=r"task.title='.x1b.31m': it holds control characters"):
        compose(*QUICK, 'task.title="\x1b[31m"')
