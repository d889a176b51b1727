"""The report: one file that holds what the records hold, in which no text of a record is anything but text."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from support.commands import compose
from support.models import BUNDLED, shared_model
from support.reported import FAILED, HOSTILE, HOSTILE_MODEL, STORABLE, make_results, page_data

from ovqk import wording
from ovqk.cell import run_cell
from ovqk.config.command_line import program
from ovqk.errors import UserError
from ovqk.figures import comparisons
from ovqk.figures.choice import file_name, sweep_figures
from ovqk.metrics import HEAD_METRICS
from ovqk.records.cells import Cell, read_cells, weights_labels
from ovqk.records.results import load_results
from ovqk.report import page, thinning
from ovqk.report.page import embedded, make_page
from ovqk.report.thinning import DETAILS, Pool, short
from ovqk.report.write import WRITTEN, write_report


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return make_results(tmp_path_factory)


@pytest.fixture(scope="module")
def made(results) -> tuple[str, dict]:
    """The page of these results, and the data in it."""
    html = make_page(*read_cells(results), results).html
    return html, page_data(html)


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "ovqk.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def cell_of(data: dict, name: str) -> dict:
    return next(cell for cell in data["cells"] if cell["name"] == name)


def column(data: dict, cell: dict, metric: str) -> list:
    return data["pool"][cell["columns"][metric]]


# --- what the page holds -------------------------------------------------------------------------------------


def test_every_metric_of_every_head_is_on_the_page_at_four_digits(results, made) -> None:
    _, data = made
    for cell in data["cells"]:
        heads = pd.read_parquet(results / cell["folder"].replace("%22", '"') / "heads.parquet")
        for metric in HEAD_METRICS:
            if metric in heads and heads[metric].notna().any():
                shown = column(data, cell, metric)
                for value, found in zip(heads[metric], shown, strict=True):
                    assert (found is None) == math.isnan(value), metric
                    assert found is None or found == pytest.approx(value, rel=6e-4), metric
            else:
                assert metric not in cell["columns"]


def test_a_metric_without_a_value_is_absent_with_its_reason_and_never_zero(made) -> None:
    _, data = made
    cell = cell_of(data, "partial/none")
    for metric in ("ov_copying", "qk_matching", "qk_positional_share"):
        assert metric not in cell["columns"]
        assert "no token embedding" in cell["unavailable"][metric]
    assert any(value for value in column(data, cell, "ov_symmetry"))
    assert "ov_copying" not in data["scales"]["none"] or cell_of(data, "mini-attn/none")["columns"]["ov_copying"] >= 0
    first_layer = column(data, cell_of(data, "mini-attn/induction"), "ov_copying_block0")[:8]
    assert first_layer == [None] * 8  # it is of later layers


def test_spectra_of_the_page_are_those_of_the_table(results, made) -> None:
    _, data = made
    cell = cell_of(data, "mini-attn/induction")
    table = pd.read_parquet(results / cell["folder"] / "spectra.parquet")
    table = table[(table["layer"] == 3) & (table["head"] == 4) & (table["circuit"] == "ov")]
    shown = data["pool"][cell["spectra"]["heads"][3 * 8 + 4]]["ov"]
    sigma = table[(table["space"] == "residual") & (table["kind"] == "singular")]["re"]
    assert shown["residual"]["singular"] == pytest.approx(sigma.tolist(), rel=6e-4) and shown["residual"]["of"] == 16
    eigen = table[(table["space"] == "vocab") & (table["kind"] == "eigen")]
    flat = shown["vocab"]["eigen"]
    kept = list(zip(flat[::2], flat[1::2], strict=True))
    mirrored = kept + [(re, -im) for re, im in kept if im > 0]  # as the page draws them
    assert sorted(mirrored) == sorted(zip(eigen["re"].map(short), eigen["im"].map(short), strict=True))


def test_verdicts_and_quantiles_reach_the_page(results, made) -> None:
    _, data = made
    cell = cell_of(data, "mini-attn/induction")
    verdicts = pd.read_parquet(results / cell["folder"] / "verdicts.parquet")
    texts, at = cell["verdicts"]["verdict"]["texts"], data["pool"][cell["verdicts"]["verdict"]["at"]]
    assert [texts[place] for place in at] == verdicts["verdict"].tolist()
    reasons, at = cell["verdicts"]["reason"]["texts"], data["pool"][cell["verdicts"]["reason"]["at"]]
    assert [reasons[place] for place in at] == verdicts["reason"].map(wording.reason).tolist()
    tests = pd.read_parquet(results / cell["folder"] / "tests.parquet")
    nulls = pd.read_parquet(results / cell["folder"] / "nulls.parquet")
    values = data["pool"][cell["tests"]["quantile_values"]]
    row = int(np.flatnonzero((tests["null"] == "spectrum") & (tests["layer"] == 3))[0])
    keys = ["role", "metric", "null", "layer", "head"]
    mine = nulls[(nulls[keys] == tests.loc[row, keys]).all(axis=1)]
    assert values[row] == [short(float(value)) for value in mine["value"]] and len(values[row]) == 11


def test_what_cells_of_one_model_share_is_held_once(made) -> None:
    _, data = made
    induction, none = cell_of(data, "mini-attn/induction"), cell_of(data, "mini-attn/none")
    assert induction["weights"] == none["weights"]
    assert induction["spectra"]["heads"] == none["spectra"]["heads"]
    assert induction["columns"]["ov_symmetry"] == none["columns"]["ov_symmetry"]


def test_what_has_no_results_is_named(results, made, tmp_path) -> None:
    _, data = made
    assert data["failures"] == [
        {"model": model, "task": task, "analysis": "b03-000000000000", "error": "<b>no weights</b>"}
        for model, task in FAILED
    ]
    shutil.copytree(results / "mini-attn", tmp_path / "mini-attn")
    folders = sorted((tmp_path / "mini-attn").glob("*/*"))
    (folders[0] / "spectra.parquet").write_bytes(b"PAR1 cut off")
    (folders[1] / "record.json").write_text('{"status": "done"')
    cells, failures = read_cells(tmp_path)
    assert not cells
    assert [f.error for f in failures] == [
        "spectra.parquet cannot be read (ArrowInvalid)",
        "its record.json cannot be read",
    ]


def test_a_record_that_lacks_something_is_said_and_not_shown(results, tmp_path) -> None:
    shutil.copytree(results / "mini-llama", tmp_path / "mini-llama")
    (path,) = (tmp_path / "mini-llama").glob("*/*/record.json")
    record = json.loads(path.read_text())
    del record["provenance"]
    path.write_text(json.dumps(record))
    (path.parent / "heads.parquet").unlink()
    assert [f.error for f in read_cells(tmp_path)[1]] == ["its record.json has no provenance"]


def test_cells_of_one_model_and_task_have_addresses_of_their_own(results) -> None:
    cells, _ = read_cells(results)
    first = next(cell for cell in cells if cell.place == ("mini-attn", "induction"))
    other = Cell(first.folder, first.record | {"analysis": "qk"}, first.tables)
    again = Cell(first.folder, first.record | {"analysis": "qk", "cell_id": "abc"}, first.tables)
    names = page.cell_names([first, other, again])
    assert names == ["mini-attn/induction", "mini-attn/induction~qk", "mini-attn/induction~qk-abc"]


# --- texts ---------------------------------------------------------------------------------------------------


@given(st.recursive(st.text() | st.sampled_from(HOSTILE), st.lists, max_leaves=20))
def test_data_cannot_leave_their_script_element(value) -> None:
    text = embedded(value)
    assert text.isascii() and not set(text) & set("<>&")
    assert json.loads(text) == value


def test_the_page_is_one_file_that_loads_nothing(made) -> None:
    html, _ = made
    code = html.split('<script type="application/json"')[0] + html.split("</script>")[1]
    assert re.findall(r"https?://[^\"' ]+", code) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"@import|url\((?!#)|<link|<iframe|\bfetch\(|XMLHttpRequest|import\(", code)
    parser = Elements()
    parser.feed(html)
    assert parser.loads == [] and parser.scripts == 2
    assert "default-src 'none'" in html and "script-src 'sha256-" in html and "'unsafe-inline'; script" not in html


class Elements(HTMLParser):
    """Counts what may run, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [value for name, value in attributes if name == "src" and value]
        assert not any(name.startswith("on") for name, _ in attributes), tag


