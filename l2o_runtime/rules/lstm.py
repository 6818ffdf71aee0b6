"""The rule: one definition that is meta-trained, run, exported and read back.

A step has three phases. `observe` is additive over coordinates, `contextualise` is small and global, `update`
is coordinatewise; so a list of tensors, a loop over chunks and a set of shards all give the same numbers.
All states are zero at the start.
"""

import torch
from torch import Tensor, nn

from l2o_runtime.config import RuleConfig
from l2o_runtime.contexts import make_context
from l2o_runtime.contexts.progress import Level, Progress
from l2o_runtime.layout import Layout
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import FEATURE_SPECS, WIDTHS, combine, features_of
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.state import State, StateSpec

OUTPUTS = 4
"""What the network of a `moments` rule says: the size of the step, and three factors of directions."""


def _make_progress(config: RuleConfig) -> Progress | Level | None:
    """What a rule sees of the whole optimization besides its context."""
    if config.features == "moments":
        return Progress()
    return None if config.noise_floor is None else Level()


class Rule(nn.Module):
    """θ ← θ + lr · Δ, [Δ, h'] = scale · M(features(g), context, h; φ).

    With the features `moments` the network's outputs combine Adam-like directions, and besides the context it sees the
    optimization's progress.

    Coordinates may have leading batch dimensions, (..., n), contexts then have the same, (..., c).

    Source: Andrychowicz et al. 2016, eq. 2; Šimánek et al., arXiv 2211.16268.
    """

    def __init__(self, config: RuleConfig):
        super().__init__()
        self.config = config
        # The cell is drawn before the context: rules that differ only in their context share its weights.
        self.progress = _make_progress(config)
        width = config.context.width + (self.progress.WIDTH if self.progress else 0)
        self.combines = config.features == "moments"
        outputs = OUTPUTS if self.combines else 1
        self.cell = CoordinateLSTM(WIDTHS[config.features], width, config.hidden, config.layers, outputs)
        if self.combines:
            nn.init.zeros_(self.cell.head.weight)
            nn.init.zeros_(self.cell.head.bias)
        self.context = make_context(config.context)

    @property
    def coordinate_spec(self) -> StateSpec:
        """State of every coordinate: trailing shape and dtype by name."""
        return FEATURE_SPECS[self.config.features] | self.cell.coordinate_spec | self.context.coordinate_spec

    @property
    def context_spec(self) -> StateSpec:
        """State of the whole optimization: shape and dtype by name."""
        return self.context.context_spec | (self.progress.context_spec if self.progress else {})

    @property
    def tensor_spec(self) -> StateSpec:
        """State of every tensor; none, unless the rule has a network per tensor."""
        return {}

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Additive statistics of some coordinates.

        Args:
            param, grad: (..., n) float32.
            state: coordinate state.
            offset: global index of the first coordinate, or (n,) global minus local index of each.

        Returns:
            (..., k); sum over all parts before `contextualise`.
        """
        statistics = self.context.observe(param, grad, state, offset)
        if not self.progress:
            return statistics
        averages = (state["m10"], state["v1000"]) if self.combines else ()
        return torch.cat([self.progress.observe(grad, *averages), statistics], dim=-1)

    def contextualise(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The context of this step.

        Args:
            statistics: (..., k), summed over all coordinates.
            loss: (...) loss at θ; zero where it is not known.
            state: context state.

        Returns:
            Context (..., c) and the new context state; the level and the progress, if any, come first.
        """
        if not self.progress:
            return self.context.contextualise(statistics, loss, state)
        size = self.progress.STATISTICS
        own, others = statistics.split([size, statistics.shape[-1] - size], dim=-1)
        progress, progress_state = self.progress.contextualise(own, loss, state)
        context, new = self.context.contextualise(others, loss, state)
        return torch.cat([progress, context], dim=-1), new | progress_state

    def update(self, grad: Tensor, param: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """The step of some coordinates.

        Args:
            grad, param: (..., n) float32.
            context: (..., c).
            state: coordinate state.

        Returns:
            Δ (..., n), to be multiplied by lr and added to θ, and the new coordinate state.
        """
        remembered = self.context.remember(param, grad, state)
        level, context = (context[..., :1], context[..., 1:]) if self.progress else (context[..., :0], context)
        seen, feature_state = features_of(self.config.features, grad, param, level, state)
        output, cell_state = self.cell(torch.stack(seen.features, dim=-1), context, state)
        if self.combines:
            delta = combine(output.unbind(-1), seen.directions)
        else:
            delta = output.squeeze(-1).tanh() if self.config.output == "tanh" else output.squeeze(-1)
        delta = self.config.output_scale * delta
        if self.config.noise_floor is not None:
            gradient, mean, root = seen.relative
            delta = restrain(delta, gradient, mean, root, self.config.noise_floor * level.exp())
        return delta, feature_state | cell_state | remembered

    def perceive(
        self,
        param: Tensor,
        grad: Tensor,
        loss: Tensor,
        coordinates: State,
        optimization: State,
        layout: Layout | None = None,
    ) -> tuple[Tensor, State]:
        """The first two phases, for all coordinates at once.

        Args:
            param, grad, loss, coordinates, optimization, layout: as in `forward`.

        Returns:
            What `spread` takes, and the new context state.
        """
        return self.contextualise(self.observe(param, grad, coordinates), loss, optimization)

    def spread(self, context: Tensor, layout: Layout | None = None, chosen: Tensor | None = None) -> Tensor:
        """The context that coordinates see in `update`: the same for all of them.

        Args:
            context: from `perceive`.
            layout: of the coordinates.
            chosen: (..., k) some of the coordinates; all of them if left out.
        """
        return context

    def forward(
        self,
        param: Tensor,
        grad: Tensor,
        loss: Tensor,
        coordinates: State,
        optimization: State,
        layout: Layout | None = None,
    ) -> tuple[Tensor, State, State]:
        """All three phases, for all coordinates at once.

        Nothing is differentiated through what is observed: θ, g and L are constants of the step, as in
        Algorithm 1 of arXiv 2211.16268.

        Args:
            param, grad: (..., n) float32.
            loss: (...).
            coordinates, optimization: coordinate and context state, the latter with that of the tensors.
            layout: which tensors the coordinates belong to; needed by rules with a state per tensor.

        Returns:
            Δ (..., n), and both new states.
        """
        context, optimization = self.perceive(param, grad, loss, coordinates, optimization, layout)
        delta, coordinates = self.update(grad, param, self.spread(context, layout), coordinates)
        return delta, coordinates, optimization
