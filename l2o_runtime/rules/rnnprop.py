"""RNNprop: normalised features through a layer of their own and an LSTM for every coordinate; bounded steps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_runtime.contexts import make_context
from l2o_runtime.rules.base import Spec
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import FEATURE_SPECS, WIDTHS, features_of
from l2o_runtime.rules.lstm import CoordinateConfig
from l2o_runtime.rules.uniform import UniformRule
from l2o_runtime.state import State


@dataclass(frozen=True, kw_only=True)
class RNNPropConfig(CoordinateConfig):
    """A gradient and its average over the root of its mean square, through a layer and an LSTM (Lv et al. 2017).

    Attributes:
        hidden: units of the layer, and of each layer of the LSTM.
        layers: of the LSTM.
        output_scale: α, the longest step at lr = 1.
    """

    kind: ClassVar[str] = "rnnprop"
    features: ClassVar[str] = "normalized"

    @property
    def inputs(self) -> int:
        """As many as the layer before the LSTM has units."""
        return self.hidden

    @property
    def bounded(self) -> bool:
        """Steps are at most α · lr."""
        return True

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.hidden}-unit layer and {self.layers} × {self.hidden} LSTM per coordinate"

    @property
    def flops(self) -> int | None:
        """With the layer's.

        >>> RNNPropConfig().flops
        13101
        """
        rest = super().flops
        assert rest is not None
        return rest + (2 * WIDTHS[self.features] + 1) * self.hidden


class RNNPropRule(UniformRule):
    """Δ = α tanh(w · LSTM(ELU(W x + b)) + v), x = [m̂/(√v̂ + ε), g/(√v̂ + ε)]; the same network for every coordinate.

    Source: Lv, Jiang & Li 2017, "Learning Gradient Descent: Better Generalization and Longer Horizons", section 4.
    """

    config: RNNPropConfig
    progress = None

    def __init__(self, config: RNNPropConfig):
        super().__init__()
        self.config = config
        self.into = nn.Linear(WIDTHS[config.features], config.hidden)
        self.cell = CoordinateLSTM(config.inputs, config.context.width, config.hidden, config.layers)
        self.context = make_context(config.context)

    @property
    def spec(self) -> Spec:
        """What features, LSTM and context keep."""
        coordinate = FEATURE_SPECS[self.config.features] | self.cell.coordinate_spec | self.context.coordinate_spec
        return Spec(coordinate, {}, self.context.context_spec)

    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """As in `Rule`."""
        remembered = self.context.remember(param, grad, state)
        seen, averages = features_of(self.config.features, grad, param, steering[..., :0], state)
        x = F.elu(self.into(torch.stack(seen.features, dim=-1)))
        output, memory = self.cell(x, steering.squeeze(-2), state)
        return self.config.output_scale * output.squeeze(-1).tanh(), averages | memory | remembered
