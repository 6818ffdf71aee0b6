"""Matrices that belong to A: its step sizes, and the weights W of least coherence that ALISTA takes.

W solves min ‖WᵀA‖²_F subject to wᵢᵀaᵢ = 1 for every column. That is convex, and has a closed form where A has full row
rank.

Source: Liu, Chen, Wang & Yin 2019, "ALISTA: Analytic Weights Are as Good as Learned Weights in LISTA", equation 17.
"""

import torch
from torch import Tensor

from l2o_runtime.config import require

SPARE = 1.001
"""Factor on the largest eigenvalue, so that steps of 1/L are safe in float32."""


def lipschitz(matrix: Tensor) -> Tensor:
    """L = 1.001 ‖A‖₂², a scalar: the gradient of ½‖A x − b‖² is L-Lipschitz."""
    found: Tensor = SPARE * torch.linalg.matrix_norm(matrix, 2) ** 2
    return found


def check_rank(matrix: Tensor) -> None:
    """Refuse a matrix (m, n) whose rows depend on each other.

    Raises:
        ConfigError: with its rank.
    """
    if matrix.is_meta:
        return
    rank, rows = int(torch.linalg.matrix_rank(matrix)), len(matrix)
    require(
        rank == rows,
        f"A: {tuple(matrix.shape)} has rank {rank}; its {rows} rows must not depend on each other: leave out rows",
    )


def least_squares(matrix: Tensor) -> Tensor:
    """(A Aᵀ)⁻¹A (m, n), the transposed pseudo-inverse of an A of full row rank, float64.

    Raises:
        ConfigError: A has another rank.
    """
    check_rank(matrix)
    double = matrix.double()
    found: Tensor = torch.linalg.solve(double @ double.T, double)
    return found


def coherent_least(matrix: Tensor) -> Tensor:
    """W (m, n) in closed form: wᵢ = (A Aᵀ)⁻¹ aᵢ / (aᵢᵀ (A Aᵀ)⁻¹ aᵢ).

    Raises:
        ConfigError: A has not full row rank.

    >>> weight = coherent_least(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    >>> (weight * torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])).sum(0)
    tensor([1., 1., 1.])
    """
    weight = least_squares(matrix)
    return (weight / (weight * matrix.double()).sum(0)).to(matrix.dtype)


def coherent_least_by_gradient(matrix: Tensor, steps: int = 2000) -> Tensor:
    """The same W by projected gradient descent from A, whatever A's rank.

    W ← P(W − A AᵀW / ‖A‖₂²), and P(W) adds to every wᵢ the multiple of aᵢ that makes wᵢᵀaᵢ one.

    Args:
        matrix: A (m, n), no column of which is zero.
        steps: the error falls like (1 − σ²_min/σ²_max)^steps.
    """
    double = matrix.double()
    squares, size = double.square().sum(0), torch.linalg.matrix_norm(double, 2) ** 2
    gram, weight = double @ double.T / size, double / squares
    for _ in range(steps):
        weight = weight - gram @ weight
        weight = weight + double * ((1 - (weight * double).sum(0)) / squares)
    return weight.to(matrix.dtype)


def coherence(weight: Tensor, matrix: Tensor) -> float:
    """max_{i≠j} |wᵢᵀaⱼ|: how much columns are mistaken for each other at the most.

    >>> coherence(torch.eye(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    0.5
    """
    product = weight.T @ matrix
    return float((product - torch.diag(product.diagonal())).abs().max())
