"""What the directional rule makes of what it has summed up over each tensor, for tensors and for NumPy's arrays.

A row of numbers belongs to a tensor, (..., S), S of them.
"""

import math
from typing import Any, NamedTuple, Protocol

from l2o_runtime.arrays import at_least, at_most, double, expanded, library, single
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

KEPT = ("xx", *(f"{kind}{span}" for span in SPANS["m"] for kind in ("product", "energy", "noise")))
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
    x², x u, u², x s and s².
    """

    size: Any
    theta: Any
    xx: Any
    xu: Any
    uu: Any
    xs: Any
    ss: Any


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


def steered(
    bounds: Bounds, network: Network, sums: Sums, dimensions: Any, state: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Of every tensor the length of its step (..., S), the weights w (..., S, 4), and its new state.

    Args:
        bounds: of the rule.
        network: of the rule.
        sums: of this step.
        dimensions: (S,) of each tensor.
        state: `STATES`, (..., S) each.
    """
    xp = library(sums.size)
    rho, initial = relative_size(
        *mean_squares(sums.theta, sums.size, dimensions), state["tensor_initial_rho"], GROWTH, free=0.0
    )
    rho = xp.where(sums.size == 1, xp.maximum(rho, initial), rho)  # a scalar may pass through zero
    steps = state["tensor_steps"] + 1
    new = {}
    for key, value in agreements(sums, steps).items():
        old = state[f"tensor_{key}"]
        new[f"tensor_{key}"] = old + (single(value) - old) * (1 / MEMORY)
    energy = single(sums.uu / at_least(sums.size, 1))
    inputs, slow, everywhere = seen(new, steps, sums, energy, dimensions)
    said = at_least(inputs @ network.into.T + network.seen, 0.0) @ network.head.T + network.bias
    log_size = state["tensor_log_size"]
    log_size = log_size + (correction(said[..., 0], bounds) - log_size) * (1 / MEMORY)
    longer = lengthened(state["tensor_longer"], slow, everywhere, steps, sums.size.sum(-1)[..., None])
    longer = at_most(longer, bounds.grow)
    size = at_most(longer * xp.exp(log_size), bounds.grow)
    fading = at_most(xp.sqrt(energy) / SPENT, 1.0)
    length = bounds.output_scale * size * rho * fading
    kept = {"steps": steps, "log_size": log_size, "longer": longer, "initial_rho": initial}
    new |= {f"tensor_{key}": value for key, value in kept.items()}
    return length, bounds.mix * xp.tanh(said[..., 1:]), new


def agreements(sums: Sums, steps: Any) -> dict[str, Any]:
    """How far this step's gradient agrees with those before it, per coordinate, (..., S) float64 each, by `KEPT`.

    m̂ = m / (1 − βᵗ) has the newest x in; without it m' = (m − (1 − β) x) / β. So the sums give `product` x·m', `energy`
    m'², and the energy that m' would have if gradients were nothing but noise,
    `noise` x² (1 − β) (1 − β^(2 (t − 1))) / (1 + β).

    Args:
        sums: of this step.
        steps: (..., S) t ≥ 1.
    """
    xp = library(steps)
    found: dict[str, Any] = {}
    count = at_least(sums.size, 1)
    xx, t, begun = sums.xx / count, double(steps), steps > 1
    for span, beta, xm, mm in zip(SPANS["m"], (FAST, SLOW), (sums.xu, sums.xs), (sums.uu, sums.ss), strict=True):
        share, new = 1 - beta**t, 1 - beta
        product = (xm / count * share - new * xx) / beta
        energy = (mm / count * share * share - 2 * new * xm / count * share + new * new * xx) / beta**2
        noise = xx * new / (1 + beta) * (1 - beta ** (2 * (t - 1)))
        found |= {f"product{span}": product, f"energy{span}": at_least(energy, 0), f"noise{span}": noise}
    # Before the first step there was no gradient: what the differences leave is rounding.
    return {"xx": xx} | {key: xp.where(begun, value, 0.0) for key, value in found.items()}


