"""What the directional rule makes of what it has summed up over each tensor, for tensors and for NumPy's arrays.

A row of numbers belongs to a tensor, (..., S), S of them.
"""

import math
from typing import Any, NamedTuple, Protocol

from l2o_runtime.arrays import at_least, at_most, double, library, single
from l2o_runtime.rules.statistics import SPANS, relative_size

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

KEPT = ("xx", *(f"{kind}{span}" for kind in ("product", "energy", "noise") for span in SPANS["m"]))
"""Statistics of a tensor of which averages are kept: see `agreements`."""

STATES = tuple(f"tensor_{key}" for key in (*KEPT, "steps", "log_size", "longer", "initial_rho"))
"""What is kept of a tensor: averages of sums, t, log c, ℓ, ρ before the first step."""

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

SMALLEST_ENERGY = 1e-6
"""Beside squares of gradients that are divided by the root of their mean square."""

TINY = 1e-12


class Sums(NamedTuple):
    """Sums over a tensor, (..., S) float64 each.

    With r = √v̂₁₀₀, x = g/r, u = m̂₁₀/r and s = m̂₁₀₀/r, all with the newest gradient in: the number of coordinates, θ²,
    x², (2, ..., S) x u and x s, and (2, ..., S) u² and s².
    """

    size: Any
    theta: Any
    xx: Any
    products: Any
    squares: Any

    @classmethod
    def of(cls, columns: Any) -> "Sums":
        """From (SUMS, ..., S), in the order x², x u, u², x s, s² after the first two."""
        return cls(columns[0], columns[1], columns[2], columns[3::2], columns[4::2])


class Network(NamedTuple):
    """Of every tensor: head · relu(into · inputs + seen) + bias.

    Attributes:
        into: (hidden, INPUTS).
        seen: (..., 1, hidden) or (hidden,): what is added to it, its bias and what there is of the context.
        head, bias: (1 + MIXED, hidden) and (1 + MIXED,).
    """

    into: Any
    seen: Any
    head: Any
    bias: Any


class Bounds(Protocol):
    """What is taken from `l2o_runtime.rules.DirectionalConfig`."""

    @property
    def output_scale(self) -> float:
        """See there."""

    @property
    def shrink(self) -> float:
        """See there."""

    @property
    def grow(self) -> float:
        """See there."""

    @property
    def mix(self) -> float:
        """See there."""


class Geometry(NamedTuple):
    """What sizes and shapes alone say of tensors; as long as all have gradients it stays what it is.

    Attributes:
        count: (..., S) coordinates of each, at least 1.
        share: (..., S) float32, of all coordinates; 0 without a gradient on any rank.
        total: (..., 1) all coordinates, at least 1.
        counted: (..., S) whether a tensor is in the size of all parameters.
        everything: (..., 1) coordinates of those, at least 1.
        drawn: (..., 1) a quarter of the mean square that these would have, had PyTorch drawn them.
        one, matrix: (..., S) and (S,) whether it is a scalar, or has two dimensions or more.
        dimensions: (..., S) float32, what the network sees of them.
        none: (..., S) float32, zero.
        noise: (..., 1) float32, what a cosine may be by chance.
    """

    count: Any
    share: Any
    total: Any
    counted: Any
    everything: Any
    drawn: Any
    one: Any
    matrix: Any
    dimensions: Any
    none: Any
    noise: Any


def geometry(size: Any, dimensions: Any) -> Geometry:
    """Of tensors of so many coordinates (..., S), 0 without a gradient, and dimensions (S,)."""
    xp = library(size)
    counted = (size > 1) | ~(size > 1).any(-1)[..., None]
    everything = at_least(xp.where(counted, size, 0.0).sum(-1)[..., None], 1)
    total = at_least(size.sum(-1)[..., None], 1)
    share = single(size / total)
    return Geometry(
        count=at_least(size, 1),
        share=share,
        total=total,
        counted=counted,
        everything=everything,
        drawn=DRAWN * xp.where(counted, xp.sqrt(size), 0.0).sum(-1)[..., None] / everything,
        one=size == 1,
        matrix=dimensions > 1,
        dimensions=share * 0 + single(dimensions) / 4,
        none=share * 0,
        noise=at_least(single(CHANCE / xp.sqrt(total)), AGREEING),
    )


