"""The command line around Hydra: tools, what was typed, a reader that goes away, tracebacks if one asks."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf, _utils
from support import ROOT

from ovqk import command
from ovqk.config import command_line, composing
from ovqk.config.command_line import (
    TOOLS,
    choices_together,
    composable,
    config_folders,
    model_argument,
    program,
    quoted,
    tool,
)
from ovqk.config.place import CONF
from ovqk.config.schema import register


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
    environment(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", [started])
    assert (program(), tool("report")) == (computes, reports)


def environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a virtual environment's `bin`, the only place on the PATH, and go elsewhere; return its interpreter."""
    here, interpreter = folder / "here", folder / "bin" / "python"
    for place in (here, interpreter.parent):
        place.mkdir()
    interpreter.touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(command_line.shutil, "which", lambda name: str(interpreter.parent / name))
    return interpreter


def test_an_interpreter_that_python_does_not_name_here_is_named_by_its_place(monkeypatch, tmp_path) -> None:
    interpreter = environment(tmp_path, monkeypatch)
    assert command_line.python() == "python"
    other = tmp_path / "a b" / "python"  # it has the same program, and other packages
    other.parent.mkdir()
    other.symlink_to(interpreter)
    for which in (lambda name: str(other), lambda name: None):
        monkeypatch.setattr(command_line.shutil, "which", which)
        assert command_line.python() == str(interpreter)
    monkeypatch.setattr(sys, "executable", str(other))
    monkeypatch.setattr(command_line.shutil, "which", lambda name: None)
    assert command_line.python() == f"'{other}'"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    assert command_line.python() == "bin/python"


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


def test_a_python_without_the_packages_is_told_in_one_message() -> None:
    """A checkout's run.py starts with any Python, such as the system's before the environment is activated."""
    done = run("-S", "run.py", "task=sva")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "lacks the packages" in done.stderr and "source .venv/bin/activate" in done.stderr


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


@pytest.fixture
def hydra(monkeypatch) -> Iterator[Hydra]:
    """Hydra with ovqk's configs and the repository's sweeps, which composes once; and Hydra as it is afterwards."""
    for of, name in (
        (Hydra, "get_mode"),
        (ConfigLoaderImpl, "load_configuration"),
        (ConfigLoaderImpl, "get_group_options"),
        (ConfigLoaderImpl, "load_sweep_config"),
        (Sweeper, "validate_batch_is_legal"),
        (_utils, "get_yaml_loader"),
    ):
        monkeypatch.setattr(of, name, getattr(of, name))
    GlobalHydra.instance().clear()
    search = create_config_search_path(str(CONF))
    search.prepend("command-line", str(ROOT / "sweeps"))
    yield Hydra.create_main_hydra2("run", search)
    GlobalHydra.instance().clear()


def compositions(monkeypatch) -> list[object]:
    """A list that grows by one for each choice that Hydra composes from now on."""
    started: list[object] = []
    inner = ConfigLoaderImpl._load_configuration_impl
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_load_configuration_impl",
        lambda *of, **keys: started.append(of) or inner(*of, **keys),
    )
    return started


def test_a_choice_that_is_composed_once_is_the_one_that_hydra_composes_twice(hydra, monkeypatch) -> None:
    register()
    typed = ["task=sva", "hydra/launcher=laptop", "nulls.draws=19"]
    asked = "config", [*typed, composing.AS_RUN], RunMode.RUN
    twice = hydra.compose_config(*asked)
    started = compositions(monkeypatch)
    composing.compose_once()
    assert hydra.get_mode("config", typed) is None
    once = hydra.compose_config(*asked)
    assert len(started) == 1 and OmegaConf.to_yaml(once) == OmegaConf.to_yaml(twice)
    assert once.hydra.mode is RunMode.RUN and once.hydra.overrides.hydra == twice.hydra.overrides.hydra
    again = hydra.compose_config(*asked)  # it is taken once
    assert len(started) == 2 and OmegaConf.to_yaml(again) == OmegaConf.to_yaml(twice)


def test_a_mistake_is_met_once_and_told_as_hydra_tells_it(hydra, monkeypatch) -> None:
    register()
    typed = ["nulls.draws=x"]
    asked = "config", [*typed, composing.AS_RUN], RunMode.RUN
    with pytest.raises(HydraException) as twice:
        hydra.compose_config(*asked)
    started = compositions(monkeypatch)
    composing.compose_once()
    assert hydra.get_mode("config", typed) is None
    with pytest.raises(HydraException) as once:
        hydra.compose_config(*asked)
    assert len(started) == 1 and str(once.value) == str(twice.value)
    assert str(once.value.__cause__) == str(twice.value.__cause__)


