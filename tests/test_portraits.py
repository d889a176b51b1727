"""Figures of one head show the numbers of its tables, or say that these are unavailable."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from support.drawn import direction_table, dots, head_table, pair, texts

from ovqk.figures import drawing, portraits
from ovqk.figures.colours import VERDICT_COLOURS


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


def test_components_list_their_tokens_best_first() -> None:
    figure = portraits.components({"directions": direction_table([" first", " second", " third"])}, 0, 0)
    assert [drawing.spaces_marked(token) for token in ("a b", " a", "a  ", "  ")] == ["a b", "␣a", "a␣␣", "␣␣"]
    assert texts(figure).count("␣first  ␣second  ␣third") == 2 and "2.5" in texts(figure)
    assert "cluster" not in " ".join(texts(figure))


def test_components_that_are_not_determined_are_grey_and_said_to_be_none_alone() -> None:
    alone = direction_table([" first"])
    table = pd.concat([alone, alone.assign(component=1, value=2.4, cluster_size=64)])
    (axes,) = portraits.components({"directions": table}, 0, 0).axes
    assert axes.get_title(loc="left").endswith("(grey: a cluster, only its span means something)")
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert (colours["2.5"], colours["2.4"]) == (drawing.INK, drawing.MUTED)
