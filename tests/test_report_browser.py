"""The report in a real browser: Debian's Chromium, driven by Playwright. Screenshots are kept in artefacts/.

Without the browser these tests skip and say so; .ci/run installs it.
"""

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pytest
from support import ROOT
from support.commands import compose
from support.models import BUNDLED, shared_model
from support.prompted import HEADS, make_prompted
from support.reported import HOSTILE_MODEL, STORABLE, make_results

from ovqk import wording
from ovqk.cell import run_cell
from ovqk.errors import UserError
from ovqk.records.cells import read_cells
from ovqk.records.results import load_table
from ovqk.report.on_prompts import share
from ovqk.report.page import make_page
from ovqk.report.terminal_tables import rounded
from ovqk.whole_files import write_text

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
SECTIONS = (
    "compare",
    "atlas/induction/ov_copying",
    "head/mini-attn/induction/3.4",
    "circuit/mini-attn/induction",
    "provenance",
)
ARTEFACTS = ROOT / "artefacts"
HOSTILE_CELL = f"{quote(HOSTILE_MODEL, safe='')}/induction"
PAIRS = pd.DataFrame({"source": ["France", "Wales", "<b>Oz</b>"], "target": ["Paris", "Cardiff", "Emerald"]})
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: no browser to open the report in")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    results = make_results(tmp_path_factory)
    path = results / "report.html"
    write_text(path, make_page(*read_cells(results), results, "figures").html)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """One visit of the page: where it goes, what it complains of, what it fetches."""

    def __init__(self, page: "playwright.Page", file: Path) -> None:
        self.page, self.file = page, file
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.fetched.append(request.url))

    def open(self, address: str = "") -> None:
        self.page.goto(f"file://{self.file}")
        self.page.evaluate("address => { location.hash = address }", address)
        self.title()

    def title(self) -> str:
        """The heading of what the address names, once it is shown."""
        for _ in range(200):  # the page's own policy forbids the polling that Playwright would do inside it
            if self.page.evaluate("document.getElementById('main').dataset.address === location.hash"):
                break
            self.page.wait_for_timeout(50)
        return self.page.inner_text("main h1")

    def address(self) -> str:
        return self.page.evaluate("location.hash")

    def see(self, name: str) -> None:
        ARTEFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def reader(browser, page_file) -> Iterator[Reader]:
    """A visit on a laptop's screen, which ends without a word in the console and without a fetch."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    visit = Reader(context.new_page(), page_file)
    yield visit
    context.close()
    assert visit.complaints == []
    assert all(url.startswith(("file://", "blob:")) for url in visit.fetched)


# --- from section to section ---------------------------------------------------------------------------------


def test_one_clicks_from_compare_through_the_atlas_to_a_head_and_its_circuit(reader) -> None:
    reader.open()
    assert reader.title() == "Do the weights bear out the claims?"
    reader.see("compare")
    reader.page.click("nav >> text=Head atlas")
    assert reader.title() == "Head atlas" and reader.page.locator("svg.atlas").count() >= 3
    reader.see("atlas")
    reader.page.click("[data-cell='mini-attn/induction'] [data-head='3.4']")
    assert reader.title() == "Head 3.4 of mini-attn" and reader.address() == "#head/mini-attn/induction/3.4"
    assert "Induction" in reader.texts(".card h3")[0]
    for heading in (
        "Verdict",
        "Against the nulls",
        "OV: what it copies",
        "QK: where it looks",
        "Position or content",
        "Composition",
    ):
        assert reader.page.locator(f"h2:text-is('{heading}')").count() == 1, heading
    reader.see("head")
    reader.page.click("nav >> text=Circuit")
    assert reader.title().startswith("Circuit: ")
    reader.page.select_option("select", "mini-attn/induction")
    assert reader.title() == "Circuit: mini-attn on induction"
    reader.see("circuit")
    reader.page.click("svg.circuit a:has-text('1.1')")
    assert reader.title() == "Head 1.1 of mini-attn"
    reader.page.click("nav >> text=Provenance")
    reader.see("provenance")
    assert "<b>no weights</b>" in reader.page.inner_text("main")  # of the cell that failed, as text
    reader.page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
    reader.page.wait_for_selector("text=/^cpu, with [0-9]+ processor threads?$/")
    reader.page.go_back()
    assert reader.title() == "Head 1.1 of mini-attn"


def test_the_numbers_that_a_reader_sees_are_those_of_the_tables(reader, page_file) -> None:
    import pandas as pd

    (folder,) = (page_file.parent / "mini-attn" / "induction").glob("b03-*")
    heads = pd.read_parquet(folder / "heads.parquet").set_index(["layer", "head"])
    reader.open("head/mini-attn/induction/3.4")
    reader.page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
    rows = reader.page.locator("#metrics tbody tr")
    shown = {row.split("\t")[0]: row.split("\t")[1] for row in rows.all_inner_texts()}
    for title, metric, digits in (
        ("OV copying", "ov_copying", 3),
        ("QK symmetry", "qk_symmetry", 3),
        ("OV effective rank", "ov_effective_rank", 2),  # the page holds four digits and shows no more
    ):
        assert shown[title] == f"{heads.loc[(3, 4), metric]:.{digits}f}".replace("-", "\N{MINUS SIGN}")
    assert shown["OV transfer of the contrast"].startswith("unavailable: not applicable")
    circles = reader.page.locator("svg[aria-label*='eigenvalues of the OV circuit'] circle[data-tip^='λ']")
    assert circles.count() == 16


def test_of_two_decimals_that_are_equally_near_the_page_shows_the_one_that_the_terminal_shows(browser) -> None:
    """Halves of a last digit, numbers that lie a little beside them, and any others."""
    source = (ROOT / "ovqk" / "report" / "template" / "elements.js").read_text()
    (numbers,) = re.findall(r"// --- numbers -+\n(.*?)// --- ", source, flags=re.DOTALL)
    page = browser.new_page()

    def shown(expression: str, xs: list[float]) -> list[str]:
        found = page.evaluate(f"xs => {{ {numbers} return xs.map((x) => {expression}); }}", xs)
        return [text.replace("\N{MINUS SIGN}", "-") for text in found]

    ties = [sign * k / 2 ** (d + 1) for d in range(5) for k in range(1, 80, 2) for sign in (1, -1)]
    values = [*ties, *(x + 1e-12 for x in ties), 1.005, 2.675, 0.145, 0, 100, *(k / 997 for k in range(-500, 500))]
    for digits in range(5):
        assert shown(f"fixed(x, {digits})", values) == [f"{x:.{digits}f}" for x in values]
    within = [x for x in values if 0.005 <= abs(x) < 10]
    assert shown("number(x)", within) == [rounded(x) for x in within]
    shares = [k / 200 for k in range(-200, 201)]
    assert [text.replace(" ", "") for text in shown("percent(x)", shares)] == [share(x) for x in shares]
    assert shown("percent(x)", [0.125, 0.375, -0.125]) == ["12 %", "38 %", "-12 %"]
    ps = [k / 16 for k in range(2, 17)]
    assert shown("probability(x)", ps) == [f"{p:.2f}" for p in ps]
    page.close()


def test_no_number_on_the_page_is_rounded_otherwise() -> None:
    """Points of curves in pixels apart, and tick marks, whose numbers are round."""
    template = ROOT / "ovqk" / "report" / "template"
    texts = [path.read_text() for path in template.glob("*.js") if path.name != "plots.js"]
    lines = [line for text in texts for line in text.splitlines()]
    assert sum("toFixed(" in line for line in lines) == 2  # both in `fixed`
    assert not any("Math.round(100" in line for line in lines)


def test_an_address_leads_to_its_head_at_once(reader) -> None:
    reader.page.goto(f"file://{reader.file}#head/mini-llama/induction/3.1")
    assert (
        reader.title() == "Head 3.1 of mini-llama" and reader.page.title() == "Head 3.1 of mini-llama \N{EN DASH} ovqk"
    )
    for wrong in (
        "head/mini-llama/induction/77.0",
        "head/nothing/here/0.0",
        "atlas/%E0%A4%A/none",
        "head",
        "circuit/x/y",
        "zzz",
    ):
        reader.open(wrong)
        assert reader.title()
    reader.open("head/mini-llama/induction/77.0")
    assert reader.title() == "No such head" and "layers 0 to 3" in reader.page.inner_text("main")


# --- filters -------------------------------------------------------------------------------------------------


def effect_rows(reader: Reader) -> list[list[str]]:
    """task, role and model of the rows of the table of effects."""
    return [row.split("\t")[:3] for row in reader.texts("#effects tbody tr")]


def test_effects_are_filtered_and_sorted(reader) -> None:
    reader.open("compare")
    everything = effect_rows(reader)
    assert len(everything) >= 4
    reader.page.fill("#filter", "mini-llama ov cop")
    assert effect_rows(reader) == [["induction", "induction", "mini-llama"]]
    reader.page.fill("#filter", "nothing of the kind")
    assert effect_rows(reader) == [] and "Nothing matches" in reader.page.inner_text("#effects")
    reader.page.fill("#filter", "")
    reader.page.click("#effects th button:text-is('model')")
    models = [row[2] for row in effect_rows(reader)]
    assert models == sorted(models) and len(models) == len(everything)
    assert reader.page.get_attribute("#effects th:has-text('model')", "aria-sort") == "ascending"
    reader.page.click("#effects th button:text-is('model')")
    assert [row[2] for row in effect_rows(reader)] == sorted(models, reverse=True)
    reader.page.select_option("select", "unsupported")
    assert [row[1] for row in effect_rows(reader)] == ["previous token"]


def test_cells_without_results_are_counted_and_lead_to_the_reason(reader) -> None:
    reader.open("compare")
    assert "2 cells without results" in reader.page.inner_text(".lead")
    row = reader.page.locator("#matrix tbody tr:has(th:text-is('partial'))")
    assert "not run" not in row.inner_text()
    row.locator("a:text-is('without results')").click()
    assert reader.title() == "Provenance" and "<b>no weights</b>" in reader.page.inner_text("main")


def test_no_table_of_the_comparison_is_cut_off_on_a_laptop(reader) -> None:
    reader.open("compare")
    wide = reader.page.evaluate(
        "[...document.querySelectorAll('main .scroll')].filter(box => box.scrollWidth > box.clientWidth + 1).length"
    )
    assert wide == 0


def test_the_longest_verdict_without_a_flag_stands_on_one_line_among_effects(reader) -> None:
    reader.page.set_viewport_size({"width": 1000, "height": 800})
    reader.open("compare")
    heights = reader.page.evaluate(
        """[...document.querySelectorAll('#effects .says-verdict .verdict')].map(
            said => { said.lastChild.textContent = 'consistent only'; return said.offsetHeight })"""
    )
    assert heights and max(heights) < 30


def test_models_are_chosen_for_the_whole_comparison(reader) -> None:
    reader.open("compare")
    assert "mini-llama" in reader.page.inner_text("#matrix")
    reader.page.uncheck("label:has-text('mini-llama') input")
    assert "mini-llama" not in reader.page.inner_text("#matrix") and "mini-llama" not in reader.page.inner_text(
        "#effects"
    )
    reader.page.check("label:has-text('mini-llama') input")
    assert "mini-llama" in reader.page.inner_text("#matrix")


def test_a_metric_recolours_the_atlas_and_its_address_is_kept(reader) -> None:
    reader.open("atlas/induction/ov_copying")
    square = "[data-cell='mini-attn/induction'] [data-head='0.0'] rect >> nth=0"
    before = reader.page.get_attribute(square, "fill")
    reader.page.select_option("label:has-text('Colour by') select", "qk_positional_share")
    assert reader.address() == "#atlas/induction/qk_positional_share"
    assert reader.page.get_attribute(square, "fill") != before
    reader.page.reload()
    assert reader.page.input_value("label:has-text('Colour by') select") == "qk_positional_share"


def test_missing_metrics_are_unavailable_and_not_zero(reader) -> None:
    reader.open("atlas/none/ov_copying")
    figure = reader.page.locator("figure:has(h3:text-is('partial'))")
    assert "unavailable: the checkpoint has no token embedding" in figure.inner_text()
    assert figure.locator("rect").count() == 0
    reader.open("head/partial/none/0.0")
    said = reader.page.inner_text("main")
    assert said.count("unavailable: the checkpoint has no token embedding") >= 2
    reader.see("unavailable")


# --- everyone ------------------------------------------------------------------------------------------------


def test_the_keyboard_reaches_every_head(reader) -> None:
    reader.page.goto(f"file://{reader.file}#atlas/induction/ov_copying")
    keyboard = reader.page.keyboard
    keyboard.press("Tab")
    assert reader.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for _ in range(30):
        keyboard.press("Tab")
        if reader.page.evaluate("document.activeElement.getAttribute('role')") == "gridcell":
            break
    here = reader.page.evaluate("document.activeElement.dataset.head")
    layer, head = map(int, here.split("."))
    keyboard.press("Home")
    keyboard.press("ArrowRight")
    assert reader.page.evaluate("document.activeElement.dataset.head") == f"{layer}.1"
    keyboard.press("ArrowUp")
    assert reader.page.evaluate("document.activeElement.dataset.head") == f"{max(0, layer - 1)}.1"
    label = reader.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert re.match(rf"head {max(0, layer - 1)}\.1, OV copying \S?[\d.]+", label)
    assert reader.page.locator("#tip").is_visible()
    keyboard.press("Enter")
    assert reader.title().startswith(f"Head {max(0, layer - 1)}.1 of ")
    assert reader.page.evaluate("document.activeElement.tagName") == "H1"  # where reading goes on
    assert head >= 0


@pytest.mark.parametrize("section", SECTIONS)
def test_every_picture_has_words(reader, section) -> None:
    reader.open(section)
    unnamed = reader.page.evaluate(
        """() => [...document.querySelectorAll('main svg:not(svg svg)')].filter(node =>
            !node.closest('[aria-hidden=true]') && !node.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    nameless = reader.page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, a')].filter(node =>
            !(node.textContent.trim() || node.ariaLabel || (node.labels && node.labels.length))).length"""
    )
    assert nameless == 0
    assert reader.page.locator("h1").count() == 1 and reader.page.get_attribute("html", "lang") == "en"
    assert reader.page.locator("nav [aria-current=page]").count() == 1


def test_a_figure_is_also_a_table_and_a_file(reader, tmp_path) -> None:
    reader.open("head/mini-attn/induction/3.4")
    figure = reader.page.locator("figure:has(h3:text-is('OV singular values'))")
    figure.locator("summary").click()
    lines = figure.locator("table.data tbody tr").all_inner_texts()
    assert len(lines) == 16 and lines[0].startswith("1\t")
    for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with reader.page.expect_download() as download:
            figure.locator(f"button:text-is('{kind}')").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.read_bytes().startswith(start) and path.name == f"singular-mini-attn-3.4-ov.{kind.lower()}"


def test_curves_that_python_drew_follow_theme_choice_and_download(reader, tmp_path) -> None:
    reader.open("compare")
    figure = reader.page.locator("figure:has(h3:text-is('OV copying'))")
    line, dots = figure.locator("[data-part='line-0']"), figure.locator("[data-part='dots-0']")
    stroke = "node => getComputedStyle(node.firstElementChild).stroke"
    light = line.evaluate(stroke)
    assert dots.is_visible() and line.get_attribute("data-tip") == reader.texts(".legend.lines span")[0]
    reader.page.uncheck("label:has-text('single heads') input")
    assert not dots.is_visible() and line.is_visible()
    reader.page.emulate_media(color_scheme="dark")
    reader.page.wait_for_selector("html[data-dark]")
    assert line.evaluate(stroke) != light and not dots.is_visible()  # the choice outlives the theme
    with reader.page.expect_download() as download:
        figure.locator("button:text-is('SVG')").click()
    download.value.save_as(tmp_path / "depth.svg")
    svg = (tmp_path / "depth.svg").read_text()
    assert "var(" not in svg and svg.startswith("<svg") and 'visibility="hidden"' in svg


def background(reader: Reader) -> str:
    return reader.page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_and_light_follow_the_system_or_the_button(reader) -> None:
    reader.open("head/mini-attn/induction/3.4")
    light = background(reader)
    reader.page.emulate_media(color_scheme="dark")
    reader.page.wait_for_selector("html[data-dark]")
    dark = background(reader)
    assert dark != light
    reader.see("head_dark")
    reader.page.click("#theme")
    assert reader.page.inner_text("#theme") == "Theme: light" and background(reader) == light
    reader.page.click("#theme")
    reader.page.emulate_media(color_scheme="light")
    assert reader.page.inner_text("#theme") == "Theme: dark" and background(reader) == dark
    reader.page.reload()
    assert background(reader) == dark  # it is remembered
    reader.page.click("nav >> text=Head atlas")
    reader.see("atlas_dark")


def test_a_roles_card_holds_what_was_tested_as_its_one_head(reader) -> None:
    """The claimed previous-token head is one, so that its primary prediction has no row about the role."""
    reader.open("circuit/mini-attn/induction")
    card = reader.page.locator("section.card:has(h3:text('Previous token'))")
    card.locator("summary").click()
    titles = [title for title in card.locator("h3").all_inner_texts() if "predicted" in title]
    assert any("primary, tested as its one head 1.1" in title for title in titles)
    assert any("K-composition" in title and "tested as" not in title for title in titles)


def test_the_lines_of_a_circuit_pass_no_head(reader) -> None:
    """Each line keeps away from the heads that it does not join, and no two lie on each other."""
    reader.open("circuit/mini-attn/induction")
    paths, gaps = reader.page.evaluate(
        """() => {
            const all = selector => [...document.querySelectorAll(`svg.circuit ${selector}`)];
            const heads = all('circle.focus').map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')]);
            const lines = all('path[stroke-width]').filter(p => / Q/.test(p.getAttribute('d')));
            return [lines.map(p => p.getAttribute('d')), lines.map(line => {
                const near = heads.map(([x, y]) => Math.min(...Array.from({length: 50}, (_, k) => {
                    const at = line.getPointAtLength(line.getTotalLength() * k / 49);
                    return Math.hypot(at.x - x, at.y - y);
                }))).sort((a, b) => a - b);
                return near[2] ?? Infinity;
            })];
        }"""
    )
    assert len(paths) >= 4 and len(set(paths)) == len(paths)
    assert min(gaps) > 18  # the radius of a head


@pytest.mark.parametrize("section", SECTIONS)
def test_a_narrow_screen_never_scrolls_sideways(reader, section) -> None:
    reader.page.set_viewport_size({"width": 380, "height": 800})
    reader.open(section)
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= 380
    reader.see(f"narrow_{section.split('/')[0]}")


def test_what_is_cut_off_on_a_narrow_screen_has_a_shade_at_that_end(reader) -> None:
    """Pixels at a box's upper corners: darker than the page on the side where there is more, and only there."""
    from PIL import Image

    def ends() -> list[bool]:
        image = Image.open(io.BytesIO(box.screenshot())).convert("L")
        return [image.getpixel((at, 1)) < 245 for at in (0, image.width - 1)]

    reader.page.set_viewport_size({"width": 380, "height": 800})
    reader.open("head/mini-attn/induction/3.4")
    box = reader.page.locator(".scroll:has(.plot)").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth + 40")
    assert ends() == [False, True]
    box.evaluate("box => { box.scrollLeft = 20 }")
    assert ends() == [True, True]
    box.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    assert ends() == [True, False]
    reader.page.set_viewport_size({"width": 1280, "height": 800})
    assert ends() == [False, False]


