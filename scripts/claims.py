"""docs/claims.md from the claims in conf/task:  python scripts/claims.py"""

from pathlib import Path
from typing import Any

import yaml

from ovqk import wording

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
STATUS = {
    "published": "published",
    "unreliable": "unreliable: an unreviewed list; it excludes no head from the nulls",
}
OPENING = """# Published claims

The heads that publications claim, as `conf/task/` holds them, with the place that names them, the revision of the model
and the status. `python scripts/claims.py` writes this page. A place that was not found in what was at hand says so. No
source names a revision: it is the one that ovqk reads, whose commit each record holds. Claims of the bundled models are
no publication's: they were measured on prompts (`scripts/measured_claims.py`), and `conf/task/` holds the numbers.
"""


def page() -> str:
    """Return the page."""
    parts = [OPENING]
    for path in sorted((ROOT / "conf" / "task").glob("*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        for model, claims in published(task).items():
            parts.append(section(task, model, claims))
    return "\n".join(parts)


def published(task: dict[str, Any]) -> dict[str, Any]:
    """Return model -> the claims of a task that a publication makes."""
    return {model: each for model, each in task.get("claims", {}).items() if each["reliability"] in STATUS}


def section(task: dict[str, Any], model: str, claims: dict[str, Any]) -> str:
    """Return the section of one task's claims about one model."""
    config = yaml.safe_load((ROOT / "conf" / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    of = f"{config['repo']} at {claims.get('revision', 'a revision that is not known')}"
    lines = [f"## {task['title']}: {model}\n", f"- Task: `{task['name']}`", f"- Source: {claims['source']}"]
    lines += [f"- Model: {of}", f"- Status: {STATUS[claims['reliability']]}"]
    lines += [f"- Note: {' '.join(claims['note'].split())}"] if claims.get("note") else []
    lines += ["", "| role | heads | place in the source |", "|---|---|---|"]
    for role, heads in claims["roles"].items():
        place = claims.get("places", {}).get(role, "not looked up")
        lines.append(f"| {wording.role(role)} | {', '.join(heads)} | {place} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
