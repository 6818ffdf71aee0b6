"""The directional rule: what is learned is a direction, normalised for every tensor; its size comes from a schedule.

Before meta-training it is a hand-made step: along the orthogonalised momentum of matrices, along Adam's direction of
all other tensors, in proportion to the parameters. A small network for every tensor, without memory, mixes other
directions in and corrects the size within bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from l2o_runtime.config import ContextConfig, NoneConfig, TensorDMDConfig, require
from l2o_runtime.contexts import make_context
from l2o_runtime.layout import Layout
from l2o_runtime.rules.agreement import FAST, SUMS, Sums
from l2o_runtime.rules.base import Rule, RuleConfig, Spec, silence
from l2o_runtime.rules.geometry import PLACES
from l2o_runtime.rules.orthogonal import grid_of, orthogonalise_all, orthogonalise_each, sides
from l2o_runtime.rules.statistics import AVERAGES, Averages, averages_of
from l2o_runtime.rules.steering import INPUTS, MIXED, STATES, TINY, steered
from l2o_runtime.state import LARGEST, State, StateSpec

MOMENTUM = "m10"
"""The average that is orthogonalised."""

DECAY_UNIT = 0.005
"""What weight decay is multiplied by: AdamW's values mean about what they mean there."""


@dataclass(frozen=True, kw_only=True)
class DirectionalConfig(RuleConfig):
    """A network per tensor mixes directions, orthogonalised momentum first, and corrects their size within bounds.

    Attributes:
        hidden: units of the network's layer.
        output_scale: length of a step beside the parameters' own, at lr = 1; chosen for runs of 2,500 steps, and
            shorter ones have longer steps (`l2o_runtime.stepping.schedule.told`).
        rank: singular values of a matrix that are made equal, the others being scaled together; 0 takes Adam's
            direction for matrices too.
        shrink, grow: bounds on the correction of a step's size: it is in 1/shrink … grow.
        mix: bound on the weights of the directions that are mixed in.
        places: whether the first matrix, the last, those in between, and all other tensors have a learned number each
            that corrects the size of their steps.
        context: as of all rules, or one for every tensor.
    """

    kind: ClassVar[str] = "directional"
    features: ClassVar[str] = "directions"
    hidden: int = 8
    output_scale: float = 0.015
    horizon: int = 10_000
    rank: int = 16
    shrink: float = 4.0
    grow: float = 20.0
    mix: float = 0.3
    places: bool = False
    context: ContextConfig | TensorDMDConfig = field(default_factory=NoneConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.rank <= 256, f"rank: must be in 0..256, got {self.rank}")
        for name in ("shrink", "grow"):
            value = getattr(self, name)
            require(1 < value <= 1000, f"{name}: must be above 1 and at most 1000, got {value}")
        require(0 <= self.mix <= 10, f"mix: must be in 0..10, got {self.mix}")

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.hidden}-unit network per tensor over {MIXED + 1} directions"

    @property
    def flops(self) -> int | None:
        """Floating-point operations of matrix products per coordinate of a large matrix and step.

        >>> DirectionalConfig().flops
        96
        """
        return 6 * self.rank

    @property
    def scheduled(self) -> bool:
        """A schedule makes its steps shorter."""
        return True

    @property
    def freed(self) -> Self:
        """Directions may be mixed in at full weight, and places of tensors have steps of their own."""
        return replace(self, mix=max(1.0, self.mix), places=True)

    @property
    def decay_unit(self) -> float:
        """As at a step of `DECAY_UNIT` beside the parameters."""
        return DECAY_UNIT


def relative(averages: Averages) -> tuple[Any, Any, Any]:
    """x, u and s of `Sums`; zero where there was no gradient yet."""
    inverse = averages.root.reciprocal().where(averages.root > 0, 0.0)
    return averages.grad * inverse, averages.fast * inverse, averages.slow * inverse