def test_print_is_light_and_without_controls(reader) -> None:
    reader.page.emulate_media(color_scheme="dark")
    reader.open("compare")
    reader.page.wait_for_selector("html[data-dark]")
    reader.page.emulate_media(color_scheme="dark", media="print")
    reader.page.wait_for_selector("html:not([data-dark])")
    assert background(reader) == "rgb(255, 255, 255)"
    assert not reader.page.locator(".bar").is_visible() and not reader.page.locator(".controls").first.is_visible()
    ARTEFACTS.mkdir(exist_ok=True)
    reader.page.pdf(path=ARTEFACTS / "compare.pdf", format="A4", print_background=True)
    assert (ARTEFACTS / "compare.pdf").read_bytes().startswith(b"%PDF")


# --- hostile texts -------------------------------------------------------------------------------------------


def test_hostile_tokens_and_names_are_text(reader) -> None:
    """No script of a record runs (a dialog would be a complaint), no element is made of one, none turns the text."""
    reader.open(f"head/{HOSTILE_CELL}/2.0")
    assert reader.title() == f"Head 2.0 of {HOSTILE_MODEL}"
    shown = reader.page.evaluate("[...document.querySelectorAll('.token')].map(node => node.textContent)")
    assert {"<script>alert(1)</script>", "</script><img src=x onerror=al…", "\"quoted\" 'twice' & more"} <= set(shown)
    assert "␣\\u{202e}right to left" in shown and "\\u{0}\\u{1b}[31m\\u{7f}" in shown
    assert "line\\nbreak\\u{2028}and\\u{2029}more" in shown and "(empty)" in shown
    assert set(shown) - {"(empty)"} and not any("\u202e" in text or "\x1b" in text for text in shown)
    assert reader.page.evaluate("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"
    for section in ("compare", "atlas/induction/ov_copying", f"circuit/{HOSTILE_CELL}", "provenance"):
        reader.open(section)
        reader.page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
        reader.page.wait_for_timeout(100)
        assert HOSTILE_MODEL in reader.page.inner_text("main")
        assert reader.page.locator("main script, main img").count() == 0
    assert STORABLE[0] in reader.page.inner_text("main")  # provenance: a word that was left out
    reader.open(f"head/{HOSTILE_CELL}/2.0")
    reader.see("hostile")


# --- on prompts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts_file(page_file, tmp_path_factory) -> Path:
    """A page of two cells that ran their model."""
    (source,) = (page_file.parent / "mini-attn" / "induction").glob("b03-*")
    results = tmp_path_factory.mktemp("prompted") / "results"
    for model in ("mini-attn", "twin"):
        make_prompted(source, results, model)
    path = results / "report.html"
    write_text(path, make_page(*read_cells(results), results, "figures").html)
    return path


@pytest.fixture
def prompts_reader(browser, prompts_file) -> Iterator[Reader]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    visit = Reader(context.new_page(), prompts_file)
    yield visit
    context.close()
    assert visit.complaints == []


@pytest.mark.slow
def test_weights_and_prompts_are_crossed_with_the_names_of_the_heads(prompts_reader) -> None:
    reader = prompts_reader
    reader.open("prompts/mini-attn/induction")
    assert reader.title() == "On prompts: mini-attn on induction"
    assert "answer beats the foil in 95%" in reader.page.inner_text(".lead")
    for reading in ("linked", "unlinked", "could", "indirect", "neither"):
        field = "linked" if reading == "unlinked" else reading
        text = reader.page.inner_text(f"#quad [data-reading={field}]")
        own = [f"{layer}.{head}" for _, layer, head, *_, says, _ in HEADS if says == reading]
        assert own and all(head in text for head in own)
        words = wording.READINGS[reading]
        assert words[0].upper() + words[1:] in text
    outside = reader.page.inner_text("#undecided")
    assert all(head in outside for head in ("2.7", "0.1", "1.3")) and "not tested" in outside
    table = reader.page.inner_text("#prompt-heads")
    assert "no effect" in table and wording.CHOSEN in table and "too few clusters of prompts" in table
    marks = reader.page.locator(".rankings svg.plot a[tabindex='0']").evaluate_all(
        "nodes => nodes.map(n => n.ariaLabel)"
    )
    assert len(marks) == 8 and "head 2.7: measured, not claimed" in marks
    reader.see("prompts")
    reader.page.click("#quad a:text-is('3.3')")
    assert reader.title() == "Head 3.3 of mini-attn"
    card = reader.page.locator("section.card:has(h3:has-text('not realised'))")
    assert card.locator("figure h3").all_inner_texts()[0] == "Attention from END *"
    assert "R²" in card.inner_text() and wording.READINGS["could"] in card.inner_text()
    reader.see("prompts_head")


@pytest.mark.slow
def test_the_comparison_of_cells_that_ran_counts_their_heads_and_fits(prompts_reader) -> None:
    reader = prompts_reader
    reader.open("compare")
    lines = reader.texts("#readings tbody tr")
    assert len(lines) == 2 and all("95 %" in line and "4.25" in line for line in lines)
    box = "document.querySelector('#readings').closest('.scroll')"
    assert reader.page.evaluate(f"{box}.scrollWidth <= {box}.clientWidth")  # no column is cut off
    reader.page.uncheck("label:has-text('twin') input")
    assert "Does what its weights say" in reader.page.inner_text("#quad")  # of one cell its fields
    for section in ("compare", "prompts/twin/induction", "head/twin/induction/3.0"):
        reader.page.set_viewport_size({"width": 380, "height": 800})
        reader.open(section)
        assert reader.page.evaluate("document.documentElement.scrollWidth") <= 380


def test_a_page_without_them_says_nothing_of_prompts(reader) -> None:
    reader.open("prompts/mini-attn/induction")
    assert reader.title() == "Do the weights bear out the claims?"
    assert "On prompts" not in reader.page.inner_text("body")
    reader.open("head/mini-attn/induction/3.4")
    assert reader.page.locator("h2:text-is('On prompts')").count() == 0


def test_a_head_names_the_components_of_its_senders_that_it_reads_with_their_tokens(reader, page_file) -> None:
    reader.open("head/mini-attn/induction/3.4")
    rows = [row.split("\t") for row in reader.texts("#components-read tbody tr")]
    (folder,) = (page_file.parent / "mini-attn" / "none").glob("composition-*")
    pairs = load_table(folder, "composition")
    pairs = pairs[(pairs["receiver_layer"] == 3) & (pairs["receiver_head"] == 4)]
    wanted = [
        [f"{row.sender_layer}.{row.sender_head}", str(row.component)]
        for mode in "qkv"
        for row in pairs[pairs["mode"] == mode].nlargest(3, "score").itertuples()
    ]
    assert [row[1:3] for row in rows] == wanted and len(wanted) == 9
    (induction,) = (page_file.parent / "mini-attn" / "induction").glob("b03-*")
    listed = load_table(induction, "directions")
    for (name, component), row in zip(wanted, rows, strict=True):
        layer, head = map(int, name.split("."))
        own = listed[(listed["layer"] == layer) & (listed["head"] == head) & (listed["circuit"] == "ov")
                     & (listed["kind"] == "singular") & (listed["component"] == int(component))]  # fmt: skip
        if not len(own):
            assert row[-1].endswith(f"analysis.components={int(component) + 1} lists it")
            continue
        for side, cell in (("read", row[-2]), ("write", row[-1])):
            best = own[(own["side"] == side) & (own["sign"] > 0) & (own["rank"] == own["rank"].min())]["token"].iloc[0]
            assert cell.replace("␣", " ").strip().startswith(best.replace("Ġ", " ").strip()), (name, cell, best)
    assert any("lists it" not in row[-1] for row in rows)
    reader.see("components")


def test_components_that_a_cell_did_not_list_say_what_lists_them(page_file, browser, tmp_path) -> None:
    (folder,) = (page_file.parent / "mini-attn" / "none").glob("composition-*")
    shutil.copytree(folder, tmp_path / "mini-attn" / "none" / folder.name)
    write_text(tmp_path / "report.html", make_page(*read_cells(tmp_path), tmp_path, "figures").html)
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'report.html'}#head/mini-attn/none/3.4")
    rows = [row.split("\t") for row in page.locator("#components-read tbody tr").all_inner_texts()]
    page.close()
    assert len(rows) == 9
    for row in rows:
        assert row[-1].endswith(f"analysis.components={int(row[2]) + 1} lists it")