def test_hostile_texts_are_data_and_nothing_else(made) -> None:
    html, data = made
    assert set(STORABLE) <= set(data["tokens"])
    assert HOSTILE_MODEL in {cell["model"] for cell in data["cells"]}
    for text in (*STORABLE[:4], HOSTILE_MODEL, "<b>no weights</b>"):
        assert text not in html


# --- files ---------------------------------------------------------------------------------------------------


def test_links_lead_to_the_full_tables_from_wherever_the_page_lies(results, tmp_path) -> None:
    cells, failures = read_cells(results)
    for beside in (results, tmp_path / "elsewhere" / "deep"):
        beside.mkdir(parents=True, exist_ok=True)
        for cell in page_data(make_page(cells, failures, beside).html)["cells"]:
            assert not cell["folder"].startswith("/")
            for name in cell["tables"]:
                assert (beside / cell["folder"] / f"{name}.parquet").resolve().is_file()


def test_no_path_of_this_machine_is_on_the_page(results, made) -> None:
    html, _ = made
    assert str(results) not in html and str(BUNDLED) not in html and str(Path.home()) not in html.replace("/root", "")


def test_the_same_records_give_the_same_page(results, made) -> None:
    assert make_page(*read_cells(results), results).html == made[0]


@pytest.mark.slow
def test_the_command_writes_a_page_and_figures(results, tmp_path) -> None:
    one = tmp_path / "one"
    shutil.copytree(results / "mini-attn" / "induction", one / "mini-attn" / "induction")
    done = report(one)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert re.fullmatch(rf"wrote {one}/report.html \(0\.\d MB, 1 cell of 1 model\)", first)
    assert second == f"wrote 12 figures, as SVG and as PNG, to {one}/figures"
    names = {path.name for path in (one / "figures").iterdir()}
    wanted = {"verdicts", "effects", "depth", "circuit_mini-attn_induction", "head_mini-attn_induction_3.0"}
    wanted |= {f"atlas_induction_{name}" for name in ("ov_copying", "qk_symmetry", "qk_positional_share")}
    assert {f"{name}{ending}" for name in wanted for ending in (".svg", ".png")} <= names
    assert page_data((one / "report.html").read_text())["figures"] == "figures"


