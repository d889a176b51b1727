"""An MLP: its weights, and the forward pass that every reader and every effective embedding uses."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ovqk.weights.norms import Norm

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}

UNTOLD = "untold"
"""The activation of an MLP in a file that does not say which it has."""


@dataclass(frozen=True)
class MLPWeights:
    """An MLP: x -> act(x W_in + b_in) [* (x W_linear + b_linear)] W_out + b_out; the norms are as in LayerWeights.

    Attributes:
        W_linear: the linear branch of a gated MLP; None if there is no gate.
        b_linear: its bias; None for zeros.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    W_linear: Float[Tensor, "d_model d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    activation: str
    norm: Norm | None
    post_norm: Norm | None = None
    b_linear: Float[Tensor, " d_mlp"] | None = None

    def apply(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return the MLP's output for rows that its norm has normalised, in their precision, without its post_norm.

        Raises:
            KeyError: the activation is not among ACTIVATIONS.
        """
        hidden = torch.addmm(self.b_in.to(x), x, self.W_in.to(x))
        hidden = ACTIVATIONS[self.activation](hidden)
        if self.W_linear is not None:
            linear = x @ self.W_linear.to(x)
            hidden *= linear if self.b_linear is None else linear.add_(self.b_linear.to(x))
        return torch.addmm(self.b_out.to(x), hidden, self.W_out.to(x))
