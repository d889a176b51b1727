"""Cells that run their model: tables, records, claims by measurement, and what cannot be run."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import compose, computed
from support.models import local, shared_model

from ovqk.activations import measure, stage
from ovqk.activations.batches import Prompts
from ovqk.activations.forward import RunningModel
from ovqk.activations.measure import check_activations
from ovqk.cell import run_cell
from ovqk.checkpoints.opening import BUNDLED
from ovqk.config.schema import AttentionConfig, EffectConfig, WriteConfig
from ovqk.errors import UserError

FEW = ("activations.prompts=96", "nulls.draws=99")


def test_a_full_cell_holds_both_readings(tmp_path) -> None:
    _, record, tables = computed(tmp_path, "model=mini-gpt2", "task=induction", "analysis=full", *FEW)
    assert {"activations", "roles", "joint", "verdicts", "directions"} <= set(tables)
    activations = record["activations"]
    assert activations["untestable"] == "" and activations["start_tokens"] == [1]
    assert activations["halves"]["testing"]["accuracy"] > 0.95
    assert {"effect", "effect_mean_replacement", "effect_restored", "effect_first_order"} <= set(tables["activations"])
    assert set(activations["controls"]) == {"replaced_by_itself", "downstream", "readout_error", "untrained"}
    assert activations["controls"]["downstream"] == 0
    assert set(activations["controls"]["untrained"]) == {"induction", "previous_token"}
    assert set(activations["halves"]) == {"choosing", "testing"} and activations["accuracy_by_template"]
    assert activations["controls"]["replaced_by_itself"] < 1e-4 and activations["controls"]["readout_error"] < 1e-4
    rows = tables["activations"]
    assert len(rows) == 2 * 2 * 32 and set(rows["half"]) == {"choosing", "testing"}
    assert rows["attention"].between(0, 1).all() and rows["attention_nonsink"].between(0, 1 + 1e-6).all()
    roles = tables["roles"]
    claimed = roles[roles["claimed"]]
    assert set(claimed[claimed["role"] == "induction"]["head"]) == {2, 7}
    assert claimed["measured"].all()  # measured on 1,024 prompts, and again on these
    verdicts = {(row["layer"], row["head"]): row["verdict"] for row in claimed.to_dict("records")}
    assert verdicts == {(1, 2): "realised", (1, 7): "partial", (0, 5): "realised"}
    outdone = claimed[claimed["verdict"] == "partial"].iloc[0]
    assert outdone["reason"] == "other heads show as much attention"
    assert outdone["attention_peers_p"] > 0.05 >= outdone["attention_peers_min_p"]
    joint = tables["joint"]
    assert set(joint["kind"]) == {"head", "role"} and len(joint[joint["kind"] == "head"]) == len(roles)
    together = joint[joint["kind"] == "role"].set_index("role")
    assert together.at["previous_token", "activations"] == "realised"
    induction = together.loc["induction"]
    assert induction["activations"] == ("partial" if induction["peers_p"] > 0.05 else "realised")
    assert induction["effect_together"] > claimed["effect"].where(claimed["role"] == "induction").max()
    verdicts = tables["verdicts"].query("kind == 'role'").set_index("role")["verdict"]
    assert together.at["induction", "weights"] == verdicts["induction"]
    assert record["summary"]["prompts/accuracy"] == pytest.approx(
        activations["halves"]["testing"]["accuracy"], abs=1e-4
    )
    assert run_cell(compose("model=mini-gpt2", "task=induction", "analysis=full", *FEW, "tracking=none",
                            f"results_dir={tmp_path / 'results'}")).status == "cached"  # fmt: skip


def test_a_replacement_that_changes_what_comes_before_it_is_refused(tmp_path, monkeypatch) -> None:
    real = RunningModel.patched

    def too_early(self, base, at, replacements, *others):
        early = [[each._replace(layer=max(0, each.layer - 1)) for each in together] for together in replacements]
        return real(self, base, at, early, *others)

    monkeypatch.setattr(measure, "check_replacing", lambda *_: 0.0)
    monkeypatch.setattr(RunningModel, "patched", too_early)
    _, record, _ = computed(tmp_path, "model=mini-gpt2", "task=induction", "analysis=activations", *FEW)
    assert "replacing a head changes attention in its own layer or before it" in record["activations"]["untestable"]


@pytest.mark.slow
def test_roles_by_measurement_are_claims_about_the_weights(tmp_path) -> None:
    """The weights of a model that nothing is published about get verdicts."""
    _, record, tables = computed(
        tmp_path, "model=mini-llama", "model.claims=measured", "task=induction", "analysis=activations", *FEW
    )
    assert record["claims"]["reliability"] == "measured" and "96 prompts" in record["claims"]["source"]
    heads = tables["verdicts"][tables["verdicts"]["kind"] == "head"]
    measured = tables["roles"][tables["roles"]["measured"]]
    assert len(heads) == len(measured) > 0
    assert tables["joint"][tables["joint"]["kind"] == "head"]["weights"].notna().all()


def test_measuring_needs_an_analysis_that_runs_the_model() -> None:
    with pytest.raises(UserError, match=r"model\.claims=measured: analysis=b03 does not run the model"):
        compose("model=mini-attn", "model.claims=measured")


@pytest.mark.slow
def test_weights_do_not_depend_on_running_the_model(tmp_path) -> None:
    tables = [computed(tmp_path / name, "model=mini-attn", "task=induction", f"analysis={name}", "nulls.draws=99",
                       "activations.prompts=64")[2] for name in ("b03", "full")]  # fmt: skip
    for name in ("heads", "spectra", "directions", "verdicts", "tests", "nulls"):
        pd.testing.assert_frame_equal(tables[0][name], tables[1][name])


@pytest.mark.slow
def test_a_model_that_does_not_do_the_task_keeps_its_weights_verdicts(tmp_path) -> None:
    source, folder = BUNDLED / "mini-gpt2", tmp_path / "shuffled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.dim() == 2:
            weights[name] = (
                value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value).contiguous()
            )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, record, tables = computed(
        tmp_path, "model=local", f"model.path={folder}", "model.claims=mini-gpt2", "task=induction",
        "analysis=activations", *FEW,
    )  # fmt: skip
    assert record["activations"]["untestable"].startswith("the model does not do the task (accuracy ")
    assert set(tables["roles"]["verdict"]) == {"untestable"} and "verdicts" in tables


def test_what_cannot_be_run_says_why_and_harms_nothing(tmp_path) -> None:
    folder = tmp_path / "partial"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / "mini-gpt2" / name).read_bytes())
    weights = load_file(BUNDLED / "mini-gpt2" / "model.safetensors")
    lacking = next(name for name in weights if name.endswith("h.2.mlp.c_fc.weight"))
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, record, tables = computed(
        tmp_path, "model=local", f"model.path={folder}", "task=induction", "analysis=activations", *FEW
    )
    assert "missing" in record["activations"]["untestable"] and "mlp.c_fc" in record["activations"]["untestable"]
    assert "roles" not in tables and len(tables["heads"]) == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("activations.prompts=6",), "clusters of prompts, and needs 4"),
        (("~task.prompts.counterfactual",), "says no counterfactual"),
        (("task.roles.induction.activations.attention.query=ENDE",), "name the label 'ENDE'"),
        (("task.roles.induction.activations.attention.query=a b",), "'a b' is not a label"),
        (("task.words.content=[park,river]",), "of the words that this tokenizer can read"),
        (("task.prompts.repeated.words=nosuch",), "task.prompts: unknown word set 'nosuch'"),
    ],
)
def test_a_task_that_cannot_be_measured_says_why(tmp_path, overrides, message) -> None:
    _, record, _ = computed(
        tmp_path, "model=mini-gpt2", "task=induction", "analysis=activations", "~task.variables.token",
        "nulls.draws=19", *overrides,
    )  # fmt: skip
    assert message in record["activations"]["untestable"]


@pytest.mark.slow
def test_a_smaller_batch_is_tried_once(tmp_path, monkeypatch) -> None:
    sizes = []
    real = stage.measure

    def short(running: object, model: object, prompts: Prompts, *arguments: object) -> object:
        sizes.append(max(len(batch) for batch in prompts.batches))
        if len(sizes) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return real(running, model, prompts, *arguments)

    monkeypatch.setattr(stage, "measure", short)
    _, record, _ = computed(
        tmp_path, "model=mini-gpt2", "task=sva", "analysis=activations", "activations.prompts=64",
        "activations.batch=16", "nulls.draws=19",
    )  # fmt: skip
    assert sizes == [16, 4] and record["activations"]["untestable"] == ""
    monkeypatch.setattr(stage, "measure", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    _, record, _ = computed(
        tmp_path / "again", "model=mini-gpt2", "task=sva", "analysis=activations", "activations.prompts=64",
        "activations.batch=16", "nulls.draws=19",
    )  # fmt: skip
    assert record["activations"]["untestable"] == (
        "activations.batch=16: out of memory, and with batches of 4 prompts too."
    )


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("loaded", "out of memory while the whole model is loaded"),
        ("prompt_streams", "no fidelity.parquet"),
        ("read_streams", "behind layer 0 no word is read: out of memory, running"),
    ],
)
def test_memory_that_is_exhausted_elsewhere_costs_no_verdict_on_weights(tmp_path, monkeypatch, part, said) -> None:
    def short(*_: object) -> object:
        raise MemoryError

    if part == "loaded":
        monkeypatch.setattr("ovqk.activations.forward.RunningModel.load", short)
    else:
        monkeypatch.setattr(stage, part, short)
    analysis = ["analysis=b03", "analysis.embedding=stream"] if part == "read_streams" else ["analysis=activations"]
    _, record, tables = computed(
        tmp_path, "model=mini-gpt2", "task=sva", *analysis, "activations.prompts=64", "nulls.draws=19"
    )
    told = [*record["notes"], (record.get("activations") or {}).get("untestable", "")]
    assert any(said in each for each in told) and len(tables["verdicts"]) and "fidelity" not in tables


def role(**parts: object) -> object:
    task = compose("task=ioi").task
    for name, value in parts.items():
        setattr(task.roles["name_mover"].activations, name, value)
    return task


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"decides": ["attention", "position"]}, r"decides=.*allowed are those given: attention, write, effect"),
        ({"decides": []}, "allowed are those given"),
        ({"attention": AttentionConfig("END", "IO", "OTHER", [])}, "allowed: control, counterfactual"),
        ({"write": WriteConfig(sign=2)}, "sign=2: allowed: 1, -1"),
        ({"effect": EffectConfig(into="nobody")}, "effect.into=nobody: allowed: another role"),
        ({"effect": EffectConfig(given="previous_token")}, "its heads act at S1.1, not at END"),
        ({"effect": EffectConfig(given="copy_suppression", into="copy_suppression")}, "allowed is one of them"),
        ({"effect": EffectConfig(given="s_inhibition")}, "does not itself depend on another's heads"),
    ],
)
def test_a_role_that_says_it_wrongly_is_refused(parts, message) -> None:
    with pytest.raises(UserError, match=message):
        check_activations(role(**parts))


def test_gpt2_without_embeddings_cannot_be_run(tmp_path) -> None:
    folder = shared_model("gpt2-small-attention")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    from ovqk.checkpoints.opening import open_checkpoint

    with pytest.raises(UserError, match="missing from the checkpoint"):
        RunningModel.load(open_checkpoint(local(folder)), local(folder), torch.device("cpu"))
