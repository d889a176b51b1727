"""What is suggested after a cell: what makes sense for this model, and never the same cell again."""

import json

import pytest
from support import ROOT
from support.commands import compose
from support.models import BUNDLED, local, shared_model

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.resolve import plain
from ovqk.errors import UserError
from ovqk.report import suggestions
from ovqk.report.suggestions import model_arguments, next_arguments
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import readable_tasks, resolve_task

CHOSEN = {
    "name": "mini-attn", "source": "bundled", "path": None, "repo": None, "revision": "main", "checkpoint": None,
    "checkpoints": None, "claims": "mini-attn", "n_ctx": None, "causal": None, "trust_remote_code": False,
}  # fmt: skip


WITHOUT_WORDS = {"none", "modular_addition"}
SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml") if path.stem not in WITHOUT_WORDS)


def a_cell(task: str, analysis: str = "b03", tasks: list[str] | None = None, **model) -> dict:
    """A record of a model whose tokenizer keeps enough words of these tasks, or of all."""
    return {
        "task": task,
        "analysis": analysis,
        "words": {"kept": {}, "tasks": SHIPPED if tasks is None else tasks},
        "provenance": {"config": {"model": CHOSEN | model}},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a cell below results/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results" / "mini-attn" / "ioi" / "b03-0"
    path.mkdir(parents=True)
    return path.relative_to(tmp_path)


def test_other_tasks_that_claim_heads_of_the_model_come_first(folder) -> None:
    assert next_arguments(folder, a_cell("ioi")) == "-m model=mini-attn task=induction,sva"
    assert next_arguments(folder, a_cell("sva", "qk")) == "-m model=mini-attn task=induction,ioi analysis=qk"
    of_gpt2 = {"name": "gpt2", "source": "hub", "claims": "gpt2"}
    others = "acronym,copy_suppression,greater_than,induction,sva"
    assert next_arguments(folder, a_cell("ioi", **of_gpt2)) == f"-m model=gpt2 task={others}"


def test_only_tasks_of_which_enough_words_are_kept_are_offered(folder) -> None:
    plain = {"name": "qwen3-8b-base", "source": "hub", "claims": None}
    assert next_arguments(folder, a_cell("none", **plain)) == "-m model=qwen3-8b-base task=ioi,sva,induction"
    some = a_cell("none", tasks=["acronym", "sva"], **plain)
    assert next_arguments(folder, some) == "model=qwen3-8b-base task=sva"
    none = a_cell("none", tasks=[], **plain)
    assert next_arguments(folder, none) == "model=qwen3-8b-base task=none analysis=composition"
    assert next_arguments(folder, a_cell("ioi", tasks=["ioi"])) == "model=mini-attn task=ioi analysis=composition"
    of_before = a_cell("none", **plain)
    del of_before["words"]["tasks"]
    assert next_arguments(folder, of_before) == "model=qwen3-8b-base task=none analysis=composition"


def test_which_tasks_a_tokenizer_has_words_for() -> None:
    every = suggestions.shipped_tasks()
    assert [task.name for task in every if task.variables] == SHIPPED
    for name, tasks in {"mini-attn": {"ioi", "sva", "induction"}, "stories260k": set()}.items():
        path = BUNDLED.parent / name if name.startswith("mini") else shared_model(name)
        tokenizer = load_tokenizer(open_checkpoint(local(path)))
        readable = readable_tasks(every, tokenizer)
        assert set(readable) >= tasks and (tasks or len(readable) < 3)
        for task in SHIPPED:
            try:
                resolve_task(compose(f"task={task}").task, tokenizer, tokenizer.get_vocab_size(), "x")
            except UserError:
                assert task not in readable
            else:
                assert task in readable


def test_a_task_file_that_is_none_is_passed_over(tmp_path, monkeypatch) -> None:
    (tmp_path / "task").mkdir()
    for name, text in {
        "broken": "a: [",
        "list": "[1]",
        "kind": "variables: {x: {kind: heap}}",
        "extra": "variables: {x: {kind: set, words: y, more: 1}}",
        "lost": "variables: {x: {kind: set, words: y}}",
    }.items():
        (tmp_path / "task" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(suggestions, "CONF", tmp_path)
    tokenizer = load_tokenizer(open_checkpoint(local(BUNDLED)))
    assert readable_tasks(suggestions.shipped_tasks(), tokenizer) == []


def test_a_task_that_failed_for_the_model_is_left_out(folder) -> None:
    for task, statuses in {"sva": ["failed"], "induction": ["failed", "done"]}.items():
        for number, status in enumerate(statuses):
            cell = folder.parents[1] / task / f"b03-{number}"
            cell.mkdir(parents=True)
            (cell / "record.json").write_text(json.dumps({"status": status}))
    assert next_arguments(folder, a_cell("ioi")) == "model=mini-attn task=induction"


def test_another_results_folder_is_kept(tmp_path) -> None:
    folder = tmp_path / "a b" / "mini-attn" / "ioi" / "b03-0"
    said = next_arguments(folder, a_cell("ioi"))
    assert said is not None and said.endswith(f" 'results_dir=\"{tmp_path}/a b\"'")


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "model=mini-attn"),
    ({"name": "pythia-70m-deduped-step1000", "source": "hub", "revision": "step1000", "checkpoint": 1000},
     "model=pythia-70m-deduped model.checkpoint=1000"),
    ({"name": "gpt2", "source": "hub", "revision": "v1"}, "model=gpt2 model.revision=v1"),
    ({"name": "mine", "source": "hub"}, None),
    ({"name": "x", "source": "local", "path": "a/b", "claims": None}, "model=local model.path=a/b model.name=x"),
    ({"name": "x", "source": "local", "path": "a", "claims": None, "causal": False, "n_ctx": 3, "attn_coeff": 0.5},
     "model=local model.path=a model.name=x model.n_ctx=3 model.causal=false model.attn_coeff=0.5"),
    ({"name": "x", "source": "local", "path": "a b", "claims": "gpt2"},
     "model=local 'model.path=\"a b\"' model.name=x model.claims=gpt2"),
])  # fmt: skip
def test_the_model_is_chosen_again_as_it_was(changes, said) -> None:
    assert model_arguments(CHOSEN | changes) == said


def test_without_conf_an_analysis_is_suggested(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suggestions, "CONF", tmp_path / "nowhere")
    said = next_arguments(folder, a_cell("ioi"))
    assert said == "model=mini-attn task=ioi analysis=composition"


def test_the_choices_about_a_cycle_are_made_again(folder) -> None:
    record = a_cell("modular_addition", tasks=[], name="x", source="local", path="a", claims=None)
    config = plain(compose("task=modular_addition", "task.cycle.modulus=59", "task.cycle.query=null",
                           "task.cycle.operator='-'").task)  # fmt: skip
    record["provenance"]["config"]["task"] = config
    assert next_arguments(folder, record) == (
        "model=local model.path=a model.name=x task=modular_addition task.cycle.modulus=59 task.cycle.query=null "
        "task.cycle.operator='-' analysis=composition"
    )
    record["provenance"]["config"]["task"] = plain(compose("task=modular_addition").task)
    assert next_arguments(folder, record).endswith("task=modular_addition analysis=composition")
