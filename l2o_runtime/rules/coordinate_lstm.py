"""The coordinatewise recurrent network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_runtime.state import State, StateSpec


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step from the summed pre-activations, in nn.LSTMCell's gate order (i, f, g, o).

    c' = σ(f)·c + σ(i)·tanh(g), h' = σ(o)·tanh(c').

    Args:
        gates: (..., 4·hidden), W_ih x + W_hh h + b.
        c: (..., hidden) cell state.

    Returns:
        h' and c', each (..., hidden).

    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class CoordinateLSTM(nn.Module):
    """A stack of LSTM layers with a linear head, shared by all coordinates.

    The context is the same for all coordinates, so its part of the first layer's pre-activation is computed
    once and added like a bias.

    Args:
        inputs: features per coordinate, f.
        context: width of the context, c.
        hidden, layers: size of the network.
        outputs: numbers per coordinate.
    """

    def __init__(self, inputs: int, context: int, hidden: int, layers: int, outputs: int = 1):
        super().__init__()
        self.hidden = hidden
        self.layers = layers
        bound = 1 / math.sqrt(hidden)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        # The context's weights are drawn last: rules that differ only in their context share the rest.
        sizes = [inputs] + [hidden] * (layers - 1)
        self.weight_ih = nn.ParameterList([uniform(4 * hidden, size) for size in sizes])
        self.weight_hh = nn.ParameterList([uniform(4 * hidden, hidden) for _ in sizes])
        self.bias = nn.ParameterList([uniform(4 * hidden) for _ in sizes])
        self.head = nn.Linear(hidden, outputs)
        self.weight_context = uniform(4 * hidden, context)

    @property
    def coordinate_spec(self) -> StateSpec:
        """h and c of every layer."""
        shape = ((self.hidden,), torch.float32)
        return {f"{name}{layer}": shape for layer in range(self.layers) for name in "hc"}

    def forward(self, features: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance every coordinate by one step.

        Args:
            features: (..., n, f).
            context: (..., c).
            state: h0, c0, h1, … each (..., n, hidden).

        Returns:
            Output (..., n, outputs) and the new state.
        """
        x, new = features, {}
        for layer in range(self.layers):
            gates = F.linear(x, self.weight_ih[layer], self.bias[layer])
            gates = gates + F.linear(state[f"h{layer}"], self.weight_hh[layer])
            if layer == 0 and self.weight_context.shape[1]:
                gates = gates + F.linear(context, self.weight_context).unsqueeze(-2)
            x, new[f"c{layer}"] = lstm_cell(gates, state[f"c{layer}"])
            new[f"h{layer}"] = x
        return self.head(x), new