def steered(
    bounds: Bounds, network: Network, sums: Sums, shapes: Geometry, state: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Of every tensor the length of its step (..., S), the weights w (..., S, 4), and its new state.

    Args:
        bounds: of the rule.
        network: of the rule.
        sums: of this step.
        shapes: of the tensors.
        state: `STATES`, (..., S) each.
    """
    xp = library(sums.theta)
    own, all_ = mean_squares(sums.theta, shapes)
    rho, initial = relative_size(own, all_, state["tensor_initial_rho"], GROWTH, free=0.0)
    rho = xp.where(shapes.one, xp.maximum(rho, initial), rho)  # a scalar may pass through zero
    steps = state["tensor_steps"] + 1
    known = xp.stack([state[f"tensor_{key}"] for key in KEPT])
    averages = known + (single(agreements(sums, shapes, steps)) - known) * (1 / MEMORY)
    energy = single(sums.squares[0] / shapes.count)
    inputs, slow, everywhere = seen(averages, steps, sums, energy, shapes)
    said = at_least(inputs @ network.into.T + network.seen, 0.0) @ network.head.T + network.bias
    log_size = state["tensor_log_size"]
    log_size = log_size + (correction(said[..., 0], bounds) - log_size) * (1 / MEMORY)
    longer = at_most(lengthened(state["tensor_longer"], slow, everywhere, steps, shapes.noise), bounds.grow)
    size = at_most(longer * xp.exp(log_size), bounds.grow)
    fading = at_most(xp.sqrt(energy) / SPENT, 1.0)
    length = bounds.output_scale * size * rho * fading
    new = dict(zip(STATES, [*averages, steps, log_size, longer, initial], strict=True))
    return length, bounds.mix * xp.tanh(said[..., 1:]), new


def agreements(sums: Sums, shapes: Geometry, steps: Any) -> Any:
    """How far this step's gradient agrees with those before it, per coordinate: `KEPT`, (7, ..., S) float64.

    m̂ = m / (1 − βᵗ) has the newest x in; without it m' = (m − (1 − β) x) / β. So the sums give `product` x·m', `energy`
    m'², and the energy that m' would have if gradients were nothing but noise,
    `noise` x² (1 − β) (1 − β^(2 (t − 1))) / (1 + β).

    Args:
        sums: of this step.
        shapes: of the tensors.
        steps: (..., S) t ≥ 1.
    """
    xp = library(steps)
    xx, t = sums.xx / shapes.count, double(steps)
    beta = xp.stack([xp.full_like(t, FAST), xp.full_like(t, SLOW)])
    power, new = beta**t, 1 - beta
    share = (1 - power) / shapes.count
    mixed, left = sums.products * share, new * xx
    product = (mixed - left) / beta
    energy = at_least(sums.squares * share * (1 - power) + new * (left - 2 * mixed), 0) / (beta * beta)
    noise = left / (1 + beta) * (1 - (power / beta) ** 2)
    # Before the first step there was no gradient: what the differences leave is rounding.
    found = xp.where(t > 1, xp.stack([product, energy, noise]), 0.0)
    return xp.concatenate([xx[None], *found])


def mean_squares(theta: Any, shapes: Geometry) -> tuple[Any, Any]:
    """The two of which ρ² is the sum: a tensor's mean square, and what counts of that of all; (..., S) each.

    Of a matrix the second is a sixteenth. Of a vector, such as the gains of norms, the first counts for no more than
    that of all. Scalars may have units of their own: that of all leaves them out where there is anything else.

    Had PyTorch drawn the parameters, as square matrices, a quarter of their mean square would be q = Σ √n_s / 12n. What
    that of all lacks of it is added to it and to a tensor's own: where all begin with zero, nothing else says how large
    they will be. That of all counts for no more than 100 q or a tensor's own if that is more, and of a scalar that is
    not zero for no more than a hundredfold its own: what is larger has another unit.

    Args:
        theta: (..., S) Σ θ² of each tensor.
        shapes: of the tensors.

    >>> import torch
    >>> shapes = geometry(torch.tensor([36.0, 12.0, 1.0]), torch.ones(3))
    >>> sum(mean_squares(torch.tensor([0.0, 0.0, 100.0]), shapes)).sqrt()
    tensor([ 0.1813,  0.1813, 10.0008])
    """
    xp = library(theta)
    everything = xp.where(shapes.counted, theta, 0.0).sum(-1)[..., None] / shapes.everything
    lacking = at_least(shapes.drawn - everything, 0)
    everything, own = everything + lacking, theta / shapes.count
    alone = shapes.one & (own > 0)
    own = xp.where(alone, own, own + lacking)
    bound = xp.where(alone, FOREIGN**2 * own, xp.maximum(FOREIGN**2 * shapes.drawn, own))
    first = xp.where(shapes.matrix | alone, own, xp.minimum(own, everything))
    return first, xp.where(shapes.matrix, SHARE**2, 1.0) * xp.minimum(everything, bound)


def lengthened(longer: Any, slow: Any, everywhere: Any, steps: Any, noise: Any) -> Any:
    """ℓ after a step, (..., S): ℓ exp(0.05 max(0, min(cos, everywhere) (1 − βᵗ)² − max(0.05, ½/√n))).

    Of few coordinates noise may agree, so that all have to; and an average over 100 steps that has seen but a few of
    them tells little.

    Args:
        longer: (..., S) ℓ before it, 0 before the first.
        slow, everywhere: (..., S) and (..., 1) cosine of gradients with their average over 100 steps, of a tensor and
            of all.
        steps: (..., S) t ≥ 1.
        noise: (..., 1) the maximum.
    """
    xp = library(steps)
    agreement = xp.minimum(slow, everywhere) * (1 - SLOW**steps) ** 2
    return xp.where(longer > 0, longer, 1.0) * xp.exp(LENGTHENING * at_least(agreement - noise, 0))


def seen(averages: Any, steps: Any, sums: Sums, energy: Any, shapes: Geometry) -> tuple[Any, Any, Any]:
    """What the network sees of each tensor, (..., S, INPUTS), and the cosines of `lengthened`.

    Args:
        averages: of `KEPT`, (7, ..., S).
        steps: (..., S) t ≥ 1.
        sums: of this step.
        energy: (..., S) mean square of Adam's direction.
        shapes: of the tensors.
    """
    xp = library(steps)
    mean = averages / (1 - (1 - 1 / MEMORY) ** steps)
    # A tensor whose gradients are all zero, or whose squares are too small for float32, agrees with nothing.
    product, before, noise = mean[1:3], mean[3:5] + SMALLEST_ENERGY, mean[5:7]
    fast, slow = product / xp.sqrt((mean[0] + SMALLEST_ENERGY) * (before + noise / 10))
    signals = before / (noise + SMALLEST_ENERGY)
    mean_theta = sums.theta.sum(-1)[..., None] / shapes.total
    sizes = single((sums.theta / shapes.count + TINY) / (mean_theta + TINY))
    logs = xp.log(xp.stack([*signals, energy + SMALLEST_ENERGY, sizes]))
    everywhere = (slow * shapes.share).sum(-1)[..., None]
    inputs = [
        2 * fast,
        logs[0] / 2,
        4 * slow,
        logs[1] / 3,
        shapes.none + 4 * everywhere,
        shapes.none + (logs[1] * shapes.share).sum(-1)[..., None] / 3,
        logs[2] / 3,
        at_most(at_least(logs[3], -8), 8) / 8,
        shapes.dimensions,
    ]
    return xp.stack(inputs, -1), slow, everywhere


def correction(said: Any, bounds: Bounds) -> Any:
    """What log c is drawn to: smooth, with slope 1 at zero, in −log shrink … log grow."""
    xp = library(said)
    low, high = math.log(bounds.shrink), math.log(bounds.grow)
    return xp.where(said > 0, high * xp.tanh(said / high), low * xp.tanh(said / low))
