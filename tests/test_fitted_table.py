"""Tables in every width: no number is cut, and what is left out is named."""

import io
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from support.prompted import make_prompted
from support.reported import make_results

from ovqk import wording
from ovqk.records.comparison import QUARTERS
from ovqk.records.results import load_table
from ovqk.report import sweep_tables, terminal
from ovqk.report.fitted_table import CORE, UNBROKEN, Column, FittedTable, wrapped
from ovqk.report.on_prompts import prompts_table
from ovqk.report.terminal_tables import reasons, verdict_table

WIDTHS = (60, 80, 100, 150, 200)


def printed(table: FittedTable, width: int) -> list[str]:
    out = Console(width=width, file=io.StringIO())
    out.print(table)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def claimed() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two roles of the widest names and verdicts, and the metrics that have a column."""
    metrics = ["ov_copying", "qk_matching", "qk_symmetry", "qk_position_share", "ov_alignment", "qk_key_alignment"]
    heads = pd.DataFrame([{"layer": 23, "head": n} | dict.fromkeys(metrics, -0.125 - n) for n in range(3)])
    plain = {"primary": "k_composed_matching", "prediction": "high", "value": 0.875, "flags": "", "reason": ""}
    rows = [plain | {"kind": "role", "role": "duplicate_token", "layer": None, "head": None, "verdict": "consistent",
                     "flags": "mixed", "percentile": None, "q": 0.014}]  # fmt: skip
    for n, q in enumerate((0.042, 0.014, 1.0)):
        rows.append(plain | {"kind": "head", "role": "duplicate_token", "layer": 23, "head": n, "percentile": 1.0,
                             "verdict": "contradicted", "flags": "spectrum", "q": q})  # fmt: skip
    return heads, pd.DataFrame(rows)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_verdicts_keeps_its_numbers_and_names_what_it_leaves_out(width) -> None:
    heads, verdicts = claimed()
    table = verdict_table(heads, verdicts)
    lines = printed(table, width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and "…" not in text
    for n, q in enumerate(("0.042", "0.014", "1.000")):
        (line,) = [line for line in lines if line.startswith(f"  23.{n}")]
        assert {"0.88", q} <= set(line.split()) and ("100%" in line.split()) == (width > 60)
    assert "k_composed_matching ↑" in text and "contradicted" in text and "(mixed)" in text
    shown = table.titles(width)
    gone = [column.title for column in table.columns if column.title not in shown]
    assert {"primary", "q", "verdict"} <= set(shown) and ("percentile" in shown) == (width > 60)
    assert (not gone) == (width >= 150)
    if gone:
        said = " ".join(text[text.index("Left out in") :].split())
        assert said == f"Left out in {width} columns: {', '.join(gone)} (see heads.parquet)."
    legend = " ".join(reasons(heads, verdicts, shown))
    assert ("OV align" in legend) == ("OV align" in shown)


def test_less_important_columns_leave_first_and_one_that_tells_nothing_apart_before_them() -> None:
    columns = [
        Column("task", None, text=True, place=True), Column("role", None, text=True),
        Column("p", CORE), Column("depth", 1), Column("heads", 2),
    ]  # fmt: skip
    table = FittedTable(columns)
    for p in ("0.014", "0.042"):
        table.add_row("induction", "previous token", p, "0.25", "4")
    assert table.titles(60) == ["task", "role", "p", "depth", "heads"]
    narrower = printed(table, 38)
    assert narrower[0].split() == ["role", "p", "depth", "heads"]
    assert narrower[-1] == "In all rows: task induction."
    assert table.titles(29) == ["role", "p", "heads"] and "depth" in printed(table, 29)[-1]
    assert table.titles(16) == ["role", "p"] and "previous" in printed(table, 16)[1]


def test_an_empty_column_is_not_missed() -> None:
    table = FittedTable([Column("name", None, text=True), Column("nothing", 0)])
    table.add_row("a" * 18, "")
    assert len(printed(table, 20)) == 2


def test_an_empty_column_leaves_before_any_that_has_values() -> None:
    table = FittedTable([Column("head", None), Column("write", 9), Column("control", 1)])
    table.add_row("3.0", "", "0.25")
    table.add_row("3.1", "", "0.50")
    assert table.titles(40) == ["head", "write", "control"]  # with room for it, it says that there is nothing
    assert table.titles(15) == ["head", "control"] and "write" not in " ".join(printed(table, 15))


def test_a_text_is_broken_at_spaces_but_not_between_a_metric_and_its_arrow() -> None:
    text = Text("previous token: ").append(f"k_composition{UNBROKEN}↑", style="dim")
    lines = wrapped(text, 20)
    assert lines.plain == "previous token:\nk_composition ↑"
    assert [lines.plain[span.start : span.end] for span in lines.spans] == ["k_composition ↑"]
    assert wrapped(Text("  3.0 (measured)"), 10).plain == "  3.0\n(measured)"
    assert wrapped(Text("abcdefgh ij"), 4).plain == "abcd\nefgh\nij"


CELLS = st.lists(
    st.tuples(
        st.text("ab ", min_size=1, max_size=30),
        st.floats(-9999, 9999).map("{:.3f}".format),
        st.sampled_from(["100%", "0%", ""]),
        st.text("xyz", max_size=12),
    ),
    min_size=1,
    max_size=4,
)


@given(CELLS, st.integers(30, 120))
def test_no_width_cuts_a_number_and_nothing_is_lost_in_silence(rows, width) -> None:
    columns = [Column("name of it", None, text=True), Column("a number", CORE), Column("share", 5),
               Column("words", 3, text=True, wraps_at=6)]  # fmt: skip
    table = FittedTable(columns)
    for row in rows:
        table.add_row(*row)
    lines = printed(table, width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(lines)
    for at, column in enumerate(columns):
        if column.title in table.titles(width):
            for row in rows:
                assert column.text or not row[at] or re.search(rf"(?:^|\s){re.escape(row[at])}(?:\s|$)", text)
        else:
            assert column.title in text or not any(row[at] for row in rows)


def test_without_a_terminal_a_table_is_as_wide_as_columns_say_and_colours_change_nothing(monkeypatch) -> None:
    for name in ("COLUMNS", "JPY_PARENT_PID", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert terminal.output_console().width == terminal.LOG_WIDTH
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert terminal.output_console().width == terminal.LOG_WIDTH and terminal.output_console().is_terminal
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert terminal.output_console().width == terminal.NOTEBOOK_WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal.output_console().width == 72


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> Path:
    (plain,) = (make_results(tmp_path_factory) / "mini-attn" / "induction").glob("b03-*")
    return make_prompted(plain, tmp_path_factory.mktemp("fitted") / "results")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_a_cell_on_prompts_and_of_its_sweep_fit_every_width(width, prompted) -> None:
    heads, verdicts, roles, joint = (load_table(prompted, name) for name in ("heads", "verdicts", "roles", "joint"))
    tables = [
        verdict_table(heads, verdicts), prompts_table(joint, roles), sweep_tables.role_table([prompted]),
        sweep_tables.depth_table([prompted]),
    ]  # fmt: skip
    verdict, on_prompts, by_role, by_depth = ("\n".join(printed(table, width)) for table in tables)
    for text in (verdict, on_prompts, by_role, by_depth):
        assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert all(f"{round(100 * effect)}%" in on_prompts.split() for effect in roles["effect"])  # no -0%
    for p in verdicts[verdicts["kind"] == "role"]["p"].dropna():
        assert f"{p:.3f}" in by_role.split()
    assert all(word in on_prompts for title in wording.PROMPT_COLUMNS.values() for word in title.split())
    assert all(quarter.split()[0] in by_depth for quarter in QUARTERS)


def test_verdicts_come_after_lists_of_tokens_and_notes(prompted, capsys) -> None:
    terminal.print_cell(prompted, cached=False)
    cell = capsys.readouterr().out
    order = [cell.index(part) for part in ("Leading component", "note:", "Found:", "role / head", "record:")]
    assert order == sorted(order)


def test_the_eigenvalues_beside_copying_are_those_that_it_sums(prompted, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    terminal.print_cell(prompted, cached=False)
    text = capsys.readouterr().out
    spectra, heads = (load_table(prompted, name) for name in ("spectra", "heads"))
    of_head = spectra.query("layer == 3 and head == 4 and circuit == 'ov' and space == 'vocab' and kind == 'eigen'")
    copying = of_head["re"].sum() / (of_head["re"] ** 2 + of_head["im"] ** 2).pow(0.5).sum()
    assert heads.set_index(["layer", "head"]).at[(3, 4), "ov_copying"] == pytest.approx(copying)
    leading = of_head.sort_values("index").iloc[0]["re"]
    assert f"3.4  OV copying {copying:.2f}: eigenvalues over the vocabulary {leading:.3g}, " in text
    assert "lambda" not in text and "suppresses" not in text
