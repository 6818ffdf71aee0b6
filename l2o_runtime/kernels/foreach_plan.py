"""Where the directional rule's step in few operators finds what: rows of all tensors, and tables."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o_runtime.layout import describe
from l2o_runtime.rules.orthogonal import mixing, sides
from l2o_runtime.stepping.interpolation import LAG
from l2o_runtime.stepping.parts import Part

WIDTH = 256
"""Numbers of a row."""

MOST = 2**26
"""Coordinates that are advanced together, unless a single tensor has more: bounds the memory of what is between."""


class Stack(NamedTuple):
    """Matrices of one shape, which lie one after the other.

    Attributes:
        first, rows: the row where they begin, and how many each has.
        number: of matrices.
        sides: of each.
        mix: see `l2o_runtime.rules.orthogonal.mixing`.
    """

    first: int
    rows: int
    number: int
    sides: tuple[int, int]
    mix: Tensor

    def of(self, flat: Tensor) -> Tensor:
        """They, (number, r, c), in (rows, WIDTH) of all: a view."""
        own = flat[self.first : self.first + self.number * self.rows].view(self.number, -1)
        return own[:, : math.prod(self.sides)].view(self.number, *self.sides)


class Bucket(NamedTuple):
    """Tensors that are advanced together; their parameters have one dtype, and all of them follow steps, or none.

    Attributes:
        parts: their places in the plan's order.
        splits: of each its coordinates, then what fills its last row up.
        owner: (rows,) number of the tensor that a row belongs to.
        levels: see `add_up`.
        stacks: its matrices.
    """

    parts: slice
    splits: list[int]
    owner: Tensor
    levels: list[Tensor]
    stacks: list[Stack]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """(rows, WIDTH) of flat tensors; what fills up is zero."""
        none = tensors[0].new_zeros(WIDTH)
        between = (none[:fill] for fill in self.splits[1::2])
        return torch.cat([x for pair in zip(tensors, between, strict=True) for x in pair]).view(-1, WIDTH)

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """The flat tensors in (rows, WIDTH)."""
        return list(flat.view(-1).split(self.splits)[::2])


class Plan:
    """Where tensors lie, and what does not change from step to step.

    Args:
        parts: of a step.
        rank: of what is orthogonalised, 0 for nothing.

    Attributes:
        order: of the parts: matrices of one shape one after the other.
        there, back: (S,) the same on the device, and places of the parts in that order.
        shapes: of the parts as they come, (S, 2) float32 as in `Layout`.
        sizes: of the parts in that order, (S, 1) float64.
        matrix: (S, 1) bool, whether it is orthogonalised.
        signs, maximizes: (S, 1) float32, −1 where an objective is maximized; and whether one is.
        leaders, group: a part for every group of parameters; and (S,) which of them says what a part's lr is.
        buckets: all of them.
    """

    def __init__(self, parts: list[Part], rank: int):
        device = parts[0].theta.device
        kinds = [(f"{LAG in part.state} {part.theta.dtype}", sides(part.shape) or (0, 0)) for part in parts]
        self.order = sorted(
            range(len(parts)), key=lambda index: (kinds[index][0], kinds[index][1] == (0, 0), kinds[index])
        )
        self.there = torch.tensor(self.order, device=device)
        self.back = self.there.argsort()
        self.shapes = describe([part.shape for part in parts], device)
        kinds, parts = [kinds[index] for index in self.order], [parts[index] for index in self.order]
        self.sizes = torch.tensor([[float(len(part.theta))] for part in parts], dtype=torch.float64, device=device)
        found = [bool(rank) and matrix != (0, 0) for _, matrix in kinds]
        self.matrix = torch.tensor(found, device=device).unsqueeze(-1)
        self.signs = torch.tensor([[1.0 - 2.0 * bool(part.group["maximize"])] for part in parts], device=device)
        self.maximizes = any(part.group["maximize"] for part in parts)
        leaders = {id(part.group): index for index, part in reversed(list(enumerate(parts)))}
        self.leaders = list(leaders.values())
        numbers = {key: number for number, key in enumerate(leaders)}
        self.group = torch.tensor([numbers[id(part.group)] for part in parts], device=device)
        self.buckets = [self._bucket(parts, kinds, members, rank) for members in _cut(parts)]

    def ordered(self, parts: list[Part]) -> list[Part]:
        """The parts of a step in the plan's order."""
        return [parts[index] for index in self.order]

    def _bucket(self, parts: list[Part], kinds: list[Any], members: slice, rank: int) -> Bucket:
        device, sizes = parts[0].theta.device, [len(part.theta) for part in parts[members]]
        counts = [-(-size // WIDTH) for size in sizes]
        splits = [x for size, rows in zip(sizes, counts, strict=True) for x in (size, rows * WIDTH - size)]
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts)).to(device)
        stacks: list[Stack] = []
        first = 0
        for (_, matrix), rows in zip(kinds[members], counts, strict=True):
            if rank and matrix != (0, 0):
                if stacks and stacks[-1].sides == matrix:
                    stacks[-1] = stacks[-1]._replace(number=stacks[-1].number + 1)
                else:
                    mix = mixing(min(matrix), rank, torch.empty((), dtype=torch.float32, device=device))
                    stacks.append(Stack(first, rows, 1, matrix, mix))
            first += rows
        return Bucket(members, splits, owner, levels_of(counts, device), stacks)


def _cut(parts: list[Part]) -> Iterator[slice]:
    """At most `MOST` coordinates of one dtype together, which all follow steps, or do not."""
    start, count = 0, 0
    for index, part in enumerate(parts):
        size = len(part.theta)
        first = parts[start]
        alike = part.theta.dtype == first.theta.dtype and (LAG in part.state) == (LAG in first.state)
        if index > start and (count + size > MOST or not alike):
            yield slice(start, index)
            start, count = index, 0
        count += size
    yield slice(start, len(parts))


def levels_of(counts: list[int], device: torch.device) -> list[Tensor]:
    """Tables of `add_up`, for tensors of so many rows: (pieces, width) places of what is added up, two at most.

    >>> levels_of([3, 1], torch.device("cpu"))
    [tensor([[0, 1],
            [2, 4],
            [3, 4]]), tensor([[0, 1],
            [2, 3]])]
    """
    left, found, width = torch.tensor(counts), list[Tensor](), math.isqrt(max(counts) - 1) + 1
    while not found or int(left.max()) > 1:
        pieces = -(-left // width)
        owner = torch.arange(len(left)).repeat_interleave(pieces)
        number = torch.arange(len(owner)) - (pieces.cumsum(0) - pieces)[owner]
        inside = number.unsqueeze(-1) * width + torch.arange(width)
        first = (left.cumsum(0) - left)[owner].unsqueeze(-1)
        found.append((first + inside).where(inside < left[owner].unsqueeze(-1), int(left.sum())).to(device))
        left, width = pieces, int(pieces.max())
    return found


def add_up(rows: Tensor, levels: list[Tensor]) -> Tensor:
    """Sums (S, k) over the rows (rows, k) of each tensor, in the same order on every device."""
    for places in levels:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[places].sum(1)
    return rows
