"""Optimistic gradients, whose coefficients an LSTM chooses; for games above all."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from l2o_runtime.contexts import make_context
from l2o_runtime.rules.base import OUTPUTS, Spec, silence
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import combine
from l2o_runtime.rules.lstm import CoordinateConfig
from l2o_runtime.rules.uniform import UniformRule
from l2o_runtime.state import LARGEST, State

SPAN = 10
"""The average is over about so many gradients."""

FEATURES = 3
"""Numbers per coordinate that the network sees."""

TINY = 1e-30
"""What is smaller counts as no gradient."""


@dataclass(frozen=True, kw_only=True)
class OptimisticConfig(CoordinateConfig):
    """Optimistic gradients (Popov 1980; Daskalakis et al. 2018), whose coefficients an LSTM chooses.

    Attributes:
        output_scale: learning rate of the optimistic gradient descent, which it is before it is meta-trained.
    """

    kind: ClassVar[str] = "optimistic"
    features: ClassVar[str] = "optimistic"
    layers: int = 1

    @property
    def flops(self) -> int | None:
        """Not counted."""
        return None


class OptimisticRule(UniformRule):
    """Δ = −scale e^{2 o₁} (2 g − g⁻ + 2 o₂ (g − g⁻) + 2 o₃ m + 2 o₄ g), where o is what an LSTM says.

    g⁻ is the gradient before and m the average over ten. The LSTM sees the three divided by the sum of their sizes,
    so that Δ is in proportion to the gradients however small they are: it converges as gradient descent does, where
    rules whose steps have a size of their own go round. There is no gradient before the first one, which counts twice.
    """

    config: OptimisticConfig

    def __init__(self, config: OptimisticConfig):
        super().__init__()
        self.config = config
        self.cell = CoordinateLSTM(FEATURES, config.context.width, config.hidden, config.layers, OUTPUTS)
        silence(self.cell.head)
        self.context = make_context(config.context)

    @property
    def spec(self) -> Spec:
        """Gradients, the LSTM's memory, and what the context keeps."""
        scalar: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)
        own = {"before": scalar, "average": scalar}
        return Spec(own | self.cell.coordinate_spec | self.context.coordinate_spec, {}, self.context.context_spec)

    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """As in `Rule`."""
        remembered = self.context.remember(param, grad, state)
        grad, before = grad.clamp(-LARGEST, LARGEST), state["before"]
        average = state["average"] + (grad - state["average"]) / SPAN
        seen = torch.stack([grad, before, average], dim=-1)
        seen = seen / (seen.abs().sum(-1, keepdim=True) + TINY)
        output, memory = self.cell(seen, steering.squeeze(-2), state)
        delta = combine(output.unbind(-1), [2 * grad - before, grad - before, average, grad])
        return self.config.output_scale * delta, memory | {"before": grad, "average": average} | remembered
