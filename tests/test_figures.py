"""Figures of models side by side show the numbers of their tables; texts and files are the same each time."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Rectangle
from support.drawn import direction_table, head_table, pair, verdict_table
from support.reported import STORABLE

from ovqk.figures import circuits, colours, comparisons, depth, drawing, portraits
from ovqk.figures.colours import VERDICT_COLOURS, Scale, colour_at
from ovqk.figures.drawing import legible
from ovqk.records.comparison import could_be_corroborated

# --- models beside each other --------------------------------------------------------------------------------


def test_verdict_counts_are_bars_as_wide_as_their_shares() -> None:
    figure = comparisons.verdict_counts(verdict_table())
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["t1", "t2"]
    bars = [patch for patch in first.patches if isinstance(patch, Rectangle)]
    assert [bar.get_width() for bar in bars] == pytest.approx([2 / 3, 1 / 3])
    assert to_hex(bars[0].get_facecolor()) == VERDICT_COLOURS["partial"][0]
    assert [text.get_text() for text in first.texts] == ["2", "1", "none of 1 can be corroborated alone"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in second.texts] == ["1", "no verdicts"]


def test_heads_that_no_null_could_decide_about_are_told_and_not_counted() -> None:
    table = verdict_table().assign(min_q=0.01)
    heads = table["kind"] == "head"
    table.loc[heads & (table["verdict"] == "partial"), "min_q"] = 0.05
    could = could_be_corroborated(table)
    assert not could[heads & table["verdict"].isin(["partial", "untestable"])].any()
    assert could[table["verdict"] == "corroborated"].all()
    assert could_be_corroborated(table.assign(verdict="corroborated", min_q=0.5)).all()
    table.loc[heads & (table["verdict"] == "contradicted"), "nulls"] = "spectrum"  # which alone corroborates nothing
    assert not could_be_corroborated(table)[heads & (table["verdict"] == "contradicted")].any()
    table = table.drop(columns="nulls")
    first = comparisons.verdict_counts(table).axes[0]
    assert "2 more cannot be corroborated alone" in [text.get_text() for text in first.texts]


def test_ranks_of_models_with_other_heads_are_compared_as_shares() -> None:
    wide, narrow = head_table("a"), head_table("b", seed=1)
    both = pd.concat([wide.assign(ov_effective_rank=32.0), narrow.assign(ov_effective_rank=8.0)], ignore_index=True)
    (axes, *_) = depth.depth_curves(both, ["ov_effective_rank"], {"a": 64, "b": 16}).axes
    assert axes.get_title(loc="left") == "OV effective rank / d_head" and axes.get_ylim() == (0, 1)
    assert {y for line in axes.lines for y in line.get_ydata()} == {0.5}
    (axes, *_) = depth.depth_curves(both, ["ov_effective_rank"], {"a": 64, "b": 64}).axes
    assert {y for line in axes.lines for y in line.get_ydata()} == {32.0, 8.0}
    (axes, *_) = depth.depth_curves(both, ["ov_effective_rank"], {"a": 64}).axes  # of the other nothing is known
    assert axes.get_title(loc="left") == "OV effective rank"


def test_effects_are_marks_with_intervals_and_what_is_missing_says_so() -> None:
    (axes,) = comparisons.effects(verdict_table()).axes
    marks = [
        tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in "oX_." and len(line.get_xdata()) == 1
    ]
    assert marks == [(0.75, 0), (1.0, 2)]  # by task; nothing is drawn for b, which has no value
    (interval,) = [
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    ]
    assert list(interval.get_xdata()) == [0.6, 0.9] and list(interval.get_ydata()) == [0, 0]
    said = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert said[" unavailable"] == 1 and "corroborated, q 0.01" in said
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "t1 · a · name mover",
        "t1 · b · name mover",
        "t2 · a · induction",
    ]
    assert axes.get_xlabel() == "AUC within layer (0.5 is chance)"
    assert 0.5 in [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]


def test_depth_curves_run_through_the_means_of_the_layers() -> None:
    deep, shallow = head_table("deep", n_layers=5), head_table("shallow", n_layers=2, seed=1)
    figure = depth.depth_curves(pd.concat([deep, shallow], ignore_index=True))
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in shown] == ["OV copying", "QK symmetry", "QK positional share"]
    assert {axes.get_xlabel() for axes in shown} == {"relative depth"}  # of a column the lowest alone is labelled
    lines = [line for line in shown[0].lines if line.get_marker() == "o"]
    assert list(lines[0].get_xdata()) == [0, 0.25, 0.5, 0.75, 1] and list(lines[1].get_xdata()) == [0, 1]
    assert list(lines[0].get_ydata()) == pytest.approx(deep.groupby("layer")["ov_copying"].mean().tolist())
    assert sum(len(points.get_offsets()) for points in shown[0].collections) == 5 * 4 + 2 * 4
    assert shown[0].get_ylim() == (-1, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["deep", "shallow"]


def test_a_model_is_drawn_once_whatever_was_asked_of_it() -> None:
    twice = pd.concat([head_table(), head_table().assign(cell_id="other task")], ignore_index=True)
    (axes, *_) = depth.depth_curves(twice, ["ov_copying"]).axes
    assert len(axes.collections[0].get_offsets()) == 12


def test_an_atlas_colours_every_head_and_marks_the_claimed_ones() -> None:
    heads = head_table()
    heads.loc[5, "ov_copying"] = math.nan
    verdicts = verdict_table().query("model == 'a' and task == 't1'")
    figure = comparisons.atlas(pd.concat([heads, head_table("b").assign(ov_copying=math.nan)]), "ov_copying", verdicts)
    axes = figure.axes[0]
    squares = [patch for patch in axes.patches if patch.get_width() == pytest.approx(0.94)]
    scale = Scale.of("ov_copying", heads["ov_copying"])
    wanted = [
        colours.MISSING if math.isnan(value) else colour_at(scale.position(value), colours.DIVERGING)
        for value in heads["ov_copying"]
    ]
    assert [to_hex(square.get_facecolor()) for square in squares] == wanted
    rings = [patch for patch in axes.patches if patch.get_width() == pytest.approx(0.78)]
    assert [(round(ring.get_x() + 0.39), round(ring.get_y() + 0.39)) for ring in rings] == [(1, 0), (2, 1), (3, 1)]
    assert [text.get_text() for text in axes.texts] == ["NM"] * 3
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert axes.get_ylim() == (2.5, -0.5)  # layer 0 is on top
    assert "unavailable: b" in figure.get_supxlabel() and "NM  name mover" in figure.get_supxlabel()
    bar = figure.axes[-1]
    ends = [label.get_text() for label in bar.get_xticklabels()]
    assert bar.get_xlabel() == "OV copying" and ends == ["\N{MINUS SIGN}1", "0", "1"]


@pytest.mark.parametrize("n_heads", [4, 8, 12])
def test_the_letters_of_a_marked_head_stay_inside_its_ring(n_heads) -> None:
    verdicts = verdict_table().query("model == 'a' and kind == 'head'").assign(layer=1, head=2)
    verdicts = verdicts.assign(role=[f"backup_name_mover_{k}" for k in range(len(verdicts))]).head(2)
    figure = comparisons.atlas(head_table(n_heads=n_heads), "ov_copying", verdicts)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (ring,) = [patch for patch in axes.patches if patch.get_width() == pytest.approx(0.78)]
    (text,) = axes.texts
    assert len(text.get_text().split("\n")) == 2
    inside, letters = ring.get_window_extent(), text.get_window_extent()
    assert inside.x0 <= letters.x0 and letters.x1 <= inside.x1
    assert inside.y0 <= letters.y0 and letters.y1 <= inside.y1


def test_a_legend_of_many_roles_is_no_wider_than_its_atlas() -> None:
    assert comparisons.wrapped_lines(["aa", "bb", "cc"], 8) == ["aa    bb", "cc"]
    assert comparisons.wrapped_lines([], 8) == [] and comparisons.wrapped_lines(["longer than that"], 8) == [
        "longer than that"
    ]


def test_a_circuit_joins_claimed_heads_above_random_and_no_others() -> None:
    verdicts = verdict_table().query("model == 'a'")
    pairs = pd.DataFrame(
        [
            pair("k", (0, 1), (1, 0), 0.2, 0.1),
            pair("q", (0, 1), (1, 2), 0.15, 0.05),
            pair("v", (0, 1), (1, 3), 0.05, -0.05),  # below random
            pair("q", (0, 3), (1, 2), 0.9, 0.8),  # 0.3 is not claimed
            pair("k", (0, 1), (1, 0), 0.2, 0.1),  # again, from another cell
        ]
    )
    (axes,) = circuits.circuit(verdicts, pairs).axes
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert [to_hex(arrow.get_edgecolor()) for arrow in arrows] == [colours.MODES["k"][0], colours.MODES["q"][0]]
    assert arrows[0].get_linewidth() > arrows[1].get_linewidth() and arrows[0].get_zorder() > arrows[1].get_zorder()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Q: into queries", "K: into keys"]
    said = [text.get_text() for text in axes.texts]
    assert {"0.1", "1.2", "1.3", "1.0", "name mover", "induction", "layer 0", "layer 1"} <= set(said)
    spots = {text.get_text(): text.get_position() for text in axes.texts}
    assert spots["0.1"][1] < spots["1.2"][1] == spots["1.0"][1]  # later layers above
    assert spots["name mover"][0] == pytest.approx((spots["1.2"][0] + spots["1.3"][0]) / 2)
    assert not [p for p in circuits.circuit(verdicts).axes[0].patches if isinstance(p, FancyArrowPatch)]


def test_a_head_of_two_roles_is_drawn_once_under_the_smaller() -> None:
    verdicts = verdict_table().query("model == 'a'")
    also = verdicts[(verdicts["kind"] == "head") & (verdicts["head"] == 0)].assign(layer=0, head=1)
    (axes,) = circuits.circuit(pd.concat([verdicts, also], ignore_index=True)).axes
    said = [text.get_text() for text in axes.texts]
    assert said.count("0.1") == 1 and {"also NM", "name mover (NM)", "induction"} <= set(said)


def test_an_arrow_passes_no_head_and_runs_beside_another_of_its_heads() -> None:
    start, end, between = (0.0, 0.0), (4.0, 3.0), (2.0, 1.5)
    assert circuits.clear_bend(start, end, 0.0, [], []) == 0
    bend = circuits.clear_bend(start, end, 0.0, [between], [])
    assert 0.1 < abs(bend) < 0.4
    other = circuits.clear_bend(start, end, 0.0, [between], [bend])
    assert abs(other - bend) > 0.06
    assert circuits.clear_bend(start, end, 0.0, [(0.0, 3.0)], []) == 0  # a head that is not in the way


# --- texts and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, len(STORABLE), 4))
def test_hostile_tokens_are_text_in_every_file(tmp_path, start) -> None:
    """Saving raises on a missing glyph or on broken mathematics (warnings are errors), and the SVG is well formed."""
    figure = portraits.components({"directions": direction_table(STORABLE[start : start + 4])}, 0, 0)
    svg, png = comparisons.save(figure, tmp_path / "hostile")
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    assert not [node for node in root.iter() if node.tag.endswith(("script", "image", "foreignObject"))]
    assert png.stat().st_size > 1000


def test_texts_are_shown_without_mathematics_and_without_turning() -> None:
    assert legible("a$b$") == r"a\$b\$"
    assert legible("\u202ex\x00\n") == r"\u{202e}x\u{0}\u{a}"
    assert legible("\u6f22") == r"\u{6f22}"  # DejaVu Sans has no picture for it
    assert legible("Ελλάς ü") == "Ελλάς ü"
    assert legible("x" * 50, most=10) == "x" * 9 + "…"


def test_the_same_figure_gives_the_same_bytes(tmp_path) -> None:
    written = [comparisons.save(comparisons.effects(verdict_table()), tmp_path / name) for name in ("one", "two")]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    figure = comparisons.effects(verdict_table())
    assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].title.get_fontsize() == drawing.STYLE["axes.titlesize"]


def test_figures_need_neither_pyplot_nor_wandb() -> None:
    code = "import sys, ovqk.report; print([m for m in ('matplotlib.pyplot', 'wandb', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
