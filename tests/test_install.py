"""ovqk as it is installed: from a wheel, in a folder without a checkout."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from support import ROOT

hatchling = pytest.importorskip("hatchling.builders.wheel")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with the wheel of this tree, and all that it needs from the environment of the tests."""
    base = tmp_path_factory.mktemp("install")
    (wheel,) = hatchling.WheelBuilder(str(ROOT)).build(directory=str(base), versions=["standard"])
    venv.create(base / "venv", with_pip=True)
    python = base / "venv" / "bin" / "python"
    packages = base / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (packages / "zz_tests.pth").write_text(sysconfig.get_path("purelib"))
    return base / "venv" / "bin"


def ran(environment: Path, folder: Path, *command: str) -> str:
    done = subprocess.run([environment / command[0], *command[1:]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_cell_its_page_and_the_next_command_without_a_checkout(environment, tmp_path) -> None:
    shown = ran(environment, tmp_path, "ovqk", "model=mini-attn", "task=induction", "tracking=none", "nulls.draws=99")
    assert "Found: corroborated: induction" in shown
    (suggested,) = [line.split() for line in shown.splitlines() if " -m model=mini-attn task=ioi,sva" in line]
    assert Path(suggested[0]).name == "ovqk" and "run.py" not in shown
    assert "wrote results/report.html" in ran(environment, tmp_path, "ovqk", "report", "results", "--no-figures")
    assert "tracked results/" in ran(environment, tmp_path, "ovqk", "track", "results", "--mode", "offline")
    assert "4 layers of 8 heads" in ran(environment, tmp_path, "ovqk", "fetch", "mini-attn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
    help_text = ran(environment, tmp_path, "ovqk", "--help")
    assert "ovqk [KEY=VALUE ...]" in help_text and "python run.py" not in help_text


def test_every_config_is_in_the_wheel_and_hydra_finds_it_as_a_package(environment, tmp_path) -> None:
    code = """
import ovqk.config.schema as schema
from hydra import compose, initialize_config_module
from ovqk.config.place import CONF
schema.register()
with initialize_config_module("ovqk.conf", version_base="1.3"):
    print(compose("config", overrides=["task=sva", "analysis=qk"]).task.name)
print(*sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")))
"""
    task, files = ran(environment, tmp_path, "python", "-c", code).splitlines()
    assert task == "sva"
    assert files.split() == sorted(str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml"))


def test_a_sweep_in_other_processes_runs_without_a_checkout(environment, tmp_path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    shown = ran(environment, tmp_path, "ovqk", "-m", "hydra/launcher=laptop", "model=mini-attn,mini-llama",
                "task=induction", "tracking=none", "nulls.draws=19")  # fmt: skip
    assert "2 done, 0 cached, 0 failed, 0 missing" in shown and "ovqk report results" in shown


def test_a_checkout_named_ovqk_is_no_package_to_its_parent_folder(tmp_path) -> None:
    """An editable install is a plain entry of the path: a folder without `__init__.py` yields to a package after it."""
    (tmp_path / "ovqk").symlink_to(ROOT)
    code = f"import sys; sys.path.insert(0, ''); sys.path.append({str(ROOT)!r}); import ovqk; print(ovqk.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "ovqk" / "__init__.py"
    assert (ROOT / "pyproject.toml").read_text().count('build-backend = "hatchling.build"') == 1


def test_models_for_tests_are_not_in_the_wheel(environment, tmp_path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('ovqk.testing'))"
    assert ran(environment, tmp_path, "python", "-c", code).strip() == "None"
