"""A role's quantities for all heads on one half of the prompts, with tests (definitions: section 7)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ovqk.activations.batches import Half
from ovqk.activations.clusters import ClusterTest, cluster_means, flip_signs
from ovqk.activations.effects import Effects, Patch
from ovqk.activations.least import LEAST_ATTENTION, LEAST_ATTENTION_ALONE, LEAST_SHARE, ROUNDING
from ovqk.activations.quantities import Observed, RoleValues, look_of, queries_of
from ovqk.activations.repeats import RepeatValues
from ovqk.activations.score_links import ScoreLink
from ovqk.config.schema import Repeats, RoleActivationsConfig
from ovqk.verdicts.statistics import ALPHA
from ovqk.weights.types import Head


@dataclass(frozen=True)
class Measured:
    """All measurements on prompts, before they are judged.

    Attributes:
        observed: runs over prompts and their counterfactuals.
        roles: role -> its `activations`.
        effects: replacement -> its effects.
        receivers: role -> the heads through which other roles' effects are measured.
        seed: the seed for drawn sign flips.
        kv_of_head: each head's KV group, [head], the same in every layer.
        change: a control: the largest change when a head is replaced by itself, over the mean logit difference.
        downstream: a control: the largest attention change in layers that a replaced head cannot reach; nan if no role
            has an `attention`.
        repeats: runs over random repeats; None if no role asks for them, or if the model's context is too short.
        scores: (role, head) -> its split scores, for claimed and chosen heads if the role has an `attention`.
    """

    observed: Observed
    roles: Mapping[str, RoleActivationsConfig]
    effects: dict[Patch, Effects]
    receivers: dict[str, tuple[Head, ...]]
    seed: int
    kv_of_head: NDArray[np.int64]
    change: float = 0.0
    downstream: float = math.nan
    repeats: RepeatValues | None = None
    scores: dict[tuple[str, Head], ScoreLink] = field(default_factory=dict)
    _rows: dict[tuple[str, Half], pd.DataFrame] = field(default_factory=dict)

    def add(self, effects: Mapping[Patch, Effects]) -> None:
        """Add the effects that further replacements have."""
        self.effects.update(effects)
        self._rows.clear()

    def rows(self, role: str, half: Half) -> pd.DataFrame:
        """Return a role's quantities on one half: a row for each head, sorted by layer and head.

        A quantity that was not measured has no column. A head for which it was not measured has nan.
        """
        if (role, half) not in self._rows:
            self._rows[role, half] = self._compute(role, half)
        return self._rows[role, half].copy()

    def _compute(self, role: str, half: Half) -> pd.DataFrame:
        config, observed = self.roles[role], self.observed
        of_half = self._of(half)
        clusters = observed.clusters[of_half].numpy()
        tests = Tests(of_half, clusters, self.seed)
        _, n_layers, n_heads = observed.roles[role].first_order.shape  # type: ignore[union-attr]
        table = heads_table(role, n_layers, n_heads).assign(half=half)
        values = observed.roles[role]
        base = self._mean(observed.difference, half)
        if config.attention is not None:
            table = with_attention(table, config, values, tests)
        if config.repeats is not None and self.repeats is not None:
            table = with_repeats(table, config.repeats, self.repeats, half, self.seed)
        if config.write is not None:
            assert values.write is not None
            write = tests.tested(values.write)
            table = _described(table, "write", write)
            table["write_share"] = write.mean / base
            if values.write_from_source is not None:
                table["write_from_source"] = tests.mean(values.write_from_source)
            forwards = config.write.sign > 0
            table["write_p"] = write.p if forwards else write.p_opposite
            table["write_p_opposite"] = write.p_opposite if forwards else write.p
            table["write_min_p"] = write.min_p
        assert values.first_order is not None
        lost = self._mean(observed.difference - observed.counterfactual_difference, half)
        table["effect_first_order"] = tests.mean(values.first_order) / lost
        if config.effect is not None:
            self._add_effects(table, role, half, of_half, clusters)
        return table

    def passes(self, role: str, rows: pd.DataFrame, p: str = "p") -> dict[str, NDArray[np.bool_]]:
        """Return, for each deciding quantity that is measured so far, which rows show it (`shows`).

        Args:
            role: the role.
            rows: as `rows` returns them; with `q` columns if p is "q".
            p: which column decides about significance, `p` or `q`.
        """
        config = self.roles[role]
        measured = [quantity for quantity in config.decides if f"{quantity}_{p}" in rows]
        return {quantity: shows(config, quantity, rows, p) for quantity in measured}

    def _add_effects(
        self, table: pd.DataFrame, role: str, half: Half, of_half: torch.Tensor, clusters: NDArray[np.int64]
    ) -> None:
        config = self.roles[role]
        assert config.effect is not None
        sign, query = config.effect.sign, queries_of(config)
        columns: dict[str, list[NDArray[np.float64]]] = {"own": [], "mean": [], "restored": []}
        index = []
        for row, head in enumerate(zip(table["layer"], table["head"], strict=True)):
            found = self._numerators(role, Patch((int(head[0]), int(head[1])), query))
            if found is not None:
                index.append(row)
                for name, value in zip(columns, found, strict=True):
                    columns[name].append(value[of_half].double().numpy())
        whole, base = self._denominators(role, half)
        for name in (
            "effect", "effect_se", "effect_q25", "effect_q50", "effect_q75", "effect_share", "effect_mean_replacement",
            "effect_restored", "effect_p", "effect_p_opposite", "effect_mean_p",
        ):  # fmt: skip
            table[name] = math.nan
        table["effect_min_p"] = math.nan
        if not index:
            return
        own, mean, restored = (flip_signs(np.stack(columns[name], 1), clusters, self.seed) for name in columns)
        put = {
            "effect": own.mean / whole,
            "effect_se": own.se / abs(whole),
            "effect_share": own.mean / base,
            "effect_mean_replacement": mean.mean / whole,
            "effect_restored": restored.mean / whole,
            "effect_p": own.p if sign > 0 else own.p_opposite,
            "effect_p_opposite": own.p_opposite if sign > 0 else own.p,
            "effect_mean_p": mean.p if sign > 0 else mean.p_opposite,
            **{f"effect_q{share}": row / whole for share, row in zip((25, 50, 75), own.quartiles, strict=True)},
        }
        for name, value in put.items():
            table.loc[index, name] = value
        table["effect_min_p"] = own.min_p

    def together(self, role: str, half: Half = "testing") -> dict[str, float]:
        """Return the effect when all of a role's heads are replaced in one run, as joint.parquet holds it.

        The heads are the claimed ones, or the chosen ones if none is claimed. The result is empty if the role has no
        `effect` or no head, or if its effect is measured while another role's heads are replaced.
        """
        patch = all_at_once(self.roles[role], self.receivers.get(role, ()))
        found = None if patch is None else self._numerators(role, patch)
        if found is None:
            return {}
        of_half = self._of(half)
        values = np.stack([value[of_half].double().numpy() for value in found[:2]], 1)
        clusters, (whole, _) = self.observed.clusters[of_half].numpy(), self._denominators(role, half)
        own, mean = (flip_signs(values[:, [column]], clusters, self.seed) for column in (0, 1))
        return {
            "effect_together": float(own.mean[0] / whole),
            "effect_together_se": float(own.se[0] / abs(whole)),
            "effect_together_mean_replacement": float(mean.mean[0] / whole),
        }

    def _numerators(self, role: str, patch: Patch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return each prompt's loss under REPLACED and MEAN, and its gain under RESTORED; None if they were not run."""
        effect, clean = self.roles[role].effect, self.observed.difference
        assert effect is not None
        head, query = patch.head, patch.query
        alone = self.effects.get(patch)
        if alone is None:
            return None
        nothing = torch.full_like(clean, math.nan)
        if effect.given is not None:
            if head is None or head in self.receivers[effect.given]:  # a head cannot be its own backup
                return None
            receivers = self.receivers[effect.given]
            without = self.effects.get(Patch(None, query, receivers))
            both = self.effects.get(Patch(head, query, receivers))
            if without is None or both is None:
                return None
            own = (without.difference - both.difference) - (clean - alone.difference)
            mean = (without.mean_difference - both.mean_difference) - (clean - alone.mean_difference)
            return self._unless_rounding(own, clean), self._unless_rounding(mean, clean), nothing
        look = look_of(self.roles, role)
        if look is None:
            own, mean = clean - alone.difference, clean - alone.mean_difference
            restored = alone.restored - self.observed.counterfactual_difference
            return (
                self._unless_rounding(own, clean),
                self._unless_rounding(mean, clean),
                self._unless_rounding(restored, clean),
            )
        assert effect.into is not None
        receivers = self.receivers[effect.into]
        if not receivers:
            return None
        before = _of_heads(self.observed.looks[look][0], receivers)
        own, mean = (before - _of_heads(after[look], receivers) for after in (alone.look, alone.mean_look))
        return self._unless_rounding(own, before), self._unless_rounding(mean, before), nothing

    def _denominators(self, role: str, half: Half) -> tuple[float, float]:
        """Return the denominators for `effect` (the counterfactual's whole effect) and `effect_share` (the mean)."""
        effect, look = self.roles[role].effect, look_of(self.roles, role)
        if look is not None:
            assert effect is not None and effect.into is not None
            clean, other = (_of_heads(each, self.receivers[effect.into]) for each in self.observed.looks[look])
            whole = self._mean(clean - other, half)
            whole = whole if whole > LEAST_SHARE * abs(self._mean(clean, half)) else math.nan
            return whole, whole
        observed = self.observed
        whole = self._mean(observed.difference - observed.counterfactual_difference, half)
        base = self._mean(observed.difference, half)
        return whole if abs(whole) > LEAST_SHARE * abs(base) else math.nan, base

    def _unless_rounding(self, change: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """Return changes [prompt], 0 in place of rounding, whose sign would decide p for a head without effect."""
        return change.masked_fill(change.abs() <= max(ROUNDING, self.change) * of.abs().nanmean(), 0.0)

    def _of(self, half: Half) -> torch.Tensor:
        """Return which prompts belong to a half."""
        return self.observed.testing if half == "testing" else ~self.observed.testing

    def _mean(self, values: torch.Tensor, half: Half) -> float:
        """Return the mean over a half's cluster means; nan if no prompt has a value."""
        of_half = self._of(half)
        return float(_mean(values[of_half, None].double().numpy(), self.observed.clusters[of_half].numpy())[0])

    def accuracy(self, half: Half) -> tuple[float, float]:
        """Return the share of a half's prompts with the answer above the foil, in [0, 1], and the mean difference."""
        difference = self.observed.difference
        return float((difference[self._of(half)] > 0).double().mean()), self._mean(difference, half)


def all_at_once(config: RoleActivationsConfig, heads: Sequence[Head]) -> Patch | None:
    """Return the replacement for all the role's heads in one run; None if the role has no such effect or no head."""
    if config.effect is None or config.effect.given is not None or not heads:
        return None
    if len(heads) == 1:
        return Patch(heads[0], queries_of(config))
    return Patch(None, queries_of(config), tuple(heads))


@dataclass(frozen=True)
class Tests:
    """Tests over the clusters of one half of the prompts.

    Attributes:
        rows: which prompts belong to the half.
        clusters: each such prompt's cluster, by number.
        seed: the seed for drawn sign flips.
    """

    rows: torch.Tensor
    clusters: NDArray[np.int64]
    seed: int

    def _flat(self, values: torch.Tensor) -> NDArray[np.float64]:
        return values[self.rows].reshape(len(self.clusters), -1).double().numpy()

    def tested(self, values: torch.Tensor) -> ClusterTest:
        """Test values [prompt, layer, head]; the test's columns run over layers and heads."""
        return flip_signs(self._flat(values), self.clusters, self.seed)

    def mean(self, values: torch.Tensor) -> NDArray[np.float64]:
        """Return the mean over the clusters' means, [layer x head]."""
        return _mean(self._flat(values), self.clusters)


def heads_table(role: str, n_layers: int, n_heads: int) -> pd.DataFrame:
    """Return a table with the columns role, layer and head, and a row for each head in order."""
    places = [(role, layer, head) for layer in range(n_layers) for head in range(n_heads)]
    return pd.DataFrame(places, columns=["role", "layer", "head"])


def with_attention(
    table: pd.DataFrame, config: RoleActivationsConfig, values: RoleValues, tests: Tests
) -> pd.DataFrame:
    """Add a role's attention on prompts to the table, and its tests against the control and the counterfactual.

    Args:
        table: a row for each head (`heads_table`).
        config: the role's `activations`.
        values: the role's quantities.
        tests: tests over one half.
    """
    assert values.attention is not None and values.control is not None and config.attention is not None
    assert values.counterfactual is not None and values.sink is not None
    attention, sink = tests.tested(values.attention), tests.mean(values.sink)
    others = {"control": values.control, "counterfactual": values.counterfactual}
    against = [tests.tested(values.attention - others[name]) for name in config.attention.beyond]
    return _described(table, "attention", attention).assign(
        attention_control=tests.mean(values.control),
        attention_counterfactual=tests.mean(values.counterfactual),
        sink=sink,
        attention_nonsink=attention.mean / np.maximum(1 - sink, 1e-6),
        attention_p=np.max([test.p for test in against], 0),
        attention_p_opposite=np.max([test.p_opposite for test in against], 0),
        attention_min_p=against[0].min_p,
    )


def with_repeats(table: pd.DataFrame, place: Repeats, values: RepeatValues, half: Half, seed: int) -> pd.DataFrame:
    """Add attention to a place in random repeats to the table, and its test against attention to other tokens.

    Each sequence is a cluster.
    """
    of_half = values.testing if half == "testing" else ~values.testing
    tests = Tests(of_half, np.arange(int(of_half.sum())), seed)
    attention, sink = tests.tested(values.attention[place]), tests.mean(values.sink)
    against = tests.tested(values.attention[place] - values.control)
    return _described(table, "repeats", attention).assign(
        repeats_control=tests.mean(values.control),
        repeats_nonsink=attention.mean / np.maximum(1 - sink, 1e-6),
        repeats_p=against.p,
        repeats_p_opposite=against.p_opposite,
        repeats_min_p=against.min_p,
    )


def shows(config: RoleActivationsConfig, quantity: str, rows: pd.DataFrame, p: str = "p") -> NDArray[np.bool_]:
    """Return which rows show a deciding quantity: it is significant, has the right sign and is large enough.

    Args:
        config: the role's `activations`.
        quantity: one of `decides`.
        rows: as `Measured.rows` returns them; with `q` columns if p is "q".
        p: which column decides about significance, `p` or `q`.
    """
    shown: NDArray[np.bool_] = rows[f"{quantity}_{p}"].to_numpy() <= ALPHA
    if quantity in ("attention", "repeats"):
        alone = set(config.decides) <= {"attention", "repeats"}
        return shown & (rows[f"{quantity}_nonsink"].to_numpy() >= (LEAST_ATTENTION_ALONE if alone else LEAST_ATTENTION))
    part = config.write if quantity == "write" else config.effect
    assert part is not None
    return shown & (part.sign * rows[f"{quantity}_share"].to_numpy() >= LEAST_SHARE)


def _mean(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean over the clusters' means, [column]; nan if no prompt has a value in every column."""
    means = cluster_means(values, clusters)
    return means.mean(0) if len(means) else np.full(values.shape[1], math.nan)


def _of_heads(values: torch.Tensor, heads: Sequence[Head]) -> torch.Tensor:
    """Average values [prompt, layer, head] over some heads, [prompt]; nan if there are no heads."""
    if not heads:
        return torch.full((len(values),), math.nan)
    return torch.stack([values[:, layer, head] for layer, head in heads]).mean(0)


def _described(table: pd.DataFrame, name: str, test: ClusterTest) -> pd.DataFrame:
    quartiles = {f"{name}_q{share}": row for share, row in zip((25, 50, 75), test.quartiles, strict=True)}
    return table.assign(**{name: test.mean, f"{name}_se": test.se, **quartiles})
