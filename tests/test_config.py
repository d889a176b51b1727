"""Every config composes, every metric is described, and the arrows between modules run one way."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT, compose

from ovqk.config.schema import Source
from ovqk.errors import UserError
from ovqk.metrics import METRICS, metric_names

MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
TASKS = sorted(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml"))
ANALYSES = sorted(path.stem for path in (ROOT / "conf" / "analysis").glob("*.yaml"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("analysis", ANALYSES)
def test_every_task_and_analysis_composes(task, analysis) -> None:
    cell = compose(f"task={task}", f"analysis={analysis}")
    assert cell.task.name == task and cell.analysis.name == analysis


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes(model) -> None:
    cell = compose(f"model={model}", *(["model.path=somewhere"] if model == "local" else []))
    assert cell.model.name == ("somewhere" if model == "local" else model)
    if cell.model.source is Source.hub:
        assert cell.model.repo.count("/") == 1 and cell.model.revision == "main"
        comment = (ROOT / "conf" / "model" / f"{model}.yaml").read_text()
        assert "gated" in comment or "share your contact" in " ".join(comment.split())
        assert max(map(len, comment.splitlines())) <= 120
        assert any(licence in comment for licence in ("MIT", "Apache-2.0", "icen"))
    assert not cell.model.trust_remote_code


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_composes_and_states_its_question_and_command(path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra_compose("config", overrides=[f"hydra.searchpath=[file://{path.parent}]"])
    assert composed.task.name == "ioi"
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("?" in line for line in comment) and any("python run.py" in line for line in comment)


def test_metrics_carry_title_formula_and_range() -> None:
    for metric in METRICS.values():
        assert metric.title and metric.formula and metric.needs
        assert metric.low is None or metric.high is None or metric.low < metric.high
        assert metric.name.startswith(metric.circuit)
    assert set(metric_names(["ov"])) | set(metric_names(["qk"])) == set(METRICS)


# fmt: off
ORDER = [
    "errors", "memory", "metrics", "config", "mistakes", "resolve", "colours", "weights", "devices", "family",
    "llamas", "families", "files", "shards", "patience", "hub", "gguf_file", "gguf_tokenizer", "gguf_settings",
    "llama_cpp", "checkpoints", "allowed", "rotations", "settings", "native", "single_file", "threads", "heads",
    "vocabulary", "unreadable", "block_probes", "agreement", "bridge_loading", "bridge_mlp", "bridge", "sources",
    "spectra", "layers", "positions", "alignment", "tasks", "components", "effective", "spelling", "rare",
    "directions", "head_maps", "readouts", "composition", "availability", "model", "structure", "cache",
    "task_readout", "claims", "statistics", "nulls", "surrogates", "testing", "candidates", "patterns", "verdicts",
    "prompts", "identity", "analyses", "record", "outcomes", "results", "comparison", "thinning", "drawing",
    "figures", "portraits", "page", "report", "panels", "overview", "wandb_service", "runs", "tracking", "dashboard",
    "tables", "token_lists", "suggestions", "console", "progress", "cell", "sweep",
]
# fmt: on


def test_imports_run_one_way() -> None:
    """Each module imports only from modules before it in the order of the data flow."""
    modules = {path.stem: path for path in (ROOT / "ovqk").glob("*.py") if path.stem != "__init__"}
    assert set(modules) == set(ORDER)
    for name, path in modules.items():
        for found in _imports(path):
            assert ORDER.index(found) < ORDER.index(name), f"{name} imports {found}"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ovqk."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "ovqk":
            found |= {alias.name for alias in node.names}
    return found


def test_no_module_holds_two_nouns() -> None:
    for path in (ROOT / "ovqk").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_transformer_lens_is_imported_only_where_it_is_used() -> None:
    """Its import costs seconds: run.py and a native cell must not pay for it."""
    import subprocess
    import sys

    code = (
        "import sys, ovqk.cell; print([m for m in ('transformer_lens', 'transformers', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_step_of_training_is_a_revision_and_a_name_of_its_own() -> None:
    cell = compose("model=pythia-70m-deduped", "model.checkpoint=1000")
    assert (cell.model.revision, cell.model.name) == ("step1000", "pythia-70m-deduped-step1000")
    again = compose(
        "model=pythia-70m-deduped", "model.checkpoint=1000", "model.revision=step1000", f"model.name={cell.model.name}"
    )
    assert again.model == cell.model  # as a record's cell.yaml holds it
    with pytest.raises(UserError, match="model=gpt2 keeps no steps of its training"):
        compose("model=gpt2", "model.checkpoint=1000")
    with pytest.raises(UserError, match="must be a step >= 0"):
        compose("model=pythia-70m-deduped", "model.checkpoint=-1")
