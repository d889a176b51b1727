"""Surrogates are what they say: Haar frames between a head's own singular values, and words alike but for meaning."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from support.commands import compose
from support.models import BUNDLED, local

from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import Circuit, VariableKind
from ovqk.tasks.lookup import WordSet
from ovqk.tasks.matches import RANK_WINDOW, surface_form
from ovqk.tasks.tokenizer import load_tokenizer
from ovqk.tasks.words import Variable, resolve_task
from ovqk.verdicts import frames, surrogates
from ovqk.verdicts.frames import Frames, KeptFrames, gaussian, haar_frames
from ovqk.verdicts.surrogates import FrameDraws, draw_words, first_of_each, subsamples, surrogate_heads

FRAMES = [
    (12, 3, False), (12, 3, True), (12, 5, True), (12, 9, False), (12, 9, True),
    (5, 4, True), (5, 5, False), (2, 1, True),
]  # fmt: skip
"""(d_model, k, centred): by Cholesky in float32 and in float64, by QR, as many as there is room for, the least room."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, d: int, k: int, centred: bool, seed: int = 0) -> torch.Tensor:
    """What the frames of this seed are made of: sixteen numbers at a time, the last ones of a frame left over."""
    g, padded = generator(seed), -(-d * k // 16) * 16
    x = torch.stack([torch.randn(padded, generator=g)[: d * k].view(d, k) for _ in range(count)]).double()
    return x - x.mean(1, keepdim=True) if centred else x


def rounding(d: int, k: int) -> float:
    """What frames are exact to: float32 where they are well conditioned, else float64."""
    return 1e-5 if 4 * k <= d else 1e-10


def within(values: torch.Tensor, wanted: float) -> bool:
    """Whether the mean of independent values is this, within 5 standard errors."""
    return abs(float(values.mean()) - wanted) <= 5 * float(values.std()) / math.sqrt(len(values))


# --- frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "k", "centred"), FRAMES)
def test_frames_are_orthonormal_and_leave_out_what_a_layernorm_cannot_see(d, k, centred) -> None:
    frames = haar_frames(gaussian(20, d, k, generator()), centred)
    small = rounding(d, k)
    assert frames.shape == (20, d, k) and frames.dtype == (torch.float32 if 4 * k <= d else torch.float64)
    frames = frames.double()
    assert torch.allclose(frames.mT @ frames, torch.eye(k, dtype=torch.float64).expand(20, k, k), atol=small)
    assert (float(frames.sum(1).abs().max()) < small) == centred


@pytest.mark.parametrize(("d", "k", "centred"), FRAMES)
def test_both_ways_to_orthonormalise_give_the_one_frame_with_a_positive_triangle(d, k, centred) -> None:
    """Q of the Gaussian with diag(R) > 0 is unique, so Cholesky and QR must agree with it draw by draw."""
    for x, frame in zip(noise(10, d, k, centred), haar_frames(gaussian(10, d, k, generator()), centred), strict=True):
        Q, R = np.linalg.qr(x.numpy())
        assert np.allclose(frame.numpy(), Q * np.sign(np.diag(R)), rtol=0, atol=rounding(d, k))


@pytest.mark.parametrize(("d", "k", "centred"), [(6, 2, False), (6, 2, True), (6, 5, False), (6, 5, True)])
def test_frames_have_the_moments_of_the_haar_measure(d, k, centred) -> None:
    """Of n = d (less one where centred) dimensions, seen from any fixed orthonormal basis of them."""
    n = d - centred
    room = torch.cat([torch.ones(d, 1), torch.randn(d, d - 1, generator=generator(5))], dim=1).double()
    basis = torch.linalg.qr(room).Q[:, 1:] if centred else torch.linalg.qr(room).Q
    q = basis.T @ haar_frames(gaussian(20_000, d, k, generator()), centred).double()  # [draw, n, k]
    assert within(q[:, 0, 0], 0) and within(q[:, 1, 1], 0)
    assert within(q[:, 0, 0].square(), 1 / n) and within(q[:, 1, 1].square(), 1 / n)
    assert within(q[:, 0, 0].pow(4), 3 / (n * (n + 2)))
    assert within(q[:, 0, 0] * q[:, 1, 1], 0) and within(q[:, 0, 0] * q[:, 1, 0], 0)
    assert within((q[:, 0, 0] * q[:, 0, 1]).square(), 1 / (n * (n + 2)))
    assert within((q[:, 0, 0] * q[:, 1, 1]).square(), (n + 1) / ((n - 1) * n * (n + 2)))
    mixed = q[:, 0, 0] * q[:, 1, 1] * q[:, 0, 1] * q[:, 1, 0]
    assert within(mixed, -1 / ((n - 1) * n * (n + 2)))


def test_a_frame_by_cholesky_is_distributed_as_the_first_columns_of_one_by_qr() -> None:
    """The cosine with a fixed plane, by both: their empirical distributions differ by less than chance allows."""
    n = 4000
    found = []
    for k, seed in ((3, 1), (5, 2)):  # of 8 dimensions: by Cholesky, by QR
        frames = haar_frames(gaussian(n, 8, k, generator(seed)), False)[..., :3]
        found.append(frames[:, :2].square().sum((1, 2)).sort().values)
    both = torch.cat(found)
    below = [torch.searchsorted(values, both, right=True) / n for values in found]
    assert float((below[0] - below[1]).abs().max()) < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize(("d", "sigma", "centred"), [
    (12, [3.0, 2.0, 0.5], False), (12, [3.0, 2.0, 0.5], True), (4, [3.0, 2.0, 1.0, 0.0], True), (6, [0.0, 0.0], True),
])  # fmt: skip
def test_a_surrogate_head_has_the_singular_values_of_its_head_and_nothing_else_of_it(d, sigma, centred) -> None:
    values = torch.tensor(sigma, dtype=torch.float64)
    kept = min(len(sigma), d - centred)
    made = surrogate_heads(values, Frames(gaussian(400, d, kept, generator()), centred))
    assert torch.equal(made.sigma, values[:kept].to(made.sigma).expand(200, kept)) and made.rank == kept
    maps = (made.read * made.sigma[:, None, :] @ made.write.mT).double()
    wanted = torch.cat([values, torch.zeros(d - len(sigma), dtype=torch.float64)]).expand(200, d)
    small = 10 * rounding(d, kept)
    assert torch.allclose(torch.linalg.svdvals(maps), wanted, atol=small)
    if centred:  # orthogonal to the all-ones direction on both sides
        assert float(maps.sum(1).abs().max()) < small and float(maps.sum(2).abs().max()) < small
    across = (made.read[:, 0, 0] * made.write[:, 0, 0]) * d  # independent: no read direction knows its write direction
    assert abs(float(across.mean())) < 5 / math.sqrt(200)
    assert not torch.allclose(made.read, made.write)


# --- draws of a head ---------------------------------------------------------------------------------------------


def energy(maps) -> dict[str, torch.Tensor]:
    return {"top": maps.decomposition.balanced_left[:, 0].square().sum(-1)}


def both_sides(maps) -> dict[str, torch.Tensor]:
    return energy(maps) | {"write": maps.decomposition.write[:, 0, 0]}


def draws(
    seed=(0, 1, 2), d: int = 13, k: int = 3, measure=energy, centred: bool = True, kept: KeptFrames | None = None
) -> FrameDraws:
    sigma = torch.arange(k, 0, -1, dtype=torch.float64)
    return FrameDraws(Circuit.ov, sigma, d, centred, measure, seed, kept)


@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("steps", [(7, 30, 60), (25, 50, 60), (1, 2, 3, 60), (60, 10)])
def test_draws_are_the_same_whoever_asks_and_in_whatever_steps(steps, k, monkeypatch) -> None:
    wanted = draws(k=k).first(60)["top"]
    mine = draws(k=k, measure=both_sides)
    for count in steps:
        found = mine.first(count)
        assert len(found["top"]) >= count and set(found) == {"top", "write"}
    assert np.allclose(mine.first(60)["top"], wanted, rtol=1e-12, atol=0)
    monkeypatch.setattr(surrogates, "CHUNK_ELEMENTS", 13 * k * 4)  # four at a time
    assert np.allclose(draws(k=k).first(60)["top"], wanted, rtol=1e-12, atol=0)


def test_no_more_is_drawn_than_asked_for_and_nothing_twice() -> None:
    asked = []

    def measure(maps) -> dict[str, torch.Tensor]:
        asked.append(len(maps.decomposition.read))
        return energy(maps)

    mine = draws(measure=measure)
    mine.first(10), mine.first(10), mine.first(4), mine.first(25)
    assert asked == [10, 15]
    assert len(set(mine.first(25)["top"])) == 25


@pytest.mark.parametrize("k", [16, 48])
def test_draws_do_not_depend_on_the_number_of_threads(k) -> None:
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(draws(d=64, k=k).first(50)["top"])
    finally:
        torch.set_num_threads(1)
    assert np.allclose(*found, rtol=1e-12, atol=0)


def test_several_heads_drawn_side_by_side_get_the_draws_that_each_gets_alone(monkeypatch) -> None:
    seeds = [(0, 1, head, 1, 1, 1) for head in range(3)]
    alone = [draws(seed).first(40)["top"] for seed in seeds]
    monkeypatch.setattr(surrogates, "PART_ELEMENTS", 13 * 3 * 4)  # four at a time
    try:
        torch.set_num_threads(2)
        heads = [draws(seed) for seed in seeds]
        heads[1].first(7)
        together = first_of_each(heads, 40)
    finally:
        torch.set_num_threads(1)
    for one, same in zip(alone, together, strict=True):
        assert np.allclose(one, same["top"], rtol=1e-12, atol=0)
    assert [head.count for head in heads] == [40] * 3


@pytest.mark.parametrize("room", [1.0, 0.4, 0.0])
def test_draws_between_kept_frames_are_the_same_to_the_bit(room, monkeypatch) -> None:
    """All frames are kept, or the first of them, or none."""
    monkeypatch.setattr(surrogates, "PART_ELEMENTS", 13 * 3 * 4)  # four at a time
    made: list[int] = []
    monkeypatch.setattr(frames, "haar_frames", lambda noise, *of: made.append(len(noise)) or haar_frames(noise, *of))
    gram = torch.randn(13, 13, generator=generator(), dtype=torch.float64)
    rows = torch.randn(5, 13, generator=generator())

    def measure(maps) -> dict[str, torch.Tensor]:
        core = maps.decomposition.core(gram).diagonal(dim1=-2, dim2=-1).sum(-1)
        return {"core": core, "score": maps.scores(rows, rows).double().sum((-2, -1))}

    stages_of_draws = (10, 25, 60)
    wanted = draws(measure=measure)
    expected = [wanted.first(count) for count in stages_of_draws][-1]
    every = KeptFrames()
    draws(measure=measure, kept=every).first(60)
    kept = KeptFrames(int(room * every.used))
    for cell in range(3):
        del made[:]
        mine = draws(measure=measure, kept=kept)
        found = [mine.first(count) for count in stages_of_draws][-1]
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert kept.used <= kept.most
        if cell:
            assert {1.0: sum(made) == 0, 0.4: 0 < sum(made) < 120, 0.0: sum(made) == 120}[room]


def test_kept_frames_are_those_of_the_same_seed_sizes_and_place() -> None:
    kept = KeptFrames()
    others = [((1,), 3, True, 40), ((0,), 4, True, 40), ((0,), 3, False, 40), ((0,), 3, True, 30)]
    for seed, k, centred, count in [((0,), 3, True, 40), *others]:
        wanted = draws(seed, k=k, centred=centred).first(count)["top"]
        assert np.array_equal(draws(seed, k=k, centred=centred, kept=kept).first(count)["top"], wanted)


def test_what_failed_to_be_measured_is_not_counted() -> None:
    fails = [True]

    def measure(maps) -> dict[str, torch.Tensor]:
        if fails.pop() if fails else False:
            raise ValueError("no memory")
        return energy(maps)

    mine = draws(measure=measure)
    with pytest.raises(ValueError, match="no memory"):
        mine.first(10)
    assert mine.count == 0
    assert len(mine.first(10)["top"]) == 10 == mine.count
    assert first_of_each([], 10) == []


def test_every_seed_layer_head_circuit_and_form_draws_its_own() -> None:
    plain = draws((0, 1, 2, 1, 1, 1)).first(5)["top"]
    for position in range(6):
        seed = [0, 1, 2, 1, 1, 1]
        seed[position] += 1
        other = draws(seed).first(5)["top"]
        assert not np.isclose(plain, other).any(), position
    assert np.array_equal(plain, draws((0, 1, 2, 1, 1, 1)).first(5)["top"])


# --- words -------------------------------------------------------------------------------------------------------


def words(start: int, n: int) -> WordSet:
    return WordSet([f"w{i}" for i in range(start, start + n)], torch.arange(start, start + n))


def a_set(n: int = 8, options: int = 3) -> Variable:
    """Word i may be replaced by `options` tokens of its own."""
    matches = {i: list(range(100 + options * i, 100 + options * (i + 1))) for i in range(n)}
    band = torch.tensor(sorted(token for found in matches.values() for token in found))
    return Variable("name", VariableKind.set, (words(0, n),), (words(0, n),), band, matches)


def a_contrast(n: int = 10, m: int = 8, band: int = 60) -> Variable:
    tokens = list(range(100, 100 + band))
    read, write = (words(0, n), words(n, n)), (words(40, m), words(60, m))
    matches = dict.fromkeys([*range(2 * n), *range(40, 40 + m), *range(60, 60 + m)], tokens)
    return Variable("number", VariableKind.contrast, read, write, torch.tensor(tokens), matches)


def test_a_set_is_matched_word_by_word_none_twice_on_both_sides_alike() -> None:
    variable = a_set()
    (found,) = draw_words(variable, 300, seed=0)
    assert (found.null, found.reason, len(found.variables)) == ("token", "", 300)
    for drawn in found.variables:
        ids = drawn.read[0].ids.tolist()
        assert [token in variable.matches[word] for word, token in enumerate(ids)] == [True] * 8
        assert len(set(ids)) == 8
        assert drawn.write[0].ids.tolist() == ids and drawn.kind is VariableKind.set
    counts = Counter(int(drawn.read[0].ids[0]) for drawn in found.variables)
    assert set(counts) == {100, 101, 102} and min(counts.values()) > 65  # 100 each; sd 8


def test_words_that_share_their_matches_never_get_the_same_token() -> None:
    shared = list(range(100, 110))
    variable = Variable(
        "name", VariableKind.set, (words(0, 8),), (words(0, 8),), torch.tensor(shared), dict.fromkeys(range(8), shared)
    )
    (found,) = draw_words(variable, 50, seed=0)
    assert len(found.variables) == 50
    assert all(len(set(drawn.read[0].ids.tolist())) == 8 for drawn in found.variables)


@pytest.mark.parametrize("room", [7, 8, 9, 10])
def test_too_few_tokens_are_said_with_the_number_and_the_name(room) -> None:
    """8 words need 8 matched tokens, and 2 more for what is left of the band to be a centre."""
    tokens = list(range(100, 100 + room))
    variable = Variable(
        "name", VariableKind.set, (words(0, 8),), (words(0, 8),), torch.tensor(tokens), dict.fromkeys(range(8), tokens)
    )
    (found,) = draw_words(variable, 3, seed=0)
    assert len(found.variables) == (3 if room == 10 else 0)
    assert found.reason == ("" if room == 10 else "the vocabulary has too few tokens matched to the 8 words of 'name'")


def test_words_that_cannot_all_be_matched_at_once_are_a_reason_too() -> None:
    variable = a_set()
    variable.matches[3] = variable.matches[4] = [101]  # one token for two words
    (found,) = draw_words(variable, 3, seed=0)
    assert found.variables == [] and "too few tokens" in found.reason


def test_a_contrast_is_halved_on_either_side_by_itself() -> None:
    variable = a_contrast()
    halves, pairs = draw_words(variable, 200, seed=0)
    assert (halves.null, pairs.null) == ("token", "token_pairs")
    assert len(halves.variables) == len(pairs.variables) == 200
    crossed = []
    for drawn in halves.variables:
        for side, own in ((drawn.read, variable.read), (drawn.write, variable.write)):
            assert [len(part.ids) for part in side] == [len(part.ids) for part in own]
            together = [int(i) for part in side for i in part.ids]
            assert sorted(together) == sorted(int(i) for part in own for i in part.ids)  # each word once
            for part in side:
                assert part.words == [f"w{i}" for i in part.ids.tolist()]
        minus = [sum(word in own.words for word in part.words)
                 for part, own in ((drawn.read[0], variable.read[0]), (drawn.write[0], variable.write[0]))]  # fmt: skip
        crossed.append(minus)
    stayed = np.array(crossed)
    assert np.allclose(stayed.mean(0), [5, 4], atol=0.4)  # half of each set stays in its half
    assert abs(np.corrcoef(stayed.T)[0, 1]) < 0.2  # of the write words whatever became of the read words
    assert len({tuple(drawn.read[0].ids.tolist()) for drawn in halves.variables}) > 190


def test_a_contrast_that_writes_what_it_reads_is_drawn_on_both_sides_alike() -> None:
    """As the observed value, a surrogate of it reads and writes the same words."""
    one = a_contrast()
    variable = dataclasses.replace(one, write=one.read)
    for words_ in draw_words(variable, 20, seed=0):
        for drawn in words_.variables:
            assert all(torch.equal(a.ids, b.ids) for a, b in zip(drawn.read, drawn.write, strict=True)), words_.null
    for drawn in subsamples(variable, 20, 0.8, seed=0):
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(drawn.read, drawn.write, strict=True))


