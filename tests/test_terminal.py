"""What a person reads of a cell: whose claims, which heads, which pairs; nothing that is not there."""

import io
import math
import re

import pandas as pd
import pytest
from rich.console import Console
from support.models import BUNDLED

from ovqk import wording
from ovqk.metrics import METRICS, shown_in
from ovqk.report.terminal import claims_line, print_pairs, words_lines
from ovqk.report.terminal_tables import (
    candidate_table,
    claimed_pairs,
    column_legend,
    found_line,
    layer_table,
    pair_table,
    ranking_legend,
    reasons,
    shown_columns,
    sweep_candidate_table,
    verdict_table,
    virtual_table,
)


def printed(table, width: int = 200) -> list[str]:
    out = Console(width=width, file=io.StringIO())
    out.print(table)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def test_claims_of_another_model_are_said_to_be_applied() -> None:
    claims = {"of": "gpt2", "source": "a paper", "reliability": "published"}
    assert claims_line(claims, "gpt2") == "Claims: a paper (published)"
    assert claims_line(claims | {"note": "n"}, "copy") == "Claims of gpt2, applied to copy: a paper (published) - n"


HEADS = pd.DataFrame({"layer": [0], "head": [0], "ov_copying": [0.5]})


def a_verdict(**changes) -> dict:
    plain = {
        "kind": "role", "role": "name_mover", "layer": None, "head": None, "verdict": "partial",
        "primary": "ov_copying", "prediction": "high", "value": 0.5, "percentile": None, "q": 0.01,
        "flags": "", "reason": "",
    }  # fmt: skip
    return plain | changes


def test_a_role_that_predicts_nothing_has_no_metric_beside_one_that_does() -> None:
    nothing = a_verdict(role="bystander", verdict="out_of_scope", primary=None, prediction=None, value=None, q=None)
    lines = printed(verdict_table(HEADS, pd.DataFrame([a_verdict(), nothing])))
    assert any(line.startswith("name mover: ov_copying ↑") for line in lines)
    assert any(line.startswith("bystander  ") for line in lines) and not any("nan" in line for line in lines)


def test_a_verdicts_words_stay_on_one_line_if_the_first_column_can_give_way() -> None:
    verdicts = pd.DataFrame([a_verdict(verdict="consistent", role="a role of many words and a long name")])
    for width in range(60, 100):
        lines = printed(verdict_table(HEADS, verdicts), width)
        assert sum("consistent only" in line for line in lines) == 1, width


def test_roles_are_listed_by_verdict_strongest_first() -> None:
    columns = ("kind", "role", "verdict", "flags")
    rows = [("role", "name_mover", "partial", ""), ("role", "induction", "consistent", ""),
            ("role", "previous_token", "corroborated", None), ("head", "induction", "partial", "")]  # fmt: skip
    said = found_line(pd.DataFrame([dict(zip(columns, row, strict=True)) for row in rows]))
    assert said == ("Found: corroborated: previous token; partial: name mover; consistent only: induction.")


def test_one_reason_for_two_verdicts_is_told_for_each() -> None:
    rows = [a_verdict(reason="r"), a_verdict(kind="head", layer=1, head=2, verdict="unsupported", reason="r")]
    told = list(reasons(HEADS, pd.DataFrame([*rows, rows[1] | {"role": "other"}])))
    assert told[-2:] == ["partial (name mover): r", "unsupported (1.2): r"]


def test_a_bound_that_holds_alone_is_said_to_be_one_beside_a_q_below_it() -> None:
    """In the table: q = 0.14, which is below what is impossible alone."""
    bound = f"{wording.ALONE} q = 0.36 under depth, whatever its value"
    told = list(reasons(HEADS, pd.DataFrame([a_verdict(q=0.14, reason=bound)])))[-1]
    assert told == f"partial (name mover): {bound}; beside others that stand out as much, q may be less"
    assert wording.reason("not tested under layer") == "not tested under layer"


def test_only_columns_that_are_shown_are_explained() -> None:
    verdicts = pd.DataFrame([a_verdict()])
    assert not any("align" in line or "position:" in line for line in reasons(HEADS, verdicts))
    assert not any("unsupported:" in line for line in reasons(HEADS, verdicts))
    shown = HEADS.assign(qk_matching=0.1, qk_symmetry=0.1, qk_key_alignment=1.0)
    told = " ".join(reasons(shown, verdicts))
    assert "QK align: key side" in told and "OV align" not in told and "position:" not in told
    assert f"partial: {wording.FLAGS['partial']}." in told  # a verdict whose name does not say enough


