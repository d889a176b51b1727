"""The share of a head's write on prompts that its weights account for (definitions: section 7)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.activations.batches import Prompts
from ovqk.activations.quantities import Observed
from ovqk.circuits.effective_embeddings import Block0, EffectiveRows
from ovqk.config.schema import Circuit, Embedding, RoleActivationsConfig
from ovqk.structure.layer import Layer
from ovqk.structure.model import Model


class WriteLinks:
    """Heads' writes on prompts, and the account that the weights give: attention times the source token through OV.

        account = a (e_source W_OV) . (W_U[answer] - W_U[other])

    Here e is the effective embedding through which the layer is read. `stream` has rows for the task's words alone, so
    under `stream` e is the row that `by_layer` would take. The link is R^2: the share of the write's variance over the
    testing prompts that the account explains. It is 1 if the head moved the token itself, and 0 if it moved something
    that earlier layers had written there.

    Attributes:
        shares: role -> each head's R^2, [layer, head], in [0, 1]; nan if the writes do not vary.
        slopes: role -> each head's slope of the write over the account, [layer, head]; nan if they do not vary.
    """

    def __init__(
        self, model: Model, prompts: Prompts, observed: Observed, roles: Mapping[str, RoleActivationsConfig]
    ) -> None:
        """Take the runs over the prompts. `visit` then adds the weights, layer by layer."""
        self.model, self.observed = model, observed
        self.roles = {
            name: config
            for name, config in roles.items()
            if config.write is not None and config.attention is not None and config.attention.query == "END"
        }
        shape = model.architecture.n_layers, model.architecture.n_heads
        self.shares = {name: torch.full(shape, float("nan")) for name in self.roles}
        self.slopes = {name: torch.full(shape, float("nan")) for name in self.roles}
        assert model.vocabulary is not None
        block0 = model.block0 if isinstance(model.block0, Block0) else None
        self.rows = EffectiveRows(model.vocabulary, block0, model.architecture)
        self._tokens: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, config in self.roles.items():
            assert config.attention is not None and config.write is not None
            places = [batch.position(config.attention.source) for batch in prompts.batches]
            source = [
                torch.zeros(len(batch), dtype=torch.long)
                if place is None
                else batch.tokens.gather(1, place[:, None])[:, 0]
                for batch, place in zip(prompts.batches, places, strict=True)
            ]
            words = [
                [batch.words(word) for batch in prompts.batches] for word in (config.write.answer, config.write.other)
            ]
            self._tokens[name] = torch.cat(source), torch.cat(words[0]), torch.cat(words[1])

    def visit(self, layer: Layer) -> None:
        """Compute the links for this layer's heads (`Stage`)."""
        vocabulary, index = self.model.vocabulary, layer.index
        assert vocabulary is not None and vocabulary.W_U_rows is not None
        embedding = self.model.config.analysis.embedding
        kind = (Embedding.by_layer if embedding is Embedding.stream else embedding).kind(index)
        assert kind != "stream"
        if kind == "block0" and not isinstance(self.model.block0, Block0):
            return
        factors = layer.factors(Circuit.ov, True)
        testing = self.observed.testing
        for name in self.roles:
            values = self.observed.roles[name]
            assert values.attention is not None and values.write is not None
            source, plus, minus = (tokens[testing].to(self.model.device) for tokens in self._tokens[name])
            read = self.rows(source, kind).to(factors.left) @ factors.left
            wanted = (vocabulary.W_U_rows[plus] - vocabulary.W_U_rows[minus]).to(factors.right) @ factors.right.mT
            account = values.attention[testing, index].T * (read * wanted).sum(-1).cpu()
            written = values.write[testing, index].T
            self.shares[name][index], self.slopes[name][index] = explained(account.double(), written.double())


def explained(
    account: Float[Tensor, "head prompt"], written: Float[Tensor, "head prompt"]
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Regress writes on their account, with an intercept, over prompts without nan; return R^2 and the slope."""
    whole = ~(account.isnan() | written.isnan()).any(0)
    x, y = (each[:, whole] - each[:, whole].mean(-1, keepdim=True) for each in (account, written))
    cross, of_x, of_y = (x * y).sum(-1), x.square().sum(-1), y.square().sum(-1)
    return (cross.square() / (of_x * of_y)).float(), (cross / of_x).float()
