"""What a coordinate sees of its own gradient: pure feature maps (..., n) → (..., n, f)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from l2o_runtime.gram import State, StateSpec

LOG_SIGN_P = 10.0
BETA = 0.95
EPSILON = 1e-8
LARGEST = 1e18
"""Gradients are clipped to ± this before they are squared, so that the average of squares stays finite in float32."""


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
    correction = 1 - BETA**step
    root = (v / correction).sqrt() + EPSILON
    return torch.stack([m / correction / root, grad / root], dim=-1), {"m": m, "v": v, "step": step}


WIDTH = 2
"""Every feature map gives two numbers per coordinate."""

FEATURES: dict[str, Callable[[Tensor, State], tuple[Tensor, State]]] = {
    "log_sign": log_sign,
    "normalized": normalized,
}

_SCALAR: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)

FEATURE_SPECS: dict[str, StateSpec] = {
    "log_sign": {},
    "normalized": {"m": _SCALAR, "v": _SCALAR, "step": _SCALAR},
}
"""State of every feature map, per coordinate."""
