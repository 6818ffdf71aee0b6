"""The hierarchical rule, L2O-Scale: recurrent networks for every coordinate, every tensor, and the whole model.

Each tier reads the means of the one below, and adds to the gates of those below: what a tensor's network or the
model's has to say is a bias for all coordinates, so that only the smallest of the networks costs much.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from l2o_runtime.config import require
from l2o_runtime.contexts import make_context
from l2o_runtime.layout import Layout
from l2o_runtime.rules.base import Rule, RuleConfig, Spec, silence
from l2o_runtime.rules.gru import GRU
from l2o_runtime.rules.timescales import FEATURES, MOMENTA, SCALES, SQUARES, look
from l2o_runtime.state import State

MOMENTUM, SCALING, TRAILING = 2.2, 3.2, 3.2
"""Initial logits: of the decays of gradients and of their squares, and of the trailing average of log learning rates.
"""

LARGEST_LOG = 33.0
"""Bound on how far a log learning rate goes from where it begins."""

SMALLEST_MEAN_SQUARE = 1e-8
"""Directions are scaled to a root mean square of 1; where there is next to none, they stay small."""


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(RuleConfig):
    """GRUs per coordinate, per tensor and for the model decide directions, step sizes and time scales of momentum.

    Attributes:
        hidden: units per coordinate.
        tensor_hidden: units per tensor.
        model_hidden: units for the model, which alone sees the context.
        output_scale: the learning rate that every coordinate begins with, at lr = 1.
    """

    kind: ClassVar[str] = "hierarchical"
    features: ClassVar[str] = "timescales"
    hidden: int = 10
    tensor_hidden: int = 20
    model_hidden: int = 20
    output_scale: float = 0.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tensor_hidden", "model_hidden"):
            value = getattr(self, name)
            require(1 <= value <= 512, f"{name}: must be in 1..512, got {value}")

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"GRUs of {self.hidden} units per coordinate, {self.tensor_hidden} per tensor, {self.model_hidden} above"

    @property
    def flops(self) -> int | None:
        """Floating-point operations of matrix products per coordinate and step, biases included.

        >>> HierarchicalConfig().flops
        1501
        """
        gates = 2 * 3 * self.hidden * (FEATURES + self.hidden) + 3 * 3 * self.hidden
        return gates + 2 * self.hidden * 4 + 2 * SCALES + 3


class HierarchicalRule(Rule):
    """Δ = −scale · e^η̂ · d / RMS(d), for every tensor, with a log learning rate η̂ for every coordinate.

    A coordinate's GRU sees the features of `timescales` and how its η̄ is above the mean of its tensor. From its state
    h come the direction, d = w·h + v·m; the log learning rate η̂ = η̄ + u·h, with η̄ the trailing average of η̂, of decay
    γ, 0 at the start; and the decays of the next averages. A tensor's GRU reads the mean h, the model's the mean state
    of tensors. Both add biases to the gates below. Nothing changes with the scale of the gradients.
    Before meta-training w = u = 0 and v is a mean: momentum over four time scales, at a constant learning rate.

    Source: Wichrowska et al. 2017, "Learned Optimizers that Scale and Generalize" (arXiv 1703.04813), section 3.
    """

    config: HierarchicalConfig
    per_tensor = True
    normalizes = True

    def __init__(self, config: HierarchicalConfig):
        super().__init__()
        self.config = config
        own, tensor, model = config.hidden, config.tensor_hidden, config.model_hidden
        self.coordinate_cell = GRU(FEATURES, own)
        self.tensor_cell, self.model_cell = GRU(own, tensor), GRU(tensor, model)
        self.tensor_to_coordinate = nn.Linear(tensor, 3 * own, bias=False)
        self.model_to_coordinate = nn.Linear(model, 3 * own, bias=False)
        self.model_to_tensor = nn.Linear(model, 3 * tensor, bias=False)
        self.decays, self.length = nn.Linear(own, 2), nn.Linear(own, 1)
        self.direction, self.shortcut = nn.Linear(own, 1, bias=False), nn.Linear(SCALES, 1, bias=False)
        self.trailing = nn.Parameter(torch.tensor(TRAILING))
        silence(self.decays, self.length)
        with torch.no_grad():
            self.decays.bias.copy_(torch.tensor([MOMENTUM, SCALING]))
            self.direction.weight.zero_()
            self.shortcut.weight.fill_(1 / SCALES)
        # Drawn last: rules that differ only in their context share the rest.
        bound = 1 / math.sqrt(model)
        self.weight_context = nn.Parameter(torch.empty(3 * model, config.context.width).uniform_(-bound, bound))
        self.context = make_context(config.context)

    @property
    def spec(self) -> Spec:
        """Of coordinates h, averages and η̄, 76 bytes; of tensors and the model their h."""
        config = self.config
        coordinate = dict.fromkeys([*MOMENTA, *SQUARES, "log_lr"], ((), torch.float32))
        return Spec(
            {"h0": ((config.hidden,), torch.float32)} | coordinate | self.context.coordinate_spec,
            {"tensor_h": ((config.tensor_hidden,), torch.float32)},
            {"model_h": ((config.model_hidden,), torch.float32)} | self.context.context_spec,
        )

    def terms(self, param: Tensor, state: State) -> Tensor:
        """What is summed over a tensor: 1, h and η̄; (..., n, 1 + hidden + 1)."""
        ones = 1 + 0 * param.unsqueeze(-1)  # nothing else looks at parameters, whether they are finite
        return torch.cat([ones, state["h0"], state["log_lr"].unsqueeze(-1)], dim=-1)

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Sums of `terms` and of the context over some coordinates of one tensor: (..., k) float64."""
        seen = self.context.observe(param, grad, state, offset)
        return torch.cat([self.terms(param, state).sum(-2, dtype=torch.float64), seen], dim=-1)

    def rows(self, param: Tensor, grad: Tensor, state: State, layout: Layout | None) -> Tensor:
        """`observe` of every tensor: (..., S, k) float64."""
        assert layout is not None
        terms, tensors = self.terms(param, state).double(), layout.shapes.shape[0]
        rows = terms.new_zeros((*terms.shape[:-2], tensors, terms.shape[-1])).index_add(-2, layout.owner, terms)
        seen = self.context.observe_tensors(param, grad, state, layout.owner, tensors)
        return torch.cat([rows, seen], dim=-1)

    def steer(self, sums: Tensor, shapes: Tensor | None, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Of every tensor the mean η̄, then biases of its coordinates' gates: (..., S, 1 + 3 · hidden)."""
        count, total, rest = sums.split([1, self.config.hidden + 1, sums.shape[-1] - self.config.hidden - 2], dim=-1)
        means, there = (total / count.clamp_min(1)).float(), (count > 0).float()
        context, new = self.context.read(rest.sum(-2), loss, state)
        above = state["model_h"]
        tensors = self.tensor_cell(means[..., :-1], state["tensor_h"], self.model_to_tensor(above).unsqueeze(-2))
        mean = (tensors * there).sum(-2) / there.sum(-2).clamp_min(1)
        above = self.model_cell(mean, above, context @ self.weight_context.mT)
        bias = self.tensor_to_coordinate(tensors) + self.model_to_coordinate(above).unsqueeze(-2)
        return torch.cat([means[..., -1:], bias], dim=-1), new | {"tensor_h": tensors, "model_h": above}

    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """As in `Rule`: d, and new averages, h and η̄."""
        momenta, squares = ([state[key] for key in keys] for keys in (MOMENTA, SQUARES))
        seen = look(grad, momenta, squares, *self.decays(state["h0"]).unbind(-1))
        relative = state["log_lr"] - steering[..., 0]
        h = self.coordinate_cell(torch.stack([*seen.features, relative], dim=-1), state["h0"], steering[..., 1:])
        direction = self.direction(h) + self.shortcut(torch.stack(seen.scaled, dim=-1))
        trailing = state["log_lr"] + (1 - self.trailing.sigmoid()) * self.length(h).squeeze(-1)
        new = dict(zip([*MOMENTA, *SQUARES], [*seen.momenta, *seen.squares], strict=True))
        new |= {"h0": h, "log_lr": trailing.clamp(-LARGEST_LOG, LARGEST_LOG)}
        return direction.squeeze(-1), new | self.context.remember(param, grad, state)

    def finish(self, direction: Tensor, mean_square: Tensor, steering: Tensor, state: State) -> Tensor:
        """As in `Rule`. With η̄' = γ η̄ + (1 − γ) η̂ and η̂ = η̄ + u·h, η̂ is η̄' + γ u·h."""
        ahead = self.trailing.sigmoid() * self.length(state["h0"]).squeeze(-1)
        size = self.config.output_scale * (state["log_lr"] + ahead).clamp(-LARGEST_LOG, LARGEST_LOG).exp()
        delta: Tensor = -size * direction / (mean_square + SMALLEST_MEAN_SQUARE).sqrt()
        return delta
