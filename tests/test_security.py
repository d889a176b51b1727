"""Secrets of the environment stay there."""

import os
import subprocess
import sys

from support import ROOT


def test_keys_in_the_environment_reach_no_file_and_no_output(tmp_path) -> None:
    """Every byte that a sweep leaves: records, configs, tables, Hydra's folders, W&B's files and logs."""
    keys = {"WANDB_API_KEY": "c0ffee" + 34 * "1" + "canary", "HF_TOKEN": "hf_canary" + 30 * "2"}
    keys["HUGGING_FACE_HUB_TOKEN"] = keys["HF_TOKEN"]
    places = {name: str(tmp_path / "home" / name) for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, str(ROOT / "run.py"), "-m", "tracking=offline", "analysis=qk", "nulls.draws=19"]
    done = subprocess.run(
        [*command, "task=ioi,none"],
        env=environment | keys | places,
        cwd=tmp_path,
        capture_output=True,
        timeout=200,
        check=True,
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files} | {path.suffix for path in files}
    assert {"record.json", "cell.yaml", "tracking.json", "multirun.yaml", ".wandb", ".log", ".parquet"} <= names
    for key in set(keys.values()):
        assert key.encode() not in done.stdout + done.stderr
        assert [path for path in files if key.encode() in path.read_bytes()] == []
