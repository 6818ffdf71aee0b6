"""Linear inverse problems with sparse solutions: sparse recovery, and the Lasso."""

import torch
from torch import Tensor

from l2o_runtime.solvers import Structure
from l2o_training.tasks.base import Instances, Task, generator


def dictionary(rows: int, columns: int, seed: int) -> Tensor:
    """A (m, n) with entries from N(0, 1/m), and columns of norm 1."""
    matrix = torch.randn(rows, columns, generator=generator(seed, torch.device("cpu"))) / rows**0.5
    unit: Tensor = matrix / torch.linalg.vector_norm(matrix, dim=0)
    return unit


class SparseTask(Task):
    """b = A x* + ε with one A for all: x* has entries from N(0, 1) at places drawn with probability p, else zero.

    The loss of x is that of the Lasso, ½‖A x − b‖² + λ‖x‖₁; x begins at zero.

    Args:
        matrix: A, (m, n).
        weight: λ.
        sparsity: p.
        snr: 20 log₁₀ of the ratio of ‖A x*‖ to ‖ε‖ of every instance; None without noise.
        device: where instances live.
    """

    def __init__(self, matrix: Tensor, weight: float, sparsity: float, snr: float | None, device: torch.device):
        self.name = f"sparse-{matrix.shape[0]}-{matrix.shape[1]}"
        self.matrix, self.weight, self.sparsity, self.snr = matrix.to(device), weight, sparsity, snr

    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` pairs (x*, b)."""
        device, (rows, columns) = self.matrix.device, self.matrix.shape
        rng = generator(seed, device)
        chosen = torch.rand(count, columns, generator=rng, device=device) < self.sparsity
        solution = chosen * torch.randn(count, columns, generator=rng, device=device)
        target = solution @ self.matrix.T
        if self.snr is not None:
            noise = torch.randn(count, rows, generator=rng, device=device)
            size = target.std(-1, correction=0, keepdim=True) * 10 ** (-self.snr / 20)
            target = target + size * noise
        structure = Structure(matrix=self.matrix, target=target, weight=self.weight, solution=solution)
        start = torch.zeros(count, columns, device=device)
        return Instances(start, self._losses, lambda: (target,), rng, structure=structure)

    def _losses(
        self, params: Tensor, batch: tuple[Tensor, ...], statistics: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """½‖A x − b‖² + λ‖x‖₁ of every instance."""
        (target,) = batch
        fit = (params @ self.matrix.T - target).square().sum(-1) / 2
        return fit + self.weight * params.abs().sum(-1), statistics