def mean_squares(theta: Any, size: Any, dimensions: Any) -> tuple[Any, Any]:
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

    >>> import torch
    >>> of_zeros = mean_squares(torch.tensor([0.0, 0.0, 100.0]), torch.tensor([36.0, 12.0, 1.0]), torch.ones(3))
    >>> sum(of_zeros).sqrt()
    tensor([ 0.1813,  0.1813, 10.0008])
    """
    xp = library(theta)
    counted = (size > 1) | ~(size > 1).any(-1)[..., None]
    count = at_least(xp.where(counted, size, 0.0).sum(-1)[..., None], 1)
    drawn = DRAWN * xp.where(counted, xp.sqrt(size), 0.0).sum(-1)[..., None] / count
    everything = xp.where(counted, theta, 0.0).sum(-1)[..., None] / count
    lacking = at_least(drawn - everything, 0)
    everything, own = everything + lacking, theta / at_least(size, 1)
    alone, matrix = (size == 1) & (own > 0), dimensions > 1
    own = xp.where(alone, own, own + lacking)
    bound = xp.where(alone, FOREIGN**2 * own, xp.maximum(FOREIGN**2 * drawn, own))
    first = xp.where(matrix | alone, own, xp.minimum(own, everything))
    return first, xp.where(matrix, SHARE**2, 1.0) * xp.minimum(everything, bound)


def lengthened(longer: Any, slow: Any, everywhere: Any, steps: Any, count: Any) -> Any:
    """ℓ after a step, (..., S): ℓ exp(0.05 max(0, min(cos, everywhere) (1 − βᵗ)² − max(0.05, ½/√n))).

    Of few coordinates noise may agree, so that all have to; and an average over 100 steps that has seen but a few of
    them tells little.

    Args:
        longer: (..., S) ℓ before it, 0 before the first.
        slow, everywhere: (..., S) cosine of gradients with their average over 100 steps, of a tensor and of all.
        steps: (..., S) t ≥ 1.
        count: (..., 1) n, of all coordinates.
    """
    xp = library(steps)
    agreement = xp.minimum(slow, everywhere) * (1 - SLOW**steps) ** 2
    noise = at_least(single(CHANCE / xp.sqrt(at_least(count, 1))), AGREEING)
    return xp.where(longer > 0, longer, 1.0) * xp.exp(LENGTHENING * at_least(agreement - noise, 0))


def seen(averages: dict[str, Any], steps: Any, sums: Sums, energy: Any, dimensions: Any) -> tuple[Any, Any, Any]:
    """What the network sees of each tensor, (..., S, INPUTS), and the cosines of `lengthened`, (..., S) each.

    Args:
        averages: of `KEPT`, (..., S) each.
        steps: (..., S) t ≥ 1.
        sums: of this step.
        energy: (..., S) mean square of Adam's direction.
        dimensions: (S,).
    """
    xp = library(steps)
    known = 1 - (1 - 1 / MEMORY) ** steps
    mean = {key: averages[f"tensor_{key}"] / known for key in KEPT}
    cosines, signals = [], []
    for span in SPANS["m"]:
        product, before, noise = (mean[f"{kind}{span}"] for kind in ("product", "energy", "noise"))
        # A tensor whose gradients are all zero, or whose squares are too small for float32, agrees with nothing.
        sizes = (mean["xx"] + SMALLEST_ENERGY) * (before + noise / 10 + SMALLEST_ENERGY)
        cosines.append(product / xp.sqrt(sizes))
        signals.append(xp.log((before + SMALLEST_ENERGY) / (noise + SMALLEST_ENERGY)))
    (fast, slow), (fast_log, slow_log) = cosines, signals
    count = at_least(sums.size.sum(-1)[..., None], 1)
    share = single(sums.size / count)  # 0 without a gradient on any rank
    mean_theta = sums.theta.sum(-1)[..., None] / count
    size = single(xp.log((sums.theta / at_least(sums.size, 1) + TINY) / (mean_theta + TINY)))
    everywhere = expanded((slow * share).sum(-1)[..., None], slow)
    inputs = [
        2 * fast,
        fast_log / 2,
        4 * slow,
        slow_log / 3,
        4 * everywhere,
        expanded((slow_log * share).sum(-1)[..., None], slow) / 3,
        xp.log(energy + SMALLEST_ENERGY) / 3,
        at_most(at_least(size, -8), 8) / 8,
        expanded(single(dimensions) / 4, slow),
    ]
    return xp.stack(inputs, -1), slow, everywhere


def correction(said: Any, bounds: Bounds) -> Any:
    """What log c is drawn to: smooth, with slope 1 at zero, in −log shrink … log grow."""
    xp = library(said)
    low, high = math.log(bounds.shrink), math.log(bounds.grow)
    return xp.where(said > 0, high * xp.tanh(said / high), low * xp.tanh(said / low))
