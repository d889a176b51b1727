"""The progress of a sweep and of a long cell: lines and bars, counts, the time left."""

import re
import time

import pytest
from support.commands import compose

from ovqk.analyse import analyse
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.records.outcomes import Outcome, Outcomes
from ovqk.report import estimate, progress, terminal
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.weights.readers import open_weights
from ovqk.weights.types import OpenedModel

QUICK = ("task=none", "analysis=ov", "tracking=none")


def outcome(status: str = "done", **keys: object) -> Outcome:
    return Outcome(status, "m", "t", "a", None, 1.0, **keys)  # type: ignore[arg-type]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_cells_alike_in_name_are_told_apart_by_what_the_sweep_varies(cli) -> None:
    code, printed = cli("-m", *QUICK, "seed=0,1", "processing=folded,raw")
    assert code == 0 and "[1/4] mini-attn / none / ov seed=0 processing=folded  done" in printed
    assert "[4/4] mini-attn / none / ov seed=1 processing=raw  done" in printed


def test_what_remains_is_estimated_from_the_cells_that_were_computed(tmp_path, monkeypatch, capsys) -> None:
    outcomes = Outcomes(tmp_path)
    outcomes.begin("a sweep", [["seed=0"], ["seed=1"], ["seed=2"], ["seed=3"]])
    shown = progress.SweepProgress(outcomes)
    clock = shown.started
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    outcomes.add(2, outcome("cached"))
    shown.print_new()
    assert "[1/4] m / t / a seed=2  cached  1.0 s\n" in capsys.readouterr().out
    clock += 600
    outcomes.add(0, outcome())
    shown.print_new()
    assert "[2/4] m / t / a seed=0  done  1.0 s  (about 20 min left)\n" in capsys.readouterr().out
    clock += 60  # without what only the first cell pays
    outcomes.add(1, outcome("failed", error="no"))
    shown.print_new()
    printed = capsys.readouterr()
    assert "[3/4] m / t / a seed=1  failed  1.0 s  (about 60 s left)\n    no\n" in printed.out
    outcomes.add(3, outcome(warning="warning: W&B: away"))
    shown.print_new()
    printed = capsys.readouterr()
    assert "[4/4] m / t / a seed=3  done  1.0 s\n" in printed.out and "warning: W&B: away" in printed.err


def test_lines_of_cells_that_run_elsewhere_are_printed_as_they_end(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY", 0.01)
    outcomes = Outcomes(tmp_path)
    outcomes.begin("a sweep", None)
    outcomes.add(0, outcome())
    shown = progress.SweepProgress(outcomes)
    shown.watch()
    Outcomes(tmp_path).add(7, outcome())  # by another process
    deadline = time.monotonic() + 10
    while shown.ended < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    shown.stop()
    assert "[1] m / t / a  done" in capsys.readouterr().out and list(outcomes.all()) == [0, 7]


def test_a_folder_used_again_forgets_the_sweep_before(cli, tmp_path) -> None:
    cli("-m", *QUICK, "seed=0,1,2", "hydra.sweep.dir=mine")
    code, printed = cli("-m", *QUICK, "seed=0,1", "hydra.sweep.dir=mine")
    assert code == 0 and "0 done, 2 cached, 0 failed, 0 missing" in printed


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "8 s"), (89.0, "89 s"), (91.0, "2 min"), (7300.0, "2 h 2 min")])
def test_durations(seconds, text) -> None:
    assert terminal.duration(seconds) == text


def test_a_long_cell_shows_a_bar_on_a_terminal_and_a_short_one_nothing(monkeypatch) -> None:
    import io

    from rich.console import Console

    for short, shown in ((0.01, True), (60.0, False)):
        out = Console(file=io.StringIO(), force_terminal=True, width=100)
        monkeypatch.setattr(terminal, "progress_console", lambda out=out: out)
        monkeypatch.setattr(progress, "SHORT", short)
        with progress.steps_of("m / t / a", alone=True) as steps:
            for _ in steps(3, "layer"):
                time.sleep(0.15)
            time.sleep(0.15)
            for done in (5, 10):
                steps.draws(done, 1000)
                time.sleep(0.15)
        for stage in ("layer 2 of 3, then claims and nulls", "null draw 10 of at most 1,000", "m / t / a:"):
            assert (stage in out.file.getvalue()) is shown


def test_a_bar_is_gone_when_the_cell_fails(monkeypatch) -> None:
    import io
    import threading

    from rich.console import Console

    out = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(terminal, "progress_console", lambda: out)
    monkeypatch.setattr(progress, "SHORT", 0.0)
    before = threading.active_count()
    with pytest.raises(MemoryError), progress.steps_of("m", alone=True) as steps:
        for _ in steps(3, "layer"):
            time.sleep(0.1)
            raise MemoryError
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


PLANNED = {
    "a": ("prompts", 10.0),
    "b": ("further runs", 20.0),
    "c": ("replaced heads", None),
    "d": ("further runs", 5.0),
}


