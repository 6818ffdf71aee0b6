"""The state of a rule or a solver: named tensors, all of them zero at the start."""

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors."""

StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Trailing shape and dtype of every tensor of a state (per coordinate, per tensor, or per optimization)."""

LARGEST = 1e18
"""Gradients are clipped to ± this before they are squared, so that averages of squares stay finite in float32."""


def zeros(spec: StateSpec, lead: tuple[int, ...], device: torch.device | str | None = None) -> State:
    """The initial state of `spec` with leading dimensions `lead`."""
    return {key: torch.zeros((*lead, *shape), dtype=dtype, device=device) for key, (shape, dtype) in spec.items()}
