"""Every config composes, every metric is described, and the arrows between modules run one way."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support import ROOT
from support.commands import compose

from ovqk.config.schema import Circuit, Source
from ovqk.errors import UserError
from ovqk.metrics import COMPOSITION_METRICS, HEAD_METRICS, METRICS, metric_names

MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
TASKS = sorted(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml"))
ANALYSES = sorted(path.stem for path in (ROOT / "conf" / "analysis").glob("*.yaml"))


@pytest.mark.parametrize(
    ("task", "analysis"), [*((task, "b03") for task in TASKS), *(("none", analysis) for analysis in ANALYSES)]
)
def test_every_task_and_analysis_composes(task, analysis) -> None:
    cell = compose(f"task={task}", f"analysis={analysis}")
    assert cell.task.name == task and cell.analysis.name == analysis


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes(model) -> None:
    needed = {"local": ["model.path=somewhere"], "hub": ["model.repo=some/where"]}
    cell = compose(f"model={model}", "task=none", *needed.get(model, []))
    assert cell.model.name == {"local": "somewhere", "hub": "where"}.get(model, model)
    if cell.model.source is Source.hub:
        assert cell.model.repo.count("/") == 1 and cell.model.revision == "main"
        comment = (ROOT / "conf" / "model" / f"{model}.yaml").read_text()
        assert "gated" in comment or "share your contact" in " ".join(comment.split())
        assert max(map(len, comment.splitlines())) <= 120
        assert any(licence in comment for licence in ("MIT", "Apache-2.0", "icen"))
    assert not cell.model.trust_remote_code


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/grokked/model.safetensors", "grokked"), ("runs/b.safetensors", "b"), ("runs/q4/model.gguf", "q4"),
     ("runs/model", "model"), ("/model.safetensors", "local")],
)  # fmt: skip
def test_a_file_that_is_called_model_is_named_after_its_folder(path, name) -> None:
    assert compose("model=local", f"model.path={path}").model.name == name


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_composes_and_states_its_question_and_command(path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra_compose("config", overrides=[f"hydra.searchpath=[file://{path.parent}]"])
    assert composed.task.name == "ioi"
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("?" in line for line in comment) and any("python run.py" in line for line in comment)


def test_metrics_carry_title_formula_and_range_and_fields_that_agree() -> None:
    for metric in METRICS.values():
        assert metric.title and metric.formula and metric.needs
        assert metric.low is None or metric.high is None or metric.low < metric.high
        assert metric.circuit is None or metric.name.startswith(metric.circuit)
        assert (metric.circuit is None) == (metric.of == "pair")
        assert metric.is_readout == (metric.of in ("words", "subspace"))
        assert metric.circuit is Circuit.ov or not (metric.reads or metric.in_top)
    assert set(metric_names([Circuit.ov])) | set(metric_names([Circuit.qk])) == set(HEAD_METRICS)
    assert {*HEAD_METRICS, *COMPOSITION_METRICS} == set(METRICS)


def asks_a_name(call: ast.AST) -> bool:
    """Whether a call asks how a metric's name begins or ends."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    asks = {"startswith": str.startswith, "endswith": str.endswith}.get(call.func.attr)
    if asks is None:
        return False
    parts = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    written = ast.unparse(call)
    return any(asks(name, part) for name in METRICS for part in parts) or "metric" in written or "circuit" in written


def test_only_the_registry_tells_what_a_metric_is_from_its_name() -> None:
    """What others must know of a metric is a field of `Metric`."""
    handled = {"structure", "tasks", "verdicts", "analyse", "records", *READERS}
    for name, path in modules().items():
        for node in nodes(path) if name.split(".")[0] in handled else ():
            assert not asks_a_name(node), f"{name}: {ast.unparse(node)}"
    seen = ["metric.endswith('_block0')", "name.startswith('qk_task_auc')", "name.startswith(maps.circuit)"]
    assert all(asks_a_name(ast.parse(call, mode="eval").body) for call in seen)


