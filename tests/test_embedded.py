"""A figure inside of a page is the saved one: the same places, in the page's colours, with nothing that leaks."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from ovqk.figures import circuits, colours, depth, embedded
from ovqk.figures.depth import MOST_TOLD_APART

SVG = "{http://www.w3.org/2000/svg}"


def heads(n_models: int, n_layers: int = 3, n_heads: int = 4) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    parts = [
        pd.DataFrame({"model": f"<b>{k}</b>", "layer": layer, "head": head, "ov_copying": generator.uniform(-1, 1, 12)})
        for k in range(n_models)
    ]
    return pd.concat(parts, ignore_index=True)


def parts(svg: str, kind: str) -> dict[str, ElementTree.Element]:
    found = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return {node.get("data-part", ""): node for node in found if node.get("data-part", "").startswith(kind)}


def points(d: str) -> np.ndarray:
    return np.array([tuple(map(float, pair)) for pair in re.findall(r"[ML] ?(-?[\d.]+) (-?[\d.]+)", d)])


def test_dots_and_lines_stand_where_matplotlib_puts_them() -> None:
    (panel,) = depth.panels(heads(2))
    figure = depth.alone(panel, dots=True)
    svg = embedded.element(figure, "OV copying")
    to_pixels = figure.axes[0].transData.transform
    scale, height = 72 / figure.dpi, depth.ALONE[1]
    for line in panel.lines:
        (dots,) = parts(svg, f"dots-{line.place}")[f"dots-{line.place}"]  # one path for all heads
        curve, means = parts(svg, f"line-{line.place}")[f"line-{line.place}"]
        for path, wanted in ((dots, line.dots), (curve, np.stack([line.depth, line.means], 1)), (means, None)):
            expected = to_pixels(np.stack([line.depth, line.means], 1) if wanted is None else wanted) * scale
            expected[:, 1] = height - expected[:, 1]
            assert points(path.get("d", "")) == pytest.approx(expected, abs=0.06)


def test_it_has_no_ids_no_sheet_and_no_colour_of_its_own() -> None:
    (panel,) = depth.panels(heads(9))  # one more than there are colours
    svg = embedded.element(depth.alone(panel, dots=True), "a <title> & more")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "a <title> & more" and root.get("class") == "plot"
    assert {node.tag.removeprefix(SVG) for node in root.iter()} == {"svg", "g", "path", "text"}
    names = {name for node in root.iter() for name in node.attrib}
    assert not names & {"id", "href", "clip-path", "onload"} and not re.search(r"#[0-9a-f]{3,6}|url\(|DejaVu", svg)
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    for dark in (False, True):
        defined = set(re.findall(r"(--line-\d+):", embedded.theme(dark)))
        assert used - set(embedded.OF_PAGE.values()) <= defined
    assert embedded.theme(True) != embedded.theme(False)
    assert parts(svg, "line-8")["line-8"][0].get("style", "").count("stroke-dasharray") == 1  # told from line 0
    assert "<b>" not in svg and "&lt;b" not in svg  # names are the page's to write


def test_of_many_models_single_heads_are_left_out_of_the_figure() -> None:
    for n, clouds in ((MOST_TOLD_APART, MOST_TOLD_APART), (MOST_TOLD_APART + 1, 0)):
        (axes, *_) = depth.depth_curves(heads(n)).axes
        assert len(axes.collections) == clouds


def test_looks_tell_lines_apart_when_colours_run_out() -> None:
    looks = [depth.look(place) for place in range(4 * len(colours.CATEGORIES))]
    assert len(set(looks)) == len(looks)


def test_summed_matrices_of_layers_have_panels_without_dots() -> None:
    layers = pd.DataFrame({"model": "<b>0</b>", "layer": range(3), "qk_symmetry": [0.1, 0.2, 0.3]})
    *_, summed = depth.panels(heads(1), layers=layers)
    assert (summed.name, summed.title, summed.of_layers) == ("summed-qk_symmetry", "Symmetry, summed W_QK", True)
    assert summed.lines[0].means.tolist() == [0.1, 0.2, 0.3]
    *_, axes = (axes for axes in depth.depth_curves(heads(1), layers=layers).axes if axes.axison)
    assert not axes.collections and list(axes.lines[-1].get_ydata()) == [0.1, 0.2, 0.3]


def test_a_circuit_keeps_the_strongest_arrows_and_counts_the_others(monkeypatch) -> None:
    monkeypatch.setattr(circuits, "MOST_EDGES", 2)
    verdicts = pd.DataFrame(
        [{"kind": "role", "role": "induction", "verdict": "partial"}]
        + [{"kind": "head", "role": "induction", "layer": k, "head": 0, "verdict": "partial"} for k in range(3)]
    )
    pairs = pd.DataFrame(
        [
            {"mode": "q", "sender_layer": a, "sender_head": 0, "receiver_layer": b, "receiver_head": 0,
             "score": above + 0.1, "score_above_random": above, "percentile": 1.0, "named": b == 1}
            for a, b, above in ((0, 1, 0.2), (0, 2, 0.3), (1, 2, 0.1))
        ]
    )  # fmt: skip
    made = circuits.layout(verdicts, pairs)
    assert [(edge.sender, edge.receiver, edge.named) for edge in made.edges] == [
        ((0, 0), (2, 0), False),
        ((0, 0), (1, 0), True),
    ]
    assert made.more == 1 and made.edges[0].bend != made.edges[1].bend  # the first passes the head between
    assert made.letters == {} and made.title("induction") == "induction"