def test_random_pairs_of_a_contrast_are_other_words_none_twice_on_a_side() -> None:
    variable = a_contrast()
    own = {int(i) for side in (*variable.read, *variable.write) for i in side.ids}
    _, pairs = draw_words(variable, 50, seed=0)
    for drawn in pairs.variables:
        for side, wanted in ((drawn.read, 10), (drawn.write, 8)):
            ids = [int(i) for part in side for i in part.ids]
            assert [len(part.ids) for part in side] == [wanted, wanted]
            assert len(set(ids)) == len(ids) and not set(ids) & own
        assert drawn.kind is VariableKind.contrast


def test_a_contrast_without_matched_tokens_still_has_its_halves() -> None:
    halves, pairs = draw_words(a_contrast(band=21), 5, seed=0)
    assert len(halves.variables) == 5 and pairs.variables == []
    assert "the 20 words of 'number'" in pairs.reason


@pytest.mark.parametrize("variable", [a_set(), a_contrast()], ids=["set", "contrast"])
def test_the_same_seed_draws_the_same_words_and_another_others(variable) -> None:
    def ids(seed: int) -> list[list[int]]:
        drawn = [v for found in draw_words(variable, 10, seed) for v in found.variables]
        return [[int(i) for part in (*v.read, *v.write) for i in part.ids] for v in drawn]

    assert ids(0) == ids(0) and all(a != b for a, b in zip(ids(0), ids(1), strict=True))


