"""What is suggested after a cell: what makes sense for this model, and never the same cell again."""

import json

import pandas as pd
import pytest
from conftest import ROOT

from ovqk import suggestions
from ovqk.suggestions import model_arguments, next_arguments

CHOSEN = {
    "name": "mini-attn", "source": "bundled", "path": None, "repo": None, "revision": "main", "checkpoint": None,
    "checkpoints": None, "claims": "mini-attn", "n_ctx": None, "causal": None, "trust_remote_code": False,
}  # fmt: skip


def a_cell(task: str, analysis: str = "b03", kept: dict[str, int] | None = None, **model) -> dict:
    return {
        "task": task,
        "analysis": analysis,
        "words": {"kept": kept or {}},
        "provenance": {"config": {"model": CHOSEN | model}},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a cell below results/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results" / "mini-attn" / "ioi" / "b03-0"
    path.mkdir(parents=True)
    return path.relative_to(tmp_path)


def tokens(folder, *texts: str) -> None:
    pd.DataFrame({"token": texts, "kind": "singular"}).to_parquet(folder / "directions.parquet")


def test_other_tasks_that_claim_heads_of_the_model_come_first(folder) -> None:
    names = {"names": 40}
    assert next_arguments(folder, a_cell("ioi", kept=names)) == "-m model=mini-attn task=induction,sva"
    assert next_arguments(folder, a_cell("sva", "qk", names)) == "-m model=mini-attn task=induction,ioi analysis=qk"
    of_gpt2 = {"name": "gpt2", "source": "hub", "claims": "gpt2"}
    every = sorted(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml"))
    others = [name for name in every if name not in ("none", "ioi")]
    assert next_arguments(folder, a_cell("ioi", kept=names, **of_gpt2)) == f"-m model=gpt2 task={','.join(others)}"


def test_a_model_without_claims_is_offered_general_tasks_if_its_words_can_be_read(folder) -> None:
    plain = {"name": "qwen3-8b-base", "source": "hub", "claims": None}
    none = a_cell("none", **plain)
    assert next_arguments(folder, none) == "model=qwen3-8b-base task=none analysis=composition"  # no tokenizer
    tokens(folder, "1", "27", "<|end|>"[:2])
    assert next_arguments(folder, none) == "model=qwen3-8b-base task=none analysis=composition"  # digits alone
    tokens(folder, "1", "Paris")
    assert next_arguments(folder, none) == "-m model=qwen3-8b-base task=ioi,sva,induction"
    assert (
        next_arguments(folder, a_cell("none", "composition"))
        == "-m model=mini-attn task=induction,ioi,sva analysis=composition"
    )


def test_a_task_that_failed_for_the_model_is_left_out(folder) -> None:
    for task, statuses in {"sva": ["failed"], "induction": ["failed", "done"]}.items():
        for number, status in enumerate(statuses):
            cell = folder.parents[1] / task / f"b03-{number}"
            cell.mkdir(parents=True)
            (cell / "record.json").write_text(json.dumps({"status": status}))
    assert next_arguments(folder, a_cell("ioi", kept={"names": 9})) == "model=mini-attn task=induction"


def test_another_results_folder_is_kept(tmp_path) -> None:
    folder = tmp_path / "a b" / "mini-attn" / "ioi" / "b03-0"
    said = next_arguments(folder, a_cell("ioi", kept={"names": 9}))
    assert said is not None and said.endswith(f" 'results_dir=\"{tmp_path}/a b\"'")


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "model=mini-attn"),
    ({"name": "pythia-70m-deduped-step1000", "source": "hub", "revision": "step1000", "checkpoint": 1000},
     "model=pythia-70m-deduped model.checkpoint=1000"),
    ({"name": "gpt2", "source": "hub", "revision": "v1"}, "model=gpt2 model.revision=v1"),
    ({"name": "mine", "source": "hub"}, None),
    ({"name": "x", "source": "local", "path": "a/b", "claims": None}, "model=local model.path=a/b model.name=x"),
    ({"name": "x", "source": "local", "path": "a b", "claims": "gpt2"},
     "model=local 'model.path=\"a b\"' model.name=x model.claims=gpt2"),
])  # fmt: skip
def test_the_model_is_chosen_again_as_it_was(changes, said) -> None:
    assert model_arguments(CHOSEN | changes) == said


def test_without_conf_an_analysis_is_suggested(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suggestions, "CONF", tmp_path / "nowhere")
    said = next_arguments(folder, a_cell("ioi", kept={"names": 9}))
    assert said == "model=mini-attn task=ioi analysis=composition"