def test_words_that_stay_are_counted_beside_those_left_out() -> None:
    words = {"kept": {"a": 41, "b": 8}, "reasons": {"a": {"x": "not one token here"}, "b": {}}}
    assert words_lines(words) == ["1 word of 'a' is left out: not one token here", "41 words of 'a' are read"]


def test_each_column_of_a_table_without_claims_is_explained() -> None:
    metrics = {*shown_in("column"), *shown_in("residual column")}
    heads = pd.DataFrame([{"layer": 0, "head": 0} | dict.fromkeys(metrics, 1.0)])
    titles = [title for title, _ in shown_columns(heads)]
    assert layer_table(heads).titles(200) == ["layer", *titles]
    legend = column_legend(heads, titles)
    assert all(re.search(rf"(^|\. |, ){re.escape(title)}[:,]", legend) for title in titles) and len(titles) >= 5
    assert all(METRICS[name].legend for name in shown_in("residual column"))


def candidates(role: str, heads: list[str], **changes) -> list[dict]:
    plain = {"metric": "ov_task_auc", "prediction": "high", "partners": "", "primary": True, "ranked": True,
             "value": 0.9, "percentile": 1.0, "z": 3.25, "gap": 0.5, "beside": ""}  # fmt: skip
    places = [(int(name[0]), int(name[2])) for name in heads]
    return [
        plain | {"role": role, "rank": rank, "layer": layer, "head": head} | changes
        for rank, (layer, head) in enumerate(places, start=1)
    ]


def test_roles_with_the_same_candidates_by_the_same_metric_are_one() -> None:
    rows = [
        *candidates("name_mover", ["1.0", "2.3"]),
        *candidates("backup_name_mover", ["1.0", "2.3"]),
        *candidates("negative", ["1.0", "2.3"], prediction="low"),
        *candidates("previous_token", ["0.1"], metric="k_composition", partners="3.0 3.4"),
        *candidates("other", ["0.1"], primary=False),
        *candidates("other", ["0.1"], metric="ov_task_copy", ranked=False),
    ]
    lines = printed(candidate_table(pd.DataFrame(rows)))
    assert sum("1.0" in line for line in lines) == 2 and not any("ov_task_copy" in line for line in lines)
    for start in ("name mover, backup name mover", "negative"):
        assert sum(line.startswith(start) for line in lines) == 1
    assert any("k_composition ↑ with 3.0 3.4" in line for line in lines)
    assert any("ov_task_auc ↑ (not its primary)" in line for line in lines)


def test_models_of_a_sweep_stand_beside_each_other_under_each_role() -> None:
    both = pd.DataFrame([*candidates("name_mover", ["1.0"]), *candidates("induction", ["2.3"], on_prompts="realised")])
    lines = printed(sweep_candidate_table([("ioi", "one", both), ("ioi", "two", both), ("sva", "one", both)]))
    assert [line.split()[:1] + line.split("  ")[-1:] for line in lines[1:]] == [
        ["ioi", "1.0 (0.90)"], ["ioi", "1.0 (0.90)"], ["ioi", "2.3 (0.90) realised"], ["ioi", "2.3 (0.90) realised"],
        ["sva", "1.0 (0.90)"], ["sva", "2.3 (0.90) realised"],
    ]  # fmt: skip
    assert ["one" in line.split() for line in lines[1:]] == [True, False, True, False, True, True]


def test_analyses_that_name_the_same_candidates_share_a_row_in_a_sweep() -> None:
    one, other = candidates("name_mover", ["1.0"]), candidates("name_mover", ["1.1"])
    lines = printed(sweep_candidate_table([("ioi", "m", pd.DataFrame(rows)) for rows in (one, one, other)]))
    assert [line.split("  ")[-1] for line in lines[1:]] == ["1.0 (0.90)", "1.1 (0.90)"]


def test_candidates_show_how_far_they_stand_out_and_no_p() -> None:
    title, line = printed(candidate_table(pd.DataFrame(candidates("reader", ["1.0"], p_spectrum_all=0.1, q_depth=1.0))))
    assert title.split()[-4:] == ["z", "gap", "in", "layer"] and line.split()[-3:] == ["3.2", "0.50", "100%"]


def test_columns_that_no_candidate_fills_are_left_out() -> None:
    title, _ = printed(candidate_table(pd.DataFrame(candidates("suppression", ["1.0"], z=math.nan, gap=math.nan))))
    assert "gap" not in title.split() and "z" not in title.split()
    none, hidden = (
        candidates("suppression", ["1.0"], ranked=shown, z=z) for shown, z in ((True, math.nan), (False, 3.0))
    )
    title, _ = printed(candidate_table(pd.DataFrame([*none, *hidden])))
    assert "z" not in title.split(), "only a row that is not shown has one"


