"""Orthogonalised matrices, by their largest singular values: what Muon does, at a cost that does not grow with sides.

Newton–Schulz iterations on a whole matrix cost 4 · side floating-point operations per coordinate and iteration: more
than the forward and backward pass of a small network. Here k directions that carry most of the matrix get singular
values near 1, and what remains is scaled to 1 on average; that costs about 6 k operations per coordinate.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of an iteration; singular values come into 0.7 … 1.2 (Jordan 2024, Muon)."""

ITERATIONS = 5

SMALLEST_NORM = 1e-30
"""Matrices that are smaller than this fade out."""

SMALLEST_SIZE = 1e-6
"""‖x‖ is 1 at least where max|x| is 1; this divides where it is not."""

SMALLEST_REST = 0.01
"""What remains is scaled as if its singular values were at least this share of the matrix's norm."""

RIDGE = 1e-14
"""Added to squared lengths beside their sum, so that directions that are nothing but rounding can be divided by."""


def orthogonalise(matrix: Tensor, side: Tensor, rank: int, elementary: bool = False) -> Tensor:
    """U Vᵀ of U Σ Vᵀ, roughly, for matrices whose k largest singular values stand out.

    With X = M/‖M‖: Y = X Xᵀ E for sums E of some rows, Q = Y L⁻ᵀ for L Lᵀ = Yᵀ Y, B = Qᵀ X, R = X − Q B. Then
    Q T B + R/σ, where T B is B after five Newton–Schulz iterations and σ² = ‖R‖² / (r − k). Zero rows and columns stay
    zero.

    Args:
        matrix: M (..., r, c) float32, r ≤ c for speed.
        side: (..., 1, 1) or () r, without rows that are there only to fill up.
        rank: k.
        elementary: without LAPACK's Cholesky decomposition and float64, for ONNX.

    Source: Jordan 2024 (Muon); a low rank as in Ahn et al. 2025 (Dion), which drops R; Halko et al. 2011 for Q.

    >>> x = torch.diag(torch.tensor([50.0, 20.0, 1.0, 1.0]))
    >>> torch.linalg.svdvals(orthogonalise(x, torch.tensor(4), 2)).round(decimals=1)
    tensor([1.1000, 1.0000, 1.0000, 0.7000])
    """
    seen = sketch(matrix, rank)
    basis = orthonormal(seen.columns) if elementary else whitened(seen.columns, whitening(squares(seen.columns.mT)))
    inside = basis.mT @ seen.x / seen.size
    gram = inside @ inside.mT if elementary else squares(inside)
    return compose(seen, basis, inside, *change(gram, side - rank))


class Sketch(NamedTuple):
    """A matrix M (..., r, c) and what shows its k main directions.

    Attributes:
        x: M/max|M|.
        size: ‖x‖ (..., 1, 1); X is x/‖x‖.
        columns: Y (..., r, k).
    """

    x: Tensor
    size: Tensor
    columns: Tensor


def sketch(matrix: Tensor, rank: int, mix: Tensor | None = None) -> Sketch:
    """Look at a matrix (..., r, c); `mix` from `mixing` where products cost less than sums."""
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=(-2, -1), keepdim=True)
    x = matrix / largest.clamp_min(SMALLEST_NORM)  # squares would leave float32
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_SIZE)
    sums = _sums_of_rows(x, rank) if mix is None else mix @ x
    return Sketch(x, size, x @ (sums / size.square()).mT)


def squares(rows: Tensor) -> Tensor:
    """A Aᵀ (..., k, k) of A (..., k, n), float64."""
    rows = rows.double()
    return rows @ rows.mT


def whitening(gram: Tensor) -> Tensor:
    """L⁻ᵀ (..., k, k) of L Lᵀ, float64, to which a little is added."""
    identity = _identity(gram)
    lower = torch.linalg.cholesky_ex(gram + (RIDGE * _trace(gram) + SMALLEST_NORM) * identity).L
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.mT


