"""The documentation: its links lead somewhere, its commands run, and print what the pages say they print."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.commands import compose
from support.scripts import script

from ovqk.metrics import COMPOSITION_METRICS, METRICS

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
PLACES = re.compile(r"`((?:ovqk|conf|docs|scripts|sweeps|tests|examples)/[\w./-]+)`")
OWN = re.compile(r"-cd mine|model=(my|NAME)|ENTITY")
"""Commands with files of the page's own, which the slow tests run."""
ELLIPSES = ("...", "model=...", "task=...", "\\")
"""What stands in a command for the reader's own choice, or for its next line."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is to be saved as, its text."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(m[1], m[2] or "", m[3]) for m in FENCE.finditer(page.read_text(encoding="utf-8"))]


def by_name(page: Path) -> str:
    return page.name


# --- links and commands --------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown renderers make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_link_leads_somewhere(page) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target
    for name in PLACES.findall(text):
        assert (ROOT / name).exists() or "NAME" in name, name


@pytest.mark.parametrize("page", DOCS, ids=by_name)
def test_a_page_has_one_title(page) -> None:
    assert len(re.findall(r"^# ", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)) == 1


def test_every_page_is_in_the_map_and_in_the_navigation() -> None:
    start, navigation = (ROOT / "docs" / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in DOCS:
        assert f": {page.name}" in navigation, page.name
        assert f"]({page.name})" in start or page.name == "README.md", page.name


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) for each `python run.py` of the pages that a reader could type as it stands."""
    for page in DOCS:
        for line in page.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\s*((?:\.venv/bin/)?python run\.py .*)", line):
                command = match[1].split("  ")[0].split(" # ")[0]
                if not OWN.search(command):
                    yield page.name, command


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_every_command_composes(page, command) -> None:
    words = shlex.split(command)[2:]
    if "-cn" in words:
        assert (ROOT / words[words.index("-cd") + 1] / f"{words[words.index('-cn') + 1]}.yaml").is_file() or (
            words[words.index("-cn") + 1] == "cell"
        )
        return
    choices = [w.split("=", 1) for w in words if not w.startswith(("-", "hydra")) and w not in ELLIPSES]
    for values in itertools.product(*([f"{key}={value}" for value in of.split(",")] for key, of in choices)):
        compose(*values)


# --- what the pages hold -------------------------------------------------------------------------------------


def test_every_metric_is_explained() -> None:
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    missing = sorted({*METRICS, *COMPOSITION_METRICS} - named)
    assert not missing, f"docs/reading.md has no row of {', '.join(missing)}"


def test_every_role_is_explained_with_its_primary_metric() -> None:
    page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    told = {
        row[1]: row[2] for row in re.finditer(r"^\| `(\w+)` \| .+ \| (.+) \|$", page.split("\n## Roles\n")[1], re.M)
    }
    for path in (ROOT / "conf" / "task").glob("*.yaml"):
        for role, of in (yaml.safe_load(path.read_text(encoding="utf-8")).get("roles") or {}).items():
            primary = next(iter((of or {}).get("predictions", [])), None)
            assert told[role] == ("none" if primary is None else f"`{primary['metric']}` {primary['direction']}"), role


