"""Random tokens that come twice, and the control of random weights: against loops, on heads built by hand."""

import pytest
import torch
from support.commands import compose
from support.models import local
from support.planted_runs import cell

from ovqk.activations.forward import Places, RunningModel
from ovqk.activations.measure import check_activations
from ovqk.activations.repeats import SEQUENCES, draw_repeats, run_repeats
from ovqk.activations.untrained import untrained_control
from ovqk.checkpoints.opening import open_checkpoint
from ovqk.config.schema import Repeats
from ovqk.errors import UserError
from ovqk.testing.prompted_models import HEADS, LAYERS, POSITIONS, run_model, tokenizer_of, write_model

PREVIOUS, INDUCTION = (0, 2), (1, 1)
CPU = torch.device("cpu")


def every(count: int, what: str) -> range:
    return range(count)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A cell's config, its words, and a file that holds a previous-token head and an induction head."""
    config = cell(3, "activations.prompts=64")
    words = config.task.words["content"]
    file = tmp_path_factory.mktemp("planted") / "model.safetensors"
    write_model(file, len(words) + 1, 3, (PREVIOUS, INDUCTION))
    return config, words, file


def running(file) -> RunningModel:
    return RunningModel.load(open_checkpoint(local(file)), local(file, causal=True), CPU)


def test_sequences_are_start_tokens_and_two_equal_copies_of_different_tokens(planted) -> None:
    _, words, _ = planted
    tokens = draw_repeats(tokenizer_of(words), [7, 8], POSITIONS, 0)
    assert tokens.shape == (SEQUENCES, 2 + 2 * 11)
    assert (tokens[:, :2] == torch.tensor([7, 8])).all() and torch.equal(tokens[:, 2:13], tokens[:, 13:])
    assert all(len(row.unique()) == 11 for row in tokens[:, 2:13])
    assert torch.equal(tokens, draw_repeats(tokenizer_of(words), [7, 8], POSITIONS, 0))
    assert not torch.equal(tokens, draw_repeats(tokenizer_of(words), [7, 8], POSITIONS, 1))
    assert draw_repeats(tokenizer_of(words), [7, 8], 9, 0) is None  # no room for two copies
    assert draw_repeats(tokenizer_of(words[:30]), [], None, 0) is None  # too few tokens


def test_special_tokens_are_never_drawn(planted) -> None:
    _, words, _ = planted
    made = tokenizer_of(words)
    made.add_special_tokens([words[0], "<end>"])
    special = {made.token_to_id(word) for word in (words[0], "<end>")}
    assert not special & set(draw_repeats(made, [], None, 0).unique().tolist())


def test_attention_is_what_a_loop_over_tokens_finds(planted) -> None:
    _, words, file = planted
    tokens = draw_repeats(tokenizer_of(words), [0], POSITIONS, 0)[:18]  # more than one batch
    model, length = running(file), 11
    found = run_repeats(model, tokens, 1, every)
    positions = torch.arange(tokens.shape[1])[:, None].expand(-1, len(tokens))
    pattern = model.run(tokens, Places(positions, positions)).patterns  # [layer, sequence, head, query, key]
    queries = range(1 + length + 1, 1 + 2 * length - 1)
    for name, back in ((Repeats.previous, 1), (Repeats.same, length), (Repeats.next, length - 1)):
        expected = torch.stack([pattern[..., query, query - back] for query in queries]).mean(0)
        torch.testing.assert_close(found.attention[name], expected.transpose(0, 1))
    rest = []
    for query in queries:
        others = [key for key in range(1, query) if query - key not in (1, length, length - 1)]
        rest.append(pattern[..., query, others].mean(-1))
    torch.testing.assert_close(found.control, torch.stack(rest).mean(0).transpose(0, 1))
    sink = torch.stack([pattern[..., query, 0] for query in queries]).mean(0)
    torch.testing.assert_close(found.sink, sink.transpose(0, 1))


def test_planted_heads_look_where_they_were_built_to(planted) -> None:
    _, words, file = planted
    found = run_repeats(running(file), draw_repeats(tokenizer_of(words), [], POSITIONS, 0), 0, every)
    for name, place in ((Repeats.previous, PREVIOUS), (Repeats.next, INDUCTION)):
        mean = found.attention[name].mean(0)
        assert mean[place] > 0.9
        mean[place] = 0
        assert mean.max() < 0.2
    assert found.attention[Repeats.same].mean(0).max() < 0.2 and found.control.mean(0).max() < 0.2


def deciding(config, *, same: bool):
    """The induction task whose roles must show their places on random repeats too, or a wrong one."""
    roles = config.task.roles
    for name, place in (("induction", Repeats.next), ("previous_token", Repeats.previous)):
        roles[name].activations.repeats = place if same else Repeats.same
        roles[name].activations.decides = [*roles[name].activations.decides, "repeats"]
    return config


@pytest.mark.parametrize("same", [True, False])
def test_a_role_may_ask_for_attention_on_random_repeats_too(planted, same) -> None:
    _, _, file = planted
    ran = run_model(file, deciding(cell(3, "activations.prompts=64"), same=same))
    expected = {"induction": [INDUCTION], "previous_token": [PREVIOUS]}
    assert ran.judged.measured == (expected if same else {"induction": [], "previous_token": []})
    if same:
        rows = ran.judged.roles.set_index("role")
        assert (rows["repeats"] > 0.9).all() and (rows["repeats_q"] < 0.05).all()
        assert rows["held"].str.contains("repeats").all()


def test_a_model_with_random_weights_passes_hardly_any_test_and_its_own_weights_stay(planted) -> None:
    _, _, file = planted
    ran = run_model(file, deciding(cell(3, "activations.prompts=64"), same=True))
    model = running(file)
    before = [block.original_component.weights.W_Q.clone() for block in model.model.blocks]
    source = running(file)
    found = untrained_control(model, ran.prompts, ran.measured, 0, every)
    after = [block.original_component.weights.W_Q for block in model.model.blocks]
    for one, other in zip(before, after, strict=True):
        assert not torch.equal(one, other) and float(other.std()) == pytest.approx(float(one.std()), rel=0.05)
    assert all(
        torch.equal(one, block.original_component.weights.W_Q)
        for one, block in zip(before, source.model.blocks, strict=True)
    )  # what another reader of the file holds
    assert found.keys() == {"induction", "previous_token"}
    for shares in found.values():
        assert shares.keys() == {"attention", "repeats"} and max(shares.values()) <= 1 / (LAYERS * HEADS)


def test_a_place_that_is_none_is_refused_and_so_is_deciding_without_one() -> None:
    config = compose("task=induction", "model=mini-attn")
    config.task.roles["induction"].activations.decides = ["attention", "repeats"]
    with pytest.raises(UserError, match=r"decides=\['attention', 'repeats'\]: allowed are those given"):
        check_activations(config.task)
