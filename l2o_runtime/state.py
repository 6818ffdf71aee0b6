"""The state of a rule or a solver: named tensors, all of them zero at the start."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

State = dict[str, Tensor]
"""Named tensors."""

StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Trailing shape and dtype of every tensor of a state (per coordinate, per tensor, or per optimization)."""

CONTEXT = "context_"
"""Prefix of a context's state, which belongs to the whole optimization, in that of an optimizer."""

LARGEST = 1e18
"""Gradients are clipped to ± this before they are squared, so that averages of squares stay finite in float32."""


def zeros(spec: StateSpec, lead: tuple[int, ...], device: torch.device | str | None = None) -> State:
    """The initial state of `spec` with leading dimensions `lead`."""
    return {key: torch.zeros((*lead, *shape), dtype=dtype, device=device) for key, (shape, dtype) in spec.items()}


def to_tensors(named: Mapping[str, T]) -> dict[str, T]:
    """What is kept for every tensor of parameters, under the names that it has in a rule's state."""
    return {f"tensor_{key}": value for key, value in named.items()}


def of_tensors(state: State, names: Iterable[str]) -> State:
    """The same of a rule's state, under its own names."""
    return {key: state[f"tensor_{key}"] for key in names}
