"""The feature maps of `l2o_runtime.rules.features`, and `rules.lstm.combine`, as LLVM code for some coordinates."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2o_runtime.kernels.emit import Vector
from l2o_runtime.rules.features import (
    BETA,
    EPSILON,
    FEATURE_SPECS,
    LOG_SIGN_P,
    MOMENT_SPANS,
    SMALLEST_SQUARE,
    lowest_root,
)
from l2o_runtime.state import LARGEST

AVERAGES = {kind: [key for key in spec if key != "step"] for kind, spec in FEATURE_SPECS.items()}
"""States of every feature map, in the order in which they are handed over."""

BETAS = {
    "log_sign": [],
    "normalized": [BETA, BETA],
    "moments": [1 - 1 / span for spans in MOMENT_SPANS.values() for span in spans],
}
"""Of these averages."""

SHARED = {kind: len(betas) + 2 * (kind == "moments") + 1 for kind, betas in BETAS.items()}
"""How many numbers `shared` gives."""


class Look(NamedTuple):
    """What a coordinate sees of its gradient.

    Attributes:
        features: for the network.
        averages: new ones, in the order of the state.
        directions: that the output combines; only `moments` has them.
        relative: g/r, m̂/r and r, as `restrain` takes them; `log_sign` has none.
    """

    features: Sequence[Vector]
    averages: Sequence[Vector] = ()
    directions: Sequence[Vector] = ()
    relative: Sequence[Vector] = ()


@functools.lru_cache(maxsize=8)
def shared(kind: str, step: float, level: float, floor: float = 0.0) -> Tensor:
    """What all coordinates share: 1 − βᵗ of every average; for `moments` also the level and the lowest root; the noise.

    It is rounded as in the plain loop, whose float32 is far from exact where t is small beside 1/(1 − β). Parameters
    that join a run together share it too, so that it is computed once per step.

    Args:
        kind: of features.
        step: steps taken before this one.
        level: of all gradients.
        floor: the rule's `noise_floor`, 0 for none.

    Returns:
        (k,) float32, not to be written.
    """
    betas, steps, size = (
        torch.tensor(numbers, dtype=torch.float32, device="cpu") for numbers in (BETAS[kind], [step + 1], [level])
    )
    corrections = 1 - betas**steps
    sizes = [size, lowest_root(size)] if kind == "moments" else []
    return torch.cat([corrections, *sizes, floor * size.exp()])


def look(kind: str, grad: Vector, param: Vector, averages: Sequence[Vector], numbers: Sequence[Vector]) -> Look:
    """What coordinates see.

    Args:
        kind: of features.
        grad, param: gradients and parameters.
        averages: in the order of `AVERAGES`.
        numbers: of `shared`, each as a vector.
    """
    if kind == "log_sign":
        return log_sign(grad)
    if kind == "normalized":
        return normalized(grad, averages, numbers)
    *corrections, level, floor, _ = numbers
    return moments(grad, param, averages, corrections, level, floor)


def log_sign(grad: Vector) -> Look:
    """As `l2o_runtime.rules.features.log_sign`."""
    threshold = math.exp(-LOG_SIGN_P)
    size = grad.abs()
    sign = size.where_less(threshold, grad / threshold, grad.like(1.0).sign_of(grad))
    return Look([size.at_least(threshold).log() / LOG_SIGN_P, sign])


def normalized(grad: Vector, averages: Sequence[Vector], corrections: Sequence[Vector]) -> Look:
    """As `l2o_runtime.rules.features.normalized`."""
    g = grad.clamp(-LARGEST, LARGEST)
    m, v = (value.fma(1 - BETA, average * BETA) for value, average in zip((g, g * g), averages, strict=True))
    root = (v / corrections[1]).sqrt() + EPSILON
    features = [m / corrections[0] / root, g / root]
    return Look(features, [m, v], relative=[features[1], features[0], root])


def moments(
    grad: Vector,
    param: Vector,
    averages: Sequence[Vector],
    corrections: Sequence[Vector],
    level: Vector,
    floor: Vector,
) -> Look:
    """As `l2o_runtime.rules.features.moments`."""
    grad = grad.clamp(-LARGEST, LARGEST)
    values = [grad] * 2 + [grad * grad] * 3
    # As torch rounds: squares of 1e-21 are subnormal, and there a product that is not rounded makes a difference.
    betas = BETAS["moments"]
    new = [average * beta + value * (1 - beta) for value, average, beta in zip(values, averages, betas, strict=True)]
    m10, m100, v10, v100, v1000 = (average / correction for average, correction in zip(new, corrections, strict=True))
    root = v1000.sqrt()
    seen = root / (root + floor)
    root = root + floor
    g, m, slow = ((x / root).clamp(-5, 5) for x in (grad, m10, m100))
    sizes = [(v + floor * floor).at_least(SMALLEST_SQUARE).log() * 0.5 for v in (v10, v100, v1000)]
    features = [
        g,
        m,
        slow,
        (g * m).clamp(-3, 3),
        (sizes[0] - sizes[1]).clamp(-3, 3),
        (sizes[1] - sizes[2]).clamp(-3, 3),
        ((sizes[2] - level) * 0.25).clamp(-3, 3),
        (slow.abs() + 1e-3).log() * (1 / 3) + 1.0,
        ((param.abs() + 1e-4).log() * (1 / 3) + 1.0).clamp(-3, 3),
        (param * 10.0).clamp(-3, 3),
        seen,
    ]
    return Look(features, new, [m, seen, slow, g], [g, m, root])


def combine(output: Sequence[Vector], directions: Sequence[Vector]) -> Vector:
    """As `l2o_runtime.rules.lstm.combine`, of four outputs and four directions."""
    size, *factors = output
    first, *others = directions
    total = others[0].like(0.0)
    for factor, direction in zip(factors, others, strict=True):
        total = (factor * 2.0).fma(direction, total)
    return (size.clamp(-4, 4) * 2.0).exp() * (first + total) * -1.0
