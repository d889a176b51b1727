"""The copy score in blocks, against a plain ranking of the whole vocabulary."""

from collections.abc import Sequence

import pytest
import torch
from support.top import in_top_by_source

from ovqk.circuits import alignment
from ovqk.circuits.alignment import TOP
from ovqk.circuits.factors import Factors
from ovqk.config.schema import Circuit

D_MODEL, D_HEAD = 8, 3


Case = tuple[Factors, torch.Tensor, torch.Tensor, torch.Tensor]
"""A map, the rows of the words, their ids, and W_U."""


def plain(factors: Factors, rows: torch.Tensor, ids: torch.Tensor, W_U: torch.Tensor) -> list[torch.Tensor]:
    """1 where fewer than 5 tokens lie strictly above (below) the word's own; 0 for a head that writes on none."""
    logits = (rows @ factors.left) @ factors.right @ W_U  # [head, word, token]
    own = logits[:, torch.arange(len(ids)), ids]
    alive = (own.abs().sum(1, keepdim=True) > 0).double()
    copied, suppressed = (logits > own[..., None]).sum(-1) < TOP, (logits < own[..., None]).sum(-1) < TOP
    return [copied * alive, suppressed * alive]


def random(n_tokens: int, n_words: int, seed: int = 0, heads: int = 4) -> Case:
    """Integers, so that ties are ties whatever the order of summation."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    factors = Factors(Circuit.ov, integers(heads, D_MODEL, D_HEAD), integers(heads, D_HEAD, D_MODEL))
    ids = torch.randperm(n_tokens, generator=generator)[:n_words]
    return factors, integers(n_words, D_MODEL), ids, integers(D_MODEL, n_tokens)


def same(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a.double(), b.double()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("n_tokens", [4, 5, 6, 15, 16, 17, 31, 33, 100])
def test_the_blocks_are_a_plain_ranking_of_the_whole_vocabulary_with_its_ties(n_tokens, monkeypatch) -> None:
    """Blocks of 16 tokens, and vocabularies that end on either side of a block."""
    monkeypatch.setattr(alignment, "TOP_BLOCK", 16)
    seen = set()
    for seed in range(20):
        factors, rows, ids, W_U = random(n_tokens, min(n_tokens, 6), seed)
        wanted = plain(factors, rows, ids, W_U)
        assert same(in_top_by_source(factors, rows, ids, W_U.T), wanted)
        seen |= {float(value) for side in wanted for value in side.unique()}
    assert n_tokens <= 6 or seen == {0.0, 1.0}


def test_the_size_of_the_blocks_changes_nothing(monkeypatch) -> None:
    factors, rows, ids, W_U = random(3000, 40)
    wanted = plain(factors, rows, ids, W_U)
    for size in (1, 7, 1024, 3000, 5000):
        monkeypatch.setattr(alignment, "TOP_BLOCK", size)
        assert same(in_top_by_source(factors, rows, ids, W_U.T), wanted)


@pytest.mark.parametrize("place", [0, 15, 16, 31, 39])
@pytest.mark.parametrize("above", [4, 5])
def test_the_fifth_is_in_the_top_and_the_sixth_is_not_wherever_the_better_ones_stand(place, above, monkeypatch) -> None:
    """One word, whose own token and whose betters lie in any block; the rest of the vocabulary lies below."""
    monkeypatch.setattr(alignment, "TOP_BLOCK", 16)
    factors = Factors(Circuit.ov, torch.eye(2)[None], torch.eye(2)[None])
    W_U = torch.zeros(2, 40)
    W_U[0] = -torch.arange(1.0, 41)
    others = [i for i in range(40) if i != place]
    W_U[0, place] = 1
    for start in (others[:above], others[-above:], others[::8][:above]):
        columns = W_U.clone()
        columns[0, start] = 2
        copied, suppressed = in_top_by_source(factors, torch.tensor([[1.0, 0]]), torch.tensor([place]), columns.T)
        assert (float(copied), float(suppressed)) == (float(above == 4), 0)
        flipped = in_top_by_source(factors, torch.tensor([[-1.0, 0]]), torch.tensor([place]), columns.T)
        assert [float(side) for side in flipped] == [0, float(above == 4)]


def test_equals_of_a_words_own_logit_do_not_push_it_down() -> None:
    """Of six tokens with one column, each is as good as the first: strictly larger logits alone count."""
    factors = Factors(Circuit.ov, torch.eye(2)[None], torch.eye(2)[None])
    W_U = torch.zeros(2, 30)
    W_U[0, 10:16] = 1
    copied, suppressed = in_top_by_source(factors, torch.ones(1, 2), torch.tensor([12]), W_U.T)
    assert (float(copied), float(suppressed)) == (1, 0)


def test_a_word_never_outranks_itself_by_its_own_rounding() -> None:
    """Its own logit is summed once, and compared with itself in its block by that same value."""
    generator = torch.Generator().manual_seed(0)
    factors = Factors(
        Circuit.ov, torch.randn(3, 64, 8, generator=generator), torch.randn(3, 8, 64, generator=generator)
    )
    W_U = torch.randn(64, 5, generator=generator)
    ids = torch.arange(5)
    copied, suppressed = in_top_by_source(factors, torch.randn(5, 64, generator=generator), ids, W_U.T)
    assert bool((copied == 1).all()) and bool((suppressed == 1).all())  # of 5 tokens each is in the top 5


def test_a_head_that_writes_nothing_copies_nothing() -> None:
    factors, rows, ids, W_U = random(50, 6)
    left = factors.left.clone()
    left[1] = 0
    copied, suppressed = in_top_by_source(Factors(Circuit.ov, left, factors.right), rows, ids, W_U.T)
    assert not copied[1].any() and not suppressed[1].any()
    assert same((copied[[0, 2, 3]], suppressed[[0, 2, 3]]), tuple(
        side[[0, 2, 3]] for side in plain(factors, rows, ids, W_U)))  # fmt: skip


def test_a_contrast_without_a_direction_is_told_from_a_small_one() -> None:
    rows = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert alignment.same_mean(rows, rows.flip(0)) and alignment.same_mean(0 * rows, 0 * rows)
    assert not alignment.same_mean(rows, rows + 1e-3)
    assert float(alignment.unit_contrast(rows, rows + 1e-3).norm()) == pytest.approx(1)


@pytest.mark.parametrize("n_tokens", [6, 1500])
def test_a_head_that_copies_and_its_negative(n_tokens) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(n_tokens, 32, generator=generator), dim=1)
    ids = torch.arange(0, n_tokens, max(1, n_tokens // 6))[:6]
    eye = torch.eye(32)
    factors = Factors(Circuit.ov, torch.stack([eye, -eye]), torch.stack([eye, eye]))
    copied, suppressed = in_top_by_source(factors, rows[ids], ids, rows)
    assert copied.mean(1).tolist()[0] == 1 and suppressed.mean(1).tolist()[1] == 1
    if n_tokens > 6:
        assert copied.mean(1).tolist()[1] == 0 and suppressed.mean(1).tolist()[0] == 0


def test_a_bias_of_the_columns_moves_the_raw_score_and_not_task_auc() -> None:
    """What a target's logit gets from every source alike is no copying."""
    logits = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = 5 * torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (plain, plain_raw), (biased, biased_raw) = (alignment.task_auc_by_source(x) for x in (logits, logits + bias))
    assert torch.equal(plain, biased)
    assert (plain_raw.mean(-1) - biased_raw.mean(-1)).abs().max() > 0.05
