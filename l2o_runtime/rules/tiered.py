"""The two-tier rule `scale`: an LSTM for every tensor steers a tiny network for every coordinate.

The LSTM reads sums over its tensor, so it costs nothing per coordinate; what it says (a magnitude, and a gain and a
bias for every unit of the network) is the tensor's context. The three phases stay what they are; statistics and
contexts have a row per tensor.
"""

import torch
from torch import Tensor, nn

from l2o_runtime.config import DMDConfig, RuleConfig
from l2o_runtime.contexts import make_context
from l2o_runtime.contexts.dmd import DMD
from l2o_runtime.contexts.progress import Progress
from l2o_runtime.layout import Layout
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import SMALLEST_SQUARE, combine, lowest_root
from l2o_runtime.rules.lstm import OUTPUTS, Rule
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.rules.tiered_features import AVERAGES, INPUTS, TERMS, averages_of, directions, look, terms
from l2o_runtime.state import LARGEST, State, StateSpec

UNITS = 8
"""Hidden units of the network per coordinate."""

TENSOR_INPUTS = 13
"""Numbers per tensor that the LSTM sees, besides what is the same for all of them."""

KNOWN_STEPS = 100
"""Then its clocks stand still, except in meta-training."""

KNOWN_SIZE = 8192
"""It is told a tensor's size up to so many coordinates: those of its meta-training are no larger."""

GROWTH = 10.0
"""Steps grow with their parameters, until these are 1 and so many times the initial ones."""

FADING = 25.0
"""In networks larger than it knows steps may fade after so many of them, with the root of their number."""

LONGEST = 5.0
"""What no coordinate of d exceeds where growth is bounded; Adam's direction is cut there as well."""

LONGEST_UNKNOWN = 40.0
"""What none exceeds in networks larger than it knows."""

SCALARS = 6
"""Numbers in a tensor's context before the gains and biases."""

SMALLEST_SIZE = 1e-3
"""Steps are in proportion to parameters, and those that are smaller than this have to move too."""

SMALLEST_DIRECTION = 0.1
"""Directions are scaled to a root mean square of 1, but no more than tenfold: of an embedding few rows have moved."""


def log_root(square: Tensor, count: Tensor | float) -> Tensor:
    """½ log of a mean square, float32, finite where it is zero."""
    return (square / count).clamp_min(SMALLEST_SQUARE).log().div(2).float()


def cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x·y / (|x| |y|) from x·y, x·x and y·y, float32; 0 where one is zero."""
    return (product / first.clamp_min(SMALLEST_SQUARE).sqrt() / second.clamp_min(SMALLEST_SQUARE).sqrt()).float()


class ScaleRule(Rule):
    """Δ = −scale · e^(2 s) · ρ · d / RMS(u), for every tensor.

    u = m̂₁₀/√v̂₁₀₀ is Adam's direction; d is u changed by the coordinate's network, whose hidden units have gains and
    biases from the tensor's LSTM, as has the magnitude s; ρ² is the mean square of the tensor's parameters plus that of
    all parameters, and at most the larger of 1 and ten times what it was before the first step. So steps do not change
    with the scale of the gradients, and are in proportion to the parameters (but do not grow with them exponentially);
    coordinates without any gradient do not move. Before meta-training d = u and s = 0. With `growth` e^(2 s)
    is at most so many times what it was in the step before, and d is cut to ± LONGEST: neither a wrong guess of the
    LSTM nor a coordinate that is unlike all others does much harm in one step. With `known_parameters` Δ is multiplied
    by κ = (known_parameters / N)^¼ where the number N of all coordinates is larger: a relative step that changes what a
    layer gives by a certain share is shorter by the root of its width, and of more layers each has to do less. There,
    in step t, e^(2 s) is at least (1 − κ) / √(1 + t / FADING): that it shrinks at once was learned where a few hundred
    steps are enough. And d is cut to ± LONGEST_UNKNOWN: coordinates whose gradients are nothing but rounding, as those
    of an attention's key biases, would go far.

    In training mode its clocks run; in evaluation mode they stop at KNOWN_STEPS. Through truncations it pays to let
    steps shrink, which lowers the noise of the losses at once; the clocks are where a rule learns that, and where it
    can be taken out again. Nothing here knows how many steps are to come, or the name of a layer.

    Source: two tiers as in Wichrowska et al. 2017 and Metz et al. 2022 (VeLO); gains and biases as in Perez et al. 2018
    (FiLM); steps in proportion to parameters as in You et al. 2020 (LAMB); the root
    of the width as in Yang et al. 2022 (μP); that of the time as in stochastic approximation (Zinkevich 2003).
    """

    def __init__(self, config: RuleConfig):
        nn.Module.__init__(self)
        self.config = config
        self.progress = Progress()
        # The context is drawn last: rules whose contexts are of one width share all other weights.
        self.into = nn.Linear(INPUTS, UNITS)
        self.out = nn.Linear(UNITS, OUTPUTS)
        width = Progress.WIDTH + config.context.width
        self.cell = CoordinateLSTM(TENSOR_INPUTS, width, config.hidden, config.layers, 1 + 2 * UNITS)
        for head in (self.out, self.cell.head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.context = make_context(config.context)
        self.layered = isinstance(config.context, DMDConfig) and config.context.scope == "tensor"

    @property
    def context_spec(self) -> StateSpec:
        """What the context keeps of the whole optimization, and what `Progress` does."""
        assert isinstance(self.progress, Progress)
        return ({} if self.layered else self.context.context_spec) | self.progress.context_spec

    @property
    def coordinate_spec(self) -> StateSpec:
        """Averages (12 bytes), and what an exact window keeps."""
        return dict.fromkeys([*AVERAGES, "step"], ((), torch.float32)) | self.context.coordinate_spec

    @property
    def tensor_spec(self) -> StateSpec:
        """For every tensor the LSTM's memory, ρ before the first step, the last e^(2 s) if growth is bounded,
        and the context's state if it is layer-wise.
        """
        spec: StateSpec = self.cell.coordinate_spec | {"initial_rho": ((), torch.float32)}
        spec |= {} if self.config.growth is None else {"length": ((), torch.float32)}
        spec |= self.context.context_spec if self.layered else {}
        return {f"tensor_{key}": value for key, value in spec.items()}

    def terms(self, param: Tensor, grad: Tensor, state: State) -> Tensor:
        """What is summed over a tensor: `Progress.terms`, then squares and products of averages; (..., n, k) float64.

        Args:
            param, grad: (..., n).
            state: before this step; the averages here have the newest gradient in.
        """
        assert isinstance(self.progress, Progress)
        averages, _ = averages_of(grad.nan_to_num(), state)
        own = terms(param.double(), *(x.double() for x in averages[:-1]))
        return torch.stack([*self.progress.terms(grad, state["m10"], state["v100"]), *own], dim=-1)

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Statistics (..., k) of some coordinates of one tensor; sum over its parts before `contextualise`."""
        statistics = self.context.observe(param, grad, state, offset)
        return torch.cat([self.terms(param, grad, state).sum(-2), statistics], dim=-1)

    def perceive(
        self,
        param: Tensor,
        grad: Tensor,
        loss: Tensor,
        coordinates: State,
        optimization: State,
        layout: Layout | None = None,
    ) -> tuple[Tensor, State]:
        """As in `Rule`; the context has a row for every tensor, (..., S, c)."""
        assert layout is not None
        rows = self.sums(param, grad, coordinates, layout)
        tensors = layout.shapes.shape[0]  # not len, which would be constant in a trace
        if self.layered:
            assert isinstance(self.context, DMD)
            statistics = self.context.observe_tensors(param, grad, coordinates, layout.owner, tensors).to(rows.dtype)
        else:  # only the sum over all tensors counts
            first = torch.arange(tensors, device=rows.device).unsqueeze(-1) == 0
            total = self.context.observe(param, grad, coordinates, 0).to(rows.dtype).unsqueeze(-2)
            statistics = torch.where(first, total, 0.0)
        return self.contextualise_tensors(torch.cat([rows, statistics], dim=-1), layout.shapes, loss, optimization)

    def sums(self, param: Tensor, grad: Tensor, state: State, layout: Layout) -> Tensor:
        """The sums of `terms` over every tensor: (..., S, k) float64."""
        terms = self.terms(param, grad, state)
        rows = terms.new_zeros((*terms.shape[:-2], layout.shapes.shape[0], terms.shape[-1]))
        return rows.index_add(-2, layout.owner, terms)

    def spread(self, context: Tensor, layout: Layout | None = None, chosen: Tensor | None = None) -> Tensor:
        """As in `Rule`: each coordinate gets its tensor's row, (..., n, c) or (..., k, c)."""
        assert layout is not None
        if chosen is None:
            return context.index_select(-2, layout.owner)
        owner = layout.owner[chosen].unsqueeze(-1)
        return context.gather(-2, owner.expand(*owner.shape[:-1], context.shape[-1]))

    def contextualise_tensors(
        self, statistics: Tensor, shapes: Tensor, loss: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """The context of this step, a row for every tensor.

        Args:
            statistics: (..., S, k), each row summed over its tensor.
            shapes: (S, 2) as in `Layout`.
            loss: (...) loss at θ; zero where it is not known.
            state: context state, and the tensors' with (..., S) in front.

        Returns:
            Context (..., S, SCALARS + 2 · UNITS) and the new states.
        """
        assert isinstance(self.progress, Progress)
        size = Progress.STATISTICS + TERMS
        total = statistics.sum(-2)
        latest = None if self.training else KNOWN_STEPS
        progress, new = self.progress.contextualise(total[..., : Progress.STATISTICS], loss, state, latest)
        level, seen = progress[..., :1], progress[..., 1:]

        count, gg, product, normal, averaged = statistics[..., : Progress.STATISTICS].unbind(-1)
        own = statistics[..., Progress.STATISTICS : size]
        root, theta, fast, slow, fast_slow, fast_theta, u, g_theta = own.unbind(-1)
        n, everything = count.clamp_min(1), total[..., 0].clamp_min(1)
        mean_theta = (total[..., Progress.STATISTICS + 1] / everything).unsqueeze(-1)
        # In stacks: these are few numbers, and each operator costs more than its arithmetic.
        sizes = log_root(torch.stack([gg, root, fast, slow, theta, u], dim=-1), n.unsqueeze(-1))
        size_g, size_root, size_fast, size_slow, size_theta, size_u = sizes.unbind(-1)
        products = torch.stack([product, fast_slow, fast_theta, g_theta], dim=-1)
        lengths = torch.stack([normal, fast, fast, gg, averaged, slow, theta, theta], dim=-1)
        agreement, *cosines = cosine(products, *lengths.chunk(2, dim=-1)).unbind(-1)
        present = (theta / n + mean_theta + SMALLEST_SIZE**2).sqrt().float()
        initial = torch.where(state["tensor_initial_rho"] > 0, state["tensor_initial_rho"], present)
        rho = torch.minimum(present, (GROWTH * initial).clamp_min(1.0))
        inputs = [
            (size_g - size_root).clamp(-3, 3),
            (size_root - level).clamp(-8, 8) / 4,
            (size_fast - size_root).clamp(-5, 5),
            (size_slow - size_fast).clamp(-5, 5),
            (size_theta - log_root(mean_theta, 1.0)).clamp(-8, 8) / 4,
            agreement,
            ((averaged + 1e-6) / (normal + 1e-6)).log().float() / 4,
            *cosines,
            size_u.clamp(-5, 5),
            (n.clamp_max(KNOWN_SIZE).log() / 10).float(),
            (shapes[..., 0] / 4).expand_as(size_u),
        ]
        features, cell_state = torch.stack(inputs, dim=-1), _of_tensors(state, self.cell.coordinate_spec)
        if self.layered:  # to the network every tensor is an optimization of its own, with one coordinate
            own_state, own_loss = _of_tensors(state, self.context.context_spec), loss.unsqueeze(-1).expand_as(count)
            context, own_state = self.context.contextualise(statistics[..., size:], own_loss, own_state)
            seen = torch.cat([seen.unsqueeze(-2).expand(*count.shape, -1), context], dim=-1)
            lone = {key: value.unsqueeze(-2) for key, value in cell_state.items()}
            output, lone = self.cell(features.unsqueeze(-2), seen, lone)
            output, cell_state = output.squeeze(-2), {key: value.squeeze(-2) for key, value in lone.items()}
            cell_state = cell_state | own_state
        else:
            context, context_state = self.context.contextualise(total[..., size:], loss, state)
            new |= context_state
            output, cell_state = self.cell(features, torch.cat([seen, context], dim=-1), cell_state)
        kept = {"initial_rho": initial}
        trust = self.trust(everything).unsqueeze(-1)
        shortest = (1 - trust) / (1 + new["steps"].unsqueeze(-1) / FADING).sqrt()
        length = torch.maximum((2 * output[..., 0].clamp(-4, 4)).exp(), shortest)
        longest = torch.full_like(length, LARGEST)
        if self.config.growth is not None:
            before = state["tensor_length"]
            length = torch.where(before > 0, torch.minimum(length, self.config.growth * before), length)
            kept["length"], longest = length, longest.clamp_max(LONGEST)
        magnitude = self.config.output_scale * length * rho * trust
        magnitude = magnitude / (u / n).sqrt().float().clamp_min(SMALLEST_DIRECTION)
        longest = torch.where(trust < 1, longest.clamp_max(LONGEST_UNKNOWN), longest)
        noise = ((self.config.noise_floor or 0.0) * level.exp()).expand_as(magnitude)
        scalars = torch.stack([size_root, size_fast, rho, noise, longest, magnitude], dim=-1)
        new |= {f"tensor_{key}": value for key, value in (cell_state | kept).items()}
        return torch.cat([scalars, output[..., 1:]], dim=-1), new

    def trust(self, count: Tensor) -> Tensor:
        """κ = min(1, (known_parameters / N)^¼) for N parameters, float32 in the shape of N; 1 where any N is known."""
        known = self.config.known_parameters
        return torch.ones_like(count).float() if known is None else (known / count).clamp_max(1.0).pow(0.25).float()

    def update(self, grad: Tensor, param: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """The step of some coordinates.

        Args:
            grad, param: (..., n) float32.
            context: their tensor's (..., 1, c), or a row for every one of them (..., n, c).
            state: coordinate state.

        Returns:
            Δ (..., n), to be multiplied by lr and added to θ, and the new coordinate state.
        """
        remembered = self.context.remember(param, grad, state)
        size_root, size_fast, rho, noise, longest, magnitude = context[..., :SCALARS].unbind(-1)
        gain, bias = context[..., SCALARS:].chunk(2, dim=-1)
        averages, new = averages_of(grad, state)
        seen = look(param / rho, averages, lowest_root(size_root), size_root)
        hidden = (self.into(torch.stack(seen.features, dim=-1)) * (1 + gain) + bias).relu()
        delta = combine(self.out(hidden).unbind(-1), directions(seen, averages, (-size_fast).exp()))
        delta = magnitude * delta.clamp(-longest, longest)
        if self.config.noise_floor is not None:
            delta = restrain(delta, *seen.relative, noise)
        return delta, new | remembered


def _of_tensors(state: State, spec: StateSpec) -> State:
    """What of a state is kept for every tensor under these names."""
    return {key: state[f"tensor_{key}"] for key in spec}
