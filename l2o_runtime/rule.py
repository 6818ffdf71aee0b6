"""The rule: one definition that is meta-trained, run, exported and read back.

A step has three phases. `observe` is additive over coordinates, `contextualise` is small and global, `update`
is coordinatewise; so a list of tensors, a loop over chunks and a set of shards all give the same numbers.
All states are zero at the start.
"""

import torch
from torch import Tensor, nn

from l2o_runtime.cells import CoordinateLSTM
from l2o_runtime.config import RuleConfig
from l2o_runtime.contexts import make_context
from l2o_runtime.features import FEATURE_SPECS, FEATURES, WIDTH
from l2o_runtime.gram import State, StateSpec


def zeros(spec: StateSpec, lead: tuple[int, ...], device: torch.device | str | None = None) -> State:
    """The initial state of `spec` with leading dimensions `lead`."""
    return {key: torch.zeros((*lead, *shape), dtype=dtype, device=device) for key, (shape, dtype) in spec.items()}


class Rule(nn.Module):
    """θ ← θ + lr · Δ, [Δ, h'] = scale · M(features(g), context, h; φ).

    Coordinates may have leading batch dimensions, (..., n), contexts then have the same, (..., c).

    Source: Andrychowicz et al. 2016, eq. 2; Šimánek et al., arXiv 2211.16268.
    """

    def __init__(self, config: RuleConfig):
        super().__init__()
        self.config = config
        # The cell is drawn before the context: rules that differ only in their context share its weights.
        self.cell = CoordinateLSTM(WIDTH, config.context.width, config.hidden, config.layers)
        self.context = make_context(config.context)
        self._features = FEATURES[config.features]

    @property
    def coordinate_spec(self) -> StateSpec:
        """State of every coordinate: trailing shape and dtype by name."""
        return FEATURE_SPECS[self.config.features] | self.cell.coordinate_spec | self.context.coordinate_spec

    @property
    def context_spec(self) -> StateSpec:
        """State of the whole optimization: shape and dtype by name."""
        return self.context.context_spec

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Additive statistics of some coordinates.

        Args:
            param, grad: (..., n) float32.
            state: coordinate state.
            offset: global index of the first coordinate, or (n,) global minus local index of each.

        Returns:
            (..., k); sum over all parts before `contextualise`.
        """
        return self.context.observe(param, grad, state, offset)

    def contextualise(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The context of this step.

        Args:
            statistics: (..., k), summed over all coordinates.
            loss: (...) loss at θ; zero where it is not known.
            state: context state.

        Returns:
            Context (..., c) and the new context state.
        """
        return self.context.contextualise(statistics, loss, state)

    def update(self, grad: Tensor, param: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """The step of some coordinates.

        Args:
            grad, param: (..., n) float32.
            context: (..., c).
            state: coordinate state.

        Returns:
            Δ (..., n), to be multiplied by lr and added to θ, and the new coordinate state.
        """
        features, feature_state = self._features(grad, state)
        output, cell_state = self.cell(features, context, state)
        if self.config.output == "tanh":
            output = output.tanh()
        remembered = self.context.remember(param, grad, state)
        return self.config.output_scale * output, feature_state | cell_state | remembered

    def forward(
        self, param: Tensor, grad: Tensor, loss: Tensor, coordinates: State, optimization: State
    ) -> tuple[Tensor, State, State]:
        """All three phases, for all coordinates at once.

        Nothing is differentiated through what is observed: θ, g and L are constants of the step, as in
        Algorithm 1 of arXiv 2211.16268.

        Args:
            param, grad: (..., n) float32.
            loss: (...).
            coordinates, optimization: coordinate and context state.

        Returns:
            Δ (..., n), and both new states.
        """
        statistics = self.observe(param, grad, coordinates)
        context, optimization = self.contextualise(statistics, loss, optimization)
        delta, coordinates = self.update(grad, param, context, coordinates)
        return delta, coordinates, optimization