@pytest.mark.slow
def test_figures_of_an_earlier_report_go_and_other_files_stay(results, tmp_path, monkeypatch) -> None:
    """A cell that is gone leaves no figure behind; what a report did not write is none of its business."""
    shutil.copytree(results / "mini-attn" / "induction", tmp_path / "mini-attn" / "induction")
    shutil.copytree(results / "mini-llama", tmp_path / "mini-llama")
    folder = tmp_path / "figures"
    write_report(tmp_path)
    llama = {path.name for path in folder.glob("*mini-llama*")}
    assert "circuit_mini-llama_induction.svg" in llama
    own = {"notes.txt", "circuit_of_mine.svg", "depth_old.png"}
    for name in own:
        (folder / name).touch()
    (tmp_path / "beside.svg").touch()
    with (folder / WRITTEN).open("a") as file:
        file.write("../beside.svg\nnotes.txt\n")  # no report writes such names
    shutil.rmtree(tmp_path / "mini-llama")
    with monkeypatch.context() as broken:
        broken.setattr("ovqk.report.write.cell_figures", lambda cells: 1 / 0)
        with pytest.raises(UserError, match="ZeroDivisionError"):
            write_report(tmp_path)
    assert llama <= {path.name for path in folder.iterdir()}  # nothing goes before the new ones are there
    write_report(tmp_path)
    left = {path.name for path in folder.iterdir()}
    assert not llama & left and own <= left and (tmp_path / "beside.svg").exists()
    assert set((folder / WRITTEN).read_text().split()) == left - own - {WRITTEN}


def test_the_page_alone_goes_where_it_is_told(results, tmp_path) -> None:
    out = tmp_path / "new" / "my page.html"
    done = report(results, "--out", out, "--no-figures")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["my page.html"]
    assert "without results: broken / ioi / b03-000000000000: <b>no weights</b>" in done.stderr


