"""What the two-tier rule sums up over a tensor, and shows to the network of a coordinate.

As in `l2o_runtime.rules.features` every formula is written once, for tensors and for vectors of compiled code.
"""

from typing import Any, NamedTuple

from l2o_runtime.arithmetic import quotients
from l2o_runtime.rules.statistics import Averages

INPUTS = 8
"""Numbers per coordinate that its network sees."""

TERMS = 8
"""Sums over a tensor's coordinates, after those of `Progress`."""


def terms(param: Any, grad: Any, fast: Any, slow: Any, root: Any) -> list[Any]:
    """What is summed over a tensor, u = m̂₁₀/√v̂₁₀₀: v̂₁₀₀, θ², m̂₁₀², m̂₁₀₀², m̂₁₀ m̂₁₀₀, m̂₁₀ θ, u², g θ."""
    u = (fast / root).where(root > 0, 0.0)
    return [root * root, param * param, fast * fast, slow * slow, fast * slow, fast * param, u * u, grad * param]


class Look(NamedTuple):
    """What a coordinate sees.

    Attributes:
        features: for its network.
        relative: g/r, m̂₁₀/r and r, as `restrain` takes them.
    """

    features: list[Any]
    relative: tuple[Any, Any, Any]


def look(relative: Any, averages: Averages, floor: Any, size: Any) -> Look:
    """With r = √v̂₁₀₀ + floor: g/r, m̂₁₀/r, m̂₁₀₀/r, the product of the first two, log r − size, log |m̂₁₀₀/r|, log |θ/ρ|
    and θ/ρ; scaled to the order of 1 and clipped.

    Args:
        relative: θ/ρ.
        averages: of the gradients.
        floor: `lowest_root` of the size.
        size: log of the root of the mean v̂₁₀₀ over the tensor.
    """
    root = averages.root + floor
    g, fast, slow = (x.clamp(-5, 5) for x in quotients([averages.grad, averages.fast, averages.slow], root))
    features = [
        g,
        fast,
        slow,
        (g * fast).clamp(-3, 3),
        (root.log() - size).clamp(-6, 6) / 3,
        (slow.abs() + 1e-3).log() / 3 + 1,
        (relative.abs() + 1e-3).log() / 3 + 1,
        relative.clamp(-3, 3),
    ]
    return Look(features, (g, fast, root))


def directions(seen: Look, averages: Averages, inverse_fast: Any) -> list[Any]:
    """What the network's output combines: m̂₁₀/r, m̂₁₀ beside its root mean square, m̂₁₀₀/r and g/r.

    Args:
        seen: by the network; compiled code has more registers for the rest when that is done.
        averages: of the gradients.
        inverse_fast: 1 / RMS(m̂₁₀) over the tensor.
    """
    g, fast, slow, *_ = seen.features
    return [fast, (averages.fast * inverse_fast).clamp(-5, 5), slow, g]
