"""Scales and palettes: where a value gets its colour, and that colours stay apart."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovqk.figures import colours
from ovqk.figures.colours import Scale, colour_at, nice_above
from ovqk.metrics import METRICS

STRONG = ("corroborated", "partial", "unsupported", "contradicted")


def test_a_bounded_metric_keeps_its_whole_range_so_that_models_compare() -> None:
    assert Scale.of("ov_copying", [0.2, -0.9]) == Scale("diverging", -1.0, 0.0, 1.0)
    assert Scale.of("qk_positional_share", [0.3, 0.9]) == Scale("sequential", 0.0, 0.5, 1.0)


def test_a_metric_with_a_chance_level_diverges_about_it() -> None:
    assert Scale.of("ov_task_auc", [0.1, 0.9]) == Scale("diverging", 0.0, 0.5, 1.0)
    assert Scale.of("ov_task_alignment", [0.3, 5.0]) == Scale("ratio", 1 / 8, 1.0, 8.0)


def test_a_range_that_is_hardly_used_is_drawn_narrower() -> None:
    assert Scale.of("ov_task_transfer", [-0.1, 0.17]) == Scale("diverging", -0.2, 0.0, 0.2)
    assert Scale.of("ov_top_share", [0.02, 0.11]).high == pytest.approx(0.15)


def test_values_that_are_missing_have_no_place_and_do_not_widen_a_scale() -> None:
    scale = Scale.of("ov_frobenius_norm", [math.nan, math.inf, 3.4])
    assert (scale.low, scale.high) == (0, 4) and math.isnan(scale.position(math.nan))
    assert Scale.of("ov_frobenius_norm", []).high == 1


def test_ratios_are_placed_by_doublings_and_zero_is_the_low_end() -> None:
    scale = Scale("ratio", 1 / 8, 1.0, 8.0)
    assert [scale.position(x) for x in (0.0, 1 / 8, 1.0, 8.0, 100.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert scale.position(2.0) - scale.position(1.0) == pytest.approx(scale.position(4.0) - scale.position(2.0))


@given(st.sampled_from(list(METRICS)), st.lists(st.floats(-5, 60), min_size=1, max_size=8))
def test_every_metric_has_a_scale_that_rises(name, values) -> None:
    scale = Scale.of(name, values)
    assert scale.low < scale.centre < scale.high
    places = [scale.position(value) for value in sorted(values)]
    assert places == sorted(places) and all(0 <= place <= 1 for place in places)
    assert scale.position(scale.centre) == pytest.approx(0.5)


@given(st.floats(1e-6, 1e6))
def test_the_round_number_above_is_not_below_nor_far(value) -> None:
    assert value * (1 - 1e-9) <= nice_above(value) <= 1.6 * value


def test_colours_between_stops_are_mixed() -> None:
    assert colour_at(0.0, ("#000000", "#ffffff")) == "#000000"
    assert colour_at(1.0, ("#000000", "#ffffff")) == "#ffffff"
    assert colour_at(0.5, ("#000000", "#ffffff")) == "#808080"
    assert colours.is_dark("#0b5394") and not colours.is_dark("#f2f1ee")


def lightness(colour: str) -> float:
    """CIE L* of an sRGB colour."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_scales_can_be_read_without_telling_hues_apart() -> None:
    """Little to much rises in lightness alone; away from the centre both sides leave it steadily."""
    rising = [lightness(colour) for colour in colours.SEQUENTIAL]
    assert all(a + 4 < b for a, b in pairwise(rising))
    for palette, sign in ((colours.DIVERGING, 1), (colours.DIVERGING_DARK, -1)):
        steps = [sign * lightness(colour) for colour in palette]
        assert all(a < b for a, b in pairwise(steps[:5]))
        assert all(a > b for a, b in pairwise(steps[4:]))


@pytest.mark.parametrize(("place", "ground"), [(0, "#ffffff"), (1, "#16181c")])
def test_lines_stand_out_of_their_ground(place, ground) -> None:
    """A contrast of 3 or more, as WCAG 2 asks of graphics, for lines and for verdicts that say something."""
    palettes = [(colours.CATEGORIES, colours.CATEGORIES_DARK)[place]]
    palettes.append(tuple(pair[place] for pair in colours.MODES.values()))
    palettes.append(tuple(pair[place] for name, pair in colours.VERDICT_COLOURS.items() if name in STRONG))

    def luminance(colour: str) -> float:
        light = lightness(colour)
        return ((light + 16) / 116) ** 3 if light > 8 else light / 903.3

    for colour in (c for palette in palettes for c in palette):
        bright, dim = sorted((luminance(colour), luminance(ground)), reverse=True)
        contrast = (bright + 0.05) / (dim + 0.05)
        assert contrast >= 3, (colour, contrast)
