"""Heads planted by hand are found, and heads that are not planted are not: what the verdicts are worth."""

import pandas as pd
import pytest
import torch
from torch import Tensor

from ovqk.testing.null_models import POWER_SHAPES, power_run, tail
from ovqk.testing.planted import (
    FEW,
    LAYOUT,
    MANY,
    N_CTX,
    SHAPES,
    PlantedModel,
    judged,
    planted,
    tokenizer_of,
    word_sets,
)

COMPOSED = {"s_inhibition"}
"""Roles whose primary is a composition, which is tested for the role as a whole: their heads are untestable."""
LEAST = {("head", "previous_token"): 0.8, ("role", "previous_token"): 0.85}
"""Less than is asked of others: under rotary positions a random query bias is all that is planted of such a head."""
SEEDS = 50


def first(role: str, task: str = "ioi") -> tuple[int, int]:
    return LAYOUT[task][role][0]


def names(model: PlantedModel) -> Tensor:
    return model.W_E[model.ids("names")]


def own_above(scores: Tensor) -> float:
    """How often a row's own column exceeds another column."""
    own = scores.diagonal()[:, None]
    return float((own > scores).sum() / (scores.numel() - len(scores)))


# --- what is planted ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(SHAPES))
def ioi(request) -> PlantedModel:
    return planted(request.param, "ioi", seed=1)


@pytest.fixture(scope="module", params=list(SHAPES))
def sva(request) -> PlantedModel:
    return planted(request.param, "sva", seed=1)


def test_a_name_mover_writes_the_name_it_reads_and_a_negative_one_its_opposite(ioi) -> None:
    for role, least, most in (("name_mover", 0.9, 1), ("negative_name_mover", 0, 0.1)):
        logits = names(ioi) @ ioi.read("W_V", first(role)) @ ioi.read("W_O", first(role)) @ ioi.W_U[:, ioi.ids("names")]
        assert least <= own_above(logits) <= most, role


def test_a_duplicate_token_head_looks_for_its_own_token(ioi) -> None:
    head = first("duplicate_token")
    assert own_above(names(ioi) @ ioi.read("W_Q", head) @ (names(ioi) @ ioi.read("W_K", head)).T) > 0.9


def test_a_previous_token_head_looks_one_back(ioi) -> None:
    layer, head = first("previous_token")
    if ioi.W_pos is not None:
        scores = ioi.W_pos @ ioi.read("W_Q", (layer, head)) @ (ioi.W_pos @ ioi.read("W_K", (layer, head))).T
        assert own_above(scores[1:, :-1]) > 0.9
        return
    weights = ioi.layers[layer]
    cos, sin = weights.rotary.angles(torch.arange(N_CTX))
    query, key = weights.b_Q[head], weights.b_K[ioi.architecture.kv_of_head[head]]
    assert int((weights.rotary.rotate(query[None], cos, sin) @ key).argmax()) == 1


def test_an_induction_head_looks_for_what_came_after_its_own_token(ioi) -> None:
    previous, head = first("previous_token"), first("induction")
    moved = names(ioi) @ ioi.read("W_V", previous) @ ioi.read("W_O", previous)
    assert own_above(names(ioi) @ ioi.read("W_Q", head) @ (moved @ ioi.read("W_K", head)).T) > 0.9
    everything = ioi.W_E @ ioi.read("W_V", head) @ ioi.read("W_O", head) @ ioi.W_U
    assert own_above(everything) > 0.7  # five times as many tokens as dimensions


def test_an_s_inhibition_head_writes_where_the_name_movers_read(ioi) -> None:
    receiver = ioi.read("W_Q", first("name_mover"))

    def composition(writes: Tensor) -> float:
        return float((writes @ receiver).norm() / writes.norm() / receiver.norm())

    layer, head = first("s_inhibition")
    assert composition(ioi.read("W_O", (layer, head))) > 2 * composition(ioi.read("W_O", (layer, head + 1)))


def test_agreement_heads_read_the_number_of_nouns_and_write_that_of_verbs(sva) -> None:
    few, many = (sva.W_E[sva.ids(f"nouns_{number}")].mean(0) for number in ("singular", "plural"))
    direction = (many - few) / (many - few).norm()
    reader = sva.read("W_V", first("agreement_reader", "sva"))
    assert (direction @ reader).norm() == pytest.approx(float(reader.norm()), rel=1e-5)
    head = first("agreement_output", "sva")
    written = (many - few) @ sva.read("W_V", head) @ sva.read("W_O", head) @ sva.W_U
    verbs = {number: written[sva.ids(f"verbs_{number}")] for number in ("singular", "plural")}
    assert (verbs["plural"][:, None] > verbs["singular"]).float().mean() > 0.9


@pytest.mark.parametrize("shape", list(SHAPES))
def test_noise_of_one_leaves_the_random_model_and_planting_leaves_norms(shape) -> None:
    clean, noisy = planted(shape, "ioi", seed=1), planted(shape, "ioi", seed=1, noise=1.0)
    matrices = ("W_Q", "W_K", "W_V", "W_O")
    for made, left, drawn in zip(clean.layers, noisy.layers, clean.drawn, strict=True):
        for name in (*matrices, "b_Q", "b_K"):
            assert torch.equal(getattr(left, name), getattr(drawn, name)), name
        for name in matrices:
            norms = [getattr(layer, name).norm(dim=(1, 2)) for layer in (made, drawn)]
            torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
    assert not torch.equal(clean.layers[0].W_Q, clean.drawn[0].W_Q)