def test_components_that_are_not_determined_are_grey_and_say_why(reader, page_file) -> None:
    (folder,) = (page_file.parent / "mini-attn" / "induction").glob("b03-*")
    rows = load_table(folder, "directions").query("circuit == 'ov' and kind == 'singular' and component == 0")
    size = rows.groupby(["layer", "head"])["cluster_size"].first()
    (layer, head), n = size[size > 1].index[0], size[size > 1].iloc[0]
    reader.open(f"head/mini-attn/induction/{layer}.{head}")
    table = reader.page.locator("table.components").first
    assert wording.CLUSTER.format(size=n) in table.inner_text()
    assert wording.CLUSTER_NOTE in reader.texts(".scroll > .note")
    colour = table.locator(".clustered .token").first.evaluate("node => getComputedStyle(node).color")
    assert colour != reader.page.evaluate("getComputedStyle(document.body).color")


def test_a_head_shows_the_pairs_that_it_raises_and_lowers(page_file, browser, tmp_path) -> None:
    cells, _ = read_cells(page_file.parent)
    cell = next(cell for cell in cells if cell.place == ("mini-attn", "induction"))
    heads = cell.tables["heads"][["layer", "head"]].merge(PAIRS, how="cross")
    mine = (heads["layer"] == 3) & (heads["head"] == 4)
    raised, lowered = mine & (heads["target"] == "Paris"), mine & (heads["target"] == "Cardiff")
    table = heads.assign(ov_relation_score=raised.astype(float), ov_relation_suppress=lowered.astype(float))
    path = tmp_path / "page.html"
    write_text(
        path, make_page([replace(cell, tables={"heads": cell.tables["heads"], "relations": table})], [], tmp_path).html
    )
    reader = Reader(browser.new_page(), path)
    reader.open("head/mini-attn/induction/3.4")
    said = reader.page.inner_text("#pairs").split("\n")
    assert said == ["Raised: 1 of 3", "France → Paris", "Lowered: 1 of 3", "Wales → Cardiff",
                    "Not raised: 2", "Wales → Cardiff", "<b>Oz</b> → Emerald"]  # fmt: skip
    reader.open("head/mini-attn/induction/3.3")
    assert reader.page.inner_text("#pairs").startswith("Raised: 0 of 3\nnone\n") and not reader.complaints
    reader.page.close()


