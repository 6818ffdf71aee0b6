"""What every rule is: a step in three phases, one definition that is meta-trained, run, exported and read back.

`observe` is additive over coordinates, `steer` is small and the same for everybody, `update` is coordinatewise; so a
list of tensors, a loop over chunks and a set of shards all give the same numbers. All states are zero at the start.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from l2o_runtime.config import MAX_NUMBERS, ContextConfig, NoneConfig, WindowConfig, require
from l2o_runtime.contexts.base import Context
from l2o_runtime.layout import Layout
from l2o_runtime.rules.restraint import ADAM_LR
from l2o_runtime.state import State, StateSpec


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """What fixes the architecture of a rule, whatever its kind.

    Attributes:
        hidden: units of a layer of the LSTM.
        output_scale: factor on the network's output.
        context: what the network sees of the whole optimization.
        horizon: number of steps the rule was meta-trained for.
        needs_loss: the rule was meta-trained only with a loss value at every step.
    """

    kind: ClassVar[str]
    features: ClassVar[str]
    """What coordinates see of their own gradients: a name in `l2o_runtime.rules.features`."""
    hidden: int = 20
    output_scale: float = 0.1
    context: ContextConfig = field(default_factory=NoneConfig)
    horizon: int = 100
    needs_loss: bool = False

    def __post_init__(self) -> None:
        require(1 <= self.hidden <= 512, f"hidden: must be in 1..512, got {self.hidden}")
        require(1 <= self.layers <= 8, f"layers: must be in 1..8, got {self.layers}")
        require(0 < self.output_scale <= 100, f"output_scale: must be in (0, 100], got {self.output_scale}")
        floor = self.noise_floor
        fits = floor is None or 0 < floor <= 0.1
        require(fits, f"noise_floor: must be in (0, 0.1], or absent; got {floor}")
        require(1 <= self.horizon <= 10**9, f"horizon: must be in 1..{10**9}, got {self.horizon}")
        weights = 4 * self.hidden * (2 * self.hidden * self.layers + self.context.width)
        require(weights <= MAX_NUMBERS, f"hidden: the LSTM has about {weights} weights, more than {MAX_NUMBERS}")

    @property
    def layers(self) -> int:
        """Of the LSTM; some kinds have a field of this name."""
        return 1

    @property
    def noise_floor(self) -> float | None:
        """See `l2o_runtime.rules.restraint`; some kinds have a field of this name."""
        return None

    @property
    def sees_loss(self) -> bool:
        """Whether a loss changes what the rule does: windows are read with it, `moments` with what became of it."""
        return self.features == "moments" or isinstance(self.context, WindowConfig)

    @property
    def bounded(self) -> bool:
        """Whether steps are at most `output_scale` · lr."""
        return False

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.layers} × {self.hidden} LSTM"

    @property
    def flops(self) -> int | None:
        """Floating-point operations of matrix products per coordinate and step, biases included; None: not counted."""
        return None

    @property
    def scheduled(self) -> bool:
        """Whether its steps do not become shorter by themselves: a schedule has to make them."""
        return False

    @property
    def decay_unit(self) -> float:
        """The part of itself that a parameter loses in a step of lr = 1 and weight decay 1."""
        return ADAM_LR

    @property
    def freed(self) -> Self:
        """With wider bounds, for a rule that is meta-trained for one kind of problem; what it does is the same."""
        return self

    @property
    def unrolled(self) -> "RuleConfig":
        """As it is while it is meta-trained."""
        return self

    def meta_trained(self, horizon: int, told: bool) -> Self:
        """After meta-training over so many steps, in which it was or was not told every loss."""
        return replace(self, horizon=horizon, needs_loss=told and isinstance(self.context, WindowConfig))


class Spec(NamedTuple):
    """A rule's state: trailing shape and dtype by name.

    Attributes:
        coordinate: kept for every coordinate.
        tensor: kept for every tensor; names begin with `tensor_`.
        model: kept once for the whole optimization.
    """

    coordinate: StateSpec
    tensor: StateSpec
    model: StateSpec


class Rule(nn.Module, ABC):
    """θ ← θ + lr · Δ, where Δ is what a network makes of the gradients.

    Coordinates may have leading batch dimensions, (..., n), and everything else then has the same. Sums and steering
    have a row for every tensor, (..., S, k) and (..., S, c); or a single one where all tensors are steered alike.

    Attributes:
        config: of the rule.
        context: what it sees of the whole optimization.
        per_tensor: whether every tensor is steered by itself.
        normalizes: whether `update` gives a direction, of which `finish` makes a step when its size is known.
    """

    config: RuleConfig
    context: Context
    per_tensor: bool = False
    normalizes: bool = False

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Its state."""

    @abstractmethod
    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Sums over some coordinates, which add up: (..., k).

        Args:
            param, grad: (..., n) float32.
            state: coordinate state.
            offset: global index of the first coordinate, or (n,) global minus local index of each.
        """

    @abstractmethod
    def steer(self, sums: Tensor, shapes: Tensor | None, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """What this step makes of the sums.

        Args:
            sums: (..., S, k), each row summed over its tensor; (..., 1, k) over everything where all are steered alike.
            shapes: (S, 2) as in `Layout`, for rules that steer every tensor by itself.
            loss: (...) at θ; zero where it is not known.
            state: that of the model, and the tensors' with (..., S) in front.

        Returns:
            Steering (..., S, c), or (..., 1, c), and the new state.
        """

    @abstractmethod
    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """The step of some coordinates.

        Args:
            grad, param: (..., n) float32.
            steering: their tensor's row (..., 1, c), or one for every coordinate (..., n, c).
            state: coordinate state.

        Returns:
            Δ (..., n), to be multiplied by lr and added to θ, and the new coordinate state.
        """

    @property
    def observed(self) -> tuple[str, ...] | None:
        """States that `observe` looks at, of any coordinates together; None if it asks which coordinates these are."""
        return None

    @property
    def layout_keys(self) -> tuple[str, ...]:
        """What of a `Layout` it looks at."""
        return ("owner", "shapes") if self.per_tensor else ()

    def layout(self, shapes: Sequence[torch.Size], device: torch.device | str | None = None) -> Layout:
        """What it has to know of the tensors that coordinates belong to."""
        return Layout.of(shapes, device)

    def prepare(self, grad: Tensor, state: State, shape: torch.Size) -> State:
        """What `update` needs of one whole tensor, beside its state: it lasts for this step only.

        Args:
            grad: (n,) float32.
            state: coordinate state.
            shape: of the tensor.
        """
        return {}

    def prepare_all(self, grad: Tensor, state: State, layout: Layout | None) -> State:
        """`prepare` of all tensors at once, (..., n)."""
        return {}

    def finish(self, direction: Tensor, mean_square: Tensor, steering: Tensor, state: State) -> Tensor:
        """Δ (..., n), of a rule that normalizes.

        Args:
            direction: (..., n) from `update`.
            mean_square: of its tensor's coordinates, and
            steering: as `update` took it: (..., 1) and (..., 1, c), or (..., n) and (..., n, c).
            state: coordinate state, the new one.
        """
        return direction

    def rows(self, param: Tensor, grad: Tensor, state: State, layout: Layout | None) -> Tensor:
        """`observe` of all coordinates at once, as `steer` takes it."""
        return self.observe(param, grad, state).unsqueeze(-2)

    def perceive(
        self, param: Tensor, grad: Tensor, loss: Tensor, coordinates: State, optimization: State, layout: Layout | None
    ) -> tuple[Tensor, State]:
        """The first two phases, for all coordinates at once: what `spread` takes, and the new state of all else."""
        sums = self.rows(param, grad, coordinates, layout)
        return self.steer(sums, None if layout is None else layout.shapes, loss, optimization)

    def spread(self, steering: Tensor, layout: Layout | None, chosen: Tensor | None = None) -> Tensor:
        """What each coordinate is steered by, as `update` takes it: (..., 1, c), or (..., n, c).

        Args:
            steering: from `steer`.
            layout: of the coordinates.
            chosen: (..., k) some of the coordinates; all of them if left out.
        """
        if not self.per_tensor:
            return steering
        assert layout is not None
        if chosen is None:
            return steering.index_select(-2, layout.owner)
        owner = layout.owner[chosen].unsqueeze(-1)
        return steering.gather(-2, owner.expand(*owner.shape[:-1], steering.shape[-1]))

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
            coordinates, optimization: coordinate state; that of the model together with the tensors'.
            layout: which tensors the coordinates belong to; needed by rules that steer every tensor by itself.

        Returns:
            Δ (..., n), and both new states.
        """
        steering, optimization = self.perceive(param, grad, loss, coordinates, optimization, layout)
        told = self.spread(steering, layout)
        delta, coordinates = self.update(grad, param, told, coordinates | self.prepare_all(grad, coordinates, layout))
        if self.normalizes:
            assert layout is not None
            delta = self.finish(delta, self.spread(mean_squares(delta, layout), layout).squeeze(-1), told, coordinates)
        return delta, coordinates, optimization


def mean_squares(direction: Tensor, layout: Layout) -> Tensor:
    """Of the coordinates (..., n) of each tensor: (..., S, 1)."""
    rows = direction.new_zeros((*direction.shape[:-1], layout.shapes.shape[0]))
    return (rows.index_add(-1, layout.owner, direction.square()) / layout.shapes[:, 1].clamp_min(1)).unsqueeze(-1)


OUTPUTS = 4
"""What the network of a rule over directions says: the size of the step, and three factors."""


def silence(*heads: nn.Linear) -> None:
    """Let networks say zero before they are meta-trained."""
    with torch.no_grad():
        for head in heads:
            head.weight.zero_()
            head.bias.zero_()