def test_every_word_is_one_token_and_has_its_lookalikes() -> None:
    tokenizer = tokenizer_of("ioi", 10)
    ids = [tokenizer.encode(f" {word}").ids for word in word_sets("ioi")["names"]]
    assert all(len(found) == 1 and found[0] > 0 for found in ids)
    (mary,), near = ids[0], tokenizer.id_to_token
    assert all(near(mary + step).istitle() and len(near(mary + step)) == 4 for step in range(-5, 6))


# --- what is found ------------------------------------------------------------------------------------------------


def outcomes(verdicts: pd.DataFrame) -> pd.DataFrame:
    """(kind, role) -> the share of each verdict, over all that are planted."""
    return verdicts.groupby(["kind", "role"])["verdict"].value_counts(normalize=True).unstack(fill_value=0.0)


def assert_found(verdicts: pd.DataFrame, task: str, least: float) -> None:
    """Every role and every head is corroborated, but for heads whose role alone is tested."""
    shares = outcomes(verdicts)
    assert set(shares.index) == {(kind, role) for kind in ("role", "head") for role in LAYOUT[task]}
    for kind, role in shares.index:
        wanted = "untestable" if kind == "head" and role in COMPOSED else "corroborated"
        enough = min(least, LEAST.get((kind, role), 1.0))
        assert shares.loc[(kind, role)].get(wanted, 0) >= enough, f"{kind} {role}: {shares.loc[(kind, role)].to_dict()}"


@pytest.mark.parametrize(
    ("shape", "task", "seed"),
    [("learned positions", "ioi", 0), ("rotary, grouped queries", "sva", 1), ("rotary positions", "ioi", 2)],
)
def test_planted_heads_are_found(shape, task, seed) -> None:
    assert_found(power_run((shape, task, seed, 0.0, MANY)), task, least=1)


def test_beside_few_groups_of_heads_a_planted_head_and_its_role_are_corroborated() -> None:
    """Layers of three KV groups: the window of `depth` grows until it holds enough of them."""
    shares = outcomes(power_run(("rotary, grouped queries", "ioi", 0, 0.0, FEW)))
    assert (shares.loc["role"]["corroborated"] == 1).all()
    assert (shares.loc["head"].drop(COMPOSED)["corroborated"] >= 2 / 3).all()


@pytest.mark.parametrize("shape", POWER_SHAPES)
def test_margins_put_planted_heads_first_and_their_negatives_last(shape) -> None:
    heads = judged(planted(shape, "ioi", 3), LAYOUT["ioi"], draws=1).tables["heads"]

    def first(metric: str, ascending: bool) -> set[tuple[int, int]]:
        return set(heads.sort_values(metric, ascending=ascending).head(3)[["layer", "head"]].itertuples(False, None))

    assert first("ov_task_margin", ascending=True) == set(LAYOUT["ioi"]["negative_name_mover"])
    assert first("ov_task_margin", ascending=False) == set(LAYOUT["ioi"]["name_mover"])
    assert first("qk_task_margin", ascending=False) == set(LAYOUT["ioi"]["duplicate_token"])


def test_composition_into_induction_heads_does_not_say_where_a_head_looks() -> None:
    """Why it is no primary of previous-token heads: it is significant for heads whose queries and keys are random."""
    found = {}
    for looks in (True, False):
        model = planted("learned positions", "ioi", 0)
        for layer, head in () if looks else LAYOUT["ioi"]["previous_token"]:
            group = int(model.architecture.kv_of_head[head])
            for name, index in (("W_Q", head), ("b_Q", head), ("W_K", group), ("b_K", group)):
                getattr(model.layers[layer], name)[index] = getattr(model.drawn[layer], name)[index]
        tests = judged(model, LAYOUT["ioi"], draws=1).tables["tests"]
        rows = tests[(tests["role"] == "previous_token") & tests["head"].isna() & (tests["null"] == "layer")]
        found[looks] = rows.set_index("metric")["p"]
    assert found[True]["k_composition"] == found[False]["k_composition"] < 0.01
    assert found[True]["qk_simulated_previous"] < 0.01 < found[False]["qk_simulated_previous"]


@pytest.mark.slow
@pytest.mark.parametrize("task", list(LAYOUT))
@pytest.mark.parametrize("shape", POWER_SHAPES)
def test_planted_heads_are_found_in_95_of_100(many_cells, shape, task) -> None:
    """Roles and single heads, in layers with heads enough to tell one from."""
    cells = [(shape, task, seed, 0.0, MANY) for seed in range(SEEDS)]
    verdicts = pd.concat(many_cells(power_run, cells), ignore_index=True)
    assert_found(verdicts, task, least=0.95)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(LAYOUT))
@pytest.mark.parametrize("shape", POWER_SHAPES)
def test_random_heads_in_their_places_are_not(many_cells, shape, task) -> None:
    """A family of role rows, or of head rows, has a false corroboration in no more than 5 of 100 models."""
    cells = [(shape, task, seed, 1.0, MANY) for seed in range(SEEDS)]
    verdicts = pd.concat(many_cells(power_run, cells), ignore_index=True)
    for kind, rows in verdicts.groupby("kind"):
        wrong = int((rows["verdict"] == "corroborated").groupby(rows["seed"]).any().sum())
        assert tail(wrong, SEEDS, 0.05) > 0.005, f"{wrong} of {SEEDS} models have a false {kind} verdict"
