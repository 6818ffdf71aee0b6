"""Schedule-free interpolation: gradients are taken near the average of where steps lead, so that noise fades by itself.

Where nobody says how long a run is, steps z may stay long if what is trained is their average x. Gradients are taken,
and parameters are, at y = (1 − β) z + β x, which is nearly x: there is no mode for evaluation. Of z and x their
distance is kept, so that what somebody else does to parameters in between is done to both.
"""

from typing import Any

import torch
from torch import Tensor

from l2o_runtime.arithmetic import at_least, at_most
from l2o_runtime.state import StateSpec

LAG = "lag"
"""Its name among the states of a parameter: e = z − x."""

SPEC: StateSpec = {LAG: ((), torch.float32)}

Weights = tuple[Tensor | float, Tensor | float, Tensor | float]
"""See `weights`."""

BETA = 0.9
"""β in the end; what is left answers at once to gradients that have changed."""

ONSET = 100.0
"""Steps after which β is a half: averages lag far behind at first."""

RECENT = 3.0
"""r: averages are over about the last 1 / (1 + r) of all steps."""

RESTING: Weights = (1.0, 0.0, 0.0)
"""Where lr is zero: nothing moves, not even towards what it trails behind."""


def beta(step: Any) -> Any:
    """β_t = min(0.9, t / (t + 100)), the share of the average.

    >>> beta(torch.tensor([0.0, 100.0, 2000.0]))
    tensor([0.0000, 0.5000, 0.9000])
    """
    return at_most(step / (step + ONSET), BETA)


def weights(step: Any) -> Weights:
    """1 − c_t, β_{t−1} and β_t, where c_t = (1 + r) / (t + r) is the newest z's share in the average.

    Args:
        step: t, that of the parameter itself: what begins late has no average to follow yet.

    >>> weights(1)
    (0.0, 0.0, 0.009900990099009901)
    """
    return 1 - (1 + RECENT) / (step + RECENT), beta(step - 1), beta(step)


def resting(moving: Weights, lr: Any) -> Weights:
    """The same, or `RESTING` where lr is zero."""
    if not isinstance(lr, Tensor):
        return moving if lr else RESTING
    rests = lr == 0
    keep, before, after = (torch.where(rests, rest, weight) for weight, rest in zip(moving, RESTING, strict=True))
    return keep, before, after


def interpolated(delta: Any, lag: Any, keep: Any, before: Any, after: Any) -> tuple[Any, Any]:
    """How far y moves when z moves by Δ, and the new e: e⁺ = (1 − c)(e + Δ), y⁺ − y = Δ + β_{t−1} e − β_t e⁺.

    Args:
        delta: Δ, tensors or vectors of compiled code, as the next.
        lag: e.
        keep, before, after: of `weights`.

    Source: Defazio et al. 2024, "The Road Less Scheduled", equations 2 to 4, in terms of e = z − x.
    """
    kept = (lag + delta) * keep
    return delta + lag * before - kept * after, kept


def followed(theta: Tensor, delta: Tensor, lag: Tensor, trail: Weights) -> tuple[Tensor, Tensor]:
    """y and e after a step of z.

    What y loses in being rounded e gains, so that z loses little: in half precision single steps are lost, but not
    their sum. While β is small, not all is gained, as x would jump.

    Args:
        theta: y, of any type.
        delta: Δ, at least float32.
        lag: e.
        trail: of `weights`.
    """
    moved, kept = interpolated(delta, lag, *trail)
    exact = theta.to(delta.dtype) + moved
    rounded = exact.to(theta.dtype)
    if rounded.dtype != exact.dtype:
        kept = kept + (exact - rounded.to(exact.dtype)) / at_least(trail[2], 0.5)
    return rounded, kept.to(lag.dtype)
