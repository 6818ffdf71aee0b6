"""Random quadratics, the first experiment of Andrychowicz et al. 2016, and RNNprop's convex functions."""

import torch
from torch import Tensor

from l2o_training.tasks.base import Instances, Task, generator


def quadratic_losses(
    params: Tensor, batch: tuple[Tensor, ...], statistics: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """f(θ) = ‖Wθ − y‖² of every instance: params (B, n), batch W (B, n, n) and y (B, n); no statistics."""
    matrix, target = batch
    return (torch.einsum("bij,bj->bi", matrix, params) - target).square().sum(-1), statistics


class QuadraticTask(Task):
    """W, y ~ N(0, 1) elementwise, θ₀ = 0; the same W and y at every step.

    Args:
        size: n.
        device: where the instances live.

    Source: Andrychowicz et al. 2016, section 3.1; initialisation as in its PyTorch ports.
    """

    def __init__(self, size: int, device: torch.device):
        self.name = f"quadratic-{size}"
        self.size = size
        self.device = device

    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` pairs (W, y)."""
        rng = generator(seed, self.device)
        matrix = torch.randn(count, self.size, self.size, generator=rng, device=self.device)
        target = torch.randn(count, self.size, generator=rng, device=self.device)
        start = torch.zeros(count, self.size, device=self.device)
        return Instances(start, quadratic_losses, lambda: (matrix, target), rng)


def clipped_losses(
    params: Tensor, batch: tuple[Tensor, ...], statistics: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Mean over coordinates of min((θ − a)², 10): params and batch a (B, n); no statistics."""
    (center,) = batch
    return (params - center).square().clamp_max(10).mean(-1), statistics


class ClippedTask(Task):
    """θ₀, a ~ U[−1, 1] elementwise, the same a at every step.

    Args:
        size: n.
        device: where the instances live.

    Source: Lv, Jiang & Li 2017, section 4.2, "combination with convex functions"; clipped as in its code.
    """

    def __init__(self, size: int, device: torch.device):
        self.name, self.size, self.device = f"clipped-{size}", size, device

    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` pairs (θ₀, a)."""
        rng = generator(seed, self.device)
        start, center = (2 * torch.rand(2, count, self.size, generator=rng, device=self.device) - 1).unbind()
        return Instances(start, clipped_losses, lambda: (center,), rng)
