"""Every command and file that the README names exists and composes."""

import itertools
import re
import shlex

import pytest
from support import ROOT
from support.commands import compose

README = (ROOT / "README.md").read_text()
USING = (ROOT / "docs" / "using.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    python run.py")]


def test_the_readme_leads_with_two_commands() -> None:
    assert README.index("![") < README.index("make demo") < README.index("make test") < README.index("pip install")
    assert len(README.splitlines()) <= 120
    for term in ("*null*", "*q*", "*corroborated*"):
        assert README.count(term) == 1
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("demo", "test", "test-slow", "check"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command) -> None:
    arguments = [word for word in shlex.split(command)[2:] if word != "-m"]
    if "-cd" in arguments:
        assert (ROOT / arguments[1] / f"{arguments[3]}.yaml").is_file()
        return
    choices = [
        [f"{key}={value}" for value in values.split(",")] for key, values in (a.split("=", 1) for a in arguments)
    ]
    for overrides in itertools.product(*choices):
        compose(*overrides)


def test_the_keys_of_the_table_exist() -> None:
    from ovqk.config.schema import Config, CycleConfig

    full = Config()
    full.task.cycle = CycleConfig()
    table = USING[USING.index("| key | default |") : USING.index("### Architectures")]
    for key in re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)[1:]:
        for name in re.findall(r"`([\w.]+)`", key):
            place = full
            for part in name.split("."):
                assert hasattr(place, part), name
                place = getattr(place, part)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / target).exists(), target


def test_nothing_names_this_machine_or_a_registry() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".cff", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(
                r"/(root|home)/\w|pypi\.org|files\.pythonhosted", text.replace('r"/(root|home)', "")
            ), name
