"""What heads do on prompts as the page, the figures, the terminal and W&B show it."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from support.prompted import HEADS, make_prompted
from support.reported import make_results, page_data

from ovqk import wording
from ovqk.figures import colours, portraits, prompts
from ovqk.figures.choice import cell_figures
from ovqk.records import comparison, on_prompts
from ovqk.records.cells import Cell, read_cells
from ovqk.records.record import read_record
from ovqk.records.results import load_table
from ovqk.report import sweep_tables, terminal
from ovqk.report.on_prompts import attending_lines, effects_lines, prompts_table, role_reasons
from ovqk.report.page import make_page
from ovqk.report.prompts_data import prompt_data
from ovqk.report.thinning import DETAILS, Pool
from ovqk.tracking.cell_panels import read_panels
from ovqk.tracking.sweep_panels import Sweep, overview_tables


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A cell that did not run its model."""
    (folder,) = (make_results(tmp_path_factory) / "mini-attn" / "induction").glob("b03-*")
    return folder


@pytest.fixture(scope="module")
def results(plain, tmp_path_factory) -> Path:
    """Such a cell with what heads do on prompts."""
    results = tmp_path_factory.mktemp("prompted") / "results"
    make_prompted(plain, results)
    return results


@pytest.fixture(scope="module")
def cell(results) -> Cell:
    (cell,) = read_cells(results)[0]
    return cell


def panel_dots(axes) -> int:
    return sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() in set(colours.FOUND_MARKERS.values()))


# --- words -------------------------------------------------------------------------------------------------------


def test_words_marks_and_colours_are_of_the_same_verdicts() -> None:
    assert tuple(colours.ON_PROMPTS) == tuple(wording.ON_PROMPTS)
    assert set(colours.ON_PROMPTS.values()) <= set(colours.VERDICT_COLOURS)
    assert tuple(colours.FOUND) == tuple(wording.FOUND) == tuple(colours.FOUND_MARKERS)
    assert (
        wording.counts({"partial": 1, "realised": 3, "opposite": 0}, wording.ON_PROMPTS)
        == "3 realised, 1 partly realised"
    )


# --- records -----------------------------------------------------------------------------------------------------


def test_every_head_stands_in_one_group_of_its_reading(cell) -> None:
    groups = on_prompts.readings(cell.tables["joint"])
    assert [group["reading"] for group in groups if group["reading"] != "undecided"] == [
        name for name in wording.READINGS if name != "undecided"
    ]
    heads = [(role, head) for group in groups for role, heads in group["roles"].items() for head in heads]
    assert sorted(heads) == sorted((role, f"{layer}.{head}") for role, layer, head, *_ in HEADS)
    (linked,) = [group for group in groups if group["reading"] == "linked"]
    assert linked == {
        "reading": "linked",
        "weights": "corroborated",
        "prompts": "realised",
        "roles": {"induction": ["3.0"]},
    }


def test_a_ranking_holds_the_metric_and_the_quantity_of_every_head(cell) -> None:
    induction, previous = on_prompts.rankings(cell.record, cell.tables)
    heads, done = cell.tables["heads"], cell.tables["activations"]
    assert induction.points["weights"].tolist() == heads["ov_copying"].tolist()
    testing = done[(done["role"] == "induction") & (done["half"] == "testing")]
    assert induction.points["prompts"].tolist() == testing["write"].tolist()
    assert induction.titles == ["OV copying ↑"] and induction.quantity == "write onto ANSWER minus FOIL (logits)"
    assert induction.says == ["AUC 0.91 (0.80 to 1.00)", "Spearman \N{MINUS SIGN}0.25, split-half 0.90"]
    testing = done[(done["role"] == "previous_token") & (done["half"] == "testing")]
    wanted = (testing["attention"] - testing["attention_control"]).to_numpy()
    assert np.array_equal(previous.points["prompts"], wanted) and previous.says[0] == "no AUC: no head is measured"
    joint = cell.tables["joint"].assign(auc_in_layers=0.75)
    assert on_prompts.rankings(cell.record, cell.tables | {"joint": joint})[0].says[0].endswith("1.00), 0.75 in layers")
    assert induction.points["found"].value_counts().to_dict() == {"neither": 27, "both": 2, "claimed": 2, "measured": 1}