# --- a sweep of everything -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_page_of_a_whole_sweep_is_shown_without_a_complaint(browser, tmp_path) -> None:
    """The bundled models over all tasks and analyses, stories260k, and GPT-2 without its embedding: every address."""
    common = ("tracking=none", "nulls.draws=19", f"results_dir={tmp_path}")
    for model in ("mini-attn", "mini-gpt2", "mini-llama"):
        for task in ("ioi", "sva", "induction", "greater_than", "copy_suppression", "acronym", "none"):
            with suppress(UserError):  # a task whose words the model cannot read
                run_cell(compose(f"model={model}", f"task={task}", *common))
        run_cell(compose(f"model={model}", "task=none", "analysis=composition", *common))
    for name, more in (("gpt2-small-attention", ("model.claims=gpt2", "task=ioi")), ("stories260k", ("task=none",))):
        path = ROOT.parent / "shared" / "models" / name
        if path.exists():
            run_cell(compose("model=local", f"model.path={shared_model(name)}", *more, *common))
    file = tmp_path / "report.html"
    made = make_page(*read_cells(tmp_path), tmp_path)
    assert made.size < 5_000_000
    write_text(file, made.html)
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    reader = Reader(context.new_page(), file)
    reader.open("provenance")
    names = [cell.split("\t")[:3] for cell in reader.texts("#cells tbody tr")]
    assert len(names) >= 15
    addresses = ["compare", "provenance"]
    for model, task, analysis in names:
        cell = f"{model}/{task}" + (f"~{analysis}" if analysis == "composition" else "")
        addresses += [f"circuit/{cell}", f"head/{cell}/0.0", f"head/{cell}/3.4", f"atlas/{task}/qk_symmetry"]
    for address in dict.fromkeys(addresses):
        reader.open(address)
        assert "undefined" not in reader.page.inner_text("main"), address
        assert "NaN" not in reader.page.inner_text("main"), address
    reader.open("compare")
    reader.see("sweep")
    context.close()
    assert reader.complaints == []


