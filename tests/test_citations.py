"""Files say true things about each other: sections and metrics of docs/definitions.md, paths, functions."""

import ast
import re
from pathlib import Path

import pytest
from support.models import ROOT

from ovqk.config.schema import Config
from ovqk.metrics import COMPOSITION_METRICS, METRICS

DEFINITIONS = (ROOT / "docs" / "definitions.md").read_text(encoding="utf-8")
SECTIONS = {int(n): title for n, title in re.findall(r"^## (\d+)\. (.+)$", DEFINITIONS, flags=re.MULTILINE)}
KINDS = (("ovqk", "py"), ("conf", "yaml"), ("scripts", "py"), ("tests", "py"), ("sweeps", "yaml"))
SOURCES = [path for folder, kind in KINDS for path in (ROOT / folder).rglob(f"*.{kind}") if path != Path(__file__)]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOUT = {
    "activations": {1, 7},
    "config": {1, 5, 7},
    "weights": {1},
    "circuits": {1, 2, 3, 4, 5},
    "records": {7},
    "structure": {1, 2, 4},
    "tasks": {1, 5, 7},
    "verdicts": {3, 5, 6},
}
"""Folder of the package -> the sections that are about what is computed there."""
CITATION = re.compile(r"definitions(?:\.md)?[,:]? sections? (\d+)", flags=re.IGNORECASE)


def by_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def joined(path: Path) -> str:
    """A file's text with its lines, and the lines of its comments, as one."""
    return re.sub(r"\s*\n\s*(# )?", " ", path.read_text(encoding="utf-8"))


# --- sections ------------------------------------------------------------------------------------------------


def test_sections_are_numbered_in_order() -> None:
    assert list(SECTIONS) == list(range(1, len(SECTIONS) + 1))


def test_every_section_that_is_cited_is_there() -> None:
    found = {by_name(path): {int(number) for number in CITATION.findall(joined(path))} for path in SOURCES}
    assert sum(map(len, found.values())) > 10
    wrong = {name: sections - set(SECTIONS) for name, sections in found.items() if sections - set(SECTIONS)}
    assert not wrong


def test_the_package_cites_sections_that_are_about_it() -> None:
    for path in SOURCES:
        _, folder, *_ = (*path.relative_to(ROOT).parts, "")
        for number in map(int, CITATION.findall(joined(path)) if by_name(path).startswith("ovqk/") else ()):
            assert number in ABOUT.get(folder, set()), f"{by_name(path)}: section {number}, {SECTIONS[number]}"


def test_no_section_is_cited_without_its_page() -> None:
    for path in SOURCES:
        rest = CITATION.sub("", joined(path))
        assert not (lone := re.search(r"\b[Ss]ections? \d+|[Ss]eed page", rest)), f"{by_name(path)}: {lone and lone[0]}"


# --- metrics -------------------------------------------------------------------------------------------------


def rows() -> dict[str, list[str]]:
    """The cells of each metric's row in the definitions: formula, range, source, trap."""
    found: dict[str, list[str]] = {}
    for line in DEFINITIONS.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 5:
            for name in re.findall(r"`(\w+)`", cells[0]):
                assert name not in found, f"{name} has two rows"
                found[name] = cells[1:]
    return found


def test_every_metric_is_defined_and_nothing_else_is() -> None:
    assert set(rows()) == {*METRICS, *COMPOSITION_METRICS}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_defined_as_the_registry_has_it(name) -> None:
    formula, bounds, source, trap = rows()[name]
    low, high = METRICS[name].low, METRICS[name].high
    if low is not None and high is not None:
        assert bounds == f"[{low:g}, {high:g}]"
    elif low is not None:
        assert bounds in (f">= {low:g}", "[1, h]")
    elif high is None:
        assert bounds == "any"
    else:
        assert bounds == f"<= {high:g}"
    assert source == (METRICS[name].source or "-")
    assert formula and trap


# --- paths and names -----------------------------------------------------------------------------------------

PATH = re.compile(
    r"(?<![\w/.<-])((?:ovqk|scripts|conf|tests|sweeps|examples|docs)(?:/[\w.-]+)*/[\w.-]*\w)(?![\w*{<]|/)"
)
MADE = re.compile(r"/NAME\.yaml$")
"""Paths of files that a reader makes."""


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_path_that_a_page_names_exists(page) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text(encoding="utf-8"))  # links: test_docs.py
    missing = [name for name in PATH.findall(text) if not (MADE.search(name) or (ROOT / name).exists())]
    assert not missing


def test_every_page_that_the_package_names_exists() -> None:
    for path in SOURCES:
        if by_name(path).startswith("ovqk/"):
            missing = [n for n in PATH.findall(joined(path)) if n.startswith("docs/") and not (ROOT / n).exists()]
            assert not missing, by_name(path)


def test_the_map_of_changes_names_files_that_exist() -> None:
    """As the first lines of `analyse.py` and the page on the layout give it: both name the same file first."""
    docstring = ast.get_docstring(ast.parse((ROOT / "ovqk" / "analyse.py").read_text(encoding="utf-8"))) or ""
    assert not [name for name in PATH.findall(docstring) if not (MADE.search(name) or (ROOT / name).exists())]
    first = dict(re.findall(r"^    (an? [\w& ()]+?)  +.*?((?:ovqk|conf)/[\w./-]+\.\w+)", docstring, flags=re.M))
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (an? [\w& ()]+?) \|.*?`((?:ovqk|conf)/[\w./-]+\.\w+)`", page, flags=re.M))
    assert len(first) == 10 and first == rows


def test_a_wrong_path_is_seen() -> None:
    text = "`ovqk/nowhere.py`, conf/model/gpt2.yaml, `ovqk/circuits/`, results/conf/x.yaml, `conf/task/*.yaml`"
    assert PATH.findall(text) == ["ovqk/nowhere.py", "conf/model/gpt2.yaml"]


FILES = {"py", "md", "json", "yaml", "parquet", "safetensors", "toml"}
MODULES = [*(ROOT / "ovqk").rglob("*.py")]


def names_of(path: Path) -> set[str]:
    """The functions, classes and constants of a module."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("name", ["docs/method.md", "docs/architecture.md", "docs/extending.md", "CONTRIBUTING.md"])
def test_every_function_that_a_page_names_exists(name) -> None:
    """As `module.function`, with the module's last name; `model.path` and the like are keys."""
    for module, function in re.findall(r"`([a-z_]+)\.([A-Za-z_]+)`", (ROOT / name).read_text(encoding="utf-8")):
        if module == "ovqk" or function in FILES or hasattr(getattr(Config(), module, None), function):
            continue
        there = set().union(*(names_of(path) for path in MODULES if path.stem == module))
        assert function in there, f"{module}.{function}"