def test_what_lowers_the_difference_is_shown_in_its_own_sign(cell) -> None:
    record = cell.record | {"provenance": {"config": {"task": {"roles": {"induction": {
        "predictions": [{"metric": "ov_copying", "direction": "low", "first_layer": "qk_matching"}],
        "activations": {"write": {"answer": "ANSWER", "other": "FOIL", "sign": -1}, "decides": ["write"]},
    }}}}}}  # fmt: skip
    joint = cell.tables["joint"]
    tables = cell.tables | {"joint": joint[joint["role"] == "induction"]}
    (turned,) = on_prompts.rankings(record, tables)
    (plain, _) = on_prompts.rankings(cell.record, cell.tables)
    assert turned.points["prompts"].tolist() == (-plain.points["prompts"]).tolist()
    assert turned.quantity == "write onto FOIL minus ANSWER (logits)"
    heads = cell.tables["heads"]
    first = heads["layer"] == 0
    assert turned.points["weights"].tolist() == heads["qk_matching"].where(first, heads["ov_copying"]).tolist()
    assert turned.titles == ["OV copying ↓", "(layer 0: QK matching)"]


def test_no_claimed_or_chosen_head_is_no_matter(cell) -> None:
    joint = cell.tables["joint"].query("kind == 'role'").dropna(axis=1, how="all")
    assert on_prompts.readings(joint) == [] and on_prompts.readings(pd.DataFrame()) == []
    ranked = on_prompts.rankings(cell.record, cell.tables | {"joint": joint})
    assert {found for each in ranked for found in each.points["found"]} == {"neither"}
    assert len(on_prompts.head_table(joint, pd.DataFrame())) == 0


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_holds_the_readings_the_heads_and_what_they_do(results, cell) -> None:
    data = page_data(make_page(*read_cells(results), results).html)
    (shown,) = data["cells"]
    found = shown["on_prompts"]
    assert "answer beats the foil in 95%" in found["lines"][0] and "4.25 logits" in found["lines"][0]
    assert found["lines"][1] == "3 prompts left out: 3 with an answer of two tokens."
    assert found["readings"] == on_prompts.readings(cell.tables["joint"])
    assert [ranking["role"] for ranking in found["rankings"]] == ["induction", "previous_token"]
    pool = data["pool"]
    assert len(pool[found["rankings"][0]["x"]]) == 32 and pool[found["rankings"][0]["head"]][:3] == [0, 1, 2]
    heads = shown["prompt_heads"]
    assert heads["rows"] == len(HEADS) and pool[heads["measured"]].count(True) == 3
    assert wording.CHOSEN in heads["found"]["texts"] and "no effect" in heads["reason"]["texts"]
    values = shown["prompt_values"]
    assert values["rows"] == 64 and {"attention", "attention_se", "write_from_source", "effect_restored"} <= set(values)
    kinds = [picture["kind"] for picture in found["pictures"]["induction"]]
    assert kinds == ["attention", "write", "effect"] and all(p["decides"] for p in found["pictures"]["induction"])
    assert found["pictures"]["previous_token"][-1]["title"] == "Effect on induction heads' attention (share)"
    assert data["wording"]["readings"] == wording.READINGS


def test_a_page_of_little_detail_keeps_the_chosen_heads(cell) -> None:
    pool = Pool()
    values = prompt_data(cell, DETAILS[-1], cell.marked(), pool)["prompt_values"]
    layers, heads = pool.items[values["layer"]], pool.items[values["head"]]
    assert {(layer, head) for _, layer, head, *_ in HEADS} <= set(zip(layers, heads, strict=True))
    assert values["rows"] < 64