@pytest.mark.parametrize("task", ["ioi", "sva", "induction"])
def test_words_drawn_for_a_real_vocabulary_are_alike_in_spelling_and_frequency(task) -> None:
    """Surface form and log id rank of the word replaced; a word of the task only where it is a set's own."""
    tokenizer = load_tokenizer(open_checkpoint(local(BUNDLED)))
    tokens = resolve_task(compose(f"task={task}").task, tokenizer, tokenizer.get_vocab_size(), "x")
    variable = tokens.variables[0]
    barred = {int(i) for side in (*variable.read, *variable.write) for i in side.ids}
    whole = set(variable.band.tolist())
    own_too = barred if variable.kind is VariableKind.set else set()
    lone = {word for word, found in variable.matches.items() if set(found) == whole}  # too few of its own
    assert len(lone) < len(variable.matches) / 2
    found = draw_words(variable, 20, seed=3)[-1]
    assert found.variables or found.reason
    for drawn in found.variables:
        for own, other in zip((*variable.read, *variable.write), (*drawn.read, *drawn.write), strict=True):
            for word, token in zip(own.ids.tolist(), other.ids.tolist(), strict=True):
                assert token in whole | own_too and (token not in barred or token in own_too)
                if word not in lone and not tokens.notes:
                    spelled = [surface_form(tokenizer.id_to_token(i)) for i in (word, token)]
                    assert spelled[0] == spelled[1]
                    assert abs(math.log((token + 1) / (word + 1))) <= RANK_WINDOW + 1e-12


