"""The directional rule: what is learned is a direction, normalised for every tensor; its size comes from a schedule.

Before meta-training it is a hand-made step: along the orthogonalised momentum of matrices, along Adam's direction of
all other tensors, in proportion to the parameters. A small network for every tensor, without memory, mixes other
directions in and corrects the size within bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from l2o_runtime.config import ContextConfig, NoneConfig, require
from l2o_runtime.contexts import make_context
from l2o_runtime.layout import Layout
from l2o_runtime.rules.base import Rule, RuleConfig, Spec, silence
from l2o_runtime.rules.orthogonal import grid_of, orthogonalise_all, orthogonalise_each, sides
from l2o_runtime.rules.statistics import AVERAGES, SPANS, Averages, averages_of, relative_size
from l2o_runtime.state import LARGEST, State, StateSpec

MOMENTUM = "m10"
"""The average that is orthogonalised."""

FAST, SLOW = (1 - 1 / span for span in SPANS["m"])
"""β of the two averages of gradients."""

MIXED = 4
"""Directions that the network may mix in: Adam's, the slow average's, the gradient's, and what agrees with it."""

INPUTS = 9
"""Numbers per tensor that the network sees."""

SUMS = 7
"""Over a tensor's coordinates: see `Sums`."""

MEMORY = 20
"""Steps over which statistics and the size's correction are averaged."""

KEPT = ("xx", *(f"{kind}{span}" for span in SPANS["m"] for kind in ("product", "energy", "noise")))
"""Statistics of a tensor of which averages are kept: see `agreements`."""

SPENT = 0.1
"""Steps fade where Adam's direction has a smaller root mean square than this: there gradients have gone."""

GROWTH = 2.0
"""Steps grow with a tensor's parameters until these are so many times the initial ones: else large steps run away."""

SHARE = 0.25
"""Of the size of all parameters in that of a matrix, so that those that are zero move too."""

DRAWN = 1 / 12
"""Mean square of weights that are drawn, times the side of their matrix: a quarter of PyTorch's, whose root is half."""

FOREIGN = 10.0
"""Parameters that are so many times larger, or smaller, are in another unit."""

LENGTHENING = 0.05
"""What is added to the logarithm of a tensor's steps for every step in which its gradients agree fully over 100."""

AGREEING = 0.05
"""Cosine above which gradients agree: below it steps are long enough."""

CHANCE = 0.5
"""In networks of n parameters that cosine is at least this over √n: so much may be noise."""

DECAY_UNIT = 0.005
"""What weight decay is multiplied by: AdamW's values mean about what they mean there."""

SMALLEST_ENERGY = 1e-6
"""Beside squares of gradients that are divided by the root of their mean square."""

TINY = 1e-12


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
    context: ContextConfig = field(default_factory=NoneConfig)

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
        """Directions may be mixed in at full weight."""
        return replace(self, mix=max(1.0, self.mix))

    @property
    def decay_unit(self) -> float:
        """As at a step of `DECAY_UNIT` beside the parameters."""
        return DECAY_UNIT


class Sums(NamedTuple):
    """Sums over a tensor, (..., S) float64 each.

    With r = √v̂₁₀₀, x = g/r, u = m̂₁₀/r and s = m̂₁₀₀/r, all with the newest gradient in: the number of coordinates, θ²,
    x², x u, u², x s and s².
    """

    size: Tensor
    theta: Tensor
    xx: Tensor
    xu: Tensor
    uu: Tensor
    xs: Tensor
    ss: Tensor


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


def agreements(sums: Sums, steps: Tensor) -> dict[str, Tensor]:
    """How far this step's gradient agrees with those before it, per coordinate, (..., S) float64 each, by `KEPT`.

    m̂ = m / (1 − βᵗ) has the newest x in; without it m' = (m − (1 − β) x) / β. So the sums give `product` x·m', `energy`
    m'², and the energy that m' would have if gradients were nothing but noise,
    `noise` x² (1 − β) (1 − β^(2 (t − 1))) / (1 + β).

    Args:
        sums: of this step.
        steps: (..., S) t ≥ 1.
    """
    found: dict[str, Tensor] = {}
    count = sums.size.clamp_min(1)
    xx, t, begun = sums.xx / count, steps.double(), steps > 1
    for span, beta, xm, mm in zip(SPANS["m"], (FAST, SLOW), (sums.xu, sums.xs), (sums.uu, sums.ss), strict=True):
        seen, new = 1 - beta**t, 1 - beta
        product = (xm / count * seen - new * xx) / beta
        energy = (mm / count * seen * seen - 2 * new * xm / count * seen + new * new * xx) / beta**2
        noise = xx * new / (1 + beta) * (1 - beta ** (2 * (t - 1)))
        found |= {f"product{span}": product, f"energy{span}": energy.clamp_min(0), f"noise{span}": noise}
    # Before the first step there was no gradient: what the differences leave is rounding.
    return {"xx": xx} | {key: torch.where(begun, value, 0.0) for key, value in found.items()}


