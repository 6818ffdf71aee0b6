"""What a coordinate of the hierarchical rule sees: its gradients' averages over time scales that a network decides."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from l2o_runtime.rules.features import SMALLEST_SQUARE
from l2o_runtime.state import LARGEST

SCALES = 4
"""Time scales, each about twice as long as the one before."""

FEATURES = SCALES + (SCALES - 1) + SCALES + 1
"""Numbers that a coordinate's network sees: those of `Look`, and a relative log learning rate."""

MOMENTA, SQUARES = ([f"{kind}{scale}" for scale in range(1, SCALES + 1)] for kind in "mv")
"""Names of the averages, g₁ … and λ₁ …."""

LONGEST = 10.0
"""Where logits of decays are cut: with σ(10) the first scale is 22,000 steps long, and 1 − σ is no rounding yet."""


class Look(NamedTuple):
    """What a coordinate sees of its gradients.

    Attributes:
        features: 11 of (..., n).
        scaled: m₁ … m₄, (..., n) each.
        momenta, squares: g₁ … g₄ and λ₁ … λ₄ with the newest gradient in.
    """

    features: list[Tensor]
    scaled: list[Tensor]
    momenta: list[Tensor]
    squares: list[Tensor]


def decays(logit: Tensor) -> list[Tensor]:
    """σ(logit)^(2^−(s−1)) for s = 1 … 4.

    >>> [round(float(decay), 4) for decay in decays(torch.tensor(2.2))]
    [0.9002, 0.9488, 0.9741, 0.987]
    """
    found = [logit.clamp(-LONGEST, LONGEST).sigmoid()]
    for _ in range(SCALES - 1):
        found.append(found[-1].sqrt())
    return found


def average(old: Sequence[Tensor], new: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """β x̄ + (1 − β) x of each."""
    return [x + factor * (mean - x) for mean, x, factor in zip(old, new, factors, strict=True)]


def look(grad: Tensor, momenta: Sequence[Tensor], squares: Sequence[Tensor], momentum: Tensor, scaling: Tensor) -> Look:
    """[m_s, m_s m_{s+1}, log λ_s − mean_s log λ_s], m_s = asinh(g_s/√λ_s).

    g_s is the average of the gradients, and λ_s that of g_s², each with decays σ(·)^(2^−(s−1)). Nothing changes with
    the scale of the gradients; all is 0 where there was none yet.

    Args:
        grad: (..., n).
        momenta, squares: g_s and λ_s before this step, (..., n) each.
        momentum, scaling: (..., n) logits of the decays of g and of λ.

    Source: Wichrowska et al. 2017 (arXiv 1703.04813), section 3.3, "features inspired by the optimization literature".
    """
    gradients = [grad.clamp(-LARGEST, LARGEST)] * SCALES
    momenta = average(momenta, gradients, decays(momentum))
    squares = average(squares, [x.square() for x in momenta], decays(scaling))
    scaled = [(x / (square + SMALLEST_SQUARE).sqrt()).asinh() for x, square in zip(momenta, squares, strict=True)]
    products = [shorter * longer for shorter, longer in pairwise(scaled)]
    sizes = torch.stack([(square + SMALLEST_SQUARE).log() for square in squares])
    return Look([*scaled, *products, *(sizes - sizes.mean(0)).unbind(0)], scaled, momenta, squares)
