"""The gated recurrent unit, as rules with several tiers have it: what the tiers above say is added to its gates."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 2.2
"""Initial bias of the reset and update gates: a memory of about ten steps, σ(2.2) = 0.9."""


def gru_cell(inputs: Tensor, memory: Tensor, h: Tensor) -> Tensor:
    """One GRU step from pre-activations, in nn.GRUCell's gate order (r, z, n).

    r = σ(i_r + m_r), z = σ(i_z + m_z), n = tanh(i_n + r m_n), h' = (1 − z) n + z h.

    Args:
        inputs: i (..., 3·hidden), W_ih x + b.
        memory: m (..., 3·hidden), W_hh h + b.
        h: (..., hidden).

    Source: Cho et al. 2014 (arXiv 1406.1078), with the reset behind the product as in cuDNN.
    """
    i_r, i_z, i_n = inputs.chunk(3, dim=-1)
    m_r, m_z, m_n = memory.chunk(3, dim=-1)
    n = (i_n + (i_r + m_r).sigmoid() * m_n).tanh()
    return n + (i_z + m_z).sigmoid() * (h - n)


class GRU(nn.GRUCell):
    """An `nn.GRUCell` over leading dimensions, with biases from elsewhere.

    Args:
        inputs, hidden: its sizes.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__(inputs, hidden)
        with torch.no_grad():
            self.bias_ih[: 2 * hidden].add_(KEPT)

    def forward(self, x: Tensor, h: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """h' (..., hidden).

        Args:
            x: (..., inputs).
            h: (..., hidden).
            bias: what broadcasts to (..., 3·hidden), added to the gates and the candidate.
        """
        return gru_cell(F.linear(x, self.weight_ih, self.bias_ih) + bias, F.linear(h, self.weight_hh, self.bias_hh), h)