def whitened(columns: Tensor, white: Tensor) -> Tensor:
    """Q (..., r, k) float32. In float32 the sum would lose what there is of small columns."""
    return (columns.double() @ white).float()


def orthonormal(columns: Tensor) -> Tensor:
    """Q (..., r, k) by Gram and Schmidt, twice; zero columns for those that others span."""
    found: list[Tensor] = []
    for column in columns.split(1, dim=-1):
        length = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        for _ in range(2):
            if found:
                basis = torch.cat(found, dim=-1)
                column = column - basis @ (basis.mT @ column)
        left = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        # What is nothing but rounding spans nothing.
        found.append(torch.where(left > 1e-6 * length, column / left.clamp_min(SMALLEST_NORM), 0.0))
    return torch.cat(found, dim=-1)


def change(gram: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """T − 1/σ (..., k, k), and 1/σ (..., 1, 1); both float32.

    Args:
        gram: B Bᵀ (..., k, k).
        left: r − k (..., 1, 1); where it is not positive nothing is left, and 1/σ is 0.
    """
    rest = (1 - _trace(gram)).clamp_min(0)
    scale = (left > 0) / (rest / left.clamp_min(1)).sqrt().clamp_min(SMALLEST_REST)
    return (newton_schulz(gram) - scale * _identity(gram)).float(), scale.float()


def compose(seen: Sketch, basis: Tensor, inside: Tensor, changed: Tensor, scale: Tensor) -> Tensor:
    """X/σ + Q (T − 1/σ) B."""
    result: Tensor = torch.addcmul((basis @ changed) @ inside, seen.x, scale / seen.size)
    return result


def _trace(matrix: Tensor) -> Tensor:
    """(..., 1, 1)."""
    trace: Tensor = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return trace


def _signs(rows: int, count: int, beside: Tensor) -> tuple[Tensor, Tensor]:
    """In which sum a row is, i mod count, and a sign that looks random: (rows,) each.

    Rows of the gradient of logits add up to zero; so the first rows of the first two sums differ in their signs, lest
    the sum of all rows is a combination of these.
    """
    row = torch.arange(rows, device=beside.device)
    place, block = row % count, row // count
    return place, ((31 * block + 17 * place + 30) * block % 97 < 48).to(beside.dtype) * 2 - 1


def _sums_of_rows(matrix: Tensor, count: int) -> Tensor:
    """(..., count, c) of (..., r, c)."""
    place, signs = _signs(matrix.shape[-2], count, matrix)
    sums = matrix.new_zeros((*matrix.shape[:-2], count, matrix.shape[-1]))
    return sums.index_add(-2, place, matrix * signs.unsqueeze(-1))


def mixing(rows: int, count: int, beside: Tensor) -> Tensor:
    """(count, rows), by which a matrix is multiplied for the same sums, always in one order.

    >>> mixing(5, 2, torch.ones(()))
    tensor([[ 1.,  0., -1.,  0., -1.],
            [ 0.,  1.,  0., -1.,  0.]])
    """
    place, signs = _signs(rows, count, beside)
    return torch.where(place == torch.arange(count, device=beside.device).unsqueeze(-1), signs, 0.0)


def _identity(beside: Tensor) -> Tensor:
    """(k, k) beside (..., k, k); `torch.eye` becomes comparisons of bytes in ONNX, which old runtimes do not have."""
    places = torch.arange(beside.shape[-1], device=beside.device)
    return (places.unsqueeze(-1) == places).to(beside.dtype)


def newton_schulz(gram: Tensor) -> Tensor:
    """T so that T B is B with singular values near 1, from B Bᵀ (..., k, k) with ‖B‖ ≤ 1: all on k × k matrices.

    B ← a B + b A B + c A² B with A = B Bᵀ, five times.

    >>> newton_schulz(torch.tensor([[0.25]])).mul(0.5).round(decimals=1)
    tensor([[0.8000]])
    """
    a, b, c = COEFFICIENTS
    identity = _identity(gram)
    whole = identity
    for _ in range(ITERATIONS):
        step = a * identity + b * gram + c * gram @ gram
        whole = step @ whole
        gram = step @ gram @ step.mT
    return whole


def sides(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a tensor as a matrix, convolutions as outputs × the rest; None for vectors.

    >>> sides((8, 3, 5, 5)), sides((1, 9)), sides((9,))
    ((8, 75), None, None)
    """
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if min(rows, columns) > 1 else None


def across(matrix: Tensor) -> Tensor:
    """It (..., r, c), or its transpose, so that there are not more rows than columns."""
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def orthogonalise_each(
    stacks: Sequence[Tensor], rank: int, mixes: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`orthogonalise` of stacks of matrices (M, r, c), each matrix scaled to a root mean square of about 1.

    What is small is done for all of them at once.

    Args:
        stacks: of matrices of one shape each.
        rank: k.
        mixes: for each stack as in `sketch`.
    """
    seen = [sketch(across(stack), rank, mix) for stack, mix in zip(stacks, mixes or [None] * len(stacks), strict=True)]
    counts = [len(stack) for stack in stacks]
    white = whitening(torch.cat([squares(one.columns.mT) for one in seen]))
    bases = [whitened(one.columns, own) for one, own in zip(seen, white.split(counts), strict=True)]
    insides = [basis.mT @ one.x / one.size for one, basis in zip(seen, bases, strict=True)]
    left = torch.cat([white.new_full((len(stack), 1, 1), min(stack.shape[-2:]) - rank) for stack in stacks])
    changed, scales = change(torch.cat([squares(inside) for inside in insides]), left)
    found = []
    for stack, one, basis, inside, own, scale in zip(
        stacks, seen, bases, insides, changed.split(counts), scales.split(counts), strict=True
    ):
        longer = math.sqrt(max(stack.shape[-2:]))
        result = compose(one, basis, inside, own * longer, scale * longer)
        found.append(result.mT if stack.shape[-2] > stack.shape[-1] else result)
    return found


def grid_of(shapes: Sequence[Sequence[int]], rank: int) -> Tensor:
    """Where matrices among tensors have their coordinates in a flat vector: (M, R, C) int64, −1 where there is nothing.

    No axis is shorter than 2, for exported programs take one of 1 for a constant; nor R than `rank`.

    >>> grid_of([(3,), (2, 3)], 2)
    tensor([[[ 3,  4,  5],
             [ 6,  7,  8]],
    <BLANKLINE>
            [[-1, -1, -1],
             [-1, -1, -1]]])
    """
    found: list[Tensor] = []
    start = 0
    for shape in shapes:
        matrix, count = sides(shape), math.prod(shape)
        if matrix is not None:
            places = torch.arange(start, start + count).view(matrix)
            found.append(places.mT if matrix[0] > matrix[1] else places)
        start += count
    rows, columns = (max((places.shape[axis] for places in found), default=2) for axis in (0, 1))
    grid = torch.full((max(len(found), 2), max(rows, rank, 2), max(columns, 2)), -1)
    for number, places in enumerate(found):
        grid[number, : places.shape[0], : places.shape[1]] = places
    return grid


def orthogonalise_all(vector: Tensor, grid: Tensor, rank: int, elementary: bool = False) -> tuple[Tensor, Tensor]:
    """`orthogonalise_each` of all matrices in flat vectors (..., n), and which coordinates these are, (n,) bool.

    Args:
        vector: (..., n) float32.
        grid: from `grid_of`.
        rank: k.
        elementary: as in `orthogonalise`.
    """
    there, places = grid >= 0, grid.clamp_min(0)
    side, length = there[:, :, :1].sum(-2, keepdim=True), there[:, :1].sum(-1, keepdim=True)
    result = orthogonalise(vector[..., places] * there, side, rank, elementary) * length.sqrt()
    # What is nowhere is added to the first coordinate, as zero.
    flat = torch.zeros_like(vector).index_add(-1, places.flatten(), (result * there).flatten(-3))
    inside = vector.new_zeros(vector.shape[-1]).index_add(0, places.flatten(), there.flatten().to(vector.dtype))
    return flat, inside > 0