class Checks(Sweeper):
    """A sweeper that only checks its cells, as every sweeper does."""

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments) -> None:
        raise NotImplementedError


def test_a_sweep_s_cells_are_composed_once(hydra, monkeypatch) -> None:
    """The second of two cells is not kept here, and composed again."""
    register()
    master = hydra.compose_config("config", [], RunMode.MULTIRUN, with_log_configuration=False)
    cells, loader = [["task=sva", "seed=3"], ["task=ioi", "seed=3"]], hydra.config_loader
    twice = [OmegaConf.to_yaml(loader.load_sweep_config(master, cell)) for cell in cells]
    started = compositions(monkeypatch)
    monkeypatch.setattr(composing, "AHEAD", 1)
    composing.compose_once()
    sweeper = Checks()
    sweeper.setup(hydra_context=HydraContext(loader, Callbacks()), task_function=print, config=master)
    sweeper.validate_batch_is_legal(cells)
    assert len(started) == 2
    assert [OmegaConf.to_yaml(loader.load_sweep_config(master, cell)) for cell in cells] == twice
    assert len(started) == 3
    with pytest.raises(HydraException):
        sweeper.validate_batch_is_legal([["task=nosuch"]])


def test_a_sweep_that_a_file_asks_for_is_still_seen(hydra) -> None:
    register()
    composing.compose_once()
    for typed in ([], ["task=ioi,sva"]):
        assert hydra.get_mode("cross_model", typed) is RunMode.MULTIRUN
    assert hydra.get_mode("config", ["task=ioi,sva"]) is None  # several values without -m: a mistake


def omegaconf_alone() -> ModuleType:
    """OmegaConf's module with its YAML loader, as it was before anything was changed in it."""
    spec = find_spec("omegaconf._utils")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(alone := module_from_spec(spec))
    return alone


@pytest.mark.parametrize("text", [
    "a: 1e5\nb: 2020-01-01\nc: 1_000\nd: .inf\ne: 0o7\nf: yes\ng: 1:30\nh: 1.\n",
    "i: [~, '1', \"\\n\"]\nj: |\n  two\n  lines\n",
    "a: &one {b: 1}\nc: *one\n",
    "a: !!python/object/apply:pathlib.Path [x]\n",
    "",
    "a: b: c",
    "a: [1",
    "\ta: 1",
    "a: 1\na: 2",
    "a: *no",
    "a: \0",
    "a: !odd 1",
])  # fmt: skip
def test_yaml_is_read_in_c_as_omegaconf_reads_it_and_mistakes_are_told_alike(text, tmp_path, hydra) -> None:
    python = omegaconf_alone().get_yaml_loader

    def read(get_loader) -> list[str]:
        found = []
        with file.open(encoding="utf-8") as opened:
            for stream in (text, opened):
                try:
                    found.append(repr(yaml.load(stream, Loader=get_loader())))
                except yaml.YAMLError as error:
                    found.append(f"{type(error).__name__}: {error}")
        return found

    (file := tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    composing.compose_once()
    assert read(_utils.get_yaml_loader) == read(python)


def test_every_config_file_is_read_in_c_as_omegaconf_reads_it(hydra) -> None:
    python = omegaconf_alone().get_yaml_loader
    composing.compose_once()
    files = [*CONF.rglob("*.yaml"), *(ROOT / "sweeps").glob("*.yaml")]
    assert len(files) > 80
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert yaml.load(text, Loader=_utils.get_yaml_loader()) == yaml.load(text, Loader=python()), file


def test_names_are_listed_as_hydra_lists_them(hydra) -> None:
    before = {group: hydra.config_loader.get_group_options(group) for group in ("model", "task", "hydra/launcher")}
    composing.compose_once()
    assert before == {group: hydra.config_loader.get_group_options(group) for group in before} and before["task"]


def test_options_may_stand_between_choices() -> None:
    """Hydra's argparse ends with its usage for `tracking=none -cd DIR task=mine`."""
    typed = ["-m", "tracking=none", "-cd", "/tmp/a=b", "task=x", "~y", "-cn", "mine", "--cfg", "job", "seed=1"]
    options = ["-m", "-cd", "/tmp/a=b", "-cn", "mine", "--cfg", "job"]
    together = choices_together(typed)
    assert together == ["tracking=none", "task=x", "~y", "seed=1", *options]
    from hydra._internal.utils import get_args_parser

    read = get_args_parser().parse_args(together)
    assert read.overrides == together[:4] and read.config_dir == "/tmp/a=b" and read.cfg == "job" and read.multirun
