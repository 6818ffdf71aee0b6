"""Orthogonalised matrices, in blocks of rows, by Newton–Schulz iterations.

Of the momentum of a whole matrix it costs 4 · side floating-point operations per coordinate and iteration, which is
more than the forward and backward pass of a small network. Of blocks of a few rows it costs 4 · rows, and keeps most of
what it is worth.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of a step; singular values come into 0.7 … 1.2 (Jordan 2024, Muon)."""

SMALLEST_NORM = 1e-30
"""Matrices whose norm is below this fade out."""


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """U Vᵀ of U Σ Vᵀ, roughly: X₀ = M/‖M‖, X ← a X + (b A + c A²) X with A = X Xᵀ. Zero rows stay zero.

    Args:
        matrix: M (..., r, c) float32, r ≤ c for speed.
        iterations: 3 bring singular values above 0.05 ‖M‖ near 1, five those above 0.005 ‖M‖.

    Source: Jordan 2024, "Muon"; Bernstein & Newhouse 2024.

    >>> orthogonalise(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), 5).round(decimals=1).abs().sum(0)
    tensor([0.7000, 1.1000, 0.0000])
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrix / torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x


def sides(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a tensor as a matrix, convolutions as outputs × the rest; None for vectors.

    >>> sides((8, 3, 5, 5)), sides((1, 9)), sides((9,))
    ((8, 75), None, None)
    """
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if min(rows, columns) > 1 else None


def block_rows(side: int, largest: int) -> tuple[int, int]:
    """Number of blocks and their rows, as even as can be.

    >>> block_rows(10, 8), block_rows(64, 8), block_rows(3, 8)
    ((2, 5), (8, 8), (1, 3))
    """
    blocks = -(-side // largest)
    return blocks, -(-side // blocks)


def orthogonalise_blocks(matrix: Tensor, largest: int, iterations: int) -> Tensor:
    """`orthogonalise` of blocks of a matrix (r, c) along its shorter side, each scaled to a root mean square of 1.

    Args:
        matrix: (r, c) float32.
        largest: rows of a block, at most.
        iterations: of each.
    """
    rows, columns = matrix.shape
    across = matrix.mT if rows > columns else matrix
    side, length = across.shape
    blocks, size = block_rows(side, largest)
    padded = F.pad(across, (0, 0, 0, blocks * size - side)).view(blocks, size, length)
    result = orthogonalise(padded, iterations).reshape(blocks * size, length)[:side] * math.sqrt(length)
    return result.mT if rows > columns else result


def grid_of(shapes: Sequence[Sequence[int]], largest: int) -> Tensor:
    """Where the blocks of all matrices among tensors lie in a flat vector: (M, R, C) int64, −1 where there is nothing.

    No axis is shorter than 2: exported programs take one of 1 for a constant.

    Args:
        shapes: of the tensors, one after the other, n coordinates together.
        largest: rows of a block, at most.

    >>> grid_of([(3,), (2, 3)], 8)
    tensor([[[3, 4, 5],
             [6, 7, 8]],
    <BLANKLINE>
            [[-1, -1, -1],
             [-1, -1, -1]]])
    """
    found: list[Tensor] = []
    start = 0
    for shape in shapes:
        matrix, count = sides(shape), math.prod(shape)
        if matrix is not None:
            place = torch.arange(start, start + count).view(matrix)
            place = place.mT if matrix[0] > matrix[1] else place
            blocks, size = block_rows(len(place), largest)
            padded = F.pad(place, (0, 0, 0, blocks * size - len(place)), value=-1)
            found += padded.view(blocks, size, -1).unbind()
        start += count
    rows, columns = (max((block.shape[axis] for block in found), default=2) for axis in (0, 1))
    grid = torch.full((max(len(found), 2), max(rows, 2), max(columns, 2)), -1)
    for number, block in enumerate(found):
        grid[number, : block.shape[0], : block.shape[1]] = block
    return grid


def orthogonalise_grid(vector: Tensor, grid: Tensor, iterations: int) -> Tensor:
    """`orthogonalise_blocks` of all matrices in flat vectors (..., n), at once; zero for all other coordinates.

    Args:
        vector: (..., n) float32.
        grid: from `grid_of`.
        iterations: of each.
    """
    there = grid >= 0
    blocks = vector[..., grid.clamp_min(0)] * there
    result = orthogonalise(blocks, iterations) * there[:, :1].sum(-1, keepdim=True).sqrt()
    # What is nowhere is added to the first coordinate as zero.
    return torch.zeros_like(vector).index_add(-1, grid.clamp_min(0).flatten(), (result * there).flatten(-3))
