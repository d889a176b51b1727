"""A choice made by someone else: it takes no secret of the environment along, and a cell's own file names no code."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from support.commands import compose

from ovqk.config.rerun import refuse_foreign_files
from ovqk.errors import UserError, secrets, told, without_secrets
from ovqk.records.record import cell_yaml

KEY = "c0ffee" + 34 * "1"
QUICK = ("task=none", "analysis=qk", "analysis.components=0", "tracking=none")


@pytest.fixture(autouse=True)
def key(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_which_variables_hold_secrets(monkeypatch) -> None:
    named = (
        "HF_TOKEN AWS_SECRET_ACCESS_KEY PGPASSWORD MY_CREDENTIALS OPENAI_APIKEY GITHUB_PAT PAT DB_PASS PASS MYSQL_PWD"
    )
    for name in (*named.split(), "db_pwd_old", "MYPASSWD", "SSHPASS"):
        monkeypatch.setenv(name, f"{name}-value")
        assert name in secrets()
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "a-long-value"),
        ("HF_TOKEN_PATH", "/users/me/token"),
        *((name, "/users/me/a-folder") for name in ("PATH", "PWD", "OLDPWD", "PYTHONPATH", "MY_PAT_FILE")),
        *((name, "/users/me/a-program") for name in ("SSH_ASKPASS", "GIT_ASKPASS", "COMPASS", "PATTERN", "PASSING")),
        ("DB_PASS", "7-chars"),
        ("KEY", "no"),
    ):
        monkeypatch.setenv(name, value)
        assert name not in secrets()
    monkeypatch.setenv("HTTPS_PROXY", "http://me:a-long-password@proxy:80")
    monkeypatch.setenv("WANDB_BASE_URL", "https://host:8080/a:b@c")
    assert secrets()["HTTPS_PROXY"] == "a-long-password" and "WANDB_BASE_URL" not in secrets()
    assert without_secrets(f"a {KEY} b") == "a $WANDB_API_KEY b" and KEY not in told(ValueError(KEY))


@pytest.mark.parametrize("override", [
    "model.name=${oc.env:WANDB_API_KEY}", "tracking.project=x-${oc.env:WANDB_API_KEY}", "sweep=${oc.env:WANDB_API_KEY}",
    "task.title=${oc.env:WANDB_API_KEY}", "+task.words={a: ['${oc.env:WANDB_API_KEY}']}", f"task.title=x{KEY}",
])  # fmt: skip
def test_a_choice_with_a_secret_is_refused_without_telling_it(override) -> None:
    with pytest.raises(UserError, match="holds the value of the environment variable WANDB_API_KEY") as found:
        compose(override)
    assert KEY not in str(found.value)


def test_a_choice_that_asks_for_a_secret_is_refused_whatever_it_makes_of_it(monkeypatch) -> None:
    monkeypatch.setenv("LIST_TOKEN", "'first-part','second-part'")
    for asked in ("${oc.env:LIST_TOKEN}", "${oc.env:'LIST_TOKEN'}", "${oc.env: LIST_TOKEN, none}"):
        with pytest.raises(UserError, match="asks for the environment variable LIST_TOKEN, a secret"):
            compose(f"+task.words={{a: \"${{oc.decode:'[{asked}]'}}\"}}")


@pytest.mark.parametrize("arguments", [
    ["results_dir=${oc.env:WANDB_API_KEY}"], ["hydra.run.dir=${oc.env:WANDB_API_KEY}"],
    ["seed=${oc.env:WANDB_API_KEY}"], ["model.source=${oc.env:WANDB_API_KEY}"],
    ["task.title=a,${oc.env:WANDB_API_KEY}", "-m"], ["model.name=b,${oc.env:WANDB_API_KEY}", "-m"],
])  # fmt: skip
def test_a_secret_leaves_no_trace_on_disk_or_screen(cli, tmp_path, arguments) -> None:
    code, printed = cli(*QUICK, *arguments)
    assert code == 1 and KEY not in printed, printed
    assert "Traceback" not in printed
    for path in tmp_path.rglob("*"):
        assert KEY not in str(path) and not (path.is_file() and KEY.encode() in path.read_bytes()), path


def test_a_task_file_of_someone_else_takes_no_secret_along(cli, tmp_path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "theirs.yaml").write_text("name: theirs\ntitle: ${oc.env:WANDB_API_KEY}\n")
    code, printed = cli("-cd", str(tmp_path), "task=theirs", "analysis=qk", "tracking=none")
    assert code == 1 and "task.title: it holds the value of the environment variable WANDB_API_KEY" in printed
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("text", ["${oc.env:WANDB_API_KEY}", "\\${oc.env:HOME}", "\\\\${x} ${y}", "a\\b", "\\"])
def test_a_text_of_a_cell_stays_the_same_when_it_is_computed_again(text) -> None:
    cell = compose("task=none")
    cell.task.title = text
    again = OmegaConf.create(yaml.safe_load(cell_yaml(cell)))
    assert again.task.title == text


@pytest.mark.parametrize(("change", "message"), [
    ({"hydra": {"callbacks": {"x": {"_target_": "os.system", "command": "touch ran"}}}}, "has no key 'hydra'"),
    ({"callbacks": {}}, "a cell's choice has no key 'callbacks'"),
    ({"defaults": ["schema", {"override hydra/launcher": "mine"}, "_self_"]}, "a cell's choice does not extend"),
    ({"defaults": 3}, "a cell's choice does not extend 3"),
    ({"defaults": {"schema": None}}, "a cell's choice does not extend {'schema': None}"),
    ({"task": {"name": "x", "prompts": {"a": [{"_target_": "os.system"}]}}}, "task.prompts.a.0._target_ names code"),
])  # fmt: skip
def test_a_cell_file_that_names_code_is_refused(tmp_path, change, message) -> None:
    content = yaml.safe_load(cell_yaml(compose("task=none"))) | change
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump(content))
    for arguments in (["-cd", str(tmp_path), "-cn", "cell"], ["-cn=cell.yaml", f"--config-dir={tmp_path}", "seed=1"]):
        with pytest.raises(UserError, match=message):
            refuse_foreign_files(arguments)


@pytest.mark.parametrize(
    "arguments",
    [("-cd", "{}", "-cn", "sub/cell"), ("-cp", "{}/sub", "-cn", "cell"), ("--config-path={}", "-cn=sub/cell.yaml")],
)
@pytest.mark.parametrize("title", ["x", "2001-99-99"])
def test_no_way_to_name_a_cell_file_and_no_odd_value_runs_its_code(cli, tmp_path, arguments, title) -> None:
    """Hydra's YAML knows no dates, so that a file may be damaged to one reader and a choice to another."""
    mark, folder = tmp_path / "ran", tmp_path / "theirs"
    (folder / "sub").mkdir(parents=True)
    text = cell_yaml(compose("task=none")) + (
        f"hydra:\n  callbacks:\n    x: {{_target_: pathlib.Path.touch, self: {mark}}}\n"
    )
    (folder / "sub" / "cell.yaml").write_text(text.replace("title: ''", f"title: {title}"))
    code, printed = cli(*(argument.format(folder) for argument in arguments), "tracking=none")
    assert code == 1 and "a cell's choice has no key 'hydra'" in printed, printed
    assert not mark.exists()


