"""The tiered rule: an LSTM for every tensor steers a tiny network for every coordinate.

The LSTM reads sums over its tensor, so it costs nothing per coordinate; what it says (a magnitude, and a gain and a
bias for every unit of the network) is what the tensor is steered by.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from l2o_runtime.config import LATER, ContextConfig, NoneConfig, TensorDMDConfig, require
from l2o_runtime.contexts import make_context
from l2o_runtime.contexts.progress import Progress
from l2o_runtime.layout import Layout
from l2o_runtime.rules.base import OUTPUTS, Rule, RuleConfig, Spec, silence
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import SMALLEST_SQUARE, combine, lowest_root, step_size
from l2o_runtime.rules.limits import StepLimits
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.rules.statistics import AVERAGES, averages_of, relative_size
from l2o_runtime.rules.tiered_features import INPUTS, TERMS, directions, look, terms
from l2o_runtime.state import LARGEST, State, StateSpec, of_tensors, to_tensors

UNITS = 8
"""Hidden units of the network per coordinate."""

TENSOR_INPUTS = 13
"""Numbers per tensor that the LSTM sees, besides what is the same for all of them."""

KNOWN_SIZE = 8192
"""It is told a tensor's size up to so many coordinates: those of its meta-training are no larger."""

SCALARS = 6
"""Numbers in a tensor's steering before the gains and biases."""

SMALLEST_DIRECTION = 0.1
"""Directions are scaled to a root mean square of 1, but no more than tenfold: of an embedding few rows have moved."""


@dataclass(frozen=True, kw_only=True)
class TieredConfig(RuleConfig):
    """An LSTM per tensor steers a tiny network per coordinate, which changes Adam's step.

    Attributes:
        noise_floor: a gradient smaller than this share of the root mean square of all gradients is taken for rounding,
            and where a gradient is gone steps fade (`l2o_runtime.rules.restraint`). None does neither.
        limits: how steps are held back in networks larger than it knows; None treats all alike.
        clock_stop: its clocks stand still after so many steps; None lets them run, as in meta-training. Through
            truncations it pays to let steps shrink, which lowers the noise of the losses at once; the clocks are where
            a rule learns that, and where it can be taken out again.
        context: as of all rules, or one for every tensor.
    """

    kind: ClassVar[str] = "tiered"
    features: ClassVar[str] = "moments"
    output_scale: float = 0.003
    noise_floor: float | None = field(default=None, metadata=LATER)
    limits: StepLimits | None = None
    clock_stop: int | None = 100
    context: ContextConfig | TensorDMDConfig = field(default_factory=NoneConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        stop = self.clock_stop
        require(stop is None or 1 <= stop <= 10**9, f"clock_stop: must be in 1..{10**9}, or absent; got {stop}")

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.hidden}-unit LSTM per tensor, {UNITS}-unit network per coordinate"

    @property
    def flops(self) -> int | None:
        """Floating-point operations of matrix products per coordinate and step, biases included.

        >>> TieredConfig().flops
        204
        """
        return 2 * UNITS * (INPUTS + OUTPUTS) + UNITS + OUTPUTS

    @property
    def unrolled(self) -> "TieredConfig":
        """As it is while it is meta-trained: its clocks run."""
        return replace(self, clock_stop=None)


def log_root(square: Tensor, count: Tensor | float) -> Tensor:
    """½ log of a mean square, float32, finite where it is zero."""
    return (square / count).clamp_min(SMALLEST_SQUARE).log().div(2).float()


def cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x·y / (|x| |y|) from x·y, x·x and y·y, float32; 0 where one is zero."""
    return (product / first.clamp_min(SMALLEST_SQUARE).sqrt() / second.clamp_min(SMALLEST_SQUARE).sqrt()).float()


class Sums(NamedTuple):
    """Sums over a tensor, (..., S) float64 each: of `Progress.terms`, then of `TieredRule.terms`.

    Size is the number of coordinates. With g the gradient, m₁₀ and v₁₀₀ its averages before this step, `product`,
    `normal` and `averaged` are those of g m₁₀ / v₁₀₀, g² / v₁₀₀ and m₁₀² / v₁₀₀; fast and slow are m̂₁₀ and m̂₁₀₀ with
    the newest gradient in.
    """

    size: Tensor
    grad: Tensor
    product: Tensor
    normal: Tensor
    averaged: Tensor
    root: Tensor
    theta: Tensor
    fast: Tensor
    slow: Tensor
    fast_slow: Tensor
    fast_theta: Tensor
    direction: Tensor
    grad_theta: Tensor


class Sizes(NamedTuple):
    """Logs of root mean squares of a tensor's coordinates, (..., S) float32 each."""

    grad: Tensor
    root: Tensor
    fast: Tensor
    slow: Tensor
    theta: Tensor
    direction: Tensor


