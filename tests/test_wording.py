"""What a person reads for roles, nulls and verdicts: one spelling, complete, and the page's too."""

import yaml
from support import ROOT

from ovqk import wording
from ovqk.figures.colours import MODES, VERDICT_COLOURS
from ovqk.metrics import COMPOSITION_METRICS, METRICS
from ovqk.verdicts.verdict import VERDICTS


def test_roles_have_short_names_that_differ() -> None:
    names = wording.short_roles(["name_mover", "negative_name_mover", "induction", "neural_mover", "name_mover"])
    assert names == {"name_mover": "NM", "negative_name_mover": "NNM", "induction": "Ind", "neural_mover": "NM2"}
    assert wording.role("s_inhibition") == "S-inhibition" and wording.role("previous_token") == "previous token"


def test_a_verdict_is_read_with_its_flags_and_a_prediction_with_its_sign() -> None:
    assert wording.verdict("out_of_scope") == "out of scope" and wording.verdict("partial", "") == "partial"
    assert wording.verdict("unsupported", "spectrum") in wording.FLAGS
    assert wording.verdict("consistent") in wording.FLAGS and wording.verdict("consistent", "mixed") in wording.FLAGS
    assert wording.predicted("ov_copying", "low") == "OV copying ↓"
    assert wording.predicted("q_composition", "high") == "Q-composition ↑"


def test_a_noun_takes_an_s_unless_there_is_one() -> None:
    assert [wording.counted(n, "cell") for n in (0, 1, 2)] == ["0 cells", "1 cell", "2 cells"]


def test_nothing_that_is_shown_lacks_its_words() -> None:
    assert tuple(wording.VERDICTS) == VERDICTS == tuple(VERDICT_COLOURS)
    assert wording.MODES.keys() == MODES.keys()
    assert wording.AGAINST.keys() == wording.NULLS.keys() - {"layer_all"}


def test_every_metric_that_ranks_a_bundled_tasks_candidates_is_told_in_words() -> None:
    ranking = set[str]()
    for path in (ROOT / "conf" / "task").glob("*.yaml"):
        for role in (yaml.safe_load(path.read_text(encoding="utf-8")).get("roles") or {}).values():
            predictions = role.get("predictions") or []
            ranking |= {each["metric"] for each in [*predictions[:1], *(p for p in predictions if p.get("ranks"))]}
    assert len(ranking) > 8
    assert {name for name in ranking if name not in wording.RANKED_BY and not METRICS[name].legend} == set()
    assert set(wording.RANKED_BY) <= set(METRICS)


def test_the_page_has_no_words_of_its_own_for_them() -> None:
    once = [
        *wording.NULLS.values(),
        *wording.MODES.values(),
        *(METRICS[name].title for name in COMPOSITION_METRICS),
        *wording.AGAINST.values(),
        *wording.FLAGS.values(),
        *wording.PANELS.values(),
        *wording.SIDES.values(),
        *wording.SUMMED.values(),
        wording.AXES["energy"],
        wording.AXES["offset"],
        wording.CANNOT,
        wording.RANKS,
        *wording.ARROWS.values(),
    ]
    for path in (ROOT / "ovqk" / "report" / "template").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not [words for words in once if f'"{words}"' in text], path.name