def test_a_cell_that_did_not_run_its_model_is_shown_as_before(plain) -> None:
    cells = read_cells(plain.parents[2])[0]
    own = [cell for cell in cells if cell.folder == plain]
    data = page_data(make_page(own, [], plain.parents[2]).html)
    assert not {"on_prompts", "prompt_heads", "prompt_values"} & set(data["cells"][0])
    assert not {"readings", "on_prompts"} & set(data["wording"]) and "on_prompts" not in data["palette"]
    assert "on_prompts" not in comparison.roles([plain])
    assert "on prompts" not in [column.title for column in sweep_tables.role_table([plain]).columns]
    assert "prompts" not in overview_tables(Sweep("one", plain, [plain]))


def test_why_a_model_was_not_run_is_all_that_is_said(cell) -> None:
    kept = {name: table for name, table in cell.tables.items() if name not in ("activations", "roles", "joint")}
    refused = Cell(cell.folder, cell.record | {"activations": {"untestable": "no tokenizer"}}, kept)
    found = prompt_data(refused, DETAILS[0], set(), Pool())
    assert found["on_prompts"]["lines"] == ["Not run on prompts: no tokenizer"] and list(found) == ["on_prompts"]
    assert found["on_prompts"]["readings"] == found["on_prompts"]["rankings"] == []
    make_page([refused], [], cell.folder)


# --- the figure --------------------------------------------------------------------------------------------------


def test_a_panel_for_each_role_names_claimed_and_measured_heads(cell, tmp_path) -> None:
    figure = prompts.rankings(on_prompts.rankings(cell.record, cell.tables), "mini-attn / induction")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["induction", "previous token"]
    for axes, role in zip(figure.axes, ("induction", "previous_token"), strict=True):
        assert panel_dots(axes) == 32
        names = {text.get_text() for text in axes.texts}
        found = {
            f"{layer}.{head}"
            for of, layer, head, claimed, measured, *_ in HEADS
            if of == role and (claimed or measured)
        }
        assert found <= names and "0.1" not in names  # chosen only
    assert figure.axes[0].get_xlabel() == "OV copying ↑"
    said = "\n".join(text.get_text() for text in figure.axes[0].texts)
    assert "AUC 0.91 (0.80 to 1.00)" in said and "split-half 0.90" in said
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(wording.FOUND.values())


