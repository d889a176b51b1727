"""The command line, end to end: a cell, its record, its errors, and a sweep."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support import ROOT
from support.commands import compose
from support.models import BUNDLED, shared_model

import ovqk
from ovqk.cell import objective_of, run_cell
from ovqk.errors import UserError
from ovqk.records.record import is_done, read_record
from ovqk.report.write import write_report

QUICK = ("tracking=none",)


def only_cell(folder: Path) -> Path:
    (record,) = folder.glob("results/*/*/*/record.json")
    return record.parent


def test_the_default_cell_makes_a_complete_record(cli, tmp_path) -> None:
    code, printed = cli(*QUICK)
    assert code == 0
    folder = only_cell(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "done" and record["task"] == "ioi" and record["loaded_by"] == "families"
    assert record["processing"] == {"requested": "folded", "applied": "folded"}
    assert folder.name == f"b03-{record['cell_id']}"
    names = {
        *("heads", "layers", "spectra", "offsets", "directions"),
        *("tests", "nulls", "verdicts"),
    }
    assert set(record["tables"]) == names
    for name in names:
        assert len(pd.read_parquet(folder / f"{name}.parquet")) == record["tables"][name]
    assert str(tmp_path) not in (folder / "record.json").read_text()
    assert str(ROOT) not in (folder / "record.json").read_text()
    for word in (
        "copy suppression",
        "OV copying",
        "QK matching",
        "symmetry",
        "position",
        "OV align",
        "percentile",
        "verdict",
    ):
        assert word in printed
    assert "Traceback" not in printed and f"record: {folder.relative_to(tmp_path)}" in printed


def test_a_done_cell_is_read_from_its_record_and_force_computes_it_again(cli, tmp_path) -> None:
    cli("task=none", *QUICK)
    folder = only_cell(tmp_path)
    before = (folder / "record.json").read_bytes()
    abandoned = folder / ".heads.parquet.1.tmp"  # as a killed process leaves it
    abandoned.touch()
    code, printed = cli("task=none", *QUICK)
    assert code == 0 and "done before" in printed
    assert (folder / "record.json").read_bytes() == before and not abandoned.exists()
    cli("task=none", "force=true", *QUICK)
    assert (folder / "record.json").read_bytes() != before and is_done(folder)


def test_a_cell_runs_again_from_its_own_config_with_equal_tables(cli, tmp_path) -> None:
    cli("task=sva", "processing=raw", *QUICK)
    folder = only_cell(tmp_path)
    content = yaml.safe_load((folder / "cell.yaml").read_text())
    assert content["processing"] == "raw" and "results_dir" not in content
    code, _ = cli("-cd", str(folder), "-cn", "cell", "results_dir=again", "tracking=none")
    assert code == 0
    (again,) = tmp_path.glob("again/*/*/*/record.json")
    assert again.parent.name == folder.name
    written = {path.name for path in folder.iterdir()}
    assert {path.name for path in again.parent.iterdir()} == written and "verdicts.parquet" in written
    for table in folder.glob("*.parquet"):
        frames = pd.read_parquet(table), pd.read_parquet(again.parent / table.name)
        pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_the_id_depends_on_what_numbers_depend_on_and_on_nothing_else() -> None:
    from ovqk.records.identity import cell_id, identity

    def of(*overrides: str, digest: str = "d") -> str:
        return cell_id(identity(compose(*overrides), digest))

    base = of()
    assert base == of("results_dir=elsewhere", "tracking=none", "force=true", "device=auto", "hub_timeout=3")
    different = [
        of(digest="e"),
        of("seed=1"),
        of("processing=raw"),
        of("task=sva"),
        of("analysis=qk"),
        of("analysis.offsets=[0,1]"),
        of("model.claims=gpt2"),
        of("model.name=other"),
    ]
    assert len({base, *different}) == len(different) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=gpt3"], "model=gpt3: there is no such model"),
        (["task=ioj"], "task=ioj: there is no such task"),
        (["analysis=b04"], "analysis=b04: there is no such analysis"),
        (["proccessing=raw"], "proccessing: no such key. Did you mean processing? Allowed: activations, analysis,"),
        (
            ["model.pth=x"],
            "model.pth: no such key. Did you mean model.path? Allowed under model: attn_coeff, causal, checkpoint,",
        ),
        (["seed=many"], "could not be converted to Integer"),
        (["processing=half"], "expected one of [folded, raw]"),
        (["device=tpu"], "expected one of [cpu, cuda, auto]"),
        (["model=local"], "model.path: not set. model=local needs model.path=PATH"),
        (["model=local", "model.path=nowhere"], "model.path=nowhere: no such file or directory."),
        (["model.path=x"], "model.path=x: model=mini-attn does not read it; allowed: model=local model.path=x."),
        (["model.repo=a/b"], "model.repo=a/b: model=mini-attn does not read it; allowed: model=hub model.repo=a/b."),
        (["model=gpt2", "model.path=x"], "model.path=x: model=gpt2 does not read it; allowed: model=local"),
        (["model.file=x"], "model.file=x: model=mini-attn does not read it; allowed: unset."),
        (["model.revision=v1"], "model.revision=v1: model=mini-attn does not come from the hub"),
        (["model=gpt2", "model.source=local", "model.path=nowhere"], "model.path=nowhere: no such file or directory."),
        (
            ["-m", "model=gpt2", "model.source=package", "model.path=x"],
            "model.source=package does not read it; allowed:",
        ),
        (["-m", "model.path='x y'"], "model.path=x y: model=mini-attn does not read it; allowed: model=local"),
        (["-m", "model=mini-attn,mini-gpt2", "model.path=x"], "model=mini-attn,mini-gpt2 does not read it; allowed:"),
        (["model.name=../up"], "model.name='../up': allowed are"),
        (["analysis.circuits=[ov,vo]"], "analysis.circuits=['ov', 'vo']: allowed are ov, qk"),
        (["analysis.offsets=[-1]"], "analysis.offsets=[-1]: allowed are"),
        (["model.trust_remote_code=true"], "needs a revision that is a full commit"),
        (
            ["task.claims.mini-attn.roles.copy_suppression=['9.9']"],
            "head 9.9 does not exist; the model has layers 0 to 3",
        ),
        (["task.words.names=[Mary,John]"], "only 2 of the 2 words of 'names' are one token"),
    ],
)
def test_a_mistake_is_one_clear_message_and_leaves_no_result(cli, tmp_path, arguments, message) -> None:
    code, printed = cli(*arguments, *QUICK)
    assert code == 1
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not [path for path in tmp_path.glob("results/*/*/*/record.json") if is_done(path.parent)]
    assert not list(tmp_path.glob("results/**/*.parquet"))


@pytest.mark.parametrize("content", [
    "a: 1", "defaults: [settings, model: mini-attn, task: ioi, analysis: b03, tracking: none, _self_]",
    "defaults: [settings, _self_]\nmodel: {name: x}\nresults_dir: r\nsweep: null\ntracking: {mode: none}",
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["-m"]])
def test_a_primary_config_outside_of_the_schema_is_one_message(cli, tmp_path, content, more) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "mine")
    (tmp_path / "mine" / "config.yaml").write_text(content)
    code, printed = cli("-cp", str(tmp_path / "mine"), *more)
    assert code == 1 and "ovqk: defaults: the primary config (-cp, -cn) leaves out `schema`" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "results").exists() and not (tmp_path / "r").exists()


def test_a_mistake_in_a_config_file_of_ones_own_is_one_message(cli, tmp_path) -> None:
    (tmp_path / "mine" / "task").mkdir(parents=True)
    for text, message in (
        ("name: a\nname: b\n", "found duplicate key name"),
        ("name: [", "while parsing"),
        ("name: mine\ntitel: x\n", "titel: no such key; allowed: name, title,"),
        ("name: mine\ntitle: x\nversion: two\n", "could not be converted to Integer"),
    ):
        (tmp_path / "mine" / "task" / "mine.yaml").write_text(text)
        code, printed = cli("--config-dir", str(tmp_path / "mine"), "task=mine", *QUICK)
        assert code == 1 and message in printed and "Traceback" not in printed, printed


def test_a_model_and_a_task_of_ones_own_need_only_yaml(cli, tmp_path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "copy.yaml").write_text(
        f"name: copy\nsource: local\npath: {BUNDLED}\nclaims: mini-attn\n"
    )
    code, printed = cli("--config-dir", str(tmp_path / "mine"), "model=copy", "task=induction", *QUICK)
    assert code == 0 and "corroborated" in printed


def test_two_processes_on_one_results_folder_compute_a_cell_once(tmp_path) -> None:
    import subprocess
    import sys

    command = [sys.executable, str(ROOT / "run.py"), "task=none", "analysis=ov", *QUICK]
    started = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in "ab"]
    printed = [process.communicate(timeout=120)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert sum("done before" in text for text in printed) == 1
    assert is_done(only_cell(tmp_path))


def test_a_sweep_may_set_a_key_that_one_of_its_models_reads(cli, tmp_path) -> None:
    code, printed = cli(
        "-m", "model=mini-attn,local", f"model.path={BUNDLED.parent / 'mini-gpt2'}", "task=none", *QUICK
    )
    assert code == 0 and "2 done" in printed
    assert {path.parent.parent.parent.name for path in tmp_path.glob("results/*/*/*/record.json")} == {
        "mini-attn",
        "mini-gpt2",
    }


def test_allowed_choices_are_listed(cli) -> None:
    _, printed = cli("model=gpt3")
    assert all(name in printed for name in ("Did you mean gpt2?", "run.py --help", "model=local model.path=PATH"))
    assert len(printed.strip().splitlines()) == 1
    _, printed = cli("analysis=b4")
    assert all(path.stem in printed for path in (ROOT / "conf" / "analysis").glob("*.yaml"))


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_a_file_where_the_results_folder_should_be(cli, tmp_path, sweep) -> None:
    (tmp_path / "results").write_text("mine")
    code, printed = cli(*sweep, *QUICK)
    assert code == 1 and "results_dir=results: results is a file, not a folder." in printed
    assert "Traceback" not in printed and (tmp_path / "results").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder in which none can be made, whoever asks, is Linux's")
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_a_results_folder_that_cannot_be_made(cli, sweep) -> None:
    code, printed = cli(*sweep, *QUICK, "results_dir=/proc/ovqk")
    assert code == 1 and "results_dir=/proc/ovqk: cannot be made (No such file or directory)." in printed
    assert "Traceback" not in printed


def test_a_directory_without_tokenizer_files(cli, tmp_path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    code, printed = cli("model=local", "model.path=bare", *QUICK)
    assert code == 1 and "holds no tokenizer files" in printed and "task=none" in printed
    code, _ = cli("model=local", "model.path=bare", "task=none", *QUICK)
    assert code == 0


def test_a_tokenizer_that_cannot_be_built_matters_only_to_a_task_with_words(cli, tmp_path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "odd")
    (tmp_path / "odd" / "tokenizer.json").write_text("{")
    code, printed = cli("model=local", "model.path=odd", *QUICK)
    assert code == 1 and printed.count("tokenizer files cannot be read") == 1
    assert "task=ioi needs a tokenizer to find its words; task=none does not." in printed
    code, printed = cli("model=local", "model.path=odd", "task=none", *QUICK)
    assert code == 0
    folder = next((tmp_path / "results" / "odd" / "none").iterdir())
    notes = json.loads((folder / "record.json").read_text())["notes"]
    assert any("tokenizer files cannot be read" in note and "listed by their ids" in note for note in notes)
    assert pd.read_parquet(folder / "directions.parquet")["token"].str.fullmatch(r"#\d+").all()
    assert "analysis=composition" in printed  # and no task whose words cannot be found is suggested


def test_no_network_and_no_cache_for_a_hub_model(cli, tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    code, printed = cli("model=gpt2", *QUICK)
    assert code == 1 and "not in the Hugging Face cache, and the hub could not be reached" in printed
    assert "Traceback" not in printed


def test_hub_models_without_a_network_fail_cell_by_cell_in_a_fresh_process(tmp_path) -> None:
    """In a process of its own: nothing else has imported the hub's library there."""
    import os
    import subprocess
    import sys

    command = [sys.executable, str(ROOT / "run.py"), "-m", "model=gpt2,gpt2-medium", "task=ioi,sva", "hub_timeout=2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, *QUICK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout.count("not in the Hugging Face cache, and the hub could not be reached") == 4
    assert "0 done, 0 cached, 4 failed, 0 missing" in done.stdout and "Traceback" not in done.stdout + done.stderr


# --- real checkpoints -----------------------------------------------------------------------------------------------


def test_partial_gpt2_gets_residual_metrics_and_a_reason_for_every_other(cli, tmp_path) -> None:
    path = shared_model("gpt2-small-attention")
    code, printed = cli("model=local", f"model.path={path}", "model.claims=gpt2", *QUICK)
    assert code == 0 and "unavailable (the checkpoint has no token embedding)" in printed
    folder = only_cell(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    heads = pd.read_parquet(folder / "heads.parquet")
    for name in ("ov_copying", "qk_matching", "qk_symmetry_vocab", "ov_task_auc", "qk_positional_share"):
        assert record["unavailable"][name] == "the checkpoint has no token embedding"
        assert heads[name].isna().all()
    for name in ("ov_copying_residual", "qk_matching_residual", "ov_effective_rank", "qk_offset_r2", "qk_prev_auc"):
        assert name not in record["unavailable"] and heads[name].notna().all()
    negative_mover = heads.query("layer == 11 and head == 10")["ov_copying_residual"].item()
    assert negative_mover == pytest.approx(1.0, abs=0.01)  # residual sign is not token copying
    verdicts = pd.read_parquet(folder / "verdicts.parquet")
    tested = verdicts[verdicts["verdict"] != "untestable"]  # a composition of roles needs no tokens
    assert tested["primary"].isin(["q_composition", "k_composition"]).all() and (tested["kind"] == "role").all()
    assert (verdicts.drop(tested.index)["reason"] != "").all() and len(tested) < 3
    pairs = pd.read_parquet(folder / "composition.parquet").query("mode == 'k' and receiver_layer == 6")
    into = pairs.query("receiver_head == 9").set_index(["sender_layer", "sender_head"])
    assert into.at[(4, 11), "score"] == pytest.approx(0.1035, abs=5e-4)  # 0.036 for random weights
    assert into.at[(4, 11), "percentile"] == into.at[(2, 2), "percentile"] == 1
    assert pairs["matching"].isna().all()


def test_stories260k_without_a_task_and_with_one_it_has_no_words_for(cli, tmp_path) -> None:
    path = shared_model("stories260k")
    code, printed = cli("model=local", f"model.path={path}", "task=none", *QUICK)
    assert code == 0 and "No verdicts: task none claims no heads" in printed
    heads = pd.read_parquet(only_cell(tmp_path) / "heads.parquet")
    assert len(heads) == 40 and heads["qk_share_position"].notna().all()
    code, printed = cli("model=local", f"model.path={path}", "task=ioi", *QUICK)
    assert code == 1 and "words of 'names' are one token" in printed


def test_a_vocabulary_smaller_than_d_head(cli, tmp_path) -> None:
    code, _ = cli("model=local", f"model.path={shared_model('nano-sort')}", "task=none", *QUICK)
    assert code == 0
    folder = only_cell(tmp_path)
    spectra = pd.read_parquet(folder / "spectra.parquet")
    full = spectra.query("space == 'vocab' and kind == 'singular'")
    assert (full.query("index >= 2")["re"].abs() < 1e-5 * full["re"].max()).all()  # rank at most V - 1 = 2
    heads = pd.read_parquet(folder / "heads.parquet")
    assert heads["ov_copying"].between(-1, 1).all()


def test_single_files_run_too(cli, tmp_path) -> None:
    path = shared_model("modular-addition") / "l8k1hzciux.safetensors"
    code, _ = cli("model=local", f"model.path={path}", "model.causal=false", "task=none", *QUICK)
    assert code == 0
    record = json.loads((only_cell(tmp_path) / "record.json").read_text())
    assert record["model"] == "l8k1hzciux" and "qk_prev_auc" in record["unavailable"]
    assert record["processing"]["applied"] == "raw"


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_prints_a_line_a_cell_compares_and_skips_what_is_done(cli, tmp_path) -> None:
    arguments = ("-m", "model=mini-attn", "task=ioi,sva,induction", "analysis=b03,qk", *QUICK)
    code, printed = cli(*arguments)
    assert code == 0
    for number in range(1, 7):
        assert f"[{number}/6] mini-attn / " in printed
    assert "6 done, 0 cached, 0 failed, 0 missing" in printed
    assert printed.count("agreement output") == 2  # a row per cell and role
    code, printed = cli(*arguments)
    assert code == 0 and "0 done, 6 cached, 0 failed, 0 missing" in printed
    results = ovqk.load_results(tmp_path / "results")
    assert len(results["cells"]) == 6 and set(results["heads"]["analysis"]) == {"b03", "qk"}
    assert len(results["heads"]) == 6 * 32


def test_a_failed_cell_does_not_stop_the_others_and_the_status_says_so(cli, tmp_path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "broken")
    data = (tmp_path / "broken" / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(data[:1000])
    code, printed = cli("-m", "model=local", "model.path=broken," + str(BUNDLED), "task=none", *QUICK)
    assert code == 1
    assert "1 done, 0 cached, 1 failed, 0 missing" in printed
    assert "failed: local / none / b03 model.path=broken (its message is above)\n" in printed
    message = "\n    model.safetensors: not a complete safetensors file"
    assert printed.count(message) == 1 and printed.index(message) < printed.index("failed: ")
    assert "Traceback" not in printed
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/*/*/*/record.json")]
    (failed,) = [record for record in records if record["status"] == "failed"]
    assert len(records) == 2 and failed["error"].startswith("model.safetensors: not a complete") and failed["sweep"]
    said = write_report(tmp_path / "results", with_figures=False)
    assert f"without results: broken / none / b03: {failed['error']}" in said
    shutil.copy(BUNDLED / "model.safetensors", tmp_path / "broken")
    code, printed = cli("-m", "model=local", "model.path=broken," + str(BUNDLED), "task=none", *QUICK)
    assert code == 0 and "1 done, 1 cached" in printed
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/*/*/*/record.json")]
    assert [record["status"] for record in records] == ["done", "done"]  # the failure is forgotten


def test_a_cell_that_another_sweep_computed_is_a_cell_of_both(cli, tmp_path) -> None:
    results = tmp_path / "results"
    small = ("task=none", "analysis=ov", "nulls.draws=9", "analysis.components=0", *QUICK)
    assert cli("-m", *small, "sweep=small")[0] == 0
    (path,) = results.glob("*/*/*/record.json")
    record = json.loads(path.read_text())
    left_out = {"reasons": {"names": {"Ada": "two tokens"}}, "kept": {"names": 9}}
    path.write_text(json.dumps(record | {"words": record["words"] | left_out}))
    code, printed = cli("-m", *small, "seed=0,1", "sweep=grown")
    assert "note: words left out, with reasons in record.json: mini-attn / none 1\n" in printed
    assert code == 0 and "note: 1 of 2 cells were computed under another sweep's name" in printed
    assert cli(*small, "sweep=handed_out")[0] == 0  # as a W&B agent gives it
    sweeps = {name: len(ovqk.load_results(results, [], sweep=name)["cells"]) for name in ("small", "grown")}
    assert sweeps == {"small": 1, "grown": 2}
    handed_out = ovqk.load_results(results / "mini-attn", [], sweep="handed_out")["cells"]
    assert list(handed_out["seed"]) == [0] and list(handed_out["sweep"]) == ["small"]
    with pytest.raises(ValueError, match="sweep='other': no cell is of that sweep; there: 'grown', 'small'"):
        ovqk.load_results(results, sweep="other")


def test_a_single_cell_whose_weights_cannot_be_opened_leaves_its_message_alone(cli, tmp_path) -> None:
    code, printed = cli("model=local", "model.path=nowhere", "task=none", *QUICK)
    assert code == 1 and "nowhere" in printed and not list(tmp_path.glob("results/*/*/*/record.json"))


def test_a_failure_inside_a_cell_is_recorded_and_computed_again_later(cli, tmp_path, monkeypatch) -> None:
    import ovqk.cell

    def breaks(*arguments: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ovqk.cell, "analyse", breaks)
        code, printed = cli("-m", "task=none", "seed=0,1", *QUICK)
    assert code == 1 and "0 done, 0 cached, 2 failed, 0 missing" in printed and "MemoryError: no room" in printed
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/*/*/*/record.json")]
    assert [record["status"] for record in records] == ["failed", "failed"]
    assert all("no room" in record["error"] and "Traceback" in record["traceback"] for record in records)
    code, printed = cli("-m", "task=none", "seed=0,1", *QUICK)
    assert code == 0 and "2 done" in printed


def test_a_sweep_file_runs_and_the_command_line_narrows_it(cli, tmp_path) -> None:
    code, printed = cli("-cd", str(ROOT / "sweeps"), "-cn", "smoke", "task=none", "analysis=ov", *QUICK)
    assert code == 0 and "[1/1] mini-attn / none / ov" in printed
    assert json.loads((only_cell(tmp_path) / "record.json").read_text())["sweep"] == "smoke"


def test_results_do_not_depend_on_the_number_of_threads(tmp_path) -> None:
    """In processes of their own: how threads wait for each other is settled when torch is imported."""
    import os
    import subprocess
    import sys

    for number in ("1", "2"):
        command = [sys.executable, str(ROOT / "run.py"), f"results_dir={number}", "cache=false", *QUICK]
        environment = os.environ | {"OMP_NUM_THREADS": number}
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=True)
    (one,), (two,) = tmp_path.glob("1/*/*/*/record.json"), tmp_path.glob("2/*/*/*/record.json")
    threads = [json.loads(path.read_text())["provenance"]["threads"] for path in (one, two)]
    assert threads == [1, 2]
    for table in ("tests", "verdicts", "heads"):
        frames = [pd.read_parquet(path.parent / f"{table}.parquet") for path in (one, two)]
        pd.testing.assert_frame_equal(*frames, rtol=1e-6, atol=1e-9)


# --- objectives ---------------------------------------------------------------------------------------------------


def test_an_objective_is_a_number_of_the_summary(tmp_path) -> None:
    outcome = run_cell(compose("task=none", "analysis=ov", "tracking=none", f"results_dir={tmp_path / 'r'}"))
    folder = Path(str(outcome.folder))
    wanted = read_record(folder)["summary"]["mean/ov_copying"]
    assert objective_of("mean/ov_copying", folder) == wanted and objective_of(None, folder) is None
    with pytest.raises(UserError, match=r"objective=mean/ov_copyin: .*Near it: .*mean/ov_copying"):
        objective_of("mean/ov_copyin", folder)


def test_a_failed_cell_of_a_sweep_has_no_objective_and_says_why(cli) -> None:
    code, printed = cli("-m", "task=none", "analysis=ov", "tracking=none", "objective=mean/none_such", "seed=0,1")
    assert code == 1 and printed.count("objective=mean/none_such: the record's summary has no such number") == 2