FOLDERS = [
    "interrupts", "errors", "whole_files", "locks", "orphans", "scratch", "memory", "config", "metrics", "wording",
    "checkpoints", "weights", "circuits", "structure", "tasks", "verdicts", "activations", "records", "figures",
    "portraits", "report", "tracking", "analyse", "cell", "sweep", "dashboard", "library", "fetch", "plan", "testing",
    "published",
    "command", "__main__",
]  # fmt: skip
"""Folders of the package, and its modules beside them, in the order of the data flow."""
READERS = {"figures", "report", "tracking"}
"""Folders that show results."""
RESULTS = {
    "interrupts", "errors", "metrics", "wording", "whole_files", "locks", "scratch", "memory", "config", "records",
    *READERS,
}  # fmt: skip
"""What these may import: records hold all there is to show."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without `ovqk.`."""
    package = ROOT / "ovqk"
    found = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in found.items() if name != "__init__"}


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Everything in a file."""
    return list(ast.walk(ast.parse(path.read_text())))


@pytest.fixture(scope="module", autouse=True)
def no_nodes_stay() -> Iterator[None]:
    """They are a hundred megabytes."""
    yield
    nodes.cache_clear()


@cache
def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, by dotted name without `ovqk.`."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module == "ovqk":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ovqk."):
            module = node.module.removeprefix("ovqk.")
            inside = {f"{module}.{alias.name}" for alias in node.names} & set(modules())
            found |= inside or {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ovqk.") for alias in node.names if alias.name.startswith("ovqk.")}
    return found


def test_imports_run_one_way_between_folders() -> None:
    tops = {name.split(".")[0] for name in modules()} - {"bundled"}
    assert tops == set(FOLDERS)
    for name, path in modules().items():
        folder = name.split(".")[0]
        for other in {found.split(".")[0] for found in imported(path)} - {"bundled", "load_results", folder}:
            assert FOLDERS.index(other) < FOLDERS.index(folder), f"{name} imports {other}"


def test_imports_run_one_way_inside_folders() -> None:
    """No module of a folder imports, by whatever way round, one that imports it."""
    arrows = {name: imported(path) & set(modules()) for name, path in modules().items()}
    done: set[str] = set()
    while left := arrows.keys() - done:
        ready = {name for name in left if arrows[name] - {name} <= done}
        assert ready, f"modules import each other: {sorted(left)}"
        done |= ready


def test_what_shows_results_reads_records_and_nothing_else() -> None:
    for name, path in modules().items():
        if name.split(".")[0] in READERS:
            others = {found.split(".")[0] for found in imported(path)} - {"load_results", "load_table"}
            assert others <= RESULTS, f"{name} imports {sorted(others - RESULTS)}"


def tops(path: Path) -> set[str]:
    """The first names of everything that a file imports."""
    found = set()
    for node in nodes(path):
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
    return {name.split(".")[0] for name in found}


def test_no_module_imports_a_script_no_script_a_test_and_no_test_either() -> None:
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    tests = {path.stem: path for path in (ROOT / "tests").glob("*.py")}
    assert not any(tops(path) & {*scripts, *tests, "support"} for path in modules().values())
    assert not any(tops(path) & {*tests, "support"} for path in scripts.values())
    testing = (*tests.values(), *(ROOT / "tests" / "support").glob("*.py"))
    assert not any(tops(path) & {*tests, *scripts} for path in testing)  # a script under test: `support.scripts`
    assert (
        "scripts"
        not in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["pythonpath"]
    )


def test_tests_use_public_names() -> None:
    """A test that needs a private name of a module asks for a public one."""
    for path in (*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "support").glob("*.py")):
        names = set()
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ovqk":
                assert not [a.name for a in node.names if a.name.startswith("_") and a.name != "__main__"], path.name
                names |= {alias.asname or alias.name for alias in node.names}
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                assert not node.attr.startswith("_") or node.attr.startswith("__"), f"{path.name}: {ast.unparse(node)}"


def of_package(package: str) -> set[str]:
    """Modules that import a package."""
    found = set()
    for name, path in modules().items():
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if any(part.split(".")[0] == package for part in names):
                found.add(name)
    return found


def test_wandb_and_transformer_lens_are_each_behind_one_door() -> None:
    assert of_package("wandb") == {"tracking.service"}
    assert of_package("transformer_lens") == {"weights.bridge_loading"}


def test_a_command_is_ended_in_one_place() -> None:
    """A user's mistake is a UserError; a sweep and a `__main__` besides end with a status of their own."""
    ending = set()
    for name, path in (modules() | {"run": ROOT / "run.py"}).items():
        raised = [node.exc for node in nodes(path) if isinstance(node, ast.Raise) and node.exc]
        called = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
        if any(ast.unparse(node).startswith("SystemExit") for node in raised) or any(
            ast.unparse(function) in ("sys.exit", "exit", "quit") for function in called
        ):
            ending.add(name)
    assert ending == {"errors", "sweep", "tracking.__main__"}


def test_no_module_holds_two_nouns() -> None:
    for name, path in modules().items():
        assert len(path.read_text().splitlines()) <= 450, name


def test_transformer_lens_is_imported_only_where_it_is_used() -> None:
    """Its import costs seconds: run.py and a native cell must not pay for it."""
    import subprocess
    import sys

    code = (
        "import sys, ovqk.cell; print([m for m in ('transformer_lens', 'transformers', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("key", ["nulls.resamples", "nulls.subsamples"])
def test_an_interval_needs_two_draws(key) -> None:
    with pytest.raises(UserError, match=rf"{key}=1: must be in 2 \.\. 1000000"):
        compose(f"{key}=1")


def test_a_step_of_training_is_a_revision_and_a_name_of_its_own() -> None:
    cell = compose("model=pythia-70m-deduped", "model.checkpoint=1000")
    assert (cell.model.revision, cell.model.name) == ("step1000", "pythia-70m-deduped-step1000")
    again = compose(
        "model=pythia-70m-deduped", "model.checkpoint=1000", "model.revision=step1000", f"model.name={cell.model.name}"
    )
    assert again.model == cell.model  # as a record's cell.yaml holds it
    with pytest.raises(UserError, match="model=gpt2 has no earlier training steps"):
        compose("model=gpt2", "model.checkpoint=1000")
    with pytest.raises(UserError, match="must be a step >= 0"):
        compose("model=pythia-70m-deduped", "model.checkpoint=-1")


@pytest.mark.parametrize(
    ("choice", "said", "status"),
    [
        ("model=no-such-model", "model=no-such-model: there is no such model", 1),
        ("analysis.components=-1", "analysis.components=-1: must be a number of components >= 0", 1),
        ("--help", "ioi", 0),
    ],
)
def test_nothing_heavy_is_imported_before_a_config_is_accepted(choice, said, status) -> None:
    """A mistyped choice or a wrong value is answered at once, without torch or pandas, and so is --help."""
    import subprocess
    import sys

    command = [sys.executable, "-X", "importtime", "run.py", choice]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == status and said in done.stderr + done.stdout
    assert "hydra" in modules
    assert not modules & {"torch", "numpy", "pandas", "matplotlib", "wandb", "transformers", "transformer_lens"}
