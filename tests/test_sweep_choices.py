"""A sweep that Hydra cannot begin is one message, before any cell; it is never a warning behind which nothing runs."""

import pytest
import yaml

from ovqk import sweep

QUICK = ("task=none", "analysis=qk", "analysis.components=0", "tracking=none", "nulls.draws=9")


@pytest.mark.parametrize(("override", "message"), [
    ("hydra.sweeper.params.x=", "hydra.sweeper.params.x=: Hydra does not take it (AssertionError: "),
    ("+hydra.sweeper.params.seed='0,1'", "+hydra.sweeper.params.seed='0,1': Hydra does not take it (AssertionError: "),
    ("hydra.sweeper=null", "hydra.sweeper: not set. If you leave it out, cells run here, one after the other."),
    ("hydra.launcher=null", "hydra.launcher: not set. If you leave it out, cells run here, one after the other."),
    ("hydra.sweeper.max_batch_size=0", "hydra.sweeper.max_batch_size=0: must be null or a number of cells >= 1."),
    ("hydra=null", "hydra=null: Hydra does not take it (ValueError: "),
    ("seed=range(0)", "seed=range(0): it has no value, so the sweep has no cell."),
    ("model=glob(*zz)", "model=glob(*zz): it has no value, so the sweep has no cell."),
    ("seed=range(0,1,0)", "seed=range(0,1,0): Hydra does not take it (ValueError: range() arg 3 must not be zero)."),
    ("seed=interval(0,1)", "BasicSweeper does not support sweep type : INTERVAL_SWEEP"),
])  # fmt: skip
def test_values_that_make_no_sweep_are_one_message(cli, override, message) -> None:
    code, printed = cli("-m", *QUICK, override)
    assert code == 1 and printed.startswith(f"ovqk: {message}") and printed.count("\n") == 1, printed


def test_a_sweeper_that_does_not_start_is_no_success(cli) -> None:
    code, printed = cli("-m", *QUICK, "hydra.sweeper._target_=foo.Bar")
    assert code == 1 and "ovqk: the launcher gave up (RuntimeError: Invalid plugin 'foo.Bar'" in printed, printed
    assert "Traceback" not in printed and "Warning" not in printed


def test_models_may_be_chosen_by_a_pattern(cli, tmp_path) -> None:
    params = {"model": "glob(mini-a*)", "seed": "0,1"}
    content = {"defaults": ["config", "_self_"], "hydra": {"mode": "MULTIRUN", "sweeper": {"params": params}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    code, printed = cli("-cd", str(tmp_path), "-cn", "mine", *QUICK)
    assert code == 0 and "2 done, 0 cached, 0 failed, 0 missing" in printed, printed


def test_a_defect_at_the_start_of_a_sweep_ends_it_with_its_traceback(cli, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "expected_cells", lambda config: 1 / 0)
    code, printed = cli("-m", *QUICK)
    assert code == 1 and "ZeroDivisionError" in printed and "Warning" not in printed and "missing" not in printed
