"""What a coordinate sees of its own gradient: pure feature maps (..., n) → (..., n, f)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from l2o_runtime.state import LARGEST, State, StateSpec

LOG_SIGN_P = 10.0
BETA = 0.95
EPSILON = 1e-8
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny
"""Logarithms are of squares at least this large: that of zero is no number to compute with."""

SMALLEST_ROOT = math.sqrt(SMALLEST_SQUARE)
"""Gradients that are smaller than this fade out: what is left of their squares in float32 is no measure of them."""


def log_sign(grad: Tensor, state: State) -> tuple[Tensor, State]:
    """[log|g| / p, sign g] where |g| ≥ e^−p, else [−1, e^p g]; p = 10.

    Args:
        grad: (..., n).
        state: unused; the map has no memory.

    Returns:
        (..., n, 2) and an empty state.

    Source: Andrychowicz et al. 2016, appendix A.

    >>> log_sign(torch.tensor([1.0, -1e-6]), {})[0]
    tensor([[ 0.0000,  1.0000],
            [-1.0000, -0.0220]])
    """
    threshold = math.exp(-LOG_SIGN_P)
    magnitude = grad.abs()
    large = magnitude >= threshold
    logarithm = magnitude.clamp_min(threshold).log() / LOG_SIGN_P
    sign = torch.where(large, grad.sign(), grad / threshold)
    return torch.stack([logarithm, sign], dim=-1), {}


def normalized(grad: Tensor, state: State) -> tuple[Tensor, State]:
    """[m̂/(√v̂ + ε), g/(√v̂ + ε)] with bias-corrected averages, β₁ = β₂ = 0.95.

    Args:
        grad: (..., n).
        state: m, v (..., n) and step (..., n) or (..., 1), the number of steps taken before this one.

    Returns:
        (..., n, 2) and the new state.

    Source: Lv, Jiang & Li 2017 (RNNprop), section 4.

    >>> zeros = torch.zeros(1)
    >>> normalized(torch.tensor([-3.0]), {"m": zeros, "v": zeros, "step": zeros})[0].round(decimals=3)
    tensor([[-1., -1.]])
    """
    step = state["step"] + 1
    grad = grad.clamp(-LARGEST, LARGEST)
    m = BETA * state["m"] + (1 - BETA) * grad
    v = BETA * state["v"] + (1 - BETA) * grad.square()
    new = {"m": m, "v": v, "step": step}
    root = normalized_root(new)
    return torch.stack([m / (1 - BETA**step) / root, grad / root], dim=-1), new


def normalized_root(state: State) -> Tensor:
    """√v̂ + ε (..., n) of a state that `normalized` gave."""
    return (state["v"] / (1 - BETA ** state["step"])).sqrt() + EPSILON


class Moments(NamedTuple):
    """What the `moments` rule sees of its gradients.

    Attributes:
        features: (..., n, 11) for the network.
        directions: (..., n, 4) that its output combines: m̂/√v̂, 1, m̂'/√v̂, g/√v̂, each 0 where there was no gradient yet.
        root: r (..., n).
        state: new averages.
    """

    features: Tensor
    directions: Tensor
    root: Tensor
    state: State


def moments(grad: Tensor, param: Tensor, level: Tensor, state: State) -> Moments:
    """Averages of gradients over 10 and 100 steps, of their squares over 10, 100 and 1000, and the parameter.

    With r = √v̂₁₀₀₀ + 10⁻⁶ e^level the features are g/r, m̂₁₀/r, m̂₁₀₀/r, their product g m̂₁₀/r², ½ log(v̂₁₀/v̂₁₀₀),
    ½ log(v̂₁₀₀/v̂₁₀₀₀), log r − level, log |m̂₁₀₀/r|, log |θ|, θ, and whether there was a gradient yet; scaled to the
    order of 1 and clipped. Nothing changes with the scale of all gradients.

    Args:
        grad, param: (..., n).
        level: (..., 1) log of the root mean square of all gradients, over some 100 steps.
        state: m10, m100, v10, v100, v1000 (..., n) and step (..., n) or (..., 1).

    Source: features as in Metz et al. 2020 (arXiv 2009.11243), section 3.3, and Adam's direction.
    """
    step = state["step"] + 1
    grad = grad.clamp(-LARGEST, LARGEST)
    square, new, hat = grad.square(), {"step": step}, {}
    for kind, value in (("m", grad), ("v", square)):
        for span in MOMENT_SPANS[kind]:
            beta, key = 1 - 1 / span, f"{kind}{span}"
            new[key] = beta * state[key] + value / span
            hat[key] = new[key] / (1 - beta**step)
    floor = lowest_root(level)
    root = hat["v1000"].sqrt()
    seen = root / (root + floor)
    root = root + floor
    g, m, slow = ((x / root).clamp(-5, 5) for x in (grad, hat["m10"], hat["m100"]))
    sizes = [(hat[key] + floor.square()).clamp_min(SMALLEST_SQUARE).log() / 2 for key in ("v10", "v100", "v1000")]
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
        (10 * param).clamp(-3, 3),
        seen,
    ]
    directions = [m, seen, slow, g]
    return Moments(torch.stack(features, dim=-1), torch.stack(directions, dim=-1), root, new)


def lowest_root(level: Tensor) -> Tensor:
    """What is added to roots of mean squares, so that none is zero: far below the size of all gradients, but for those
    whose squares vanish.

    Args:
        level: (...) log of that size.
    """
    return 1e-6 * level.exp() + SMALLEST_ROOT


MOMENT_SPANS = {"m": (10, 100), "v": (10, 100, 1000)}
"""Averages are over about so many steps: β = 1 − 1/span."""

FEATURES: dict[str, Callable[[Tensor, State], tuple[Tensor, State]]] = {
    "log_sign": log_sign,
    "normalized": normalized,
}
"""The papers' maps, of the gradient alone."""

WIDTHS = {"log_sign": 2, "normalized": 2, "moments": 11}
"""Numbers per coordinate that the network sees."""

_SCALAR: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)

FEATURE_SPECS: dict[str, StateSpec] = {
    "log_sign": {},
    "normalized": {"m": _SCALAR, "v": _SCALAR, "step": _SCALAR},
    "moments": {f"{kind}{span}": _SCALAR for kind, spans in MOMENT_SPANS.items() for span in spans} | {"step": _SCALAR},
}
"""State of every feature map, per coordinate."""