def terms(theta: Any, x: Any, u: Any, s: Any) -> list[Any]:
    """What `Sums` sums up, but for the number of coordinates."""
    return [theta.square(), x.square(), x * u, u.square(), x * s, s.square()]


def mixture(first: Any, x: Any, u: Any, s: Any, weights: Sequence[Any]) -> Any:
    """d = d₀ + w₁ u + w₂ s + w₃ x + w₄ d₀ a, with a = x d₀ cut to 0 … 1; s and x within ± 5."""
    adam, slow, newest, agreeing = weights
    mixed = first + u * adam + s.clamp(-5, 5) * slow + x.clamp(-5, 5) * newest
    return mixed + first * (first * x).clamp(0, 1) * agreeing


def nesterov(grad: Tensor, fast: Tensor) -> Tensor:
    """β m + (1 − β) g, where m has the newest gradient in.

    Args:
        grad: g, float32.
        fast: m without it.
    """
    momentum: Tensor = FAST * FAST * fast + (1 - FAST * FAST) * grad.clamp(-LARGEST, LARGEST)
    return momentum


class DirectionalRule(Rule):
    """Δ = −scale · ℓ · c · ρ · f · min(1, RMS(u) / 0.1) · d / RMS(d), for every tensor.

    d = d₀ + w₁ u + w₂ s + w₃ x + w₄ d₀ a, with a = x d₀, cut to 0 … 1, where the newest gradient agrees. Of matrices
    d₀ is Nesterov's momentum β m₁₀ + (1 − β) g, orthogonalised (`l2o_runtime.rules.orthogonal`); of all other tensors,
    and of those that are sharded, it is u.
    u, s and x are m̂₁₀, m̂₁₀₀ and g over √v̂₁₀₀. ρ² is the mean square of the tensor, and that of all parameters, of which
    matrices take a quarter of the root (`mean_squares`, which see for zeros and scalars). ρ is at most twice what it
    was before the first step, and of scalars at least that. The weights w in ± `mix` and the correction c are the
    network's; it sees how far gradients agree over 10 and 100 steps, a tensor's size, and the context. log c follows
    what it says, with what `places` adds, by an average over 20 steps. The network has no memory and no clock, so
    nothing shrinks or grows because time passes. Before meta-training w = 0 and c = 1.

    Where gradients go on agreeing with their average over 100 steps, of a tensor and of all, there is far to go, and ℓ
    grows (`grown`), up to `grow`, as ℓ c is too. Once steps are long enough, gradients agree no longer, and ℓ stays as
    it is; it never falls. Where those of a tensor agree, whatever others do, its direction does not lead where they
    point, and it turns to Adam's: τ grows in the same way, and max(0, τ − 2) is added to w₁.

    f shortens steps where more than five matrices follow one another without a norm (`shortened`).

    Source: direction alone, normalised, as in Celo2 (arXiv 2602.19142); orthogonalised momentum as in Muon (Jordan
    2024); steps in proportion to parameters as in You et al. 2020 (LAMB).

    Attributes:
        places: (4,) what is added to what the network says of a size, by a tensor's place (`by_place`); or None.
        elementary: whether matrices are decomposed by elementary operations, for ONNX.
    """

    config: DirectionalConfig
    per_tensor = True
    normalizes = True

    def __init__(self, config: DirectionalConfig):
        super().__init__()
        self.config = config
        self.into = nn.Linear(INPUTS, config.hidden)
        self.head = nn.Linear(config.hidden, 1 + MIXED)
        silence(self.head)
        # Drawn last: rules that differ only in their context share the rest.
        bound = 1 / math.sqrt(config.hidden)
        self.weight_context = nn.Parameter(torch.empty(config.hidden, config.context.width).uniform_(-bound, bound))
        self.context = make_context(config.context)
        self.places = nn.Parameter(torch.zeros(len(PLACES))) if config.places else None
        self.elementary = False

    @property
    def spec(self) -> Spec:
        """Of coordinates averages, 12 bytes; of tensors averages of sums, log c, ℓ, τ, steps, ρ before the first, and
        a context of their own; of the model one for all tensors.
        """
        coordinate: StateSpec = dict.fromkeys([*AVERAGES, "step"], ((), torch.float32))
        return Spec(
            coordinate | self.context.coordinate_spec,
            dict.fromkeys(STATES, ((), torch.float32)) | self.context.tensor_spec,
            self.context.model_spec,
        )

    @property
    def layout_keys(self) -> tuple[str, ...]:
        """All of it."""
        return Layout._fields

    def layout(self, shapes: Sequence[torch.Size], device: torch.device | str | None = None) -> Layout:
        """With the places of the blocks of matrices."""
        return super().layout(shapes, device)._replace(grid=grid_of(shapes, self.config.rank).to(device or "cpu"))

    def terms(self, param: Tensor, grad: Tensor, state: State) -> list[Tensor]:
        """What is summed over a tensor, (..., n) each."""
        averages, _ = averages_of(grad.nan_to_num(), state)
        return [torch.ones_like(param), *terms(param, *relative(averages))]

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """The sums of `terms`, then of the context: (..., k) float64."""
        sums = torch.stack([term.sum(-1, dtype=torch.float64) for term in self.terms(param, grad, state)], dim=-1)
        return torch.cat([sums, self.context.observe(param, grad, state, offset).double()], dim=-1)

    def rows(self, param: Tensor, grad: Tensor, state: State, layout: Layout | None) -> Tensor:
        """`observe` of every tensor: (..., S, k) float64."""
        assert layout is not None
        terms = torch.stack(self.terms(param, grad, state), dim=-1).double()
        tensors = layout.shapes.shape[0]
        rows = terms.new_zeros((*terms.shape[:-2], tensors, SUMS)).index_add(-2, layout.owner, terms)
        seen = self.context.observe_tensors(param, grad, state, layout.owner, tensors)
        return torch.cat([rows, seen], dim=-1)

    def steer(self, sums: Tensor, shapes: Tensor | None, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Of every tensor the length of its step, then w: (..., S, 1 + 4)."""
        assert shapes is not None
        own = Sums(*sums[..., :SUMS].unbind(-1))
        context, read = self.context.read_rows(sums[..., SUMS:], loss, state)
        seen = context @ self.weight_context.mT

        def network(inputs: Tensor) -> Tensor:
            said: Tensor = self.head((self.into(inputs) + seen).relu())
            return said

        steering, new = steered(self.config, network, self.places, own, shapes[..., 0], state)
        return steering, new | read

    def prepare(self, grad: Tensor, state: State, shape: torch.Size) -> State:
        """As in `Rule`: the orthogonalised momentum of a matrix."""
        matrix = sides(shape)
        if matrix is None or not self.config.rank:
            return {}
        momentum = nesterov(grad, state[MOMENTUM]).view(1, *matrix)
        return {"whole": orthogonalise_each([momentum], self.config.rank)[0].reshape(-1)}

    def prepare_all(self, grad: Tensor, state: State, layout: Layout | None) -> State:
        """As in `Rule`."""
        assert layout is not None
        assert layout.grid is not None
        if not self.config.rank:
            return {}
        momentum = nesterov(grad, state[MOMENTUM])
        whole, inside = orthogonalise_all(momentum, layout.grid, self.config.rank, self.elementary)
        return {"whole": torch.where(inside, whole, relative(averages_of(grad, state)[0])[1])}

    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """As in `Rule`: d, and new averages."""
        averages, new = averages_of(grad, state)
        new |= self.context.remember(param, grad, state)
        x, u, s = relative(averages)
        return mixture(state.get("whole", u), x, u, s, steering[..., 1:].unbind(-1)), new

    def finish(self, direction: Tensor, mean_square: Tensor, steering: Tensor, state: State) -> Tensor:
        """As in `Rule`."""
        return -(steering[..., 0] / mean_square.sqrt().clamp_min(TINY)) * direction
