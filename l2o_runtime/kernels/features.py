"""What all coordinates share that look at their gradients in compiled code."""

import functools

import torch
from torch import Tensor

from l2o_runtime.rules.features import BETAS, lowest_root

SHARED = {kind: len(betas) + 2 * (kind == "moments") + 1 for kind, betas in BETAS.items()}
"""How many numbers `shared` gives."""


@functools.lru_cache(maxsize=8)
def shared(kind: str, step: float, level: float, floor: float = 0.0) -> Tensor:
    """The numbers that `l2o_runtime.rules.features.look` takes, and the noise that `restrain` does.

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
