"""The page's first words: they say what the cells came to, whatever kind of cells they are."""

from pathlib import Path

import pandas as pd

from ovqk.records.cells import Cell, Failure
from ovqk.report.opening import ATLAS, CANDIDATES, CLAIMS, FREQUENCIES, STRUCTURE, opening

LOST = Failure("m", "ioi", "b03", "no weights")


def cell(model: str, task: str, **tables: pd.DataFrame) -> Cell:
    return Cell(Path("x"), {"model": model, "task": task}, tables)


def verdicts(*names: str) -> pd.DataFrame:
    heads = [{"kind": "head", "verdict": "unsupported"}]
    return pd.DataFrame([{"kind": "role", "verdict": name} for name in names] + heads)


def test_roles_with_claims_are_counted_by_verdict() -> None:
    cells = [
        cell("a", "ioi", verdicts=verdicts("partial", "corroborated")),
        cell("b", "sva", verdicts=verdicts("partial")),
    ]
    assert opening(cells, [LOST]) == {
        "title": CLAIMS,
        "lead": "2 cells of 2 models and 2 tasks, and 1 cell without results. 3 roles with claimed heads: "
        "1 corroborated and 2 partial.",
    }


def test_without_claims_candidates_are_named_and_frequencies_counted() -> None:
    ranked = cell("a", "ioi", candidates=pd.DataFrame({"role": ["mover"]}))
    found = opening([ranked], [])
    assert found["title"] == CANDIDATES
    assert (
        found["lead"].startswith("1 cell of 1 model and 1 task. No circuit is claimed")
        and "candidates" in found["lead"]
    )
    cycles = pd.DataFrame({"verdict": ["corroborated", "corroborated", "partial", "untestable"]})
    by_frequency = cell("b", "modular_addition", cycles=cycles)
    said = "By frequency, of 4 claims on parts of the model: 2 corroborated, 1 partial and 1 untestable."
    assert opening([by_frequency], []) == {
        "title": FREQUENCIES, "lead": f"1 cell of 1 model and 1 task. {said} {ATLAS}",
    }  # fmt: skip
    both = opening([ranked, by_frequency], [])
    assert both["title"] == CANDIDATES and said in both["lead"]


def test_without_a_task_nothing_is_said_of_candidates() -> None:
    found = opening([cell("a", "none", candidates=pd.DataFrame())], [])
    assert found["title"] == STRUCTURE and "candidates" not in found["lead"] and "task" not in found["lead"]
