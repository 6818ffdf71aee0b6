"""What rules with a row per tensor measure: averages of a coordinate's gradients, and the size of a tensor.

As in `l2o_runtime.rules.features` the formulas of coordinates are written once, for tensors and for vectors of compiled
code.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from l2o_runtime.state import LARGEST, State

SPANS = {"m": (10, 100), "v": (100,)}
"""Averages of gradients and of their squares, per coordinate: over about so many steps."""

AVERAGES = [f"{kind}{span}" for kind, spans in SPANS.items() for span in spans]
"""Names of these states, in the order in which the formulas take and give them."""

BETAS = [1 - 1 / span for spans in SPANS.values() for span in spans]
"""Of these averages."""

LARGEST_GROWTH = 10.0
"""Steps grow with their parameters, until these are 1 and so many times the initial ones."""

SMALLEST_SIZE = 1e-3
"""Steps are in proportion to parameters, and those that are smaller than this have to move too."""


class Averages(NamedTuple):
    """Averages of a coordinate's gradients with the newest one in.

    Attributes:
        grad: clipped.
        fast, slow: m̂₁₀ and m̂₁₀₀.
        root: √v̂₁₀₀.
        new: m10, m100, v100.
    """

    grad: Any
    fast: Any
    slow: Any
    root: Any
    new: list[Any]


def average(grad: Any, averages: Sequence[Any], inverses: Sequence[Any]) -> Averages:
    """Bias-corrected averages over 10 and 100 steps, and of squares over 100.

    Args:
        grad: g.
        averages: m10, m100 and v100 before this step.
        inverses: 1 / (1 − βᵗ) of each: in compiled code a division takes ten times as long as a product.
    """
    grad = grad.clamp(-LARGEST, LARGEST)
    spans = [(x, span) for kind, x in (("m", grad), ("v", grad.square())) for span in SPANS[kind]]
    new = [old + (x - old) * (1 / span) for old, (x, span) in zip(averages, spans, strict=True)]
    fast, slow, square = (value * inverse for value, inverse in zip(new, inverses, strict=True))
    return Averages(grad, fast, slow, square.sqrt(), new)


def averages_of(grad: Tensor, state: State) -> tuple[Averages, State]:
    """`average` from a state, and the new state.

    Args:
        grad: (..., n).
        state: averages (..., n) and step (..., n) or (..., 1), zero at the start.
    """
    step = state["step"] + 1
    averages = average(grad, [state[key] for key in AVERAGES], [(1 - beta**step).reciprocal() for beta in BETAS])
    return averages, {"step": step} | dict(zip(AVERAGES, averages.new, strict=True))


def relative_size(
    own: Any, everything: Any, initial: Any, growth: float = LARGEST_GROWTH, free: float = 1.0
) -> tuple[Any, Any]:
    """ρ = √(own + everything + 10⁻⁶), at most the larger of 1 and ten times what it was before the first step.

    So steps are in proportion to parameters, but do not grow with them exponentially.

    Args:
        own: (..., S) mean square of each tensor's parameters.
        everything: (..., S) or (..., 1) that of all parameters, or what counts of it.
        initial: (..., S) ρ before the first step; 0 before that.
        growth: the ten.
        free: the one.

    Returns:
        ρ and its initial value, (..., S) float32.
    """
    present = (own + everything + SMALLEST_SIZE**2).sqrt().float()
    initial = initial.where(initial > 0.0, present)
    return present.minimum((initial * growth).clamp_min(free)), initial