def mean_squares(theta: Tensor, size: Tensor, dimensions: Tensor) -> tuple[Tensor, Tensor]:
    """The two of which ρ² is the sum: a tensor's mean square, and what counts of that of all; (..., S) each.

    Of a matrix the second is a sixteenth. Of a vector, such as the gains of norms, the first counts for no more than
    that of all. Scalars may have units of their own: that of all leaves them out where there is anything else.

    Had PyTorch drawn the parameters, as square matrices, a quarter of their mean square would be q = Σ √n_s / 12n. What
    that of all lacks of it is added to it and to a tensor's own: where all begin with zero, nothing else says how large
    they will be. That of all counts for no more than 100 q or a tensor's own if that is more, and of a scalar that is
    not zero for no more than a hundredfold its own: what is larger has another unit.

    Args:
        theta: (..., S) Σ θ² of each tensor.
        size, dimensions: (..., S) n_s, their coordinates, and how many dimensions they have.

    >>> of_zeros = mean_squares(torch.tensor([0.0, 0.0, 100.0]), torch.tensor([36.0, 12.0, 1.0]), torch.ones(3))
    >>> sum(of_zeros).sqrt()
    tensor([ 0.1813,  0.1813, 10.0008])
    """
    counted = (size > 1) | ~(size > 1).any(-1, keepdim=True)
    count = torch.where(counted, size, 0.0).sum(-1, keepdim=True).clamp_min(1)
    drawn = DRAWN * torch.where(counted, size.sqrt(), 0.0).sum(-1, keepdim=True) / count
    everything = torch.where(counted, theta, 0.0).sum(-1, keepdim=True) / count
    lacking = (drawn - everything).clamp_min(0)
    everything, own = everything + lacking, theta / size.clamp_min(1)
    alone, matrix = (size == 1) & (own > 0), dimensions > 1
    own = torch.where(alone, own, own + lacking)
    bound = torch.where(alone, FOREIGN**2 * own, torch.maximum(FOREIGN**2 * drawn, own))
    first = torch.where(matrix | alone, own, torch.minimum(own, everything))
    return first, torch.where(matrix, SHARE**2, 1.0) * torch.minimum(everything, bound)


def lengthened(longer: Tensor, slow: Tensor, everywhere: Tensor, steps: Tensor, count: Tensor) -> Tensor:
    """ℓ after a step, (..., S): ℓ exp(0.05 max(0, min(cos, everywhere) (1 − βᵗ)² − max(0.05, ½/√n))).

    Of few coordinates noise may agree, so that all have to; and an average over 100 steps that has seen but a few of
    them tells little.

    Args:
        longer: (..., S) ℓ before it, 0 before the first.
        slow, everywhere: (..., S) cosine of gradients with their average over 100 steps, of a tensor and of all.
        steps: (..., S) t ≥ 1.
        count: (..., 1) n, of all coordinates.
    """
    agreement = torch.minimum(slow, everywhere) * (1 - SLOW**steps) ** 2
    noise = (CHANCE / count.clamp_min(1).sqrt()).float().clamp_min(AGREEING)
    return torch.where(longer > 0, longer, 1.0) * (LENGTHENING * (agreement - noise).clamp_min(0)).exp()