class TieredRule(Rule):
    """Δ = −scale · κ · e^(2 s) · ρ · d / RMS(u), for every tensor.

    u = m̂₁₀/√v̂₁₀₀ is Adam's direction; d is u changed by the coordinate's network, whose hidden units have gains and
    biases from the tensor's LSTM, as has the magnitude s; ρ² is the mean square of the tensor's parameters plus that of
    all parameters, and at most the larger of 1 and ten times what it was before the first step; κ is of `StepLimits`.
    So steps do not change with the scale of the gradients, and are in proportion to the parameters (but do not grow
    with them exponentially); coordinates without any gradient do not move. Before meta-training d = u and s = 0.
    Nothing here knows how many steps are to come, or the name of a layer.

    Source: two tiers as in Wichrowska et al. 2017 and Metz et al. 2022 (VeLO); gains and biases as in Perez et al. 2018
    (FiLM); steps in proportion to parameters as in You et al. 2020 (LAMB).
    """

    config: TieredConfig
    per_tensor = True

    def __init__(self, config: TieredConfig):
        super().__init__()
        self.config = config
        self.progress = Progress()
        # The context is drawn last: rules whose contexts are of one width share all other weights.
        self.into = nn.Linear(INPUTS, UNITS)
        self.out = nn.Linear(UNITS, OUTPUTS)
        width = Progress.WIDTH + config.context.width
        self.cell = CoordinateLSTM(TENSOR_INPUTS, width, config.hidden, config.layers, 1 + 2 * UNITS)
        silence(self.out, self.cell.head)
        self.context = make_context(config.context)

    @property
    def spec(self) -> Spec:
        """Of coordinates averages (12 bytes), and what an exact window keeps; of tensors the LSTM's memory, ρ before
        the first step, and a context of their own; of the model its progress, and a context for all tensors.
        """
        coordinate: StateSpec = dict.fromkeys([*AVERAGES, "step"], ((), torch.float32))
        tensor: StateSpec = self.cell.coordinate_spec | {"initial_rho": ((), torch.float32)}
        return Spec(
            coordinate | self.context.coordinate_spec,
            to_tensors(tensor) | self.context.tensor_spec,
            self.context.model_spec | self.progress.context_spec,
        )

    def terms(self, param: Tensor, grad: Tensor, state: State) -> Tensor:
        """What is summed over a tensor: `Progress.terms`, then squares and products of averages; (..., n, k) float64.

        Args:
            param, grad: (..., n).
            state: before this step; the averages here have the newest gradient in.
        """
        averages, _ = averages_of(grad.nan_to_num(), state)
        own = terms(param.double(), *(x.double() for x in averages[:-1]))
        return torch.stack([*self.progress.terms(grad, state["m10"], state["v100"]), *own], dim=-1)

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Sums of `terms` and of the context over some coordinates of one tensor: (..., k)."""
        seen = self.context.observe(param, grad, state, offset)
        return torch.cat([self.terms(param, grad, state).sum(-2), seen], dim=-1)

    def rows(self, param: Tensor, grad: Tensor, state: State, layout: Layout | None) -> Tensor:
        """`observe` of every tensor: (..., S, k)."""
        assert layout is not None
        sums = self.sums(param, grad, state, layout)
        seen = self.context.observe_tensors(param, grad, state, layout.owner, layout.shapes.shape[0])
        return torch.cat([sums, seen], dim=-1)

    def sums(self, param: Tensor, grad: Tensor, state: State, layout: Layout) -> Tensor:
        """The sums of `terms` over every tensor: (..., S, k) float64."""
        terms = self.terms(param, grad, state)
        tensors = layout.shapes.shape[0]  # not len, which would be constant in a trace
        rows = terms.new_zeros((*terms.shape[:-2], tensors, terms.shape[-1]))
        return rows.index_add(-2, layout.owner, terms)

    def steer(self, sums: Tensor, shapes: Tensor | None, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Of every tensor `SCALARS` numbers, then a gain and a bias for every unit: (..., S, 6 + 2 · 8)."""
        assert shapes is not None
        total, seen_by_context = sums.sum(-2), Progress.SUMS + TERMS
        progress, new = self.progress.read(total[..., : Progress.SUMS], loss, state, self.config.clock_stop)
        level, shared = progress[..., :1], progress[..., 1:]
        own = Sums(*sums[..., :seen_by_context].unbind(-1))
        count, everything = own.size.clamp_min(1), total[..., 0].clamp_min(1)
        mean_theta = (total[..., Progress.SUMS + 1] / everything).unsqueeze(-1)
        # In a stack: these are few numbers, and each operator costs more than its arithmetic.
        squares = [own.grad, own.root, own.fast, own.slow, own.theta, own.direction]
        sizes = Sizes(*log_root(torch.stack(squares, dim=-1), count.unsqueeze(-1)).unbind(-1))
        inputs = self._inputs(own, sizes, level, mean_theta, count, shapes)
        context, read = self.context.read_rows(sums[..., seen_by_context:], loss, state)
        output, memory = self._network(inputs, shared, context, state)
        rho, initial = relative_size(own.theta / count, mean_theta, state["tensor_initial_rho"])
        steps = new["steps"].unsqueeze(-1)
        magnitude, longest = self._lengths(output[..., 0], rho, own.direction / count, everything, steps)
        noise = ((self.config.noise_floor or 0.0) * level.exp()).expand_as(magnitude)
        scalars = torch.stack([sizes.root, sizes.fast, rho, noise, longest, magnitude], dim=-1)
        return torch.cat([scalars, output[..., 1:]], dim=-1), new | read | memory | {"tensor_initial_rho": initial}

    def _inputs(
        self, sums: Sums, sizes: Sizes, level: Tensor, mean_theta: Tensor, count: Tensor, shapes: Tensor
    ) -> Tensor:
        """What the LSTM sees of each tensor: (..., S, TENSOR_INPUTS)."""
        products = torch.stack([sums.product, sums.fast_slow, sums.fast_theta, sums.grad_theta], dim=-1)
        first = torch.stack([sums.normal, sums.fast, sums.fast, sums.grad], dim=-1)
        second = torch.stack([sums.averaged, sums.slow, sums.theta, sums.theta], dim=-1)
        agreement, *cosines = cosine(products, first, second).unbind(-1)
        inputs = [
            (sizes.grad - sizes.root).clamp(-3, 3),
            (sizes.root - level).clamp(-8, 8) / 4,
            (sizes.fast - sizes.root).clamp(-5, 5),
            (sizes.slow - sizes.fast).clamp(-5, 5),
            (sizes.theta - log_root(mean_theta, 1.0)).clamp(-8, 8) / 4,
            agreement,
            ((sums.averaged + 1e-6) / (sums.normal + 1e-6)).log().float() / 4,
            *cosines,
            sizes.direction.clamp(-5, 5),
            (count.clamp_max(KNOWN_SIZE).log() / 10).float(),
            (shapes[..., 0] / 4).expand_as(sizes.direction),
        ]
        return torch.stack(inputs, dim=-1)

    def _network(self, inputs: Tensor, shared: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """What the LSTM says of each tensor (..., S, 1 + 2 · UNITS), and its new state."""
        memory = of_tensors(state, self.cell.coordinate_spec)
        if not self.context.per_tensor:
            output, memory = self.cell(inputs, torch.cat([shared, context.squeeze(-2)], dim=-1), memory)
        else:
            # To the network every tensor is an optimization of its own, with one coordinate.
            seen = torch.cat([shared.unsqueeze(-2).expand(*inputs.shape[:-1], -1), context], dim=-1)
            output, memory = self.cell(inputs.unsqueeze(-2), seen, {k: v.unsqueeze(-2) for k, v in memory.items()})
            output, memory = output.squeeze(-2), {key: value.squeeze(-2) for key, value in memory.items()}
        return output, to_tensors(memory)

    def _lengths(
        self, size: Tensor, rho: Tensor, direction: Tensor, everything: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What d is multiplied by, and what none of its coordinates exceeds: (..., S) float32.

        Args:
            size: s, from the network.
            rho: ρ.
            direction: mean square of u.
            everything: (...) number of all parameters.
            steps: (..., 1) so far.
        """
        length, longest = step_size(size), torch.full_like(size, LARGEST)
        limits = self.config.limits
        if limits is not None:
            trust = limits.trust(everything).unsqueeze(-1)
            length, longest = limits.lengthen(length, trust, steps), limits.bound(trust).expand_as(size)
        magnitude = self.config.output_scale * length * rho
        if limits is not None:
            magnitude = magnitude * trust
        return magnitude / direction.sqrt().float().clamp_min(SMALLEST_DIRECTION), longest

    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """As in `Rule`."""
        remembered = self.context.remember(param, grad, state)
        size_root, size_fast, rho, noise, longest, magnitude = steering[..., :SCALARS].unbind(-1)
        gain, bias = steering[..., SCALARS:].chunk(2, dim=-1)
        averages, new = averages_of(grad, state)
        seen = look(param / rho, averages, lowest_root(size_root), size_root)
        hidden = (self.into(torch.stack(seen.features, dim=-1)) * (1 + gain) + bias).relu()
        delta = combine(self.out(hidden).unbind(-1), directions(seen, averages, (-size_fast).exp()))
        delta = magnitude * delta.clamp(-longest, longest)
        if self.config.noise_floor is not None:
            delta = restrain(delta, *seen.relative, noise)
        return delta, new | remembered