def test_what_ranks_the_shown_candidates_is_explained_once() -> None:
    together = {"metric": "qk_composed_margin", "beside": "ov_copying_block0 ↑"}
    rows = [
        *candidates("induction", ["1.0", "1.1"], **together),
        *candidates("x", ["0.1"], metric="ov_task_copy", ranked=False),
    ]
    said = ranking_legend([pd.DataFrame(rows)] * 2)
    assert said.startswith("qk_composed_margin: how far a token's score") and said.count("qk_composed_margin") == 1
    assert "ov_copying_block0: 1 if attending to a token" in said and "ov_task_copy" not in said


def test_a_head_that_ties_with_one_that_is_not_shown_says_so() -> None:
    tied = pd.DataFrame(candidates("mover", ["1.0"], gap=0.0))
    assert printed(sweep_candidate_table([("ioi", "m", tied)]))[1].endswith("1.0 (0.90), others tie")


def test_metrics_that_rank_together_are_named_together() -> None:
    both = pd.DataFrame(candidates("induction", ["1.0"], beside="qk_composed_margin ↑"))
    assert "ov_task_auc ↑ and qk_composed_margin ↑ (worse place)" in " ".join(printed(candidate_table(both)))


def test_the_strongest_pairs_of_each_mode_and_virtual_heads_are_shown_with_their_matching() -> None:
    place = {"sender_layer": 0, "receiver_layer": 2, "receiver_head": 7}
    pairs = pd.DataFrame([
        place | {"mode": mode, "sender_head": i, "score": i / 10, "score_above_random": i / 10,
                 "percentile": 0.5, "matching": 0.77 if mode == "k" else None}
        for mode in "qkv" for i in range(8)
    ])  # fmt: skip
    lines = printed(pair_table(pairs))
    assert [line.split()[:3] for line in lines if line[:1] in "QKV"] == [[m, "0.7", "2.7"] for m in "QKV"]
    assert sum("0.77" in line for line in lines) == 5 and len(lines) == 16
    virtual = pairs.assign(frobenius_share=0.25, ov_copying=-0.5)
    assert "0.7" in printed(virtual_table(virtual))[1] and "25%" in printed(virtual_table(virtual))[1]


def test_pairs_of_claimed_heads_stand_apart_with_their_roles(tmp_path) -> None:
    rows = [("k", 0, 1, 3, 0, 0.2), ("k", 0, 2, 3, 0, 0.9), ("q", 0, 1, 2, 2, 0.8), ("k", 0, 1, 1, 4, 0.9)]
    columns = ["mode", "sender_layer", "sender_head", "receiver_layer", "receiver_head", "score"]
    pairs = pd.DataFrame(rows, columns=columns).assign(score_above_random=0.1, percentile=0.5, matching=None)
    claimed = [("previous_token", 0, 1), ("previous_token", 1, 4), ("induction", 3, 0)]
    verdicts = pd.DataFrame([a_verdict(), *(a_verdict(kind="head", role=r, layer=x, head=y) for r, x, y in claimed)])
    found = claimed_pairs(pairs, verdicts)
    assert found["score"].tolist() == [0.2]
    assert "previous token to induction" in printed(pair_table(found))[1]
    assert not len(claimed_pairs(pairs, None))
    tables = {
        "composition": pairs,
        "verdicts": verdicts,
        "virtual_heads": pairs.assign(frobenius_share=1, ov_copying=1),
    }
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    out = Console(width=200, file=io.StringIO())
    print_pairs(out, tmp_path)
    assert "Strongest compositions between heads claimed for different roles" in out.file.getvalue()


@pytest.mark.parametrize("analysis", ["b03", "composition"])
def test_a_cell_shows_what_its_analysis_is_about_and_the_command_that_goes_on(analysis, cli) -> None:
    local = ("model=local", f"model.path={BUNDLED}", "model.name=twin", "model.claims=mini-attn")
    code, text = cli(f"analysis={analysis}", *local, "nulls.draws=19", "tracking=none")
    assert code == 0
    composed = analysis == "composition"
    assert ("Strongest compositions" in text) == ("Strongest virtual heads" in text) == composed
    assert ("['composition'])" in text) == composed
    assert (
        ("OV copying" in text and "eigenvalues over the vocabulary" in text)
        == ("QK singular 0 (sigma" in text)
        == (not composed)
    )
    assert "Claims of mini-attn, applied to twin:" in text
    # of a cell of ioi: the other tasks that claim heads of mini-attn
    assert "model.name=twin model.claims=mini-attn task=induction,sva" in text
