"""Block 0's MLP as TransformerLens names its tensors, checked against the block's own addition without attention."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ovqk.weights.block_probes import BlockActivations
from ovqk.weights.mlp import ACTIVATIONS, MLPWeights
from ovqk.weights.multipliers import agrees, fit_multiplier
from ovqk.weights.norms import Norm, apply_norm

NOT_REPRODUCED = "ovqk's reading of block 0's MLP does not reproduce the model's own"


def read_first_mlp(
    bridge: Any, block: BlockActivations, module: nn.Module, before: Norm | None, norms: Sequence[Norm], eps: float
) -> MLPWeights | str:
    """Read block 0's MLP, or say why its form is none that ovqk knows.

    Args:
        bridge: TransformerLens's view of the model.
        block: block 0's own activations.
        module: block 0.
        before: the norm before the MLP.
        norms: the block's norms, any of which may stand behind the MLP.
        eps: of the norms.
    """
    own = block.other_write
    if own is None:
        return NOT_REPRODUCED
    if any("expert" in name for name, _ in module.named_modules()):
        return "block 0's MLP is a mixture of experts, which ovqk does not read"
    best: tuple[float, MLPWeights] | None = None
    try:
        mlp = _named_weights(bridge, before)
        for name in dict.fromkeys((mlp.activation, *ACTIVATIONS)):
            if name not in ACTIVATIONS:
                continue
            for form, mine in _forms(replace(mlp, activation=name), block.stream, own, norms, eps):
                off = float((mine - own).abs().max())
                if agrees(mine, own) and (best is None or off < 0.5 * best[0]):  # gelu and its approximations are near
                    best = off, form
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return NOT_REPRODUCED  # an MLP of another shape
    if best is not None:
        return best[1]
    if mlp.activation not in ACTIVATIONS:
        return f"block 0's MLP has the activation '{mlp.activation}'; known: {', '.join(ACTIVATIONS)}"
    return NOT_REPRODUCED


def _forms(
    mlp: MLPWeights,
    stream: Float[Tensor, "position d_model"],
    own: Float[Tensor, "position d_model"],
    norms: Sequence[Norm],
    eps: float,
) -> Iterator[tuple[MLPWeights, Float[Tensor, "position d_model"]]]:
    """Yield the MLP as it is, with each norm behind it and with a multiplier, and each form's output."""
    plain = mlp.apply(apply_norm(mlp.norm, stream, eps))
    yield mlp, plain
    for norm in norms:
        yield replace(mlp, post_norm=norm), apply_norm(norm, plain, eps)
    scale = fit_multiplier(plain, own)
    yield replace(mlp, W_out=mlp.W_out * scale, b_out=mlp.b_out * scale), plain * scale


def _named_weights(bridge: Any, before: Norm | None) -> MLPWeights:
    """Return the weights that TransformerLens names as the MLP's, each [d_in, d_out]."""
    mlp, d_model = bridge.blocks[0].mlp, bridge.cfg.d_model
    W_in, W_out = mlp.W_in.detach().float(), mlp.W_out.detach().float()
    if bridge.cfg.gated_mlp:  # act(x W_gate) * (x W_in)
        gate, linear = mlp.W_gate.detach().float(), W_in
    else:
        gate, linear = W_in, None
    gate = gate if gate.shape[0] == d_model else gate.T
    linear = linear if linear is None or linear.shape[0] == d_model else linear.T
    W_out = W_out if W_out.shape[-1] == d_model else W_out.T
    return MLPWeights(
        W_in=gate,
        b_in=_vector(mlp, "b_in" if linear is None else "b_gate", gate.shape[1]),
        W_linear=linear,
        W_out=W_out,
        b_out=_vector(mlp, "b_out", W_out.shape[1]),
        activation=str(bridge.cfg.act_fn),
        norm=before,
        b_linear=None if linear is None else _vector(mlp, "b_in", linear.shape[1]),
    )


def _vector(mlp: Any, name: str, size: int) -> Tensor:
    try:
        found: Tensor = getattr(mlp, name).detach().float()
    except (AttributeError, NotImplementedError, TypeError):
        return torch.zeros(size)
    return found
