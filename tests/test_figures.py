"""Figures show the numbers of their tables: what is drawn, where, and what is said to be unavailable."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from support.reported import STORABLE

from ovqk.figures import circuits, colours, depth, drawing, models, portraits
from ovqk.figures.colours import VERDICT_COLOURS, Scale, colour_at
from ovqk.figures.drawing import legible
from ovqk.records.comparison import could_be_corroborated

BLUE = colours.CATEGORIES[0]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def dots(axes: Axes, marker: str = "o") -> list[tuple[float, float]]:
    return [
        tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == marker and len(line.get_xdata()) == 1
    ]


def verdict_table() -> pd.DataFrame:
    """Two models on two tasks; the second model has one role that is unavailable."""
    role = {
        "kind": "role",
        "layer": math.nan,
        "head": math.nan,
        "prediction": "high",
        "flags": "",
        "primary": "ov_copying",
    }
    roles = [
        ("a", "t1", "name_mover", "partial", 0.75, 0.6, 0.9, 0.04),
        ("a", "t2", "induction", "corroborated", 1.0, math.nan, math.nan, 0.01),
        ("b", "t1", "name_mover", "untestable", math.nan, math.nan, math.nan, math.nan),
    ]
    columns = ("model", "task", "role", "verdict", "effect", "ci_low", "ci_high", "q")
    rows = [role | dict(zip(columns, values, strict=True)) for values in roles]
    heads = [
        ("a", "t1", "name_mover", 0, 1, "partial"),
        ("a", "t1", "name_mover", 1, 2, "partial"),
        ("a", "t1", "name_mover", 1, 3, "contradicted"),
        ("a", "t2", "induction", 1, 0, "corroborated"),
        ("b", "t1", "name_mover", 2, 0, "untestable"),
    ]
    keys = ("model", "task", "role", "layer", "head", "verdict")
    rows += [role | dict(zip(keys, head, strict=True)) | {"kind": "head", "effect": 0.5} for head in heads]
    return pd.DataFrame(rows)


def head_table(model: str = "a", n_layers: int = 3, n_heads: int = 4, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    return pd.DataFrame(
        {
            "model": model, "cell_id": model, "layer": layer, "head": head,
            "ov_copying": generator.uniform(-1, 1, len(layer)), "qk_symmetry": generator.uniform(-1, 1, len(layer)),
            "qk_positional_share": generator.uniform(0, 1, len(layer)), "qk_matching": np.full(len(layer), math.nan),
        }
    )  # fmt: skip


# --- models beside each other --------------------------------------------------------------------------------


def test_verdict_counts_are_bars_as_wide_as_their_shares() -> None:
    figure = models.verdict_counts(verdict_table())
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
    first = models.verdict_counts(table).axes[0]
    assert "2 more cannot be corroborated" in [text.get_text() for text in first.texts]


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
    (axes,) = models.effects(verdict_table()).axes
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
    figure = models.atlas(pd.concat([heads, head_table("b").assign(ov_copying=math.nan)]), "ov_copying", verdicts)
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
    figure = models.atlas(head_table(n_heads=n_heads), "ov_copying", verdicts)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (ring,) = [patch for patch in axes.patches if patch.get_width() == pytest.approx(0.78)]
    (text,) = axes.texts
    assert len(text.get_text().split("\n")) == 2
    inside, letters = ring.get_window_extent(), text.get_window_extent()
    assert inside.x0 <= letters.x0 and letters.x1 <= inside.x1
    assert inside.y0 <= letters.y0 and letters.y1 <= inside.y1


def test_a_legend_of_many_roles_is_no_wider_than_its_atlas() -> None:
    assert models.wrapped_lines(["aa", "bb", "cc"], 8) == ["aa    bb", "cc"]
    assert models.wrapped_lines([], 8) == [] and models.wrapped_lines(["longer than that"], 8) == ["longer than that"]


def pair(
    mode: str, sender: tuple[int, int], receiver: tuple[int, int], score: float, above: float
) -> dict[str, object]:
    ends = dict(
        zip(("sender_layer", "sender_head", "receiver_layer", "receiver_head"), (*sender, *receiver), strict=True)
    )
    return {"mode": mode, "score": score, "score_above_random": above, "percentile": 1.0, "matching": math.nan} | ends


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


# --- one head ------------------------------------------------------------------------------------------------


def spectra_table() -> pd.DataFrame:
    """Head 0.0 has eigenvalues 10, 0.1i, -0.1i and -1 between tokens; singular values 4, 2, 1, 0 (0.1: all 3)."""
    eigen = {(0, 0): [10, 0.1j, -0.1j, -1], (0, 1): [1, 1, 1, 1]}
    sigma = {(0, 0): [4.0, 2.0, 1.0, 0.0], (0, 1): [3.0, 3.0, 3.0, 3.0]}
    rows = []
    for (layer, head), values in eigen.items():
        for space, kind, numbers in (("vocab", "eigen", values), ("residual", "singular", sigma[layer, head])):
            for index, value in enumerate(numbers):
                z = complex(value)
                place = {"layer": layer, "head": head, "circuit": "ov", "space": space, "kind": kind, "offset": 0}
                rows.append(place | {"index": index, "re": z.real, "im": z.imag})
    return pd.DataFrame(rows)


def frame_nulls() -> pd.DataFrame:
    place = {"role": "induction", "layer": 0.0, "head": 0.0, "metric": "ov_copying", "null": "spectrum"}
    return pd.DataFrame(
        [
            place | {"quantile": q, "value": v}
            for q, v in ((0.0, -0.3), (0.05, -0.2), (0.5, 0.0), (0.95, 0.2), (1.0, 0.4))
        ]
    )


def test_eigenvalues_keep_their_angle_and_are_placed_by_the_log_of_their_modulus() -> None:
    tables = {"spectra": spectra_table(), "heads": head_table().assign(ov_copying=0.8), "nulls": frame_nulls()}
    plane, gauge = portraits.eigenvalues(tables, 0, 0).axes
    found = plane.collections[0].get_offsets()
    # The rim is the largest modulus, 10; the centre three decades below.
    assert np.asarray(found) == pytest.approx(np.array([[1, 0], [0, 1 / 3], [0, -1 / 3], [-2 / 3, 0]]), abs=1e-12)
    assert {"copies →", "← suppresses", "Re", "Im", "0.1", "1"} <= {text.get_text() for text in plane.texts}
    assert plane.get_title(loc="left") == "OV eigenvalues\nbetween tokens"
    assert dots(gauge) == [(0.8, 0.0)] and gauge.get_xlabel() == "OV copying"
    (band,) = gauge.patches
    assert (band.get_x(), band.get_width()) == (-0.2, pytest.approx(0.4))


def test_the_labels_of_the_rings_lie_where_no_eigenvalue_does() -> None:
    way = drawing.clear_way(0.5 * np.exp(1j * np.deg2rad([30, 45, 60, 75])), [0.4, 0.7])
    assert way.real < 0 < way.imag
    assert drawing.clear_way(np.array([]), [0.5]) and drawing.clear_way(np.array([1j]), [])


def test_without_a_frame_null_no_band_is_drawn() -> None:
    tables = {"spectra": spectra_table(), "heads": head_table().assign(ov_copying=0.8)}
    _, gauge = portraits.eigenvalues(tables, 0, 0).axes
    assert not gauge.patches and dots(gauge) == [(0.8, 0.0)]


def test_eigenvalues_that_were_not_recorded_are_unavailable() -> None:
    for tables in ({}, {"spectra": spectra_table()}):
        figure = portraits.eigenvalues(tables, 0, 0, circuit="qk")
        assert "unavailable" in texts(figure) and not figure.axes[0].collections


def test_singular_values_are_relative_to_the_first() -> None:
    (axes,) = portraits.singular_values({"spectra": spectra_table()}, 0, 0).axes
    line = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(line.get_xdata()) == [1, 2, 3, 4] and list(line.get_ydata()) == [1, 0.5, 0.25, 0]
    rank90 = next(line for line in axes.lines if line.get_linestyle() == ":")
    assert rank90.get_xdata()[0] == 2  # 16 + 4 of 21 is 95 % of the energy
    median = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert list(median.get_ydata()) == pytest.approx([1, 0.75, 0.625, 0.5])  # of both heads
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("component k", "σₖ / σ₁")


def test_symmetry_stands_beside_the_measured_shares_and_the_offsets() -> None:
    heads = head_table().assign(
        **{f"qk_share_{q}_{k}": 1 / 6 for q in ("constant", "content", "position") for k in ("content", "position")}
    )
    offsets = pd.DataFrame({"layer": 1, "head": 2, "offset": range(4), "mean_score": [0.0, 3.0, 1.0, 0.5]})
    tables = {"heads": heads, "offsets": offsets}
    scatter, shares, profile = portraits.position_or_content(tables, 1, 2).axes
    own = heads.query("layer == 1 and head == 2").iloc[0]
    assert dots(scatter) == [(own["qk_symmetry"], own["qk_positional_share"])]
    assert len(scatter.collections[0].get_offsets()) == 12
    assert (scatter.get_xlabel(), scatter.get_ylabel()) == ("QK symmetry", "positional share")
    widths = [bar.get_width() for bar in shares.patches if bar.get_width() < 1]
    assert widths == pytest.approx([1 / 6] * 6)
    assert {"key position  50 %", "key content  50 %"} <= {text.get_text() for text in shares.texts}
    line = profile.lines[0]
    assert list(line.get_xdata()) == [0, 1, 2, 3] and list(line.get_ydata()) == [0, 3, 1, 0.5]
    assert (1.0, 3.0) in dots(profile) and "previous token" in [text.get_text() for text in profile.texts]


def test_rotary_shares_have_parts_of_their_own() -> None:
    heads = head_table().assign(qk_share_position=0.1, qk_share_content=0.7, qk_share_interaction=0.2)
    _, shares, _ = portraits.position_or_content({"heads": heads}, 0, 0).axes
    assert [label.get_text() for label in shares.get_yticklabels()] == [
        "offset alone",
        "key token alone",
        "both together",
    ]


def test_missing_shares_say_why_and_draw_nothing() -> None:
    heads = head_table().assign(qk_positional_share=math.nan)
    figure = portraits.position_or_content({"heads": heads}, 0, 0, {"qk_positional_share": "no embedding"})
    assert texts(figure).count("unavailable: no embedding") == 2
    assert all(not axes.collections and not axes.patches for axes in figure.axes)


def test_partners_are_bars_beside_what_random_weights_give() -> None:
    pairs = pd.DataFrame(
        [
            pair("q", (0, 1), (1, 2), 0.3, 0.2),
            pair("q", (0, 2), (1, 2), 0.2, 0.1),
            pair("k", (1, 2), (2, 0), 0.25, 0.15),
        ]
    )
    reads, is_read = portraits.partners({"composition": pairs}, 1, 2).axes
    assert [bar.get_width() for bar in reads.patches] == [0.3, 0.2]
    assert [label.get_text() for label in reads.get_yticklabels()] == ["0.1", "0.2"]
    assert reads.lines[0].get_xdata()[0] == pytest.approx(0.1)
    assert [bar.get_width() for bar in is_read.patches] == [0.25]
    assert [label.get_text() for label in is_read.get_yticklabels()] == ["2.0"]


def test_table() -> pd.DataFrame:
    """Not a test: one head under three nulls."""
    row = {
        "role": "induction",
        "layer": 0.0,
        "head": 0.0,
        "metric": "ov_copying",
        "prediction": "high",
        "primary": True,
        "exploratory": False,
        "value": 0.9,
    }
    return pd.DataFrame(
        [
            row | {"null": "layer", "counts": False, "testable": False, "percentile": 1.0, "p": 0.2, "q": math.nan},
            row | {"null": "spectrum", "counts": True, "testable": True, "percentile": 1.0, "p": 0.001, "q": 0.002},
            row | {"null": "depth", "counts": True, "testable": True, "percentile": 0.8, "p": 0.2, "q": 0.3},
        ]
    )


test_table.__test__ = False  # type: ignore[attr-defined]


def test_nulls_are_strips_with_the_value_on_them() -> None:
    figure = portraits.null_strips({"tests": test_table(), "nulls": frame_nulls()}, 0, 0)
    values, percentiles = figure.axes
    assert [label.get_text() for label in values.get_yticklabels()] == [
        "other heads of its layers",
        "same spectrum, random frames",
    ]
    assert dots(values) == [(0.9, 0.0), (0.9, 1.0)] and values.get_xlim() == (-1, 1)
    hollow, filled = [line for line in values.lines if line.get_marker() == "o"]
    assert to_hex(hollow.get_markerfacecolor()) == "#ffffff"  # it cannot decide
    assert to_hex(filled.get_markerfacecolor()) == VERDICT_COLOURS["corroborated"][0]  # q < 0.05
    (band,) = values.patches
    assert (band.get_x(), band.get_width()) == (-0.2, pytest.approx(0.4)) and band.get_y() == pytest.approx(0.78)
    assert dots(percentiles) == [(0.8, 0.0)] and percentiles.get_xlim() == (0, 1)
    said = [text.get_text() for text in values.texts]
    assert said == ["p 0.2   cannot reach p ≤ 0.05", "p 0.001   q 0.002"]
    assert values.get_title(loc="left") == "OV copying ↑  (induction, primary)"


def test_a_head_without_claims_has_no_strips() -> None:
    assert "nothing is claimed of it here" in texts(portraits.null_strips({"tests": test_table()}, 2, 2))


def direction_table(tokens: list[str]) -> pd.DataFrame:
    place = {"layer": 0, "head": 0, "circuit": "ov", "kind": "singular", "component": 0, "value": 2.5, "sign": 1}
    rows = [
        place | {"side": side, "rank": rank + 1, "token": token}
        for side in ("read", "write")
        for rank, token in enumerate(tokens)
    ]
    return pd.DataFrame(rows)


def test_components_list_their_tokens_best_first() -> None:
    figure = portraits.components({"directions": direction_table([" first", " second", " third"])}, 0, 0)
    assert texts(figure).count("first  second  third") == 2 and "2.5" in texts(figure)


# --- texts and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, len(STORABLE), 4))
def test_hostile_tokens_are_text_in_every_file(tmp_path, start) -> None:
    """Saving raises on a missing glyph or on broken mathematics (warnings are errors), and the SVG is well formed."""
    figure = portraits.components({"directions": direction_table(STORABLE[start : start + 4])}, 0, 0)
    svg, png = models.save(figure, tmp_path / "hostile")
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
    written = [models.save(models.effects(verdict_table()), tmp_path / name) for name in ("one", "two")]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    figure = models.effects(verdict_table())
    assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].title.get_fontsize() == drawing.STYLE["axes.titlesize"]


def test_figures_need_neither_pyplot_nor_wandb() -> None:
    code = "import sys, ovqk.report; print([m for m in ('matplotlib.pyplot', 'wandb', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
