"""What a coordinate sees of its own gradient, and how a network's outputs become its step.

Every formula is written once, for tensors and for the vectors of `l2o_runtime.kernels.emit`. It takes and gives either,
or lists of them, of shapes that broadcast. Vectors multiply with the reciprocal of a number where tensors divide by it;
what else differs is in `l2o_runtime.arithmetic`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o_runtime.arithmetic import multiply_add
from l2o_runtime.state import LARGEST, State, StateSpec

LOG_SIGN_P = 10.0
BETA = 0.95
EPSILON = 1e-8
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny
"""Logarithms are of squares at least this large: that of zero is no number to compute with."""

SMALLEST_ROOT = math.sqrt(SMALLEST_SQUARE)
"""Gradients that are smaller than this fade out: what is left of their squares in float32 is no measure of them."""

MOMENT_SPANS = {"m": (10, 100), "v": (10, 100, 1000)}
"""Averages are over about so many steps: β = 1 − 1/span."""

WIDTHS = {"log_sign": 2, "plain": 1, "normalized": 2, "moments": 11}
"""Numbers per coordinate that the network sees."""

_SCALAR: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)

FEATURE_SPECS: dict[str, StateSpec] = {
    "log_sign": {},
    "plain": {},
    "normalized": {"m": _SCALAR, "v": _SCALAR, "step": _SCALAR},
    "moments": {f"{kind}{span}": _SCALAR for kind, spans in MOMENT_SPANS.items() for span in spans} | {"step": _SCALAR},
}
"""State of every feature map, per coordinate."""

AVERAGES = {kind: [key for key in spec if key != "step"] for kind, spec in FEATURE_SPECS.items()}
"""States that are averages, in the order in which the formulas take and give them."""

BETAS = {
    "log_sign": [],
    "plain": [],
    "normalized": [BETA, BETA],
    "moments": [1 - 1 / span for spans in MOMENT_SPANS.values() for span in spans],
}
"""Of these averages."""


class Look(NamedTuple):
    """What a coordinate sees of its gradient.

    Attributes:
        features: for the network.
        averages: new ones.
        directions: that its output combines; only `moments` has them.
        relative: g/r, m̂/r and r, as `restrain` takes them; `log_sign` and `plain` have none.
    """

    features: list[Any]
    averages: list[Any]
    directions: list[Any]
    relative: list[Any]


def log_sign(grad: Any, p: float = LOG_SIGN_P) -> Look:
    """[log|g| / p, sign g] where |g| ≥ e^−p, else [−1, e^p g].

    Source: Andrychowicz et al. 2016, appendix A, with p = 10; Open-L2O has 5.

    >>> log_sign(torch.tensor([1.0, -1e-6])).features
    [tensor([ 0., -1.]), tensor([ 1.0000, -0.0220])]
    """
    threshold = math.exp(-p)
    logarithm = grad.abs().clamp_min(threshold).log().div(p)
    return Look([logarithm, grad.div(threshold).clamp(-1, 1)], [], [], [])


def plain(grad: Any) -> Look:
    """The gradient as it is, for problems whose gradients are of the order of 1.

    Source: Andrychowicz et al. 2016, section 3.1; the public code of L2O-Koopman.
    """
    return Look([grad], [], [], [])


def normalized(grad: Any, averages: Sequence[Any], corrections: Sequence[Any]) -> Look:
    """[m̂/(√v̂ + ε), g/(√v̂ + ε)] with bias-corrected averages, β₁ = β₂ = 0.95.

    Args:
        grad: g.
        averages: m and v before this step.
        corrections: 1 − βᵗ of both.

    Source: Lv, Jiang & Li 2017 (RNNprop), section 4.

    >>> zero, correction = torch.zeros(1), torch.tensor([1 - BETA])
    >>> torch.cat(normalized(torch.tensor([-3.0]), [zero, zero], [correction, correction]).features).round(decimals=3)
    tensor([-1., -1.])
    """
    grad = grad.clamp(-LARGEST, LARGEST)
    values = zip(averages, (grad, grad.square()), strict=True)
    m, v = (multiply_add(x, 1 - BETA, average * BETA) for average, x in values)
    root = (v / corrections[1]).sqrt() + EPSILON
    mean, relative = m / corrections[0] / root, grad / root
    return Look([mean, relative], [m, v], [], [relative, mean, root])


def moments(grad: Any, param: Any, averages: Sequence[Any], corrections: Sequence[Any], level: Any, floor: Any) -> Look:
    """Averages of gradients over 10 and 100 steps, of their squares over 10, 100 and 1000, and the parameter.

    With r = √v̂₁₀₀₀ + 10⁻⁶ e^level the features are g/r, m̂₁₀/r, m̂₁₀₀/r, their product g m̂₁₀/r², ½ log(v̂₁₀/v̂₁₀₀),
    ½ log(v̂₁₀₀/v̂₁₀₀₀), log r − level, log |m̂₁₀₀/r|, log |θ|, θ, and whether there was a gradient yet; scaled to the
    order of 1 and clipped. The directions are m̂₁₀/r, 1, m̂₁₀₀/r and g/r, each 0 where there was no gradient yet. Nothing
    changes with the scale of all gradients.

    Args:
        grad, param: g and θ.
        averages: m10, m100, v10, v100 and v1000 before this step.
        corrections: 1 − βᵗ of each.
        level: log of the root mean square of all gradients, over some 100 steps.
        floor: `lowest_root` of it.

    Source: features as in Metz et al. 2020 (arXiv 2009.11243), section 3.3, and Adam's direction.
    """
    grad = grad.clamp(-LARGEST, LARGEST)
    spans = [(x, span) for kind, x in (("m", grad), ("v", grad.square())) for span in MOMENT_SPANS[kind]]
    # Products are rounded before they are added: squares of 1e-21 are subnormal, and there it makes a difference.
    new = [average * (1 - 1 / span) + x / span for average, (x, span) in zip(averages, spans, strict=True)]
    m10, m100, v10, v100, v1000 = (average / correction for average, correction in zip(new, corrections, strict=True))
    root = v1000.sqrt()
    seen = root / (root + floor)
    root = root + floor
    g, m, slow = ((x / root).clamp(-5, 5) for x in (grad, m10, m100))
    sizes = [(v + floor.square()).clamp_min(SMALLEST_SQUARE).log() / 2 for v in (v10, v100, v1000)]
    features = [
        g,
        m,
        slow,
        (g * m).clamp(-3, 3),
        (sizes[0] - sizes[1]).clamp(-3, 3),
        (sizes[1] - sizes[2]).clamp(-3, 3),
        ((sizes[2] - level) / 4).clamp(-3, 3),
        (slow.abs() + 1e-3).log() / 3 + 1,
        ((param.abs() + 1e-4).log() / 3 + 1).clamp(-3, 3),
        (param * 10).clamp(-3, 3),
        seen,
    ]
    return Look(features, new, [m, seen, slow, g], [g, m, root])


def lowest_root(level: Any) -> Any:
    """What is added to roots of mean squares, so that none is zero: far below the size of all gradients, but for those
    whose squares vanish.

    Args:
        level: log of that size.
    """
    return level.exp() * 1e-6 + SMALLEST_ROOT


def look(kind: str, grad: Any, param: Any, averages: Sequence[Any], numbers: Sequence[Any]) -> Look:
    """What a coordinate sees.

    Args:
        kind: of features.
        grad, param: g and θ.
        averages: in the order of `AVERAGES`.
        numbers: 1 − βᵗ of each; for `moments` also the level and its `lowest_root`.
    """
    if kind == "log_sign":
        return log_sign(grad)
    if kind == "plain":
        return plain(grad)
    if kind == "normalized":
        return normalized(grad, averages, numbers)
    *corrections, level, floor = numbers
    return moments(grad, param, averages, corrections, level, floor)


def features_of(
    kind: str, grad: Tensor, param: Tensor, level: Tensor, state: State, p: float = LOG_SIGN_P
) -> tuple[Look, State]:
    """`look` from a state, and the new state.

    Args:
        kind: of features.
        grad, param: (..., n).
        level: (..., 1), only for `moments`.
        state: averages (..., n), and step (..., n) or (..., 1), the number of steps taken before this one.
        p: of `log_sign`.
    """
    if kind == "log_sign":
        return log_sign(grad, p), {}
    if kind == "plain":
        return plain(grad), {}
    step = state["step"] + 1
    numbers = [1 - beta**step for beta in BETAS[kind]]
    if kind == "moments":
        numbers += [level, lowest_root(level)]
    seen = look(kind, grad, param, [state[key] for key in AVERAGES[kind]], numbers)
    return seen, {"step": step} | dict(zip(AVERAGES[kind], seen.averages, strict=True))


def combine(output: Sequence[Any], directions: Sequence[Any]) -> Any:
    """−e^(2 o₁) (d₁ + 2 o₂ d₂ + 2 o₃ d₃ + 2 o₄ d₄): Adam's step if all outputs are zero.

    Args:
        output, directions: four each.
    """
    size, *factors = output
    first, *others = directions
    total = factors[0] * 2 * others[0]
    for factor, direction in zip(factors[1:], others[1:], strict=True):
        total = multiply_add(factor * 2, direction, total)
    return -(step_size(size) * (first + total))


def step_size(output: Any) -> Any:
    """e^(2 o₁), |o₁| at most `LARGEST_SIZE`."""
    return (output.clamp(-LARGEST_SIZE, LARGEST_SIZE) * 2).exp()


LARGEST_SIZE = 4.0
"""Where outputs that tell the size of a step are cut."""
