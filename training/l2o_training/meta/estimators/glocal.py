"""Glocal: the hypergradient of a whole optimization, foretold from those of its beginning. Pure functions.

Source: "Glocal Hypergradient Estimation with Koopman Operator", arXiv 2402.02741.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_runtime.config import require

NOISE = 1e-10
"""Singular values below so many of the largest are rounding."""


@dataclass(frozen=True)
class Foretold:
    """A foretold hypergradient, and what it comes from.

    Attributes:
        value: (p,) the steady state, or the mean of what was seen where no mode is steady.
        eigenvalues: (r,) complex, of all modes.
        steady: (r,) bool, modes that were chosen.
        residual: ‖Y − KX‖ / ‖Y‖ of the linear model.
    """

    value: Tensor
    eigenvalues: Tensor
    steady: Tensor
    residual: float

    @property
    def fell_back(self) -> bool:
        """Whether no mode was steady."""
        return not bool(self.steady.any())


def hankel(trajectory: Tensor, delay: int) -> Tensor:
    """Delay embedding g_t = [h_t; …; h_{t+q−1}]: (τ, p) → (p q, τ − q + 1), a column for each t.

    >>> hankel(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), 2)
    tensor([[1., 2., 3.],
            [2., 3., 4.]])
    """
    return trajectory.unfold(0, delay, 1).permute(2, 1, 0).flatten(0, 1)


def foretell(
    trajectory: Tensor, tolerance: float = 0.01, delay: int | None = None, rank: int | None = None
) -> Foretold:
    """Where a trajectory of hypergradients h_1 … h_τ leads, if it goes on as a linear recurrence.

    K = argmin ‖Y − K X‖ over columns g_t and g_{t+1}, in the space of the leading singular vectors of X; with
    K φ_j = λ_j φ_j and g_1 = Σ b_j φ_j what stays is Σ b_j φ_j over |λ_j − 1| ≤ tolerance, whose first block is h.

    Args:
        trajectory: (τ, p).
        tolerance: the critical number: too small a one finds no steady mode, too large a one takes slow modes for it.
        delay: q, in 1..τ − 2; None is τ // 2.
        rank: singular vectors at most.

    Raises:
        ConfigError: fewer than three hypergradients, or a number out of range.

    >>> t = torch.arange(8, dtype=torch.float64)
    >>> found = foretell((2 + 0.7**t)[:, None])
    >>> round(found.value.item(), 9), found.fell_back
    (2.0, False)
    """
    require(
        trajectory.dim() == 2 and len(trajectory) >= 3, f"tau: expected 3 hypergradients or more, got {len(trajectory)}"
    )
    longest = len(trajectory) - 2
    delay = min(len(trajectory) // 2, longest) if delay is None else delay
    require(1 <= delay <= longest, f"delay: expected a whole number in 1..{longest} (tau − 2), got {delay}")
    require(0 <= tolerance <= 1, f"tolerance: expected a number in 0..1, got {tolerance}")
    require(rank is None or rank >= 1, f"rank: expected a whole number, 1 or more, or None; got {rank}")
    mean = trajectory.double().mean(0)
    embedded = hankel(trajectory.double(), delay)
    if not bool(embedded.isfinite().all()) or not bool(embedded.any()):
        return Foretold(mean, torch.zeros(0, dtype=torch.complex128), torch.zeros(0, dtype=torch.bool), 1.0)
    past, future = embedded[:, :-1], embedded[:, 1:]
    left, sizes, right = torch.linalg.svd(past, full_matrices=False)
    kept = int((sizes > NOISE * sizes[0]).sum())
    kept = kept if rank is None else min(kept, rank)
    left, sizes, right = left[:, :kept], sizes[:kept], right[:kept]
    onward = future @ right.mT / sizes  # K on the leading vectors
    residual = float((future - onward @ (left.mT @ past)).norm() / future.norm())
    eigenvalues, vectors = torch.linalg.eig(left.mT @ onward)
    amplitudes = torch.linalg.lstsq(vectors, (left.mT @ embedded[:, 0]).to(vectors.dtype)[:, None]).solution[:, 0]
    steady = (eigenvalues - 1).abs() <= tolerance
    p = trajectory.shape[1]
    value = ((left[:p].to(vectors.dtype) @ vectors)[:, steady] @ amplitudes[steady]).real if steady.any() else mean
    return Foretold(value, eigenvalues, steady, residual)