@pytest.mark.parametrize("kind", ["missing", "empty", "failed", "unwritable"])
def test_what_cannot_be_reported_is_one_clear_message(results, tmp_path, kind) -> None:
    folder, out = tmp_path / "results", None
    wanted = f"{folder}: no such results folder."
    if kind != "missing":
        folder.mkdir()
        wanted = f"{folder} holds no finished cell. Compute one first: "
    if kind == "failed":
        shutil.copytree(results / "broken", folder / "broken")
        wanted = f"{folder} holds no finished cell (1 cell without results). Compute one first: "
    if kind == "unwritable":
        shutil.copytree(results / "partial", folder / "partial")
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "report.html"
        wanted = f"{tmp_path / 'file'}: cannot be written ("
    with pytest.raises(UserError, match=re.escape(wanted)):
        write_report(folder, out, with_figures=False)


def test_a_message_ends_the_command_with_status_1_and_no_traceback(tmp_path) -> None:
    done = report(tmp_path / "missing")
    assert (done.returncode, done.stderr) == (1, f"ovqk: {tmp_path / 'missing'}: no such results folder.\n")


def test_figures_of_a_sweep_come_one_by_one_with_names_of_files(results) -> None:
    cells, _ = read_cells(results)
    made = sweep_figures(cells)
    assert [next(made)[0] for _ in range(3)] == ["verdicts", "effects", "depth"]
    assert file_name("atlas", "a/b c", "ov_copying") == "atlas_a-b-c_ov_copying"