# --- a model of which nothing is claimed -------------------------------------------------------------------------


def test_a_page_without_claims_speaks_of_none_and_cuts_no_name(browser, tmp_path) -> None:
    unclaimed = ("model=local", f"model.path={BUNDLED}", "model.name=smollm2-135m-instruct", "task=induction")
    outcome = run_cell(compose(*unclaimed, "tracking=none", "nulls.draws=39", f"results_dir={tmp_path}"))
    assert outcome.status == "done"
    file = tmp_path / "report.html"
    write_text(file, make_page(*read_cells(tmp_path), tmp_path, "figures").html)
    reader = Reader(browser.new_page(viewport={"width": 1400, "height": 900}), file)
    reader.open("compare")
    assert "candidates" in reader.page.inner_text(".lead")
    past_the_edge = """() => [...document.querySelectorAll('#main svg.plot')].flatMap((plot) => {
        const right = (node) => node.getBoundingClientRect().right;
        const texts = [...plot.querySelectorAll('text')];
        return texts.filter((text) => right(text) > right(plot) + 0.5).map((text) => text.textContent);
    })"""
    assert reader.page.evaluate(past_the_edge) == []
    reader.open("atlas/induction/ov_copying")
    assert "claimed" not in reader.page.inner_text(".lead")
    reader.open("circuit/smollm2-135m-instruct/induction")
    assert "Candidates" in reader.texts("h2") and reader.page.locator(".lead").count() == 0
    reader.open("head/smollm2-135m-instruct/induction/3.4")
    assert "Blue: claimed heads" not in reader.page.inner_text("main")
    assert "Ring: the previous token." in reader.page.inner_text("main")
    assert reader.page.evaluate(past_the_edge) == []
    reader.page.close()


