"""What the directional rule makes of what it has summed up over each tensor of parameters.

Formulas are written once, for torch's tensors (..., S), of S tensors of parameters, and for the vectors of compiled
code; so they are all in methods that both have, and what is summed over all of them is given.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from l2o_runtime.rules.agreement import KEPT, MEMORY, SMALLEST_ENERGY, Ages, Sums, ages, agreements, grown
from l2o_runtime.rules.geometry import Geometry, by_place, ends, geometry, is_gain, mean_squares, shortened
from l2o_runtime.rules.statistics import relative_size
from l2o_runtime.state import State

if TYPE_CHECKING:
    from l2o_runtime.rules.directional import DirectionalConfig

MIXED = 4
"""Directions that the network may mix in: Adam's, the slow average's, the gradient's, and what agrees with it."""

INPUTS = 9
"""Numbers per tensor that the network sees."""

STATES = tuple(f"tensor_{key}" for key in (*KEPT, "steps", "log_size", "longer", "turned", "gain", "initial_rho"))
"""What is kept of a tensor: averages of sums, t, log c, ℓ, τ, whether it is a gain, ρ before the first step."""

SPENT = 0.1
"""Steps fade where Adam's direction has a smaller root mean square than this: there gradients have gone."""

GROWTH = 2.0
"""Steps grow with a tensor's parameters until these are so many times the initial ones: else large steps run away."""

TURNING = 2.0
"""What τ has to exceed before a tensor's direction turns to Adam's: in the first hundreds of steps most agree."""

TINY = 1e-12


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
    gain: Any,
    gains: Any,
    age: Ages,
    shapes: Geometry,
    state: dict[str, Any],
) -> tuple[list[Any], list[Any]]:
    """The length of a tensor's step with the weights w, and its new state by `STATES`.

    Where gradients of a tensor go on agreeing, whatever others do, its direction leaves them where they are: what is
    orthogonalised treats all singular vectors alike, not all coordinates. So τ grows, and max(0, τ − 2) of Adam's
    direction is added.

    Args:
        bounds: of the rule.
        seen: of the tensor.
        said: what the network says, 1 + 4 numbers.
        everywhere: (..., 1) mean over all coordinates of `seen.slow`.
        gain, gains: (..., S) from `is_gain`, and (..., 1) their number.
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
    length = size * seen.rho * fading * shortened(gains, shapes) * bounds.output_scale
    adam, *others = (word.tanh() * bounds.mix for word in said[1:])
    adam = adam + (turned - TURNING).clamp_min(0.0)
    return [length, adam, *others], [*seen.averages, age.steps, log_size, longer, turned, gain, seen.initial]


def steered(
    bounds: "DirectionalConfig",
    network: Callable[[Tensor], Tensor],
    places: Tensor | None,
    sums: Sums,
    dimensions: Tensor,
    state: State,
) -> tuple[Tensor, State]:
    """Of every tensor the length of its step and the weights w, (..., S, 1 + 4), and its new state.

    Args:
        bounds: of the rule.
        network: from (..., S, INPUTS) to (..., S, 1 + 4).
        places: (4,) what is added to its first number by a tensor's place, as in `by_place`.
        sums: of this step, tensors.
        dimensions: (S,) of each tensor, float32.
        state: `STATES`, (..., S) each.
    """
    shapes, age = geometry(sums.size, dimensions), ages(state["tensor_steps"] + 1)
    everything, mean = ((sums.theta * weight).sum(-1, keepdim=True) for weight in (shapes.weight, shapes.mean))
    seen = look(sums, shapes, age, everything, mean, state)
    everywhere, signal = ((x * shapes.share).sum(-1, keepdim=True) for x in (seen.slow, seen.slow_log))
    inputs = [x.expand_as(seen.slow) for x in inputs_of(seen, everywhere, signal, shapes)]
    said = list(network(torch.stack(inputs, dim=-1)).unbind(-1))
    if places is not None:
        said[0] = said[0] + by_place(places.unbind(), shapes.matrix, ends(sums.size, dimensions))
    gain = is_gain(sums.theta, shapes, age.steps, state["tensor_gain"])
    gains = gain.double().sum(-1, keepdim=True)
    told, new = conclude(bounds, seen, said, everywhere, gain, gains, age, shapes, state)
    return torch.stack(told, dim=-1), dict(zip(STATES, new, strict=True))


def correction(said: Any, bounds: "DirectionalConfig") -> Any:
    """What log c is drawn to: smooth, with slope 1 at zero, in −log shrink … log grow."""
    low, high = math.log(bounds.shrink), math.log(bounds.grow)
    return ((said * (1 / high)).tanh() * high).where(said > 0.0, (said * (1 / low)).tanh() * low)