def test_reading_and_reporting_wait_for_no_torch(results) -> None:
    """Its import takes seconds, which who reads tables in a notebook need not wait."""
    folder = results / "mini-attn" / "induction"
    code = (
        f"import sys, ovqk; ovqk.load_results({str(folder)!r}); from ovqk import figures, portraits, report; "
        "from ovqk.records.cells import read_cells; from pathlib import Path; "
        f"read_cells(Path({str(results)!r})); "
        "print([name for name in ('torch', 'transformers', 'transformer_lens', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# --- size ----------------------------------------------------------------------------------------------------

LARGE = (12, 12, 64)  # layers, heads, d_head: GPT-2 small


def large_tables(seed: int) -> dict[str, pd.DataFrame]:
    """Tables of the sizes that a cell of GPT-2 small has, of random numbers and tokens; 0.0 is claimed."""
    n_layers, n_heads, size = LARGE
    generator = np.random.default_rng(seed)
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    place = pd.DataFrame({"layer": layer, "head": head})
    tables = {"heads": place.assign(**{name: generator.normal(size=len(place)) for name in HEAD_METRICS})}
    parts = []
    for circuit in ("ov", "qk"):
        for space in ("vocab", "residual"):
            for kind in ("eigen", "singular"):
                rows = place.loc[place.index.repeat(size)].assign(
                    circuit=circuit, space=space, kind=kind, offset=0, index=np.tile(np.arange(size), len(place))
                )
                modulus = np.tile(np.geomspace(5, 0.1, size), len(place)) * generator.uniform(0.9, 1.1, len(rows))
                angle = np.repeat(generator.uniform(0, np.pi, len(rows) // 2), 2) * np.tile([1, -1], len(rows) // 2)
                z = modulus * np.exp(1j * angle) if kind == "eigen" else modulus + 0j
                parts.append(rows.assign(re=z.real, im=z.imag))
    tables["spectra"] = pd.concat(parts, ignore_index=True)
    n = 2 * 3 * 2 * 2 * 10  # circuits, components, sides, signs, ranks
    grid = np.stack(np.unravel_index(np.arange(n), (2, 3, 2, 2, 10)))
    rows = place.loc[place.index.repeat(n)].reset_index(drop=True)
    circuit, component, side, sign, rank = (np.tile(axis, len(place)) for axis in grid)
    tables["directions"] = rows.assign(
        circuit=np.array(["ov", "qk"])[circuit], kind="singular", component=component, value=3.0 - component,
        value_im=0.0, cluster=component, cluster_size=1, side=np.array(["read", "write"])[side], sign=1 - 2 * sign,
        rank=rank + 1, token=np.char.add(" token", generator.integers(0, 50_000, len(rows)).astype(str)),
    )  # fmt: skip
    tables["verdicts"] = pd.DataFrame(
        [{"kind": "head", "role": "induction", "layer": 0, "head": 0, "verdict": "partial", "primary": "ov_copying"}]
    )
    return tables


@pytest.mark.slow
def test_twenty_cells_of_gpt2_stay_below_five_megabytes() -> None:
    cells = []
    for model in range(5):
        tables = large_tables(model)
        for task in range(4):
            record = {
                "model": f"model{model}", "task": f"task{task}", "analysis": "b03", "cell_id": f"{model}{task}",
                "seed": 0, "processing": {"applied": "folded", "requested": "folded"},
                "provenance": {"weights_digest": str(model)},
            }  # fmt: skip
            heads = tables["heads"].assign(ov_task_auc=np.random.default_rng(task).uniform(size=len(tables["heads"])))
            cells.append(Cell(Path(f"/results/{model}/{task}"), record, tables | {"heads": heads}))
    made = make_page(cells, [], Path("/results"))
    assert 1_000_000 < made.size < 5_000_000
    data = page_data(made.html)
    spectra = data["cells"][0]["spectra"]["heads"]
    claimed, other = (data["pool"][spectra[place]]["ov"]["vocab"] for place in (0, 1))
    assert made.detail.values is not None and data["detail"] == vars(made.detail)  # the page says what it left out
    assert len(claimed["singular"]) == 64 and len(other["singular"]) == made.detail.values
    directions = data["cells"][0]["directions"]["heads"]
    lengths = [len(data["pool"][directions[place]][0]["read"]["plus"]) for place in (0, 1)]
    assert lengths == [10, made.detail.tokens]


def test_a_page_that_fits_leaves_nothing_out(made) -> None:
    _, data = made
    assert set(data["detail"].values()) == {None}


def test_a_page_that_cannot_fit_holds_the_least(results) -> None:
    cells, _ = read_cells(results)
    assert make_page(cells[:1], [], results, limit=1).detail == DETAILS[-1]


def test_offsets_are_thinned_from_the_far_end() -> None:
    assert thinning.spaced_offsets(10, 96) == list(range(10))
    kept = thinning.spaced_offsets(1024, 40)
    assert kept[:17] == list(range(17)) and kept[-1] == 1023 and len(kept) <= 40 and kept == sorted(set(kept))
    assert thinning.spaced_offsets(1024, 0) == []


def test_numbers_are_short_and_what_is_not_finite_is_nothing() -> None:
    assert [short(x) for x in (0.123412, 2.0, -1234567.0, 1e-9, 0.0)] == [0.1234, 2, -1234600.0, 1e-9, 0]
    assert short(math.nan) is None and short(math.inf) is None
    assert short(5.395176846) == 5.3952 and short(0.124996) == 0.124996 and short(0.125) == 0.125
    noisy = 0.125 + 2**-50  # is above the middle, and must not become the middle itself
    assert short(noisy) == noisy and f"{short(noisy):.2f}" == f"{noisy:.2f}" == "0.13"
    values = np.random.default_rng(0).uniform(-10, 10, 5000)
    assert [f"{short(x):.2f}" for x in values] == [f"{x:.2f}" for x in values]  # rounded twice, as if rounded once
    pool = Pool()
    assert [pool.add([1]), pool.add([2]), pool.add([1])] == [0, 1, 0]


# --- real models ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_partial_gpt2_and_stories_are_reported(tmp_path) -> None:
    """GPT-2 small without its embedding, judged by GPT-2's claims: what has no value is unavailable, with a reason."""
    common = ("tracking=none", "nulls.draws=19", f"results_dir={tmp_path}", "model=local")
    run_cell(compose(f"model.path={shared_model('gpt2-small-attention')}", "model.claims=gpt2", "task=ioi", *common))
    run_cell(compose(f"model.path={shared_model('stories260k')}", "task=none", *common))
    said = write_report(tmp_path)
    assert said[0].endswith("2 cells of 2 models)")
    html = (tmp_path / "report.html").read_text()
    assert len(html) < 5_000_000
    data = page_data(html)
    gpt2 = cell_of(data, "gpt2-small-attention/ioi")
    assert "ov_task_auc" not in gpt2["columns"] and "no token embedding" in gpt2["unavailable"]["ov_task_auc"]
    verdicts = gpt2["verdicts"]
    assert set(verdicts["verdict"]["texts"]) == {"untestable", "unsupported"}
    name_mover = verdicts["role"]["texts"].index("name_mover")
    at = data["pool"][verdicts["role"]["at"]].index(name_mover)
    assert data["pool"][verdicts["effect"]][at] is None
    assert cell_of(data, "stories260k/none")["columns"]["ov_copying"] is not None
    assert (tmp_path / "figures" / "circuit_gpt2-small-attention_ioi.svg").is_file()


# --- several cells of one model and task ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(results, tmp_path_factory) -> Path:
    """A cell, the same with another seed, with raw weights, and with another analysis."""
    folder = tmp_path_factory.mktemp("several")
    (source,) = (results / "mini-attn" / "induction").glob("b03-*")
    raw = {"requested": "raw", "applied": "raw"}
    for name, changes, identity in (
        ("b03-000000000000", {}, {"processing": "folded", "seed": 0}),
        ("b03-000000000001", {"seed": 1}, {"processing": "folded", "seed": 1}),
        ("b03-000000000002", {"processing": raw}, {"processing": "raw", "seed": 0}),
        ("ov-000000000003", {"analysis": "ov"}, {"processing": "folded", "seed": 0}),
    ):
        place = folder / "mini-attn" / "induction" / name
        shutil.copytree(source, place)
        record = json.loads((place / "record.json").read_text()) | changes | {"cell_id": name.split("-")[1]}
        record["provenance"]["identity"] = identity
        (place / "record.json").write_text(json.dumps(record))
    return folder


def test_cells_of_one_model_and_task_are_told_apart(several) -> None:
    cells, _ = read_cells(several)
    names = dict(zip((cell.record["cell_id"][-1] for cell in cells), page.labels(cells), strict=True))
    assert names == {
        "0": "mini-attn (folded seed=0)",
        "1": "mini-attn (folded seed=1)",
        "2": "mini-attn (raw seed=0)",
        "3": "mini-attn",  # the one of its analysis
    }
    assert set(weights_labels(cells)) == {"mini-attn (folded)", "mini-attn (raw)"}
    alone = [cell for cell in cells if cell.record["cell_id"][-1] in "03"]
    assert page.labels(alone) == ["mini-attn (b03)", "mini-attn (ov)"]
    assert page.labels(alone[:1]) == weights_labels(alone[:1]) == ["mini-attn"]
    elsewhere = Cell(alone[0].folder, alone[0].record | {"task": "sva"}, alone[0].tables)
    assert page.labels([*alone, elsewhere]) == ["mini-attn (b03)", "mini-attn (ov)", "mini-attn (b03)"]


def test_figures_show_each_of_several_cells(several) -> None:
    made = dict(sweep_figures(read_cells(several)[0]))
    assert len(made["effects"].axes[0].get_yticklabels()) == 8  # two roles of four cells
    rows = [label.get_text() for label in made["verdicts"].axes[0].get_yticklabels()]
    assert len(rows) == 4 and "mini-attn (raw seed=0)" in rows
    grids = [axes.get_title(loc="left") for axes in made["atlas_induction_ov_copying"].axes]
    assert grids[:2] == ["mini-attn (folded)", "mini-attn (raw)"]


def test_a_figure_refuses_several_cells_as_one(several) -> None:
    tables = load_results(several, tables=["heads", "verdicts"])
    for draw in (
        lambda: comparisons.atlas(tables["heads"], "ov_copying"),
        lambda: comparisons.verdict_counts(tables["verdicts"]),
    ):
        with pytest.raises(ValueError, match=r"mini-attn.*: of 4 cells; choose one, or tell them apart by `model`"):
            draw()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_part_of_a_results_folder_is_reported_alone(several, tmp_path, depth) -> None:
    part = next(several.glob("/".join("*" * depth)))
    wanted = [cell.folder for cell in read_cells(several)[0] if part in (cell.folder, *cell.folder.parents)]
    assert [cell.folder for cell in read_cells(part)[0]] == wanted and len(wanted) == (1 if depth == 3 else 4)
    if depth == 3:
        said = write_report(part, tmp_path / "page.html", with_figures=False)
        assert said[0].endswith(", 1 cell of 1 model)")


def test_a_part_without_results_is_named_by_its_place(results) -> None:
    (failure,) = read_cells(results / "broken" / "ioi")[1]
    assert (failure.model, failure.task) == ("broken", "ioi")
    remedy = f"holds no finished cell (1 cell without results). Compute one first: {program()} results_dir={results}"
    with pytest.raises(UserError, match=f"{re.escape(remedy)}$"):
        write_report(results / "broken")
