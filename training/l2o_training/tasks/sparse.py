"""Linear inverse problems with sparse solutions: sparse recovery, and the Lasso."""

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import ConfigError, require
from l2o_runtime.solvers import Structure
from l2o_runtime.solvers.classical import lasso
from l2o_training.tasks.base import Instances, Seen, Task, generator


def dictionary(rows: int, columns: int, seed: int, condition: float | None = None, correlation: float = 0.0) -> Tensor:
    """A (m, n) with entries from N(0, 1/m), and columns of norm 1.

    Args:
        rows, columns: m and n.
        seed: of the entries.
        condition: κ; where given, singular values fall evenly in their logarithms from 1 to 1/κ, before columns are
            scaled to norm 1, which moves them a little.
        correlation: ρ; columns k apart have an inner product of about ρᵏ.
    """
    matrix = torch.randn(rows, columns, generator=generator(seed, torch.device("cpu"))) / rows**0.5
    if correlation:
        found = [matrix[:, 0]]
        for column in matrix.unbind(1)[1:]:
            found.append(correlation * found[-1] + (1 - correlation**2) ** 0.5 * column)
        matrix = torch.stack(found, dim=1)
    if condition is not None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left * condition ** -torch.linspace(0, 1, len(values)) @ right
    unit: Tensor = matrix / torch.linalg.vector_norm(matrix, dim=0)
    return unit


def own_matrix(path: str, rows: int, columns: int) -> Tensor:
    """A (m, n) from a `.npy` file, as float32.

    Raises:
        ConfigError: it cannot be read, has another size, or numbers that are not finite.
    """
    try:
        found = np.load(path, allow_pickle=False)
        matrix = torch.from_numpy(np.asarray(found, dtype=np.float32))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ConfigError(f"matrix: {path}: no .npy file of numbers ({error})") from None
    shape = tuple(matrix.shape)
    require(shape == (rows, columns), f"matrix: {path} is {shape}; rows and columns are {(rows, columns)}")
    require(bool(matrix.isfinite().all()), f"matrix: {path} has numbers that are not finite")
    return matrix


class Recoveries(Instances):
    """Instances whose scores are ‖x − x*‖²/E‖x*‖² in place of losses.

    Attributes:
        expected: E‖x*‖².
    """

    structure: Structure
    expected: float

    def look(self, params: Tensor, statistics: Tensor) -> Seen:
        """Losses and gradients, and the relative error."""
        assert self.structure.solution is not None
        error = (params - self.structure.solution).square().sum(-1) / self.expected
        return super().look(params, statistics)._replace(score=error)


class SparseTask(Task):
    """b = A x* + ε with one A for all: x* has entries from N(0, 1) at places drawn with probability p, else zero.

    The loss of x is that of the Lasso, ½‖A x − b‖² + λ‖x‖₁; x begins at zero.

    Args:
        matrix: A, (m, n).
        weight: λ.
        sparsity: p.
        snr: 20 log₁₀ of the ratio of ‖A x*‖ to ‖ε‖ of every instance; None without noise.
        perturbed: σ; b is made with A + N(0, σ²/m), another for every draw of instances, while A is what solvers read.
        relative: whether scores are ‖x − x*‖²/(p n), whose mean is one at x = 0, in place of losses.
        device: where instances live.
    """

    structured = True

    def __init__(
        self,
        matrix: Tensor,
        *,
        weight: float = 0.005,
        sparsity: float = 0.1,
        snr: float | None = None,
        perturbed: float = 0.0,
        relative: bool = False,
        device: torch.device,
    ):
        self.name = f"sparse-{matrix.shape[0]}-{matrix.shape[1]}"
        self.matrix, self.weight, self.sparsity, self.snr = matrix.to(device), weight, sparsity, snr
        self.perturbed, self.relative = perturbed, relative

    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` pairs (x*, b)."""
        device, (rows, columns) = self.matrix.device, self.matrix.shape
        rng = generator(seed, device)
        chosen = torch.rand(count, columns, generator=rng, device=device) < self.sparsity
        solution = chosen * torch.randn(count, columns, generator=rng, device=device)
        matrix = self.matrix
        if self.perturbed:
            change = torch.randn(rows, columns, generator=rng, device=device)
            matrix = matrix + self.perturbed / rows**0.5 * change
        target = solution @ matrix.T
        if self.snr is not None:
            noise = torch.randn(count, rows, generator=rng, device=device)
            size = target.std(-1, correction=0, keepdim=True) * 10 ** (-self.snr / 20)
            target = target + size * noise
        structure = Structure(matrix=self.matrix, target=target, weight=self.weight, solution=solution)
        start = torch.zeros(count, columns, device=device)
        if not self.relative:
            return Instances(start, self._losses, lambda: (target,), rng, structure=structure)
        recoveries = Recoveries(start, self._losses, lambda: (target,), rng, structure=structure)
        recoveries.expected = self.sparsity * columns
        return recoveries

    def _losses(
        self, params: Tensor, batch: tuple[Tensor, ...], statistics: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """½‖A x − b‖² + λ‖x‖₁ of every instance."""
        (target,) = batch
        return lasso(params, target, self.matrix, self.weight), statistics
