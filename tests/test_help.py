"""`python run.py --help` is one screen that names every choice, and the shell completes what it names."""

import itertools
import re
import shlex
import subprocess
import sys

import pytest
from support import ROOT
from support.commands import compose

WIDTH, HEIGHT = 100, 42


@pytest.fixture(scope="module")
def shown() -> str:
    done = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    return done.stdout


def choices(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def expanded(text: str) -> set[str]:
    """The words of a text, `{a,b}` standing for each of its members."""
    words = re.findall(r"(?:[\w.-]|\{[^}]*\})+", text)
    parts = [[part.strip("{}").split(",") for part in re.findall(r"\{[^}]*\}|[^{}]+", word)] for word in words]
    return {"".join(of).rstrip(".") for part in parts for of in itertools.product(*part)}


def section(shown: str, key: str) -> str:
    """The lines of one key, up to the next one."""
    match = re.search(rf"^{re.escape(key)}.*?(?=^\S)", shown, flags=re.MULTILINE | re.DOTALL)
    assert match, key
    return match[0]


def test_help_is_one_screen(shown) -> None:
    lines = shown.splitlines()
    assert len(lines) <= HEIGHT and max(map(len, lines)) <= WIDTH
    assert "Hydra." not in lines[0] and "$" not in shown.replace('"$(python', "")


@pytest.mark.parametrize(
    ("key", "group"),
    [(f"{group}=", group) for group in ("model", "task", "analysis", "tracking", "hydra/launcher")],
)
def test_help_names_every_choice(shown, key, group) -> None:
    assert choices(group) - expanded(section(shown, key)) == set()


def test_help_names_the_tools_beside_cells(shown) -> None:
    assert all(tool in shown for tool in ("report results", "track results", "fetch MODEL", "plan MODEL"))


def test_help_names_no_model_that_is_not_there(shown) -> None:
    named = {word for word in expanded(section(shown, "model=")) if re.search(r"[a-z].*[-.]?\d", word)}
    assert named - choices("model") == set()


def test_the_keys_that_help_names_have_these_defaults(shown) -> None:
    cell = compose()
    for key, value in re.findall(r"(\S+)=(\S+)", section(shown, "others")):
        place = cell
        for part in key.split("."):
            place = getattr(place, part)
        found = getattr(place, "value", place)
        assert str(found).lower() == value.split("|")[0], key


def test_help_shows_five_commands_that_compose(shown) -> None:
    commands = re.findall(r"^(python run\.py(?: [^\[\s]\S*)*)   *\S", shown, flags=re.MULTILINE)
    commands = [command for command in commands if "[" not in command and command.split()[2:3] != ["report"]]
    assert len(commands) == 5
    for command in commands:
        words = [word for word in shlex.split(command)[2:] if word != "-m"]
        if "-cd" in words:
            assert (ROOT / words[1] / f"{words[3]}.yaml").is_file()
            continue
        keys = [word.split("=", 1) for word in words]
        for overrides in itertools.product(*([f"{key}={value}" for value in of.split(",")] for key, of in keys)):
            compose(*overrides)


def test_the_shell_completes_models(tmp_path) -> None:
    """What the documentation tells people to evaluate, in a bash of its own."""
    typed = "python run.py model=mini-"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    script = f"""
    PATH={shlex.quote(str(tmp_path))}:$PATH
    eval "$(python run.py -sc install=bash)"
    COMP_LINE='{typed}'; COMP_POINT={len(typed)}; COMP_WORDS=($COMP_LINE); COMP_CWORD=2
    hydra_bash_completion
    echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["model=mini-attn", "model=mini-gpt2", "model=mini-llama"], done.stderr


def test_a_mistyped_key_is_still_refused_without_completion(cli) -> None:
    code, printed = cli("modl=gpt2")
    assert code == 1 and "modl: no such key" in printed