class DirectionalRule(Rule):
    """Δ = −scale · ℓ · c · ρ · min(1, RMS(u) / 0.1) · d / RMS(d), for every tensor.

    d = d₀ + w₁ u + w₂ s + w₃ x + w₄ d₀ a, with a = x d₀, cut to 0 … 1, where the newest gradient agrees. Of matrices
    d₀ is Nesterov's momentum β m₁₀ + (1 − β) g, orthogonalised (`l2o_runtime.rules.orthogonal`); of all other tensors,
    and of those that are sharded, it is u.
    u, s and x are m̂₁₀, m̂₁₀₀ and g over √v̂₁₀₀. ρ² is the mean square of the tensor, and that of all parameters, of which
    matrices take a quarter of the root (`mean_squares`, which see for zeros and scalars). ρ is at most twice what it
    was before the first step, and of scalars at least that. The weights w in ± `mix` and the correction c are the
    network's; it sees how far gradients agree over 10 and 100 steps, a tensor's size, and the context. log c follows
    what it says with an average over 20 steps. The network has no memory and no clock, so nothing shrinks or grows
    because time passes. Before meta-training w = 0 and c = 1.

    Where gradients go on agreeing with their average over 100 steps, of a tensor and of all, there is far to go, and ℓ
    grows (`lengthened`), up to `grow`, as ℓ c is too. Once steps are long enough, gradients agree no longer, and ℓ
    stays as it is; it never falls.

    Source: direction alone, normalised, as in Celo2 (arXiv 2602.19142); orthogonalised momentum as in Muon (Jordan
    2024); steps in proportion to parameters as in You et al. 2020 (LAMB).

    Attributes:
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
        self.elementary = False

    @property
    def spec(self) -> Spec:
        """Of coordinates averages, 12 bytes; of tensors averages of sums, log c, ℓ, steps, ρ before the first."""
        coordinate: StateSpec = dict.fromkeys([*AVERAGES, "step"], ((), torch.float32))
        tensor = [f"tensor_{key}" for key in (*KEPT, "steps", "log_size", "longer", "initial_rho")]
        return Spec(
            coordinate | self.context.coordinate_spec,
            dict.fromkeys(tensor, ((), torch.float32)),
            self.context.context_spec,
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
        context, context_state = self.context.read(sums[..., SUMS:].sum(-2), loss, state)
        count = own.size.clamp_min(1)
        parts = mean_squares(own.theta, own.size, shapes[..., 0])
        rho, initial = relative_size(*parts, state["tensor_initial_rho"], GROWTH, free=0.0)
        rho = torch.where(own.size == 1, torch.maximum(rho, initial), rho)  # a scalar may pass through zero
        steps = state["tensor_steps"] + 1
        found = {f"tensor_{key}": value.float() for key, value in agreements(own, steps).items()}
        new = {key: torch.lerp(state[key], value, 1 / MEMORY) for key, value in found.items()}
        energy = (own.uu / count).float()
        inputs, slow, everywhere = self._inputs(new, steps, own, energy, shapes)
        seen = self.into(inputs) + (context @ self.weight_context.mT).unsqueeze(-2)
        said = self.head(seen.relu())
        log_size = torch.lerp(state["tensor_log_size"], self._correction(said[..., 0]), 1 / MEMORY)
        fading = (energy.sqrt() / SPENT).clamp_max(1.0)
        longer = lengthened(state["tensor_longer"], slow, everywhere, steps, own.size.sum(-1, keepdim=True))
        longer = longer.clamp_max(self.config.grow)
        size = (longer * log_size.exp()).clamp_max(self.config.grow)
        length = self.config.output_scale * size * rho * fading
        weights = self.config.mix * said[..., 1:].tanh()
        kept = {"steps": steps, "log_size": log_size, "longer": longer, "initial_rho": initial}
        new |= {f"tensor_{key}": value for key, value in kept.items()}
        return torch.cat([length.unsqueeze(-1), weights], dim=-1), new | context_state

    def _inputs(
        self, averages: State, steps: Tensor, own: Sums, energy: Tensor, shapes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the network sees of each tensor, (..., S, INPUTS), and the cosines of `lengthened`, (..., S) each."""
        known = 1 - (1 - 1 / MEMORY) ** steps
        mean = {key: averages[f"tensor_{key}"] / known for key in KEPT}
        cosines, signals = [], []
        for span in SPANS["m"]:
            product, before, noise = (mean[f"{kind}{span}"] for kind in ("product", "energy", "noise"))
            # A tensor whose gradients are all zero, or whose squares are too small for float32, agrees with nothing.
            sizes = (mean["xx"] + SMALLEST_ENERGY) * (before + noise / 10 + SMALLEST_ENERGY)
            cosines.append(product / sizes.sqrt())
            signals.append(((before + SMALLEST_ENERGY) / (noise + SMALLEST_ENERGY)).log())
        (fast, slow), (fast_log, slow_log) = cosines, signals
        share = (own.size / own.size.sum(-1, keepdim=True).clamp_min(1)).float()  # 0 without a gradient on any rank
        mean_theta = own.theta.sum(-1, keepdim=True) / own.size.sum(-1, keepdim=True).clamp_min(1)
        size = ((own.theta / own.size.clamp_min(1) + TINY) / (mean_theta + TINY)).log().float().clamp(-8, 8) / 8
        everywhere = (slow * share).sum(-1, keepdim=True).expand_as(slow)
        inputs = [
            2 * fast,
            fast_log / 2,
            4 * slow,
            slow_log / 3,
            4 * everywhere,
            (slow_log * share).sum(-1, keepdim=True).expand_as(slow) / 3,
            (energy + SMALLEST_ENERGY).log() / 3,
            size,
            (shapes[..., 0] / 4).expand_as(size),
        ]
        return torch.stack(inputs, dim=-1), slow, everywhere

    def _correction(self, said: Tensor) -> Tensor:
        """What log c is drawn to: smooth, with slope 1 at zero, in −log shrink … log grow."""
        low, high = math.log(self.config.shrink), math.log(self.config.grow)
        return torch.where(said > 0, high * (said / high).tanh(), low * (said / low).tanh())

    def prepare(self, grad: Tensor, state: State, shape: torch.Size) -> State:
        """As in `Rule`: the orthogonalised momentum of a matrix."""
        matrix = sides(shape)
        if matrix is None or not self.config.rank:
            return {}
        momentum = nesterov(grad, state[MOMENTUM]).view(matrix)
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

    def finish(self, direction: Tensor, mean_square: Tensor, steering: Tensor) -> Tensor:
        """As in `Rule`."""
        return -(steering[..., 0] / mean_square.sqrt().clamp_min(TINY)) * direction
