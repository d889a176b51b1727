"""The command line around Hydra: tools, what was typed, a reader that goes away, tracebacks if one asks."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from ovqk import command
from ovqk.config import command_line
from ovqk.config.command_line import TOOLS, composable, config_folders, model_argument, program, quoted, tool


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name not in ("HYDRA_FULL_ERROR", "OVQK_TRACEBACK")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=known | changes, timeout=120
    )


@pytest.mark.parametrize(("started", "computes", "reports"), [
    ("run.py", "python run.py", "python -m ovqk.report"),
    ("../wt/run.py", "python ../wt/run.py", "python -m ovqk.report"),
    ("/opt/a b/run.py", "python '/opt/a b/run.py'", "python -m ovqk.report"),
    ("/somewhere/bin/ovqk", "ovqk", "ovqk report"),
    ("/site-packages/ovqk/__main__.py", "python -m ovqk", "python -m ovqk.report"),
    ("/usr/lib/ipykernel_launcher.py", "python -m ovqk", "python -m ovqk.report"),
])  # fmt: skip
def test_messages_name_the_command_that_was_started(started, computes, reports, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(command_line.shutil, "which", lambda name: f"/somewhere/bin/{name}")
    assert (program(), tool("report")) == (computes, reports)


def test_a_command_that_is_not_on_the_path_is_named_by_its_place(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "venv" / "bin" / "ovqk")])
    monkeypatch.setattr(command_line.shutil, "which", lambda name: None)
    assert program() == "venv/bin/ovqk" and tool("track") == "venv/bin/ovqk track"


def test_folders_of_configs_and_odd_values() -> None:
    assert config_folders(["-cd", "a b", "task=ioi", "--config-dir=c", "--config-dir", "d"]) == ["a b", "c", "d"]
    assert config_folders(["-cd"]) == []
    assert quoted("model.path", "a/b") == "model.path=a/b"
    for path in ("a/b", "~/b c", "it's", 'a"b', "x=1"):
        for text in (path, composable("model.path", path), f"model.path={path}", f"model={path}"):
            assert model_argument(text) == path, text
    assert model_argument("task=ioi") == "task=ioi"
    assert quoted("model.path", "~/b") == "'model.path=\"~/b\"'"


def test_every_tool_has_a_main_and_a_module_that_runs_it() -> None:
    import importlib

    for name, each in TOOLS.items():
        assert callable(importlib.import_module(each.command).main), name
        assert (ROOT / each.module.replace(".", "/")).is_dir() or (
            ROOT / f"{each.module.replace('.', '/')}.py"
        ).is_file()


def test_tools_are_reached_through_run_py_too() -> None:
    done = run("run.py", "report", "nowhere")
    assert (done.returncode, done.stderr) == (1, "ovqk: nowhere: no such results folder.\n")
    done = run("-m", "ovqk", "fetch", "mini-atn")
    assert done.returncode == 1 and "Did you mean mini-attn" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    script = f"{sys.executable} run.py --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] in ("0", "141") and done.stderr == ""
    code = (
        "import sys\nfrom ovqk.errors import one_message\nwith one_message():\n"
        "    for _ in range(100_000):\n        print('x' * 80)"
    )
    script = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "141" and done.stderr == ""


def test_a_traceback_is_shown_if_hydras_variable_asks_for_it() -> None:
    plain, full = run("run.py", "model=mini-atn"), run("run.py", "model=mini-atn", HYDRA_FULL_ERROR="1")
    assert plain.returncode == full.returncode == 1 and "Traceback" not in plain.stderr
    assert "MissingConfigException" in full.stderr and full.stderr.endswith(plain.stderr)


def test_two_ways_of_showing_are_refused_in_one_message() -> None:
    done = run("run.py", "-m", "task=ioi,sva", "--cfg", "job")
    assert done.returncode == 1 and done.stderr.startswith("ovqk: --cfg shows the choice of one cell")


def test_hydras_options_are_taken_by_the_argparse_of_python_3_14(monkeypatch) -> None:
    """There the help of each option is expanded when the option is added."""
    from hydra._internal.utils import get_args_parser

    plain = argparse.ArgumentParser.add_argument

    def strict(parser: argparse.ArgumentParser, *names: str, **options: object) -> argparse.Action:
        action = plain(parser, *names, **options)
        if action.help:
            parser._get_formatter()._expand_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", strict)
    monkeypatch.setattr(argparse.HelpFormatter, "_get_help_string", lambda formatter, action: action.help)  # Python's
    with pytest.raises(TypeError):
        get_args_parser()
    monkeypatch.setattr(argparse.HelpFormatter, "_get_help_string", command.only_text)
    assert get_args_parser().parse_args(["-m", "task=ioi"]).overrides == ["task=ioi"]


def test_the_command_runs_where_each_help_is_expanded_when_its_option_is_added() -> None:
    """As in Python 3.14, whatever part of the command reads the command line first."""
    strict = (
        "import argparse, runpy, sys; plain = argparse._ActionsContainer.add_argument\n"
        "def add(parser, *names, **options):\n"
        "    action = plain(parser, *names, **options)\n"
        "    if action.help: argparse.HelpFormatter('x')._expand_help(action)\n"
        "    return action\n"
        "argparse._ActionsContainer.add_argument = add\n"
        "sys.argv = ['run.py', *sys.argv[1:]]; runpy.run_path('run.py', run_name='__main__')"
    )
    for arguments, wanted in (("--help", "one cell: a model"), ("task=nothing", "there is no such task")):
        command = [sys.executable, "-c", strict, arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert wanted in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_configs_lie_beside_the_package_in_a_checkout() -> None:
    from ovqk.config.place import CONF

    assert Path(CONF) == ROOT / "conf" and (CONF / "config.yaml").is_file()