def test_the_time_left_counts_later_parts_by_what_parts_of_their_kind_took(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: now[0])
    found = estimate.Estimate()
    found.plan(PLANNED)
    found.begin("a")
    assert found.left(0, 2) == (None, []) and found.number("a") == "part 1/6: "
    now[0] = 100.0  # half of the prompts: of no other part is anything known
    assert found.left(1, 2) == (100.0, ["further runs", "replaced heads", "layers", "nulls"])
    found.finish()
    found.begin("b")
    now[0] = 110.0  # a quarter of it: 2 s for a unit
    assert found.left(1, 4) == (30.0 + 5 * 2, ["replaced heads", "layers", "nulls"])
    now[0] = 140.0
    found.finish()
    found.plan({"c": ("replaced heads", 6.0)})
    assert list(found.parts) == list(PLANNED) and found.number("c") == "part 3/6: "
    found.begin("c")
    assert found.left(0, 3) == (6 * 2 + 5 * 2, ["layers", "nulls"])  # no head was replaced yet: as the further runs
    now[0] = 150.0
    assert found.left(1, 3) == (20.0 + 5 * 2, ["layers", "nulls"])
    assert (found.number("layer"), found.number("null draw")) == ("part 5/6: ", "part 6/6: ")
    assert estimate.Estimate().number("layer") == "" and found.number("words in batch") == ""


def test_a_line_says_which_part_of_how_many_and_what_the_time_left_leaves_out(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    with progress.steps_of("m", alone=False) as steps:
        steps.plan(PLANNED)
        for what in ("a", "b", "layer"):
            assert len(list(steps(2, what))) == 2
    assert capsys.readouterr().err.splitlines() == [
        "m: part 1/6: a 1 of 2 in 0 s, about 0 s left without further runs, replaced heads, layers and nulls",
        "m: part 2/6: b 1 of 2 in 0 s, about 0 s left without replaced heads, layers and nulls",
        "m: part 5/6: layer 1 of 2 in 0 s, about 0 s left, then claims and nulls",
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_a_bar_of_a_planned_part_cuts_no_number(monkeypatch, width) -> None:
    import io

    from rich.console import Console

    out = Console(file=io.StringIO(), force_terminal=True, width=width)
    monkeypatch.setattr(terminal, "progress_console", lambda: out)
    monkeypatch.setattr(progress, "SHORT", 0.0)
    parts = {f"{k}": ("further runs", 1.0) for k in range(8)} | {"untrained control in batch": ("b", 1e5)}
    with progress.steps_of("smollm2-135m-instruct / ioi / full", alone=True) as steps:
        steps.plan(parts)
        for _ in steps(2, "0"):
            time.sleep(0.05)
        for _ in steps(33, "untrained control in batch"):
            time.sleep(0.03)
    shown = re.findall(r"part 9/11: ([^\r]*)", out.file.getvalue())
    assert len(shown) > 3 and all(re.match(r"untrained control in batch \d+ of 33 ", frame) for frame in shown)
    assert all({60: "+", 80: " + more"}.get(width, " + layers, nulls") in frame for frame in shown)


def test_every_part_of_a_cell_that_runs_its_model_is_planned_before_it_begins_and_in_order() -> None:
    """What is counted off is what was planned, but for a part without a replacement, which is passed over."""
    from ovqk.cell import runner_of

    cell = compose("model=mini-attn", "task=ioi", "analysis=activations", "activations.prompts=48")
    checkpoint = open_checkpoint(cell.model)
    tokenizer = load_tokenizer(checkpoint)
    opened = OpenedModel(open_weights(checkpoint, cell.model), checkpoint.label, tokenizer)
    planned, counted = dict[str, tuple[str, float | None]](), list[str]()

    def steps(count: int, what: str) -> range:
        if what != "layer":
            assert planned[what][1] is not None and planned[what][1] > 0, what
            counted.append(what)
        return range(count)

    analyse(opened, cell, steps, runner=runner_of(checkpoint, cell, tokenizer), plan=planned.update)
    places = [list(planned).index(what) for what in counted]
    assert places == sorted(set(places)) and len(counted) > 6
    assert all(planned[what][1] == 0 for what in set(planned) - set(counted))


@pytest.mark.parametrize("alone", [True, False])
def test_a_long_cell_writes_lines_where_there_is_no_terminal(monkeypatch, capsys, alone) -> None:
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    with progress.steps_of("m / t / a", alone) as steps:
        assert list(steps(3, "layer")) == [0, 1, 2]
        steps.draws(600, 1000)
        steps.draws(900, 1000)
    then = ", then claims and nulls\n"
    assert capsys.readouterr().err == (
        f"m / t / a: layer 1 of 3 in 0 s, about 0 s left{then}m / t / a: layer 2 of 3 in 0 s, about 0 s left{then}"
        "m / t / a: null draw 900 of at most 1,000 in 0 s, at most 0 s left\n"
    )


@pytest.mark.parametrize("claimed", [True, False])
def test_every_draw_of_the_nulls_is_counted_and_no_more_than_there_may_be(claimed) -> None:
    """With claims, and with candidates."""
    cell = compose("model=mini-attn", "task=ioi", "nulls.draws=99", *["model.claims=null"] * (not claimed))
    checkpoint = open_checkpoint(cell.model)
    opened = OpenedModel(open_weights(checkpoint, cell.model), checkpoint.label, load_tokenizer(checkpoint))
    told: list[tuple[int, int]] = []
    found = analyse(opened, cell, draws=lambda done, most: told.append((done, most)))
    assert ("verdicts" in found.tables) == claimed
    done, most = zip(*told, strict=True)
    assert len(set(most)) == 1 and most[0] % 99 == 0 and list(done) == sorted(done) and 99 <= done[-1] <= most[0]
