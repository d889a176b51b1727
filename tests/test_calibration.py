"""Under the null P(p <= a) <= a: whatever is claimed of a random model, small p-values are as rare as they say.

Every attained p-value of every null is a level that is tested. A test is said not to keep its level where as many
p-values at most a as there are had a probability below 1e-4 (binomial, one p-value of a model and role) if it did. The
models are drawn from fixed seeds, so a test that passes goes on passing.

Conservative by construction, and measured so in docs/calibration.md: `layer` (few labelings; of a single head at least
1 / n), `depth` of metrics that are mostly zero, `spectrum` of the same (ties count against the claim).
"""

import numpy as np
import pandas as pd
import pytest
from support.claimed import claims, facts, predicted

from ovqk import wording
from ovqk.testing.null_models import SURPRISE, interval, least_likely, null_cells, null_run, strained_run, tail
from ovqk.testing.planted import SHAPES
from ovqk.verdicts.nulls import head_rows

SEEDS = 50  # models of every shape and task, in the full run
STRAINED_SEEDS = 200
DECIDING = 0.1


def assert_kept(p: np.ndarray, what: str) -> None:
    a, share, probability = least_likely(p)
    assert probability > SURPRISE, (
        f"{what}: P(p <= {a:.3g}) = {share:.3g} of {len(p)} (binomial tail {probability:.1e})"
    )


def assert_calibrated(rows: pd.DataFrame, each: bool) -> None:
    """Primary predictions together and, with `each`, every metric by itself; in the predicted direction and against."""
    for p in ("p", "p_opposite"):
        for (null, level), mine in rows[rows["primary"]].groupby(["null", "level"]):
            assert_kept(mine[p].to_numpy(), f"{p} of {null}, {level}")
        for key, mine in rows.groupby(["null", "level", "metric"]) if each else ():
            values = mine[p].to_numpy()
            if key[0] == "depth":  # its trend is an approximation: it is asked of the p that can decide
                values = np.where(values > DECIDING, 1.0, values)
            assert_kept(values, f"{p} of {', '.join(key)}")


# --- the yardstick ------------------------------------------------------------------------------------------------


def test_binomial_tails_and_intervals() -> None:
    assert tail(2, 3, 0.5) == pytest.approx(0.5)
    assert tail(1, 10, 0.1) == pytest.approx(1 - 0.9**10)
    assert tail(0, 10, 0.1) == tail(3, 3, 1.0) == 1 and tail(11, 10, 0.5) == 0
    assert interval(0, 50) == pytest.approx((0, 1 - 0.025 ** (1 / 50)), abs=1e-6)
    assert interval(50, 50) == pytest.approx((0.025 ** (1 / 50), 1), abs=1e-6)
    assert interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)  # Clopper & Pearson 1934


def test_uniform_p_values_pass_and_slightly_small_ones_do_not() -> None:
    p = (1 + np.random.default_rng(0).integers(0, 100, 400)) / 100
    assert_kept(p, "uniform")
    assert_kept(np.minimum(1, 1.5 * p), "conservative")
    with pytest.raises(AssertionError, match="small"):
        assert_kept(np.where(np.arange(400) < 20, 0.01, p), "small")


# --- random models ------------------------------------------------------------------------------------------------


def test_every_null_keeps_its_level_at_random_initialisation() -> None:
    rows = pd.concat([null_run(cell, draws=39) for cell in null_cells(range(1))])
    assert set(rows["null"]) == set(wording.NULLS)
    assert set(rows[rows["level"] == "head"]["null"]) == set(wording.NULLS) - {"layer_all"}
    assert_calibrated(rows, each=False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_null_and_metric_keeps_its_level_at_random_initialisation(many_cells, shape) -> None:
    assert_calibrated(pd.concat(many_cells(null_run, null_cells(range(SEEDS), [shape]))), each=True)


# --- where a null has little to draw on ---------------------------------------------------------------------------


@pytest.mark.parametrize(("claimed", "heads"), [(1, 8), (8, 12)])
def test_depth_keeps_its_level_whatever_is_claimed_of_the_layer(claimed, heads) -> None:
    """A head among `heads` of its layer, `claimed` of which leave the null; the layers around it have all theirs."""
    rng, made = np.random.default_rng(0), claims(mover=[(1, head) for head in range(claimed)])
    grids = rng.uniform(size=(600, 4, heads))
    rows = [head_rows(predicted(values), (1, 0), made, facts(4, heads)) for values in grids]
    assert_kept(np.array([row.p for found in rows for row in found if row.null == "depth"]), "depth")


def test_depth_keeps_its_level_where_the_heads_of_a_group_are_claimed() -> None:
    """Heads in groups of four of much the same value; three of a group are claimed, and one of these is tested."""
    rng, made = np.random.default_rng(0), claims(mover=[(1, head) for head in range(3)])
    grids = rng.normal(size=(400, 3, 2, 1)).repeat(4, axis=3) + 0.3 * rng.normal(size=(400, 3, 2, 4))
    architecture = facts(3, 8, n_kv_heads=2)
    rows = [head_rows(predicted(values.reshape(3, 8)), (1, 0), made, architecture) for values in grids]
    assert_kept(np.array([row.p for found in rows for row in found if row.null == "depth"]), "depth")


@pytest.mark.slow
def test_frame_keeps_its_level_where_the_heads_of_a_group_are_claimed(many_cells) -> None:
    cells = [("group mates claimed, spectrum", seed) for seed in range(STRAINED_SEEDS)]
    assert_kept(np.array(many_cells(strained_run, cells)), "spectrum")


@pytest.mark.slow
def test_token_keeps_its_level_where_few_words_match(many_cells) -> None:
    cells = [("few matched words", seed) for seed in range(STRAINED_SEEDS)]
    assert_kept(np.array(many_cells(strained_run, cells)), "token")
