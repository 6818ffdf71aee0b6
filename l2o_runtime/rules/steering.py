"""What the directional rule makes of what it has summed up over each tensor of parameters.

Formulas are written once, for torch's tensors (..., S), of S tensors of parameters, and for the vectors of compiled
code; so they are all in methods that both have, and what is summed over all of them is given.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from l2o_runtime.rules.statistics import SPANS, relative_size
from l2o_runtime.state import State

if TYPE_CHECKING:
    from l2o_runtime.rules.directional import DirectionalConfig

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

STATES = tuple(f"tensor_{key}" for key in (*KEPT, "steps", "log_size", "longer", "turned", "initial_rho"))
"""What is kept of a tensor: averages of sums, t, log c, ℓ, a, ρ before the first step."""

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
"""Of n coordinates that cosine is at least this over √n: so much may be noise."""

TURNING = 2.0
"""What a has to exceed before a tensor's direction turns to Adam's: in the first hundreds of steps most agree."""

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


class Geometry(NamedTuple):
    """What sizes and shapes alone say of tensors; as long as all have gradients it stays what it is.

    Attributes:
        count: (..., S) coordinates of each, at least 1.
        share: (..., S) float32, of all coordinates; 0 without a gradient on any rank.
        one, matrix: (..., S) and (S,) whether it is a scalar, or has two dimensions or more.
        part: (S,) float64, of the mean square of all parameters in its own.
        dimensions: (S,) float32, what the network sees of them.
        drawn: (..., 1) a quarter of the mean square that parameters would have, had PyTorch drawn them.
        noise: (..., 1) float32, what the cosine of all may be by chance.
        chance: (..., S) float32, what that of a tensor may be.
        weight, mean: (..., S) what Σ θ² of each is multiplied by in the mean square of all, without scalars, and in the
            mean of all.
    """

    count: Any
    share: Any
    one: Any
    matrix: Any
    part: Any
    dimensions: Any
    drawn: Any
    noise: Any
    chance: Any
    weight: Any
    mean: Any


def geometry(size: Tensor, dimensions: Tensor) -> Geometry:
    """Of tensors of so many coordinates (..., S) float64, 0 without a gradient, and dimensions (S,) float32."""
    counted = (size > 1) | ~(size > 1).any(-1, keepdim=True)
    everything = size.where(counted, 0.0).sum(-1, keepdim=True).clamp_min(1)
    total = size.sum(-1, keepdim=True).clamp_min(1)
    matrix = dimensions > 1
    count = size.clamp_min(1)
    return Geometry(
        count=count,
        share=(size / total).float(),
        one=size == 1,
        matrix=matrix,
        part=1 + matrix.double() * (SHARE**2 - 1),
        dimensions=dimensions / 4,
        drawn=DRAWN * size.sqrt().where(counted, 0.0).sum(-1, keepdim=True) / everything,
        noise=(CHANCE / total.sqrt()).float().clamp_min(AGREEING),
        chance=(CHANCE / count.sqrt()).float().clamp_min(AGREEING),
        weight=counted / everything,
        mean=(1 / total).expand_as(size),
    )


class Ages(NamedTuple):
    """What the number of steps t, with this one in, says of averages.

    Attributes:
        steps: t, float32.
        fast, slow: βᵗ of both averages of gradients, float64.
        known: 1 − (1 − 1/20)ᵗ, float32.
    """

    steps: Any
    fast: Any
    slow: Any
    known: Any


def ages(steps: Tensor) -> Ages:
    """Of t (..., S)."""
    t = steps.double()
    return Ages(steps, FAST**t, SLOW**t, (1 - (1 - 1 / MEMORY) ** t).float())


class Seen(NamedTuple):
    """What a step sees of a tensor, float32.

    Attributes:
        rho, initial: ρ, and what it was before the first step.
        averages: of `KEPT`.
        energy: mean square of Adam's direction.
        fast, slow: cosines of gradients with their averages.
        fast_log, slow_log: how much larger these averages are than those of noise, as logarithms.
        size: logarithm of its mean square beside that of all.
    """

    rho: Any
    initial: Any
    averages: list[Any]
    energy: Any
    fast: Any
    slow: Any
    fast_log: Any
    slow_log: Any
    size: Any


def look(sums: Sums, shapes: Geometry, age: Ages, everything: Any, mean: Any, state: dict[str, Any]) -> Seen:
    """What a step sees of a tensor.

    Args:
        sums: of this step.
        shapes: of the tensors.
        age: of their averages.
        everything, mean: (..., 1) float64, mean squares of all parameters: without scalars, and of all.
        state: `STATES`, (..., S) each.
    """
    own, all_ = mean_squares(sums.theta, everything, shapes)
    rho, initial = relative_size(own, all_, state["tensor_initial_rho"], GROWTH, free=0.0)
    rho = rho.maximum(initial).where(shapes.one, rho)  # a scalar may pass through zero
    averages = []
    for key, value in zip(KEPT, agreements(sums, shapes, age), strict=True):
        averages.append(state[f"tensor_{key}"].lerp(value.float(), 1 / MEMORY))
    xx, *mean_values = (average / age.known for average in averages)
    cosines, signals = [], []
    for product, before, noise in (mean_values[:3], mean_values[3:]):
        # A tensor whose gradients are all zero, or whose squares are too small for float32, agrees with nothing.
        before = before + SMALLEST_ENERGY
        cosines.append(product / ((xx + SMALLEST_ENERGY) * (before + noise * 0.1)).sqrt())
        signals.append((before / (noise + SMALLEST_ENERGY)).log())
    size = ((sums.theta / shapes.count + TINY) / (mean + TINY)).float().log()
    energy = (sums.uu / shapes.count).float()
    (fast, slow), (fast_log, slow_log) = cosines, signals
    return Seen(rho, initial, averages, energy, fast, slow, fast_log, slow_log, size)


def inputs_of(seen: Seen, everywhere: Any, signal: Any, shapes: Geometry) -> list[Any]:
    """What the network sees of a tensor.

    Args:
        seen: of it.
        everywhere, signal: (..., 1) means over all coordinates of `slow` and `slow_log`.
        shapes: of the tensors.
    """
    return [
        seen.fast * 2,
        seen.fast_log * 0.5,
        seen.slow * 4,
        seen.slow_log * (1 / 3),
        everywhere * 4,
        signal * (1 / 3),
        (seen.energy + SMALLEST_ENERGY).log() * (1 / 3),
        seen.size.clamp(-8.0, 8.0) * 0.125,
        shapes.dimensions,
    ]


def conclude(
    bounds: "DirectionalConfig",
    seen: Seen,
    said: Sequence[Any],
    everywhere: Any,
    age: Ages,
    shapes: Geometry,
    state: dict[str, Any],
) -> tuple[list[Any], list[Any]]:
    """The length of a tensor's step with the weights w, and its new state by `STATES`.

    Where gradients of a tensor go on agreeing, whatever others do, its direction leaves them where they are: what is
    orthogonalised treats all singular vectors alike, not all coordinates. So a grows, and max(0, a − 2) of Adam's
    direction is added.

    Args:
        bounds: of the rule.
        seen: of the tensor.
        said: what the network says, 1 + 4 numbers.
        everywhere: (..., 1) mean over all coordinates of `seen.slow`.
        age: of its averages.
        shapes: of the tensors.
        state: `STATES`, (..., S) each.
    """
    log_size = state["tensor_log_size"].lerp(correction(said[0], bounds), 1 / MEMORY)
    longer, turned = (
        grown(state[f"tensor_{key}"], agreement, age, noise).clamp_max(bounds.grow)
        for key, agreement, noise in (
            ("longer", seen.slow.minimum(everywhere), shapes.noise),
            ("turned", seen.slow, shapes.chance),
        )
    )
    size = (longer * log_size.exp()).clamp_max(bounds.grow)
    fading = (seen.energy.sqrt() * (1 / SPENT)).clamp_max(1.0)
    length = size * seen.rho * fading * bounds.output_scale
    adam, *others = (word.tanh() * bounds.mix for word in said[1:])
    adam = adam + (turned - TURNING).clamp_min(0.0)
    return [length, adam, *others], [*seen.averages, age.steps, log_size, longer, turned, seen.initial]


def steered(
    bounds: "DirectionalConfig", network: Callable[[Tensor], Tensor], sums: Sums, dimensions: Tensor, state: State
) -> tuple[Tensor, State]:
    """Of every tensor the length of its step and the weights w, (..., S, 1 + 4), and its new state.

    Args:
        bounds: of the rule.
        network: from (..., S, INPUTS) to (..., S, 1 + 4).
        sums: of this step, tensors.
        dimensions: (S,) of each tensor, float32.
        state: `STATES`, (..., S) each.
    """
    shapes, age = geometry(sums.size, dimensions), ages(state["tensor_steps"] + 1)
    everything, mean = ((sums.theta * weight).sum(-1, keepdim=True) for weight in (shapes.weight, shapes.mean))
    seen = look(sums, shapes, age, everything, mean, state)
    everywhere, signal = ((x * shapes.share).sum(-1, keepdim=True) for x in (seen.slow, seen.slow_log))
    inputs = [x.expand_as(seen.slow) for x in inputs_of(seen, everywhere, signal, shapes)]
    said = network(torch.stack(inputs, dim=-1)).unbind(-1)
    told, new = conclude(bounds, seen, said, everywhere, age, shapes, state)
    return torch.stack(told, dim=-1), dict(zip(STATES, new, strict=True))


def agreements(sums: Sums, shapes: Geometry, age: Ages) -> list[Any]:
    """How far this step's gradient agrees with those before it, per coordinate: `KEPT`, float64 each.

    m̂ = m / (1 − βᵗ) has the newest x in; without it m' = (m − (1 − β) x) / β. So the sums give `product` x·m', `energy`
    m'², and the energy that m' would have if gradients were nothing but noise,
    `noise` x² (1 − β) (1 − β^(2 (t − 1))) / (1 + β).

    Args:
        sums: of this step.
        shapes: of the tensors.
        age: of their averages.
    """
    xx = sums.xx / shapes.count
    found = [xx]
    for beta, power, xm, mm in ((FAST, age.fast, sums.xu, sums.uu), (SLOW, age.slow, sums.xs, sums.ss)):
        new, known = 1 - beta, -power + 1.0
        mixed, left = xm / shapes.count * known, xx * new
        energy = (mm / shapes.count * known * known - mixed * (2 * new) + left * new).clamp_min(0.0)
        noise = left * (-(power * (1 / beta)).square() + 1.0)
        values = [(mixed - left) * (1 / beta), energy * (1 / beta**2), noise * (1 / (1 + beta))]
        # Before the first step there was no gradient: what the differences leave is rounding.
        found += [value.where(age.steps > 1.0, 0.0) for value in values]
    return found


def mean_squares(theta: Any, everything: Any, shapes: Geometry) -> tuple[Any, Any]:
    """The two of which ρ² is the sum: a tensor's mean square, and what counts of that of all; (..., S) each.

    Of a matrix the second is a sixteenth. Of a vector, such as the gains of norms, the first counts for no more than
    that of all. Scalars may have units of their own: that of all leaves them out where there is anything else.

    Had PyTorch drawn the parameters, as square matrices, a quarter of their mean square would be q = Σ √n_s / 12n. What
    that of all lacks of it is added to it and to a tensor's own: where all begin with zero, nothing else says how large
    they will be. That of all counts for no more than 100 q or a tensor's own if that is more, and of a scalar that is
    not zero for no more than a hundredfold its own: what is larger has another unit.

    Args:
        theta: (..., S) Σ θ² of each tensor.
        everything: (..., 1) mean square of all, without scalars.
        shapes: of the tensors.

    >>> theta, shapes = torch.tensor([0.0, 0.0, 100.0]), geometry(torch.tensor([36.0, 12.0, 1.0]), torch.ones(3))
    >>> sum(mean_squares(theta, (theta * shapes.weight).sum(), shapes)).sqrt().float()
    tensor([ 0.1813,  0.1813, 10.0008])
    """
    lacking = (shapes.drawn - everything).clamp_min(0.0)
    everything, own = everything + lacking, theta / shapes.count
    alone = shapes.one & (own > 0.0)
    own = own.where(alone, own + lacking)
    bound = (own * FOREIGN**2).where(alone, own.maximum(shapes.drawn * FOREIGN**2))
    first = own.where(shapes.matrix | alone, own.minimum(everything))
    return first, bound.minimum(everything) * shapes.part


def grown(before: Any, agreement: Any, age: Ages, noise: Any) -> Any:
    """ℓ or a after a step, (..., S): ℓ exp(0.05 max(0, cos (1 − βᵗ)² − max(0.05, ½/√n))).

    An average over 100 steps that has seen but a few of them tells little.

    Args:
        before: (..., S) it before the step, 0 before the first.
        agreement: (..., S) cos, of gradients with their average over 100 steps.
        age: of the average.
        noise: (..., S) or (..., 1) the maximum.
    """
    known = (-age.slow + 1.0).square().float()
    return before.where(before > 0.0, 1.0) * ((agreement * known - noise).clamp_min(0.0) * LENGTHENING).exp()


def correction(said: Any, bounds: "DirectionalConfig") -> Any:
    """What log c is drawn to: smooth, with slope 1 at zero, in −log shrink … log grow."""
    low, high = math.log(bounds.shrink), math.log(bounds.grow)
    return ((said * (1 / high)).tanh() * high).where(said > 0.0, (said * (1 / low)).tanh() * low)
