"""Which tensors the coordinates of a flat vector belong to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which tensors the coordinates of a flat vector belong to.

    Attributes:
        owner: (n,) int64, the number of each coordinate's tensor.
        shapes: (S, 2) float32, number of dimensions and of coordinates of each tensor.
        grid: (M, R, C) int64, where matrices have their coordinates, for rules that look at whole ones; see
            `l2o_runtime.rules.orthogonal.grid_of`.
    """

    owner: Tensor
    shapes: Tensor
    grid: Tensor | None = None

    @classmethod
    def of(cls, shapes: Sequence[torch.Size], device: torch.device | str | None = None) -> "Layout":
        """The layout of tensors one after the other.

        >>> Layout.of([torch.Size([2, 1]), torch.Size([3])]).owner
        tensor([0, 0, 1, 1, 1])
        """
        sizes = torch.tensor([shape.numel() for shape in shapes], device=device)
        owner = torch.arange(len(shapes), device=device).repeat_interleave(sizes)
        return cls(owner, describe(shapes, device))

    @property
    def given(self) -> dict[str, Tensor]:
        """By name what of it there is."""
        return {key: value for key, value in self._asdict().items() if value is not None}


def describe(shapes: Sequence[torch.Size], device: torch.device | str | None = None) -> Tensor:
    """Number of dimensions and of coordinates of tensors: (S, 2) float32."""
    return torch.tensor([[len(shape), shape.numel()] for shape in shapes], dtype=torch.float32, device=device)
