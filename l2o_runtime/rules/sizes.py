"""How long a step of a tensor may be beside its parameters."""

import torch
from torch import Tensor

LARGEST_GROWTH = 10.0
"""Steps grow with their parameters, until these are 1 and so many times the initial ones."""

SMALLEST_SIZE = 1e-3
"""Steps are in proportion to parameters, and those that are smaller than this have to move too."""


def relative_size(own: Tensor, everything: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """ρ = √(own + everything + 10⁻⁶), at most the larger of 1 and ten times what it was before the first step.

    So steps are in proportion to parameters, but do not grow with them exponentially.

    Args:
        own: (..., S) mean square of each tensor's parameters.
        everything: (..., 1) that of all parameters.
        initial: (..., S) ρ before the first step; 0 before that.

    Returns:
        ρ and its initial value, (..., S) float32.
    """
    present = (own + everything + SMALLEST_SIZE**2).sqrt().float()
    initial = torch.where(initial > 0, initial, present)
    return torch.minimum(present, (LARGEST_GROWTH * initial).clamp_min(1.0)), initial
