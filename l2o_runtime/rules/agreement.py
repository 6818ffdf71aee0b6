"""How far gradients agree with those before them, from sums over each tensor.

For torch's tensors and for the vectors of compiled code: see `l2o_runtime.rules.steering`.
"""

from typing import Any, NamedTuple

from torch import Tensor

from l2o_runtime.rules.geometry import Geometry
from l2o_runtime.rules.statistics import SPANS

FAST, SLOW = (1 - 1 / span for span in SPANS["m"])
"""β of the two averages of gradients."""

SUMS = 7
"""Over a tensor's coordinates: see `Sums`."""

MEMORY = 20
"""Steps over which statistics and the size's correction are averaged."""

KEPT = ("xx", *(f"{kind}{span}" for span in SPANS["m"] for kind in ("product", "energy", "noise")))
"""Statistics of a tensor of which averages are kept: see `agreements`."""

LENGTHENING = 0.05
"""What is added to the logarithm of a tensor's steps for every step in which its gradients agree fully over 100."""

SMALLEST_ENERGY = 1e-6
"""Beside squares of gradients that are divided by the root of their mean square."""


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


def grown(before: Any, agreement: Any, age: Ages, noise: Any) -> Any:
    """ℓ or τ after a step, (..., S): ℓ exp(0.05 max(0, cos (1 − βᵗ)² − max(0.05, ½/√n))).

    An average over 100 steps that has seen but a few of them tells little.

    Args:
        before: (..., S) it before the step, 0 before the first.
        agreement: (..., S) cos, of gradients with their average over 100 steps.
        age: of the average.
        noise: (..., S) or (..., 1) the maximum.
    """
    known = (-age.slow + 1.0).square().float()
    return before.where(before > 0.0, 1.0) * ((agreement * known - noise).clamp_min(0.0) * LENGTHENING).exp()
