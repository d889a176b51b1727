"""Lists of tokens as lines of text that a terminal may show."""

import torch
from support.token_tables import random, table, word_level

from ovqk.config.schema import Circuit
from ovqk.report.token_lists import describe
from ovqk.structure.spelling import Spelling


def test_the_table_spells_its_tokens_and_lines_escape_what_a_terminal_would_obey() -> None:
    words = ["\x1b[31m", "\u202eevil", " x", "a'b", "[/red]", "Ġ" * 50, "\u2028", "\n"]
    tokenizer = word_level(words)
    left, right = random(8, 3, seed=0), random(3, 8, seed=1)
    rows = table(left, right, random(8, 8, seed=2), random(8, 8, seed=3), tokenizer=tokenizer)
    spelling = Spelling(tokenizer)
    assert rows["token"].tolist() == [spelling(i) for i in rows["token_id"]]
    assert set(rows["token"]) == {spelling(i) for i in range(8)}
    lines = describe(rows, 0, 0, shown=8)
    assert len(lines) == rows.groupby(["kind", "component"]).ngroups
    assert all(line.isprintable() for line in lines)
    for escaped in ("'\\x1b[31m'", "'\\u202eevil'", "' x'", '"a\'b"', "'[/red]'", "'\\u2028'", "'\\n'"):
        assert escaped in lines[0], escaped
    assert f"' {'Ġ' * 29}…'" in lines[0]  # as much as one line can take of a token


def test_lines_say_query_and_key_and_show_as_many_tokens_as_asked() -> None:
    E = torch.eye(10).double()
    rows = table(E[:, [3]] * -2, E[[3]], E, circuit=Circuit.qk)
    assert describe(rows, 0, 0, shown=1) == [
        "QK singular 0 (sigma 2): queries '#3' | not '#0' -> keys '#0' | not '#3'",
        "QK eigen 0 of the residual space (lambda -2): queries '#3' | not '#0' -> avoid keys '#3' | not '#0'",
    ]
    assert describe(rows, 0, 0, shown=2)[0].count("'#") == 8
    assert describe(rows, 1, 0) == describe(rows, 0, 1) == []
    turned = table(E[:, :2], torch.stack((E[1] - E[0], -E[0] - E[1])), E, E)
    assert (
        describe(turned, 0, 0, shown=1)[-1]
        == "OV eigen 0 of the residual space (lambda -1 ± 1i, a plane): reads '#0' (1.0) -> writes '#0' (1.0)"
    )