@pytest.mark.parametrize("option", ["-cd", "-cp"])
@pytest.mark.parametrize("name", ["schema.yaml", "settings.yaml", "tracking/none.yaml", "hydra/config.yaml"])
def test_no_file_beside_a_cell_takes_the_place_of_what_it_extends(cli, tmp_path, name, option) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "theirs"
    (folder / name).parent.mkdir(parents=True)
    (folder / "cell.yaml").write_text(cell_yaml(compose("task=none")))
    (folder / name).write_text("defaults:\n  - /mine@hydra.callbacks.x\n  - _self_\n")
    (folder / "mine.yaml").write_text(f"_target_: pathlib.Path.touch\nself: {mark}\n")
    code, printed = cli(option, str(folder), "-cn", "cell", "tracking=none")
    assert code == 1 and f"{name.partition('/')[0]}: Hydra would read it in place of" in printed, printed
    assert not mark.exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("text", "said"), [("task: &a [*a]\n", "stands for a part that contains it"), ("task: [\n", "cannot be read")]
)
def test_a_cell_file_that_cannot_be_read_is_refused(tmp_path, text, said) -> None:
    (tmp_path / "cell.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        refuse_foreign_files(["-cd", str(tmp_path), "-cn", "cell"])


def test_a_cell_file_of_ovqks_is_computed_again(cli, tmp_path) -> None:
    code, printed = cli(*QUICK)
    assert code == 0, printed
    (folder,) = (path.parent for path in tmp_path.glob("results/*/*/*/record.json"))
    code, printed = cli("-cd", str(folder), "-cn", "cell", "results_dir=again", "tracking=none")
    assert code == 0, printed
    (again,) = (path.parent for path in tmp_path.glob("again/*/*/*/record.json"))
    assert again.name == folder.name
    content = yaml.safe_load((folder / "cell.yaml").read_text())
    mark = tmp_path / "ran"
    content["hydra"] = {"callbacks": {"x": {"_target_": "pathlib.Path.touch", "self": str(mark)}}}
    Path(folder / "cell.yaml").write_text(yaml.safe_dump(content))
    code, printed = cli("-cd", str(folder), "-cn", "cell", "results_dir=third")
    assert code == 1 and "a cell's choice has no key 'hydra'" in printed
    assert not mark.exists() and not (tmp_path / "third").exists()