def test_subsamples_keep_their_share_of_a_set_on_both_sides_alike() -> None:
    found = subsamples(a_set(n=21), 200, 0.8, seed=0)
    assert len(found) == 200
    for drawn in found:
        ids = drawn.read[0].ids.tolist()
        assert len(ids) == 17 and len(set(ids)) == 17 and set(ids) <= set(range(21))
        assert drawn.write[0].ids.tolist() == ids and drawn.read[0].words == [f"w{i}" for i in ids]
    counts = Counter(i for drawn in found for i in drawn.read[0].ids.tolist())
    assert all(abs(counts[i] - 200 * 17 / 21) < 30 for i in range(21))
    assert [d.read[0].ids.tolist() for d in found] == [
        d.read[0].ids.tolist() for d in subsamples(a_set(n=21), 200, 0.8, seed=0)
    ]
    assert found[0].read[0].ids.tolist() != subsamples(a_set(n=21), 1, 0.8, seed=1)[0].read[0].ids.tolist()


def test_subsamples_of_a_contrast_keep_pairs_of_words_together() -> None:
    read_and_write = set()
    for drawn in subsamples(a_contrast(), 50, 0.8, seed=0):
        minus, plus = (part.ids.tolist() for part in drawn.read)
        assert len(minus) == 8 and [i + 10 for i in minus] == plus
        left, right = (part.ids.tolist() for part in drawn.write)
        assert len(left) == 6 and [i + 20 for i in left] == right
        read_and_write.add(tuple(i for i in range(8) if i in minus) == tuple(i - 40 for i in left))
    assert read_and_write != {True}  # the sides are drawn apart


def test_a_subsample_never_keeps_fewer_than_two_words() -> None:
    assert {len(drawn.read[0].ids) for drawn in subsamples(a_set(n=3), 5, 0.1, seed=0)} == {2}