def test_names_keep_apart_and_heads_without_a_number_are_not_drawn(cell) -> None:
    (ranking, _) = on_prompts.rankings(cell.record, cell.tables)
    ranking.points.loc[:7, "weights"] = math.nan
    marked = ranking.points.index >= 20
    ranking.points.loc[marked, "found"] = "both"
    figure = prompts.rankings([ranking])
    assert panel_dots(figure.axes[0]) == 24
    figure.draw_without_rendering()
    boxes = [
        text.get_window_extent()
        for text in figure.axes[0].texts
        if "." in text.get_text() and "\n" not in text.get_text()
    ]
    assert len(boxes) == 12
    overlaps = sum(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    assert overlaps == 0
    ranking.points["prompts"] = math.nan
    empty = prompts.rankings([ranking])
    assert "unavailable" in [text.get_text() for text in empty.axes[0].texts]


def test_the_report_draws_it_for_cells_that_ran_their_model(cell, plain) -> None:
    name, _ = next(cell_figures([cell]))
    assert name == "prompts_mini-attn_induction"
    others = [other for other in read_cells(plain.parents[2])[0] if other.folder == plain]
    assert not [name for name, _ in cell_figures(others) if name.startswith("prompts")]


# --- the terminal and W&B ----------------------------------------------------------------------------------------


def test_a_sweep_counts_what_claimed_heads_do(results, plain) -> None:
    (folder,) = results.glob("*/*/*")
    table = comparison.roles([folder, plain])
    rows = {(row["analysis"], row["role"]): row["on_prompts"] for row in table.to_dict("records")}
    assert rows["b03", "induction"] == {} and rows["full", "induction"] == {"realised": 3, "not_realised": 1}
    out = terminal.output_console()
    with out.capture() as capture:
        out.print(sweep_tables.role_table([folder, plain]))
    text = capture.get()
    assert "on prompts" in text and "3 realised" in text and "ov_copying" in text
    assert max(map(len, text.splitlines())) <= terminal.LOG_WIDTH


def test_runs_hold_the_tables_and_a_sweep_how_well_tasks_are_done(results) -> None:
    (folder,) = results.glob("*/*/*")
    panels = read_panels(folder, read_record(folder))
    assert len(panels.tables["roles"]) == len(HEADS) and len(panels.tables["joint"]) == len(HEADS) + 2
    assert panels.scalars["prompts/accuracy"] == 0.9508
    tables = overview_tables(Sweep("all", folder, [folder]))
    (row,) = tables["prompts"].to_dict("records")
    assert (row["model"], row["task"], row["accuracy"], row["logit_difference"]) == (
        "mini-attn",
        "induction",
        0.9508,
        4.25,
    )
    roles = load_table(folder, "roles")
    assert row["measured_heads"] == roles["measured"].sum() == 3
    assert "3 realised, 1 not realised" in tables["roles"]["on_prompts"].tolist()


# --- roles in the terminal ---------------------------------------------------------------------------------------


def test_a_roles_row_has_the_effect_of_its_heads_together_and_it_says_if_other_heads_do_as_much(cell) -> None:
    roles, joint = cell.tables["roles"], cell.tables["joint"].copy()
    of_role = joint["kind"] == "role"
    for name, value in {"effect_together": 0.625, "effect_together_mean_replacement": 0.375, "peers_p": 0.3}.items():
        joint.loc[of_role, name] = value
    joint.loc[of_role, "peers_min_p"] = np.where(joint["role"][of_role] == "induction", 0.01, 0.2)
    joint.loc[of_role, "activations"] = "partial"
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(prompts_table(joint, roles))
    row = next(line for line in console.file.getvalue().splitlines() if line.strip().startswith("induction"))
    assert "62%" in row and "38%" in row and "partly realised" in row
    assert list(role_reasons(joint)) == ["induction: its heads together do not stand out of other heads (p = 0.30)"]
    assert list(role_reasons(cell.tables["joint"])) == []  # a cell of before


def test_heads_that_attend_and_write_too_little_are_named_with_the_reason(cell) -> None:
    """SmolLM2's 18.6 attends as induction heads do and writes 4 %: the role asks for 5 %, and it has no row."""
    heads = cell.tables["heads"][["layer", "head"]]
    quiet = {"attention": 0.1, "attention_p": 0.5, "write_share": 0.0, "effect": np.nan}
    rows = heads.assign(role="induction", half="testing", **quiet)
    shown = {
        (2, 2): (0.60, 0.01, -0.001, np.nan),
        (1, 1): (0.88, 0.01, 0.040, 0.19),
        (0, 5): (0.45, 0.01, 0.0, np.nan),  # looks elsewhere more
        (0, 6): (0.90, 0.06, 0.0, np.nan),  # no more than at the control
        (0, 7): (0.90, 0.01, 0.06, np.nan),  # writes enough
        (3, 0): (0.95, 0.01, 0.01, np.nan),  # has a row
    }
    for (layer, head), values in shown.items():
        rows.loc[(rows["layer"] == layer) & (rows["head"] == head), list(quiet)] = values
    activations = pd.concat([rows, rows.assign(half="choosing", attention=1.0, attention_p=0.0)], ignore_index=True)
    (line,) = attending_lines(cell.record, activations, cell.tables["roles"])
    assert line == (
        "Attend as induction heads do, but do not write directly what the role asks for, a share of 5%: "
        "1.1 (attention 0.88, write 4%, effect 19%), 2.2 (attention 0.60, write 0%)."
    )
    assert list(attending_lines(cell.record, cell.tables["activations"], cell.tables["roles"])) == []  # without p


def test_the_largest_effects_are_those_of_replaced_heads_whatever_their_role(cell) -> None:
    heads = cell.tables["heads"][["layer", "head"]]
    rows = heads.assign(role="induction", half="testing", effect=np.nan, effect_p=np.nan, effect_p_opposite=np.nan)
    effects = {(3, 0): (0.4, 0.01, 1.0), (2, 2): (-0.6, 1.0, 0.02), (1, 1): (0.9, 0.06, 0.95), (0, 5): (0.05, 0.03, 1)}
    for (layer, head), values in effects.items():
        at = (rows["layer"] == layer) & (rows["head"] == head)
        rows.loc[at, ["effect", "effect_p", "effect_p_opposite"]] = values
    other = rows.assign(role="previous_token", effect=9.0)  # on induction heads' attention
    choosing = rows.assign(half="choosing", effect=5.0)
    activations = pd.concat([choosing, other, rows], ignore_index=True)
    found = on_prompts.largest_effects(cell.record, activations, cell.tables["roles"])
    assert [(each.layer, each.head) for each in found["END"]] == [(2, 2), (3, 0), (0, 5)] and list(found) == ["END"]
    assert found["END"][1].roles == ["induction"]
    (line,) = effects_lines(cell.record, activations, cell.tables["roles"])
    assert line.endswith("with their roles: 2.2 -60%, 3.0 40% (induction), 0.5 5%.")
    assert list(effects_lines(cell.record, cell.tables["activations"], cell.tables["roles"])) == []  # without p


# --- a head's sheet ----------------------------------------------------------------------------------------------


def test_a_heads_sheet_shows_attention_write_and_effect_as_the_table_has_them(cell) -> None:
    figure = portraits.on_prompts(cell.tables, 3, 0, cell.record)
    values = cell.tables["activations"].query("half == 'testing' and role == 'induction' and layer == 3 and head == 0")
    columns = [column for kind in ("attention", "write", "effect") for column in wording.PROMPT_BARS[kind]]
    expected = values.iloc[0][columns].astype(float)
    drawn = [patch.get_width() for axes in figure.axes for patch in axes.patches]
    np.testing.assert_allclose(drawn, expected[np.isfinite(expected)])
    whiskers = [line.get_xdata() for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 2]
    spans = sorted(float(ends[1] - ends[0]) / 2 for ends in whiskers if ends[1] > ends[0])
    np.testing.assert_allclose(spans, [0.02, 0.03, 0.1])
    said = {text.get_text() for line in figure.subfigs for text in line.texts}
    assert said == {"induction, on prompts: realised"}


def test_without_claims_the_measured_heads_of_largest_effect_have_sheets(cell) -> None:
    roles = cell.tables["roles"].copy()
    measured = roles["measured"].astype(bool)
    roles.loc[measured, "effect"] = [0.1, -0.7, *[0.2] * (measured.sum() - 2)]
    best = roles[measured].iloc[1]
    bare = replace(
        cell, tables={name: table for name, table in cell.tables.items() if name != "verdicts"} | {"roles": roles}
    )
    names = [name for name, _ in cell_figures([bare])]
    place = f"{int(best['layer'])}.{int(best['head'])}"
    assert [name for name in names if name.startswith("head")] == [f"head_mini-attn_induction_{place}"]
    assert not [name for name in names if name.startswith("circuit")]


def test_a_sheet_has_these_rows_if_a_record_is_given_and_the_head_has_a_role(cell) -> None:
    def bands(head: int, record: object) -> int:
        return len(portraits.sheet(cell.tables, 3, head, record=record).subfigs)

    assert bands(0, cell.record) == bands(0, None) + 1
    assert bands(6, cell.record) == bands(6, None)
    (axes,) = portraits.on_prompts(cell.tables, 3, 6, cell.record).axes
    assert "neither claimed nor chosen" in axes.texts[0].get_text()
    assert len(portraits.on_prompts({}, 3, 0, cell.record).axes) == 1