def test_what_is_cited_is_in_the_literature() -> None:
    """Sources of metrics and of published claims."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    literature = text[text.index("## Literature") :]
    claims = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "task").glob("*.yaml"))
    cited = {metric.source for metric in METRICS.values() if metric.source} | set(
        re.findall(r"arXiv:\d{4}\.\d{5}", claims)
    )
    missing = sorted(source for source in cited if source not in literature)
    assert len(cited) > 8 and not missing, missing


def test_the_verdicts_are_explained() -> None:
    from ovqk.verdicts.verdict import VERDICTS

    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert all(f"| `{verdict}` |" in text for verdict in VERDICTS)


# --- what the pages say is printed ---------------------------------------------------------------------------


def plain(line: str) -> str:
    """A printed line without what differs from run to run: seconds, ids of cells, the interpreter's place, and a
    report's size, which may be rounded otherwise for some bytes.
    """
    line = re.sub(r"\(about \d+ s left\)|\(about .*? left\)", "", line)
    line = re.sub(r"\d+\.\d s\b", "N s", line)
    line = re.sub(r"(report\.html) \(\d+\.\d MB,", r"\1 (N MB,", line)
    line = re.sub(r"offline-run-\d+_\d+-[0-9a-f-]+", "offline-run-ID", line)
    line = re.sub(r"\b(ov|qk|b03|composition|copying)-[0-9a-f]{12}\b", r"\1-ID", line)
    return line.replace(".venv/bin/python", "python").rstrip()


def mismatch(said: str, printed: str) -> str:
    """Where the lines that a page shows are not those printed; `...` stands for any lines. Empty where they are."""
    lines = [plain(line) for line in printed.strip("\n").splitlines()]
    at, skipping = 0, False
    for line in map(plain, said.strip("\n").splitlines()):
        if line.strip() == "...":
            skipping = True
            continue
        if skipping:
            while at < len(lines) and lines[at] != line:
                at += 1
        if at >= len(lines) or lines[at] != line:
            return f"the page says\n  {line}\nprinted was\n  {lines[at] if at < len(lines) else '(nothing more)'}"
        at, skipping = at + 1, False
    return "" if skipping or at == len(lines) else f"the page does not say\n  {lines[at]}"


def test_a_difference_is_seen() -> None:
    printed = "\na (1.2 s)\nb 0.5\nc\nd\n"
    assert plain("wrote x/report.html (0.8 MB, 4 cells)") == plain("wrote x/report.html (0.9 MB, 4 cells)")
    assert mismatch("a (9.9 s)\nb 0.5\nc\nd", printed) == ""
    assert mismatch("a (9.9 s)\n...\nd", printed) == ""
    assert mismatch("a (9.9 s)\nb 0.5\n...", printed) == ""
    assert "b 0.6" in mismatch("a (9.9 s)\nb 0.6\nc\nd", printed)
    assert "does not say" in mismatch("a (9.9 s)\nb 0.5\nc", printed)
    assert "nothing more" in mismatch("a (9.9 s)\n...\ne", printed)


def workplace(folder: Path) -> dict[str, str]:
    """Make a folder look like the repository; the environment of commands that are typed there."""
    for name in ("run.py", "conf", "ovqk"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": paths, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}


def follow(page: Path, folder: Path) -> Iterator[tuple[Block, str]]:
    """Do what a page says in a folder that looks like the repository: each block that runs, and what it printed."""
    environment = workplace(folder)
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        runs = {"bash": ["bash", "-c", block.text], "python": ["python", "-c", block.text], "diff": ["git", "apply"]}
        if block.title or block.language not in runs:
            yield block, ""
            continue
        done = subprocess.run(
            runs[block.language],
            cwd=folder,
            env=environment,
            input=block.text if block.language == "diff" else None,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        yield block, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tutorial.md", "extending.md"])
def test_the_page_is_followed_to_the_letter(name, tmp_path) -> None:
    printed = ""
    for block, output in follow(ROOT / "docs" / name, tmp_path):
        if block.language == "text":
            assert not (found := mismatch(block.text, printed)), found
        printed = output or printed


@pytest.mark.slow
def test_the_readme_shows_what_is_printed(tmp_path) -> None:
    """The cell of `make demo`."""
    environment = workplace(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [block for block in re.findall(r"(?:^(?: {4}.*)?\n)+", text, flags=re.MULTILINE) if "verdict\n" in block]
    (block,) = shown
    command = ["python", "run.py", "task=sva"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = mismatch(textwrap.dedent(block), done.stdout)
    assert not found, found


def test_the_page_of_the_api_is_what_the_docstrings_say() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert text == script("api").page(), "python scripts/api.py writes it again"
    assert ":::" not in text and "### ovqk.open" in text


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path) -> None:
    """Every page, without a warning and without a network."""
    for package in ("mkdocs", "material"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "load_results" in api and "places" in api
    assert not re.search(r'(?:src|href)="https?://(?:fonts|cdn|unpkg)', api)