# --- nothing claimed -------------------------------------------------------------------------------------------


def test_a_page_without_claims_opens_on_candidates_and_can_be_narrowed(page_file, browser, tmp_path) -> None:
    """Fourteen models without claims, and one that failed: candidates and the first plot are on the first screen."""
    results = tmp_path / "results"
    (source,) = (page_file.parent / "unclaimed" / "induction").glob("b03-*")
    for number in range(14):
        folder = results / f"model-{number:02}" / "induction" / f"b03-{number:012x}"
        shutil.copytree(source, folder)
        record = json.loads((folder / "record.json").read_text())
        record |= {"model": f"model-{number:02}", "cell_id": f"{number:012x}"}
        record["provenance"]["weights_digest"] = f"{number:064x}"
        (folder / "record.json").write_text(json.dumps(record))
    for model, task in (("lost", "induction"), ("lost", "sva")):
        failed = results / model / task / "b03-ffffffffffff"
        failed.mkdir(parents=True)
        record = {"status": "failed", "analysis": "b03", "error": f"no weights for {task}"}
        (failed / "record.json").write_text(json.dumps(record))
    path = results / "report.html"
    write_text(path, make_page(*read_cells(results), results).html)
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    reader = Reader(page, path)
    reader.open()
    assert page.locator("h1").inner_text() == "Which heads are strongest for each role?"
    table = page.locator("table.candidates")
    assert table.locator("tbody tr").count() == 15 and table.locator("a.mark").count() >= 14 * 3
    assert page.locator(".meaning").bounding_box()["y"] < 1000  # seen without scrolling the table
    worth = page.locator("h2:has-text('Candidates') + p")  # in one line, above the heads
    assert worth.inner_text() == wording.CANDIDATES_WORTH and worth.bounding_box()["height"] < 30
    assert worth.bounding_box()["y"] < table.bounding_box()["y"]
    assert "without results: no weights for induction" in table.inner_text()
    assert page.locator("p.lost").inner_text() == "lost / sva / b03 without results: no weights for sva"
    assert page.locator("svg.plot").first.bounding_box()["y"] < 1000
    assert page.locator(".legend.lines").count() == 0  # 14 lines cannot be told apart by a legend
    assert page.locator("figure:has-text('OV copying') [data-part^='line-']:visible").count() >= 14
    page.locator("#named").fill("model-03")
    assert table.locator("tbody tr").count() == 1 and page.locator(".legend.lines").inner_text() == "model-03"
    assert page.locator("h3:text-is('OV copying') + .scroll [data-part^='line-']:visible").count() == 1
    page.set_viewport_size({"width": 380, "height": 800})
    legend, row = page.locator(".meaning").bounding_box(), table.locator("tbody tr").bounding_box()
    assert legend["width"] > 300 and legend["y"] >= row["y"] + row["height"]  # below its table, and as wide
    label = table.locator("tbody td").first.evaluate("node => getComputedStyle(node, '::before').content")
    assert "ov_copying_block0" in label  # the head of the table, which says what ranks them, is not shown here
    assert not reader.complaints
    page.close()
